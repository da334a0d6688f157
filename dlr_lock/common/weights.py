"""A model's weights on demand: in memory where they are in use, in their mapped files otherwise.

Every module asks for the weights of its layer before its forward, by a hook. They are read from the files then, in the
dtype and on the device that is computed with, and go when the room is wanted by others: of all that is loaded the least
recently used goes first. So whatever runs the model, or one layer of it, runs as ever, and what is held does not grow
with the number of layers.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DLRError

_SMALL = 2**20  # numbers of a parameter outside the layers that stays in memory
_DONTNEED = 4  # Linux' MADV_DONTNEED


class OnDemand:
    """Weights of a model that come and go.

    Parameters keep their identity, shape, dtype and device; one that is away is filled with NaN, so that a use that
    nobody asked for does not pass unseen.

    Args:
        model: A model whose weights lie in mapped files, as `from_pretrained` leaves them on a CPU where the dtype is
            the files'. It is changed: its weights are away until they are asked for.
        stored: The dtype of the model's weights now; what has another, as scales in float32 do, keeps that in memory.
        dtype: Of the others in memory.
        device: Where they lie.
        room: Bytes for them; the unit asked for and the one used before it are there in any case.
        exact: Parameters, by name, whose numbers are these and not the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stored: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        room: int,
        exact: dict[str, Tensor] | None = None,
    ) -> None:
        self.room = room
        self._device = device
        self._units: dict[str, list[nn.Parameter]] = {}
        self._stored: dict[int, Tensor] = {}
        self._wanted: dict[int, torch.dtype] = {}
        self._loaded: OrderedDict[str, int] = OrderedDict()  # bytes by unit, the least recently used first
        self.peak = 0  # bytes of weights that were in memory at the same time
        mapped = _mapped_ranges()
        self._files: dict[
            int, tuple[Path, int]
        ] = {}  # where a parameter's numbers are mapped from, and its size
        place_of: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            numbers = (exact or {}).get(name, parameter.data)
            wanted = dtype if parameter.dtype == stored else parameter.dtype
            unit = _layer_of(model, name) or name
            if (unit == name and parameter.numel() <= _SMALL) or not parameter.is_floating_point():
                parameter.data = numbers.to(device, wanted)
                continue
            self._stored[id(parameter)], self._wanted[id(parameter)] = numbers, wanted
            if file := _file_of(numbers, mapped):
                self._files[id(parameter)] = file, file.stat().st_size if file.exists() else 0
            self._units.setdefault(unit, []).append(parameter)
            place_of[id(parameter)] = unit
            self._put_away(parameter)
        for buffer_name, buffer in list(model.named_buffers()):
            owner, _, child = buffer_name.rpartition(".")
            kept = (exact or {}).get(buffer_name, buffer).to(device)
            model.get_submodule(owner)._buffers[child] = kept
        for name, module in model.named_modules():
            units = {place_of[id(p)] for p in module.parameters(recurse=False) if id(p) in place_of}
            layer = _layer_of(model, f"{name}.")
            if layer in self._units and name != layer:
                units.add(layer)
            if units:
                module.register_forward_pre_hook(_Ask(self, sorted(units)))

    def ask(self, unit: str) -> None:
        """Has a unit's weights in memory, at the expense of those used longest ago."""
        if unit not in self._loaded:
            of_unit = [(p, self._wanted[id(p)]) for p in self._units[unit]]
            size = sum(p.numel() * wanted.itemsize for p, wanted in of_unit)
            # What was used last may be in use now: a module of its calls one of this unit.
            while sum(self._loaded.values()) + size > self.room and len(self._loaded) > 1:
                self._release(next(iter(self._loaded)))
            for parameter, wanted in of_unit:
                mapped = id(parameter) in self._files  # copied in any case: nobody reads the file after this
                parameter.data = self.stored(parameter).to(self._device, wanted, copy=mapped)
                self._drop(parameter)
            self._loaded[unit] = size
            self.peak = max(self.peak, sum(self._loaded.values()))
        self._loaded.move_to_end(unit)

    def release(self) -> None:
        """Puts all weights away."""
        for unit in list(self._loaded):
            self._release(unit)

    def stored(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's numbers as the files have them.

        Raises:
            DLRError: Where the file has been cut short since: what lies beyond its end cannot be read, and who tries
                is killed (SIGBUS).
        """
        file, size = self._files.get(id(parameter), (None, 0))
        with suppress(FileNotFoundError):  # what was deleted stays as it is for who has it mapped
            if file is not None and file.stat().st_size < size:
                raise DLRError(f"{file} was cut short while it was read: put it back and run again")
        return self._stored.get(id(parameter), parameter.data)

    def numbers(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every parameter that comes and goes, with its numbers as the files have them, one after the other."""
        for parameters in self._units.values():
            for parameter in parameters:
                yield parameter, self.stored(parameter)
                self._drop(parameter)

    def _release(self, unit: str) -> None:
        del self._loaded[unit]
        for parameter in self._units[unit]:
            self._put_away(parameter)

    def _put_away(self, parameter: nn.Parameter) -> None:
        shape, dtype = parameter.shape, self._wanted[id(parameter)]
        parameter.data = torch.full((), float("nan"), dtype=dtype, device=self._device).expand(shape)

    def _drop(self, parameter: nn.Parameter) -> None:
        if id(parameter) in self._files:
            drop_pages(self._stored[id(parameter)])


class _Ask:
    """A hook in front of a module's forward. A copy of the model asks for the same weights, for they are shared."""

    def __init__(self, weights: OnDemand, units: list[str]) -> None:
        self._weights, self._units = weights, units

    def __call__(self, module: nn.Module, args: Any) -> None:
        for unit in self._units:
            self._weights.ask(unit)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ask:
        return self


def awake(module: nn.Module) -> nn.Module:
    """The module, its own weights in memory: for whoever reads them without running it."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _Ask):
            hook(module, ())
    return module


def drop_mapped(tensors: Iterable[Tensor]) -> None:
    """Takes what lies in mapped files out of this process's memory; it is read again when it is used."""
    mapped = _mapped_ranges()
    for tensor in tensors:
        if _file_of(tensor, mapped):
            drop_pages(tensor)


def keep_in_memory(model: nn.Module) -> None:
    """Copies what a model has in mapped files into memory, so that it does not matter what becomes of the files."""
    mapped = _mapped_ranges()
    for parameter in model.parameters():
        if _file_of(numbers := parameter.data, mapped):
            parameter.data = numbers.clone()
            drop_pages(numbers)


def checked_store(part: Tensor, value: Any, what: str) -> None:
    """Copies value [..., d] to part [rows, d], casting it.

    Raises:
        DLRError: Where it does not fit or is not finite; `what` names it.
    """
    if not isinstance(value, Tensor) or value.shape[-1] != part.shape[-1] or value.numel() != part.numel():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DLRError(f"{what} is {shape}, not one row of {part.shape[-1]} for each of {len(part)} tokens")
    part.copy_(value.reshape(part.shape))
    if not part.isfinite().all():
        if value.isfinite().all():
            raise DLRError(f"{what} exceeds the range of {part.dtype}: capture in bfloat16 or float32")
        raise DLRError(f"{what} contains NaN or infinity: are the model's weights sound?")


def drop_pages(tensor: Tensor) -> None:
    """Takes the pages of a tensor in a mapped file, which nobody has written to or which is shared, out of this
    process's memory. Of any other tensor this would throw the numbers away.
    """
    if not sys.platform.startswith("linux"):
        return
    begin, page = tensor.data_ptr(), 4096
    end = begin + tensor.numel() * tensor.element_size()
    begin, end = -(-begin // page) * page, end // page * page
    if end > begin:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)


def _mapped_ranges() -> list[tuple[int, int, Path]]:
    """Where files are mapped into this process: addresses from and to, and the file."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = (re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +(/.*)", line) for line in lines)
    return [(int(m[1], 16), int(m[2], 16), Path(m[4])) for m in found if m and m[3] != "0"]


def _file_of(tensor: Tensor, ranges: list[tuple[int, int, Path]]) -> Path | None:
    """The mapped file that a tensor lies in, None where it is in memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    return next((file for low, high, file in ranges if low <= begin and end <= high), None)


def _layer_of(model: nn.Module, name: str) -> str | None:
    """The layer that a module or parameter is in: its path up to its first index into a list; None outside of one."""
    parent, path = model, name.split(".")
    for at, part in enumerate(path[:-1]):
        if isinstance(parent, nn.ModuleList):
            return ".".join(path[: at + 1])
        parent = parent.get_submodule(part) if part else parent
    return None


def storage(rows: int, width: int, dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """[rows, width], in memory, or in a nameless file in `scratch` that vanishes with the process.

    Raises:
        DLRError: Where the disk has no room for it.
    """
    if scratch is None or not rows:  # there is no file of no bytes to map
        return torch.empty(rows, width, dtype=dtype)
    size = rows * width * dtype.itemsize
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="activations-", dir=scratch)
        try:
            # Take the space now: a mapped file that meets a full disk later kills the process (SIGBUS).
            os.posix_fallocate(descriptor, 0, size)
            return torch.from_file(name, shared=True, size=rows * width, dtype=dtype).view(rows, width)
        finally:
            os.close(descriptor)
            os.unlink(name)  # the mapping keeps the data; nothing is left behind, even by kill -9
    except OSError as error:
        raise DLRError(
            f"{scratch}: no room for {size / 2**20:,.0f} MiB of activations ({error.strerror}); "
            "allow more --max-memory or use fewer --tokens"
        ) from error
