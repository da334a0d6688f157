"""What a training step of each variant costs for each attack: every strategy counted, the promising ones timed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from statistics import median

from ..common.errors import first_line
from ..common.progress import Count, no_count
from ..common.timing import now
from .attacks import TRAINING_ATTACKS
from .context import ModelVariant
from .meters import step_tokens
from .report import StepCost

_ROUNDS = 3


def count_steps(
    variant: ModelVariant,
    attacks: Sequence[str],
    shape: tuple[int, int],
    progress: Count = no_count,
    note: Callable[[str], object] = lambda sentence: None,
) -> Iterator[StepCost]:
    """The steps of a variant, counted, see `meters.countable`.

    Args:
        variant: The model.
        attacks: The names of the attacks.
        shape: Sequences of a step, and tokens of each.
        progress: Called with (attacks done, attacks).
        note: Called with a sentence for each attack whose steps cannot be counted, for torch does not know the shapes
            that an operation of the model's gives.

    Yields:
        A row for every strategy of every attack that has something to train; of an attack the plain strategy first.
    """
    for number, attack in enumerate(attacks):
        progress(number, len(attacks))
        try:
            yield from TRAINING_ATTACKS[attack].count_steps(variant, shape)
        except (RuntimeError, NotImplementedError) as error:
            note(f"a step of the {variant.name} model, {attack}, has no cost: {first_line(error)}")
    progress(len(attacks), len(attacks))


def time_steps(
    variants: Callable[[], Iterable[ModelVariant]],
    rows: Sequence[StepCost],
    shape: tuple[int, int],
    progress: Count = no_count,
) -> list[StepCost]:
    """The counted steps of all variants, with the seconds of the promising ones on the models' device.

    For each variant and attack these are the plain strategy and those of the fewest FLOPs, of the fewest launches in a
    row and of the least memory. Seconds are of the step that a run takes, at a rate of 0: the median over rounds in
    which each steps once after a warm-up. In rounds, because the slowest and the fastest hour of one machine differed
    by more (2.0) than the variants do (1.6).

    Args:
        variants: Gives the variants anew for every round, so that one is in memory at a time.
        rows: What `count_steps` gave.
        shape: Sequences of a step, and tokens of each.
        progress: Called with (steps timed, steps to time).
    """
    groups: dict[tuple[str, str], list[StepCost]] = {}
    for row in rows:
        groups.setdefault((row.variant, row.attack), []).append(row)
    chosen = [
        row
        for group in groups.values()
        for row in dict.fromkeys(
            (group[0], *(min(group, key=attrgetter(of)) for of in ("flops", "dependent", "peak")))
        )
    ]
    laps: dict[StepCost, list[float]] = {row: [] for row in chosen}
    done, total = 0, _ROUNDS * len(chosen)
    for _ in range(_ROUNDS):
        for variant in variants():
            for row in (row for row in chosen if row.variant == variant.name):
                progress(done, total)
                laps[row].append(_seconds(variant, row, shape))
                done += 1
    progress(total, total)
    return [replace(row, seconds=median(laps[row])) if row in laps else row for row in rows]


def _seconds(variant: ModelVariant, row: StepCost, shape: tuple[int, int]) -> float:
    """Seconds of a step, after one of two tokens, which makes the optimizer's state and touches the weights."""
    ids = step_tokens(variant.model, shape)
    with TRAINING_ATTACKS[row.attack].stepping(variant, 0, row.strategy) as step:
        for tokens in (ids[:1, :2], ids):
            began = now(variant.model.device)
            step(tokens, 0.0)
            seconds = now(variant.model.device) - began
    return seconds
