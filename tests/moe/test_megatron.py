"""Our layer inside unpatched Megatron-Core on CPUs: against dense experts, and against Megatron's own allgather."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.tokenring.megatron_shim import (
    GPTModel,
    TransformerConfig,
    gpt_layer_specs,
    megatron_on_cpu,
    model_parallel,
    parallel_state,
    spec_utils,
)

H, F, E, K = 16, 24, 8, 3


def draw(seed: int, *shape: int) -> Tensor:
    return 0.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config_of(**options):
    sizes = {"num_layers": 1, "hidden_size": H, "num_attention_heads": 4, "num_moe_experts": E, "moe_router_topk": K}
    plain = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bias_dropout_fusion": False, "moe_aux_loss_coeff": 0.0}
    tp = options.get("tensor_model_parallel_size", 1)
    return TransformerConfig(
        **sizes
        | plain
        | {
            "moe_ffn_hidden_size": F,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "use_cpu_initialization": True,
            "sequence_parallel": tp > 1,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
        }
        | options
    )


def megatron_sizes(sizes: dict) -> tuple[dict, dict]:
    """Arguments of initialize_model_parallel, and those of the configuration."""
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
    names |= {"ep": "expert_model_parallel_size", "etp": "expert_tensor_parallel_size"}
    given = {names[key]: value for key, value in ({"etp": 1} | sizes).items()}
    return given, given | ({"pipeline_dtype": torch.float32} if sizes.get("pp", 1) > 1 else {})


def set_weights(layer) -> None:
    """The same whole experts on any layout."""
    up, gate, down = draw(1, E, F, H), draw(2, E, F, H), draw(3, E, H, F)
    layer.router.weight.data = draw(4, E, H)
    etp, part = parallel_state.get_expert_tensor_parallel_world_size(), parallel_state.get_expert_tensor_parallel_rank()
    wide = slice(part * F // etp, (part + 1) * F // etp)
    for index, mlp in zip(layer.local_expert_indices, layer.experts.local_experts):
        mlp.linear_fc1.weight.data = torch.cat([gate[index, wide], up[index, wide]])
        mlp.linear_fc2.weight.data = down[index, :, wide].clone()


def layer_on_rank(group, sizes: dict, tokens: list[int], dispatcher: str, options: dict) -> dict:
    import moe.megatron as ours

    parallel, configured = megatron_sizes(sizes)
    with model_parallel(group, **parallel):
        config = config_of(**configured | options)
        spec = ours.layer_spec(config, dispatcher, backend="local")
        layer = spec_utils.build_module(spec.submodules.mlp, config=config, layer_number=1)
        assert config.moe_token_dispatcher_type == "alltoall"
        set_weights(layer)
        rank = group.rank()
        hidden = draw(10 + rank, tokens[rank], 2, H).requires_grad_()
        with torch.no_grad():
            probs, chosen = layer.route(hidden)
        out, bias = layer(hidden)
        assert bias is None
        (out * draw(30 + rank, tokens[rank], 2, H)).sum().backward()
        etp_rank = parallel_state.get_expert_tensor_parallel_rank()
        experts = {
            index: (mlp.linear_fc1.weight.grad, mlp.linear_fc2.weight.grad)
            for index, mlp in zip(layer.local_expert_indices, layer.experts.local_experts)
        }
        return {
            "out": out.detach(),
            "hidden": hidden.grad,
            "router": layer.router.weight.grad,
            "experts": experts,
            "part": etp_rank,
            "stage": parallel_state.get_pipeline_model_parallel_rank(),
            "table": probs * chosen,
        }


def dense(tokens: list[int], ranks: list[int], tables: list[Tensor], free: bool) -> dict:
    """Everything on one rank in float64; `free`: weights differentiable through softmax over the chosen logits."""
    w = {"up": draw(1, E, F, H), "gate": draw(2, E, F, H), "down": draw(3, E, H, F), "router": draw(4, E, H)}
    w = {name: value.double().requires_grad_() for name, value in w.items()}
    outs, leaves, loss = [], [], 0.0
    for rank, table in zip(ranks, tables):
        x = draw(10 + rank, tokens[rank], 2, H).double().requires_grad_()
        flat = x.view(-1, H)
        logits = flat @ w["router"].T
        best = logits.topk(K, dim=1)
        share = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(1))
        if free:
            assert torch.allclose(share, table.double(), atol=1e-6)
        share = share * (table > 0)
        inner = torch.nn.functional.silu(torch.einsum("th,efh->tef", flat, w["gate"]))
        inner = inner * torch.einsum("th,efh->tef", flat, w["up"])
        out = torch.einsum("tef,ehf,te->th", inner, w["down"], share).view(x.shape)
        loss = loss + (out * draw(30 + rank, tokens[rank], 2, H)).sum()
        outs.append(out.detach())
        leaves.append(x)
    loss.backward()
    return {"out": outs, "hidden": [x.grad for x in leaves]} | {name: value.grad for name, value in w.items()}


def compare(results: list[dict], tokens: list[int], sizes: dict, free: bool = True) -> None:
    etp = sizes.get("etp", 1)
    for stage in range(sizes.get("pp", 1)):
        ranks = [r for r, result in enumerate(results) if result["stage"] == stage]
        mine = [results[r] for r in ranks]
        expected = dense(tokens, ranks, [r["table"] for r in mine], free)
        total = {name: torch.zeros_like(expected[name]) for name in ("up", "gate", "down", "router")}
        for place, r in enumerate(mine):
            assert torch.allclose(r["out"].double(), expected["out"][place], atol=1e-5), "out"
            assert torch.allclose(r["hidden"].double(), expected["hidden"][place], atol=1e-5), "hidden"
            total["router"] += r["router"]
            wide = slice(r["part"] * F // etp, (r["part"] + 1) * F // etp)
            for index, (fc1, fc2) in r["experts"].items():
                gate, up = fc1.chunk(2)
                total["gate"][index, wide] += gate
                total["up"][index, wide] += up
                total["down"][index, :, wide] += fc2
        for name, value in total.items():
            assert torch.allclose(value, expected[name], atol=1e-4), name


FOLDINGS = [
    ({}, "dedup"),
    ({"ep": 4}, "auto"),
    ({"tp": 2, "ep": 4}, "dedup"),
    ({"ep": 2, "etp": 2}, "alltoall"),
    ({"etp": 4}, "dedup"),
    ({"tp": 4, "ep": 2, "etp": 2}, "allgather"),
    ({"tp": 2, "cp": 2, "ep": 4}, "alltoall"),
    ({"tp": 2, "pp": 2, "ep": 2}, "dedup"),
]


@pytest.mark.parametrize(
    ("sizes", "dispatcher"),
    FOLDINGS,
    ids=lambda x: x if isinstance(x, str) else "".join(f"{k}{v}" for k, v in x.items()) or "alone",
)
def test_every_folding_equals_dense_experts(pool, sizes: dict, dispatcher: str) -> None:
    tokens = [5, 0, 3, 8]  # of each rank; one has none
    compare(pool.run(4, layer_on_rank, sizes, tokens, dispatcher, {}), tokens, sizes)


@pytest.mark.parametrize(
    "options",
    [
        {"moe_expert_capacity_factor": 0.5},
        {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    ],
    ids=["drop", "position", "padded"],
)
def test_dropping_and_filling_are_honoured(pool, options: dict) -> None:
    tokens = [6, 6, 6, 6]
    sizes = {"ep": 4}
    results = pool.run(4, layer_on_rank, sizes, tokens, "dedup", options)
    assert any(((r["table"] > 0).sum(1) < K).any() for r in results)
    compare(results, tokens, sizes, free=False)


def model_on_rank(group, dispatcher: str) -> tuple[float, list[str]]:
    """The same GPT model with Megatron's allgather dispatcher and with ours: loss and every gradient."""
    import moe.megatron as ours

    parallel, configured = megatron_sizes({"ep": 4})  # its CPU norms refuse sequence parallelism
    with model_parallel(group, **parallel), megatron_on_cpu():
        config = config_of(**configured, moe_shared_expert_intermediate_size=16)
        config.moe_token_dispatcher_type = "allgather"
        plain = gpt_layer_specs.get_gpt_layer_local_spec(num_experts=E, moe_grouped_gemm=False)
        plain.submodules.mlp.submodules.router = (
            ours.TokenRouter
        )  # Megatron 0.16.1's own fails without Transformer Engine
        models, losses = [], []
        for spec in (plain, ours.with_moe(plain, dispatcher=dispatcher)):
            torch.manual_seed(1)
            model = GPTModel(config, spec, 32, 16, position_embedding_type="rope")
            if models:
                model.load_state_dict(models[0].state_dict())
            tokens = torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(group.rank()))
            causal = torch.ones(1, 1, 16, 16).triu(1).bool()
            loss = model(tokens, None, causal, labels=tokens.roll(-1, 1)).mean()
            loss.backward()
            models.append(model)
            losses.append(loss)
        assert type(models[1].decoder.layers[0].mlp) is ours.MoELayer
        pairs = zip(models[0].named_parameters(), models[1].parameters())
        wrong = [name for (name, one), two in pairs if not torch.allclose(one.grad, two.grad, atol=1e-5)]
        return float((losses[0] - losses[1]).abs()), wrong


@pytest.mark.parametrize("dispatcher", ["dedup", "alltoall"])
def test_a_gpt_model_trains_as_with_megatrons_own_dispatcher(pool, dispatcher: str) -> None:
    for difference, wrong in pool.run(4, model_on_rank, dispatcher):
        assert difference < 1e-5 and not wrong


class Recorder:
    """Stands for Megatron's SharedExpertMLP in its overlapped form, which needs CUDA streams."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str):
        def call(*given: Tensor) -> Tensor:
            self.calls.append(name)
            return torch.full((3, 1, H), 5.0)

        return call


def test_shared_experts_are_driven_through_their_states_in_order() -> None:
    import moe.megatron as ours

    groups = SimpleNamespace(ep=None, expt_tp=None, tp_ep=None)
    config = SimpleNamespace(
        num_moe_experts=E,
        moe_router_topk=1,
        moe_pad_expert_input_to_capacity=False,
        moe_shared_expert_overlap=True,
        cuda_graph_impl="none",
    )
    d = ours.TokenDispatcher(config, groups, "dedup")
    d.set_shared_experts(Recorder())
    chosen = torch.zeros(3, E, dtype=torch.bool)
    chosen[:, 2] = True
    hidden = torch.ones(3, 1, H)
    tokens, probs = d.token_dispatch(*d.dispatch_preprocess(hidden, chosen, chosen.float()))
    tokens, counts, _ = d.dispatch_postprocess(tokens, probs)
    assert counts.tolist() == [0, 0, 3, 0, 0, 0, 0, 0]
    out = d.combine_postprocess(d.token_combine(d.combine_preprocess(tokens)))
    order = ["pre_forward_comm", "linear_fc1_forward_and_act", "linear_fc2_forward", "post_forward_comm", "get_output"]
    assert d.shared_experts.calls == order
    assert torch.equal(out, torch.full((3, 1, H), 6.0))


def test_what_cannot_be_honoured_is_refused() -> None:
    import moe.megatron as ours

    with pytest.raises(ValueError, match="num_moe_experts is None"):
        ours.layer_spec(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2))
    with pytest.raises(ValueError, match="holds no MoELayer"):
        ours.with_moe(gpt_layer_specs.get_gpt_layer_local_spec())
    with pytest.raises(ValueError, match="backend is 'jax'"):
        ours.layer_spec(config_of(), backend="jax")
    graphed = SimpleNamespace(cuda_graph_impl="local")
    with pytest.raises(ValueError, match="cuda_graph_impl is 'local'"):
        ours.TokenDispatcher(graphed, SimpleNamespace(ep=None, expt_tp=None, tp_ep=None))


def test_partials_of_later_versions_are_followed() -> None:
    """0.18 and later give functools.partial(MoELayer, submodules=...) where 0.16 gives a ModuleSpec."""
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    import moe.megatron as ours

    spec = functools.partial(MoELayer, submodules=MoESubmodules(experts=object))
    holder = dataclasses.make_dataclass("Submodules", ["mlp"])(spec)
    swapped = ours.with_moe(holder, dispatcher="dedup").mlp
    assert swapped.func is ours.MoELayer and swapped.keywords["dispatcher"] == "dedup"
    assert swapped.keywords["submodules"].router is ours.TokenRouter and spec.func is MoELayer


def test_the_core_attention_given_is_the_one_inside() -> None:
    import moe.megatron as ours

    attention = spec_utils.ModuleSpec(torch.nn.Identity)
    spec = ours.layer_spec(config_of(), "dedup", attention, backend="local")
    assert spec.submodules.self_attention.submodules.core_attention is attention
    assert spec.submodules.mlp.params["dispatcher"] == "dedup"
