"""What methods refuse: channels of another shape, options outside their range or without effect, what is no batch."""

from __future__ import annotations

import pytest
import torch

from tests.token_reduction.cases import batch
from token_reduction import Budget, build


@pytest.mark.parametrize(
    ("name", "options", "channel", "value", "message"),
    [
        ("mmtok", {}, "text", torch.zeros(3, 5), r"text with x: give finite rows \(m, 12\)"),
        ("catp", {}, "text", torch.zeros(0, 12), "m >= 1"),
        ("cdpruner", {}, "patches", torch.zeros(131, 7), "text with patches"),
        (
            "dart",
            {"keys": True, "text_pivots": 2},
            "text",
            torch.zeros(3, 12),
            r"text with keys: give finite rows \(m, 6\)",
        ),
        (
            "prumerge",
            {"variant": "released"},
            "cls_logits",
            torch.zeros(131, 2, 2),
            r"cls_logits as \(N,\) or \(N, heads\)",
        ),
        ("vtc_cls", {}, "cls_attn", torch.zeros(131, 2, 2), r"cls_attn as \(N,\) or \(N, layers\)"),
        ("visionzip", {}, "keys", torch.full((131, 4), float("nan")), "compares keys and it holds NaN"),
        ("tome", {}, "keys", torch.zeros(131), r"keys as \(N, C\) or \(N, H, d\), got \(131,\)"),
        ("vtc_cls", {}, "cls_attn", torch.zeros(131, 0), r"got \(131, 0\)"),
        ("difffp", {}, "pixels", 255 * torch.rand(131, 4, 3), "pixels in 0..1, got .* divide bytes by 255"),
        ("vflowopt", {"heads": 4}, "cls_attn", torch.zeros(131), "multiple of 4 heads"),
        ("globalcom2", {"crops": (3, 3)}, "cls_attn", torch.rand(131), "4 frames after its thumbnail"),
    ],
)
def test_channels_of_another_shape_are_refused_before_anything_is_sent(name, options, channel, value, message):
    tokens = batch()
    channels = {**tokens.channels, channel: value}
    wrong = type(tokens)(tokens.x, tokens.cu_seqlens, tokens.grid, tokens.positions, channels)
    with pytest.raises(ValueError, match=message):
        build(name, **options).reduce(wrong, Budget.ratio(0.5))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("todre", {"diversity": "sum"}, "k-center or max-sum or None"),
        ("facility", {"sampler": "greedy"}, "exact or stochastic"),
        ("facility", {"sampler": "stochastic", "accuracy": 1.0}, "between 0 and 1"),
        ("visionzip", {"contextual": 1.0}, "between 0 and 1"),
        ("centerclip", {"algorithm": "k-means"}, "k-medoids or spectral"),
        ("tome", {"per_round": 0}, "a whole number of 1 or more"),
        ("tome", {"per_round": 1.5}, "a whole number"),
        ("cdpruner", {"block": 0}, "1 or more or None"),
        ("dart", {"pivots": 0}, "1 or more"),
        ("vflowopt", {"m": 0.5}, "a finite number of 1 or more"),
        ("vispruner", {"important": 1.5}, "from 0 to 1"),
        ("holitom", {"longest": 0}, "1 or more"),
        ("token_transforming", {"sources": 0}, "1 or more"),
        ("token_transforming", {"temperature": float("nan")}, "a finite number"),
        ("vmtc", {"primary": 2.0}, "from 0 to 1"),
        ("hiprune", {"alpha": -1}, "from 0 to 5"),
        ("fastvid", {"merged": 1.5}, "from 0 to 1"),
        ("vidcom2", {"temperature": 0}, "above 0"),
        ("mmtok", {"alpha": -0.5}, "0 or more"),
        ("mmtok", {"text_temperature": 0.0}, "above 0 or None"),
        ("divprune", {"center": "yes"}, "true or false"),
        ("random", {"seed": None}, "a whole number"),
        ("globalcom2", {"crops": 4}, r"give \(lines, columns\)"),
        ("globalcom2", {"image": (0, 3)}, r"give \(height, width\)"),
    ],
)
def test_options_outside_their_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "beside"),
    [
        ("difffp", {"threshold": 0.3}, "variant='best'"),
        ("setok", {"threshold": 0.3}, "variant='best'"),
        ("correlation", {"tau": 0.5}, "variant='best'"),
        ("prumerge_plus", {"attended": 0.5, "variant": "paper"}, "variant='paper'"),
        ("facility", {"accuracy": 0.2}, "sampler='exact'"),
        ("centerclip", {"sigma": 1.0}, "algorithm='k-medoids'"),
        ("centerclip", {"algorithm": "spectral", "neighbours": 3}, "graph='heat'"),
        ("vflowopt", {"recycle": False, "m": 3.0}, "recycle=False"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(name, options, beside):
    with pytest.raises(ValueError, match=f"which {beside} does not look at; leave it out"):
        build(name, **options)


def test_downsample_names_itself_and_the_item_whose_budget_is_too_small():
    with pytest.raises(ValueError, match="downsample keeps at least one token per frame: item 1 has 9 frames"):
        build("downsample").count([(2, 2, 2), (9, 2, 2)], Budget.count(8))


def test_what_is_no_batch_or_no_generator_is_refused():
    with pytest.raises(ValueError, match="reduces VisualTokens, got Tensor"):
        build("uniform").reduce(torch.zeros(8, 4), Budget.count(2))
    with pytest.raises(ValueError, match="Generator, got 3"):
        build("random").reduce(batch(), Budget.count(2), generator=3)
