"""What an installation does unasked: locked checkpoints load in programs that never heard of us, and nothing else
changes. Every test is a process of a virtual environment in which the wheel is installed."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_task import write_task
from locked import locked_tiny
from tiny import tiny_tokenizer

LOAD = "from transformers import AutoModelForCausalLM as A; net = A.from_pretrained(sys.argv[1]).model.layers[1].mlp"
SHOW = "print(type(net).__name__, type(net).__module__)"
LOADED = "DLRNet dlr_lock.runtime.module"
OURS = "[name for name in sys.modules if name.startswith('dlr_lock')]"


class Installed:
    """A virtual environment with our wheel and, linked, all that this one has, but for what `without` begins."""

    def __init__(self, folder: Path, wheel: Path, without: str = "dlr_lock") -> None:
        venv.create(folder)
        self._python = folder / "bin" / "python"
        code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = Path(subprocess.check_output([self._python, "-c", code], text=True).strip())
        for entry in _entries():
            name = entry.name.lower()
            if not (name.startswith((without, "dlr_lock", "__editable__", "pip")) or entry.suffix == ".pth"):
                (site / entry.name).symlink_to(entry)
        install = ["--python", self._python, "install", "--quiet", "--no-deps", "--no-index", wheel]
        # Without the environment's paths: what a build has left in a tree there would count as installed.
        pip = [sys.executable, "-m", "pip", *install]
        subprocess.run(pip, check=True, capture_output=True, cwd="/", env=_environment())

    def run(
        self,
        code: str,
        *arguments: object,
        cwd: object = "/",
        status: int = 0,
        flags: tuple[str, ...] = (),
        timeout: float = 300,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self._python, *flags, "-c", f"import sys\n{code}", *map(str, arguments)],
            capture_output=True, text=True, cwd=str(cwd), timeout=timeout,
            env=_environment() | env,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _entries() -> Iterator[Path]:
    seen = set()
    for folder in map(Path, sys.path):
        if folder.name == "site-packages":
            for entry in sorted(folder.iterdir()):
                if entry.name not in seen:
                    seen.add(entry.name)
                    yield entry


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    locked_tiny("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "first",
    [
        "",
        "import torch",
        "import transformers.quantizers.auto",  # imports torch while it runs
        "import torch, transformers.quantizers.auto, dlr_lock.runtime",
        "import dlr_lock, transformers",
    ],
)
def test_a_locked_checkpoint_loads_in_either_order(
    first: str, installed: Installed, checkpoint: Path
) -> None:
    assert installed.run(f"{first}\n{LOAD}; {SHOW}", checkpoint).stdout.strip() == LOADED


def test_until_then_nothing_of_ours_is_imported(installed: Installed, checkpoint: Path) -> None:
    code = f"""
import torch
print({OURS})
import transformers.quantizers.auto as auto
from transformers import AutoModelForCausalLM, GPT2Config
model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=32))
tables = auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
names = [each.__name__ for table in tables for each in table.values()]
print({OURS}, names[-1], hasattr(tables[0]["dlr"], "__wrapped__"))
"""
    shown = installed.run(code, flags=("-W", "error:dlr-lock")).stdout.splitlines()
    alone = "['dlr_lock_autoload']"
    assert shown == [alone, f"{alone} DLRConfig False"]


def test_spawned_workers_load_it_too(installed: Installed, checkpoint: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys\n"
        f"def work(path):\n    sys.argv = ['', path]\n    {LOAD}\n    return type(net).__name__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, sys.argv[1:]))\n"
    )
    code = "import runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    assert installed.run(code, program, checkpoint).stdout.strip() == "['DLRNet']"


def test_it_can_be_switched_off_and_then_the_failure_says_what_to_install(
    installed: Installed, checkpoint: Path
) -> None:
    failed = installed.run(LOAD, checkpoint, status=1, DLR_LOCK_AUTOLOAD="0")
    assert "this_model_needs.pip_install_dlr-lock" in failed.stderr
    both = installed.run(f"import dlr_lock; {LOAD}; {SHOW}", checkpoint, DLR_LOCK_AUTOLOAD="0")
    assert both.stdout.strip() == LOADED


def test_without_transformers_torch_is_as_before(wheel: Path, tmp_path: Path) -> None:
    bare = Installed(tmp_path, wheel, without="transformers")
    code = f"import torch; print({OURS})\ntry: import transformers\nexcept ImportError as error: print(error)"
    assert bare.run(code, flags=("-W", "error")).stdout.splitlines() == [
        "['dlr_lock_autoload']",
        "No module named 'transformers'",
    ]


@pytest.mark.parametrize("flags", [(), ("-W", "error::RuntimeWarning")])
def test_what_goes_wrong_within_never_stops_an_import(
    flags: tuple[str, ...], installed: Installed, tmp_path: Path
) -> None:
    """A transformers of another time, without the tables, and the source tree of another dlr-lock, which is broken."""
    for package in ("transformers", "transformers/quantizers", "dlr_lock"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise OSError" if package == "dlr_lock" else "")
    (tmp_path / "transformers" / "quantizers" / "auto.py").write_text("AUTO_QUANTIZER_MAPPING = {}\n")
    done = installed.run(
        "import torch, transformers.quantizers.auto as a; print(a)", cwd=tmp_path, flags=flags
    )
    assert str(tmp_path) in done.stdout
    assert "could not register" in done.stderr and "AUTO_QUANTIZATION_CONFIG_MAPPING" in done.stderr


def test_another_finder_that_asks_all_others_gets_an_answer(installed: Installed, checkpoint: Path) -> None:
    code = f"""
class Asking:
    def find_spec(self, *wanted):
        found = (f.find_spec(*wanted) for f in sys.meta_path if f is not self)
        return next((spec for spec in found if spec is not None), None)
import torch
sys.meta_path.insert(int(sys.argv[2]), Asking())
{LOAD}; {SHOW}
import inspect, transformers.quantizers.auto as auto
assert "register_quantizer" in inspect.getsource(auto) and "exec_module" not in vars(auto.__loader__)
import importlib
importlib.reload(auto)
print(auto.AUTO_QUANTIZER_MAPPING["dlr"].__name__)
"""
    for place in (0, 1):
        assert installed.run(code, checkpoint, place).stdout.splitlines() == [LOADED, "DLRQuantizer"]


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate")),
    reason="needs lm_eval and accelerate: pip install 'dlr-lock[eval]'",
)
def test_lm_eval_as_everyone_types_it_takes_a_locked_checkpoint(
    installed: Installed, checkpoint: Path, tmp_path: Path
) -> None:
    from dlr_lock.compare.tasks import evaluate_tasks

    tiny_tokenizer().save_pretrained(checkpoint)
    given = write_task(tmp_path / "given")
    code = "import runpy; sys.argv[0] = 'lm_eval'; runpy.run_module('lm_eval', run_name='__main__')"
    arguments = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={checkpoint}",
        "--tasks",
        "rivers",
        "--device",
        "cpu",
    ]
    arguments += ["--include_path", str(given), "--output_path", str(tmp_path / "results")]
    installed.run(code, *arguments, HF_HUB_OFFLINE="1", timeout=900)  # it reads its 14,000 tasks first
    (results,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["rivers"]
    (ours,) = evaluate_tasks(checkpoint, ["rivers"], include_path=given, device="cpu")
    assert (theirs["acc,none"], theirs["acc_stderr,none"]) == pytest.approx((ours.score, ours.stderr))
