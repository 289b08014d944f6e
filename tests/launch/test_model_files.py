"""Model directories that cannot be used are refused in one line; pixels and sizes are the families' processors'."""

import ast
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from launch.models import check, load
from launch.models.files import video_settings
from launch.models.pixels import Pixels, fit
from launch.models.qwen import Qwen3Adapter, Qwen25Adapter
from tests.launch import tiny_models


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(1)
    return tiny_models.llava(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def broken(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "model")


def refused(source, match):
    with pytest.raises(ValueError, match=match) as refusal:
        load(source)
    assert "\n" not in str(refusal.value)


def test_a_good_directory_loads(directory):
    assert check(directory) == "llava_onevision"
    assert load(directory, torch.bfloat16).table.dtype == torch.bfloat16


def test_no_directory_is_refused(tmp_path):
    refused(tmp_path / "none", r'is no directory; give "demo", "demo-moe" or .*Qwen2\.5-VL, Qwen3-VL, LLaVA-OneVision')


def test_a_hub_name_is_refused_without_asking_the_network():
    refused("Qwen/Qwen3-VL-2B-Instruct", "is no directory")


def test_a_directory_without_config_is_refused(tmp_path):
    refused(tmp_path, r"has no config\.json; .*Qwen2\.5-VL, Qwen3-VL, LLaVA-OneVision")


def test_a_directory_without_weights_is_refused(broken):
    for path in broken.glob("*.safetensors"):
        path.unlink()
    refused(broken, "has no weights")


def test_another_family_is_refused(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "gemma3"}))
    refused(broken, "family 'gemma3'; supported are qwen2_5_vl, qwen3_vl, llava_onevision")


def test_a_config_that_is_no_json_is_refused(broken):
    (broken / "config.json").write_text("{")
    refused(broken, r"config\.json cannot be read as JSON")
    (broken / "config.json").write_text("[]")
    refused(broken, "holds a list, not a JSON object")


def test_missing_weights_are_not_made_up(broken):
    path = broken / "model.safetensors"
    weights = load_file(path)
    weights = {name: value.clone() for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    refused(broken, r"lacks 7 of its weights, the first is .*layers\.1\.mlp")


def test_truncated_weights_are_refused(broken):
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(broken, "cannot be loaded")


def test_a_directory_without_tokenizer_or_template_is_refused(broken):
    template = broken / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    refused(broken, "has no chat template")
    (broken / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert load(broken).tokenizer.chat_template == text
    for path in broken.glob("tokenizer*"):
        path.unlink()
    refused(broken, "no tokenizer")


def test_a_directory_without_processor_file_is_refused(broken):
    (broken / "video_preprocessor_config.json").unlink()
    refused(broken, r"has no video_preprocessor_config\.json")


def test_processor_files_are_taken_in_transformers_order(broken):
    (broken / "preprocessor_config.json").write_text('{"from": "image"}')
    assert "from" not in video_settings(broken)
    (broken / "video_preprocessor_config.json").unlink()
    assert video_settings(broken) == {"from": "image"}
    (broken / "processor_config.json").write_text('{"video_processor": {"from": "nested"}}')
    assert video_settings(broken) == {"from": "nested"}


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"do_resize": False}, "do_resize=false"),
        ({"do_normalize": False}, "do_normalize=false"),
        ({"do_center_crop": True}, "do_center_crop=true"),
        ({"resample": 1}, "resample=1"),
        ({"size": {"height": 30, "width": 40}}, r"vision tower takes 40x40"),
    ],
)
def test_processor_values_that_are_not_supported_are_refused(broken, setting, match):
    (broken / "video_preprocessor_config.json").write_text(json.dumps(setting))
    refused(broken, match)


def test_a_processor_file_that_contradicts_the_model_is_refused(tmp_path):
    folder = tiny_models.qwen25(tmp_path / "model")
    (folder / "video_preprocessor_config.json").write_text('{"patch_size": 14}')
    refused(folder, r"says patch_size=14, config\.json says 8")


# -- pixels ----------------------------------------------------------------------------------------------------------


def functions_of(family, *names, **namespace):
    """Functions out of a video processor's source: transformers will not import the file where torchvision is missing."""
    path = Path(transformers.__file__).parent / "models" / family / f"video_processing_{family}.py"
    tree = ast.parse("from __future__ import annotations\n" + path.read_text())
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
    assert [n.name for n in found] == list(names)
    namespace |= {"math": math, "torch": torch}
    exec(compile(ast.Module([tree.body[0], *found], []), str(path), "exec"), namespace)
    return [namespace[name] for name in names]


def test_pixels_equal_the_familys_image_processor():
    picture = tiny_models.frames(1, 70, 101)[0]
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 6})
    theirs = processor(picture.permute(2, 0, 1).numpy(), return_tensors="pt", input_data_format="channels_first")
    height, width = fit(70, 101, 28, 28 * 28 * 2, 28 * 28 * 6)
    assert theirs["image_grid_thw"].tolist() == [[1, height // 14, width // 14]]
    ours = Pixels.of({}, *Qwen25Adapter.colours)(picture[None], height, width)
    (patchify,) = functions_of("qwen2_vl", "patchify")
    patches, *_ = patchify(None, torch.cat([ours, ours])[None], 14, 2, 2)
    level = 1 / 255 / min(Qwen25Adapter.colours[1])
    assert (patches[0] - theirs["pixel_values"]).abs().max() < 1.1 * level
    assert (patches[0] - theirs["pixel_values"]).abs().mean() < 0.2 * level  # PIL rounds twice


SIDES = st.integers(10, 2000)


@settings(max_examples=200)
@given(SIDES, SIDES, st.integers(2, 200), st.sampled_from([(4, 768), (128, 768), (300, 301)]))
def test_sizes_equal_the_processors_rules(height, width, frames, cells):
    assume(max(height, width) <= 200 * min(height, width))
    (qwen2,), (qwen3,) = functions_of("qwen2_vl", "smart_resize"), functions_of("qwen3_vl", "smart_resize")
    low, high = cells[0] * 28 * 28, cells[1] * 28 * 28
    assert fit(height, width, 28, low, high) == qwen2(height, width, 28, low, high)
    if min(height, width) >= 32:
        low, high = cells[0] * 32 * 32, cells[1] * 32 * 32
        assert fit(height, width, 32, low, high, frames, 2) == qwen3(frames, height, width, 2, 32, low, high)


@pytest.mark.parametrize("cap", [None, True])
@pytest.mark.parametrize(
    ("maker", "cls", "source"),
    [(tiny_models.qwen25, Qwen25Adapter, "qwen2_vl"), (tiny_models.qwen3, Qwen3Adapter, "qwen3_vl")],
)
def test_the_adapters_sizes_equal_the_processors(tmp_path, maker, cls, source, cap):
    limits = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 90}
    folder = maker(tmp_path / source)
    values = {"cap_pixels_per_frame": cap, "max_video_tokens": 20, "size": limits, "patch_size": 8}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
    adapter, sizes = cls.load(folder, torch.float32, "cpu"), []
    parent = SimpleNamespace(resize=lambda image, size, resample: sizes.append((size.height, size.width)))
    _, resize = functions_of(source, "smart_resize", "resize", super=lambda: parent, SizeDict=SizeDict)
    for frames, height, width in itertools.product([2, 9, 64], [50, 12], [90, 300]):
        processor = SimpleNamespace(max_video_tokens=20)
        video = torch.zeros(1, frames, 3, height, width)
        resize(processor, video, SizeDict(**limits), None, factor=16, temporal_factor=2, cap_pixels_per_frame=cap)
        plan = adapter.visual_plan(frames, height, width)
        assert (plan.height, plan.width) == sizes[-1]
        assert plan.grid == (-(-frames // 2), plan.height // 16, plan.width // 16)
