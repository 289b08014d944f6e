"""Layer forms: the full run under masks, with the textbook formula, is the oracle."""

from __future__ import annotations

import torch

from tests.token_reduction.inside_cases import FFN, WIDTH, best, decoder, full_map, prompt
from token_reduction.inside import (
    VISUAL,
    Mod,
    ModRouters,
    Naavit,
    VisualProjectors,
    Yopo,
    decode,
    prefill,
    vote_heads,
    vtw,
)


def test_yopo_window_heads_and_feed_forward_equal_masks_on_the_full_run():
    blocks, p = decoder(4), prompt()
    form = Yopo(window=3, heads=((), (), (1,), (0, 3)), ffn=0.25)
    state = prefill(blocks, p, vtw(4), form)  # layer drop after the third layer is a schedule like any other
    rows, visual, hidden = torch.arange(len(p.kinds)), p.kinds == VISUAL, p.hidden
    apart = (p.cells[:, None] - p.cells).abs().amax(-1)
    near = (apart <= 1) & (p.frames[:, None] == p.frames)
    allowed = torch.where(visual[:, None] & visual, near, rows[:, None] >= rows)
    for layer, block in enumerate(blocks):
        a, _, v = full_map(block, hidden, p.positions, allowed)
        for head in form.heads[layer]:
            a[head, :, visual] = 0.0
            a[head, visual] = 0.0
        share = torch.where(visual, 0.25, 1.0)
        hidden = block.finish(hidden, torch.einsum("hqk,khd->qhd", a, v), share)
    torch.testing.assert_close(state.hidden, hidden[~visual], atol=1e-10, rtol=1e-10)
    new = torch.randn(1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = decode(blocks, prefill(blocks, p, None, form), new)
    headed = decode(blocks, prefill(blocks, p, None, form), new, form)
    assert not torch.allclose(plain, headed)  # heads stay cut off from the picture while decoding
    assert round(0.25 * FFN) == 6


def test_vote_heads_needs_a_majority_of_samples_and_spares_the_first_layers():
    shares = torch.tensor([[[0.01, 0.5]] * 3, [[0.01, 0.01]] * 3, [[0.5, 0.5]] * 3])
    assert vote_heads(shares, 0.1) == ((), (), (0,))
    assert vote_heads(shares, 0.1, exempt=0) == ((0,), (0,), (0,))


def test_naavit_asks_nothing_of_visual_rows_and_costs_no_feed_forward_for_them():
    blocks, p = decoder(3), prompt()
    torch.manual_seed(0)
    features = torch.randn(24, 7, dtype=torch.float64)
    projectors = VisualProjectors(7, WIDTH, 3).double()
    state = prefill(blocks, p, None, Naavit(features=features, projectors=projectors))
    rows, visual, hidden = torch.arange(len(p.kinds)), p.kinds == VISUAL, p.hidden.clone()
    for layer, block in enumerate(blocks):
        hidden[visual] = projectors(features, layer).detach()
        a, _, v = full_map(block, hidden, p.positions, rows[:, None] >= rows)
        out = block.finish(hidden, torch.einsum("hqk,khd->qhd", a, v), torch.ones(len(rows)))
        hidden = torch.where(visual[:, None], hidden, out)
    torch.testing.assert_close(state.hidden[~visual], hidden[~visual], atol=1e-10, rtol=1e-10)


def test_mod_rows_that_pass_by_come_back_after_the_layer():
    blocks, p = decoder(3), prompt()
    torch.manual_seed(1)
    routers = ModRouters(WIDTH, 3).double()
    form = Mod(routers=routers, share=0.25, layers=(1,))
    state = prefill(blocks, p, None, form)
    rows, visual, hidden = torch.arange(len(p.kinds)), p.kinds == VISUAL, p.hidden
    for layer, block in enumerate(blocks):
        through = torch.ones_like(visual)
        if layer == 1:
            score = routers(hidden, 1)
            for frame in range(3):
                own = (p.frames == frame).nonzero()[:, 0].tolist()
                through[[r for r in own if r not in best(score, own, 2)]] = False
        a, _, v = full_map(
            block, hidden, p.positions, (rows[:, None] >= rows) & (through | torch.eye(len(rows)).bool())
        )
        out = block.finish(hidden, torch.einsum("hqk,khd->qhd", a, v), torch.ones(len(rows)))
        hidden = torch.where(through[:, None], out, hidden)
    torch.testing.assert_close(state.hidden, hidden, atol=1e-10, rtol=1e-10)
    assert [len(c.rows) for c in state.caches] == [32, 8 + 6, 32]
