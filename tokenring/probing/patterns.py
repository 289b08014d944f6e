"""Which messages a probe sends at once, so that what they share shows in how long they take.

alone     one message                                         the rate of a link
ring      every rank to the next                              both directions of a port, or of a bus, at once
both      every rank to both neighbours                       two links of a rank, or one port
fan       one rank to two others                              whether messages to unlike places share its port
peers     every rank to all others (to some, in large worlds) all links of a rank; what lies between nodes
pairs     disjoint pairs, then the other way round            every link by itself; which ranks are near
"""

from __future__ import annotations

from tokenring.probing.fit import Messages

LARGE = 64
"""Worlds above it get fewer messages: what is measured there says as much, and takes as long, with a few."""
MOST_PEERS = 8
MOST_ROUNDS = 16


def patterns(world: int) -> list[Messages]:
    """The patterns of a world of two ranks or more, the telling ones first; none twice."""
    ranks = range(world)
    found = [((0, 1),), ((0, world // 2),), ((0, world - 1),)]
    found.append(tuple((r, (r + 1) % world) for r in ranks))
    found.append(tuple((r, (r + way) % world) for r in ranks for way in (1, -1)))
    found.append(tuple((r, (r + shift) % world) for shift in _shifts(world) for r in ranks))
    found += [((0, 1), (0, far)) for far in (world // 2, world - 1) if far > 1]
    for pairs in _rounds(world):
        found += [pairs, tuple((b, a) for a, b in pairs)]
    unique: dict[frozenset[tuple[int, int]], Messages] = {}
    for messages in found:
        unique.setdefault(frozenset(messages), tuple(dict.fromkeys(messages)))
    return list(unique.values())


def _shifts(world: int) -> list[int]:
    """All distances, or in a large world some near and some far ones."""
    if world <= 2 * MOST_PEERS:
        return list(range(1, world))
    half = (MOST_PEERS if world <= LARGE else MOST_PEERS // 2) // 2
    return sorted({1 << k for k in range(half)} | {world * k // (half + 1) for k in range(1, half + 1)})


def _rounds(world: int) -> list[Messages]:
    """Rounds of disjoint pairs in which everybody meets everybody (the circle method); evenly chosen ones if many."""
    size = world + world % 2
    most = min(size - 1, MOST_ROUNDS if world <= LARGE else MOST_ROUNDS // 4)
    chosen = [k * (size - 1) // most for k in range(most)]
    rounds = []
    for turn in chosen:
        seats = [0, *((turn + k) % (size - 1) + 1 for k in range(size - 1))]
        pairs = [(seats[k], seats[size - 1 - k]) for k in range(size // 2)]
        rounds.append(tuple((min(p), max(p)) for p in pairs if max(p) < world))
    return rounds
