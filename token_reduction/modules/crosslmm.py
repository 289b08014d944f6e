"""CrossLMM: few pooled visual tokens in the sequence, the full ones beside it, met by cross-attention in some layers.

    v2v   pooled tokens attend to their own frame's original tokens
    t2v   text tokens attend to all original tokens
    both add through one gate, tanh(g), 0 at first: the layer begins as the language model's own

Source: CrossLMM, "Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms"; abstract public, form ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from token_reduction.modules.local import check_rows, check_sizes, pooled


class CrossLMM(nn.Module):
    """One layer's dual cross-attention, and the pooling in front of the model.

    Args:
        width: of the language model's states and of the visual tokens. side: pooled tokens are side x side per frame.

    >>> module = CrossLMM(8, side=2, heads=2)
    >>> frames = torch.zeros(1, 3, 4, 4, 8)
    >>> few = module.pool(frames)
    >>> few.shape, [part.shape for part in module(few, torch.zeros(1, 5, 8), frames)]
    (torch.Size([1, 12, 8]), [torch.Size([1, 12, 8]), torch.Size([1, 5, 8])])
    """

    def __init__(self, width: int, side: int = 3, heads: int = 8) -> None:
        super().__init__()
        check_sizes(width=width, heads=heads, side=side)
        self.side, self.width = side, width
        self.norm_visual, self.norm_text = nn.LayerNorm(width), nn.LayerNorm(width)
        self.v2v, self.t2v = (nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(2))
        self.gate = nn.Parameter(torch.zeros(()))

    def pool(self, frames: Tensor) -> Tensor:
        """(B, T, h, w, D) -> (B, T side^2, D)."""
        check_rows(frames, "B, T, h, w", self.width, "CrossLMM.pool")
        b, t = frames.shape[:2]
        return pooled(frames.flatten(0, 1), self.side, self.side).reshape(b, t * self.side**2, -1)

    def forward(self, visual: Tensor, text: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled tokens (B, T side^2, D) and text (B, m, D) after looking at the frames (B, T, h, w, D)."""
        for x, rows, what in ((visual, "B, n", "visual"), (text, "B, m", "text"), (frames, "B, T, h, w", "frames")):
            check_rows(x, rows, self.width, f"CrossLMM's {what}")
        b, t, _, _, d = frames.shape
        if visual.shape[1] != t * self.side**2:
            raise ValueError(f"{t} frames have {t * self.side**2} pooled tokens, got {visual.shape[1]}")
        own = frames.flatten(2, 3).flatten(0, 1)
        query = self.norm_visual(visual).view(b * t, self.side**2, d)
        seen, _ = self.v2v(query, own, own, need_weights=False)
        everything = frames.flatten(1, 3)
        read, _ = self.t2v(self.norm_text(text), everything, everything, need_weights=False)
        gate = torch.tanh(self.gate)
        return visual + gate * seen.reshape_as(visual), text + gate * read
