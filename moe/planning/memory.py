"""Bytes of one rank: weights, gradients, optimizer states, activations. The fullest stage counts.

    parameters of a rank   P_e = routed / (EP ETP PP)            P_d = the others / TP / PP, the embedding on one stage
    optimizer sharded      2 P + 4 P + 12 P / DP                 bf16 weights, float32 gradients, float32 weights and moments
    parameters too         18 P / DP + 8 P of a layer            two layers' weights and gradients, in bf16, are whole at a time

DP is EDP for routed experts and DP x CP for the others. Where parameters are sharded but made whole first, 2 P must fit too.

Activations are those a backward pass needs when nothing is computed again, with memory-efficient attention; a stage holds as
many chunks as interleaved one-forward-one-backward starts before its first backward (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.planning.job import chunks, micro_batches
from moe.planning.layers import ROW_BYTES, Layers

STATES = {"weights": 2, "gradients": 4, "optimizer": 12}


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    """Of the layer that is being computed: what recomputation restores, logits, gathered layers."""
    start: float = 0.0
    """Before the first step: weights that are made whole and sharded only then."""

    @property
    def total(self) -> float:
        """The most at any time."""
        return max(self.start, self.weights + self.gradients + self.optimizer + self.activations + self.working)


def rank_parameters(layers: Layers) -> tuple[float, float]:
    """(routed, other) parameters of the rank that holds most."""
    m, f = layers.model, layers.folding
    per_stage = stage_layers(layers)
    routed_layers = min(per_stage, m.moe_layers)
    routed = routed_layers * m.num_experts * m.expert_parameters / (f.ep * f.etp)
    ends = m.embedding_parameters / (1 if f.pp == 1 or m.tied else 2)
    return routed, (m.dense_parameters / m.layers * per_stage + ends) / f.tp


def memory(layers: Layers, recompute: str, again: int) -> Memory:
    """Bytes of a rank when `again` layers of each stage compute their "moe" or "full" part again."""
    m, f, job = layers.model, layers.folding, layers.job
    routed, other = rank_parameters(layers)
    sharded = job.sharding == "parameters"
    held, working = dict.fromkeys(STATES, 0.0), 0.0
    for size, shards in ((routed, f.edp), (other, f.dp * f.cp)):
        for name, width in STATES.items():
            held[name] += width * size / (shards if sharded or name == "optimizer" else 1)
        if sharded:
            working += 8 * size / stage_layers(layers)
    start = 2 * (routed + other) if sharded and not job.sharded_init else 0.0
    if job.precision == "fp8":
        # the casts of the weights, also transposed, live beside them
        held["weights"] += 2 * (routed + other - m.embedding_parameters / f.tp / (1 if f.pp == 1 else 2))
    share = again / stage_layers(layers)
    kept = share * layer_bytes(layers, recompute) + (1 - share) * layer_bytes(layers, "none")
    if again:
        working += layer_bytes(layers, "none")
    if f.pp == 1:
        working += 10 * layers.shared_tokens * m.vocab / f.tp
    return Memory(**held, activations=kept * layers_in_flight(layers), working=working, start=start)


def stage_layers(layers: Layers) -> int:
    """Layers of the longest stage."""
    return -(-layers.model.layers // layers.folding.pp)


def layers_in_flight(layers: Layers) -> float:
    """Layers whose activations the first stage holds at most.

    Of PP stages with v chunks each, a first stage starts 2 (PP - 1) + (v - 1) PP + 1 chunks before a backward; PP if v = 1.
    """
    f, v = layers.folding, chunks(layers.job, layers.folding, layers.model)
    started = f.pp if v == 1 else 2 * (f.pp - 1) + (v - 1) * f.pp + 1
    started = min(started, v * micro_batches(layers.job, f))
    return started * stage_layers(layers) / v


def layer_bytes(layers: Layers, recompute: str) -> float:
    """Bytes that one layer's backward pass needs of its forward pass; the mean of dense and routed layers.

    `cast` values are kept in the job's precision, being inputs of linear maps; the others are kept in bf16.
    """
    m, f = layers.model, layers.folding
    if recompute == "full":
        return ROW_BYTES * layers.tokens * m.hidden
    q, kv = m.heads * m.head_dim, m.kv_heads * (m.head_dim + m.v_head_dim)
    plain, cast = 3 * m.hidden + q + kv + m.heads * m.v_head_dim, m.hidden + m.q_rank + m.kv_rank
    if recompute == "none":
        arrived = m.topk * layers.job.imbalance
        routed, dense = m.moe_layers / m.layers, m.dense_layers / m.layers
        ffn = routed * (arrived * m.expert_ffn + m.shared_ffn) + dense * m.dense_ffn
        plain += 2 * ffn + routed * m.topk * m.hidden
        cast += ffn + routed * arrived * m.hidden * f.etp
    return layers.tokens * (ROW_BYTES * plain + (2 if layers.job.precision == "bf16" else 1) * cast)
