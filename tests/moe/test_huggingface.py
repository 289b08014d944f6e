"""Mixture-of-experts models of transformers with their experts spread over ranks: logits and gradients as on one rank."""

from __future__ import annotations

import pytest
import torch

from tests.moe.mixtures import batch, build, compare, loss_of, saved


def spread_on_rank(group, kind: str, dispatcher: str):
    from moe.integrations.huggingface import expert_parallel

    model = expert_parallel(build(kind), group, dispatcher=dispatcher)
    logits, loss = loss_of(model, batch(group.rank()))
    loss.backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def through_transformers_on_rank(group, kind: str, dispatcher: str, shared: bool):
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    import moe.integrations.huggingface as ours

    ours.register()
    model = build(kind)
    mesh = DeviceMesh.from_group(group, "cpu")
    alone = DeviceMesh.from_group(torch.distributed.new_group([group.rank()], use_local_synchronization=True), "cpu")
    plan = {}
    for name, module in ours.expert_modules(model).items():
        plan |= {f"{name}.{p}": "grouped_gemm" for p, _ in module.named_parameters(recurse=False)}
        plan[name] = "ep_dispatch_experts"
    apply_expert_parallelism(model, mesh, mesh if shared else alone, plan, ep_implementation=f"moe:{dispatcher}")
    logits, loss = loss_of(model, batch(1 if shared else group.rank()))
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    local = {n: g.to_local() if hasattr(g, "to_local") else g for n, g in grads.items()}
    return logits.detach(), local


@pytest.mark.parametrize(("kind", "dispatcher"), [("qwen3", "dedup"), ("mixtral", "auto"), ("gpt-oss", "alltoall")])
def test_spread_experts_give_the_logits_and_gradients_of_one_rank(pool, kind: str, dispatcher: str) -> None:
    compare(pool.run(4, spread_on_rank, kind, dispatcher), kind)


@pytest.mark.parametrize("shared", [False, True], ids=["own_batches", "one_batch"])
def test_through_transformers_own_expert_parallelism(pool, shared: bool) -> None:
    compare(pool.run(2, through_transformers_on_rank, "qwen3", "dedup", shared), "qwen3", shared)


def cut_on_rank(group, kind: str, folder: str | None):
    from transformers import AutoModelForCausalLM

    from moe import Folding
    from moe.integrations.huggingface import expert_parallel
    from moe.integrations.huggingface_loading import OwnExperts, load_own_experts

    f = Folding(world=4, ep=2, etp=2)
    made, here = f.create_groups(group=group), f.coordinates(group.rank())
    if folder is None:
        model = build(kind)
    else:
        own = OwnExperts(here["ep"], 2, here["etp"], 2)
        model = load_own_experts(AutoModelForCausalLM, folder, own, dtype=torch.float32)[0].train()
    model = expert_parallel(model, made["ep"], etp_group=made["etp"], dispatcher="dedup", chunks=2)
    logits, loss = loss_of(model, batch(group.rank()))
    loss.backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("from_files", [False, True], ids=["spread", "read"])
@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_experts_cut_over_ranks_give_the_logits_and_gradients_of_one_rank(
    pool, tmp_path, kind: str, from_files: bool
) -> None:
    if from_files:
        saved(tmp_path, kind)
    results = pool.run(4, cut_on_rank, kind, str(tmp_path) if from_files else None)
    model = build(kind)
    for rank, (logits, _) in enumerate(results):
        alone, loss = loss_of(model, batch(rank))
        assert torch.allclose(logits, alone, atol=2e-4, rtol=1e-3), rank
        loss.backward()
    for name, p in model.named_parameters():
        parts = [grads[name] for _, grads in results if grads[name] is not None]
        if ".experts." in name:
            # disjoint parts of the gradient: nothing missing, nothing twice
            assert sum(part.numel() for part in parts) == p.numel()
            found, whole = (torch.cat([x.flatten() for x in xs]).sort().values for xs in (parts, [p.grad]))
        else:
            found, whole = sum(parts), p.grad
        assert torch.allclose(found, whole, atol=2e-4 * max(1.0, float(whole.abs().max()))), name


def test_what_is_no_mixture_is_refused() -> None:
    from moe.integrations.huggingface import expert_parallel

    with pytest.raises(ValueError, match="Linear holds no experts"):
        expert_parallel(torch.nn.Linear(2, 2), None)
    model = expert_parallel(build("qwen3"), None)
    with pytest.raises(ValueError, match="are spread already"):
        expert_parallel(model, None)
    with pytest.raises(ValueError, match="chunks is 0"):
        expert_parallel(build("qwen3"), None, chunks=0)
