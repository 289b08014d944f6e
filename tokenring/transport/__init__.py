"""Point-to-point transport: lanes of first-in-first-out exchanges between the ranks of one group.

A *lane* is one communicator. On a lane every rank issues its exchanges in the same order; one exchange holds all that a
rank receives and sends in one step, and is driven by three verbs:

    open(lane, step, receives)    receives are posted (early: before the sends they answer, one step ahead where possible)
    push(lane, step, sends)       sends are posted; NCCL gets both halves as one group here
    wait(lane, step)              all of the exchange has arrived and left, or TransportError names rank, step and peer

No tags are relied on: between two ranks, messages of one lane match in the order they were issued. A lane of its own carries
headers (`announce`): what a rank is about to do, which all ranks judge before anything after it is posted.

A rank that fails tells the others, which stop waiting at once; nothing stays posted, and the group refuses every later call.
Bytes and events are counted here, where they really leave.
"""

from tokenring.transport.base import SingleRank, Transport
from tokenring.transport.connect import connect, count_traffic, trace
from tokenring.transport.events import Event, Trace, Traffic
from tokenring.transport.messages import HEADER_BYTES, LANES, Message, TransportError, Verdict

__all__ = [
    "HEADER_BYTES",
    "LANES",
    "Event",
    "Message",
    "SingleRank",
    "Trace",
    "Traffic",
    "Transport",
    "TransportError",
    "Verdict",
    "connect",
    "count_traffic",
    "trace",
]
