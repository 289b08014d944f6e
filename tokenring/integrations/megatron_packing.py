"""Which rows a rank holds under Megatron's context parallelism, as Layouts and Masks. Nothing here imports Megatron.

One sequence is cut into 2N chunks; rank r holds chunks r and 2N-1-r (zigzag). Packed documents (`PackedSeqParams`, format
thd) follow Transformer Engine's cut: each document is padded to a multiple of 2N rows and cut so on its own, and a rank
holds its two chunks of every document, documents in order. Documents of 4 and 8 rows on two ranks:

    rank 0    0        3 |  4  5             10 11
    rank 1       1  2    |        6  7  8  9

Padding sits at the end of a document. It becomes a document of its own, so nothing sees it and it sees nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

from torch import Tensor

from tokenring.layout import Layout
from tokenring.mask import Mask
from tokenring.segments import Segment

_KEPT = "_tokenring_kept"
_FIELDS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")

Bounds = tuple[int, ...]
"""Where documents start, and at the end how many rows there are."""


@lru_cache(maxsize=256)
def sequence_layout(rows: int, world: int) -> Layout:
    """The zigzag of `world` ranks with `rows` rows each."""
    if world > 1 and rows % 2:
        raise ValueError(
            f"each of {world} ranks holds {rows} rows; Megatron cuts a sequence into {2 * world} equal chunks, two a rank: "
            f"pad it to a multiple of {2 * world}"
        )
    return Layout.zigzag(rows * world, world)


@lru_cache(maxsize=64)
def document_layout(places: Bounds, world: int) -> Layout:
    """The zigzag of every document by itself; `places` are their padded starts, and the end of the last.

    >>> document_layout((0, 4, 12), 2).positions(0).tolist()
    [0, 3, 4, 5, 10, 11]
    """
    runs: list[list[Segment]] = [[] for _ in range(world)]
    for start, stop in pairwise(places):
        chunk, odd = divmod(stop - start, 2 * world)
        if odd:
            raise ValueError(
                f"a packed document has {stop - start} rows, and {world} ranks cut it into {2 * world} equal chunks: pad each "
                f"document to a multiple of {2 * world} and give cu_seqlens_q_padded, or set packed_layout='sequence' "
                "where the data loader cuts the whole stream once"
            )
        for rank in range(world):
            runs[rank] += [Segment(start + rank * chunk, chunk), Segment(stop - (rank + 1) * chunk, chunk)]
    return Layout.from_runs(runs)


def packed(
    params: Any, rows: tuple[int, int], world: int, packed_layout: str, causal: bool
) -> tuple[Layout, Layout, Mask]:
    """(query layout, key layout, mask) of packed documents.

    Args:
        params: PackedSeqParams. `cu_seqlens_*` count the documents' own rows, `cu_seqlens_*_padded` where they lie.
        rows: this rank's rows of queries and of keys.
        packed_layout: "documents", each cut by itself, or "sequence", the whole stream cut once.
        causal: inside each document.
    """

    def make() -> tuple[Layout, Layout, Mask]:
        (q_layout, q_bounds), (kv_layout, kv_bounds) = (
            _side(params, side, local * world, world, packed_layout) for side, local in zip(("q", "kv"), rows)
        )
        if q_bounds == kv_bounds:
            return q_layout, q_layout, Mask.documents(tuple(dict.fromkeys(q_bounds)), causal=causal)
        if len(q_bounds) != len(kv_bounds):
            raise ValueError(
                f"cu_seqlens_q names {len(q_bounds) // 2 - 1} documents and cu_seqlens_kv {len(kv_bounds) // 2 - 1}; "
                "the n-th queries attend to the n-th keys, so there must be equally many"
            )
        return q_layout, kv_layout, Mask.documents(q_bounds, kv_bounds, causal=causal)

    return _once(params, (rows, world, packed_layout, causal), make)


def check_one_sequence(params: Any, batch: int, total: int) -> None:
    """PackedSeqParams in format sbhd (dynamic context parallelism) must name whole rows of the batch."""
    whole = tuple(total * i for i in range(batch + 1))
    for side in ("q", "kv"):
        given = _once(params, ("sbhd", side), lambda side=side: _numbers(params, f"cu_seqlens_{side}", None))
        if given not in (None, whole):
            raise ValueError(
                f"packed_seq_params of format sbhd has cu_seqlens_{side} {_short(given)} and the batch is {batch} rows of "
                f"{total}; pack documents with qkv_format thd"
            )


def _side(params: Any, side: str, total: int, world: int, packed_layout: str) -> tuple[Layout, Bounds]:
    real = _numbers(params, f"cu_seqlens_{side}", None if side == "q" else _numbers(params, "cu_seqlens_q", None))
    if real is None:
        raise ValueError("packed_seq_params of format thd has no cu_seqlens_q; give where each document starts")
    places = _numbers(params, f"cu_seqlens_{side}_padded", real)
    lengths, widths = (tuple(b - a for a, b in pairwise(cuts)) for cuts in (real, places))
    fits = len(lengths) == len(widths) and all(0 <= n <= width for n, width in zip(lengths, widths))
    if not (fits and real[:1] == places[:1] == (0,)):
        raise ValueError(
            f"cu_seqlens_{side} {_short(real)} and cu_seqlens_{side}_padded {_short(places)} must both start at 0 and never "
            "fall, and every document fit into its padded place"
        )
    one_cut = world == 1 or packed_layout == "sequence"
    if places[-1] > total or (places[-1] < total and not one_cut):
        raise ValueError(
            f"cu_seqlens_{side} end at row {places[-1]} and the {world} ranks hold {total}; they must count all rows"
            + ("" if places[-1] > total else ", padding at the end too: make the last document's place longer")
        )
    layout = sequence_layout(total // world, world) if one_cut else document_layout(places, world)
    ends = (edge for start, n in zip(places, lengths) for edge in (start, start + n))
    return layout, (*ends, places[-1], total)


def _numbers(params: Any, name: str, default: Bounds | None) -> Bounds | None:
    tensor = getattr(params, name, None)
    if tensor is None:
        return default
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.numel() != (tensor.shape or [0])[-1]
        or not tensor.numel()
    ):
        shown = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, Tensor) else tensor
        raise ValueError(f"{name} is {shown}; give an int tensor (documents + 1,)")
    return tuple(tensor.flatten().tolist())


def _short(numbers: Bounds | None) -> str:
    return str(list(numbers or ())) if len(numbers or ()) <= 8 else f"[{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}]"


@dataclass
class _Kept:
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    made: dict[Any, Any] = field(default_factory=dict)


def _once(params: Any, key: Any, make: Callable[[], Any]) -> Any:
    """`make()`, kept on the micro-batch's own object: reading a tensor from a GPU in every layer would stall it."""
    tensors = tuple(getattr(params, name, None) for name in _FIELDS)
    if any(t is not None and (not isinstance(t, Tensor) or t.is_inference()) for t in tensors):
        return make()
    versions = tuple(-1 if t is None else t._version for t in tensors)
    kept = getattr(params, _KEPT, None)
    if kept is None or kept.versions != versions or any(a is not b for a, b in zip(kept.tensors, tensors)):
        kept = _Kept(tensors, versions)
        setattr(params, _KEPT, kept)
    if key not in kept.made:
        kept.made[key] = make()
    return kept.made[key]
