"""The owner of keys decides: which of its rows each rank's groups want.

line j for rank d  <=>  some group of d and some query head of the key head wants row j, by what was told of its queries
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn.distributed.cut import Cut, Part, rows_of
from sparse_attn.distributed.exchange import Wire
from sparse_attn.distributed.lists import BITS, lines_of, words_for
from sparse_attn.distributed.summaries import Flats, Summary


def told(cut: Cut, wire: Wire, summary: Summary, device: torch.device) -> dict[int, Flats]:
    """For each group with candidates on this rank its parts and what their ranks tell of their queries. Collective."""
    rank, ranks = wire.runtime.rank, range(cut.world)

    def asked(owner: int, source: int) -> list[Part]:
        return [part for part in cut.parts[source] if part.group in cut.candidates[owner]]

    counts = tuple(tuple(sum(map(summary.size, asked(o, s))) if o != s else 0 for o in ranks) for s in ranks)
    mine = {part: summary.of_part(part) for part in cut.parts[rank] if part.group in cut.holders}
    leaving = [mine[part] for o in ranks if o != rank for part in asked(o, rank)]
    nothing = torch.empty(0, dtype=summary.dtype, device=device)
    (arrived,) = wire.rows("summaries", counts, torch.cat([nothing, *leaving])[:, None])
    coming = [(s, part) for s in ranks for part in asked(rank, s)]
    others = iter(arrived.flatten().split([summary.size(part) for s, part in coming if s != rank]))
    found: dict[int, list[tuple[Part, Tensor]]] = {}
    for source, part in coming:
        found.setdefault(part.group, []).append((part, mine[part] if source == rank else next(others)))
    return found


def decide(cut: Cut, rank: int, summary: Summary, flats: dict[int, Flats], k: Tensor, each: int) -> list[Tensor]:
    """For each rank the lines of this rank's rows k (B, rows, Hkv, D) that its groups want; `each` query heads a key head."""
    width = line_words(cut, each)
    free = ~torch.isin(cut.layout.positions(rank), torch.tensor(cut.keep, dtype=torch.int64)).to(k.device)
    lines = []
    for groups in cut.groups:
        words = torch.zeros(k.shape[0] * k.shape[2], k.shape[1], width, dtype=torch.int32, device=k.device)
        for place, number in enumerate(groups):
            if number in flats:
                rows = cut.candidates[rank][number]
                here = rows_of(rows, k.device)
                wanted = summary.wanted(number, flats[number], rows) & free[here]
                wanted = wanted.unflatten(1, (k.shape[2], each)).flatten(0, 1).to(torch.int32)
                for head in range(each):
                    word, shift = divmod(place * each + head, BITS)
                    words[:, here, word] |= wanted[:, head] << shift
        lines.append(lines_of(words))
    return lines


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
