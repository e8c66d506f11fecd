"""Data from the Hugging Face hub, for which a local server stands in."""

import hashlib
import http.server
import json
import os
import threading

import pytest

from tests.conftest import fails, launch, lines


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of the hub that are needed for the data set owner/name: what it holds, and its
    files."""

    commit = "0123456789abcdef" * 2 + "01234567"
    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_HEAD(self):
        self.asked.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        info = [f"/api/datasets/owner/name{end}" for end in ("", "/revision/main")]
        prefix, _, name = path.partition("/resolve/")
        name = name.partition("/")[2]
        if path in info:
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.files.items()]
            about = {"_id": "1", "id": "owner/name", "sha": self.commit, "siblings": siblings}
            body, kind = json.dumps(about | {"private": False, "tags": []}).encode(), "json"
        elif path.startswith(f"/api/datasets/owner/name/tree/{self.commit}"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
            body, kind = json.dumps(tree).encode(), "json"
        elif prefix == "/datasets/owner/name" and name in self.files:
            body, kind = self.files[name], "octet-stream"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A local server in the hub's place -> (the handler, the variables that point to it)."""
    monkeypatch.setattr(Hub, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_data_from_the_hub(world, trained, hub, tmp_path, monkeypatch):
    """A parquet file that holds its images, and a JSONL file with the images beside it: how much
    is read is said before, both are trained on, and only what is needed is fetched. A second run
    finds them on this machine, without the hub."""
    import datasets

    handler, address = hub
    folder = os.path.dirname(world["sft"])
    rows = [json.loads(line) for line in open(world["sft"])][:4]
    pictures = {
        row["images"][0]: open(os.path.join(folder, row["images"][0]), "rb").read() for row in rows
    }
    inline = [
        row | {"images": [{"bytes": pictures[row["images"][0]], "path": None}]} for row in rows[:2]
    ]
    datasets.Dataset.from_list(inline).to_parquet(tmp_path / "rows.parquet")
    jsonl = "".join(json.dumps(row) + "\n" for row in rows[2:]).encode()
    parquet = (tmp_path / "rows.parquet").read_bytes()
    files = {"data/rows.parquet": parquet, "rows.jsonl": jsonl, **pictures}
    files["other.parquet"] = bytes(30_000_000)
    monkeypatch.setattr(Hub, "files", files)
    sources = [f"hf://datasets/owner/name/{name}" for name in ("data/rows.parquet", "rows.jsonl")]
    env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

    def train(name: str, *data, **more):
        flags = ("--data", *data, "--output_dir", tmp_path / name, "--max_steps", 1)
        batch = ("--per_device_train_batch_size", 2 * len(data))
        return launch("sft.py", "--model", trained, *flags, *batch, **env | more).stderr

    said = train("a", sources[0])
    assert f"--data: reads {sources[0]} from the hub, at most 0.00 GB" in said
    fetched = [line for line in handler.asked if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == 1 and fetched[0].endswith("/data/rows.parquet")
    first = next(i for i, line in enumerate(handler.asked) if "/resolve/" in line)
    assert any("/api/datasets/owner/name" in line for line in handler.asked[:first])
    said = train("b", *sources)
    assert f"--data: reads {sources[1]} from the hub, at most 0.03 GB" in said
    for name in "ab":
        (step,) = lines(tmp_path / name / "metrics.jsonl")
        assert step["loss"] > 0 and step["rows_left_out"] == 0
    before = len(handler.asked)
    said = train("c", *sources, HF_HUB_OFFLINE="1")
    assert len(handler.asked) == before and "from the hub's cache on this machine" in said
    b, c = (lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in "bc")
    assert b == c


def test_published_data_offline_is_one_line(trained, tmp_path):
    said = fails("rlvr.py", "--ckpt", trained, "--output_dir", tmp_path / "o")
    assert "rl_training_data_filtered_2k.parquet: not on this machine" in said
    assert "hf download prism-vlm/rl_dataset" in said and "--data FILE" in said
    assert not (tmp_path / "o").exists()
