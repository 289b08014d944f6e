"""VFlowOpt's recycling beside the plain top-k of each frame that its released code takes on video: real clips, same budget.

python -m benchmarks.token_reduction_recycling benchmarks/results/token_reduction_recycling.json
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.token_reduction_data import CLIPS, clip, vit
from benchmarks.token_reduction_metrics import quality
from token_reduction import Budget, build

FRAMES, QUERIES = 17, 32
FORMS = {"top-k": {"recycle": False}, "m = 12": {"m": 12.0}, "m = 8": {"m": 8.0}, "m = 4": {"m": 4.0}}


def main() -> None:
    torch.set_num_threads(1)
    model, rows = vit(), []
    clips = [clip(model, name, FRAMES, QUERIES) for name in CLIPS]
    for ratio in (0.1, 0.25):
        for form, options in FORMS.items():
            method = build("vflowopt", **options)
            found = [quality(each, method.reduce(each.tokens, Budget.ratio(ratio))) for each in clips]
            means = {key: statistics.mean(one[key] for one in found) for key in found[0]}
            rows.append({"form": form, "ratio": ratio, **means, "by_clip": dict(zip(CLIPS, found))})
            print(f"{ratio} {form:7} coverage {means['coverage']:.4f} retrieval {means['retrieval']:.2f}", flush=True)
    record.write(Path(sys.argv[1]), f"vflowopt on {', '.join(CLIPS)}, {FRAMES} frames each, means over clips", rows)


if __name__ == "__main__":
    main()
