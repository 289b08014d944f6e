"""What ranks tell each other before rows move: who sends how much, and which experts each row is for.

    note       once to every peer of a stage: whether this rank refuses and why, what it is about to do, how many rows, entries
    metadata   weights (8, 4 or 2 bytes an entry), expert ids (1, 2 or 4 bytes), entries of each row (1 or 2 bytes)

A rank that refuses, or means another call than its peers, makes all raise ValueError before any row moves.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.hop import Choice, Hop, Stage, choose_rows

NOTE_BYTES = 256
TEXT_BYTES = NOTE_BYTES - 25
_FORMAT = f"<?qqq{TEXT_BYTES}s"


@dataclass
class Entries:
    """Rows held here, and what they are wanted for."""

    num_rows: int
    row: Tensor
    """(n,) int64, ascending."""
    expert: Tensor
    """(n,) int64."""
    weight: Tensor
    """(n,)."""


@dataclass
class Call:
    """What one rank is about to do; every rank of the block must mean the same."""

    text: str
    """Name, sizes, dtypes."""
    topk: int
    flags: int = 0
    """Bits, agreed by OR: 1 gradients of rows, 2 gradients of weights."""
    refusal: str | None = None
    """Why this rank, or one it heard of, refuses."""


def id_dtype(width: int) -> torch.dtype:
    """The smallest integers that tell `width` experts apart."""
    return torch.uint8 if width <= 256 else torch.int16 if width <= 2**15 else torch.int32


def count_dtype(topk: int) -> torch.dtype:
    """The smallest integers that count up to `topk`."""
    return torch.uint8 if topk <= 255 else torch.int16


def metadata_bytes(rows: int, entries: int, *, width: int, topk: int, weight_bytes: int, counted: bool) -> int:
    """Bytes of one metadata message.

    >>> metadata_bytes(100, 250, width=16, topk=8, weight_bytes=4, counted=True)
    1350
    """
    per_row = count_dtype(topk).itemsize if counted else 0
    return entries * (weight_bytes + id_dtype(width).itemsize) + rows * per_row


def go(stage: Stage, held: Entries, call: Call) -> tuple[Hop, Entries] | None:
    """Tell the peers of a stage what comes, and hear it from them. None where the call is refused; `call` says why."""
    choice = Choice(None, [0] * len(stage.peers), None, [0] * len(stage.peers), None)
    if call.refusal is None:
        choice = choose_rows(stage, held.num_rows, held.row, held.expert)
    rows, entries = _notes(stage, choice, call)
    if call.refusal is not None:
        return None
    arrived = _metadata(stage, choice, held, rows, entries, call.topk)
    return Hop(stage, choice, held.num_rows, held.row.numel(), rows, entries), arrived


def _notes(stage: Stage, choice: Choice, call: Call) -> tuple[list[int], list[int]]:
    """Rows and entries from every peer; joins refusals and flags."""
    transport, peers, place = stage.transport, stage.peers, stage.place
    others = [p for p in range(len(peers)) if p != place]
    said = call.refusal if call.refusal is not None else call.text
    body = _fitting(said)
    mine = [(call.refusal is not None, choice.row_splits[p], choice.entry_splits[p], call.flags, body) for p in others]
    sends = [(peers[p], _bytes(struct.pack(_FORMAT, *note))) for p, note in zip(others, mine)]
    slots = {p: torch.empty(NOTE_BYTES, dtype=torch.uint8) for p in others}
    device = transport.device
    slots = {p: slot.to(device) for p, slot in slots.items()}
    transport.exchange(
        [(peer, note.to(device)) for peer, note in sends], [(peers[p], slot) for p, slot in slots.items()], control=True
    )
    rows, entries = list(choice.row_splits), list(choice.entry_splits)
    for p in others:
        refuses, rows[p], entries[p], flags, text = struct.unpack(_FORMAT, slots[p].cpu().numpy().tobytes())
        words = text.rstrip(b"\0").decode(errors="replace")
        call.flags |= flags
        if call.refusal is None and refuses:
            call.refusal = words if words.startswith("rank ") else f"rank {peers[p]} of the group refused: {words}"
        elif call.refusal is None and text.rstrip(b"\0") != _fitting(call.text):
            call.refusal = (
                f"ranks of the group mean different calls: {call.text!r} and {words!r}; give the same everywhere"
            )
    return rows, entries


def _metadata(stage: Stage, choice: Choice, held: Entries, rows: list[int], entries: list[int], topk: int) -> Entries:
    transport, peers, place = stage.transport, stage.peers, stage.place
    ids, small, counted = id_dtype(stage.width), count_dtype(topk), choice.counts is not None
    own, sends, slots = None, [], {}
    for p in range(len(peers)):
        index = choice.entries_for(p)
        expert = held.expert if index is None else held.expert[index]
        parts = [held.weight if index is None else held.weight[index], (expert - stage.first_of(p)).to(ids)]
        if counted:
            parts.append(choice.counts_for(p).to(small))
        if p == place:
            own = parts
        elif parts[0].numel() or (counted and parts[2].numel()):
            sends.append((peers[p], torch.cat([part.contiguous().view(torch.uint8) for part in parts])))
    weight = held.weight.dtype
    for p in range(len(peers)):
        size = entries[p] * (weight.itemsize + ids.itemsize) + (rows[p] * small.itemsize if counted else 0)
        if p != place and size:
            slots[p] = torch.empty(size, dtype=torch.uint8, device=held.weight.device)
    transport.exchange(sends, [(peers[p], slot) for p, slot in slots.items()], control=True)
    columns: list[tuple[Tensor, ...]] = []
    for p in range(len(peers)):
        empty = torch.empty(0, dtype=torch.uint8, device=held.weight.device)
        columns.append(
            tuple(own) if p == place else _unpack(slots.get(p, empty), entries[p], weight, ids, small, counted)
        )
    total = sum(rows)
    row = torch.arange(total, device=held.row.device)
    if counted:
        row = row.repeat_interleave(torch.cat([c[2] for c in columns]).long())
    expert = torch.cat([c[1] for c in columns]).long() + stage.first_of(place)
    return Entries(total, row, expert, torch.cat([c[0] for c in columns]))


def _unpack(
    raw: Tensor, entries: int, weight: torch.dtype, ids: torch.dtype, small: torch.dtype, counted: bool
) -> tuple[Tensor, ...]:
    middle = entries * weight.itemsize
    end = middle + entries * ids.itemsize
    parts = (raw[:middle].view(weight), raw[middle:end].view(ids))
    return (*parts, raw[end:].view(small)) if counted else parts


def _fitting(text: str) -> bytes:
    """What a note has room for; dots say that there was more."""
    data = text.encode()
    return data if len(data) <= TEXT_BYTES else data[: TEXT_BYTES - 3] + b"..."


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
