"""Published figures of visual-token reduction that are arithmetic, beside ours.

DivPrune's four shares of FLOPs are means over eleven texts. Two follow from what was published. The other two do not: the mean
number of visual rows of LLaVA-1.6 (it varies with the picture) and the texts of the video sets are missing, so what is given for
them is the number that the published share needs.
"""

from __future__ import annotations

from typing import Any

from token_reduction.flops import divprune_share, prefill
from token_reduction.inside import VisionDropStages, aim

SEVEN = {"layers": 32, "width": 4096, "ffn": 11008}
THIRTEEN = {"layers": 40, "width": 5120, "ffn": 13824}


def published() -> list[dict[str, Any]]:
    """Each figure, as published and as computed."""
    stages = [48, *(a + b for a, b in VisionDropStages().stages.values())]
    share = lambda visual, ratio, size: round(100 * divprune_share(visual, ratio, **size), 2)  # noqa: E731
    return [
        {"what": "DivPrune, LLaVA-1.5-7B, 576 rows, % of FLOPs", "published": 15.63, "ours": share(576, 0.098, SEVEN)},
        {"what": "DivPrune, LLaVA-1.5-13B", "published": 15.71, "ours": share(576, 0.098, THIRTEEN)},
        {
            "what": "DivPrune, LLaVA-1.6-7B, 2,880 rows (all five tiles)",
            "published": 10.80,
            "ours": share(2880, 0.098, SEVEN),
            "needs": {"visual_rows": rows_for(10.80)},
        },
        {
            "what": "DivPrune, video, 1,152 rows, the texts of its image tasks",
            "published": 14.10,
            "ours": share(1152, 0.1, SEVEN),
            "needs": {"text_rows": texts_for(14.10)},
        },
        {"what": "AIM, mean share over 28 layers", "published": 0.625, "ours": aim(28).mean_share(28)},
        {"what": "VisionDrop, mean tokens", "published": 32, "ours": sum(stages) / 4},
    ]


def rows_for(percent: float) -> list[int]:
    """Visual rows of LLaVA-1.6-7B at 9.8% kept that give a share of FLOPs, to the hundredth: least and most.

    >>> rows_for(10.80)
    [1963, 1995]
    """
    fits = [n for n in range(576, 2881) if round(100 * divprune_share(n, 0.098, **SEVEN), 2) == percent]
    return [min(fits), max(fits)]


def texts_for(percent: float) -> list[int]:
    """Text rows beside 1,152 visual rows at 10% kept that give a share of FLOPs, to the tenth: least and most.

    >>> texts_for(14.10)
    [66, 66]
    """
    share = lambda text: prefill(text + 115, **SEVEN) / prefill(text + 1152, **SEVEN)  # noqa: E731
    fits = [text for text in range(1, 500) if round(100 * share(text), 1) == round(percent, 1)]
    return [min(fits), max(fits)]
