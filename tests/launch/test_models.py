"""Every adapter gives what its family's own model gives, whole and reduced, on one rank and on several."""

import copy
import itertools

import pytest
import torch

from launch.models import load
from launch.models.base import NEWLINE, VISUAL, splice
from tests.launch import tiny_models
from tokenring import Layout, connect, run_local
from tokenring.integrations.huggingface import SpreadCache, sequence_parallel

torch.set_num_threads(1)

FRAMES = 7
SECONDS = [0.4 * i for i in range(FRAMES)]
FAMILIES = list(tiny_models.MAKERS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(family, tmp_path_factory):
    torch.manual_seed(5)
    folder = tiny_models.MAKERS[family](tmp_path_factory.mktemp(family))
    made = load(folder, torch.float32)
    made.model.set_attn_implementation("eager")
    return made


@pytest.fixture(scope="module")
def video(adapter):
    """(frames, plan, tokens, prompt) of a video whose last group is not full."""
    pictures = tiny_models.frames(FRAMES)
    plan = adapter.visual_plan(FRAMES, *pictures.shape[1:3])
    return pictures, plan, adapter.prepare(pictures, plan), adapter.prompt("What is this?", plan, SECONDS)


def patchify_by_loops(pixels, patch, merge):
    """(frames of one group, 3, h, w) -> rows in the order of Qwen's towers, one number at a time."""
    rows = []
    for cell_y, cell_x in itertools.product(
        range(pixels.shape[2] // patch // merge), range(pixels.shape[3] // patch // merge)
    ):
        for dy, dx in itertools.product(range(merge), range(merge)):
            y, x = (cell_y * merge + dy) * patch, (cell_x * merge + dx) * patch
            rows.append(
                torch.cat([pixels[f, c, y : y + patch, x : x + patch].flatten() for c in range(3) for f in range(2)])
            )
    return torch.stack(rows)


def own_inputs(adapter, video):
    """What the family's own model takes for the same video and text, made from the prompt's ids and the resized pixels."""
    pictures, plan, _, prompt = video
    pixels = adapter.pixels(pictures, plan.height, plan.width)
    token = adapter.model.config.video_token_id
    ids = torch.where(prompt.input_ids < 0, token, prompt.input_ids)[None]
    if not hasattr(adapter, "patch"):
        return {"input_ids": ids, "pixel_values_videos": pixels[None]}
    pixels = torch.cat([pixels, pixels[-1:]])
    patches = torch.cat([patchify_by_loops(p, adapter.patch, adapter.merge) for p in pixels.split(2)])
    t, h, w = plan.grid
    inputs = {
        "input_ids": ids,
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([[t, h * adapter.merge, w * adapter.merge]]),
        "mm_token_type_ids": torch.where(ids == token, 2, 0),
    }
    if adapter.planes == 0:
        inputs["second_per_grid_ts"] = torch.tensor([0.8])
    return inputs


def run(adapter, prompt, tokens, kept, cache=None):
    """Logits of the reduced prompt, on one rank."""
    short = prompt.keep(kept)
    rows = splice(adapter, short.input_ids, tokens.x[kept])
    planes = {}
    if adapter.planes:
        planes = {"planes": tokens.channels["planes"][kept], "visual_rows": short.visual_slots}
    return short, adapter.logits(adapter.forward(rows, short.positions, cache, **planes))


def test_the_plan_counts_the_tokens(adapter, video, family):
    _, plan, tokens, prompt = video
    groups, cell = {"llava": (7, (3, 3))}.get(family, (4, None))
    assert plan.grid[0] == groups
    assert cell is None or plan.grid[1:] == cell
    assert tokens.x.shape == (plan.tokens, adapter.hidden_size)
    assert tokens.grid == (plan.grid,)
    assert prompt.visual_slots.numel() == plan.tokens
    assert int((prompt.input_ids == NEWLINE).sum()) == (family == "llava")


def test_unreduced_logits_equal_the_own_model(adapter, video):
    _, plan, tokens, prompt = video
    adapter.model.model.rope_deltas = None
    with torch.no_grad():
        expected = adapter.model(**own_inputs(adapter, video), use_cache=False).logits
    _, got = run(adapter, prompt, tokens, torch.arange(plan.tokens))
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


def test_reduced_logits_equal_the_own_model_with_the_pruned_rows_masked(adapter, video):
    _, plan, tokens, prompt = video
    kept = torch.randperm(plan.tokens, generator=torch.Generator().manual_seed(1))[: plan.tokens // 3].sort().values
    short, got = run(adapter, prompt, tokens, kept)
    stays = torch.ones(prompt.input_ids.numel(), dtype=torch.bool)
    stays[prompt.visual_slots] = False
    stays[prompt.visual_slots[kept]] = True
    length = stays.numel()
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (stays[None] | torch.eye(length, dtype=torch.bool))
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = prompt.positions if adapter.position_axes == 1 else prompt.positions[:, None]
    with torch.no_grad():
        expected = adapter.model(
            **own_inputs(adapter, video), attention_mask=mask, position_ids=positions, use_cache=False
        ).logits[:, stays]
        whole = adapter.model(**own_inputs(adapter, video), position_ids=positions, use_cache=False).logits[:, stays]
    assert torch.equal(short.positions, prompt.positions[:, stays])
    assert (got - expected).abs().max() < 1e-4
    assert (got - whole).abs().max() > 1e-2


def test_positions_equal_the_models_own(adapter, video):
    _, _, _, prompt = video
    if adapter.position_axes == 1:
        assert torch.equal(prompt.positions, torch.arange(prompt.input_ids.numel())[None])
        assert prompt.next_position == prompt.input_ids.numel()
        return
    inputs = own_inputs(adapter, video)
    del inputs["pixel_values_videos"]
    expected, delta = adapter.model.model.get_rope_index(**inputs)
    assert torch.equal(prompt.positions, expected[:, 0])
    assert prompt.next_position == prompt.input_ids.numel() + int(delta)


def test_numbers_do_not_depend_on_how_frames_are_cut(adapter, video):
    pictures, plan, tokens, _ = video
    step = plan.frames_per_group
    for cuts in ([0, step, FRAMES], [0, 2 * step, 2 * step, 3 * step, FRAMES], [0, 3 * step, FRAMES]):
        runs = [adapter.prepare(pictures[a:b], plan, first=a) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([r.x for r in runs]), tokens.x)
        assert torch.equal(torch.cat([r.positions for r in runs], dim=1), torch.arange(plan.tokens)[None])
        if adapter.planes:
            planes = torch.cat([r.channels["planes"] for r in runs])
            assert torch.equal(planes, tokens.channels["planes"])


def grow(adapter, prompt, tokens, kept, steps):
    """Greedy tokens by running the whole reduced sequence again for each."""
    made, short = [], prompt.keep(kept)
    ids, positions = short.input_ids, short.positions
    planes = {}
    if adapter.planes:
        planes = {"planes": tokens.channels["planes"][kept], "visual_rows": short.visual_slots}
    for step in range(steps):
        logits = adapter.logits(adapter.forward(splice(adapter, ids, tokens.x[kept]), positions, **planes)[:, -1])
        made.append(logits)
        ids = torch.cat([ids, logits.argmax(-1)])
        at = torch.full((positions.shape[0], 1), prompt.next_position + step)
        positions = torch.cat([positions, at], dim=1)
    return torch.cat(made)


def spread_decode(group, copies, prompt, tokens, kept, steps):
    """The way of the launcher: this rank's rows of the reduced prompt, then tokens one by one."""
    rank, world = connect(group).rank, connect(group).world
    adapter, short = copies[rank], prompt.keep(kept)
    layout = Layout.zigzag(short.input_ids.numel(), world)
    mine = layout.positions(rank)
    order = (short.input_ids == VISUAL).cumsum(0) - 1  # of each slot: which kept row it takes
    local_ids = short.input_ids[mine]
    taken = kept[order[mine][local_ids == VISUAL]]
    planes = {}
    if adapter.planes:
        planes = {
            "planes": tokens.channels["planes"][taken],
            "visual_rows": (local_ids == VISUAL).nonzero().flatten(),
        }
    cache, made = SpreadCache(layout, group), []
    with sequence_parallel(adapter.text_model, group, layout, "tokenring"):
        rows = splice(adapter, local_ids, tokens.x[taken])
        hidden = adapter.forward(rows, short.positions[:, mine], cache, **planes)
        last = adapter.logits(layout.gather(hidden, group)[:, -1])
        for step in range(steps):
            made.append(last)
            at = torch.full((adapter.position_axes, 1), prompt.next_position + step)
            hidden = adapter.forward(adapter.embed(last.argmax(-1))[None], at, cache)
            last = adapter.logits(hidden[:, -1])
    return torch.cat(made)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_several_ranks_give_the_logits_of_one(adapter, video, world):
    _, plan, tokens, prompt = video
    kept = torch.arange(0, plan.tokens, 2)
    expected = grow(adapter, prompt, tokens, kept, 4)
    copies = [copy.deepcopy(adapter) for _ in range(world)]
    for got in run_local(world, spread_decode, copies, prompt, tokens, kept, 4):
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
        assert (got - expected).abs().max() < 1e-4


def test_the_prompt_is_the_familys(adapter, video, family):
    _, _, _, prompt = video
    shown = adapter.tokenizer.decode(prompt.input_ids[prompt.input_ids >= 0])
    block = "<|vision_start|><|vision_end|>"
    expected = {
        "qwen25": block,
        "qwen3": "".join(f"<{s} seconds>{block}" for s in ("0.2", "1.0", "1.8", "2.4")),
        "llava": "\n",
    }[family]
    assert shown == f"<|im_start|>user\n{expected}What is this?<|im_end|>\n<|im_start|>assistant\n"
    assert adapter.eos_ids == {tiny_models.IDS["<|im_end|>"]}
    assert adapter.decode([72, *adapter.eos_ids]) == adapter.decode([72])


def test_what_does_not_fit_is_refused(adapter, video, family):
    pictures, plan, tokens, prompt = video
    with pytest.raises(ValueError, match=r"seconds has 2 entries for the video's 7 frames"):
        adapter.prompt("x", plan, [0.0, 1.0])
    token = adapter.tokenizer.convert_ids_to_tokens(adapter.model.config.video_token_id)
    with pytest.raises(ValueError, match="out of the text"):
        adapter.prompt(f"what is {token}?", plan, SECONDS)
    with pytest.raises(ValueError, match="gives no cls_attn"):
        adapter.prepare(pictures, plan, channels=["cls_attn"])
    with pytest.raises(ValueError, match=r"within the video's 7 frames"):
        adapter.prepare(pictures, plan, first=2)
    if plan.frames_per_group == 2:
        with pytest.raises(ValueError, match="multiple of 2"):
            adapter.prepare(pictures[:3], plan)
    with pytest.raises(ValueError, match=r"nothing to encode|2 frames or more"):
        adapter.visual_plan(0, 40, 60)
    with pytest.raises(ValueError, match="must ascend"):
        prompt.keep(torch.tensor([3, 2]))
    with pytest.raises(ValueError, match=r"visual slots and 1 visual rows"):
        splice(adapter, prompt.input_ids, tokens.x[:1])
    with pytest.raises(ValueError, match="planes"):
        adapter.forward(
            torch.zeros(1, 1, 48), prompt.positions[:, :1], planes=torch.zeros(1, 9, 48), visual_rows=torch.tensor([0])
        )
    with pytest.raises(ValueError, match="visual rows have no embedding"):
        adapter.embed(torch.tensor([VISUAL]))


def test_a_rank_without_frames_gets_no_rows(adapter, video):
    pictures, plan, _, _ = video
    tokens = adapter.prepare(pictures[:0], plan, first=0)
    assert tokens.x.shape == (0, adapter.hidden_size)
    assert tokens.grid == ((0, *plan.grid[1:]),)


def test_half_precision_runs_and_stays_close(family, adapter, video, tmp_path):
    pictures, plan, tokens, prompt = video
    source = tiny_models.MAKERS[family](tmp_path / "model")
    half = load(source, torch.bfloat16)
    half.model.load_state_dict(adapter.model.state_dict())
    rows = half.prepare(pictures, plan)
    assert rows.x.dtype == torch.bfloat16
    kept = torch.arange(0, plan.tokens, 3)
    _, got = run(half, prompt, rows, kept)
    _, expected = run(adapter, prompt, tokens, kept)
    assert got.dtype == torch.float32
    assert (got - expected).abs().mean() < 0.1 * expected.std()
