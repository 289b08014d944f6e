"""The router: from hidden states to expert ids, weights and the losses that balance them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe import balance, capacity, choice
from tokenring.transport import connect

COEFFICIENTS = ("bias_rate", "aux_loss", "sequence_loss", "global_loss", "z_loss")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """What a router does; every field is checked."""

    num_experts: int
    """E."""
    topk: int
    """k: experts for each token, 1 to E."""
    score: str = "softmax"
    """"softmax", "sigmoid" or "sqrtsoftplus"."""
    normalize: bool = True
    """Whether a token's k weights are divided by their sum (k > 1); with softmax that is a softmax over the k logits."""
    scale: float = 1.0
    """Factor on all weights."""
    num_groups: int = 1
    """Experts form this many groups of neighbours; a token uses experts of its best `group_topk` groups only."""
    group_topk: int = 1
    """Groups that a token may use."""
    expert_bias: bool = False
    """Whether a bias on the scores, moved by `update_bias` towards even loads, takes part in the choice."""
    bias_rate: float = 1e-3
    """How far `update_bias` moves each bias."""
    aux_loss: float = 0.0
    """Coefficient of the loss over the micro-batch."""
    sequence_loss: float = 0.0
    """Coefficient of the loss over each sequence."""
    global_loss: float = 0.0
    """Coefficient of the loss with counts of all micro-batches since `reset_global_counts`."""
    z_loss: float = 0.0
    """Coefficient of the loss on the size of the logits."""
    capacity_factor: float | None = None
    """CF: each expert takes ceil(CF n k / E) of n tokens; None: nothing is dropped."""
    drop_over: str = "rank"
    """Which n tokens: "rank" (sub-sequence dropping) or "sequence" (full-sequence dropping)."""
    drop_by: str = "probability"
    """Which stay: those of highest weight ("probability") or the first ("position")."""
    jitter: float = 0.0
    """In training, hidden states that enter the router are multiplied by a uniform draw from 1 - jitter to 1 + jitter."""
    force: str | None = None
    """For benchmarks: "random" or "even" choices that ignore the data; None: off."""
    dtype: torch.dtype = torch.float32
    """Of logits, scores and weights; float64 inputs use float64."""

    def __post_init__(self) -> None:
        rules = (
            (self.num_experts >= 1, "num_experts", "at least 1"),
            (1 <= self.topk <= self.num_experts, "topk", f"1 to num_experts={self.num_experts}"),
            (self.score in choice.SCORES, "score", f"one of {', '.join(choice.SCORES)}"),
            (
                self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
                "num_groups",
                "a divisor of num_experts",
            ),
            (1 <= self.group_topk <= self.num_groups, "group_topk", f"1 to num_groups={self.num_groups}"),
            (self.drop_over in ("rank", "sequence"), "drop_over", "rank or sequence"),
            (self.drop_by in capacity.DROPS, "drop_by", "probability or position"),
            (
                self.capacity_factor is None or 0 < self.capacity_factor < math.inf,
                "capacity_factor",
                "a number above 0, or None",
            ),
            (0 < self.scale < math.inf, "scale", "a number above 0"),
            *((0 <= getattr(self, name) < math.inf, name, "a number of at least 0") for name in COEFFICIENTS),
            (0 <= self.jitter < 1, "jitter", "0 up to, not with, 1"),
            (self.force in (None, "random", "even"), "force", "None, random or even"),
            (self.dtype.is_floating_point, "dtype", "a floating-point dtype"),
        )
        for holds, name, allowed in rules:
            if not holds:
                raise ValueError(f"router got {name}={getattr(self, name)!r}; give {allowed}")
        reachable = self.group_topk * self.num_experts // self.num_groups
        if self.topk > reachable:
            raise ValueError(
                f"router got topk={self.topk}, but group_topk={self.group_topk} of num_groups={self.num_groups} hold "
                f"{reachable} experts; raise group_topk or lower topk"
            )


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens."""

    expert_ids: Tensor
    """(T, k) int64; -1 where dropped or padding."""
    expert_weights: Tensor
    """(T, k) in the router's dtype, differentiable; 0 where the id is -1."""
    losses: dict[str, Tensor]
    """This rank's shares, coefficients included; they add up over the group."""
    counts: Tensor
    """(E,) int64: choices of this rank's tokens before dropping."""
    dropped: int = 0
    """Choices that dropping took away."""

    @property
    def loss(self) -> Tensor:
        """Sum of the losses; 0 without any."""
        return sum(self.losses.values(), self.expert_weights.new_zeros(()))

    def attached_weights(self) -> Tensor:
        """The weights; their backward differentiates the losses too, as if added to the model's loss with factor 1."""
        return balance.AttachLoss.apply(self.expert_weights, self.loss) if self.losses else self.expert_weights


@dataclass
class _Groups:
    group: Any = None
    global_group: Any = None


class Router(nn.Module):
    """Top-k router with a (E, H) weight.

    Args:
        hidden_size: H.
        num_experts, topk: E and k.
        group: ranks that hold parts of the same micro-batch (tensor and context parallel); losses and full-sequence dropping
            span them. None: this rank alone. Every rank of it calls the router together.
        global_group: ranks whose counts the global loss and `update_bias` add up; None: `group`.
        options: fields of `RouterConfig`.

    >>> routing = Router(16, num_experts=4, topk=2, aux_loss=0.01)(torch.randn(5, 16))
    >>> routing.expert_ids.shape, list(routing.losses)
    (torch.Size([5, 2]), ['aux'])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        topk: int,
        *,
        group: Any = None,
        global_group: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = RouterConfig(num_experts=num_experts, topk=topk, **options)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        self._groups = _Groups(group, group if global_group is None else global_group)
        self.register_buffer("expert_bias", torch.zeros(num_experts) if self.config.expert_bias else None)
        self.register_buffer("counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.register_buffer("global_counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(
        self,
        hidden: Tensor,
        *,
        sequences: Tensor | None = None,
        positions: Tensor | None = None,
        padding: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """Route (T, H) tokens.

        Args:
            hidden: (T, H); T may be 0 and may differ between ranks.
            sequences: (T,) int64, the sequence of each token, numbered alike on every rank; None: all are one sequence.
            positions: (T,) int64, place in the sequence, for full-sequence dropping; None: ranks hold consecutive parts.
            padding: (T,) bool, True where a token is padding: routed nowhere, in no loss, using no capacity.
            generator: for jitter and forced choices.
        """
        self._check(hidden, sequences, positions, padding)
        cfg, live = self.config, slice(None) if padding is None else ~padding
        logits = self.logits(hidden, generator)
        scores = choice.score(logits, cfg.score)
        ids, weights = self._choose(scores, generator)
        if padding is not None:
            ids = ids.masked_fill(padding.unsqueeze(1), -1)
        sequences = torch.zeros_like(ids[:, 0]) if sequences is None else sequences.to(ids)
        counts = balance.count_choices(ids, cfg.num_experts)
        losses = self._losses(logits[live], scores[live], ids[live], sequences[live], counts)
        chosen = int((ids >= 0).sum()) if cfg.capacity_factor is not None else 0
        if cfg.capacity_factor is not None:
            ids = ids.masked_fill(~self._kept(ids, weights, sequences, positions), -1)
        if self.training and cfg.expert_bias:
            self.counts += counts
        dropped = chosen - int((ids >= 0).sum()) if cfg.capacity_factor is not None else 0
        return Routing(ids, weights.masked_fill(ids < 0, 0.0), losses, counts, dropped)

    def logits(self, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(T, E) logits in the router's dtype."""
        dtype = torch.promote_types(hidden.dtype, self.config.dtype)
        x = hidden.to(dtype)
        if self.training and self.config.jitter:
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            x = x * (1 + self.config.jitter * (2 * noise - 1))
        return nn.functional.linear(x, self.weight.to(dtype))

    def update_bias(self) -> None:
        """Collective over the global group: move each bias up where its expert was chosen less than the mean, down where more.

        Call it once a step; the counts start anew.
        """
        if self.expert_bias is None:
            raise ValueError("update_bias needs a router with expert_bias=True")
        counts = balance.sum_over(connect(self._groups.global_group), self.counts).to(self.expert_bias.dtype)
        self.expert_bias += self.config.bias_rate * torch.sign(counts.mean() - counts)
        self.counts.zero_()

    def reset_global_counts(self) -> None:
        """Forget the counts of earlier micro-batches (the global loss)."""
        self.global_counts.zero_()

    def _choose(self, scores: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        cfg = self.config
        if cfg.force is not None:
            ids = choice.forced(scores.shape[0], cfg.num_experts, cfg.topk, cfg.force, generator, scores.device)
            weights = scores.gather(1, ids)
            if cfg.normalize and cfg.topk > 1:
                weights = balance.normalised(weights)
            return ids, weights * cfg.scale
        return choice.choose(
            scores,
            cfg.topk,
            bias=self.expert_bias,
            num_groups=cfg.num_groups,
            group_topk=cfg.group_topk,
            normalize=cfg.normalize,
            scale=cfg.scale,
        )

    def _losses(
        self, logits: Tensor, scores: Tensor, ids: Tensor, sequences: Tensor, counts: Tensor
    ) -> dict[str, Tensor]:
        cfg, losses = self.config, {}
        if not (cfg.aux_loss or cfg.sequence_loss or cfg.global_loss or cfg.z_loss):
            return losses
        transport = connect(self._groups.group)
        shares = balance.normalised(scores)
        both = balance.sum_over(transport, torch.cat([counts, counts.new_tensor([ids.shape[0]])]))
        tokens, everyone = int(both[-1]), both[:-1]
        if cfg.aux_loss:
            losses["aux"] = cfg.aux_loss * balance.aux_loss(shares, everyone, tokens)
        if cfg.sequence_loss:
            losses["sequence"] = cfg.sequence_loss * balance.sequence_loss(shares, ids, sequences, transport)
        if cfg.global_loss:
            added = balance.sum_over(connect(self._groups.global_group), counts)
            seen = self.global_counts + added
            if self.training:
                self.global_counts += added
            losses["global"] = cfg.global_loss * balance.aux_loss(shares, seen, tokens)
        if cfg.z_loss:
            losses["z"] = cfg.z_loss * balance.z_loss(logits, tokens)
        return losses

    def _kept(self, ids: Tensor, weights: Tensor, sequences: Tensor, positions: Tensor | None) -> Tensor:
        cfg = self.config
        if cfg.drop_over == "rank":
            return capacity.keep_local(ids, weights, cfg.capacity_factor, cfg.num_experts, cfg.drop_by)
        transport = connect(self._groups.group)
        return capacity.keep_sequence(
            ids, weights, cfg.capacity_factor, cfg.num_experts, cfg.drop_by, transport, positions, sequences
        )

    def _check(
        self, hidden: Tensor, sequences: Tensor | None, positions: Tensor | None, padding: Tensor | None
    ) -> None:
        if hidden.dim() != 2 or hidden.shape[1] != self.weight.shape[1]:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}; give (T, {self.weight.shape[1]})")
        for name, given in (("sequences", sequences), ("positions", positions), ("padding", padding)):
            if given is not None and given.shape != hidden.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}; give ({hidden.shape[0]},), one for each token"
                )
        if padding is not None and padding.dtype != torch.bool:
            raise ValueError(f"padding is {padding.dtype}; give a bool tensor")
