"""VisualTokens, TokenShard: what is accepted and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.cases import GRIDS, batch
from token_reduction import TokenShard, VisualTokens

X, POSITIONS = torch.zeros(8, 4), torch.arange(8)[None]


def test_offsets_may_be_a_list_or_any_integer_tensor():
    for offsets in ([0, 4, 8], torch.tensor([0, 4, 8], dtype=torch.int32)):
        tokens = VisualTokens(X, offsets, [(1, 2, 2), (4, 1, 1)], POSITIONS)
        assert tokens.cu_seqlens.dtype == torch.int64
        assert tokens.lengths == [4, 4]


def test_an_item_taken_out_keeps_its_rows_positions_and_channels():
    tokens = batch()
    rich = VisualTokens(
        tokens.x,
        tokens.cu_seqlens,
        tokens.grid,
        tokens.positions,
        {"cls_attn": tokens.x[:, 0], "planes": [tokens.x * 2, tokens.x * 3], "text": torch.ones(3, 5)},
    )
    second, (first, last) = rich.item(1), (80, 95)
    assert second.grid == (GRIDS[1],)
    torch.testing.assert_close(second.x, tokens.x[first:last])
    torch.testing.assert_close(second.positions, tokens.positions[:, first:last])
    torch.testing.assert_close(second.channels["planes"][1], 3 * tokens.x[first:last])
    assert second.channels["cls_attn"].shape == (15,)
    assert second.channels["text"].shape == (3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(8, 4, dtype=torch.int64)},
            r"x is a floating tensor \(tokens, width\), got \(8, 4\) torch.int64",
        ),
        ({"x": torch.zeros(8)}, r"x is a floating tensor"),
        ({"cu_seqlens": [0, 5, 4, 8]}, "starts at 0 and never falls"),
        ({"cu_seqlens": [1, 8]}, "starts at 0"),
        ({"cu_seqlens": [0.0, 8.0]}, "whole row offsets"),
        ({"cu_seqlens": [0]}, "whole row offsets"),
        ({"cu_seqlens": [0, 7], "grid": [(1, 7, 1)]}, "ends at 7 but x has 8 rows"),
        ({"grid": [(2, 2, 3)]}, "item 0 has 8 rows in cu_seqlens but its grid 2x2x3 has 12 cells"),
        ({"grid": [(2, 2, 2), (0, 1, 1)]}, "grid has 2 items but cu_seqlens has 1"),
        ({"grid": (2, 2, 2)}, r"one item is \[\(T, h, w\)\]"),
        ({"grid": [(2, -2, -2)]}, "height >= 1"),
        ({"positions": torch.arange(8)}, r"one axis is positions\[None\]"),
        ({"positions": torch.zeros(1, 8)}, "positions is an int64 tensor"),
        ({"positions": torch.arange(7)[None]}, "8 tokens as in x"),
        ({"positions": torch.zeros(2, 8, dtype=torch.int64)}, "1 or 3 axes"),
        ({"channels": {"cls_atn": torch.zeros(8)}}, "unknown channel 'cls_atn'; channels are cls_attn"),
        ({"channels": {"keys": torch.zeros(7, 2)}}, "channel keys has 7 rows but x has 8"),
        ({"channels": {"keys": [torch.zeros(8, 2)]}}, "only planes may be a list"),
        ({"channels": {"planes": [torch.zeros(8, 2), torch.zeros(9, 2)]}}, "channel planes has 9 rows"),
    ],
)
def test_tokens_that_do_not_fit_together_are_refused(change, message):
    fields = {"x": X, "cu_seqlens": [0, 8], "grid": [(2, 2, 2)], "positions": POSITIONS, "channels": {}} | change
    with pytest.raises(ValueError, match=message) as error:
        VisualTokens(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 2, 1], "rise strictly inside 0..15"),
        ([0, 1, 1], "rise strictly"),
        ([0, 1, 16], "rise strictly"),
        ([-1, 0, 1], "rise strictly"),
        ([0, 1], "one entry for each of the 3 rows"),
    ],
)
def test_a_shard_names_its_rows_or_is_refused(index, message):
    with pytest.raises(ValueError, match=message):
        TokenShard(X[:3], torch.tensor(index), [0, 16], [(4, 2, 2)], POSITIONS[:, :3])


def test_a_shard_finds_its_rows_by_their_global_numbers():
    shard = batch().shard(torch.tensor([3, 79, 80, 100]))
    assert shard.bounds == [0, 2, 3, 4]
    assert shard.find(torch.tensor([80, 3, 4, 130])).tolist() == [2, 0, -1, -1]
    assert batch().shard(torch.zeros(0, dtype=torch.int64)).find(torch.tensor([0])).tolist() == [-1]


def test_grids_are_never_rounded_and_no_channels_may_be_none():
    with pytest.raises(ValueError, match="whole numbers"):
        VisualTokens(X, [0, 8], [(2.9, 2, 2)], POSITIONS)
    with pytest.raises(ValueError, match="mapping of names to tensors, got list"):
        VisualTokens(X, [0, 8], [(2, 2, 2)], POSITIONS, [X])
    assert VisualTokens(X, [0, 8], [(2, 2, 2)], POSITIONS, None).channels == {}
