"""An attack is one object and one registration: everything else takes it from there, and knows none by name."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacked import SMALL
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from dlr_lock.audit.attacks import TRAINING_ATTACKS, TrainingAttack, register
from dlr_lock.audit.attacks.gradient import GradientAttack
from dlr_lock.audit.config import AuditConfig
from dlr_lock.audit.strategies.table import Strategy
from dlr_lock.cli import app
from dlr_lock.common.errors import DLRError

TREE = Path(__file__).parents[3]


class NormsOnly(GradientAttack):
    """What docs/extending.md makes a file of: of all weights, those of the norms alone are trained."""

    @contextmanager
    def trained(
        self, model: PreTrainedModel, mlps: Sequence[str], strategy: Strategy
    ) -> Iterator[list[Tensor]]:
        with super().trained(model, mlps, strategy) as weights:
            for weight in weights:
                weight.requires_grad_(weight.dim() == 1)
            yield [weight for weight in weights if weight.dim() == 1]


@pytest.fixture
def norms() -> Iterator[TrainingAttack]:
    attack = NormsOnly("norms", "Of all weights, those of the norms alone are trained.", 1e-3, "weights")
    yield register(attack)
    del TRAINING_ATTACKS["norms"]


def test_a_registered_attack_is_in_the_json_the_page_and_the_terminal(
    folder: Path, norms: TrainingAttack
) -> None:
    asked = ["audit", str(folder / "llama-locked"), "--original", str(folder / "llama"), "--attacks", "norms"]
    asked += ["--data", str(folder / "text.txt"), "--out", str(folder / "norms")]
    asked += [f"--{name}={value}" for name, value in (SMALL | {"seeds": 1, "rates": 1}).items()]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "norms" / "audit.json").read_text(encoding="utf-8"))
    assert written["attacks"] == {"norms": norms.about}
    for rows in (written["runs"], written["steps"]):
        assert {row["variant"] for row in rows} == {"original", "locked", "redistilled, 0.5"}
        assert {row["attack"] for row in rows} == {"norms"}
    page = (folder / "norms" / "audit.html").read_text(encoding="utf-8")
    terminal = " ".join(result.output.split())
    for text in (page, terminal):
        assert "norms" in text and norms.about.rstrip(".") in text


def test_what_attacks_there_are_is_asked_of_the_registry(norms: TrainingAttack) -> None:
    assert AuditConfig().resolved().chosen_attacks == [
        "full",
        "LoRA",
        "outside",
        "PEFT",
        "norms",
    ]
    assert AuditConfig(budget="full").resolved().chosen_attacks == [
        "full",
        "LoRA",
        "outside",
        "PEFT",
        "MeZO",
        "norms",
    ]
    with pytest.raises(
        DLRError, match="unknown attack 'QLoRA'; one of full, LoRA, outside, PEFT, MeZO, norms"
    ):
        AuditConfig(attacks="full,QLoRA").resolved()
    with pytest.raises(ValueError, match="already"):
        register(norms)


def test_no_other_file_knows_an_attack_by_name() -> None:
    """The name of MeZO is in its own file, and in the help, which must not load it; those of others are words that mean
    other things too."""
    files = [
        path
        for top in ("audit", "benchmarks", "convert", "dlr_lock", "runtime", "triton_kernels")
        for path in (TREE / top).rglob("*.py")
    ]
    assert len(files) > 50
    found = {path.name for path in files if re.search("MeZO", path.read_text(encoding="utf-8"))}
    assert found == {"mezo.py", "config.py"}
