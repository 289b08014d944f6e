"""Sizes of a mixture-of-experts transformer: parameters and the FLOPs that utilisation counts.

A layer is attention, then either routed experts (with shared experts beside them) or a dense MLP. Attention is multi-head or
grouped-query; with `kv_rank` it is multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). MLPs are gated:
three matrices of hidden x ffn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model at one sequence length.

    >>> m = ModelConfig(layers=56, hidden=6144, heads=48, kv_heads=8, num_experts=8, topk=2, expert_ffn=16384, vocab=32768)
    >>> round(m.parameters / 1e9, 1), round(m.active_parameters / 1e9, 1)
    (140.6, 39.2)
    """

    layers: int
    """Transformer layers, dense ones included."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads."""
    kv_heads: int = 0
    """Key and value heads; 0: as many as query heads."""
    head_dim: int = 0
    """Of queries and keys; 0: hidden / heads."""
    v_head_dim: int = 0
    """Of values; 0: head_dim."""
    q_rank: int = 0
    """Rank of latent queries; 0: queries are projected directly."""
    kv_rank: int = 0
    """Rank of latent keys and values; 0: no latent attention."""
    rope_dim: int = 0
    """With latent attention: the part of head_dim that carries the rotary position and is shared by the heads."""
    num_experts: int
    """Routed experts of a layer."""
    topk: int
    """Experts a token goes to."""
    expert_ffn: int
    """Inner width of one routed expert."""
    shared_ffn: int = 0
    """Inner width of all shared experts together."""
    dense_layers: int = 0
    """Layers with a dense MLP instead of experts."""
    dense_ffn: int = 0
    """Inner width of that MLP."""
    vocab: int
    """Rows of the embedding."""
    sequence: int = 4096
    """Tokens of one sequence."""
    tied: bool = False
    """Whether embedding and output head are one matrix."""

    def __post_init__(self) -> None:
        zero = {f.name for f in fields(self) if f.default == 0 and f.name != "tied"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "tied":
                continue
            least = 0 if field.name in zero else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"ModelConfig got {field.name}={value!r}; give a whole number of at least {least}")
        defaults = {"kv_heads": self.heads, "head_dim": max(1, self.hidden // self.heads)}
        for name, value in defaults.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if not self.v_head_dim:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        self._check()

    def _check(self) -> None:
        latent = self.kv_rank > 0
        rules = (
            (self.heads % self.kv_heads == 0, f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}"),
            (self.topk <= self.num_experts, f"topk={self.topk} is more than num_experts={self.num_experts}"),
            (self.dense_layers <= self.layers, f"dense_layers={self.dense_layers} is more than layers={self.layers}"),
            (not self.dense_layers or self.dense_ffn > 0, f"dense_layers={self.dense_layers} needs dense_ffn"),
            (
                latent or not (self.q_rank or self.rope_dim),
                "q_rank and rope_dim belong to latent attention: give kv_rank",
            ),
            (self.rope_dim < self.head_dim, f"rope_dim={self.rope_dim} leaves nothing of head_dim={self.head_dim}"),
        )
        for holds, words in rules:
            if not holds:
                raise ValueError(f"ModelConfig: {words}")

    def at(self, sequence: int) -> ModelConfig:
        """The same model at another sequence length."""
        return replace(self, sequence=sequence)

    @cached_property
    def attention_gemms(self) -> tuple[tuple[int, int, str], ...]:
        """(inputs, outputs, side that tensor parallelism cuts: "in", "out" or "none") of the projections."""
        q, v = self.heads * self.head_dim, self.heads * self.v_head_dim
        last = (v, self.hidden, "in")
        if not self.kv_rank:
            kv = self.kv_heads * (self.head_dim + self.v_head_dim)
            return (self.hidden, q + kv, "out"), last
        queries: tuple[tuple[int, int, str], ...] = ((self.hidden, q, "out"),)
        if self.q_rank:
            queries = ((self.hidden, self.q_rank, "none"), (self.q_rank, q, "out"))
        up = self.heads * (self.head_dim - self.rope_dim + self.v_head_dim)
        keys = ((self.hidden, self.kv_rank + self.rope_dim, "none"), (self.kv_rank, up, "out"))
        return (*queries, *keys, last)

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers

    @property
    def attention_parameters(self) -> int:
        """Of one layer's projections."""
        return sum(inputs * outputs for inputs, outputs, _ in self.attention_gemms)

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert."""
        return 3 * self.hidden * self.expert_ffn

    @property
    def embedding_parameters(self) -> int:
        """Embedding and output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def dense_parameters(self) -> int:
        """All that is not a routed expert, over all layers, without the embedding: attention, shared experts, MLPs, routers."""
        inner = self.moe_layers * (3 * self.shared_ffn + self.num_experts) + self.dense_layers * 3 * self.dense_ffn
        return self.layers * self.attention_parameters + inner * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; norms are left out."""
        routed = self.moe_layers * self.num_experts * self.expert_parameters
        return routed + self.dense_parameters + self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Those that one token meets, the embedding counted as in `parameters`."""
        idle = self.moe_layers * (self.num_experts - self.topk) * self.expert_parameters
        return self.parameters - idle

    def flops_per_token(self, *, causal: bool = True) -> float:
        """Forward and backward, as utilisation counts them: 6 a parameter, and attention's 6 S (d + d_v) a head.

        Args:
            causal: count only the half of attention that a causal mask leaves, as Megatron-LM does since March 2025; False
                counts all of it, as it did before.
        """
        matrices = (
            self.moe_layers * self.topk * self.expert_parameters + self.dense_parameters + self.vocab * self.hidden
        )
        attention = self.layers * self.heads * self.sequence * (self.head_dim + self.v_head_dim)
        return 6 * matrices + 6 * attention * (0.5 if causal else 1.0)


def _mixtral(**sizes: int) -> ModelConfig:
    return ModelConfig(layers=56, hidden=6144, heads=48, kv_heads=8, vocab=32768, **sizes)


MODELS = {
    "mixtral-8x22b": _mixtral(num_experts=8, topk=2, expert_ffn=16384),
    "mixtral-8x22b-g8t8": _mixtral(num_experts=64, topk=8, expert_ffn=2048),
    "llama3-8x70b": ModelConfig(
        layers=80, hidden=8192, heads=64, kv_heads=8, num_experts=8, topk=2, expert_ffn=28672, vocab=128256
    ),
    "qwen2-57b-a14b": ModelConfig(
        layers=28,
        hidden=3584,
        heads=28,
        kv_heads=4,
        num_experts=64,
        topk=8,
        expert_ffn=2560,
        shared_ffn=20480,
        vocab=151936,
    ),
    "mixtral-8x7b": ModelConfig(
        layers=32, hidden=4096, heads=32, kv_heads=8, num_experts=8, topk=2, expert_ffn=14336, vocab=32000
    ),
    "qwen3-30b-a3b": ModelConfig(
        layers=48,
        hidden=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        num_experts=128,
        topk=8,
        expert_ffn=768,
        vocab=151936,
    ),
    "qwen3-235b-a22b": ModelConfig(
        layers=94,
        hidden=4096,
        heads=64,
        kv_heads=4,
        head_dim=128,
        num_experts=128,
        topk=8,
        expert_ffn=1536,
        vocab=151936,
    ),
    "deepseek-v3": ModelConfig(
        layers=61,
        hidden=7168,
        heads=128,
        head_dim=192,
        v_head_dim=128,
        q_rank=1536,
        kv_rank=512,
        rope_dim=64,
        num_experts=256,
        topk=8,
        expert_ffn=2048,
        shared_ffn=2048,
        dense_layers=3,
        dense_ffn=18432,
        vocab=129280,
    ),
}
"""Public model cards' sizes, at 4,096 tokens; `.at(length)` gives another length."""


def model(name: str) -> ModelConfig:
    """A model of `MODELS` by name.

    >>> round(model("deepseek-v3").parameters / 1e9), round(model("qwen2-57b-a14b").active_parameters / 1e9, 1)
    (671, 14.2)
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; there are {', '.join(MODELS)}, or give a ModelConfig")
    return MODELS[name]
