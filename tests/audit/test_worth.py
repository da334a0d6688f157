"""What stands at the top of an audit: whether the lock is worth it, and which fine-tunes ruined the model."""

import pytest

from dlr_lock.audit.report import Price, Run, Verdict
from dlr_lock.audit.worth import collapses, worth_words


class Found:
    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts = verdicts


def verdict(ratio: float | None, measure: str = "flops", bound: bool = False) -> Verdict:
    ours, theirs = (
        Price("redistilled, 0.25, LoRA", "plain", ratio or 0.0, bound),
        Price("original, LoRA", "plain", 1.0, False),
    )
    return Verdict(0.9, 2.1, measure, 1, ours, theirs, ratio, bound)


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        (30.0, "worth it against"),
        (3.0, "does not stop"),
        (1.5, "surcharge"),
        (1.0, "not worth it"),
        (0.4, "not worth it"),
    ],
)
def test_the_weakest_measure_decides(ratio: float, says: str) -> None:
    words = worth_words(Found(verdict(ratio), verdict(99.0, "peak")))  # type: ignore[arg-type]
    assert says in words and f"{ratio:.2g} times the FLOPs" in words and "LoRA" in words
    assert words.count("Whoever has the original") == 1


def test_without_a_price_nothing_is_claimed() -> None:
    assert "cannot say" in worth_words(Found())  # type: ignore[arg-type]
    assert "at least 7 times" in worth_words(Found(verdict(7.0, bound=True)))  # type: ignore[arg-type]


def test_a_fine_tune_that_ruins_the_model_is_named() -> None:
    def run(variant: str, after: float | None, best: bool = True) -> Run:
        return Run(variant, "full", 1e-4, 0, 256, [0], [3.0], (2.9, after), 1.0, best=best)

    (words,) = collapses([run("locked", 4.7), run("original", 3.0), run("original", 9.0, best=False)])
    assert "'locked, full'" in words and "from 2.90 to 4.70" in words
    assert collapses([run("locked", None), run("original", 3.3)]) == []
