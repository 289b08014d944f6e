"""Routers: choices against Megatron-Core's, losses and dropping against the same computed on one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe import Router
from moe.capacity import expert_capacity
from tokenring.transport.inprocess import run_local

E, K, H = 8, 3, 16


def router(seed: int = 0, **options) -> Router:
    made = Router(H, options.pop("num_experts", E), options.pop("topk", K), dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(seed)  # ranks that are threads share the global one
    made.weight.data = torch.randn(made.weight.shape, dtype=torch.float64, generator=generator)
    return made


def hidden(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(ids: Tensor, weights: Tensor, experts: int = E) -> Tensor:
    """(T, E) of (T, k), as Megatron-Core holds it."""
    table = torch.zeros(ids.shape[0], experts + 1, dtype=weights.dtype)
    return table.scatter(1, torch.where(ids < 0, experts, ids), weights)[:, :experts]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"normalize": False}, {"use_pre_softmax": True}),
        ({"score": "sigmoid", "scale": 2.5}, {"score_function": "sigmoid", "scaling_factor": 2.5}),
        (
            {"score": "sigmoid", "num_groups": 4, "group_topk": 2, "topk": 4},
            {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2, "topk": 4},
        ),
        (
            {"score": "sigmoid", "expert_bias": True},
            {"score_function": "sigmoid", "expert_bias": torch.linspace(-0.4, 0.4, E)},
        ),
    ],
)
def test_choices_equal_megatron_cores(ours: dict, theirs: dict) -> None:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    made, x = router(**ours), hidden(50)
    if made.expert_bias is not None:
        made.expert_bias.copy_(theirs["expert_bias"])
    routing = made(x)
    expected, chosen = topk_routing_with_score_function(made.logits(x), theirs.pop("topk", K), **theirs)
    assert torch.equal(dense(routing.expert_ids, torch.ones_like(routing.expert_weights)).bool(), chosen)
    # Megatron-Core takes its softmax in float32
    assert torch.allclose(dense(routing.expert_ids, routing.expert_weights), expected, atol=1e-6)


def test_equal_scores_go_to_the_lowest_experts() -> None:
    made = router()
    made.weight.data.zero_()
    assert made(hidden(5)).expert_ids.tolist() == [[0, 1, 2]] * 5


def test_groups_limit_the_choice() -> None:
    ids = router(num_groups=4, group_topk=2, topk=4)(hidden(40)).expert_ids
    assert all(len({int(x) // 2 for x in row}) == 2 for row in ids)


def whole_batch_losses(made: Router, x: Tensor, sequences: Tensor) -> dict[str, Tensor]:
    """The formulas, written out with loops over experts and sequences."""
    logits = x @ made.weight.T
    scores = logits.softmax(-1)
    ids = scores.topk(K).indices

    def switch(rows: Tensor) -> Tensor:
        shares = [(ids[rows] == e).sum() / (rows.sum() * K) for e in range(E)]
        return E * sum(shares[e] * scores[rows, e].mean() for e in range(E))

    everything = torch.ones_like(sequences, dtype=torch.bool)
    return {
        "aux": 0.1 * switch(everything),
        "sequence": 0.2 * torch.stack([switch(sequences == s) for s in sequences.unique()]).mean(),
        "global": 0.3 * switch(everything),
        "z": 0.4 * torch.logsumexp(logits, -1).square().mean(),
    }


def losses_on_rank(group, x: Tensor, sequences: Tensor, cuts: list[int]) -> tuple[dict, Tensor]:
    made = router(aux_loss=0.1, sequence_loss=0.2, global_loss=0.3, z_loss=0.4, group=group)
    rows = slice(*cuts[group.rank() : group.rank() + 2])
    routing = made(x[rows], sequences=sequences[rows])
    routing.attached_weights().sum().mul(0).backward()
    return {name: loss.detach() for name, loss in routing.losses.items()}, made.weight.grad


@pytest.mark.parametrize("cuts", [[0, 31], [0, 7, 31], [0, 12, 12, 31]])
def test_loss_shares_and_gradients_add_up_to_the_whole_batch(cuts: list[int]) -> None:
    x, sequences = hidden(31), torch.tensor([0] * 9 + [1] * 4 + [2] * 18)
    made = router()
    expected = whole_batch_losses(made, x, sequences)
    sum(expected.values()).backward()
    parts = run_local(len(cuts) - 1, losses_on_rank, x, sequences, cuts)
    for name, loss in expected.items():
        assert torch.allclose(sum(part[name] for part, _ in parts), loss, atol=1e-12), name
    assert torch.allclose(sum(grad for _, grad in parts), made.weight.grad, atol=1e-12)


def test_the_global_loss_averages_over_micro_batches() -> None:
    made, total = router(global_loss=1.0), torch.zeros(E)
    for step in range(3):
        x = hidden(10, seed=step)
        routing = made(x)
        total += torch.bincount(routing.expert_ids.reshape(-1), minlength=E)
        expected = E * (made.logits(x).softmax(-1).mean(0) * total / total.sum()).sum()
        assert torch.allclose(routing.losses["global"], expected)
    made.reset_global_counts()
    assert int(made.global_counts.sum()) == 0


def skewed(tokens: int, seed: int) -> Tensor:
    return 0.2 * hidden(tokens, seed) + 0.1


def update_bias_on_rank(group, updates: int) -> Tensor:
    made = router(expert_bias=True, score="sigmoid", group=group, bias_rate=0.01)
    for step in range(updates):
        made(skewed(60 + group.rank(), seed=10 * step + group.rank()))
        made.update_bias()
    return made.expert_bias


def test_the_bias_evens_the_loads_alike_on_every_rank_and_needs_no_loss() -> None:
    biases = run_local(2, update_bias_on_rank, 60)
    assert torch.equal(*biases) and biases[0].abs().max() > 0
    made = router(expert_bias=True, score="sigmoid").eval()
    before = made(skewed(4000, seed=1)).counts
    made.expert_bias.copy_(biases[0])
    after = made(skewed(4000, seed=1)).counts
    assert after.double().std() < 0.3 * before.double().std()
    with pytest.raises(ValueError, match="expert_bias=True"):
        router().update_bias()


def drop_by_hand(ids: Tensor, weights: Tensor, capacity: int, by: str) -> Tensor:
    kept = torch.full_like(ids, -1)
    for expert in range(E):
        asked = [(t, j) for t in range(ids.shape[0]) for j in range(K) if ids[t, j] == expert]
        if by == "probability":
            asked.sort(key=lambda entry: (-float(weights[entry]), entry[0]))
        for entry in asked[:capacity]:
            kept[entry] = expert
    return kept


@pytest.mark.parametrize("by", ["probability", "position"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 50.0])
def test_dropping_keeps_the_best_or_the_first(by: str, factor: float) -> None:
    x = hidden(37)
    free, dropping = router()(x), router(capacity_factor=factor, drop_by=by)(x)
    capacity = expert_capacity(factor, 37, K, E)
    expected = drop_by_hand(free.expert_ids, free.expert_weights, capacity, by)
    assert torch.equal(dropping.expert_ids, expected)
    assert dropping.dropped == int((expected < 0).sum())
    assert torch.equal(dropping.expert_weights, free.expert_weights.masked_fill(expected < 0, 0.0))


def test_the_position_policy_keeps_the_first_tokens_where_all_want_one_expert() -> None:
    made = router(num_experts=4, topk=1, capacity_factor=1.0, drop_by="position")
    made.weight.data.zero_()
    assert made(hidden(64)).expert_ids[:, 0].tolist() == [0] * 16 + [-1] * 48


def drop_on_rank(group, x: Tensor, rows: list[list[int]], sequences: Tensor, by: str) -> Tensor:
    made = router(capacity_factor=0.7, drop_over="sequence", drop_by=by, group=group)
    mine = torch.tensor(rows[group.rank()], dtype=torch.int64)
    return made(x[mine], sequences=sequences[mine], positions=mine).expert_ids


@pytest.mark.parametrize("by", ["probability", "position"])
def test_full_sequence_dropping_is_the_same_under_every_cut(by: str) -> None:
    x, sequences = hidden(40), torch.tensor([0] * 25 + [1] * 15)
    whole = run_local(1, drop_on_rank, x, [list(range(40))], sequences, by)[0]
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    for rows in (
        [[*range(10)], [*range(10, 40)]],
        [shuffled[:3], [], shuffled[3:]],
        [[*range(0, 40, 2)], [*range(1, 40, 2)]],
    ):
        parts = run_local(len(rows), drop_on_rank, x, rows, sequences, by)
        for mine, ids in zip(rows, parts):
            assert torch.equal(ids, whole[torch.tensor(mine, dtype=torch.int64)])
    for sequence, length in ((0, 25), (1, 15)):
        kept = whole[sequences == sequence]
        assert max((kept == e).sum() for e in range(E)) == expert_capacity(0.7, length, K, E)


def test_full_sequence_dropping_numbers_consecutive_parts_itself() -> None:
    x, zeros = hidden(30), torch.zeros(30, dtype=torch.int64)

    def consecutive(group) -> Tensor:
        made = router(capacity_factor=0.5, drop_over="sequence", drop_by="position", group=group)
        return made(x[:11] if group.rank() == 0 else x[11:]).expert_ids

    whole = run_local(1, drop_on_rank, x, [list(range(30))], zeros, "position")[0]
    free = router()(x).expert_ids
    expected = drop_by_hand(free, free.double(), expert_capacity(0.5, 30, K, E), "position")
    assert torch.equal(torch.cat(run_local(2, consecutive)), expected)
    assert (whole < 0).sum() < (expected < 0).sum()


def test_padding_uses_no_capacity_and_no_loss() -> None:
    x = hidden(30)
    padding = torch.arange(30) % 3 == 0
    options = {"capacity_factor": 0.6, "aux_loss": 1.0, "z_loss": 1.0, "sequence_loss": 1.0}
    padded, alone = router(**options)(x, padding=padding), router(**options)(x[~padding])
    assert torch.equal(padded.expert_ids[~padding], alone.expert_ids)
    assert (padded.expert_ids[padding] == -1).all() and (padded.expert_weights[padding] == 0).all()
    assert all(torch.equal(padded.losses[name], alone.losses[name]) for name in ("aux", "sequence", "z"))


def test_jitter_moves_choices_in_training_only_and_repeats_with_its_generator() -> None:
    made, x = router(jitter=0.5), hidden(200)
    first, again = (made(x, generator=torch.Generator().manual_seed(5)).expert_ids for _ in range(2))
    still = made.eval()(x).expert_ids
    assert torch.equal(first, again) and not torch.equal(first, still)
    assert torch.equal(still, router()(x).expert_ids)


def test_forced_choices_are_even() -> None:
    even = router(force="even")(hidden(64)).counts
    assert even.max() - even.min() == 0
    spread = router(force="random")(hidden(4000), generator=torch.Generator().manual_seed(0))
    assert spread.counts.double().std() < 0.05 * spread.counts.double().mean()
    assert all(len(set(row.tolist())) == K for row in spread.expert_ids)


def test_no_tokens_are_no_special_case() -> None:
    routing = router(aux_loss=1.0, sequence_loss=1.0, z_loss=1.0, capacity_factor=1.0, drop_over="sequence")(hidden(0))
    assert routing.expert_ids.shape == (0, K) and float(routing.loss) == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": 9}, "topk=9; give 1 to num_experts=8"),
        ({"score": "relu"}, "score='relu'; give one of softmax"),
        ({"num_groups": 3}, "num_groups=3; give a divisor"),
        ({"num_groups": 4, "group_topk": 1}, "hold 2 experts"),
        ({"capacity_factor": 0}, "capacity_factor=0"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
        ({"aux_loss": -0.1}, "aux_loss=-0.1; give a number of at least 0"),
        ({"bias_rate": float("nan")}, "bias_rate=nan"),
        ({"scale": 0}, "scale=0; give a number above 0"),
        ({"drop_by": "luck"}, "drop_by='luck'"),
        ({"drop_over": "node"}, "drop_over='node'"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"force": "all"}, "force='all'"),
    ],
)
def test_wrong_options_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        router(**options)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 5\); give \(T, 16\)"):
        router()(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"sequences has shape \(2,\)"):
        router()(hidden(3), sequences=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="give a bool tensor"):
        router()(hidden(3), padding=torch.zeros(3))
