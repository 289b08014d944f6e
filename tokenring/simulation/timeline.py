"""What a simulation says: how long a plan takes, what each rank does meanwhile, what each link carries."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN_RANKS, SHOWN_LINKS = 16, 12


@dataclass(frozen=True, slots=True)
class RankTime:
    """Seconds of one rank; they add up to `end`."""

    rank: int
    compute: float
    """Computing tiles, longer where messages slow it down."""
    merge: float
    """Joining partial results and copying rows."""
    overhead: float
    """Posting messages and going from one operation to the next."""
    wait: float
    """Nothing else to do than wait for messages or for slower ranks."""

    @property
    def busy(self) -> float:
        """Everything but waiting."""
        return self.compute + self.merge + self.overhead

    @property
    def end(self) -> float:
        """When the rank is done."""
        return self.busy + self.wait


@dataclass(frozen=True, slots=True)
class LinkTime:
    """What one link carried: payload bytes, and seconds with at least one message on it."""

    name: str
    bytes: float
    busy: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A plan on a topology, modelled. Hashable.

    `ranks` and `links` hold all of them where `sampled` is False; in a large world some ranks that stand for all, and the
    links that they use.
    """

    seconds: float
    ranks: tuple[RankTime, ...]
    links: tuple[LinkTime, ...]
    computing: bool
    """Whether the topology's costs hold a compute rate; False: only communication is modelled, computing takes no time."""
    sampled: bool

    @property
    def exposed_seconds(self) -> float:
        """What is not the work of the busiest rank: communication that nothing hides, and waiting for slower ranks."""
        return self.seconds - max(rank.busy for rank in self.ranks)

    def describe(self) -> str:
        """A table, times in milliseconds."""
        what = "computing and communication" if self.computing else "communication only"
        some = "ranks that stand for all" if self.sampled else "all ranks"
        lines = [
            f"modelled: {1e3 * self.seconds:.4g} ms, {1e3 * self.exposed_seconds:.4g} ms of it exposed ({what}, {some})",
            f"{'rank':>6} {'compute':>9} {'merge':>9} {'overhead':>9} {'wait':>9} {'end':>9}",
        ]
        for rank in self.ranks[:SHOWN_RANKS]:
            parts = (rank.compute, rank.merge, rank.overhead, rank.wait, rank.end)
            lines.append(f"{rank.rank:>6} " + " ".join(f"{1e3 * x:>9.4g}" for x in parts))
        if len(self.ranks) > SHOWN_RANKS:
            lines.append(f"   and {len(self.ranks) - SHOWN_RANKS} more ranks")
        busiest = sorted(self.links, key=lambda link: (-link.busy, link.name))
        lines += [
            f"{link.name}: {link.bytes:.4g} bytes, busy {1e3 * link.busy:.4g} ms" for link in busiest[:SHOWN_LINKS]
        ]
        if len(busiest) > SHOWN_LINKS:
            lines.append(f"and {len(busiest) - SHOWN_LINKS} more links")
        return "\n".join(lines)
