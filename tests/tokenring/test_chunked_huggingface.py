"""transformers models with prompts in several chunks: generate, continued conversations, sliding windows."""

import pytest
import torch
from transformers import DynamicCache

from tests.tokenring.hf_models import FAMILIES, WINDOW, WINDOWED, build, prompt, spread
from tokenring import Layout, connect
from tokenring.integrations.huggingface import SpreadCache, sequence_parallel

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 5}
EAGER = 1e-5
"""Eager attention, the only one with a softcap, takes its softmax in float32 whatever the model."""


def talk(model, cache, prompts, options, **call):
    """generate() for each prompt on top of all that was said before; the ids at the end and every token's logits."""
    ids, logits = prompts[0][:, :0], []
    for said in prompts:
        answer = model.generate(torch.cat([ids, said], dim=1), past_key_values=cache, **GREEDY, **options, **call)
        ids = answer.sequences
        logits += answer.logits
    return ids, torch.stack(logits)


def talk_alone(model, prompts, **options):
    with torch.no_grad():
        return talk(model, DynamicCache(config=model.config), prompts, options)


def talk_spread(group, model, prompts, options, cut_from, schedule="auto"):
    cache = SpreadCache(None, group)
    with sequence_parallel(model, group, schedule=schedule, cut_from=cut_from):
        ids, logits = talk(model, cache, prompts, options)
    held = [[layer.store.layout.length(r) for r in range(connect(group).world)] for layer in cache.layers]
    return ids, logits, held, cache


@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWED])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("cut_from", [1, 64])
def test_generate_over_several_prompts_equals_one_rank(family, world, cut_from):
    """cut_from=1: prompts are cut over the ranks from the first row on; 64: computed whole on every rank."""
    model, prompts = build(family), [prompt(23), prompt(11), prompt(4)]
    ids, logits = talk_alone(model, prompts)
    for got_ids, got_logits, held, cache in spread(model, world, talk_spread, prompts, {}, cut_from):
        assert torch.equal(got_ids, ids)
        assert (got_logits - logits).abs().max() < EAGER
        total = ids.shape[1] - 1  # nobody asked for what follows the last token
        assert cache.get_seq_length() == total == sum(cache.rows())
        assert max(cache.rows()) - min(cache.rows()) <= 1
        for layer, rows in zip(cache.layers, held):
            if not layer.is_sliding:
                assert rows == cache.rows()
            else:
                assert WINDOW - 1 <= sum(rows) <= WINDOW + 4  # what the window has passed is gone


def test_a_batch_of_prompts():
    model, prompts = build("qwen2"), [prompt(23, batch=3), prompt(7, batch=3)]
    ids, logits = talk_alone(model, prompts)
    for got_ids, got_logits, _, _ in spread(model, 2, talk_spread, prompts, {}, 1):
        assert torch.equal(got_ids, ids)
        assert (got_logits - logits).abs().max() < EAGER


@pytest.mark.parametrize("schedule", ["tokenring", "ring", "gather"])
def test_generate_s_own_chunked_prefill(schedule):
    model, prompts = build("qwen3"), [prompt(29), prompt(10)]
    ids, logits = talk_alone(model, prompts)
    options = {"prefill_chunk_size": 8}
    for got_ids, got_logits, _, _ in spread(model, 3, talk_spread, prompts, options, 1, schedule):
        assert torch.equal(got_ids, ids)
        assert (got_logits - logits).abs().max() < EAGER


def test_beam_search_moves_the_cache_s_rows_with_its_beams():
    model, ids = build("llama"), prompt(12)
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        want = model.generate(ids, **options)

    def work(group, model):
        with sequence_parallel(model, group, cut_from=4):
            return model.generate(ids, past_key_values=SpreadCache(None, group), **options)

    for got in spread(model, 2, work):
        assert torch.equal(got, want)


def cut_by_hand(group, model, ids, counts, tokens):
    """Prompts that the caller cuts, in a block each, and the same new tokens on every rank after each."""
    cache, rank, outs, at = SpreadCache(None, group), connect(group).rank, [], 0
    for count in counts:
        chunk = cache.deal(count)
        with sequence_parallel(model, group, chunk):
            mine = chunk.shard(ids[:, at : at + count], rank)
            local = model(input_ids=mine, position_ids=chunk.positions(rank)[None], past_key_values=cache).logits
            outs.append(chunk.gather(local, group))
            at += count
            for _ in range(tokens):
                there = torch.tensor([[at]])
                outs.append(model(input_ids=ids[:, at : at + 1], position_ids=there, past_key_values=cache).logits)
                at += 1
    return torch.cat(outs, dim=1), cache.rows()


@pytest.mark.parametrize("family", ["smollm", "qwen2, every second layer"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_position_of_prompts_cut_by_hand_equals_one_rank(family, world):
    model, counts, tokens = build(family), [15, 9, 12], 2
    total = sum(counts) + 3 * tokens
    ids = prompt(total)
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=torch.arange(total)[None]).logits
    for got, rows in spread(model, world, cut_by_hand, ids, counts, tokens):
        assert (got - want).abs().max() < 1e-10
        assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize(("cut_from", "rows"), [(8, [6, 3, 5]), (12, [6, 9, 5]), (99, [18, 9, 15])])
def test_so_many_new_rows_are_cut_and_fewer_are_not(cut_from, rows):
    """Rows that a layer computes on rank 0 of 3, for prompts of 18, 9 and 15 rows."""
    model = build("llama")

    def work(group, model):
        seen, cache, at = [], SpreadCache(None, group), 0
        model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        with sequence_parallel(model, group, cut_from=cut_from):
            for count in (18, 9, 15):
                there = torch.arange(at, at + count)[None]
                model(input_ids=prompt(count), position_ids=there, past_key_values=cache)
                at += count
        return seen

    assert spread(model, 3, work)[0] == rows


def test_rows_that_come_whole_leave_whole_without_a_cache_too():
    model, ids = build("smollm"), prompt(19, batch=2)
    positions = torch.arange(19)[None]
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=positions, output_hidden_states=True)

    def work(group, model, layout):
        with sequence_parallel(model, group, layout):
            return model(input_ids=ids, position_ids=positions, output_hidden_states=True)

    for layout in (None, Layout.contiguous(19, 3), Layout.zigzag(19, 3)):
        for got in spread(model, 3, work, layout):
            assert (got.logits - want.logits).abs().max() < 1e-10
            assert len(got.hidden_states) == len(want.hidden_states)
            for ours, theirs in zip(got.hidden_states, want.hidden_states):
                assert (ours - theirs).abs().max() < 1e-10


def in_a_process(group):
    torch.set_num_threads(1)
    with torch.no_grad():
        return talk_spread(group, build("smollm"), [prompt(31), prompt(9)], {}, 8)[:2]


def test_processes_over_gloo_give_the_same(pool):
    ids, logits = talk_alone(build("smollm"), [prompt(31), prompt(9)])
    for got_ids, got_logits in pool.run(4, in_a_process):
        assert torch.equal(got_ids, ids)
        assert (got_logits - logits).abs().max() < EAGER


def test_the_cache_is_told_apart_from_the_block():
    model = build()
    cache = SpreadCache(None, None)
    ids, positions = prompt(4), torch.arange(4)[None]
    with torch.no_grad():
        with sequence_parallel(model, None, Layout.contiguous(4, 1)):
            model(input_ids=ids, position_ids=positions, past_key_values=cache)
        for layout in (Layout.contiguous(3, 1), Layout.contiguous(5, 1, offset=3), Layout.contiguous(2, 1, offset=9)):
            with (
                sequence_parallel(model, None, layout),
                pytest.raises(ValueError, match=r"cache\.deal\(rows\), which starts at 4"),
            ):
                model(input_ids=ids, position_ids=positions, past_key_values=cache)
        other = build("mistral")
        with sequence_parallel(other, None), pytest.raises(ValueError, match="other sliding windows"):
            other(input_ids=ids, position_ids=positions + 4, past_key_values=cache)


def test_whole_rows_that_cannot_be_cut_are_refused():
    model = build()

    def work(group, model):
        rank = connect(group).rank
        with sequence_parallel(model, group):
            with pytest.raises(ValueError, match="got 1 rows for 2 ranks"):
                model(input_ids=prompt(1), position_ids=torch.zeros(1, 1, dtype=torch.long))
            with pytest.raises(ValueError, match=r"some_mask \(1, 6\) seems to have an entry for each of the 6 rows"):
                model(input_ids=prompt(6), position_ids=torch.arange(6)[None], some_mask=torch.ones(1, 6))
        return rank

    assert spread(model, 2, work) == [0, 1]
    with pytest.raises(ValueError, match="cut_from is 0"), sequence_parallel(model, None, cut_from=0):
        pass
