"""From what owners decided to rows that are under way: in one stage, or in two where rows test keys exactly.

pooled, lse       lines, then keys and values
rescore, every    lines and keys of what passed; each row's verdicts go back; then the values of what is left

Keys and values travel on a lane of their own, so that small messages do not queue behind them, and while they travel this rank
computes on what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.cut import Cut, Part
from sparse_attn.distributed.exchange import Counts, Flight, Wire, mirrored
from sparse_attn.distributed.lists import BITS, Wanted
from sparse_attn.distributed.local import stacks
from sparse_attn.distributed.owner import joined
from sparse_attn.identify.products import least_scores, parted, reached_early, test_dtype, with_least, with_ones
from tokenring.plans.step import AHEAD_LANE

Stop = Callable[[list[Tensor], list[Tensor]], bool]
"""From the lines of this rank's rows before and after the last test: whether plain attention is to run. Collective."""
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Settled:
    """What is known once every line is final: who wants what, and the rows that are on their way here."""

    wanted: Wanted
    sent: list[Tensor]
    """For each rank the lines of the rows that went there."""
    counts: Counts
    """Rows of each rank that went to each."""
    under_way: Flight
    """Values, or keys and values."""
    keys: Tensor | None = None
    """(far lines, D), where they came before the values."""

    def far(self, batch: int, key_heads: int) -> Pair:
        """Keys and values (B, far rows, Hkv, D or Dv) that were sent here; waits for them."""
        arrived = self.under_way.land()
        rows = arrived if self.keys is None else (self.keys, *arrived)
        keys, values = (self.wanted.placed(x, batch, key_heads) for x in rows)
        return keys, values


@dataclass(frozen=True, eq=False)
class Rows:
    """Queries (B, rows, Hq, D) and the least scores (B, Hq, rows) that they keep, which test keys exactly in a dtype."""

    q: Tensor
    least: Tensor
    scale: float
    dtype: torch.dtype

    @classmethod
    def testing(cls, q: Tensor, lse: Tensor, config: AnchorConfig, scale: float) -> Rows:
        """As a configuration says; lse of the rows' anchor regions."""
        dtype = test_dtype(q, config.scores)
        return cls(q, least_scores(lse, config.thetas(q.shape[2]), dtype), scale, dtype)

    def of(self, part: Part, entry: int, head: int) -> Tensor:
        """(rows, D + 1 or D + 2): the rows of a part, with what they keep."""
        rows, only = slice(*part.rows), slice(head, head + 1)
        return with_least(self.q[entry, rows, only], self.least[entry, only, rows], self.scale, self.dtype)[0]


def one_stage(cut: Cut, wire: Wire, lines: list[Tensor], k: Tensor, v: Tensor, stop: Stop) -> Settled | None:
    """Lines, then keys and values set out; None where plain attention is to run. Collective."""
    if stop(lines, lines):
        return None
    sent = sendable(cut, wire.runtime.rank, lines)
    told, counts = _agreed(cut, wire, lines, sent)
    coming = _told(wire, lines, told)
    rows = wire.rows("stripes", counts, _leaving(sent, k), _leaving(sent, v), lane=AHEAD_LANE)
    return Settled(_wanted(cut, wire, lines, told, coming), sent, counts, rows)


def two_stages(
    cut: Cut, wire: Wire, lines: list[Tensor], rows: Rows, k: Tensor, v: Tensor, near: Tensor, stop: Stop
) -> Settled | None:
    """Lines and keys of what passed, exact tests, verdicts back, then values set out; None where plain attention is to run.
    Collective.

    near: (B, rows, Hkv, D), the keys that this rank holds.
    """
    rank = wire.runtime.rank
    sent = sendable(cut, rank, lines)
    told, counts = _agreed(cut, wire, lines, sent)
    coming = _told(wire, lines, told)
    arriving = wire.rows("stripes:keys", counts, _leaving(sent, k), lane=AHEAD_LANE)
    passed = _wanted(cut, wire, lines, told, coming)
    words = torch.zeros_like(passed.words)
    words[~passed.far] = tested(cut, rank, passed, ~passed.far, near, rows)
    (keys,) = arriving.land()
    words[passed.far] = tested(cut, rank, passed, passed.far, passed.placed(keys, *k.shape[::2]), rows)
    words, decided = _verdicts(cut, wire, lines, passed, words, told, rows.q.shape[2] // k.shape[2])
    if stop(lines, decided):
        return None
    left = (words != 0).any(1)
    sent = sendable(cut, rank, [x[(x[:, 1:] != 0).any(1)] for x in decided])
    counts = wire.agreed(list(map(len, sent)), k.device)
    values = wire.rows("stripes:values", counts, _leaving(sent, v), lane=AHEAD_LANE)
    return Settled(passed.only(words), sent, counts, values, keys[left[passed.far]])


def _verdicts(
    cut: Cut, wire: Wire, lines: list[Tensor], passed: Wanted, words: Tensor, told: Counts, each: int
) -> tuple[Tensor, list[Tensor]]:
    """The final words of the lines that this rank has, and all lines of its own rows with theirs. Collective."""
    rank, mine = wire.runtime.rank, words.split(passed.counts)
    (back,) = wire.rows("verdicts", mirrored(told), _floats(_joined(_others(mine, rank), words))).land()
    verdicts = _with(mine[rank], _ints(back).split(_others(told[rank], rank)), rank)
    decided = [torch.cat([line[:, :1], word], 1) for line, word in zip(lines, verdicts)]
    if cut.split:
        decided = joined(cut, decided, each)
        final = _joined([x[:, 1:] for x in _others(decided, rank)], words)
        (arrived,) = wire.rows("verdicts:joined", told, _floats(final)).land()
        words = torch.cat(_with(decided[rank][:, 1:], _ints(arrived).split(_others(passed.counts, rank)), rank))
    return words, decided


def sendable(cut: Cut, rank: int, lines: Sequence[Tensor]) -> list[Tensor]:
    """For each rank the lines whose rows it has not got yet."""
    found = []
    for destination, line in enumerate(lines):
        missing = (cut.near(destination, rank) < 0).to(line.device)
        found.append(line[missing[line[:, 0].long() % max(1, len(missing))]] if len(line) else line)
    return found


def tested(cut: Cut, rank: int, passed: Wanted, which: Tensor, keys: Tensor, rows: Rows) -> Tensor:
    """int32 (lines, W): of the bits of some lines, those that a row of this rank wants by itself.

    keep column j  <=>  q_i . k_j * scale - lse_i >= -theta  for some row i of the group on this rank

    which: bool, near lines or far ones. keys: (B, rows, Hkv, D), where they lie.
    """
    lines, shape = passed.some(which), (rows.q.shape[0], rows.q.shape[2], keys.shape[2])
    each = shape[1] // shape[2]
    ones, words = with_ones(keys, rows.dtype), torch.zeros_like(lines.words)
    places = {number: place for place, number in enumerate(cut.groups[rank])}
    for number, entry, head, found in stacks(cut, rank, lines, shape):
        word, shift = divmod(places[number] * each + head % each, BITS)
        here = ones[entry, head // each].index_select(0, lines.columns[found])
        for part in cut.parts[rank]:
            if part.group == number:
                kept = reached_early(parted(rows.of(part, entry, head)), here)
                words[found, word] |= kept.to(torch.int32) << shift
    return words


def _agreed(cut: Cut, wire: Wire, lines: list[Tensor], sent: list[Tensor]) -> tuple[Counts, Counts]:
    """How many lines and how many rows go from each rank to each. Collective."""
    rank = wire.runtime.rank
    mine = [len(x) if d != rank else 0 for d, x in enumerate(lines)]
    both = wire.agreed([*mine, *map(len, sent)], lines[rank].device)
    return tuple(x[: cut.world] for x in both), tuple(x[cut.world :] for x in both)


def _told(wire: Wire, lines: list[Tensor], told: Counts) -> Flight:
    """Lines set out to the ranks that want their rows."""
    rank = wire.runtime.rank
    return wire.rows("lines", told, _floats(_joined(_others(lines, rank), lines[rank])))


def _wanted(cut: Cut, wire: Wire, lines: list[Tensor], told: Counts, coming: Flight) -> Wanted:
    """The lines that this rank has, its own and those that come."""
    rank, ranks = wire.runtime.rank, range(cut.world)
    (arrived,) = coming.land()
    others = _ints(arrived).split([told[s][rank] for s in ranks if s != rank])
    near = [cut.near(rank, owner).to(arrived.device) for owner in ranks]
    return Wanted(_with(lines[rank], others, rank), near)


def _leaving(sent: Sequence[Tensor], x: Tensor) -> Tensor:
    """The rows (lines, D) of x (B, rows, Hkv, D) that lines name."""
    where = torch.cat([line[:, 0] for line in sent]).long()
    heads, rows = where // max(1, x.shape[1]), where % max(1, x.shape[1])
    return x[heads // x.shape[2], rows, heads % x.shape[2]]


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """One after the other; nothing of the kind of `like` where there are none."""
    return torch.cat([*parts, like[:0]])


def _others(items: Sequence, rank: int) -> list:
    return [item for r, item in enumerate(items) if r != rank]


def _with(own: Tensor, others: Sequence[Tensor], rank: int) -> list[Tensor]:
    return [*others[:rank], own, *others[rank:]]


def _floats(words: Tensor) -> Tensor:
    """int32 words in a dtype that a Plan can have; the bits are the same."""
    return words.contiguous().view(torch.float32)


def _ints(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.int32)
