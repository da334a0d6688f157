"""`dlr-lock serve` with real clients: what an operator and their users meet."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from checkpoints import greedy, lock_smollm2, save_locked
from openai import OpenAI
from servers import ENVIRONMENT, Served, answers, family, free_port, gone, post
from tiny import tiny_tokenizer
from transformers import AutoTokenizer

PROMPT = "The river runs down to the sea, and the sea"
NEW = 16
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "200", "--max-num-seqs", "8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_locked("llama", tmp_path_factory.mktemp("locked"), **GROUPED)


@pytest.fixture(scope="module")
def vllm(serve: Callable[..., Served], checkpoint: Path) -> Served:
    return serve(checkpoint, *FLAGS)


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def wanted(checkpoint: Path, prompt: str = PROMPT) -> list[int]:
    """Tokens, not text: what random weights say is no UTF-8, of which every server shows other parts."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    (tokens,) = greedy(checkpoint, [tokenizer(prompt)["input_ids"]], NEW)
    return tokens


def asked(checkpoint: Path) -> dict[str, Any]:
    more = {"ignore_eos": True, "return_token_ids": True}
    return {"model": str(checkpoint), "max_tokens": NEW, "temperature": 0, "extra_body": more}


def completed(url: str, checkpoint: Path, prompt: str = PROMPT) -> list[int]:
    return client(url).completions.create(prompt=prompt, **asked(checkpoint)).choices[0].token_ids


def test_a_completion_is_that_of_transformers(vllm: Served, checkpoint: Path) -> None:
    assert completed(vllm[0], checkpoint) == wanted(checkpoint)


def test_a_stream_gives_the_same_piece_by_piece(vllm: Served, checkpoint: Path) -> None:
    stream = client(vllm[0]).completions.create(prompt=PROMPT, stream=True, **asked(checkpoint))
    pieces = [chunk.choices[0].token_ids for chunk in stream if chunk.choices]
    assert len(pieces) > 1 and [token for piece in pieces for token in piece] == wanted(checkpoint)


def test_chat(vllm: Served, checkpoint: Path) -> None:
    question = [{"role": "user", "content": "Who?"}]
    answer = client(vllm[0]).chat.completions.create(messages=question, **asked(checkpoint))
    assert answer.choices[0].token_ids == wanted(checkpoint, "user: Who?\nassistant:")


def test_four_at_once(vllm: Served, checkpoint: Path) -> None:
    prompts = [PROMPT, "A model reads", "In 1969 two", "def forward(self"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: completed(vllm[0], checkpoint, prompt), prompts))
    assert found == [wanted(checkpoint, prompt) for prompt in prompts]


def test_a_real_model_locked_by_a_conversion(serve: Callable[..., Served], tmp_path: Path) -> None:
    checkpoint = lock_smollm2(tmp_path)
    url, process = serve(checkpoint, *FLAGS)
    prompts = [
        PROMPT,
        "The capital of France is",
        "def fibonacci(n):\n",
        "In 1969, two men",
        "Once upon a time",
    ]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(lambda prompt: completed(url, checkpoint, prompt), prompts))
    assert found == [wanted(checkpoint, prompt) for prompt in prompts]
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_bad_requests_are_answered_and_the_server_lives(vllm: Served, checkpoint: Path) -> None:
    url, name = f"{vllm[0]}/v1/completions", str(checkpoint)
    bodies = [
        {"model": name, "prompt": ""},
        {"model": name, "prompt": [5] * 500},
        {"model": name, "prompt": PROMPT, "max_tokens": 10**9},
        {"model": name, "prompt": PROMPT, "max_tokens": -1},
        {"model": name, "prompt": [10**6]},
        {"model": "another", "prompt": PROMPT},
        b"{not json",
    ]
    assert [status for status in map(lambda body: post(url, body), bodies) if not 400 <= status < 500] == []
    assert completed(vllm[0], checkpoint) == wanted(checkpoint)


def test_mixed_requests_leave_memory_flat(vllm: Served, checkpoint: Path) -> None:
    url, process = vllm

    def resident() -> int:
        return sum(psutil.Process(pid).memory_info().rss for pid in family(process.pid))

    def some(count: int) -> None:
        def one(number: int) -> None:
            if number % 5 == 4:
                post(f"{url}/v1/completions", b"{")
            else:
                completed(url, checkpoint, PROMPT[: 3 + number % 40])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(one, range(count)))

    some(60)  # what is made once, is
    before = resident()
    some(200)
    assert resident() - before < 30e6  # of 1.5 GB; a float32 logit row kept a token would be 4 MB here


def test_sigterm_ends_it_cleanly(serve: Callable[..., Served], checkpoint: Path) -> None:
    url, process = serve(checkpoint, *FLAGS)
    pids = family(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert gone(pids) == set() and not answers(f"{url}/health")


def test_ctrl_c_twice_leaves_no_process(serve: Callable[..., Served], checkpoint: Path) -> None:
    url, process = serve(checkpoint, *FLAGS)
    pids = family(process.pid)
    for _ in range(2):  # a terminal sends it to all of them, and the second meets a server that is going down
        for pid in family(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
    process.wait(60)
    assert gone(pids) == set() and not answers(f"{url}/health")


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_an_unknown_flag_is_refused_in_the_engine_s_own_words(engine: str, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "dlr_lock", "serve", str(checkpoint), "--engine", engine, "--"]
    found = subprocess.run(
        [*command, "--port", str(free_port()), "--unknown-flag"], capture_output=True, text=True, cwd="/",
        env=os.environ | ENVIRONMENT, timeout=600,
    )  # fmt: skip
    assert found.returncode == 2 and "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if "--unknown-flag" in line]
    assert "unrecognized arguments" in line or "No such option" in line


def test_a_killed_server_leaves_no_process(serve: Callable[..., Served], checkpoint: Path) -> None:
    _, process = serve(checkpoint, *FLAGS)
    pids = family(process.pid)
    assert len(pids) > 1
    process.kill()
    process.wait()
    assert gone(pids) == set()


def test_transformers_own_server(serve: Callable[..., Served], checkpoint: Path) -> None:
    url, process = serve(checkpoint, "--dtype", "float32", engine="transformers")
    stream = client(url).chat.completions.create(
        model=str(checkpoint), messages=[{"role": "user", "content": "Who?"}], max_tokens=NEW,
        temperature=0, stream=True,
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in choices)
    expected = tiny_tokenizer().decode(wanted(checkpoint, "user: Who?\nassistant:"), skip_special_tokens=True)
    said, meant = (
        t.replace("\ufffd", "") for t in (text, expected)
    )  # it stops at the end of a text, if one comes
    assert meant.startswith(said) and choices[-1].finish_reason in ("length", "stop")
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def test_a_taken_port_is_said_at_once(vllm: Served, checkpoint: Path) -> None:
    port = vllm[0].rpartition(":")[2]
    command = [sys.executable, "-m", "dlr_lock", "serve", str(checkpoint), "--", "--host", "127.0.0.1"]
    found = subprocess.run([*command, "--port", port], capture_output=True, text=True, cwd="/")
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in found.stderr


def test_the_engine_inherits_nothing_and_finds_the_plugin(checkpoint: Path) -> None:
    from dlr_lock.runtime.serving import prepare_server

    flags = ["--port", str(free_port())]
    os.environ["VLLM_PLUGINS"] = "another"
    try:
        server = prepare_server(checkpoint, flags=flags)
    finally:
        del os.environ["VLLM_PLUGINS"]
    assert server.engine == "vllm" and server.command[-2:] == flags
    assert server.environment["VLLM_PLUGINS"] == "another,dlr"
    assert "GOMP_SPINCOUNT" not in server.environment
