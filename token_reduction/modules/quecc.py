"""QueCC: the question shapes a convolutional compression.

    x' = x + Linear(last token of the question);   q = LN(MLP(x')) , depth-wise convolution with kernel = stride = s
    out = MLP(q + attention of each query over its cell of multi-level features)

Source: "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", section on query-based compression.
"""

from __future__ import annotations

from torch import Tensor, nn

from token_reduction.modules.local import (
    CellAttention,
    cells,
    check_map,
    check_rows,
    check_same_grid,
    check_sizes,
    flat,
    perceptron,
)


class QueCC(nn.Module):
    """(B, h, w, C), levels (B, h, w, levels x C), question (B, text) -> (B, h w / s^2, width).

    >>> module = QueCC(channels=8, levels=1, text=5, width=12, stride=2, heads=2)
    >>> import torch
    >>> module(torch.zeros(3, 4, 4, 8), torch.zeros(3, 4, 4, 8), torch.zeros(3, 5)).shape
    torch.Size([3, 4, 12])
    """

    def __init__(self, channels: int, levels: int, text: int, width: int, stride: int = 4, heads: int = 8) -> None:
        super().__init__()
        check_sizes(channels=channels, levels=levels, text=text, stride=stride)
        self.channels, self.levels, self.stride = channels, levels, stride
        self.question = nn.Linear(text, channels)
        self.query = nn.Sequential(perceptron(channels, channels, channels), nn.LayerNorm(channels))
        self.down = nn.Conv2d(channels, channels, stride, stride, groups=channels)
        self.key, self.value = (perceptron(levels * channels, channels, channels) for _ in range(2))
        self.attention = CellAttention(channels, heads)
        self.out = perceptron(channels, width, width)

    def forward(self, x: Tensor, levels: Tensor, question: Tensor) -> Tensor:
        check_map(x, self.channels, self.stride, "QueCC")
        check_map(levels, self.levels * self.channels, self.stride, "QueCC's levels")
        check_same_grid(x, levels, "QueCC")
        check_rows(question, "B", self.question.in_features, "QueCC's question")
        if len(question) != len(x):
            raise ValueError(f"QueCC got {len(x)} maps and {len(question)} questions; give one for each map")
        asked = self.query(x + self.question(question)[:, None, None])
        query = flat(self.down(asked.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        fine = cells(levels, self.stride)
        return self.out(query + self.attention(query, self.key(fine), self.value(fine)))
