"""Published figures of visual-token reduction that are arithmetic, beside ours.

DivPrune's shares of FLOPs are means over eleven texts. Those of LLaVA-1.5 count the texts alone; that of LLaVA-1.6 comes out when
the system prompt's 35 rows, a constant of the released code, count beside them: 10.79, or 10.80 where the kept rows are not
rounded to whole ones. The texts of the video sets were not published: the share needs 66 rows, the system prompt and 31 more,
where the image tasks' questions have 44 on average.
"""

from __future__ import annotations

from typing import Any

from token_reduction.flops import DIVPRUNE_SYSTEM, DIVPRUNE_TEXTS, divprune_share, prefill
from token_reduction.inside import VisionDropStages, aim

SEVEN = {"layers": 32, "width": 4096, "ffn": 11008}
THIRTEEN = {"layers": 40, "width": 5120, "ffn": 13824}


def published() -> list[dict[str, Any]]:
    """Each figure, as published and as computed."""
    stages = [48, *(a + b for a, b in VisionDropStages().stages.values())]

    def share(visual: int, ratio: float, size: dict[str, int], system: int = 0) -> float:
        return round(100 * divprune_share(visual, ratio, **size, system=system), 2)

    system = DIVPRUNE_SYSTEM
    return [
        {"what": "DivPrune, LLaVA-1.5-7B, 576 rows, % of FLOPs", "published": 15.63, "ours": share(576, 0.098, SEVEN)},
        {"what": "DivPrune, LLaVA-1.5-13B", "published": 15.71, "ours": share(576, 0.098, THIRTEEN)},
        {
            "what": "DivPrune, LLaVA-1.6-7B, 2,880 rows, the system prompt counted",
            "published": 10.80,
            "ours": share(2880, 0.098, SEVEN, system),
            "with_kept_rows_not_rounded": not_rounded(2880, 0.098),
            "without_the_system_prompt": share(2880, 0.098, SEVEN),
        },
        {
            "what": "DivPrune, video, 1,152 rows, the texts of its image tasks and the system prompt",
            "published": 14.10,
            "ours": share(1152, 0.1, SEVEN, system),
            "without_the_system_prompt": share(1152, 0.1, SEVEN),
            "needs": {"text_rows": texts_for(14.10)},
        },
        {"what": "AIM, mean share over 28 layers", "published": 0.625, "ours": aim(28).mean_share(28)},
        {"what": "VisionDrop, mean tokens", "published": 32, "ours": sum(stages) / 4},
    ]


def not_rounded(visual: int, ratio: float) -> float:
    """`divprune_share` of the 7B model in percent, system prompt counted, with a broken number of kept rows.

    >>> not_rounded(2880, 0.098)
    10.8
    """
    texts = [DIVPRUNE_SYSTEM + text for text in DIVPRUNE_TEXTS]
    shares = [prefill(text + ratio * visual, **SEVEN) / prefill(text + visual, **SEVEN) for text in texts]
    return round(100 * sum(shares) / len(shares), 2)


def texts_for(percent: float) -> list[int]:
    """Text rows beside 1,152 visual rows at 10% kept that give a share of FLOPs, to the tenth: least and most.

    >>> texts_for(14.10)
    [66, 66]
    """
    share = lambda text: prefill(text + 115, **SEVEN) / prefill(text + 1152, **SEVEN)  # noqa: E731
    fits = [text for text in range(1, 500) if round(100 * share(text), 1) == round(percent, 1)]
    return [min(fits), max(fits)]
