"""Step time and memory of a mixture-of-experts model under a folding, and the best folding, before anything runs.

    from moe.planner import plan, search
    print(plan("mixtral-8x22b", Folding(world=128, tp=2, pp=8, ep=8), global_batch=256).table())
    print(search("mixtral-8x22b", 128, global_batch=256).table())

Everything here is modelled from sizes, `moe.traffic`'s expected rows and the constants of a JSON file; nothing is measured.
`docs/moe_planner.md` gives the equations, how the constants were fitted and how far off the model is.
"""

from moe.planning.calibrate import FREE, Report, fit, held_out, report
from moe.planning.hardware import Hardware, shipped
from moe.planning.job import Job
from moe.planning.memory import Memory
from moe.planning.model import MODELS, ModelConfig, model
from moe.planning.published import FP8, TABLE, Row
from moe.planning.search import Search, search
from moe.planning.step import Step, plan

__all__ = [
    "FP8",
    "FREE",
    "MODELS",
    "TABLE",
    "Hardware",
    "Job",
    "Memory",
    "ModelConfig",
    "Report",
    "Row",
    "Search",
    "Step",
    "fit",
    "held_out",
    "model",
    "plan",
    "report",
    "search",
    "shipped",
]
