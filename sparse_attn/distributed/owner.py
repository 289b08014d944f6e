"""The owner of keys decides: which of its rows each rank's groups want.

line j for rank d  <=>  some group of d and some query head of the key head wants row j, by what was told of its queries
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_attn.distributed.cut import Cut, Part, rows_of
from sparse_attn.distributed.exchange import Wire
from sparse_attn.distributed.lists import BITS, lines_of, words_for
from sparse_attn.distributed.summaries import Flats, Summary


class Owner:
    """One rank in its part as the owner of keys, while what is told of queries is under way to it."""

    def __init__(self, cut: Cut, wire: Wire, summary: Summary, k: Tensor, each: int) -> None:
        """Collective. k: (B, rows, Hkv, D), this rank's; `each` query heads a key head."""
        self.cut, self.rank, self.summary, self.k, self.each = cut, wire.runtime.rank, summary, k, each
        rank, ranks = self.rank, range(cut.world)
        counts = tuple(tuple(sum(map(summary.size, self._asked(o, s))) if o != s else 0 for o in ranks) for s in ranks)
        self.mine = {part: summary.of_part(part) for part in cut.parts[rank] if part.group in cut.holders}
        leaving = [self.mine[part] for o in ranks if o != rank for part in self._asked(o, rank)]
        nothing = torch.empty(0, dtype=summary.dtype, device=k.device)
        self.flight = wire.rows("summaries", counts, torch.cat([nothing, *leaving])[:, None])
        held = torch.isin(cut.kv_layout.positions(rank), torch.tensor(cut.keep, dtype=torch.int64))
        self.free = ~held.to(k.device)

    def _asked(self, owner: int, source: int) -> list[Part]:
        """The parts of `source` that tell `owner` of their queries."""
        return [part for part in self.cut.parts[source] if part.group in self.cut.candidates[owner]]

    def decide(self) -> list[Tensor]:
        """For each rank the lines of this rank's rows that its groups want. This rank's own groups, as far as no other rank
        has rows of them, are judged while the others' summaries travel."""
        rank, split = self.rank, set(self.cut.split)
        own, alone = self._words(), [n for n in self.cut.groups[rank] if n not in split]
        self._judge(own, rank, alone, _by_group(self.mine.items()))
        flats, lines = self._arrived(), []
        for other in range(self.cut.world):
            words = own if other == rank else self._words()
            done = alone if other == rank else ()
            self._judge(words, other, [n for n in self.cut.groups[other] if n not in done], flats)
            lines.append(lines_of(words))
        return lines

    def _words(self) -> Tensor:
        batch, rows, kv_heads, _ = self.k.shape
        width = line_words(self.cut, self.each)
        return torch.zeros(batch * kv_heads, rows, width, dtype=torch.int32, device=self.k.device)

    def _arrived(self) -> Mapping[int, Flats]:
        """For each group with candidates on this rank its parts and what their ranks tell of their queries."""
        (numbers,) = self.flight.land()
        coming = [(s, part) for s in range(self.cut.world) for part in self._asked(self.rank, s)]
        others = iter(numbers.flatten().split([self.summary.size(part) for s, part in coming if s != self.rank]))
        return _by_group((part, self.mine[part] if s == self.rank else next(others)) for s, part in coming)

    def _judge(self, words: Tensor, other: int, groups: Sequence[int], flats: Mapping[int, Flats]) -> None:
        """Set the bits of some groups of a rank where they want this rank's rows."""
        candidates = self.cut.candidates[self.rank]
        asked = {number: candidates[number] for number in groups if number in candidates}
        for number, wanted in self.summary.wanted(flats, asked):
            place, here = self.cut.groups[other].index(number), rows_of(asked[number], self.k.device)
            wanted = (wanted & self.free[here]).unflatten(1, (self.k.shape[2], self.each)).flatten(0, 1)
            for head in range(self.each):
                word, shift = divmod(place * self.each + head, BITS)
                words[:, here, word] |= wanted[:, head].to(torch.int32) << shift


def _by_group(told: Iterable[tuple[Part, Tensor]]) -> dict[int, list[tuple[Part, Tensor]]]:
    found: dict[int, list[tuple[Part, Tensor]]] = {}
    for part, numbers in told:
        found.setdefault(part.group, []).append((part, numbers))
    return found


def line_words(cut: Cut, each: int) -> int:
    """Words of a line, on every rank alike."""
    return words_for(max(map(len, cut.groups), default=0) * each)


def joined(cut: Cut, lines: Sequence[Tensor], each: int) -> list[Tensor]:
    """Where several ranks hold rows of a group, what one of them wants of the group's columns all of them get.

    lines: for each rank the lines of this rank's rows, with that rank's own verdicts in their words.
    """
    found = [x.clone() for x in lines]
    for number in cut.split:
        places = {rank: cut.groups[rank].index(number) * each for rank in cut.holders[number]}
        for head in range(each):
            bits = {rank: divmod(place + head, BITS) for rank, place in places.items()}
            wanted = torch.cat([found[r][(found[r][:, 1 + w] >> s) & 1 == 1, 0] for r, (w, s) in bits.items()])
            for rank, (word, shift) in bits.items():
                here = torch.isin(found[rank][:, 0], wanted)
                found[rank][:, 1 + word] |= here.to(torch.int32) << shift
    return found
