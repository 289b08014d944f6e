"""What users would pick instead, written from the papers' descriptions, as plans of the same format.

    plan = baselines.flexprefill(q, k, gamma=0.95)
    out = execute(plan, q, k, v)

function         source                              granularity                      chosen by
streaming        StreamingLLM (2309.17453)           first keys and a window          nothing
vertical_slash   MInference (2407.02490)             columns, diagonals               the last 64 queries, top-k
flexprefill      FlexPrefill (2502.20766)            columns and diagonals, or        cumulative mass gamma, a test on the
                                                     128 x 128 blocks, per head       last block of queries
xattention       XAttention (2503.16428)             128 x 128 blocks                 antidiagonal sums, threshold on mass
flashprefill     FlashPrefill (2603.06199)           128 x 128 blocks                 a share of the row's largest score

Batch and grouped heads everywhere; every query head chooses for itself. Queries and keys are one whole sequence. Each runs on
the executors of AnchorAttention, so a comparison is of what was chosen and what choosing cost.
"""

from sparse_attn.baselines.flashprefill import flashprefill
from sparse_attn.baselines.flexprefill import flexprefill
from sparse_attn.baselines.streaming import streaming
from sparse_attn.baselines.vertical_slash import vertical_slash
from sparse_attn.baselines.xattention import xattention

__all__ = ["flashprefill", "flexprefill", "streaming", "vertical_slash", "xattention"]
