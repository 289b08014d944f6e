"""Mixture-of-experts models of transformers with their experts spread over ranks: logits and gradients as on one rank."""

from __future__ import annotations

import pytest
import torch

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}


def build(kind: str):
    from transformers import (
        GptOssConfig,
        GptOssForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(0)
    if kind == "qwen3":
        own = {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **own))
    elif kind == "gpt-oss":
        own = {"num_local_experts": 8, "intermediate_size": 16, "head_dim": 8, "sliding_window": 4}
        model = GptOssForCausalLM(GptOssConfig(**SIZES, **own))
    else:
        model = MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=16, num_local_experts=8))
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():  # large weights, so that experts matter
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    return model


def batch(rank: int) -> torch.Tensor:
    return torch.randint(0, 64, (1 + rank % 2, 5 + 2 * rank), generator=torch.Generator().manual_seed(rank))


def loss_of(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(tokens).logits
    return logits, torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )


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


def compare(results: list, kind: str, shared: bool = False) -> None:
    world = len(results)
    model = build(kind)
    for rank, (logits, _) in enumerate(results):
        alone, loss = loss_of(model, batch(1 if shared else rank))
        assert torch.allclose(logits, alone, atol=2e-4, rtol=1e-3), rank
        if not shared or rank == 0:
            loss.backward()
    for name, p in model.named_parameters():
        parts = [grads[name] for _, grads in results]
        if parts[0].shape != p.shape:
            found = torch.cat(parts)
        elif shared:
            found = parts[0]
        else:
            found = sum(parts)
        scale = max(1.0, float(p.grad.abs().max()))
        assert found.shape == p.shape and torch.allclose(found, p.grad, atol=2e-4 * scale), (name, world)


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


def saved(folder, kind: str, width: int = 16):
    """A model and its directory: one tensor for each expert in the files, or (qwen3-vl, gpt-oss) one for all of a layer."""
    if kind != "qwen3-vl":
        model = build(kind)
    else:
        from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        own = {"num_local_experts": 8, "moe_intermediate_size": width, "head_dim": 8, "rope_parameters": rope}
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
        vision |= {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        torch.manual_seed(0)
        config = Qwen3VLMoeConfig(text_config=SIZES | own, vision_config=vision)
        model = Qwen3VLMoeForConditionalGeneration(config)
    model.generation_config.eos_token_id = 5
    model.save_pretrained(folder, max_shard_size="64KB" if kind == "qwen3" else "1GB")
    return model


@pytest.mark.parametrize("kind", ["qwen3", "mixtral", "qwen3-vl"])
def test_a_rank_reads_its_own_experts_and_no_others(tmp_path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    from moe.integrations.huggingface_loading import ONE_EXPERT, OwnExperts, load_own_experts

    whole = saved(tmp_path, kind)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "qwen3")
    found = {}
    for part in range(4):
        for file in tmp_path.glob("*.safetensors"):  # what belongs to others is spoiled before it can be read
            tensors = load_file(file)
            for name, x in tensors.items():
                if one := ONE_EXPERT.search(name):
                    tensors[name] = x if int(one[1]) // 2 >= part else torch.full_like(x, torch.nan)
                elif ".experts." in name:
                    x[: 2 * part] = torch.nan
            save_file(tensors, file, metadata={"format": "pt"})
        model, info = load_own_experts(type(whole), tmp_path, OwnExperts(part, 4), dtype=torch.float32)
        assert type(model) is type(whole) and not info["missing_keys"] and not info["mismatched_keys"]
        assert model.generation_config.eos_token_id == 5 and not model.training
        for name, p in model.named_parameters():
            found.setdefault(name, []).append(p)
    for name, p in whole.named_parameters():
        parts = found[name]
        spread = ".experts." in name
        assert torch.equal(torch.cat(list(parts)) if spread else parts[-1], p), name
        if spread:
            assert all(part.shape[0] == 2 for part in parts)


class Counted:
    """A file of weights that counts the bytes of experts that are read from it."""

    def __init__(self, file, name: str, read: list[int]) -> None:
        self._file, self._name, self._read = file, name, read

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._file.__exit__(*error)

    def offset_keys(self):
        return self._file.offset_keys()

    def get_slice(self, name: str):
        return Counted(self._file.get_slice(name), name, self._read)

    def get_shape(self):
        return self._file.get_shape()

    def __getitem__(self, index):
        x = self._file[index]
        if ".experts." in self._name:
            self._read.append(x.nbytes)
        return x


def joined(parts: list[torch.Tensor], name: str, kind: str) -> torch.Tensor:
    """Parameters of experts from those of the ranks of an ETP group."""
    if name.endswith("down_proj_bias"):
        return sum(parts)
    if kind == "gpt-oss":  # (E, in, out), gates and ups in turn
        return torch.cat(parts, dim=-2 if name.endswith("down_proj") else -1)
    if name.endswith("down_proj"):
        return torch.cat(parts, dim=-1)
    gates, ups = zip(*(part.chunk(2, dim=1) for part in parts))
    return torch.cat([*gates, *ups], dim=1)


@pytest.mark.parametrize(
    ("kind", "etp"), [("qwen3", 2), ("mixtral", 4), ("gpt-oss", 2), ("qwen3-vl", 2), ("qwen3-vl, turned", 4)]
)
def test_a_rank_reads_its_part_of_its_experts_and_no_other(tmp_path, monkeypatch, kind: str, etp: int) -> None:
    import safetensors
    from safetensors.torch import load_file, save_file

    from moe.integrations.huggingface_loading import OwnExperts, load_own_experts

    turned = "turned" in kind
    whole = saved(tmp_path, kind.partition(",")[0], width=64 if turned else 16)
    if turned:  # as the published files have it; a part is then as wide as it is high, which says nothing of the whole
        (file,) = tmp_path.glob("*.safetensors")
        tensors = load_file(file)
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    read: list[int] = []
    opened = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda file, **options: Counted(opened(file, **options), "", read))
    size = sum(p.nbytes for name, p in whole.named_parameters() if ".experts." in name)
    once = sum(p.nbytes for name, p in whole.named_parameters() if name.endswith("down_proj_bias"))
    found = {}
    for part, etp_rank in [(part, etp_rank) for part in range(2) for etp_rank in range(etp)]:
        read.clear()
        own = OwnExperts(part, 2, etp_rank, etp)
        model, info = load_own_experts(type(whole), tmp_path, own, dtype=torch.float32)
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        assert sum(read) == (size - once) // (2 * etp) + (once // 2 if etp_rank == 0 else 0)
        held = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
        assert held == (size - once) // (2 * etp) + once // 2
        for name, p in model.named_parameters():
            found.setdefault(name, []).append(p)
    for name, p in whole.named_parameters():
        if ".experts." in name:
            halves = [joined(found[name][i : i + etp], name, kind) for i in (0, etp)]
            assert torch.equal(torch.cat(halves), p), name
        else:
            assert all(torch.equal(x, p) for x in found[name]), name


def test_files_whose_parts_are_not_known_are_refused() -> None:
    from transformers.core_model_loading import Chunk, Concatenate, Interleave, Transpose

    from moe.integrations.huggingface_parts import InnerWidth, inner_width_in_file

    halves = InnerWidth(-2, blocks=2)
    assert inner_width_in_file(halves, [Interleave(dim=1)]) == InnerWidth(-2, grain=2)
    assert inner_width_in_file(halves, [Transpose(1, 2)]) == InnerWidth(-1, blocks=2)
    for operations in ([Chunk(dim=0)], [Concatenate(dim=2)], [Transpose(0, 1)]):
        with pytest.raises(ValueError, match=f"come through {type(operations[0]).__name__}, of which no part is known"):
            inner_width_in_file(halves, operations)
    with pytest.raises(ValueError, match="experts are 6 wide, no multiple of ETP = 4"):
        halves.ranges(12, etp=4, etp_rank=0)


def own_on_rank(group, folder: str, dispatcher: str):
    from transformers import AutoModelForCausalLM

    from moe.integrations.huggingface import expert_parallel
    from moe.integrations.huggingface_loading import OwnExperts, load_own_experts

    own = OwnExperts(group.rank(), group.size())
    model, _ = load_own_experts(AutoModelForCausalLM, folder, own, dtype=torch.float32)
    model = expert_parallel(model.train(), group, dispatcher=dispatcher)
    logits, loss = loss_of(model, batch(group.rank()))
    loss.backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_own_experts_read_and_spread_give_what_one_rank_gives(pool, tmp_path) -> None:
    saved(tmp_path, "qwen3")
    compare(pool.run(4, own_on_rank, str(tmp_path), "dedup"), "qwen3")


def test_experts_of_another_rank_are_refused(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from moe.integrations.huggingface import expert_parallel
    from moe.integrations.huggingface_loading import OwnExperts, load_own_experts

    saved(tmp_path, "mixtral")
    model, _ = load_own_experts(AutoModelForCausalLM, tmp_path, OwnExperts(1, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match="holds experts 4 to 7 of 8; this rank needs 0 to 7 of 8"):
        expert_parallel(model, None)
    model, _ = load_own_experts(AutoModelForCausalLM, tmp_path, OwnExperts(0, 1, 1, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match="holds part 1 of 2 of its experts; this rank needs part 0 of 1"):
        expert_parallel(model, None)
    with pytest.raises(ValueError, match="experts are 16 wide, no multiple of ETP = 3"):
        load_own_experts(AutoModelForCausalLM, tmp_path, OwnExperts(0, 1, 1, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match="etp_rank 2 of etp=2"):
        OwnExperts(0, 2, 2, 2)
    with pytest.raises(ValueError, match="8 experts do not make 3 equal parts"):
        load_own_experts(AutoModelForCausalLM, tmp_path, OwnExperts(1, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match="part 2 of 2"):
        OwnExperts(2, 2)
