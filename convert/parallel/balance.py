"""Independent modules, and a mixture's experts, dealt out to processes by what their fits compute."""

from collections.abc import Sequence


def dealt(flops: Sequence[float], size: int) -> list[list[int]]:
    """Jobs to processes: the dearest first, each to whoever has least to do.

    Args:
        flops: Of each job.
        size: How many processes there are.

    Returns:
        For each process the numbers of its jobs, ascending.
    """
    jobs: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for job in sorted(range(len(flops)), key=lambda number: -flops[number]):
        least = min(range(size), key=lambda rank: loads[rank])
        jobs[least].append(job)
        loads[least] += flops[job]
    return [sorted(own) for own in jobs]
