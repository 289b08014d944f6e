"""A dense language model turned into a mixture of identical experts computes what it did, on any ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe.upcycle import upcycle, upcycle_mlp
from tests.moe.cases import Block


def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, vocab_size=64)).double()
    for p in made.parameters():
        p.data = 0.3 * torch.randn(p.shape, dtype=p.dtype)
    return made


def tokens(rank: int) -> Tensor:
    return torch.randint(0, 64, (1, 4 + 3 * rank), generator=torch.Generator().manual_seed(rank))


def spread(rank: int, ep_group, etp_group, models: list, name: str, chunks: int) -> Tensor:
    options = {"ep_group": ep_group, "etp_group": etp_group, "dispatcher": name, "chunks": chunks}
    if name == "hierarchical":
        options["ranks_per_node"] = 2
    mixture = upcycle(models[rank], 8, 3, router={"dtype": torch.float64}, **options)
    with torch.no_grad():
        return mixture(tokens(rank)).logits


@pytest.mark.parametrize(
    ("ep", "etp", "name", "chunks"),
    [(4, 1, "dedup", 1), (2, 2, "dedup", 2), (4, 1, "hierarchical", 1), (1, 4, "alltoall", 1), (4, 1, "allgather", 3)],
)
def test_identical_experts_give_the_dense_models_logits(ep: int, etp: int, name: str, chunks: int) -> None:
    dense = model()
    for rank, logits in enumerate(Block(ep, etp).run(spread, [model() for _ in range(4)], name, chunks)):
        with torch.no_grad():
            assert torch.allclose(logits, dense(tokens(rank)).logits, atol=1e-9), rank


def test_noise_tells_experts_apart_alike_on_every_layout() -> None:
    mlp = model().model.layers[0].mlp
    first, again = (upcycle_mlp(mlp, 4, 2, noise=0.1) for _ in range(2))
    assert torch.equal(first.experts.up, again.experts.up)
    assert not torch.allclose(first.experts.up[0], first.experts.up[1])


def test_what_is_no_gated_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to upcycle"):
        upcycle(torch.nn.Linear(2, 2), 4, 2)
    with pytest.raises(ValueError, match="Linear has no gate_proj"):
        upcycle_mlp(torch.nn.Linear(2, 2), 4, 2)
    mlp = model().model.layers[0].mlp
    mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match="experts know silu"):
        upcycle_mlp(mlp, 4, 2)
