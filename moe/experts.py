"""Experts: feed-forward networks over groups of rows.

    swiglu   y = (silu(x W_gate) * (x W_up)) W_down
    geglu    y = (gelu(x W_gate) * (x W_up)) W_down
    gelu     y = gelu(x W_up) W_down
    silu     y = silu(x W_up) W_down

With ETP every rank holds F / ETP columns of W_gate and W_up and the rows of W_down that belong to them; what it gives is its
part of y, and the parts add up to y.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.grouped import grouped_matmul

ACTIVATIONS = {
    "swiglu": (nn.functional.silu, True),
    "geglu": (nn.functional.gelu, True),
    "gelu": (nn.functional.gelu, False),
    "silu": (nn.functional.silu, False),
}


class Experts(nn.Module):
    """The experts of one rank.

    Args:
        hidden_size, ffn_size: H and F of a whole expert.
        num_experts: experts held here.
        activation: "swiglu", "geglu", "gelu" or "silu".
        etp, etp_rank: into how many parts each expert is cut, and which part this is.
        backend: of the matrix products; see `moe.grouped.grouped_matmul`.

    >>> experts = Experts(8, 16, 2)
    >>> experts(torch.randn(5, 8), torch.tensor([2, 3])).shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        etp: int = 1,
        etp_rank: int = 0,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; give one of {', '.join(ACTIVATIONS)}")
        if ffn_size % etp:
            raise ValueError(f"ffn_size={ffn_size} cannot be cut into etp={etp} equal parts; give a multiple")
        self.etp, self.etp_rank, self.backend = etp, etp_rank, backend
        self.activation, self.gated = ACTIVATIONS[activation]
        self.local_ffn = ffn_size // etp
        kind = {"dtype": dtype, "device": device}
        self.up = nn.Parameter(torch.empty(num_experts, hidden_size, self.local_ffn, **kind))
        self.gate = nn.Parameter(torch.empty_like(self.up)) if self.gated else None
        self.down = nn.Parameter(torch.empty(num_experts, self.local_ffn, hidden_size, **kind))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor | None = None) -> Tensor:
        """(M, H) rows, expert after expert -> (M, H).

        Args:
            tokens_per_expert: (num_experts,) int64; adds up to M.
            weights: (M,) factors on the results, applied before the last product, or None.
        """
        if int(tokens_per_expert.sum()) != tokens.shape[0] or tokens_per_expert.shape[0] != self.up.shape[0]:
            raise ValueError(
                f"tokens_per_expert is {tokens_per_expert.tolist()} for {tokens.shape[0]} rows and {self.up.shape[0]} experts; "
                "give one count for each expert that add up to the rows"
            )
        counts = tokens_per_expert
        x = grouped_matmul(tokens, self.up, counts, backend=self.backend)
        if self.gated:
            x = self.activation(grouped_matmul(tokens, self.gate, counts, backend=self.backend)) * x
        else:
            x = self.activation(x)
        if weights is not None:
            x = (x * weights.unsqueeze(1)).to(tokens.dtype)
        return grouped_matmul(x, self.down, counts, backend=self.backend)

    @torch.no_grad()
    def load(self, up: Tensor, down: Tensor, gate: Tensor | None = None) -> None:
        """Take this rank's part of whole experts: up and gate (num_experts, H, F), down (num_experts, F, H)."""
        if (gate is None) == self.gated:
            raise ValueError("gate is to be given exactly for gated activations (swiglu, geglu)")
        part = slice(self.etp_rank * self.local_ffn, (self.etp_rank + 1) * self.local_ffn)
        self.up.copy_(up[:, :, part])
        self.down.copy_(down[:, part])
        if gate is not None:
            self.gate.copy_(gate[:, :, part])


class SharedExperts(nn.Module):
    """A feed-forward network that every token passes, optionally times a sigmoid gate of the token (Qwen2-MoE).

    >>> SharedExperts(8, 16, gate=True)(torch.randn(3, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "swiglu",
        gate: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.expert = Experts(hidden_size, ffn_size, 1, activation=activation, dtype=dtype, device=device)
        self.token_gate = nn.Linear(hidden_size, 1, bias=False, dtype=dtype, device=device) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) -> (T, H)."""
        out = self.expert(x, torch.tensor([x.shape[0]]))
        return out if self.token_gate is None else out * self.token_gate(x).sigmoid()
