"""Ranks as processes: the transport over torch.distributed's back ends (gloo, NCCL).

On gloo a receive is posted when it is opened; NCCL gets the receives and sends of one exchange as one group. The NCCL branch
is written to NCCL's rules and has run on no GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenring.transport import LANES, Message, Transport, TransportError


class DistributedTransport(Transport):
    """torch.distributed, one communicator a lane, made and warmed collectively by every rank of the group.

    The lanes are bare back ends on the group's own store. `new_group` is no way to make them: names of groups that only their
    members make count the groups each rank has made before, so ranks with unlike histories wait for each other for ever.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_seconds: float) -> None:
        super().__init__(group.rank(), group.size(), timeout_seconds)
        self._batched = "nccl" in str(dist.get_backend(group))
        if self._batched:
            self.device = torch.device("cuda", torch.cuda.current_device())
        store = group.get_group_store()
        made = store.add(f"tokenring/made/{self.rank}", 1)
        self._lanes = [self._make_lane(dist.PrefixStore(f"tokenring/{made}/{lane}", store)) for lane in range(LANES)]
        self._receives: dict[tuple[int, int], Sequence[Message]] = {}
        self._works: dict[tuple[int, int], list[tuple[str, int, Any, Any]]] = {}

    def _make_lane(self, store: Any) -> Any:
        limit = timedelta(seconds=self.timeout_seconds)
        if self._batched:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            lane = dist.ProcessGroupNCCL(store, self.rank, self.world, options)
        else:
            lane = dist.ProcessGroupGloo(store, self.rank, self.world, limit)
        lane.allreduce([torch.zeros(1, device=self.device)]).wait()
        return lane

    def _open(self, lane: int, step: int, receives: Sequence[Message]) -> None:
        if self._batched:
            self._receives[(lane, step)] = receives
            return
        works = self._works.setdefault((lane, step), [])
        for peer, tensor in receives:
            works.append(("receive from", peer, self._post(step, peer, self._lanes[lane].recv, tensor), tensor))

    def _push(self, lane: int, step: int, sends: Sequence[Message]) -> None:
        backend, works = self._lanes[lane], self._works.setdefault((lane, step), [])
        if not self._batched:
            for peer, tensor in sends:
                works.append(("send to", peer, self._post(step, peer, backend.send, tensor), tensor))
            return
        receives = self._receives.pop((lane, step), ())
        if not receives and not sends:
            return
        backend._start_coalescing()
        for peer, tensor in receives:
            self._post(step, peer, backend.recv, tensor)
        for peer, tensor in sends:
            self._post(step, peer, backend.send, tensor)
        messages = (*receives, *sends)
        tensors = [tensor for _, tensor in messages]
        works.append(("exchange with", messages[0][0], backend._end_coalescing(), tensors))

    def _wait(self, lane: int, step: int) -> None:
        for verb, peer, work, _tensors in self._works.pop((lane, step), ()):
            try:
                if self._batched:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=self.timeout_seconds))
            except RuntimeError as error:
                raise TransportError(
                    f"rank {self.rank} of {self.world}, step {step}: {verb} rank {peer} failed "
                    f"(time-out {self.timeout_seconds:g} s): {error}"
                ) from error

    def _post(self, step: int, peer: int, post: Any, tensor: Tensor) -> Any:
        try:
            return post([tensor], peer, 0)
        except RuntimeError as error:
            self.poison = (
                f"rank {self.rank} of {self.world}, step {step}: {post.__name__} with rank {peer} refused: {error}"
            )
            raise TransportError(self.poison) from error
