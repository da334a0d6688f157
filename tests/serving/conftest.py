"""Real engines and clients, in an environment of their own: `make test-serving`. Elsewhere nothing is collected."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from servers import ENVIRONMENT, START_SECONDS, Served, answers, free_port

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts `dlr-lock serve`; gives the base URL and the process. All are stopped at the end, if they still run."""
    started: list[subprocess.Popen] = []
    folder = tmp_path_factory.mktemp("server")
    log = folder / "log"
    # What an earlier installation left where the operator stands: it must not hide the installed one from the engine.
    (folder / "dlr_lock.egg-info").mkdir()
    (folder / "dlr_lock.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 2.4\nName: dlr-lock\nVersion: 0.1.0\n"
    )

    def start(checkpoint: Path, *flags: str, engine: str = "vllm") -> Served:
        port = free_port()
        program = str(Path(sys.executable).with_name("dlr-lock"))
        command = [program, "serve", str(checkpoint), "--engine", engine, "--"]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port), *flags],
                stdout=out, stderr=out, env=os.environ | ENVIRONMENT, cwd=folder,
            )  # fmt: skip
        started.append(process)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not answers(f"{url}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(0.5)
        return url, process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
