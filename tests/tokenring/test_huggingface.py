"""transformers models spread over ranks give what transformers alone gives on one rank."""

import pytest
import torch
from transformers import AttentionInterface

from tests.tokenring.hf_models import FAMILIES, build, prompt, spread
from tokenring import Layout, connect
from tokenring.integrations.huggingface import SpreadCache, sequence_parallel


def logits_of(group, model, ids, positions, layout, schedule="auto", cache=False):
    rank = connect(group).rank
    store = SpreadCache(layout, group) if cache else None
    with sequence_parallel(model, group, layout, schedule):
        local = model(
            input_ids=layout.shard(ids, rank), position_ids=layout.shard(positions, rank), past_key_values=store
        ).logits
    return layout.gather(local, group)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_position_equals_one_rank(family, world):
    model = build(family)
    for length, cut, schedule in [
        (17, Layout.zigzag, "ring"),
        (23, Layout.contiguous, "tokenring"),
        (16, Layout.zigzag, "gather"),
        (19, Layout.zigzag, "tokenring"),
        (13, Layout.contiguous, "ring"),
        (18, Layout.striped, "auto"),
    ]:
        ids, positions = prompt(length, batch=2), torch.arange(length)[None]
        with torch.no_grad():
            expected = model(input_ids=ids, position_ids=positions).logits
        for got in spread(model, world, logits_of, ids, positions, cut(length, world), schedule):
            assert (got - expected).abs().max() < 1e-10


def test_every_position_equals_transformers_eager_attention():
    model = build("smollm")  # eager's softmax is float32 whatever the model, hence the tolerance
    model.set_attn_implementation("eager")
    ids, positions = prompt(21), torch.arange(21)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions).logits
    for got in spread(model, 3, logits_of, ids, positions, Layout.zigzag(21, 3)):
        assert (got - expected).abs().max() < 1e-5


def decode(group, model, ids, positions, layout, schedule, steps, next_position):
    rank, cache = connect(group).rank, SpreadCache(layout, group, block=2)
    made, all_logits, rows = [], [], []
    with sequence_parallel(model, group, layout, schedule):
        local = model(
            input_ids=layout.shard(ids, rank), position_ids=layout.shard(positions, rank), past_key_values=cache
        ).logits
        last = layout.gather(local, group)[:, -1]
        for step in range(steps):
            made.append(last.argmax(-1))
            all_logits.append(last)
            at = torch.tensor([[next_position + step]])
            last = model(input_ids=made[-1][:, None], position_ids=at, past_key_values=cache).logits[:, -1]
            rows.append(cache.rows())
    return torch.stack(made), torch.stack(all_logits), rows, cache.get_seq_length()


def grow(model, ids, positions, steps, next_position):
    """The same by running the whole sequence again for every token."""
    made, all_logits = [], []
    for step in range(steps):
        with torch.no_grad():
            ones = torch.ones(1, positions.shape[1])
            last = model(input_ids=ids, position_ids=positions, attention_mask=ones).logits[:, -1]
        made.append(last.argmax(-1))
        all_logits.append(last)
        ids = torch.cat([ids, made[-1][:, None]], dim=1)
        positions = torch.cat([positions, torch.tensor([[next_position + step]])], dim=1)
    return torch.stack(made), torch.stack(all_logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_greedy_decoding_equals_one_rank(family, world):
    model = build(family)
    for length, cut, schedule in [(14, Layout.zigzag, "tokenring"), (9, Layout.contiguous, "ring")]:
        ids, positions = prompt(length), torch.arange(length)[None]
        made, logits = grow(model, ids, positions, 6, length)
        results = spread(model, world, decode, ids, positions, cut(length, world), schedule, 6, length)
        for got_ids, got_logits, rows, seen in results:
            assert torch.equal(got_ids, made)
            assert (got_logits - logits).abs().max() < 1e-10
            assert seen == length + 6
            assert rows == results[0][2]
            assert torch.equal(got_logits, results[0][1])  # the same bits on every rank


def test_decoding_goes_on_at_positions_with_gaps():
    model = build("qwen3")
    ids, positions = prompt(11), torch.tensor([[0, 1, 2, 9, 10, 11, 40, 41, 60, 61, 62]])
    made, logits = grow(model, ids, positions, 5, 70)
    for got_ids, got_logits, _, _ in spread(model, 3, decode, ids, positions, Layout.zigzag(11, 3), "auto", 5, 70):
        assert torch.equal(got_ids, made)
        assert (got_logits - logits).abs().max() < 1e-10


def test_several_new_tokens_at_once_equal_one_by_one():
    model, ids = build("qwen2"), prompt(16)
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=torch.arange(16)[None]).logits[:, 11:]

    def work(group, model):
        layout, rank = Layout.zigzag(11, 3), connect(group).rank
        cache = SpreadCache(layout, group, block=1)
        with sequence_parallel(model, group, layout):
            places = layout.positions(rank)[None]
            model(input_ids=layout.shard(ids[:, :11], rank), position_ids=places, past_key_values=cache)
            return model(input_ids=ids[:, 11:], position_ids=torch.arange(11, 16)[None], past_key_values=cache).logits

    for got in spread(model, 3, work):
        assert (got - expected).abs().max() < 1e-10


def test_reduced_prompt_keeps_its_positions():
    model, kept = build("llama"), torch.tensor([0, 1, 4, 5, 9, 12, 13, 17, 18, 19])
    ids, positions = prompt(10), kept[None]
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, attention_mask=torch.ones(1, 10)).logits
    for got in spread(model, 2, logits_of, ids, positions, Layout.zigzag(10, 2)):
        assert (got - expected).abs().max() < 1e-10


def test_zigzag_jumps_are_not_taken_for_packed_documents():
    model, length = build("llama"), 16
    ids, positions, layout = prompt(length), torch.arange(length)[None], Layout.zigzag(length, 2)
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions).logits
        shard = layout.shard(ids, 0), layout.shard(positions, 0)
        alone = model(input_ids=shard[0], position_ids=shard[1], use_cache=False).logits
        ones = torch.ones_like(shard[0])
        plain = model(input_ids=shard[0], position_ids=shard[1], attention_mask=ones).logits
    assert (alone - plain).abs().max() > 1e-3  # transformers does fall for it, on its own
    for cache in (False, True):
        for got in spread(model, 2, logits_of, ids, positions, layout, "auto", cache):
            assert (got - expected).abs().max() < 1e-10


def dense(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **kwargs):
    """Causal attention by the book, in the tensors' own precision."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    rows, columns = scores.shape[2:]
    scores = scores.masked_fill(torch.ones(rows, columns).triu(1).bool(), -torch.inf)
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return (scores.softmax(-1)[..., :columns] @ value).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"s_aux": torch.tensor([0.5, 2.0, -1.0, 3.0]).double()}])
def test_softcap_and_sinks_are_passed_on(options):
    AttentionInterface.register("dense_for_tests", dense)
    model, length = build("qwen2"), 12
    ids, positions, layout = prompt(length + 1), torch.arange(length + 1)[None], Layout.zigzag(length, 2)
    model.set_attn_implementation("dense_for_tests")
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, **options).logits
        assert (model(input_ids=ids, position_ids=positions).logits - expected).abs().max() > 1e-2

    def work(group, model):
        rank, cache = connect(group).rank, SpreadCache(layout, group)
        with sequence_parallel(model, group, layout, "ring"):
            places = layout.positions(rank)[None]
            shard = layout.shard(ids[:, :length], rank)
            local = model(input_ids=shard, position_ids=places, past_key_values=cache, **options).logits
            later = model(
                input_ids=ids[:, length:], position_ids=positions[:, length:], past_key_values=cache, **options
            ).logits
        return torch.cat([layout.gather(local, group), later], dim=1)

    for got in spread(model, 2, work):
        assert (got - expected).abs().max() < 1e-10


def in_a_process(group):
    torch.set_num_threads(1)
    with torch.no_grad():
        return decode(group, build("smollm"), prompt(13), torch.arange(13)[None], Layout.zigzag(13, 2), "ring", 4, 13)


def test_processes_over_gloo_give_the_same(pool):
    made, logits = grow(build("smollm"), prompt(13), torch.arange(13)[None], 4, 13)
    for got_ids, got_logits, _, _ in pool.run(2, in_a_process):
        assert torch.equal(got_ids, made)
        assert (got_logits - logits).abs().max() < 1e-10
