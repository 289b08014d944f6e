"""MoE parallel folding: two factorisations of the same ranks, one for attention and one for experts.

    attention   rank = tp + TP (cp + CP (dp + DP pp))        TP CP DP PP = world
    experts     rank = etp + ETP (ep + EP (edp + EDP pp))    ETP EP EDP PP = world

The axis on the left varies fastest: Megatron-Core's order `tp-cp-ep-dp-pp`. The pipeline is outermost in both, so both cut
the ranks into the same stages; that is the only rule that joins the two. An axis of the experts may cover any part of
TP x CP x DP, so EP may exceed DP, and ETP need not be TP (MoE Parallel Folding, arXiv 2504.14960, section 3.2).

The paper's listing has two faults that this module does not: it reshapes the experts' ranks by the attention's TP where ETP
is meant, and with DP outermost its two sets of pipeline groups agree only if TP CP = ETP EP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from moe.folding_groups import FoldingGroups, create_groups, mesh_of

ATTENTION_AXES = ("tp", "cp", "dp", "pp")
MOE_AXES = ("etp", "ep", "edp", "pp")
MEGATRON_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True, kw_only=True)
class Folding:
    """A checked pair of mappings; `dp` and `edp` follow from the others.

    >>> f = Folding(world=16, tp=2, cp=2, pp=2, ep=4)
    >>> f.dp, f.edp, f.attention_groups("dp")[0], f.moe_groups("ep")[0], f.moe_groups("pp")[0]
    (2, 2, [0, 4], [0, 1, 2, 3], [0, 8])
    """

    world: int
    """How many ranks."""
    tp: int = 1
    """Tensor parallel size of attention."""
    cp: int = 1
    """Context parallel size of attention."""
    pp: int = 1
    """Pipeline stages, of both mappings."""
    ep: int = 1
    """Expert parallel size: over how many ranks the experts of a layer are spread."""
    etp: int = 1
    """Expert tensor parallel size: over how many ranks one expert is cut."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Folding got {field.name}={value!r}; give a whole number of at least 1")
        for names in (("tp", "cp", "pp"), ("etp", "ep", "pp")):
            product = math.prod(getattr(self, name) for name in names)
            if self.world % product:
                given = " x ".join(f"{name}={getattr(self, name)}" for name in names)
                side = "attention" if names[0] == "tp" else "experts"
                near = _nearest(self)
                raise ValueError(
                    f"rule '{' x '.join(names)} divides world' is broken for {side}: {given} = {product} does not divide "
                    f"world={self.world}; nearest legal choice: {near}"
                )

    # -- what follows ----------------------------------------------------------------------------------------------

    @property
    def dp(self) -> int:
        """Data parallel size of attention."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data parallel size of experts."""
        return self.world // (self.etp * self.ep * self.pp)

    def attention_groups(self, axes: str) -> list[list[int]]:
        """Groups of ranks that differ on these axes of attention only; several are joined by dashes.

        >>> Folding(world=8, tp=2, cp=2).attention_groups("tp-cp")
        [[0, 1, 2, 3], [4, 5, 6, 7]]
        """
        return self._groups(ATTENTION_AXES, axes)

    def moe_groups(self, axes: str) -> list[list[int]]:
        """Groups of ranks that differ on these axes of the experts only; several are joined by dashes.

        >>> Folding(world=8, ep=2, etp=2).moe_groups("ep")
        [[0, 2], [1, 3], [4, 6], [5, 7]]
        """
        return self._groups(MOE_AXES, axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis.

        >>> Folding(world=8, tp=2, ep=4).coordinates(5)
        {'tp': 1, 'cp': 0, 'dp': 2, 'pp': 0, 'etp': 0, 'ep': 1, 'edp': 1}
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank is {rank}; this folding has ranks 0 to {self.world - 1}")
        found: dict[str, int] = {}
        for axes in (ATTENTION_AXES, MOE_AXES):
            rest = rank
            for axis in axes:
                rest, found[axis] = divmod(rest, getattr(self, axis))
        return found

    def groups(self, axes: str) -> list[list[int]]:
        """The groups of axes of either mapping; all of them must belong to one."""
        names = axes.split("-")
        return self._groups(ATTENTION_AXES if set(names) <= set(ATTENTION_AXES) else MOE_AXES, axes)

    def _groups(self, known: tuple[str, ...], axes: str) -> list[list[int]]:
        names = axes.split("-")
        wrong = [name for name in names if name not in known]
        if wrong or len(set(names)) != len(names):
            raise ValueError(
                f"axes is {axes!r}; give one of {', '.join(known)}, or several different ones joined by '-'"
            )
        grid = torch.arange(self.world).view([getattr(self, axis) for axis in reversed(known)])
        inside = [len(known) - 1 - i for i, axis in enumerate(known) if axis in names]
        outside = [dim for dim in range(len(known)) if dim not in inside]
        size = math.prod(getattr(self, name) for name in names)
        return grid.permute(*outside, *sorted(inside)).reshape(-1, size).tolist()

    # -- nodes -------------------------------------------------------------------------------------------------------

    def leaving_groups(self, axes: str, ranks_per_node: int = 8) -> list[list[int]]:
        """The groups whose ranks are on more than one node; rank r is on node r // ranks_per_node."""
        if ranks_per_node < 1:
            raise ValueError(f"ranks_per_node is {ranks_per_node}; give at least 1")
        return [group for group in self.groups(axes) if len({rank // ranks_per_node for rank in group}) > 1]

    def crosses_node(self, axes: str, ranks_per_node: int = 8) -> bool:
        """Whether a group of these axes leaves its node.

        >>> Folding(world=16, tp=4, ep=8).crosses_node("ep"), Folding(world=16, tp=4, cp=4).crosses_node("cp")
        (False, True)
        """
        return bool(self.leaving_groups(axes, ranks_per_node))

    def describe(self, ranks_per_node: int = 8) -> str:
        """A table: every axis, its size, its first group, and how many of its groups leave a node."""
        lines = ["axis  size  groups  leaving a node  first group"]
        for axis in (*ATTENTION_AXES, *MOE_AXES[:-1]):
            groups = self.groups(axis)
            leaving = len(self.leaving_groups(axis, ranks_per_node))
            shown = groups[0] if len(groups[0]) <= 8 else [*groups[0][:7], "...", groups[0][-1]]
            first = " ".join(map(str, shown))
            lines.append(f"{axis:<4}  {getattr(self, axis):>4}  {len(groups):>6}  {leaving:>14}  {first}")
        return "\n".join(lines)

    # -- other libraries ---------------------------------------------------------------------------------------------

    def to_megatron(self) -> dict[str, Any]:
        """Arguments of megatron.core.parallel_state.initialize_model_parallel that make the same groups."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "order": MEGATRON_ORDER,
        }

    def attention_mesh(self, device_type: str = "cpu", *, groups: FoldingGroups | None = None) -> DeviceMesh:
        """The attention mapping as a DeviceMesh with axes pp, dp, cp, tp.

        Args:
            device_type: "cpu" or "cuda".
            groups: of `create_groups`, which the mesh then shares; None: the mesh makes its own, over the whole job (collective).
        """
        return self._mesh(ATTENTION_AXES, device_type, groups)

    def moe_mesh(self, device_type: str = "cpu", *, groups: FoldingGroups | None = None) -> DeviceMesh:
        """The experts' mapping as a DeviceMesh with axes pp, edp, ep, etp; see `attention_mesh`."""
        return self._mesh(MOE_AXES, device_type, groups)

    def create_groups(self, *, group: Any = None, backend: str | None = None) -> FoldingGroups:
        """Collective over `group`, by default the whole job: this rank's torch.distributed groups; see `moe.folding_groups`."""
        return create_groups(self, group=group, backend=backend)

    def _mesh(self, known: tuple[str, ...], device_type: str, groups: FoldingGroups | None) -> DeviceMesh:
        return mesh_of(self, tuple(reversed(known)), device_type, groups)

    # -- all legal ones ----------------------------------------------------------------------------------------------

    @classmethod
    def enumerate(
        cls,
        *,
        world: int,
        num_experts: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        layers: int | None = None,
        sequence: int | None = None,
        expert_ffn: int | None = None,
        **limits: int | Iterable[int],
    ) -> Iterator[Folding]:
        """All legal foldings of a world, smallest sizes first.

        Args:
            world: how many ranks.
            num_experts, heads, kv_heads, layers, sequence, expert_ffn: the model's sizes; see `check_model`. None: no rule.
            limits: for tp, cp, pp, ep, etp the one size allowed, or several.

        >>> [(f.tp, f.ep) for f in Folding.enumerate(world=4, num_experts=2, heads=2, cp=1, pp=1, etp=1)]
        [(1, 1), (1, 2), (2, 1), (2, 2)]
        """
        unknown = set(limits) - {"tp", "cp", "pp", "ep", "etp"}
        if unknown:
            raise ValueError(f"Folding.enumerate got limits on {sorted(unknown)}; give limits on tp, cp, pp, ep, etp")
        allowed = {name: {value} if isinstance(value, int) else set(value) for name, value in limits.items()}
        model = {
            "num_experts": num_experts,
            "heads": heads,
            "kv_heads": kv_heads,
            "layers": layers,
            "sequence": sequence,
            "expert_ffn": expert_ffn,
        }
        for folding in _all(world):
            if all(getattr(folding, name) in values for name, values in allowed.items()):
                broken = next(_broken_rules(folding, **model), None)
                if broken is None:
                    yield folding

    def check_model(self, **sizes: int | None) -> None:
        """ValueError where a model does not fit: num_experts, heads, kv_heads, layers, sequence, expert_ffn.

        tp divides heads (and divides, or is a multiple of, kv_heads), pp divides layers, ep divides num_experts, etp divides
        expert_ffn, and tp x cp divides sequence.
        """
        known = ("num_experts", "heads", "kv_heads", "layers", "sequence", "expert_ffn")
        if set(sizes) - set(known):
            raise ValueError(f"check_model got {sorted(set(sizes) - set(known))}; give {', '.join(known)}")
        given = {name: sizes.get(name) for name in known}
        broken = list(_broken_rules(self, **given))
        if broken:
            near = _nearest(self, **given)
            raise ValueError(f"{'; '.join(broken)}; nearest legal choice: {near}")


def _broken_rules(
    f: Folding,
    num_experts: int | None,
    heads: int | None,
    kv_heads: int | None,
    layers: int | None,
    sequence: int | None,
    expert_ffn: int | None,
) -> Iterator[str]:
    for name, size, what, total in (
        ("ep", f.ep, "num_experts", num_experts),
        ("tp", f.tp, "heads", heads),
        ("pp", f.pp, "layers", layers),
        ("etp", f.etp, "expert_ffn", expert_ffn),
        ("tp x cp", f.tp * f.cp, "sequence", sequence),
    ):
        if total is not None and total % size:
            yield f"rule '{name} divides {what}' is broken: {name}={size}, {what}={total}"
    if kv_heads is not None and kv_heads % f.tp and f.tp % kv_heads:
        yield f"rule 'tp divides kv_heads, or kv_heads divides tp' is broken: tp={f.tp}, kv_heads={kv_heads}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _all(world: int) -> Iterator[Folding]:
    for pp in _divisors(world):
        stage = world // pp
        pairs = [(a, b) for a in _divisors(stage) for b in _divisors(stage // a)]
        for (tp, cp), (etp, ep) in itertools.product(pairs, pairs):
            yield Folding(world=world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)


def _nearest(wanted: Folding, **model: int | None) -> Folding | None:
    """The legal folding that changes the fewest sizes, and those by the least factor."""
    names = ("tp", "cp", "pp", "ep", "etp")

    def distance(f: Folding) -> tuple[float, float]:
        ratios = [abs(math.log(getattr(f, name) / getattr(wanted, name))) for name in names]
        return sum(r > 0 for r in ratios), sum(ratios)

    return min(Folding.enumerate(world=wanted.world, **model), key=distance, default=None)
