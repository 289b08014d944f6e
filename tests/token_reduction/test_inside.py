"""Policies inside the model: the masked full run is the oracle of prefill and decoding; full attention maps that of probes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.token_reduction.inside_cases import WIDTH, best, decoder, everything, full_map, masked_run, prompt
from token_reduction.inside import (
    TEXT,
    VISUAL,
    CatpStage2,
    Form,
    Probe,
    Scheduled,
    ToDREStage2,
    VisionDropStages,
    Yopo,
    adatoken,
    aim,
    decode,
    fastv,
    prefill,
    psigmoid,
    pyramiddrop,
    run,
    sparsevlm,
    vflowopt,
    vtw,
)

POLICIES = [
    fastv(1, 0.25),
    pyramiddrop(6),
    sparsevlm(0.3, (1, 3), recycle=0.5),
    aim(6, start=2, length=3),
    vtw(3),
    vflowopt(0.5, 0.5, (2, 4)),
    adatoken({0: 0.75, 2: 0.5, 4: 0.125}),
    psigmoid(6, 1.5, 2.5, floor=0.1),
    ToDREStage2(layer=3, tau=2.0),
    ToDREStage2(layer=3, tau=0.0),
    VisionDropStages(stages={1: (8, 3), 3: (4, 2)}),
    CatpStage2(layer=2, keep=0.5),
]


@pytest.mark.parametrize("planes", [False, True], ids=["", "deepstack"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_prefill_and_decoding_after_reduction_equal_the_masked_full_run(policy, planes):
    blocks, p = decoder(), prompt(planes=planes)
    steps = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    state = prefill(blocks, p, policy)
    alive = [rows.clone() for rows in state.alive]
    replaced = {}
    for layer, decision in state.decisions.items():
        if decision.matrix is not None:
            visual = alive[layer][p.kinds[alive[layer]] == VISUAL]
            replaced[layer] = (visual[decision.keep], decision.matrix, visual)
    decoded = torch.cat([decode(blocks, state, steps[i : i + 1]) for i in range(3)])
    deep = None
    if planes:
        deep = torch.zeros(len(p.kinds), *p.planes.shape[1:], dtype=torch.float64)
        deep[p.kinds == VISUAL] = p.planes
    expected = masked_run(blocks, p.hidden, p.positions, alive, replaced, steps, deep)
    torch.testing.assert_close(state.hidden, expected[: len(p.kinds)][state.rows], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(decoded, expected[len(p.kinds) :], atol=1e-9, rtol=1e-9)
    text = (p.kinds != VISUAL).nonzero()[:, 0]
    for before, after in pairwise([*alive, state.rows]):
        assert set(after.tolist()) <= set(before.tolist())
        assert set(text.tolist()) <= set(after.tolist())  # text never leaves
    for cache, rows in zip(state.caches, alive, strict=True):
        assert cache.rows.tolist() == [*rows.tolist(), *range(len(p.kinds), len(p.kinds) + 3)]
        assert cache.k.shape[0] == cache.v.shape[0] == len(cache.rows)
    if policy.name != "todre_stage2" or policy.tau > 0:
        assert len(state.rows) < len(p.kinds)


def visual_counts(policy, layers=6, **options):
    p = prompt(**options)
    state = prefill(decoder(layers), p, policy)
    return [int((p.kinds[rows] == VISUAL).sum()) for rows in [*state.alive, state.rows]]


def test_schedules_keep_the_published_counts():
    assert visual_counts(fastv(2, 0.25)) == [24, 24, 24, 6, 6, 6, 6]
    assert visual_counts(pyramiddrop(8), 8) == [24, 24, 12, 12, 6, 6, 3, 3, 3]
    assert visual_counts(vtw(4)) == [24, 24, 24, 24, 0, 0, 0]
    assert visual_counts(VisionDropStages(stages={1: (8, 3), 3: (4, 2)})) == [24, 24, 11, 11, 6, 6, 6]
    assert visual_counts(Scheduled(schedule={0: 7, 3: 0.0})) == [24, 7, 7, 7, 0, 0, 0]
    assert aim(28).mean_share(28) == pytest.approx(0.625)
    assert visual_counts(aim(6, start=2, length=4)) == [24, 24, 18, 12, 6, 0, 0]
    stages = [48, 35, 26, 19]  # VisionDrop: 30+5, 22+4, 16+3 after 8, 16, 24 of 32 layers
    assert sum(stages) / 4 == 32 == sum(sum(s) for s in [(42, 6), *VisionDropStages().stages.values()]) / 4


def test_a_plan_is_json_and_a_wrong_one_is_refused():
    for policy in POLICIES[:8]:
        again = Scheduled.from_json(policy.to_json())
        assert again == policy and hash(again) == hash(policy)
    for text, message in (("{", "no plan"), ('{"layers": 3}', "no plan"), ('{"scorer": "x"}', "unknown scorer")):
        with pytest.raises(ValueError, match=message):
            Scheduled.from_json(text)
    with pytest.raises(ValueError, match="or a whole number of rows above 1"):
        Scheduled(schedule={3: -0.1})


def first_layer(policy):
    """What the policy keeps after layer 0, as rows of the prompt."""
    p = prompt()
    state = prefill(decoder(1), p, policy)
    return p, [r for r in state.rows.tolist() if p.kinds[r] == VISUAL]


def test_scorers_keep_what_the_full_map_ranks_first():
    p, a, v, _, _logits = everything()
    visual = (p.kinds == VISUAL).nonzero()[:, 0].tolist()
    text = (p.kinds == TEXT).nonzero()[:, 0]
    last, mean = a[:, -1].mean(0), a[:, text].mean((0, 1))
    looks = a[:, text][..., visual].sum(-1).mean(0)
    raters = a[:, text[looks >= looks.mean()]].mean((0, 1))
    norm = v[:, ::2].flatten(1).norm(dim=1)
    for scorer, score in (
        ("last_row", last),
        ("raters", raters),
        ("from_visual", a[:, visual].mean((0, 1))),
        ("flow", mean * norm),
        ("carried", p.importance),
    ):
        assert first_layer(Scheduled(schedule={0: 7}, scorer=scorer))[1] == best(score, visual, 7)


def test_recycled_rows_join_their_nearest_kept_row():
    p = prompt()
    state = prefill(decoder(1), p, Scheduled(schedule={0: 6}, recycle=0.5))
    matrix = state.decisions[0].matrix
    assert matrix.shape == (6, 24)
    assert int((matrix > 0).sum()) == 6 + 9  # half of the 18 that left
    torch.testing.assert_close(matrix.sum(1), torch.ones(6, dtype=torch.float64))


def test_visiondrop_dominant_rows_and_targets():
    p, a, *_ = everything()
    visual = (p.kinds == VISUAL).nonzero()[:, 0].tolist()
    dominant = best(a[:, visual].mean((0, 1)), visual, 8)
    others = [r for r in visual if r not in dominant]
    targets = others[:: len(others) // 3][:3]
    _, kept = first_layer(VisionDropStages(stages={0: (8, 3)}))
    assert kept == sorted([*dominant, *targets])


def test_visiondrop_scores_with_the_next_layers_queries_and_keys():
    p, blocks, policy = prompt(), decoder(2), VisionDropStages(stages={0: (8, 0)})
    visual, rows = (p.kinds == VISUAL).nonzero()[:, 0].tolist(), torch.arange(len(p.kinds))
    after = prefill(blocks[:1], p).hidden
    maps = [full_map(blocks[0], p.hidden, p.positions, rows[:, None] >= rows)[0],
            full_map(blocks[1], after, p.positions, rows[:, None] >= rows)[0]]  # fmt: skip
    for ahead in (False, True):
        state = prefill(blocks, p, replace(policy, ahead=ahead))
        kept = [row for row in state.rows.tolist() if row in visual]
        assert kept == best(maps[ahead][:, visual].mean((0, 1)), visual, 8)


def test_todre_drops_all_exactly_when_both_shares_are_below_tau():
    p, a, *_ = everything()
    text, visual = p.kinds == TEXT, p.kinds == VISUAL
    shares = [a[:, text][..., visual].sum(-1).mean().item(), a[:, visual][..., text].sum(-1).mean().item()]
    for tau, left in ((max(shares) * 1.01, 0), (max(shares) * 0.99, 24)):
        assert len(first_layer(ToDREStage2(layer=0, tau=tau))[1]) == left


def test_catp_prunes_context_first_and_the_query_a_layer_later():
    p = prompt()
    state = prefill(decoder(), p, CatpStage2(layer=2, keep=0.5))
    context, query = (int(((p.samples == s) & (p.kinds == VISUAL)).sum()) for s in (0, 1))
    counts = [[int(((p.samples[r] == s) & (p.kinds[r] == VISUAL)).sum()) for s in (0, 1)] for r in state.alive]
    assert counts == [[context, query]] * 3 + [
        [context // 2, query],
        [context // 2, query // 2],
        [context // 2, query // 2],
    ]


def test_what_cannot_be_asked_is_refused_in_one_line():
    p, _, _, probe, _ = everything()
    with pytest.raises(ValueError, match=r"lse is \(H, Sq\)"):
        Probe(probe.q, probe.k, probe.lse.T, probe.q_order, probe.k_order)
    with pytest.raises(ValueError, match="odd side"):
        Yopo(window=4)
    bare = type(p)(p.hidden, p.positions, p.kinds)
    for policy, form, message in (
        (vflowopt(0.5, 0.5, (1, 2)), Form(), "needs Prompt.importance"),
        (CatpStage2(layer=1), Form(), "needs Prompt.samples"),
        (None, Yopo(window=3), "needs Prompt.cells"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(decoder(3), bare, policy, form)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Scheduled(schedule={1.5: 0.5}), "whole numbers from 0, got 1.5"),
        (lambda: Scheduled(schedule={-1: 0.5}), "whole numbers from 0, got -1"),
        (lambda: Scheduled(schedule={1: 2.5}), "got 2.5 for layer 1"),
        (lambda: Scheduled(schedule={1: float("nan")}), "got nan for layer 1"),
        (lambda: Scheduled(schedule=[1]), "maps layers to shares"),
        (lambda: vtw(0), "before layer 1 or later"),
        (lambda: pyramiddrop(3), "give 4 or more"),
    ],
)
def test_schedules_that_mean_nothing_are_refused_and_never_rounded(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("policy", [Scheduled(schedule={9: 0.5}), ToDREStage2(), CatpStage2(layer=8)], ids=str)
def test_a_policy_that_acts_after_a_layer_the_model_lacks_is_refused(policy):
    with pytest.raises(ValueError, match="the model has layers 0 to 5"):
        prefill(decoder(), prompt(), policy)


def test_attention_goes_by_runs_of_rows_and_gives_the_same(monkeypatch):
    blocks, p = decoder(), prompt()
    form = Yopo(window=3, heads=((), (1,), (0, 2)), ffn=0.5)
    whole = prefill(blocks, p, fastv(1, 0.5), form)
    monkeypatch.setattr(run, "SCORES_AT_ONCE", 4 * 7 * len(p.kinds))
    pieces = prefill(blocks, p, fastv(1, 0.5), form)
    assert torch.equal(whole.rows, pieces.rows)
    torch.testing.assert_close(whole.hidden, pieces.hidden, atol=1e-12, rtol=0)
