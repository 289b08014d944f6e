"""AnchorAttention: stripe-sparse prefill, exact where it says so.

from sparse_attn import AnchorConfig, anchor_attention
out = anchor_attention(q, k, v, config=AnchorConfig())
"""

from sparse_attn import baselines
from sparse_attn.api import anchor_attention, execute, plan
from sparse_attn.config import AnchorConfig
from sparse_attn.density import theta_for_density
from sparse_attn.geometry import Geometry
from sparse_attn.metrics import LogitsDifference, Recall, compare_logits, mass_recall, output_error, output_recall
from sparse_attn.reference import reference_attention
from sparse_attn.stats import Stats
from sparse_attn.stripes import StripePlan
from sparse_attn.tune import TunedConfig, Tuner, tune

__all__ = [
    "AnchorConfig",
    "Geometry",
    "LogitsDifference",
    "Recall",
    "Stats",
    "StripePlan",
    "TunedConfig",
    "Tuner",
    "anchor_attention",
    "baselines",
    "compare_logits",
    "execute",
    "mass_recall",
    "output_error",
    "output_recall",
    "plan",
    "reference_attention",
    "theta_for_density",
    "tune",
]
