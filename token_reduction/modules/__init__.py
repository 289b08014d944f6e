"""Learned compressors: trainable modules with exact shapes, for projectors and encoders that are trained with them.

Feature maps are (B, h, w, C), token lists (B, n, C).
"""

from token_reduction.modules.biformer import BiLevelRouting
from token_reduction.modules.crosslmm import CrossLMM
from token_reduction.modules.falcon import RegisterEncoder
from token_reduction.modules.llava_sp import SpatialTokens
from token_reduction.modules.matryoshka import Matryoshka, matryoshka_loss
from token_reduction.modules.quecc import QueCC
from token_reduction.modules.slots import SlotAttention
from token_reduction.modules.token_flex import TokenFlex
from token_reduction.modules.token_packer import TokenPacker
from token_reduction.modules.token_shuffle import TokenShuffle
from token_reduction.modules.vision_remember import VisionRemember

__all__ = [
    "BiLevelRouting",
    "CrossLMM",
    "Matryoshka",
    "QueCC",
    "RegisterEncoder",
    "SlotAttention",
    "SpatialTokens",
    "TokenFlex",
    "TokenPacker",
    "TokenShuffle",
    "VisionRemember",
    "matryoshka_loss",
]
