"""Images as they are opened: modes, transparency, deep grey, orientation, and pictures that are
refused."""

import io
import os

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from support import rows
from support.errors import RowError
from support.rows import open_image
from tests.test_rows import PIXEL


def opened(image: Image.Image, format: str = "PNG", **kwargs) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    result = open_image(buffer.getvalue())
    assert result.mode == "RGB"
    return result


def pixels(image: Image.Image) -> list[tuple]:
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def near(image: Image.Image, *expected, by: int = 1) -> bool:
    return np.abs(np.array(pixels(image)) - np.array(expected)).max() <= by


def grey(*values) -> list[tuple]:
    return [(v, v, v) for v in values]


def picture(mode: str, *values) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    return image


RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def test_modes_without_transparency():
    assert pixels(opened(picture("1", 0, 255))) == grey(0, 255)
    assert pixels(opened(picture("L", 0, 128, 255))) == grey(0, 128, 255)
    assert pixels(opened(picture("RGB", RED, (1, 2, 3)))) == [RED, (1, 2, 3)]
    palette = picture("P", 0, 1)
    palette.putpalette([*RED, *GREEN])
    assert pixels(opened(palette)) == [RED, GREEN]
    assert pixels(opened(palette, "GIF")) == [RED, GREEN]
    cmyk = opened(picture("CMYK", (0, 255, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)), "TIFF")
    assert pixels(cmyk) == [RED, (0, 0, 0), WHITE]
    coloured = picture("RGB", RED, GREEN, WHITE, (10, 20, 30))
    for mode, format in (("YCbCr", "TIFF"), ("LAB", "TIFF")):
        stored = Image.new(mode, (3, 1), (200, 128, 128))
        assert near(opened(stored, format), *[(200, 200, 200)] * 3, by=10), mode
    assert near(opened(coloured, "JPEG", quality=100, subsampling=0), *pixels(coloured), by=90)


def test_modes_that_no_file_holds(monkeypatch):
    """HSV, La and RGBa come from other ways of opening: through the same conversions."""
    for image, expected in [
        (picture("HSV", (0, 255, 255), (85, 255, 255), (0, 0, 128)), [RED, GREEN, (128,) * 3]),
        (picture("YCbCr", (255, 128, 128), (0, 128, 128)), grey(255, 0)),
        (picture("RGBA", (*RED, 255), (*RED, 0)).convert("RGBa"), [RED, WHITE]),
        (picture("LA", (0, 255), (0, 0)).convert("La"), grey(0, 255)),
        (picture("PA", (0, 255), (0, 0)), grey(0, 255)),
        (picture("RGBX", (1, 2, 3, 0)), [(1, 2, 3)]),
    ]:
        monkeypatch.setattr(rows.Image, "open", lambda source, image=image, **_: image)
        result = open_image(b"")
        assert result.mode == "RGB" and near(result, *expected), image.mode


def test_transparency_stands_on_white():
    clear = picture("RGBA", (*RED, 255), (*RED, 0), (*RED, 128))
    pink = (255, 127, 127)
    for format, kwargs in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        assert near(opened(clear, format, **kwargs), RED, WHITE, pink), format
    assert near(opened(picture("LA", (0, 255), (0, 0), (0, 128))), *grey(0, 255, 127))
    palette = picture("P", 0, 1)
    palette.putpalette([*RED, *GREEN])
    assert pixels(opened(palette, transparency=1)) == [RED, WHITE]
    assert pixels(opened(palette, transparency=b"\xff\x80"))[0] == RED
    assert near(opened(palette, transparency=b"\xff\x80"), RED, (127, 255, 127))
    assert pixels(opened(palette, "GIF", transparency=0)) == [WHITE, GREEN]
    assert pixels(opened(picture("RGB", RED, GREEN), transparency=GREEN)) == [RED, WHITE]
    assert pixels(opened(picture("L", 7, 9), transparency=9)) == grey(7, 255)
    assert pixels(opened(picture("1", 0, 255), transparency=0)) == grey(255, 255)


def test_deep_grey_is_scaled_from_its_full_range():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    wide = Image.fromarray(values)
    assert wide.mode == "I;16"
    assert pixels(opened(wide)) == pixels(opened(wide, "TIFF")) == grey(0, 128, 255)
    big = Image.fromarray(values.astype(">u2"))
    assert big.mode == "I;16B" and pixels(opened(big, "TIFF")) == grey(0, 128, 255)
    assert pixels(opened(Image.fromarray(values.astype(np.int32)), "TIFF")) == grey(0, 128, 255)
    dark = np.array([[0, 200]], dtype=np.uint16)  # dark, but of the same range
    assert near(opened(Image.fromarray(dark)), *grey(0, 1))
    for clear in (0, 32768, 65535):  # a transparent value is white, as in grey of 8 bits
        expected = [255 if value == clear else value // 256 for value in (0, 32768, 65535)]
        assert pixels(opened(wide, transparency=clear)) == grey(*expected)
    below = np.array([[-5, 70000, 65535]], dtype=np.int32)
    assert pixels(opened(Image.fromarray(below), "TIFF")) == grey(0, 255, 255)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_are_scaled_from_their_range(white):
    values = np.array([[0, 0.5, 1]], dtype=np.float32) * white
    assert near(opened(Image.fromarray(values), "TIFF"), *grey(0, 128, 255))


def test_exif_orientation_is_applied():
    image = picture("RGB", RED, GREEN, WHITE)
    exif = Image.Exif()
    for orientation, size, expected in [
        (1, (3, 1), [RED, GREEN, WHITE]),
        (2, (3, 1), [WHITE, GREEN, RED]),
        (3, (3, 1), [WHITE, GREEN, RED]),
        (6, (1, 3), [RED, GREEN, WHITE]),
        (8, (1, 3), [WHITE, GREEN, RED]),
    ]:
        exif[0x0112] = orientation
        result = opened(image, exif=exif)
        assert result.size == size and pixels(result) == expected


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_pictures_that_are_refused(tmp_path, monkeypatch):
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(noise, "PNG")
    (tmp_path / "half.png").write_bytes(noise.getvalue()[:500])
    bad = [b"", b"none", PIXEL[:36], noise.getvalue()[:500], str(tmp_path / "half.png")]
    for source in [*bad, str(tmp_path / "none.png"), str(tmp_path)]:
        with pytest.raises(RowError, match="image .* cannot be opened"):
            open_image(source)
    for most, fits in ((64 * 64, True), (64 * 64 - 1, False)):  # counted before it is decoded
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        if fits:
            assert open_image(noise.getvalue()).size == (64, 64)
        else:
            with pytest.raises(RowError, match="64 x 64 pixels|bomb"):
                open_image(noise.getvalue())


def test_a_picture_that_is_far_longer_than_wide_is_refused():
    """A processor that scales the shorter side to 336 would make 1 x 6000 pixels 677 million."""
    for size in ((1, 200), (200, 1), (3, 600)):
        assert opened(Image.new("L", size)).size == size
    for size in ((1, 201), (201, 1), (1, 6000)):
        with pytest.raises(RowError, match="pixels; one side may be at most 200 times"):
            opened(Image.new("L", size))


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """PIL would hand it to Ghostscript, where a program may run for ever."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # looked up once
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    with pytest.raises(RowError, match="cannot be opened"):
        open_image(str(tmp_path / "a.eps"))
    assert not (tmp_path / "ran").exists()
