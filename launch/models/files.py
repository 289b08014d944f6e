"""Reading a local Hugging Face model directory: what is there, what is missing, and never a network.

Only safetensors weights are read and no code of the directory is run (`local_files_only`, no `trust_remote_code`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.integrations.huggingface_loading import OwnExperts

TEXT_FAMILIES = {"qwen3_moe": "Qwen3-MoE", "mixtral": "Mixtral"}
"""Models of text alone; see `launch.models.text`."""
FAMILIES = {
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava_onevision": "LLaVA-OneVision",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    **TEXT_FAMILIES,
}


def check(source: str | Path) -> str:
    """The family name of a model directory, from its config.json, without loading anything heavy.

    Raises:
        ValueError: no such directory, no config.json, a family that is not supported, or no weights.

    >>> check("/no/such/model")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: model '/no/such/model' is no directory; give "demo", "demo-moe" or a local directory of a Hugging Face model ...
    """
    path = Path(source)
    supported = f"({', '.join(FAMILIES.values())})"
    if not path.is_dir():
        raise ValueError(
            f'model {str(source)!r} is no directory; give "demo", "demo-moe" or a local directory of a Hugging Face model {supported}'
        )
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model directory {path} has no config.json; give a directory made by save_pretrained {supported}"
        )
    family = read_json(path / "config.json").get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model directory {path} is of family {family!r}; supported are {', '.join(FAMILIES)} {supported}"
        )
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model directory {path} has no weights (*.safetensors); download them into it, or save the model again with "
            "save_pretrained"
        )
    return str(family)


def language_config(path: Path) -> dict[str, Any]:
    """What a directory's config.json says of its language model, the family's defaults included."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True).get_text_config().to_dict()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path / 'config.json'} describes no model that can be built: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); copy the model directory again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object; copy the model directory again")
    return value


def load_model(cls: Any, path: Path, dtype: Any, device: Any, own: OwnExperts | None = None) -> Any:
    """A transformers model in evaluation mode; every weight must come from the directory.

    own: the experts to read, the others stay in the files; None: all.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if own is None:
            model, info = cls.from_pretrained(
                path, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        else:
            from moe.integrations.huggingface_loading import load_own_experts

            model, info = load_own_experts(cls, path, own, dtype=dtype)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model directory {path} cannot be loaded: {reason}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"model directory {path} lacks {len(missing)} of its weights, the first is {missing[0]}; copy all *.safetensors"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The directory's tokenizer, with the chat template of the directory where the tokenizer itself has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model directory {path} has no tokenizer that loads: {reason}") from error
    template = _chat_template(path) or tokenizer.chat_template
    if not template:
        raise ValueError(
            f"model directory {path} has no chat template; add the family's chat_template.jinja or chat_template.json"
        )
    tokenizer.chat_template = template
    return tokenizer


def _chat_template(path: Path) -> str | None:
    """The processor's template comes first: the tokenizer's own may know nothing of videos."""
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (path / name).is_file():
            template = read_json(path / name).get("chat_template")
            if template:
                return str(template)
    return None


def render_chat(tokenizer: Any, text: str) -> str:
    """One user turn with a video and then `text`, up to where the answer starts."""
    content = [{"type": "video"}, {"type": "text", "text": text}]
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def video_settings(path: Path) -> dict[str, Any]:
    """The directory's video processor values: nested in processor_config.json, else its own file, else the image one's."""
    nested = path / "processor_config.json"
    if nested.is_file() and "video_processor" in (settings := read_json(nested)):
        return dict(settings["video_processor"])
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (path / name).is_file():
            return read_json(path / name)
    raise ValueError(
        f"model directory {path} has no video_preprocessor_config.json, preprocessor_config.json or processor_config.json; "
        "copy it from the model"
    )
