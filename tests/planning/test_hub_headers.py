"""A plan of a repository on a hub, which a server on this machine stands for: what is asked of it, and how much."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tiny import save_tiny, tiny_model

from dlr_lock.planning.plan import plan_conversion

COMMIT = "0123456789abcdef" * 2 + "01234567"
CHOICES = {"data": "self", "tokens": 512, "train_tokens": 1024, "depth": 3, "rank": 16}


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """A folder as the repository tiny/hub, as huggingface_hub asks for it: the address, and the bytes sent by file."""
    sent: Counter[str] = Counter()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            file, status = folder / Path(path).name, 200
            if path.startswith("/api/models/tiny/hub"):
                names = sorted(path.name for path in folder.iterdir())
                about = {"id": "tiny/hub", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                tree = [{"type": "file", "path": name, "oid": name, "size": 0} for name in names]
                data = json.dumps(tree if "/tree/" in path else about).encode()
            elif path.startswith("/tiny/hub/resolve/") and file.is_file():
                data = file.read_bytes()
            else:
                status, data = 404, b""
            if status == 200 and (part := self.headers.get("range")):
                first, last = (int(number) for number in part.removeprefix("bytes=").split("-"))
                status, data = 206, data[first : last + 1]
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(data)), "ETag": f'"{file.name}"', "X-Repo-Commit": COMMIT,
                **({"X-Error-Code": "EntryNotFound"} if status == 404 else {}),
            }.items():  # fmt: skip
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)
                sent[file.name] += len(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def test_of_a_repository_no_more_than_headers_is_fetched(tmp_path: Path) -> None:
    """The plan is that of the same model in a folder."""
    folder = save_tiny("llama", tmp_path / "source", layers=8)
    tiny_model("llama", layers=8).bfloat16().save_pretrained(folder, max_shard_size="500KB")
    (folder / "model.safetensors").unlink()
    shards = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert len(shards) > 1
    flags = [word for name, value in CHOICES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with served(folder) as (address, sent):
        done = subprocess.run(
            [sys.executable, "-m", "dlr_lock", "plan", "tiny/hub", "--device", "h200", "--json", *flags],
            capture_output=True,
            text=True,
            env=os.environ
            | {
                "HF_ENDPOINT": address,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "NO_PROXY": "*",
            },
        )
    assert done.returncode == 0, done.stderr
    plan, same = json.loads(done.stdout), plan_conversion(folder, device="h200", **CHOICES).to_dict()
    for name in ("params", "modules", "mlps", "tokens", "flops"):
        assert plan[name] == same[name], name
    headers = sum(8 + int.from_bytes((folder / name).read_bytes()[:8], "little") for name in shards)
    assert 0 <= same["disk_bytes"] - plan["disk_bytes"] <= headers  # which are not counted of a repository
    fetched = {name: sent[name] for name in shards}
    assert all(0 < fetched[name] <= 100_001 < size for name, size in shards.items()), (fetched, shards)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
