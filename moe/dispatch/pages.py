"""Room for many rows on CPUs, in large pages where Linux gives them on request.

What experts get is new memory at every call. Touching it first costs a page fault for every 4 KiB, which takes several times as
long as the copy itself; in pages of 2 MiB it costs little. (torch does the same for all it allocates under THP_MEM_ALLOC_ENABLE=1.)
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

WORTH_BYTES = 4 << 20
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def room(like: Tensor, rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """(rows, H), not filled, in `dtype` or that of `like` (n, H), and on its device.

    >>> room(torch.ones(2, 3), 5).shape
    torch.Size([5, 3])
    """
    out = like.new_empty(rows, like.shape[1], dtype=dtype)
    size = out.numel() * out.element_size()
    if size >= WORTH_BYTES and out.device.type == "cpu" and _ADVICE is not None:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = (out.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # advice: a kernel that does not take it leaves everything as it was
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), ctypes.c_int(_ADVICE))
    return out


@cache
def _libc() -> Any:
    assert sys.platform == "linux"
    return ctypes.CDLL(None)
