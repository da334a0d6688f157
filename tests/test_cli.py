"""The command line as a user meets it: with its exit status and its last line, at first in a process of its own."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from rich.markup import escape
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from typer.testing import CliRunner

from dlr_lock import DLRError, convert_model
from dlr_lock.audit.attacks import TRAINING_ATTACKS
from dlr_lock.audit.config import ATTACKS, BUDGETS, AuditConfig
from dlr_lock.cli import app, main
from dlr_lock.common.version import __version__
from dlr_lock.convert.config import EFFORTS, ConversionConfig
from dlr_lock.convert.data import english_topics


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "dlr_lock", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == status, result.stderr
    if status:
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("dlr-lock: ") and "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny("llama", folder / "source")
    (folder / "topics.txt").write_text(english_topics()[:40_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def converted(folder: Path) -> dict:
    result = run(
        "convert", folder / "source", folder / "out", "--data", folder / "topics.txt", "--tokens", 2048,
        "--train-tokens", 8192, "--batch", 256, "--depth", 3, "--rank", 16, "--layers", "0-1", "--json",
    )  # fmt: skip
    return json.loads(result.stdout)


def test_convert_prints_one_object(converted: dict) -> None:
    keys = {"module", "rel_error", "flatten_gap", "coupling", "train_tokens", "seconds"}
    assert len(converted["modules"]) == 2 and all(keys <= set(m) for m in converted["modules"])
    assert {"params_original", "params_locked", "seconds"} <= set(converted)


def test_a_ruined_model_ends_in_a_warning(folder: Path, tmp_path: Path) -> None:
    """A random model of peaked logits, hardly trained: its KL is above 0.5, and the last line says what that means."""
    source = save_tiny("llama", tmp_path / "sharp")
    weights = load_file(source / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    save_file(weights | {name: 4 * weights[name]}, source / "model.safetensors", {"format": "pt"})
    out = run(
        "convert", source, tmp_path / "out", "--data", folder / "topics.txt", "--tokens", 512, "--train-tokens", 256,
        "--batch", 128, "--sequence", 64, "--depth", 3, "--rank", 16, "--redistill", 0,
    ).stdout  # fmt: skip
    last = " ".join(out[out.index("written to") :].split())
    assert "Warning: this model is not the original any more" in last and last.endswith("--tokens).")
    assert "> **Warning:**" in (tmp_path / "out" / "README.md").read_text()


def test_inspect_verify_eval_generate(converted: dict, folder: Path) -> None:
    assert "model.layers.1.mlp" in run("inspect", folder / "out").stdout
    assert json.loads(run("inspect", folder / "out", "--json").stdout)["conversion"]["mlps"] == 2
    assert json.loads(run("verify", folder / "out", "--json").stdout) == {"ok": True, "faults": []}
    arguments = ("eval", folder / "out", "--text", folder / "topics.txt", "--tokens", 1024)
    alone = json.loads(run(*arguments, "--json").stdout)
    both = json.loads(run(*arguments, "--original", folder / "source", "--json").stdout)
    assert alone["kl"] is None and both["kl"] > 0 and both["loss"] == pytest.approx(alone["loss"])
    assert "likeliest token flipped" in run(*arguments, "--original", folder / "source").stdout
    several = json.loads(run(*arguments, "--text", folder / "topics.txt", "--skip", 1024, "--json").stdout)
    first, second = several["texts"]
    assert first["loss"] == second["loss"] == pytest.approx(several["loss"]) != alone["loss"]
    assert several["skipped"] == 1024 and several["tokens"] == 2 * first["tokens"]
    words = run(
        "generate", folder / "out", "The river", "--max-new-tokens", 5, "--compare", folder / "source"
    )
    assert words.stdout.startswith("--- locked\n") and "--- original\n" in words.stdout


def test_a_backend_that_cannot_run_is_said_before_any_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, says in (("foo", "'foo' is unknown"), ("triton", "wants a CUDA")):
        monkeypatch.setenv("DLR_LOCK_BACKEND", name)
        result = run("convert", folder / "source", folder / "new", "--device", "cpu", status=2)
        assert says in result.stderr and "distilling" not in result.stderr


@pytest.mark.parametrize("original", ["no/such/model", "", "topics.txt"])
def test_a_wrong_original_is_said_before_the_first_completion(
    original: str, converted: dict, folder: Path
) -> None:
    named = folder / original if original else ""
    assert run("generate", folder / "out", "The river", "--compare", named, status=2).stdout == ""


def test_an_altered_file_is_named(converted: dict, folder: Path) -> None:
    path = folder / "out" / "generation_config.json"
    sound = path.read_text()
    path.write_text(sound.replace("{", "{ ", 1))
    assert "generation_config.json" in run("verify", folder / "out", status=2).stderr
    path.write_text(sound)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convert", "{}/nowhere", "{}/new"), "nowhere"),
        (("convert", "{}/source", "{}/out", "--tokens", "2048"), "exists"),
        (("convert", "{}/out", "{}/new"), "already locked"),
        (("convert", "{}/source", "{}/new", "--data", "{}/topics.txt"), "wanted"),
        (("convert", "{}/source", "{}/new", "--layers", "9"), "out of range"),
        (("convert", "{}/source", "{}/new", "--layers", ""), "is not a layer or a range"),
        (("convert", "{}/source", "{}/new", "--rank", "many"), "--rank"),
        (("convert", "{}/source", "{}/new", "--colour", "red"), "--colour"),
        (("convert", "{}/source", "{}/new", "--visits", "8192"), "--visits is now --train-tokens"),
        (("convert", "{}/source", "{}/new", "--together", "0"), "--together is now --end-to-end"),
        (("convert", "{}/source", "{}/new", "--unlock", "0"), "--unlock is now --redistill"),
        (("convert", "{}/source", "{}/new", "--start", "random"), "--start is now --init"),
        (("convert", "{}/source", "{}/new", "--gated"), "no lock"),
        (("convert", "{}/source", "{}/source/new"), "lie in one another"),
        (("convert", "{}/source", "/proc/new"), "cannot write to /proc"),
        (("convert", "{}/source", "{}/new", "--temperature", "nan"), "--temperature"),
        (("convert", "{}/source", "{}/new", "--mlps", "norm"), "no module that --mlps 'norm' matches"),
        (("convert", "{}/source", "{}/new", "--device", "meta"), "use cpu or cuda"),
        (("eval", "{}/out", "--text", "{}/none.txt"), "none.txt"),
        (("verify", "{}/source"), "dlr_manifest.json"),
        (("inspect", "{}/source"), "not a locked checkpoint"),
        (("generate", "{}/out", ""), "empty"),
        (("generate", "{}/out", "x", "--device", "cuda:77"), "cuda:77"),
        (("generate", "{}/out", "x", "--temperature", "nan"), "temperature"),
        (("generate", "{}/out", "x", "--top-p", "0.9"), "give a temperature above 0"),
        (
            ("generate", "{}/nowhere", "x", "--max-new-tokens", "0"),
            "at least one new token",
        ),  # before a model is loaded
        (("generate", "{}/out", "x", "--temperature", "1", "--top-p", "nan"), "top-p must be"),
        (("generate", "{}/out", "x", "--temperature", "1", "--top-k", "-1"), "top-k must be"),
        (("generate", "{}/out", "x", "--repetition-penalty", "0"), "repetition penalty"),
        (("generate", "{}/out", "x", "--system", "Be brief."), "no chat template"),
        (("eval", "{}/out", "--text", "{}/topics.txt", "--skip", "-1"), "--skip must not be negative"),
        (("eval", "{}/out", "--text", "{}/topics.txt", "--skip", "9999999"), "nothing is left"),
        (("serve", "{}/out", "--port", "8001"), "flags follow after --"),
        (("serve", "{}/out", "--", "--model", "x"), "another model than the checkpoint"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_mistakes_end_in_one_line_and_status_two(
    arguments: tuple[str, ...],
    says: str,
    converted: dict,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = sorted(p.name for p in folder.iterdir())
    # In this process: importing torch and transformers takes five seconds.
    monkeypatch.setattr(sys, "argv", ["dlr-lock", *(a.replace("{}", str(folder)) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and last.startswith("dlr-lock: ") and says in last
    assert sorted(p.name for p in folder.iterdir()) == before


@pytest.mark.parametrize(("command", "config"), [("convert", ConversionConfig), ("audit", AuditConfig)])
def test_every_choice_is_an_option_with_its_default_and_help(command: str, config: type) -> None:
    offered = {
        parameter.name: parameter for parameter in typer.main.get_command(app).commands[command].params
    }
    for field in fields(config):
        option = offered[field.name]
        assert option.opts == [f"--{field.name.replace('_', '-')}"]
        assert option.default == field.default and option.help.startswith(escape(field.metadata["help"]))


COMMANDS = sorted(typer.main.get_command(app).commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_default(command: str) -> None:
    """Also those that an effort, a budget or the machine chooses; a switch is off, and what is required has none."""
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"}).output
    lines = [line for line in shown.splitlines() if re.search(r" --[a-z]", line) and "<bool>" not in line]
    assert [line for line in lines if "[default: " not in line and "[required]" not in line] == []


def test_help_shows_what_an_effort_and_a_budget_choose() -> None:
    def words(command: str) -> str:
        return " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"}).output.split())

    assert f"standard {EFFORTS['standard'].train_tokens:,}" in words("convert")
    assert f"full {BUDGETS['full'].tuning:,}" in words("audit")


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("--version",), *((name, "--help") for name in COMMANDS)]
)
def test_help_takes_neither_torch_nor_transformers(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys; from dlr_lock.cli import main\n"
        f"sys.argv = ['dlr-lock', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: status = end.code\n"
        "print(status, [n for n in ('torch', 'transformers', 'numpy', 'triton') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    *shown, last = result.stdout.splitlines()
    assert last == "0 []" and len(shown) >= 1, result.stderr
    assert (shown == [f"dlr-lock {__version__}"]) is (arguments == ("--version",))


def test_the_help_names_the_attacks_that_there_are() -> None:
    assert tuple(TRAINING_ATTACKS) == ATTACKS


def test_names_are_taken_in_any_case() -> None:
    audit = AuditConfig(attacks="Full, LORA,mezo", budget="QUICK", task="Invented", device="CPU").resolved()
    assert audit.chosen_attacks == ["full", "LoRA", "MeZO"] and (audit.budget, audit.task) == (
        "quick",
        "invented",
    )
    given = {"effort": "Quick", "init": "RANDOM", "dtype": "BFloat16", "across": "Independent", "act": "SiLU"}
    convert = ConversionConfig(**given, data="SELF", layers="Last-2").resolved().to_dict()
    assert {name: convert[name] for name in given} == {name: value.lower() for name, value in given.items()}
    assert (convert["data"], convert["layers"]) == ("self", "last-2")
    assert ConversionConfig(layers="All").resolved().layers is None
    with pytest.raises(DLRError, match="unknown attack 'prompts'; one of full, LoRA"):
        AuditConfig(attacks="full,prompts").resolved()


def test_a_choice_by_its_old_name_is_refused_with_the_new_one(folder: Path) -> None:
    with pytest.raises(DLRError, match="visits is now train_tokens"):
        convert_model(folder / "source", folder / "new", visits=8192)
    with pytest.raises(DLRError, match="unknown option 'colour'; one of layers, mlps"):
        convert_model(folder / "source", folder / "new", colour="red")
