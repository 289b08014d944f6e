"""Seconds of one layer and of the output head, forward and backward of one micro-batch on one rank, by part.

T = B S / (TP CP) tokens are a rank's own; attention's projections see B S / CP of them and 1 / TP of the heads. Routed rows are
k T at their source and, with all ranks alike, k T ETP at an experts' rank, whose experts are cut in ETP.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from moe.folding import Folding
from moe.planning.costs import Costs
from moe.planning.hardware import Hardware
from moe.planning.job import Job, chunks
from moe.planning.model import ModelConfig
from moe.planning.places import Rows, Span, rows, span

EXCHANGE = "expert exchange"
ROW_BYTES = 2
"""Hidden states travel and lie in bf16."""


class Parts(defaultdict):
    """Seconds by part, (forward, backward)."""

    def __init__(self) -> None:
        super().__init__(lambda: (0.0, 0.0))

    def put(self, part: str, forward: float, backward: float) -> None:
        """Add seconds to a part."""
        before = self[part]
        self[part] = (before[0] + forward, before[1] + backward)

    def total(self, direction: int | None = None) -> float:
        """Seconds of all parts; direction 0 is forward, 1 backward, None both."""
        return sum(sum(t) if direction is None else t[direction] for t in self.values())


@dataclass(frozen=True)
class Layers:
    """The layers of a model under a folding."""

    model: ModelConfig
    folding: Folding
    job: Job
    hardware: Hardware

    def __post_init__(self) -> None:
        chunks(self.job, self.folding, self.model)
        # refuses mappings and dispatchers that do not go together
        self.rows  # noqa: B018

    @cached_property
    def costs(self) -> Costs:
        """Prices of operations."""
        return Costs(self.hardware)

    def span(self, axes: str) -> Span:
        """How groups of these axes lie on nodes."""
        return span(self.folding, axes, self.job.mapping, self.hardware.ranks_per_node)

    @cached_property
    def rows(self) -> Rows:
        """Rows that a rank sends to others' experts."""
        m, per_node = self.model, self.hardware.ranks_per_node
        return rows(self.folding, self.job.mapping, per_node, self.job.dispatcher, m.num_experts, m.topk)

    @property
    def exchange_leaves_node(self) -> bool:
        """Whether experts' rows use the links between nodes."""
        return self.rows.between > 0

    @property
    def shared_tokens(self) -> float:
        """Tokens that the ranks of a TP group compute together."""
        return self.job.micro_batch * self.model.sequence / self.folding.cp

    @property
    def tokens(self) -> float:
        """Tokens of one rank."""
        return self.shared_tokens / self.folding.tp

    # -- attention -----------------------------------------------------------------------------------------------------

    def attention(self) -> Parts:
        """Norm, projections, attention, residual; gathers and scatters over TP, the ring over CP."""
        m, f, costs, parts = self.model, self.folding, self.costs, Parts()
        for inputs, outputs, cut in m.attention_gemms:
            k, n = (inputs / f.tp if cut == "in" else inputs), (outputs / f.tp if cut == "out" else outputs)
            parts.put("attention projections", *costs.linear(self.shared_tokens, n, k, precision=self.job.precision))
        dims = m.heads * (m.head_dim + m.v_head_dim) / f.tp
        core = costs.attention(self.job.micro_batch, m.sequence, dims, ranks=f.cp)
        parts.put("attention", *core)
        parts.put("context exchange", *self._context(core))
        self._tensor(parts)
        wide = m.heads * m.head_dim + m.kv_heads * m.head_dim
        self._elementwise(parts, ROW_BYTES * self.tokens * (5 * m.hidden + 2 * wide))
        return parts

    def _context(self, core: tuple[float, float]) -> tuple[float, float]:
        """What keys and values that travel round the ring add: each of CP - 1 hops hides behind one piece of attention."""
        m, f = self.model, self.folding
        if f.cp == 1:
            return 0.0, 0.0
        heads = max(1, m.kv_heads / f.tp)
        size = ROW_BYTES * self.shared_tokens * heads * (m.head_dim + m.v_head_dim)
        crosses = self.span("cp").nodes > 1
        hop = self.costs.exchange(0 if crosses else size, size if crosses else 0)
        back = self.costs.exchange(0 if crosses else 2 * size, 2 * size if crosses else 0)
        return tuple((f.cp - 1) * max(0.0, t - c / f.cp) for t, c in zip((hop, back), core))

    def _tensor(self, parts: Parts) -> None:
        """A gather before and a scatter after, each way; the gather for weight gradients hides behind a product."""
        size = ROW_BYTES * self.shared_tokens * self.model.hidden
        once = self.costs.ring(size, self.span("tp"))
        parts.put("tensor parallel", 2 * once, 2 * once)

    def _elementwise(self, parts: Parts, size: float) -> None:
        parts.put("element-wise", self.costs.memory(size), self.costs.memory(2 * size))

    # -- MLPs ----------------------------------------------------------------------------------------------------------

    def mlp(self, ffn: int) -> Parts:
        """A gated MLP cut by TP, with its gather and scatter."""
        parts, n = Parts(), ffn / self.folding.tp
        for k, wide in ((self.model.hidden, 2 * n), (n, self.model.hidden)):
            cost = self.costs.linear(self.shared_tokens, wide, k, precision=self.job.precision)
            parts.put("dense MLP", *cost)
        self._elementwise(parts, ROW_BYTES * self.shared_tokens * 3 * n)
        self._tensor(parts)
        return parts

    def experts(self) -> Parts:
        """Router, exchange, experts, exchange back, shared experts."""
        m, f, hw, parts = self.model, self.folding, self.hardware, Parts()
        local = m.num_experts // f.ep
        routed = m.topk * self.tokens
        arrived = routed * f.etp * self.job.imbalance
        n = m.expert_ffn / f.etp
        for k, wide in ((m.hidden, 2 * n), (n, m.hidden)):
            cost = self.costs.linear(arrived / local, wide, k, count=local, precision=self.job.precision)
            parts.put("experts", *cost)
        self._elementwise(parts, ROW_BYTES * (arrived * 3 * n + self.tokens * 5 * m.hidden))
        sorted_rows = routed + (arrived if local > 1 else 0)
        permute = self.costs.memory(hw.permute_passes * sorted_rows * m.hidden * ROW_BYTES)
        parts.put("permute", permute / 3, permute * 2 / 3)
        self._exchange(parts)
        parts.put("router and launches", hw.moe_layer_us * 1e-6 / 3, hw.moe_layer_us * 2e-6 / 3)
        if m.shared_ffn:
            for part, (forward, backward) in self.mlp(m.shared_ffn).items():
                parts.put(part, forward, backward)
        return parts

    def _exchange(self, parts: Parts) -> None:
        """Dispatch and combine, forward and backward: each the same rows."""
        job, m, r = self.job, self.model, self.rows
        size = ROW_BYTES * self.tokens * m.hidden * job.imbalance
        staged = job.dispatcher == "hierarchical"
        over_ep = 2 * self.costs.exchange(size * r.inside, size * r.between, staged=staged)
        over_etp = 2 * self.costs.exchange(size * r.etp_inside, size * r.etp_between)
        parts.put(EXCHANGE, over_ep, over_ep)
        parts.put("expert tensor exchange", over_etp, over_etp)

    # -- whole layers --------------------------------------------------------------------------------------------------

    def layer(self, *, dense: bool, recompute: str, share: float) -> Parts:
        """A whole layer; what is computed again, in a share of the layers, is a part of its own."""
        attention = self.attention()
        inner = self.mlp(self.model.dense_ffn) if dense else self.experts()
        parts = Parts()
        for half in (attention, inner):
            for part, (forward, backward) in half.items():
                parts.put(part, forward, backward)
        hidden = self._overlap(parts)
        if share:
            again = inner.total(0) - hidden + (attention.total(0) if recompute == "full" else 0)
            parts.put("recomputation", 0.0, share * again)
        return parts

    def _overlap(self, parts: Parts) -> float:
        """Lay exchanges beside another micro-batch's computing; no more hides than there is. Seconds hidden forward."""
        exchange = parts[EXCHANGE]
        rest = [parts.total(side) - exchange[side] for side in (0, 1)]
        hidden = [min(self.job.exchange_overlap * t, other) for t, other in zip(exchange, rest)]
        parts.put(EXCHANGE, -hidden[0], -hidden[1])
        return hidden[0]

    def head(self) -> Parts:
        """Output projection, its gather, and the cross entropy in float32."""
        m, f, parts = self.model, self.folding, Parts()
        forward, backward = self.costs.linear(self.shared_tokens, m.vocab / f.tp, m.hidden)
        logits = self.costs.memory(4 * self.shared_tokens * m.vocab / f.tp)
        once = self.costs.ring(ROW_BYTES * self.shared_tokens * m.hidden, self.span("tp"))
        parts.put("output head", forward + 4 * logits + once, backward + 3 * logits + once)
        return parts
