"""Rows of an audit, as the tests of what is read off them construct them."""

from dlr_lock.audit.report import Run, StepCost


def run(variant: str, attack: str, losses: list[float], *, seed: int = 0, best: bool = True) -> Run:
    """Held-out losses after 0, 100, 200 and so on training tokens."""
    tokens = [100 * n for n in range(len(losses))]
    return Run(variant, attack, 1e-3, seed, 10, tokens, losses, (2.0, 2.0), 0.1, False, best)


def step(
    variant: str, attack: str, strategy: str, flops: int, peak: int, seconds: float | None = None
) -> StepCost:
    """A step of 10 tokens."""
    return StepCost(variant, attack, strategy, 10, flops, peak, peak, 1, 1, seconds)
