"""Which expert lives where: replicas of busy experts, even loads, experts that are used together on one rank.

    loads           tokens of each logical expert
    co-activation   how often two experts are chosen by one token
    placement       slot -> logical expert; slots in equal parts on the ranks; a busy expert may own several slots

Replicas: each free slot goes to the expert with the largest load per replica. Packing: slots, heaviest first, go to the rank
with room where they fit best, weighing even loads against sharing a rank with experts that the same tokens want; then pairs
are swapped while that helps. Fewer ranks wanted by a token are fewer rows sent by `dedup`. (Balancing with replicas as in
EPLB of DeepSeek-V3, arXiv 2412.19437, section 3.4; co-activation as in Occult, arXiv 2505.13345.) Plain, deterministic, on one
rank's numbers: every rank that plans from the same numbers gets the same placement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from tokenring.transport import Transport


@dataclass(frozen=True)
class Placement:
    """Slots of all ranks, in rank order; a dispatcher counts slots as its experts.

    >>> place(torch.tensor([6, 1, 1, 4]), ranks=2).slots
    (0, 2, 1, 3)
    """

    slots: tuple[int, ...]
    """Logical expert of each slot."""
    ranks: int
    """Each rank holds len(slots) / ranks slots."""

    def __post_init__(self) -> None:
        experts = set(self.slots)
        if self.ranks < 1 or len(self.slots) % self.ranks or experts != set(range(len(experts))):
            raise ValueError(
                f"a placement has {len(self.slots)} slots on {self.ranks} ranks for experts {sorted(experts)[:8]}...; give equal "
                "parts, and every expert from 0 on at least one slot"
            )

    @property
    def num_experts(self) -> int:
        """Logical experts."""
        return max(self.slots) + 1

    def rank_slots(self, rank: int) -> tuple[int, ...]:
        """Logical experts on a rank."""
        size = len(self.slots) // self.ranks
        return self.slots[rank * size : (rank + 1) * size]

    def to_slots(self, expert_ids: Tensor, source: int = 0) -> Tensor:
        """(T, k) logical ids, -1 for none -> slots. Tokens take turns between an expert's replicas.

        Args:
            source: rank of the tokens; ranks start their turns at different replicas.

        >>> Placement((0, 1, 0, 2), 2).to_slots(torch.tensor([[0, 2], [0, 1]])).tolist()
        [[0, 3], [2, 1]]
        """
        count = torch.bincount(torch.tensor(self.slots))
        table = torch.full((self.num_experts, int(count.max())), -1)
        order = torch.tensor(self.slots).argsort(stable=True)
        column = torch.arange(len(self.slots)) - (count.cumsum(0) - count).repeat_interleave(count)
        table[torch.tensor(self.slots)[order], column] = order
        table, count = table.to(expert_ids.device), count.to(expert_ids.device)
        turn = (torch.arange(expert_ids.shape[0], device=expert_ids.device) + source).unsqueeze(1)
        known = expert_ids.clamp_min(0)
        return torch.where(expert_ids < 0, -1, table[known, turn % count[known]])

    def rank_loads(self, loads: Tensor) -> Tensor:
        """(ranks,) tokens that each rank's slots get of (E,) loads, replicas sharing evenly."""
        slots = torch.tensor(self.slots)
        share = loads.double() / torch.bincount(slots)
        return share[slots].view(self.ranks, -1).sum(dim=1)

    def imbalance(self, loads: Tensor) -> float:
        """Largest load of a rank over the mean; 1 is even."""
        found = self.rank_loads(loads)
        return float(found.max() / found.mean().clamp_min(1e-30))

    def rows_per_token(self, expert_ids: Tensor) -> float:
        """Mean number of ranks that a token of (T, k) logical ids wants."""
        size = len(self.slots) // self.ranks
        slots = self.to_slots(expert_ids)
        wants = torch.zeros(expert_ids.shape[0], self.ranks + 1, dtype=torch.bool)
        wants.scatter_(1, torch.where(slots < 0, self.ranks, slots // size).cpu(), True)
        return float(wants[:, : self.ranks].sum(dim=1).double().mean()) if expert_ids.numel() else 0.0


def co_activation(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(E, E) int64: how many tokens of (T, k) chose both experts; the diagonal is the loads.

    >>> co_activation(torch.tensor([[0, 1], [1, -1]]), 2).tolist()
    [[1, 1], [1, 2]]
    """
    chosen = torch.zeros(expert_ids.shape[0], num_experts + 1)
    chosen.scatter_(1, torch.where(expert_ids < 0, num_experts, expert_ids), 1.0)
    chosen = chosen[:, :num_experts].double()
    return (chosen.T @ chosen).long()


def place(
    loads: Tensor, *, ranks: int, slots: int | None = None, together: Tensor | None = None, weight: float = 1.0
) -> Placement:
    """A placement for loads, and for co-activation if it is given.

    Args:
        loads: (E,) tokens of each expert.
        ranks: how many hold experts.
        slots: of all ranks together, E or more; what exceeds E holds replicas. None: E.
        together: (E, E) counts of `co_activation`; None: loads alone decide.
        weight: of co-activation against even loads: with 1, a shared token is worth a token of load.
    """
    experts = loads.numel()
    total = experts if slots is None else slots
    if loads.dim() != 1 or bool((loads < 0).any()):
        raise ValueError(f"loads is {tuple(loads.shape)}; give (E,) counts of at least 0")
    if ranks < 1:
        raise ValueError(f"ranks is {ranks}; give at least 1")
    if total < experts or total % ranks:
        raise ValueError(
            f"slots={total} for {experts} experts on {ranks} ranks; give at least {experts}, a multiple of {ranks}"
        )
    if together is not None and together.shape != (experts, experts):
        raise ValueError(f"together is {tuple(together.shape)}; give {(experts, experts)}")
    copies = replicas(loads, total)
    share = (loads.double() / copies).tolist()
    pull = torch.zeros(experts, experts).double() if together is None else weight * together.double()
    pull = ((pull + pull.T) / 2 / copies.unsqueeze(0) / copies.unsqueeze(1)).fill_diagonal_(0.0)
    bins = _pack(share, copies.tolist(), ranks, total // ranks, pull)
    _improve(bins, share, pull)
    return Placement(tuple(expert for held in bins for expert in sorted(held)), ranks)


def sum_over_replicas(parameters: Iterable[Tensor], placement: Placement, ep: Transport) -> None:
    """Collective: gradients of an expert's replicas become their sum, added up in the order of slots.

    Args:
        parameters: (slots of this rank, ...) each; one without a gradient counts as zeros.
        ep: transport of the EP group.
    """
    slots, size = placement.slots, len(placement.slots) // placement.ranks
    shared = [slot for slot, expert in enumerate(slots) if slots.count(expert) > 1]
    mine = [slot - ep.rank * size for slot in shared if slot // size == ep.rank]
    if not shared:
        return
    for parameter in parameters:
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parts = torch.cat(ep.all_gather(grad[mine].contiguous()))
        for index in mine:
            expert = slots[ep.rank * size + index]
            grad[index] = sum(parts[i] for i, slot in enumerate(shared) if slots[slot] == expert)
        parameter.grad = grad


def replicas(loads: Tensor, slots: int) -> Tensor:
    """(E,) int64 slots of each expert: one each, the others to the largest load per replica, ties to the lowest expert.

    >>> replicas(torch.tensor([9.0, 1.0, 5.0]), 6).tolist()
    [3, 1, 2]
    """
    copies = torch.ones_like(loads, dtype=torch.int64)
    for _ in range(slots - loads.numel()):
        copies[int((loads.double() / copies).argmax())] += 1
    return copies


def _pack(share: list[float], copies: list[int], ranks: int, room: int, pull: Tensor) -> list[list[int]]:
    """Heaviest slots first; a replica avoids a rank that holds one already, if it can."""
    bins: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    queue = sorted((expert for expert, n in enumerate(copies) for _ in range(n)), key=lambda e: (-share[e], e))
    for expert in queue:
        open_bins = [r for r in range(ranks) if len(bins[r]) < room]
        fresh = [r for r in open_bins if expert not in bins[r]] or open_bins

        def cost(r: int, expert: int = expert) -> tuple[float, int]:
            return loads[r] - float(pull[expert, bins[r]].sum()), r

        best = min(fresh, key=cost)
        bins[best].append(expert)
        loads[best] += share[expert]
    return bins


def _improve(bins: list[list[int]], share: list[float], pull: Tensor, rounds: int = 4) -> None:
    """Swap slots of two ranks while that helps; at most `rounds` sweeps.

    What is to be small: the load of the fullest rank times the ranks, less what shares a rank. Of a swap only the two ranks'
    terms change.
    """
    near = pull.tolist()
    drawn = [[sum(row[other] for other in held) for held in bins] for row in near]
    loads = [sum(share[expert] for expert in held) for held in bins]
    for _ in range(rounds):
        swaps = 0
        for a, b in combinations(range(len(bins)), 2):
            rest = max((load for rank, load in enumerate(loads) if rank not in (a, b)), default=0.0)
            for i, j in product(range(len(bins[a])), range(len(bins[b]))):
                one, two = bins[a][i], bins[b][j]
                if one == two or one in bins[b] or two in bins[a]:
                    continue
                moved = share[two] - share[one]
                fuller = max(rest, loads[a] + moved, loads[b] - moved) - max(rest, loads[a], loads[b])
                joined = drawn[two][a] - drawn[one][a] + drawn[one][b] - drawn[two][b] - 2 * near[one][two]
                if len(bins) * fuller - joined < -1e-9:
                    bins[a][i], bins[b][j] = two, one
                    loads[a], loads[b] = loads[a] + moved, loads[b] - moved
                    for row, sums in zip(near, drawn):
                        sums[a] += row[two] - row[one]
                        sums[b] += row[one] - row[two]
                    swaps += 1
        if not swaps:
            return
