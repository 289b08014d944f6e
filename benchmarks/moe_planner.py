"""The folding planner against published steps: with its constants, and with constants fitted on the other models only.

    python benchmarks/moe_planner.py [--write moe/hardware/h100.json] [--out benchmarks/results/moe_planner.json]

Modelled, not measured; runs in seconds on any CPU. `--write` fits the free constants again and puts them into the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe.planner import FP8, FREE, TABLE, Hardware, fit, held_out, report

ROWS = (*TABLE, *FP8)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hardware", default="h100", help="a shipped machine or the path of a JSON file")
    options.add_argument("--write", type=Path, help="fit again and write the free constants into this JSON file")
    options.add_argument("--out", type=Path, help="where to write the figures")
    given = options.parse_args()
    start = Hardware.load(given.hardware)
    fitted = fit(ROWS, start)
    constants = {free.name: float(f"{getattr(fitted, free.name):.4g}") for free in FREE}
    if given.write:
        held = json.loads(given.write.read_text())
        given.write.write_text(json.dumps(held | constants, indent=2) + "\n")
        start = start.but(**constants)
    together, apart = report(ROWS, start), held_out(ROWS, start)
    print(f"modelled on {start.name}\n{together.table()}\n\nconstants of a fit on these rows: {constants}\n")
    for name, one in apart.items():
        print(f"fitted without {name}\n{one.table()}\n")
    errors = [abs(error) for one in apart.values() for error in one.errors]
    overall = sum(errors) / len(errors)
    print(f"held-out rows: mean error {overall:.1%}, largest {max(errors):.1%}, {len(errors)} rows")
    if given.out:
        figures = {
            "kind": "modelled against published",
            "hardware": start.name,
            "constants": constants,
            "mean_error": together.mean_error,
            "held_out_mean_error": overall,
            "held_out_by_model": {name: one.mean_error for name, one in apart.items()},
            "rows": [
                {"model": r.model, "method": r.method, "precision": r.job.precision, "published": r.mfu, "modelled": m}
                for r, m, _ in together.lines
            ],
        }
        given.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
