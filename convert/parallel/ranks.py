"""The processes of one conversion and what they exchange; nothing here knows what for."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from ...common.errors import DLRError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

LOST = "another process of this run has ended or is out of reach: the same command goes on from what is kept"
# Of others for a process that measures, or fits more than they do. A connection that is closed ends it at once.
_LONGEST_WAIT = timedelta(days=7)
_GRACE = 2.0  # seconds; who was killed does not answer
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torch.distributed's own names


class Ranks:
    """One process alone: every exchange gives back what it got.

    Attributes:
        rank: This process's number, from 0, as torch.distributed calls it; not a step's rank.
        size: How many there are.
        local_rank, local_size: The same among those of this machine.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def agreed(self, make: Callable[[], T], by: int = 0) -> T:
        """What one process made, the first or that of number `by`, in all of them; also its DLRError."""
        return make()

    def in_turn(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, once the first one has made its own; also the first one's DLRError."""
        return make()

    def gathered(self, value: T) -> list[T]:
        """Every process's value, by their numbers."""
        return [value]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Tensors of one dtype and device become their sums over all processes, by one all-reduce."""

    def total(self, *numbers: float) -> list[float]:
        """The numbers' sums over all processes."""
        return list(numbers)

    def broadcast(self, tensors: Sequence[Tensor], by: int = 0) -> None:
        """Tensors of one dtype and device become those of one process, the first or that of number `by`."""

    def exchange(self, rows: Tensor, sent: Sequence[int], got: Sequence[int]) -> Tensor:
        """Rows [sum of sent, d] to other processes, `sent` to each by their numbers, the first rows to the first;
        those from each in turn, `got` of them, [sum of got, d]."""
        return rows

    def spread(self, work: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
        """What `work` makes of independent matrices, [.., m, d] -> [.., m, d]: each process does its part of them."""
        return work(blocks)

    def barrier(self) -> None:
        """Waits for all."""

    def take_device(self, device: torch.device) -> None:
        """Takes note of where the work is done. Raises DLRError where a machine's processes cannot have one each."""


ALONE = Ranks()


class Reckoned(Ranks):
    """The first of so many processes, for whoever counts what it does: it does its part, what others would do is 0."""

    def __init__(self, size: int) -> None:
        self.size = self.local_size = size

    def spread(self, work: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
        return _in_parts(work, blocks, self.rank, self.size, lambda whole, part: whole.zero_())


class Group(Ranks):
    """Several processes, by torch.distributed.

    Raises:
        DLRError: From every exchange, where another process has ended.
    """

    def __init__(self, group: Any) -> None:
        from torch import distributed

        self._group = group
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._device: torch.device | None = None  # what rows are exchanged through; None for where they lie

    def agreed(self, make: Callable[[], T], by: int = 0) -> T:
        from torch import distributed

        box: list[Any] = [None, None]
        cause: DLRError | None = None
        if self.rank == by:
            try:
                box[0] = make()
            except DLRError as error:
                box[1], cause = str(error), error
        with _lost_is_an_error():
            distributed.broadcast_object_list(box, group=self._group, group_src=by)
        if box[1] is not None:
            raise DLRError(box[1]) from cause
        return box[0]

    def in_turn(self, make: Callable[[], T]) -> T:
        made: list[T] = []
        self.agreed(lambda: made.append(make()))
        return made[0] if self.first else make()

    def gathered(self, value: T) -> list[T]:
        from torch import distributed

        found: list[Any] = [None] * self.size
        with _lost_is_an_error():
            distributed.all_gather_object(found, value, group=self._group)
        return found

    def add(self, tensors: Sequence[Tensor]) -> None:
        from torch import distributed

        _as_one(tensors, lambda one: distributed.all_reduce(one, group=self._group))

    def total(self, *numbers: float) -> list[float]:
        import torch

        sums = torch.tensor(numbers, dtype=torch.float64)
        self.add([sums])
        return sums.tolist()

    def broadcast(self, tensors: Sequence[Tensor], by: int = 0) -> None:
        from torch import distributed

        _as_one(tensors, lambda one: distributed.broadcast(one, group=self._group, group_src=by))

    def exchange(self, rows: Tensor, sent: Sequence[int], got: Sequence[int]) -> Tensor:
        from torch import distributed

        # From GPU to GPU the links are some ten times as wide as from memory to memory.
        away = rows.contiguous().to(self._device or rows.device)
        here = away.new_empty(sum(got), *rows.shape[1:])
        with _lost_is_an_error():
            distributed.all_to_all_single(here, away, list(got), list(sent), group=self._group)
        return here.to(rows.device)

    def spread(self, work: Callable[[Tensor], Tensor], blocks: Tensor) -> Tensor:
        from torch import distributed

        def gather(whole: Tensor, part: Tensor) -> None:
            with _lost_is_an_error():
                distributed.all_gather(list(whole.split(len(part))), part, group=self._group)

        return _in_parts(work, blocks, self.rank, self.size, gather)

    def barrier(self) -> None:
        self.gathered(None)

    def take_device(self, device: torch.device) -> None:
        import torch

        if device.type != "cuda":
            return
        here = torch.cuda.device_count()
        if self.local_size > here:
            raise DLRError(
                f"{self.local_size} processes on {socket.gethostname()}, which has {here} GPUs: start as many as it "
                "has (torchrun --nproc-per-node gpu)"
            )
        if device.index is not None and device.index != self.local_rank:
            raise DLRError(
                f"--device {device} is one GPU, and there are {self.local_size} processes here: leave it out, each "
                "takes one of its own"
            )
        self._device = torch.device("cuda", torch.cuda.current_device())


_store: Any = None  # the launcher's, from the moment that it is reached
_joined: Ranks | None = None


def several() -> bool:
    """Whether a launcher started more processes than this one, by torch.distributed's environment variables."""
    launched = all(os.environ.get(name) for name in _LAUNCHED)
    return launched and os.environ["WORLD_SIZE"] != "1"


def joined() -> Ranks:
    """This process among those that a launcher started with it, once they have found one another.

    Raises:
        DLRError: Where they do not.
    """
    global _joined
    if _joined is None:
        _joined = _group() if several() else ALONE
    return _joined


def may_tell(message: str) -> bool:
    """Whether nobody has said yet why all end, so that this process should.

    Who has only lost another one gives who knows more the time to.
    """
    rank = int(os.environ["RANK"])
    if _store is None:
        return rank == 0
    with suppress(Exception):
        until = time.monotonic() + _GRACE * (message == LOST)
        while time.monotonic() < until and not _store.add("told", 0):
            time.sleep(0.05)
        return _store.add("told", 1) == 1
    return rank == 1  # the store was the first process's, which was killed


def told() -> bool:
    """Whether somebody has said why all end."""
    with suppress(Exception):
        return _store.add("told", 0) > 0
    return False  # there is no store yet, or no more


def part() -> None:
    """Before an end in failure: lets the others know, and keeps the store up until they have looked into it."""
    from torch import distributed

    with suppress(Exception):
        _store.add("ended", 1)
        if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # Those who wait for this process find the connection closed; it may itself wait for who is gone.
            Thread(target=distributed.destroy_process_group, daemon=True).start()
            until = time.monotonic() + _GRACE
            while _store.add("ended", 0) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < until:
                time.sleep(0.05)


def leave() -> None:
    """Ends the connections, at the end of all work."""
    global _joined
    if isinstance(_joined, Group):
        from torch import distributed

        distributed.destroy_process_group()
        _joined = None


def _group() -> Group:
    global _store
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if cuda and (local := int(os.environ.get("LOCAL_RANK", 0))) < torch.cuda.device_count():
        torch.cuda.set_device(local)
    try:
        if distributed.is_initialized():  # by a program that calls convert_model
            return Group(distributed.new_group(backend=backend, timeout=_LONGEST_WAIT))
        store, rank, size = next(distributed.rendezvous("env://"))
        _store = distributed.PrefixStore("dlr-lock", store)
        distributed.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=size,
            timeout=_LONGEST_WAIT,
        )
        return Group(None)
    except (RuntimeError, ValueError, OSError) as error:
        raise DLRError(f"the processes of this run do not find one another: {first_line(error)}") from error


def _in_parts(
    work: Callable[[Tensor], Tensor],
    blocks: Tensor,
    rank: int,
    size: int,
    gather: Callable[[Tensor, Tensor], object],
) -> Tensor:
    """What `work` makes of matrices [.., m, d], of which this process does one part of `size`; `gather` makes the whole
    of all parts."""
    flat = blocks.reshape(-1, *blocks.shape[-2:])
    each = -(-len(flat) // size)
    mine = flat[rank * each : (rank + 1) * each]
    part = flat.new_zeros(each, *flat.shape[1:])
    if len(mine):
        part[: len(mine)] = work(mine)
    whole = flat.new_empty(size * each, *flat.shape[1:])
    gather(whole, part)
    return whole[: len(flat)].view(blocks.shape)


def _as_one(tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """One exchange, in place, of all numbers of the tensors."""
    import torch

    if not tensors:
        return
    together = torch.cat([t.reshape(-1) for t in tensors])
    with _lost_is_an_error():
        exchange(together)
    for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def _lost_is_an_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own are such, too
        raise DLRError(LOST) from error
