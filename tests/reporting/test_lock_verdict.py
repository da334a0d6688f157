"""The verdict on a chain and what undoing it takes, read off all that was made of it."""

import pytest

from dlr_lock.reporting.lock_verdict import (
    Attempt,
    Judgement,
    LockVerdict,
    Undoing,
    lock_status,
    undoing_figures,
)


def made(tokens: int, ratio: float, init: str = "linear") -> Attempt:
    return Attempt(ratio, init, tokens, tokens / 400)


def test_undoing_lies_between_the_students_on_either_side() -> None:
    # 20% above the chain at 100 tokens, 2.5% at 900: an excess that falls by 8 over 9 times the tokens.
    found = Undoing.of([made(900, 1.025), made(100, 1.2), made(100, 3.0)])
    assert found.least == found.most == pytest.approx(100 * 9 ** (2 / 3))
    assert str(found) == "4.3e+02"


@pytest.mark.parametrize(
    ("attempts", "least", "most", "words"),
    [
        ([(64, 1.05), (128, 1.0)], 0, 64, "at most 64"),  # fewer were not tried
        ([(0, 1.2), (64, 1.05)], 0, 64, "at most 64"),
        ([(0, 1.04), (64, 1.2)], 0, 0, "0"),
        ([(64, 1.3), (128, 1.06)], 128, None, "more than 128"),
        ([(0, 1.2)], 0, None, "-"),
        ([], 0, None, "-"),
    ],
)
def test_undoing_says_what_was_not_tried(
    attempts: list[tuple[int, float]], least: float, most: float | None, words: str
) -> None:
    found = Undoing.of(made(tokens, ratio) for tokens, ratio in attempts)
    assert found.to_dict() == {"least": least, "most": most} and str(found).replace("1.3e+02", "128") == words


def test_undoing_over_another_says_what_follows_from_two_bounds() -> None:
    exact, most, more = Undoing(100, 100), Undoing(0, 50), Undoing(400)
    assert str(exact.over(Undoing(200, 200))) == "0.5" and str(most.over(exact)) == "at most 0.5"
    assert str(more.over(exact)) == str(more.over(Undoing(0, 100))) == "more than 4"
    assert str(exact.over(more)) == "at most 0.25" and str(most.over(more)) == "at most 0.12"
    assert str(exact.over(most)) == "more than 2"
    for other in (most, more, Undoing()):
        assert str(other.over(other)) == "-"
    assert str(exact.over(Undoing())) == "-" and str(Undoing(0, 0).over(most)) == "0"


def test_the_two_figures_are_over_the_conversion_and_over_knowing_nothing() -> None:
    attempts = [made(25, 1.02), made(25, 4.0, "flat"), made(25, 3.0, "random"), made(100, 1.8, "random")]
    found = {name: str(figure) for name, figure in undoing_figures(attempts, 400).items()}
    assert found == {"undoing_over_conversion": "at most 0.062", "undoing_over_fresh": "at most 0.25"}
    assert str(undoing_figures(attempts, None)["undoing_over_conversion"]) == "-"


@pytest.mark.parametrize(
    ("attempts", "verdict", "cell", "why"),
    [
        ([made(100, 1.2), made(0, 1.3)], LockVerdict.HELD, "locked, 1.20 at 0.25x", "withstood"),
        ([made(100, 1.01), made(25, 1.04)], LockVerdict.UNDONE, "UNDONE, 1.04 at 0.062x", "fitted to the"),
        ([made(25, 1.2), made(0, 1.05)], LockVerdict.UNDONE, "UNDONE, 1.05 untrained", "regression alone"),
        ([], LockVerdict.UNTRIED, "not attacked", "not known"),
    ],
)
def test_a_verdict_is_of_the_cheapest_that_undoes_the_chain_and_says_by_what(
    attempts: list[Attempt], verdict: LockVerdict, cell: str, why: str
) -> None:
    judgement = Judgement.of(0.2, 3.0, attempts)
    assert judgement.verdict == verdict and str(judgement) == cell
    status = lock_status({"a": judgement})
    assert why in status and ("NOT LOCKED, UNDONE: a (" in status) == (verdict is LockVerdict.UNDONE)


def test_modules_undone_by_regression_and_by_a_student_are_told_apart() -> None:
    status = lock_status(
        {
            "a": Judgement.of(0.2, 3.0, [made(25, 1.2), made(0, 1.01)]),
            "b": Judgement.of(0.2, 3.0, [made(25, 1.01)]),
            "c": Judgement.of(0.2, 3.0, [made(25, 1.3)]),
        }
    )
    merged, fitted = (
        status.index("NOT LOCKED, UNDONE: a (linear"),
        status.index("NOT LOCKED, UNDONE: b (an MLP"),
    )
    assert fitted < merged and status.endswith(
        "1 of the 3 converted modules withstood the attack that was tried."
    )
