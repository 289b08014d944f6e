"""Ranks that read their own experts, or their part of them, from a model's files."""

from __future__ import annotations

import pytest
import torch

from tests.moe.mixtures import batch, compare, loss_of, saved


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
