"""Learned compressors: exact shapes, published counts, what each form promises. That they learn: `test_modules_learn`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from token_reduction.modules import (
    BiLevelRouting,
    CrossLMM,
    Matryoshka,
    QueCC,
    RegisterEncoder,
    SlotAttention,
    SpatialTokens,
    TokenFlex,
    TokenPacker,
    TokenShuffle,
    VisionRemember,
)

C, CLASSES = 8, 4


def test_the_question_decides_what_quecc_carries():
    """The map marks two cells; the question says which of the two classes is asked for."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    module, reader = QueCC(C, 1, 2, 12, 4, 2), nn.Linear(12, CLASSES)
    optimiser = torch.optim.Adam([*module.parameters(), *reader.parameters()], lr=5e-3)

    def draw(n):
        x = 0.3 * torch.randn(n, 16, C, generator=g)
        labels = torch.randint(CLASSES, (n, 2), generator=g)
        which = torch.randint(2, (n,), generator=g)
        for side in (0, 1):
            cells = torch.randint(8, (n,), generator=g) * 2 + side
            x[torch.arange(n), cells, labels[:, side]] += 2.0
            x[torch.arange(n), cells, 6 + side] += 3.0
        return x.view(n, 4, 4, C), nn.functional.one_hot(which, 2).float(), labels[torch.arange(n), which]

    for _ in range(300):
        x, question, label = draw(64)
        loss = nn.functional.cross_entropy(reader(module(x, x, question)).flatten(0, 1), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, question, label = draw(512)
    with torch.no_grad():
        right = float((reader(module(x, x, question))[:, 0].argmax(1) == label).float().mean())
        wrong = float((reader(module(x, x, 1 - question))[:, 0].argmax(1) == label).float().mean())
    assert right > 0.6 > wrong + 0.1


def test_matryoshkas_sets_are_nested():
    module, x = Matryoshka((1, 2, 4)), torch.randn(2, 4, 4, C)
    fine = module(x, 0).view(-1, 2, 2, 2, 2, C).mean((2, 4)).reshape(-1, 4, C)
    torch.testing.assert_close(module(x, 1), fine)
    torch.testing.assert_close(module(x, 2)[:, 0], x.mean((1, 2)))


def test_shuffle_learns_to_come_back_whole():
    torch.manual_seed(0)
    g, module = torch.Generator().manual_seed(0), TokenShuffle(C, 2)
    optimiser = torch.optim.Adam(module.parameters(), lr=5e-3)
    basis = torch.randn(2, C, generator=g)  # maps of rank 2: 4 x 2 numbers fit in one folded token
    for _ in range(300):
        x = torch.randn(32, 4, 4, 2, generator=g) @ basis
        loss = nn.functional.mse_loss(module.unfold(module.fold(x), 4, 4), x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.1 * float((basis**2).sum() / C)


def test_biformer_reading_every_region_is_plain_attention():
    torch.manual_seed(0)
    module, x = BiLevelRouting(C, 2, 2, 4).double(), torch.randn(2, 4, 6, C, dtype=torch.float64)
    q, k, v = (p.flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2) for p in module.qkv(x).chunk(3, -1))
    mixed = torch.softmax(q @ k.mT / 2.0, -1) @ v
    near = module.near(module.qkv(x)[..., 2 * C :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = module.out(mixed.transpose(1, 2).flatten(2).view(2, 4, 6, C) + near)
    torch.testing.assert_close(module(x), expected)


def test_biformer_reads_only_the_regions_it_chose():
    torch.manual_seed(0)
    module, x = BiLevelRouting(C, 2, 2, 1), torch.randn(1, 4, 4, C, requires_grad=True)
    with torch.no_grad():
        module.near.weight.zero_()
    module(x)[0, 0, 0].sum().backward()
    touched = {(int(i) // 2, int(j) // 2) for i, j in x.grad[0].abs().sum(-1).nonzero()}
    assert len(touched) <= 2  # its own region asks, one region answers


def test_slots_share_out_tokens_and_gates_begin_closed():
    _, share = SlotAttention(C, 3)(torch.randn(2, 10, C))
    torch.testing.assert_close(share.sum(1), torch.ones(2, 10))
    module, frames, text = CrossLMM(C, 2, 2), torch.randn(1, 2, 4, 4, C), torch.randn(1, 3, C)
    few = module.pool(frames)
    assert all(torch.equal(a, b) for a, b in zip(module(few, text, frames), (few, text), strict=True))


@pytest.mark.parametrize(("scale", "count"), [(2, 144), (3, 64), (4, 36)])
def test_token_packer_has_the_published_counts(scale, count):
    module = TokenPacker(8, 4, 16, scale, 2)
    assert module(torch.zeros(1, 24, 24, 8), torch.zeros(1, 24, 24, 32)).shape == (1, count, 16)
    assert [Matryoshka()(torch.zeros(1, 24, 24, 2), i).shape[1] for i in range(5)] == [576, 144, 36, 9, 1]


def test_token_flex_draws_its_count_in_training_and_takes_the_largest_after():
    module, g = TokenFlex(C, 4, (1, 4, 16)), torch.Generator().manual_seed(0)
    assert {module(torch.zeros(1, 8, 8, C), generator=g).shape[1] for _ in range(40)} == {1, 4, 16}
    assert module.eval()(torch.zeros(1, 8, 8, C)).shape[1] == 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TokenPacker(C, 1, 4, 3, 2)(torch.zeros(1, 4, 4, C), torch.zeros(1, 4, 4, C)), "no multiple"),
        (lambda: TokenPacker(C, 1, 4, 2, 3), "does not divide into 3 heads"),
        (lambda: TokenFlex(C, 4, (5,)), "square grids"),
        (lambda: SpatialTokens(C, 4, (6,), heads=2)(torch.zeros(1, 4, 4, C)), "side 6"),
        (lambda: RegisterEncoder(C, 2, 1, 2)(torch.zeros(1, 4, C)), "registers go with"),
        (lambda: TokenShuffle(6, 2), "do not divide"),
        (lambda: TokenShuffle(C, 2).unfold(torch.zeros(1, 3, C), 4, 4), "not 4 x 4"),
        (lambda: VisionRemember(C, C, 1, 2, 2)(torch.zeros(1, 3, C), [torch.zeros(1, 4, 4, C)]), "4 cells for 3"),
        (lambda: CrossLMM(C, 2, 2)(torch.zeros(1, 3, C), torch.zeros(1, 1, C), torch.zeros(1, 1, 4, 4, C)), "4 pooled"),
        (lambda: BiLevelRouting(C, 2, 2, 5), "5 of 4 regions"),
        (lambda: Matryoshka((2, 2)), "strides rise"),
        (lambda: Matryoshka((2, 3)), "a multiple of the one before"),
        (lambda: Matryoshka((1, 2))(torch.zeros(1, 4, 4, C), 2), "levels are 0 to 1"),
        (
            lambda: TokenPacker(C, 1, 4, 2, 2)(torch.zeros(1, 4, 4, C), torch.zeros(1, 6, 4, C)),
            "one grid on all levels",
        ),
        (lambda: RegisterEncoder(C, 0, 1, 2), "registers is 0"),
        (lambda: RegisterEncoder(C, 2, 1, 3), "does not divide into 3 heads"),
        (lambda: SlotAttention(C, 2, steps=0), "steps is 0"),
        (lambda: SlotAttention(C, 2)(torch.zeros(1, 4, C + 1)), "SlotAttention takes"),
        (lambda: CrossLMM(C, 2, 3), "does not divide into 3 heads"),
        (
            lambda: CrossLMM(C, 2, 2)(torch.zeros(1, 4, C), torch.zeros(1, 1, 3), torch.zeros(1, 1, 4, 4, C)),
            "CrossLMM's text takes",
        ),
        (
            lambda: QueCC(C, 1, 5, 4, 2, 2)(torch.zeros(2, 4, 4, C), torch.zeros(2, 4, 4, C), torch.zeros(1, 5)),
            "2 maps and 1 questions",
        ),
        (lambda: SpatialTokens(C, 4, (), heads=2), "sides is empty"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_of_none_keeps_its_shape():
    assert TokenPacker(C, 1, 4, 2, 2)(torch.zeros(0, 4, 4, C), torch.zeros(0, 4, 4, C)).shape == (0, 4, 4)
