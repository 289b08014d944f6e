"""From an objective to a frozen plan: VTW's divergence search, G-Search, P-Sigmoid and VFlowOpt are one routine.

>>> from token_reduction.fit import fit_withdrawal
>>> divergence = {2: 0.5, 3: 0.02, 4: 0.001, 5: 0.0}        # of a model that stops looking after layer 3
>>> fitted = fit_withdrawal(lambda plan: divergence[min(plan.policy.schedule) + 1], range(2, 6), eta=0.003)
>>> fitted.plan.policy.schedule, len(fitted.tried)
({3: 0.0}, 3)
"""

from token_reduction.fit.bayes import Bayes
from token_reduction.fit.gates import exit_labels, train_gates
from token_reduction.fit.plan import Fitted, Plan, Search, agreement, divergence, fit
from token_reduction.fit.searches import (
    FirstWithin,
    LayerByLayer,
    fit_g_search,
    fit_p_sigmoid,
    fit_vflowopt,
    fit_withdrawal,
)

__all__ = [
    "Bayes",
    "FirstWithin",
    "Fitted",
    "LayerByLayer",
    "Plan",
    "Search",
    "agreement",
    "divergence",
    "exit_labels",
    "fit",
    "fit_g_search",
    "fit_p_sigmoid",
    "fit_vflowopt",
    "fit_withdrawal",
    "train_gates",
]
