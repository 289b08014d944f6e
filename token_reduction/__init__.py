"""Visual tokens in, fewer visual tokens out: one interface, many methods, on one rank or on many.

>>> import torch
>>> from token_reduction import Budget, VisualTokens, build
>>> x = torch.randn(2 * 4 * 4, 8, generator=torch.Generator().manual_seed(0))
>>> tokens = VisualTokens(x, [0, 32], [(2, 4, 4)], torch.arange(32)[None])
>>> method = build("divprune")
>>> method.count(tokens.grid, Budget.ratio(0.25))
[8]
>>> kept = method.reduce(tokens, Budget.ratio(0.25))
>>> kept.apply(x).shape, kept.apply_positions(tokens.positions).shape
(torch.Size([8, 8]), torch.Size([1, 8]))
"""

from token_reduction.budget import Budget, split_budget, windows
from token_reduction.combinators import Segments, Then, two_level
from token_reduction.distributed import reduce_distributed
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.registry import Method, build, from_spec, methods, parse
from token_reduction.stream import KeptWindow, reduce_stream
from token_reduction.tokens import TokenShard, VisualTokens

__all__ = [
    "Budget",
    "KeptWindow",
    "Method",
    "Reducer",
    "Reduction",
    "Segments",
    "Then",
    "TokenShard",
    "VisualTokens",
    "build",
    "from_spec",
    "methods",
    "parse",
    "reduce_distributed",
    "reduce_stream",
    "split_budget",
    "two_level",
    "windows",
]
