"""Which part of a text is kept back to measure on."""

import torch
from torch import Tensor


def hold_out(sequences: int, heldout: int) -> Tensor:
    """[sequences] bool, true for `heldout` of them: one in the middle of each of as many equal stretches.

    At even distances, so that a text which changes as it goes on is judged by all of it.
    """
    index = ((2 * torch.arange(heldout) + 1) * sequences) // (2 * heldout)
    held = torch.zeros(sequences, dtype=torch.bool)
    held[index] = True
    return held


def random_rows(tokens: int, count: int, seed: int) -> Tensor:
    """`count` of the first `tokens` rows (all where there are fewer), int64, ascending.

    At random, for every so many-th token can be the first of its sequence each time.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(tokens, generator=generator)[:count].sort().values
