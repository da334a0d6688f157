"""What undoing a chain takes, read off its students."""

import pytest

from dlr_lock.reporting.lock_verdict import Undoing


def test_undoing_lies_between_the_students_on_either_side() -> None:
    # 20% above the chain at 100 tokens, 2.5% at 900: an excess that falls by 8 over 9 times the tokens.
    found = Undoing.of([(900, 1.025), (100, 1.2), (100, 3.0)])
    assert found is not None and not found.bound
    assert found.tokens == pytest.approx(100 * 9 ** (2 / 3))


def test_undoing_at_the_first_try_and_never() -> None:
    assert Undoing.of([(64, 1.05), (128, 1.0)]) == Undoing(64, False)
    assert Undoing.of([(64, 1.3), (128, 1.06)]) == Undoing(128, True)
    assert Undoing.of([]) is None


def test_undoing_over_another_says_which_one_is_a_bound() -> None:
    done, more = Undoing(100, False), Undoing(400, True)
    assert done.over(Undoing(200, False)) == "0.5"
    assert more.over(done) == "> 4" and done.over(more) == "< 0.25"
    assert more.over(more) == done.over(None) == "-"
