"""Tensors that lie in files mapped into memory: read once and let go, so that a large model never stays resident.

A page of a mapped file counts as this process's memory from its first reading on. It is given back with madvise(2),
MADV_DONTNEED: if it is needed again the system reads it again, mostly from its own cache. That would lose what was
written to a private mapping, so pages that were written to are looked for (proc_pid_pagemap(5)) and such tensors stay.
On other systems than Linux nothing happens.
"""

import bisect
import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["MappedFiles", "brought_as_needed", "own"]

_MAPS, _PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
_PART = 1 << 21  # elements
_PRESENT, _SWAPPED, _OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))  # of an entry of 64 bits


class MappedFiles:
    """The addresses of this process at which a file is mapped, as of now."""

    def __init__(self) -> None:
        self._spans = list(_spans()) if sys.platform == "linux" and _MAPS.exists() and _PAGEMAP.exists() else []
        self._madvise = ctypes.CDLL(None).madvise if self._spans else None

    def let_go(self, *tensors: Tensor) -> None:
        """Give back the memory of tensors that lie in a file and were not written to."""
        for tensor in tensors:
            if self._madvise is None or not self.hold(tensor):
                continue
            first = tensor.data_ptr()
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start, stop = first - first % mmap.PAGESIZE, first + (last + 1) * tensor.itemsize
            if _as_in_file(start, stop):
                self._madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), ctypes.c_int(mmap.MADV_DONTNEED))

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors of one shape in parts of some megabytes, views of them, each let go when the next is asked for."""
        for parts in zip(*map(_split, tensors), strict=True):
            yield parts
            self.let_go(*parts)
        self.let_go(*tensors)  # reading a page brings some around it, also of the part before

    def equal(self, one: Tensor, other: Tensor) -> bool:
        """Whether two tensors of one shape hold the same values in the dtype of the second; lets go of both."""
        return all(torch.equal(part.to(other.dtype), other_part) for part, other_part in self.parts(one, other))

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor's copy in memory; lets go of the original."""
        copy = torch.empty_like(tensor, dtype=dtype)
        for part, copied in self.parts(tensor, copy):
            copied.copy_(part)
        return copy

    def hold(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a file."""
        if tensor.device.type != "cpu" or not tensor.nbytes:
            return False
        address = tensor.data_ptr()
        at = bisect.bisect_right(self._spans, (address, sys.maxsize)) - 1
        return at >= 0 and address < self._spans[at][1]


def _split(tensor: Tensor) -> Sequence[Tensor]:
    if not tensor.numel() or not tensor.ndim:
        return (tensor,)
    return torch.split(tensor, max(1, _PART * len(tensor) // tensor.numel()))


def _as_in_file(start: int, stop: int) -> bool:
    """Whether no page between two addresses was written to, which makes it a copy that no file holds."""
    pages = -(-(stop - start) // mmap.PAGESIZE)
    entries = np.fromfile(_PAGEMAP, dtype=np.uint64, count=pages, offset=start // mmap.PAGESIZE * 8)
    copied = (entries & (_PRESENT | _SWAPPED) != 0) & (entries & _OF_A_FILE == 0)
    return len(entries) == pages and not copied.any()


def _spans() -> Iterator[tuple[int, int]]:
    """First and last address of each mapped file, ascending."""
    with _MAPS.open("rb") as lines:
        for line in lines:
            span, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != b"0":
                first, last = span.split(b"-")
                yield int(first, 16), int(last, 16)


def own(model: nn.Module, keys: Iterable[str]) -> None:
    """Give a model float32 copies in memory of those of its tensors that are going to be written to."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    files = MappedFiles()
    for tensor in (tensors[key] for key in keys if key in tensors):
        if tensor.is_floating_point():
            tensor.data = files.copy(tensor.data, torch.float32)


@contextmanager
def brought_as_needed(*models: nn.Module) -> Iterator[None]:
    """While a layer runs, its tensors lie in memory as float32; before and after in their files, in any dtype.

    A whole network may then be run in the memory that its largest layer takes, and each product sees its tensors at
    aligned addresses, as it does in a model that was copied from its file. A layer is a module with tensors of its own,
    together with its children that have none below them: some read the weights of those themselves.
    """
    files = MappedFiles()
    brought: dict[int, tuple[nn.Module, Tensor, Tensor]] = {}  # by id of the tensor: by whom, it, what it was before

    def bring(layer: nn.Module, *_: object) -> None:
        for tensor in _tensors(layer):
            if tensor.is_floating_point() and (tensor.dtype != torch.float32 or files.hold(tensor)):
                brought[id(tensor)] = (layer, tensor, tensor.data)
                tensor.data = files.copy(tensor.data, torch.float32)

    def take_back(layer: nn.Module, *_: object) -> None:
        for tensor in _tensors(layer):
            if id(tensor) in brought and brought[id(tensor)][0] is layer:
                tensor.data = brought.pop(id(tensor))[2]

    layers = [
        module for model in models for module in nn.Module.modules(model) if next(_tensors(module), None) is not None
    ]
    handles = [layer.register_forward_pre_hook(bring, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(take_back) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, tensor, stored in brought.values():
            tensor.data = stored


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Those of a module itself, and of its children that have no children."""
    leaves = [child for child in module.children() if next(child.children(), None) is None]
    for each in (module, *leaves):
        yield from each.parameters(recurse=False)
        yield from each.buffers(recurse=False)
