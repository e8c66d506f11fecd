"""Reading rows: from 512-pixel JPEGs, named by a JSONL file or held by a parquet file, to encoded
batches of two, in the process itself, in a thread of it, or in worker processes.

    first batch    seconds from opening the file to the first batch
    rows/s         rows encoded a second, while nothing else is done
    memory         anonymous MB that this has added, workers included: at the first batch, and the
                   most that was seen later. Pages of files do not count: the system takes them back
    main thread    small operations of torch that the main thread launches a second while rows are
                   encoded beside it, against alone

Every line of the table is a process of its own. `datasets` rewrites a parquet file as Arrow when it
is opened for the first time: those seconds are told apart. The last line is what worker processes
leave the main thread over what a thread leaves it.

    python benchmarks/loader.py [--rows 20000 200000 --folder /tmp]
"""

import argparse
import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from glob import glob
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Encoded, encode_response
from support.huggingface import load_processor
from support.loader import batches
from support.rows import load_data
from support.tiny import CHAT_TEMPLATE, train_tokenizer, write_processor

WAYS = ("0", "thread", "1", "2")  # workers; a thread is how it would be done without them
IMAGE = {  # as in the published Qwen3-VL: 512 x 512 pixels are 256 tokens
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def generate(folder: str, most: int, sizes: list[int]) -> None:
    """Files of `sizes` rows. There are 32 pictures; each row has a path of its own to one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    response = "<caption>" + "A grey cloud over hills. " * 30 + "</caption>"
    write_processor(Path(folder), train_tokenizer([response], 64), IMAGE, CHAT_TEMPLATE)
    os.mkdir(os.path.join(folder, "images"))
    pictures = []
    for _ in range(32):
        noise = Image.effect_noise((64, 64), 90).resize((512, 512), Image.Resampling.BICUBIC)
        noise.convert("RGB").save(picture := io.BytesIO(), "JPEG", quality=40)
        pictures.append(picture.getvalue())
    for i in range(most):
        path = os.path.join(folder, "images", f"{i:06d}.jpg")
        if i < len(pictures):
            Path(path).write_bytes(pictures[i])
        else:
            os.link(os.path.join(folder, "images", f"{i % len(pictures):06d}.jpg"), path)
    print(f"JPEGs of {sum(map(len, pictures)) / len(pictures) / 1e3:.0f} KB", flush=True)
    for rows in sizes:
        plain = [{"question": f"Number {i}?", "response": response} for i in range(rows)]
        with open(os.path.join(folder, f"{rows}.jsonl"), "w") as file:
            for i, row in enumerate(plain):
                file.write(json.dumps(row | {"image": f"images/{i:06d}.jpg"}) + "\n")
        writer = None
        for start in range(0, rows, 1000):
            some = plain[start : start + 1000]
            some = [r | {"image": {"bytes": pictures[i % 32]}} for i, r in enumerate(some)]
            table = pa.Table.from_pylist(some)
            path = os.path.join(folder, f"{rows}.parquet")
            writer = writer or pq.ParquetWriter(path, table.schema, use_dictionary=False)
            writer.write_table(table)
        writer.close()


def anonymous() -> float:
    """MB of this process and its children; a page that some share counts once."""
    pids = [os.getpid()]
    for path in glob(f"/proc/{os.getpid()}/task/*/children"):
        pids += map(int, Path(path).read_text().split())
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").open())
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1e3


def operations(seconds: float) -> tuple[int, float]:
    """Launches small operations for so long -> how many, and the time that they took, without
    what this thread waited for a core that others had."""
    waited = lambda: int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    x, count, start, before = torch.zeros(8), 0, time.perf_counter(), waited()
    while time.perf_counter() - start < seconds:
        for _ in range(1000):
            x.add_(1)
        count += 1000
    return count, time.perf_counter() - start - (waited() - before)


def beside(stream):
    """The stream's batches, drawn by a thread that keeps two ahead."""
    ahead = queue.Queue(2)
    draw = lambda: [ahead.put(batch) for batch in stream]
    threading.Thread(target=draw, daemon=True).start()
    while True:
        yield ahead.get()


def measure(path: str, way: str, seconds: float) -> dict:
    """One line of the table, in this process."""
    processor = load_processor(os.path.dirname(path))
    encode = lambda example, prompt: (prompt, encode_response(processor, example.response))
    count, took = operations(seconds / 2)
    alone = count / took
    before, start = anonymous(), time.perf_counter()
    examples = load_data(path, ("response",))
    opened = time.perf_counter() - start
    workers = int(way) if way != "thread" else 0
    stream = batches(Encoded(examples, processor, encode), 2, seed=0, workers=workers)
    stream = beside(stream) if way == "thread" else stream
    next(stream)
    first = time.perf_counter() - start
    memory = [anonymous() - before]
    rows, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        rows += len(next(stream))
        if rows % 50 == 0:
            memory.append(anonymous() - before)
    rate = rows / (time.perf_counter() - start)
    count, took = 0, 0.0
    while way != "0" and took < seconds:  # what it launches while it does not wait for a batch
        more = operations(0.1)
        count, took = count + more[0], took + more[1]
        next(stream), next(stream)
    main = count / took / alone if count else None
    return dict(opened=opened, first=first, rate=rate, main=main, memory=memory)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--folder", help="where the files are made, and removed again")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # one line: file, way
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(measure(*args.measure, args.seconds)), flush=True)
        os._exit(0)  # the thread still draws

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        generate(folder, max(args.rows), args.rows)
        env = os.environ | {"HF_DATASETS_CACHE": folder, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

        def run(path, way):
            command = [sys.executable, __file__, "--seconds", str(args.seconds), "--measure"]
            out = subprocess.run([*command, path, way], env=env, stdout=-1, check=True).stdout
            return json.loads(out.splitlines()[-1])

        print("| file | workers | first batch, s | rows/s | memory, MB | most | main thread |")
        print("|---|---|---|---|---|---|---|")
        left = {}
        for kind in ("jsonl", "parquet"):
            for rows in args.rows:
                path = os.path.join(folder, f"{rows}.{kind}")
                if kind == "parquet":
                    first = run(path, "0")["first"]
                    print(f"| {rows:,} {kind}, first time | 0 | {first:.1f} | | | | |", flush=True)
                for way in WAYS:
                    m = run(path, way)
                    left.setdefault(way, []).append(m["main"])
                    cells = f"{m['first']:.1f} | {m['rate']:.0f} | {m['memory'][0]:.0f}"
                    cells += f" | {max(m['memory']):.0f} | "
                    cells += "" if m["main"] is None else f"{m['main']:.2f}"
                    print(f"| {rows:,} {kind} | {way} | {cells} |", flush=True)
    turns = [ours / theirs for ours, theirs in zip(left["1"], left["thread"])]
    mean = sum(turns) / len(turns)
    print(f"ratio {mean:.2f}   (min {min(turns):.2f}, max {max(turns):.2f})")


if __name__ == "__main__":
    main()
