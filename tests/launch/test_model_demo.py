"""The demo adapter: mechanics as for the real families, and words it does not vouch for."""

import itertools

import pytest
import torch

from launch.models.base import VISUAL, splice
from launch.models.demo import DemoAdapter
from tests.launch import tiny_models


@pytest.fixture(scope="module")
def adapter():
    return tiny_models.demo(DemoAdapter)


@pytest.fixture(scope="module")
def video(adapter):
    pictures = tiny_models.frames(3)
    plan = adapter.visual_plan(3, 40, 60)
    prompt = adapter.prompt("What is this?", plan, [0.0, 0.5, 1.0])
    return pictures, plan, adapter.prepare(pictures, plan, channels=["cls_attn", "keys"]), prompt


def test_a_frame_is_256_rows_in_order(adapter, video):
    pictures, plan, tokens, _ = video
    assert plan.grid == tokens.grid[0] == (3, 16, 16)
    assert tokens.x.shape == (768, 48)
    assert tokens.channels["cls_attn"].shape == (768, 1)
    assert tokens.channels["keys"].shape == (768, 2, 6)
    features = adapter.encoder(pictures)["x"]
    assert torch.equal(tokens.x[256:512], adapter.project(features[1]))


def test_numbers_do_not_depend_on_how_frames_are_cut(adapter, video):
    pictures, plan, tokens, _ = video
    for cuts in ([0, 1, 3], [0, 2, 2, 3]):
        runs = [adapter.prepare(pictures[a:b], plan, first=a) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([r.x for r in runs]), tokens.x)
        assert torch.equal(torch.cat([r.positions for r in runs], dim=1), tokens.positions)


def test_the_projector_is_fixed_and_has_the_tables_mean_and_spread(adapter):
    features = torch.randn(20000, 12, generator=torch.Generator().manual_seed(0)) * 7 + 3
    rows = adapter.project(features)
    table = adapter.table
    assert (rows.mean(0) - table.mean(0)).abs().max() < 0.05 * table.std()
    # Twelve features make columns of unequal spread; over all columns it is the table's.
    assert abs(float((rows.std(0) / table.std(0)).pow(2).mean()) - 1) < 0.25
    again = DemoAdapter(adapter.encoder, *tiny_models.smollm())
    assert torch.equal(again.map, adapter.map)


def test_the_prompt_puts_the_video_into_the_users_turn(adapter, video):
    _, plan, _, prompt = video
    ids = prompt.input_ids
    head, tail = ids[: int(prompt.visual_slots[0])], ids[int(prompt.visual_slots[-1]) + 1 :]
    assert adapter.tokenizer.decode(head) == "<|im_start|>user\n"
    assert adapter.tokenizer.decode(tail) == "\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert int((ids == VISUAL).sum()) == plan.tokens
    assert torch.equal(prompt.positions, torch.arange(ids.numel())[None])
    assert prompt.next_position == ids.numel()


def test_a_reduced_prompt_equals_the_whole_one_with_rows_masked(adapter, video):
    _, plan, tokens, prompt = video
    kept = torch.arange(0, plan.tokens, 7)
    short = prompt.keep(kept)
    rows = splice(adapter, short.input_ids, tokens.x[kept])
    got = adapter.logits(adapter.forward(rows, short.positions))
    length = prompt.input_ids.numel()
    stays = torch.ones(length, dtype=torch.bool)
    stays[prompt.visual_slots] = False
    stays[prompt.visual_slots[kept]] = True
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (stays[None] | torch.eye(length, dtype=torch.bool))
    with torch.no_grad():
        whole = adapter.text_model(
            inputs_embeds=splice(adapter, prompt.input_ids, tokens.x),
            position_ids=prompt.positions,
            attention_mask=seen[None, None],
        )
    assert (got - adapter.logits(whole.last_hidden_state[:, stays])).abs().max() < 1e-4


def test_the_demo_says_what_its_words_are_worth(adapter):
    assert any("mean nothing" in note for note in adapter.notes)


def test_what_does_not_fit_is_refused(adapter, video):
    pictures, plan, _, _ = video
    with pytest.raises(
        ValueError, match="gives no text; it gives cls_attn, cls_logits, keys, patches, pixels, queries, recv_attn"
    ):
        adapter.prepare(pictures, plan, channels=["text"])
    with pytest.raises(ValueError, match="seconds has 1 entries"):
        adapter.prompt("x", plan, [0.0])
    with pytest.raises(ValueError, match="NUL"):
        adapter.prompt("a \x00video\x00 b", plan, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="frames 1 to 3"):
        adapter.prepare(pictures, plan, first=1)
    with pytest.raises(ValueError, match="takes 0 planes"):
        adapter.forward(torch.zeros(1, 1, 48), torch.zeros(1, 1, dtype=torch.long), planes=torch.zeros(1, 2, 48))
