"""Room for many rows on CPUs: memory that was used before where there is some, else large pages where Linux gives them.

What experts get is as much as all rows together, at every call. Touching new memory costs the kernel a page of zeros first: for
pages of 4 KiB several times as long as the copy that follows, for pages of 2 MiB about as long. So what was let go of waits here
for the next call, up to `KEPT_BYTES`, as on GPUs it waits in torch's allocator. Whoever gets it fills it.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

WORTH_BYTES = 4 << 20
LARGE_PAGE = 2 << 20
KEPT_BYTES = 256 << 20
"""At most this much waits to be used again."""
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


class Shelf:
    """Memory that waits, the longest first. Threads may share it; what is let go of comes back from any of them, at any time.

    >>> shelf = Shelf(kept_bytes=8 << 20)
    >>> held = shelf.take(5 << 20)
    >>> held.numel(), shelf.nbytes
    (5242880, 0)
    >>> del held
    >>> shelf.nbytes
    6291456
    """

    def __init__(self, kept_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self._blocks: deque[mmap.mmap] = deque()

    @property
    def nbytes(self) -> int:
        """How much waits."""
        return sum(len(block) for block in list(self._blocks))

    def take(self, size: int) -> Tensor:
        """(size,) uint8, not filled; back here once no tensor uses it."""
        block = self._fitting(size) or _new(size)
        # a lease is what tensors hold: when the last is gone the block itself is still there
        lease = (ctypes.c_char * len(block)).from_buffer(block)
        weakref.finalize(lease, self._back, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8)[:size]

    def clear(self) -> None:
        """Give what waits to the system."""
        self._blocks.clear()

    def _fitting(self, size: int) -> mmap.mmap | None:
        """The smallest that waits and is large enough, if no more than half of it would lie idle."""
        waiting = list(self._blocks)  # at once: others take and bring meanwhile
        for block in sorted(waiting, key=len):
            if size <= len(block) <= 2 * size:
                try:
                    self._blocks.remove(block)
                    return block
                except ValueError:  # another thread was first
                    continue
        return None

    def _back(self, block: mmap.mmap) -> None:
        self._blocks.append(block)
        while self.nbytes > self.kept_bytes:
            try:
                self._blocks.popleft()
            except IndexError:
                return


def _new(size: int) -> mmap.mmap:
    """Whole large pages, and an eighth of the size at a time, so that calls of almost the same size can share."""
    step = max(LARGE_PAGE, (1 << (size.bit_length() - 1)) // 8)
    block = mmap.mmap(-1, -(-size // step) * step, flags=_PRIVATE)
    if _ADVICE is not None:
        block.madvise(_ADVICE)  # a kernel that gives none leaves small pages
    return block


WAITING = Shelf(KEPT_BYTES)
"""Of this process."""


def room(like: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, H), not filled, in `dtype` or that of `like` (n, H), and on its device.

    >>> room(torch.ones(2, 3), 5).shape
    torch.Size([5, 3])
    """
    dtype = like.dtype if dtype is None else dtype
    size = rows * like.shape[1] * dtype.itemsize
    if size < WORTH_BYTES or like.device.type != "cpu" or not _PRIVATE:
        return like.new_empty(rows, like.shape[1], dtype=dtype)
    return WAITING.take(size).view(dtype).view(rows, like.shape[1])
