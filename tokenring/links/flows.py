"""How messages share links: max-min fairness, and when each message of a set that starts at once has arrived.

A *flow* is one message under way. It crosses links (resources with a rate each) and may have a rate it cannot exceed. Rates
are max-min fair: all rise together until a link is full or a flow is at its own limit; those flows keep their rate, the
others go on rising. Every flow ends up limited by a full link on which nobody is faster, or by itself.

    one link of 6, flows limited to 1, none, none    ->  1, 2.5, 2.5
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from heapq import heapify, heappop, heappush

SAME = 1.0 + 1e-9
"""Rates and times this close are equal; without it rounding would split what happens at once into many events."""


def fair_rates(
    routes: Sequence[Sequence[Hashable]], capacity: Mapping[Hashable, float], limits: Sequence[float]
) -> list[float]:
    """The max-min fair rate of each flow, in the unit of `capacity`.

    Args:
        routes: the links that each flow crosses.
        capacity: the rate of every link named in `routes`.
        limits: a flow's own highest rate; `math.inf` for none. A flow without links runs at its limit.

    >>> fair_rates([["a"], ["a"], ["a", "b"]], {"a": 6.0, "b": 1.0}, [math.inf, math.inf, math.inf])
    [2.5, 2.5, 1.0]
    """
    paths, rates = _numbered(routes, capacity)
    return share(paths, rates, limits)


def share(paths: Sequence[Sequence[int]], capacity: Sequence[float], limits: Sequence[float]) -> list[float]:
    """`fair_rates` with links as numbers, indices of `capacity`."""
    rates, settled = [0.0] * len(paths), [False] * len(paths)
    users: dict[int, list[int]] = {}
    for flow, path in enumerate(paths):
        for link in path:
            users.setdefault(link, []).append(flow)
    left = {link: capacity[link] for link in users}
    count = {link: len(flows) for link, flows in users.items()}
    fills = [(left[link] / n, link) for link, n in count.items()]
    # A flow's own limit is a link of its own, numbered below zero.
    fills += [(limit, -1 - flow) for flow, limit in enumerate(limits) if limit < math.inf or not paths[flow]]
    heapify(fills)
    while fills:
        level, link = heappop(fills)
        if link >= 0 and count[link] and level * SAME < left[link] / count[link]:
            heappush(fills, (left[link] / count[link], link))  # some of its users settled for less meanwhile
            continue
        for flow in users[link] if link >= 0 else (-1 - link,):
            if not settled[flow]:
                settled[flow], rates[flow] = True, level
                for crossed in paths[flow]:
                    left[crossed] = max(0.0, left[crossed] - level)
                    count[crossed] -= 1
    return rates


def finish_times(
    routes: Sequence[Sequence[Hashable]],
    capacity: Mapping[Hashable, float],
    limits: Sequence[float],
    sizes: Sequence[float],
) -> list[float]:
    """When each of some flows that start together ends: `sizes` over rates that change whenever one of them is done.

    >>> finish_times([["a"], ["a"]], {"a": 2.0}, [math.inf, math.inf], [1.0, 3.0])
    [1.0, 2.0]
    """
    paths, link_rates = _numbered(routes, capacity)
    ends, left = [0.0] * len(paths), list(sizes)
    active = [flow for flow, size in enumerate(sizes) if size > 0]
    now = 0.0
    while active:
        rates = share([paths[f] for f in active], link_rates, [limits[f] for f in active])
        step = min(left[flow] / rate for flow, rate in zip(active, rates))
        now += step
        going = []
        for flow, rate in zip(active, rates):
            if left[flow] <= rate * step * SAME:
                ends[flow] = now
            else:
                left[flow] -= rate * step
                going.append(flow)
        active = going
    return ends


def _numbered(
    routes: Sequence[Sequence[Hashable]], capacity: Mapping[Hashable, float]
) -> tuple[list[list[int]], list[float]]:
    """Links as numbers in order of first use, and the rate of each: numbers hash faster than names."""
    numbers: dict[Hashable, int] = {}
    paths = [[numbers.setdefault(link, len(numbers)) for link in route] for route in routes]
    return paths, [capacity[link] for link in numbers]
