"""Turn the packages' files into what the demo loads: ONNX -> safetensors, GGUF -> a Hugging Face model directory.

`launch.assets.demo_dir` calls it once. It needs the packages `onnx`, `transformers`, `accelerate` and `gguf`; afterwards none of
them but transformers is used.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def convert_demo(folder: Path, vit_onnx: Path, smollm2_gguf: Path) -> None:
    """Fill an existing empty folder with `vit.safetensors` and the model directory `smollm2/`, all float32."""
    from safetensors.torch import save_file

    save_file(vit_state(vit_onnx), folder / "vit.safetensors")
    convert_gguf(smollm2_gguf, folder / "smollm2")


def vit_state(path: Path) -> dict[str, Tensor]:
    """Tensors of `launch.encoder.ViT` out of the saliency network's ONNX file; its saliency head is left out.

    Vectors are named initialisers; matrices are anonymous ones, found through the names of the MatMul nodes that use
    them. The position table was trained on 37 x 37 patches; the graph resizes it to 16 x 16 at every call (cubic,
    a = -0.75, half-pixel centres), which is done here once.
    """
    import onnx
    from onnx import numpy_helper

    from launch.encoder import GRID

    graph = onnx.load(str(path)).graph
    named = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    matmul = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    table = {node.name: node.input for node in graph.node if node.op_type in ("Concat", "Reshape")}
    root = "/backbone/embeddings/"
    trained = named[table[root + "Reshape_1"][0]]  # (1, 37 * 37, width)
    side = round(trained.shape[1] ** 0.5)
    square = trained.view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(GRID, GRID), mode="bicubic", align_corners=False).flatten(2)[0].T
    state = {
        "patch.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "cls_token": named["backbone.embeddings.cls_token"].flatten(),
        "position": torch.cat([named[table[root + "Concat_6"][0]][0], resized]),
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    layers = sum(name.endswith("layer_scale1.lambda1") for name in named)
    for layer in range(layers):
        state |= {f"blocks.{layer}.{name}": value for name, value in _block_state(named, matmul, layer).items()}
    return {name: value.contiguous() for name, value in state.items()}


def _block_state(named: dict[str, Tensor], matmul: dict[str, str], layer: int) -> dict[str, Tensor]:
    vectors = f"backbone.encoder.layer.{layer}."
    matrices = f"/backbone/encoder/layer.{layer}/"

    def weight(part: str) -> Tensor:
        return named[matmul[f"{matrices}{part}/MatMul"]].T

    attention = [f"attention/attention/{part}" for part in ("query", "key", "value")]
    return {
        "norm1.weight": named[vectors + "norm1.weight"],
        "norm1.bias": named[vectors + "norm1.bias"],
        "qkv.weight": torch.cat([weight(part) for part in attention]),
        "qkv.bias": torch.cat([named[vectors + part.replace("/", ".") + ".bias"] for part in attention]),
        "out.weight": weight("attention/output/dense"),
        "out.bias": named[vectors + "attention.output.dense.bias"],
        "scale1": named[vectors + "layer_scale1.lambda1"],
        "norm2.weight": named[vectors + "norm2.weight"],
        "norm2.bias": named[vectors + "norm2.bias"],
        "fc1.weight": weight("mlp/fc1"),
        "fc1.bias": named[vectors + "mlp.fc1.bias"],
        "fc2.weight": weight("mlp/fc2"),
        "fc2.bias": named[vectors + "mlp.fc2.bias"],
        "scale2": named[vectors + "layer_scale2.lambda1"],
    }


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF language model as a Hugging Face directory: config, tokenizer, chat template, float32 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    quantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = type(quantised.config).from_dict(
        {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    )
    # A model that came out of a GGUF file refuses to be saved; a plain one with its weights does not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    _split_digits(tokenizer, path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer, path: Path) -> None:
    """SmolLM's pre-tokenizer takes digits one by one; transformers' GGUF reader rebuilds plain GPT-2 splitting."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    if GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
