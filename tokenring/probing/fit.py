"""Which topology explains what was measured: every kind is fitted to the same observations, the closest one is taken.

An observation is a set of messages of one size that start together, and for each rank that received the seconds a byte took.
For every candidate (mesh, switch, ring, bus, nodes of a size; with and without a limit for one message) the model of
`Topology.arrivals` predicts the same numbers from rates that are fitted robustly:

    rate *= exp(median of log(predicted / observed))      over the observations that this rate decides

and what is left, the mean of |log(predicted / observed)|, says how far off the candidate is. Links that measured otherwise
alone than their kind's rate get a rate of their own. A parameter more has to earn its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from tokenring.topology import BYTES_PER_GB, Link, Topology

PENALTY = 0.03
"""What one more parameter must bring in mean relative error to be taken."""
UNLIKE = 1.25
"""A link gets a rate of its own when it measures this factor off its kind's."""
BUMP = 1.02
ROUNDS = 5

Messages = tuple[tuple[int, int], ...]
Build = Callable[..., Topology]


@dataclass(frozen=True)
class Observation:
    """Messages of one size that start together; `seconds[rank]` per byte of one message, for ranks that receive."""

    messages: Messages
    seconds: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Fit:
    """A topology and how far off it is: the mean of |log(predicted / observed)|."""

    topology: Topology
    error: float


@dataclass(frozen=True)
class _Candidate:
    build: Build
    start: tuple[float, ...]


def fit(world: int, observations: Sequence[Observation], per_node: int | None = None) -> Fit:
    """The topology that predicts the observations best.

    Args:
        world: how many ranks.
        observations: at least one.
        per_node: ranks on one machine, in blocks, where that is known; tried beside what the times suggest.
    """
    assert observations, "nothing was measured"
    best, least = None, math.inf
    for candidate in _candidates(world, observations, per_node):
        found = _fitted(candidate, observations)
        score = found.error + PENALTY * (len(candidate.start) + 0.5 * len(found.topology.rates) / world)
        if score < least - 1e-9:
            best, least = found, score
    assert best is not None
    return best


def predict(topology: Topology, messages: Messages) -> dict[int, float]:
    """Seconds per byte until each rank is done with what it sends and receives, latency left out."""
    done: dict[int, float] = {}
    ends = topology.arrivals([(s, d, BYTES_PER_GB) for s, d in messages])
    for end, pair in zip(ends, messages):
        for rank in pair:
            done[rank] = max(done.get(rank, 0.0), end / BYTES_PER_GB)
    return done


def _candidates(world: int, observations: Sequence[Observation], per_node: int | None) -> Iterable[_Candidate]:
    alone = [1 / s for o in observations if len(o.messages) == 1 for _, s in o.seconds] or [
        1 / s for o in observations for _, s in o.seconds
    ]
    rate = median(alone) / BYTES_PER_GB
    flat = [Topology.mesh, Topology.switch, *([Topology.ring] if world > 3 else []), Topology.bus]
    for make in flat:
        yield _Candidate(lambda w, make=make: make(world, w), (rate,))
    for make in (Topology.switch, Topology.bus):
        if world > 2:
            yield _Candidate(lambda w, f, make=make: make(world, w, flow_gbytes_per_s=f), (2 * rate, rate))
    for size in _block_sizes(world, observations, per_node):
        yield from _node_candidates(world, size, observations)


def _node_candidates(world: int, size: int, observations: Sequence[Observation]) -> Iterable[_Candidate]:
    near, far = (_rates(observations, size, inside) for inside in (True, False))
    if not near or not far:
        return
    start = (median(near) / BYTES_PER_GB, median(far) / BYTES_PER_GB)
    insides = [Topology.mesh, *([Topology.switch] if size > 2 else []), Topology.bus]
    for make in insides:
        for port in ("node", "rank"):
            for through in (False, True) if make == Topology.switch else (False,):

                def build(
                    w: float, x: float, make: Build = make, port: str = port, through: bool = through
                ) -> Topology:
                    options = {"nic_per": port, "through_ports": through}
                    return Topology.nodes(world // size, size, intra=make(size, w), inter=x, **options)

                yield _Candidate(build, start)


def _block_sizes(world: int, observations: Sequence[Observation], per_node: int | None) -> list[int]:
    """The known size, and the divisor of `world` whose blocks differ most from what lies between them."""
    sizes = [per_node] if per_node is not None and 1 < per_node < world else []
    apart: dict[int, float] = {}
    for size in range(2, world // 2 + 1):
        near, far = (_rates(observations, size, inside) for inside in (True, False))
        if world % size == 0 and near and far:
            apart[size] = median(near) / median(far)
    if apart:
        widest = max(apart, key=lambda size: (apart[size], size))
        if apart[widest] > UNLIKE and widest not in sizes:
            sizes.append(widest)
    return sizes


def _rates(observations: Sequence[Observation], size: int, inside: bool) -> list[float]:
    """Bytes per second of messages between disjoint pairs, inside blocks of `size` ranks or between them."""
    found = []
    for observation in observations:
        ranks = [rank for pair in observation.messages for rank in pair]
        if len(ranks) == len(set(ranks)):
            source = {d: s for s, d in observation.messages}
            found += [1 / x for d, x in observation.seconds if (source[d] // size == d // size) is inside]
    return found


def _fitted(candidate: _Candidate, observations: Sequence[Observation]) -> Fit:
    """The candidate with its rates, then links of their own, then its rates again beside those."""
    rates = _settled(candidate.build, candidate.start, observations)
    plain = candidate.build(*rates)
    unlike = _unlike(plain, observations)
    found = Fit(plain, _error(plain, observations))
    if unlike:
        rates = _settled(lambda *r: candidate.build(*r).with_rates(unlike), rates, observations)
        better = candidate.build(*rates).with_rates(unlike)
        error = _error(better, observations)
        found = Fit(better, error) if error < found.error else found
    return found


def _settled(build: Build, start: Sequence[float], observations: Sequence[Observation]) -> tuple[float, ...]:
    """Rates moved, one after the other, until each predicts the median of what it decides."""
    rates = list(start)
    for _ in range(ROUNDS if len(rates) > 1 else 1):
        before = list(rates)
        for which in range(len(rates)):
            now = _ratios(build(*rates), observations)
            bumped = rates[:which] + [rates[which] * BUMP] + rates[which + 1 :]
            then = _ratios(build(*bumped), observations)
            decided = [a for a, b in zip(now, then) if a - b > 0.5 * math.log(BUMP)]
            if decided:
                rates[which] *= math.exp(median(decided))
        if all(abs(a / b - 1) < 1e-3 for a, b in zip(rates, before)):
            break
    return tuple(rates)


def _unlike(topology: Topology, observations: Sequence[Observation]) -> dict[str, float]:
    """Links that carried one message alone never at their kind's rate, and theirs; none where most do: a wrong kind."""
    seen: dict[Link, list[float]] = {}
    for observation in observations:
        routes = {d: topology.route(s, d) for s, d in observation.messages}
        users = Counter(link for s, d in observation.messages for link in topology.route(s, d))
        received = Counter(d for _, d in observation.messages)
        for rank, seconds in observation.seconds:
            for link in routes[rank]:
                if users[link] == 1 and received[rank] == 1:
                    seen.setdefault(link, []).append(1 / seconds / BYTES_PER_GB)
    limit = topology.flow_gbytes_per_s or math.inf
    unlike = {}
    for link, rates in seen.items():
        usual = min(limit, link.gbytes_per_s)
        if max(rates) < usual / UNLIKE:
            unlike[link.name] = max(rates)
        elif min(rates) > usual * UNLIKE:
            unlike[link.name] = min(rates)
    return unlike if 2 * len(unlike) <= len(seen) else {}


def _ratios(topology: Topology, observations: Sequence[Observation]) -> list[float]:
    """log(predicted / observed) for every rank of every pattern."""
    ratios = []
    for observation in observations:
        predicted = predict(topology, observation.messages)
        ratios += [math.log(predicted[rank] / seconds) for rank, seconds in observation.seconds]
    return ratios


def _error(topology: Topology, observations: Sequence[Observation]) -> float:
    """The mean over ranks and patterns, each pattern's last rank counted once more for every rank.

    Who gets how much of a full link is less certain than when all that must cross it has.
    """
    total, count = 0.0, 0
    for observation in observations:
        predicted = predict(topology, observation.messages)
        last = max(predicted[rank] for rank, _ in observation.seconds)
        whole = abs(math.log(last / max(seconds for _, seconds in observation.seconds)))
        total += sum(abs(math.log(predicted[rank] / s)) + whole for rank, s in observation.seconds)
        count += 2 * len(observation.seconds)
    return total / count
