"""The cache that is spread over ranks: shares, owners, bytes."""

import pytest
import torch

from tests.tokenring.hf_models import build, prompt, spread
from tokenring import Layout, connect, run_local
from tokenring.integrations.huggingface import SpreadCache, sequence_parallel


def test_a_rank_holds_its_share_of_the_cache_and_nothing_else():
    model, length, world = build("smollm", torch.float32), 60, 4
    layout = Layout.zigzag(length, world)

    def work(group, model):
        rank, cache = connect(group).rank, SpreadCache(layout, group, block=1)
        with sequence_parallel(model, group, layout):
            places = layout.positions(rank)[None]
            model(input_ids=layout.shard(prompt(length), rank), position_ids=places, past_key_values=cache)
            before = cache.nbytes(), cache.slack_nbytes()
            for step in range(7):
                ids, at = torch.tensor([[5 + step]]), torch.tensor([[length + step]])
                model(input_ids=ids, position_ids=at, past_key_values=cache)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in tensors)  # no view on something larger
        return before, (cache.nbytes(), cache.slack_nbytes()), cache.rows()

    row = 2 * 2 * 3 * 8 * 4  # keys and values, layers, heads, head dim, bytes
    for rank, (before, after, rows) in enumerate(spread(model, world, work)):
        assert before == (15 * row, 0)
        assert rows == [17, 17, 17, 16]
        assert after == (rows[rank] * row, 0)
        assert after[0] <= 67 * row / world * 1.05


def test_decoded_tokens_go_to_the_rank_with_the_fewest_rows():
    layout = Layout.contiguous(7, 3)  # 3, 2, 2 rows
    states = torch.arange(5 * 2.0).view(1, 1, 5, 2)

    def work(group):
        rank, cache = connect(group).rank, SpreadCache(layout, group, block=4)
        for layer in (0, 1):
            cache.update(torch.zeros(1, 1, layout.length(rank), 2), torch.zeros(1, 1, layout.length(rank), 2), layer)
        for token in range(5):
            for layer in (0, 1):
                cache.update(states[:, :, token : token + 1], states[:, :, token : token + 1], layer)
        keys, _, lengths, positions = cache.local(1)
        held = keys[0, : lengths[0], 0, 0].tolist(), positions[0, : lengths[0]].tolist()
        assert cache.nbytes() - cache.slack_nbytes() == int(lengths[0]) * 2 * 2 * 2 * 4
        return held

    held = run_local(3, work)
    assert [p for _, p in held] == [[0, 1, 2, 9], [3, 4, 7, 10], [5, 6, 8, 11]]
    assert [k[-1] for k, _ in held] == [4.0, 6.0, 8.0]


def test_a_further_prompt_is_dealt_so_that_ranks_stay_balanced():
    def work(group):
        rank, cache = connect(group).rank, SpreadCache(Layout.contiguous(7, 3), group)  # 3, 2, 2 rows
        at = 0
        for count in (7, 1, 12, 1, 5):
            chunk = cache.layout if at == 0 else cache.deal(count) if count > 3 else None
            if chunk is not None:
                cache.ledger.expect(chunk)
            places = torch.arange(at, at + count) if chunk is None else chunk.positions(rank)
            for layer in (0, 1):
                states = places.double().view(1, 1, -1, 1).expand(1, 2, -1, 3) + 100 * layer
                cache.update(states, -states, layer)
            at += count
        for layer in (0, 1):
            keys, values, lengths, positions = cache.local(layer)
            assert torch.equal(keys[0, :, 1, 2], positions[0] + 100.0 * layer)
            assert torch.equal(values, -keys)
            assert int(lengths[0]) == keys.shape[1] == cache.rows()[rank]
        return positions[0].tolist(), cache.rows()

    results = run_local(3, work)
    assert sorted(p for positions, _ in results for p in positions) == list(range(26))
    assert all(rows == [9, 9, 8] for _, rows in results)


def test_layers_that_saw_unlike_tokens_are_refused():
    cache = SpreadCache(None, None)
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
    with pytest.raises(ValueError, match="a layer has 0 rows where others have 4"):
        cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 1)


def test_batch_entries_can_be_selected_and_repeated():
    cache = SpreadCache(None, None)
    states = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 3, 2)
    cache.update(states, states, 0)
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == [1, 0, 0, 1]
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.layers[0].values.shape == (1, 1, 3, 2)
    assert cache.get_seq_length() == 3


def test_a_cache_can_be_reset_and_filled_again():
    cache = SpreadCache(Layout.contiguous(3, 1), None)
    for _ in range(2):
        cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
        cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
        assert cache.get_seq_length() == 4
        assert cache.rows() == [4]
        cache.reset()
        assert cache.get_seq_length() == 0
        assert not cache.prefilled


def test_the_cache_refuses_what_it_cannot_do():
    layout = Layout.contiguous(3, 1)
    cache = SpreadCache(layout, None)
    with pytest.raises(ValueError, match=r"got 2 prompt rows on rank 0; its layout gives this rank 3"):
        cache.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), 0)
    cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
    with pytest.raises(ValueError, match="cannot remove -1 tokens"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="layout for 2 ranks and a group of 1"):
        SpreadCache(Layout.contiguous(3, 2), None)
    with pytest.raises(ValueError, match="block=0"):
        SpreadCache(layout, None, block=0)


def test_unused_capacity_stays_below_five_percent():
    layout = Layout.contiguous(130, 1)
    cache = SpreadCache(layout, None)
    cache.update(torch.zeros(1, 1, 130, 2), torch.zeros(1, 1, 130, 2), 0)
    assert cache.slack_nbytes() == 0
    for token in range(300):
        cache.update(torch.full((1, 1, 1, 2), token + 1.0), torch.zeros(1, 1, 1, 2), 0)
        assert cache.nbytes() <= 1.05 * (131 + token) * 2 * 2 * 4
    keys, _, lengths, positions = cache.local(0)
    assert int(lengths[0]) == 430
    assert keys[0, 130:430, 0, 0].tolist() == [token + 1.0 for token in range(300)]
    assert positions[0, :430].tolist() == list(range(430))
