"""Tiny random models of every family, saved as a user's model directory would be: weights, tokenizer, processor file."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

SPECIALS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<video>",
]
IDS = {token: 256 + i for i, token in enumerate(SPECIALS)}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
)
TEXT = {
    "vocab_size": 263,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": IDS["<|im_end|>"],
    "pad_token_id": None,
}
SIZE = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 30}


def tokenizer(video):
    """Every byte is a token, and the specials."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(bytes_)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    assert made.convert_tokens_to_ids(SPECIALS) == list(IDS.values())
    made.chat_template = TEMPLATE.replace("VIDEO", video)
    return made


def save(folder, model, words, settings):
    """A model directory."""
    model.generation_config.eos_token_id = IDS["<|im_end|>"]
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def qwen25(folder):
    words = tokenizer("<|vision_start|><|video_pad|><|vision_end|>")
    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 3,
            "initializer_range": 0.2,
        },
        **token_ids(),
    )
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), words, {"patch_size": 8, "size": SIZE})


QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 8,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.2,
}
QWEN3_SIZE = {"shortest_edge": 16 * 16 * 4, "longest_edge": 16 * 16 * 60}


def qwen3(folder):
    words = tokenizer("<|vision_start|><|video_pad|><|vision_end|>")
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config=QWEN3_VISION,
        **token_ids(),
    )
    return save(folder, Qwen3VLForConditionalGeneration(config), words, {"patch_size": 8, "size": QWEN3_SIZE})


def llava(folder, text=None):
    words = tokenizer("<video>\n")
    config = LlavaOnevisionConfig(
        text_config=text or {**TEXT, "model_type": "qwen2"},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 40,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        image_token_index=IDS["<|image_pad|>"],
        video_token_index=IDS["<video>"],
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    return save(folder, model, words, {"size": {"height": 40, "width": 40}})


def qwen3_moe(folder):
    """Text alone."""
    text = {**TEXT, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 8}
    return save_text(folder, Qwen3MoeForCausalLM(Qwen3MoeConfig(**text, decoder_sparse_step=1, norm_topk_prob=True)))


def mixtral(folder):
    """Text alone."""
    return save_text(
        folder, MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, head_dim=8))
    )


def qwen3_vl_moe(folder):
    """Eyes, and experts in two of three layers."""
    words = tokenizer("<|vision_start|><|video_pad|><|vision_end|>")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
    config = Qwen3VLMoeConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, **sizes},
        vision_config=QWEN3_VISION,
        **token_ids(),
    )
    return save(folder, Qwen3VLMoeForConditionalGeneration(config), words, {"patch_size": 8, "size": QWEN3_SIZE})


def llava_moe(folder):
    """LLaVA-OneVision around a Qwen3-MoE."""
    sizes = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    return llava(folder, {**TEXT, "model_type": "qwen3_moe", **sizes})


def save_text(folder, model):
    """A model directory without a processor file."""
    model.generation_config.eos_token_id = IDS["<|im_end|>"]
    model.save_pretrained(folder)
    tokenizer("").save_pretrained(folder)
    return folder


def smollm():
    """A Llama model and its tokenizer, for the demo adapter."""
    words = tokenizer("")
    torch.manual_seed(11)
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, "bos_token_id": 0})).eval(), words


def demo(cls, dtype=torch.float32, device="cpu"):
    """A demo adapter (`cls`) around tiny weights, the same in every process; `cls.load = classmethod(demo)` makes it the demo."""
    encoder = vit()
    model, words = smollm()
    return cls(encoder, model.to(dtype).requires_grad_(False), words)


def vit(*path, **options):
    """The demo's encoder with tiny weights; can stand for `launch.encoder.load`."""
    from launch.encoder import ViT

    torch.manual_seed(2)
    encoder = ViT(width=12, layers=1, heads=2)
    for weights in encoder.parameters():
        weights.data.normal_(0, 0.3)
    return encoder


def token_ids():
    return {
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }


MAKERS = {"qwen25": qwen25, "qwen3": qwen3, "llava": llava}
MIXTURES = {"qwen3_moe": qwen3_moe, "mixtral": mixtral, "qwen3_vl_moe": qwen3_vl_moe, "llava_moe": llava_moe}


def frames(count, height=40, width=60, seed=0):
    """uint8 (count, height, width, 3): smooth and different in every frame."""
    grid = torch.rand(count, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    up = torch.nn.functional.interpolate(grid, size=(height, width), mode="bilinear")
    return (up * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
