"""Units of one shape are chosen in together: the answers are those of each unit alone, ties and all."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.cases import METHODS, batch
from token_reduction import Budget, build
from token_reduction.selectors.diversity import dpp

GRIDS = ((4, 3, 4), (2, 3, 5), (4, 3, 4), (4, 3, 4), (2, 3, 5), (1, 4, 4), (1, 4, 4))
"""Ragged, with several items of one shape; the last of a shape repeats tokens of the first."""

OPTIONS = [
    ("todre", {"diversity": "max-sum", "center": True}),
    ("todre", {"thumbnail": True, "center": True}),
    ("facility", {"sampler": "stochastic"}),
    ("facility", {"center": True}),
    ("mmtok", {"alpha": 2.0}),
    ("cdpruner", {"relevance": False}),
    ("cdpruner", {"block": 3}),
    ("dart", {"keys": True}),
    ("dart", {"pivots": 2, "text_pivots": 4}),
    ("hiprune", {"alpha": 2.0}),
    ("image_text", {"use_text": True}),
    ("image_text", {"use_text": True, "variant": "paper"}),
    ("globalcom2", {"image": (3.0, 9.0)}),
    ("vflowopt", {"alpha_v": 0.5, "m": 2, "heads": 2}),
    ("centerclip", {"aggregate": "mean", "frames": 3, "distance": "cosine"}),
    ("centerclip", {"algorithm": "spectral", "frames": 2}),
    ("centerclip", {"algorithm": "spectral", "graph": "knn"}),
    ("fastvid", {"segments": 2, "stride": 2, "merged": 0.8}),
    ("fastvid", {"segments": 1, "tau": -1.0, "merged": 1.0}),
    ("holitom", {"tau": 0.3, "merged": 0.7}),
    ("difffp", {"variant": "paper", "threshold": 60.0}),
]


def together(width: int = 12):
    tokens = batch(GRIDS, width=width, seed=1)
    first, last = tokens.cu_seqlens[0:1].item(), tokens.cu_seqlens[3].item()
    tokens.x[last : last + 20] = tokens.x[first : first + 20]
    tokens.x[last + 20 : last + 30] = tokens.x[last : last + 10]  # ties inside an item
    return tokens


def equals_a_loop(method, tokens, budget):
    one, alone = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    reduction = method.reduce(tokens, budget, one)
    loop = [method.reduce(tokens.item(i), budget, alone) for i in range(len(GRIDS))]
    starts = tokens.cu_seqlens[:-1].tolist()
    assert reduction.index.tolist() == [int(i) + s for part, s in zip(loop, starts, strict=True) for i in part.index]
    assert torch.equal(reduction.apply(tokens.x), torch.cat([p.apply(tokens.item(i).x) for i, p in enumerate(loop)]))
    if reduction.scores is not None:
        assert torch.equal(reduction.scores, torch.cat([part.scores for part in loop]))


@pytest.mark.parametrize("variant", ["best", "paper", "released"])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_like_items_equals_each_alone(name, variant):
    for share in (0.2, 0.55):
        equals_a_loop(build(name, variant=variant), together(), Budget.ratio(share))


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda value: str(value))
def test_so_it_is_with_options(name, options):
    equals_a_loop(build(name, **options), together(), Budget.ratio(0.4))


def test_sets_whose_rank_is_used_up_are_begun_again_one_by_one():
    tokens = together(width=3)  # a kernel of rank 3 at most, 19 choices
    equals_a_loop(build("cdpruner", relevance=False, block=40), tokens, Budget.ratio(0.4))
    q = torch.nn.functional.normalize(torch.randn(3, 9, 5, dtype=torch.float64), dim=-1)
    q[1, 2:] = q[1, :1]  # rank 2 in the middle
    alone = torch.cat([dpp(part[None], 5, torch.ones(1, 9, dtype=torch.float64)) for part in q])
    assert torch.equal(dpp(q, 5, torch.ones(3, 9, dtype=torch.float64)), alone)


@pytest.mark.parametrize("name", ["facility", "mmtok", "catp", "todre", "divprune"])
def test_items_too_large_to_be_held_are_chosen_in_one_by_one_and_alike(name, monkeypatch):
    tokens, budget, method = together(), Budget.ratio(0.3), build(name)
    held = method.reduce(tokens, budget)
    monkeypatch.setattr("token_reduction.selectors.cover.HELD_BYTES", 0)
    for module in ("todre", "divprune"):
        monkeypatch.setattr(f"token_reduction.reducers.{module}.SMALL", 8)
    large = method.reduce(tokens, budget)
    assert large.index.tolist() == held.index.tolist()
    if held.scores is not None:
        torch.testing.assert_close(large.scores, held.scores)
