"""The encoder against the graph it was converted from, evaluated by onnx's own reference implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file

from launch import assets, encoder
from launch.convert import vit_state
from launch.encoder import ViT, fit_frame, load, normalise
from launch.video import plan_frames, probe, read

LAST = "/backbone/encoder/layer.11/attention/attention/"
FEATURES, MAP, KEYS = "/backbone/layernorm/Add_1_output_0", LAST + "Softmax_output_0", LAST + "key/Add_output_0"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(vit_state(assets.find("vit_onnx")), path)
    return path


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    plan = plan_frames([probe(assets.find("clip:bikes"))], count=4)
    return torch.stack([torch.from_numpy(array) for _, array in read(plan, 0, 4)])


@pytest.fixture(scope="module")
def tiny() -> ViT:
    generator = torch.Generator().manual_seed(0)
    model = ViT(width=12, layers=2, heads=2)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def graph_outputs(pixels: np.ndarray) -> list[np.ndarray]:
    """Features, last attention map and last keys of the ONNX graph; only the nodes they need are evaluated."""
    model = onnx.load(str(assets.find("vit_onnx")))
    wanted, nodes = {FEATURES, MAP, KEYS}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            nodes.insert(0, node)
            wanted |= set(node.input)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (FEATURES, MAP, KEYS)]
    values = [item for item in model.graph.initializer if item.name in wanted]
    part = helper.make_graph(nodes, "part", list(model.graph.input), outputs, values)
    run = ReferenceEvaluator(helper.make_model(part, opset_imports=model.opset_import))
    return run.run(None, {"input_image": pixels})


def test_features_attention_and_keys_equal_the_onnx_graph(weights, frames) -> None:
    pixels = normalise(frames[1])[None]
    features, attention, keys = graph_outputs(pixels.numpy())
    out = load(weights)(pixels, ("cls_attn", "keys", "cls_logits"))
    np.testing.assert_allclose(out["x"].numpy(), features[:, 1:], rtol=0, atol=1e-4)
    np.testing.assert_allclose(out["cls_attn"][..., -1].numpy(), attention[:, :, 0, 1:].mean(1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(out["keys"].flatten(2).numpy(), keys[:, 1:], rtol=0, atol=1e-4)
    by_head = attention[:, :, 0, 1:] / attention[:, :, 0, 1:].sum(-1, keepdims=True)
    np.testing.assert_allclose(out["cls_logits"].softmax(1).numpy(), by_head.swapaxes(1, 2), rtol=0, atol=1e-5)
    assert features.std() > 0.5 and attention.std() > 1e-3


def test_a_frames_numbers_do_not_depend_on_its_company(weights, frames) -> None:
    model = load(weights)
    together = model(frames)
    for number in (3, 0):
        alone = model(frames[number : number + 1])
        assert all(torch.equal(alone[name][0], together[name][number]) for name in together)
    assert not torch.equal(together["x"][0], together["x"][1])


def test_raw_and_normalised_frames_give_the_same_numbers(tiny, frames) -> None:
    raw, ready = tiny(frames), tiny(torch.stack([normalise(frame) for frame in frames]))
    assert all(torch.equal(raw[name], ready[name]) for name in raw)


def test_shapes_and_empty_batches(tiny, frames) -> None:
    for count in (0, 1, 3):
        out = tiny(frames[:count])
        assert {name: tuple(value.shape) for name, value in out.items()} == {
            "x": (count, 256, 12),
            "cls_attn": (count, 256, 1),
            "keys": (count, 256, 2, 6),
        }
    sums = out["cls_attn"].sum(dim=1)
    assert (sums > 0.5).all() and (sums < 1).all()
    assert not any(value.requires_grad for value in out.values())


@pytest.mark.parametrize("size", [(720, 1280), (272, 640), (144, 176), (640, 272), (224, 224), (10, 2000), (7, 5)])
def test_a_letterboxed_frame_keeps_its_shape_and_the_rest_is_black(size) -> None:
    colour = torch.tensor([200, 100, 50], dtype=torch.uint8)
    pixels = normalise(colour.expand(*size, 3)) * torch.tensor(encoder.STD)[:, None, None]
    pixels = pixels + torch.tensor(encoder.MEAN)[:, None, None]
    top, left, height, width = fit_frame(*size)
    assert max(height, width) == 224 and abs(height / width - size[0] / size[1]) <= max(size) / min(size) / 40 + 0.01
    assert abs(2 * top + height - 224) <= 1 and abs(2 * left + width - 224) <= 1
    inside = torch.zeros(224, 224, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    torch.testing.assert_close(
        pixels[:, inside], (colour / 255)[:, None].expand(3, int(inside.sum())), rtol=0, atol=1e-5
    )
    assert pixels[:, ~inside].abs().max() < 1e-6 if (~inside).any() else height == width == 224


def test_a_frame_of_the_right_size_is_only_normalised() -> None:
    frame = torch.randint(0, 256, (224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = (frame.numpy() / 255.0 - np.array(encoder.MEAN)) / np.array(encoder.STD)
    for fit in encoder.FITS:
        np.testing.assert_allclose(normalise(frame, fit).numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_crop_keeps_the_middle_and_squash_all() -> None:
    frame = torch.zeros(224, 448, 3, dtype=torch.uint8)
    frame[:, 112:336] = 255  # the middle half of a wide frame is white
    white = normalise(torch.full((224, 224, 3), 255, dtype=torch.uint8))
    torch.testing.assert_close(normalise(frame, "crop"), white, rtol=0, atol=1e-5)
    squashed = normalise(frame, "squash") > 0
    assert squashed[:, :, 60:164].all() and not squashed[:, :, :52].any() and not squashed[:, :, 172:].any()
    # cropping must not wrap or shift: a tall frame, cut one pixel unevenly
    tall = torch.arange(229, dtype=torch.uint8)[:, None, None].expand(229, 224, 3)
    rows = normalise(tall, "crop")[0, :, 0] * encoder.STD[0] + encoder.MEAN[0]
    torch.testing.assert_close(rows * 255, torch.arange(2.0, 226.0), rtol=0, atol=1e-3)


def test_wrong_frames_files_and_fits_are_refused(tiny, tmp_path) -> None:
    for wrong in (
        torch.zeros(2, 3, 224, 224, dtype=torch.uint8),
        torch.zeros(224, 224, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 200, 224),
        torch.zeros(1, 0, 5, 3, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match=r"allowed: uint8 \(F, H, W, 3\)"):
            tiny(wrong)
    with pytest.raises(ValueError, match="allowed: letterbox, crop, squash"):
        ViT("stretch")
    with pytest.raises(ValueError, match="make setup"):
        load(tmp_path / "nothing.safetensors")
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match="does not hold this encoder"):
        load(tmp_path / "tiny.safetensors")
    (tmp_path / "words.safetensors").write_text("not tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load(tmp_path / "words.safetensors")
