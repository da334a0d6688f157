"""The demo on the real SmolLM2-135M-Instruct, with one layer and a fifth of its training tokens."""

from pathlib import Path

import pytest

from dlr_lock import DLRError
from dlr_lock.audit import demo
from dlr_lock.audit.demo import fetch_model, run_demo
from dlr_lock.common.cache import cache_folder
from dlr_lock.runtime import verify


@pytest.mark.slow
def test_the_demo_locks_a_layer_of_massive_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo, "_TOKENS", 24_576
    )  # a quarter of the text: most of the demo's time is passes over it
    monkeypatch.setattr(demo, "_HELDOUT", 4_096)
    monkeypatch.setattr(demo, "_REPEATS", 1)  # seconds are not looked at here
    try:
        fetch_model(cache_folder())
    except DLRError as error:
        pytest.skip(str(error))
    result = run_demo(layers="1", train_tokens=76_800, out=tmp_path / "locked")
    (module,) = result.report.modules
    assert str(module.spec) == "1x72x32 silu"
    # Layer 1 writes 469 where the median is below 1, on first tokens, which half as many training tokens leave at an
    # error of 0.3 and the chain unlocked.
    assert module.fidelity.rel_error < 0.4 and not module.verdict.refuted
    assert module.fidelity.first_error is not None and module.fidelity.first_error < 0.15
    assert abs(result.report.params_locked / result.report.params_original - 1) < 0.01
    evaluation = result.report.evaluation
    assert evaluation is not None and evaluation.loss_gap is not None and 0 < evaluation.loss_gap < 1
    assert 6 < result.slot.kept(result.slot.plain) < 8  # K d + 3f against d + 4f: 6.9
    assert result.slot.kept(result.slot.best) <= 1  # which is what an informed attacker pays
    assert result.completion_locked.strip() and verify(tmp_path / "locked") == []
