"""Sequence-parallel attention: exact, any schedule, forward and backward.

A schedule is data: `plan` builds it, `attention` runs it, `Plan.check`, `bytes_sent` and `explain` read it.
"""

from tokenring.agreement import AgreementError, prepare
from tokenring.api import attention
from tokenring.caching.cache import KVCache
from tokenring.caching.decode import decode_attention
from tokenring.checkpoint import attention_operators, save_attention
from tokenring.layout import Layout
from tokenring.loss import cross_entropy
from tokenring.mask import Mask
from tokenring.planning import plan
from tokenring.plans.plan import Plan
from tokenring.plans.shape import AttentionShape
from tokenring.plans.spec import plan_tensor
from tokenring.simulation.timeline import Timeline
from tokenring.topology import Topology
from tokenring.transport import Event, Trace, Traffic, TransportError, connect, count_traffic, trace
from tokenring.transport.inprocess import run_local

__all__ = [
    "AgreementError",
    "AttentionShape",
    "Event",
    "KVCache",
    "Layout",
    "Mask",
    "Plan",
    "Timeline",
    "Topology",
    "Trace",
    "Traffic",
    "TransportError",
    "attention",
    "attention_operators",
    "connect",
    "count_traffic",
    "cross_entropy",
    "decode_attention",
    "plan",
    "plan_tensor",
    "prepare",
    "run_local",
    "save_attention",
    "trace",
]
