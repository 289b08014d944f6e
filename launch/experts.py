"""Experts over the ranks of a run: which folding, which groups, and what it cost.

attention   CP = all ranks                                     one sequence, spread
experts     ETP x EP x EDP = all ranks, ETP varying fastest    `moe.Folding` over the same ranks
"""

from __future__ import annotations

import math
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from launch.config import RunConfig
from launch.errors import ConfigError
from launch.links import check_part, links_between
from launch.models import DEMOS
from launch.models.base import Adapter
from launch.models.expert_block import ExpertBlock, ExpertLayer
from launch.models.files import language_config
from moe import Folding
from moe.dispatch import MoETraffic
from moe.folding_groups import FoldingGroups
from tokenring.topology import Topology
from tokenring.transport import Transport, connect

if TYPE_CHECKING:
    from moe.integrations.huggingface_loading import OwnExperts

UPCYCLED = "demo-moe"
"""The model whose experts are as many as one likes."""


@dataclass(frozen=True)
class ExpertSizes:
    """What a model's layers of experts are."""

    experts: int
    """E."""
    topk: int
    """k."""
    ffn: int
    """Inner width of one expert."""


def sizes_of(config: RunConfig, text: Mapping[str, Any]) -> ExpertSizes | None:
    """The experts of a run, from what the language model's configuration says; None where it has none.

    Raises:
        ConfigError: settings of experts that the model cannot use.
    """
    source, given = config.model.source, config.moe.given
    if source == UPCYCLED:
        return ExpertSizes(config.moe.experts, config.moe.topk, int(text["intermediate_size"]))
    experts = text.get("num_experts") or text.get("num_local_experts")
    if not experts:
        if given:
            raise ConfigError(
                f"moe.{given[0]} is {getattr(config.moe, given[0])!r}, but model {source} has no experts; leave it out or give "
                f"--model {UPCYCLED}, or the directory of a mixture-of-experts model"
            )
        return None
    topk = int(text["num_experts_per_tok"])
    if own := [name for name in ("experts", "topk") if name in given]:
        raise ConfigError(
            f"moe.{own[0]} is {getattr(config.moe, own[0])!r}, but model {source} has {experts} experts, {topk} for each token; "
            "leave it out"
        )
    return ExpertSizes(int(experts), topk, int(text.get("moe_intermediate_size") or text["intermediate_size"]))


def folding_of(config: RunConfig, sizes: ExpertSizes) -> Folding:
    """The mapping of a run: attention's CP over all ranks, experts as configured.

    Raises:
        ConfigError: it breaks a rule, which is named with the nearest legal mapping.
    """
    moe, world = config.moe, config.engine.nproc
    ep = math.gcd(sizes.experts, max(1, world // moe.etp)) if moe.ep is None else moe.ep
    try:
        folding = Folding(world=world, cp=world, ep=ep, etp=moe.etp)
        folding.check_model(num_experts=sizes.experts, expert_ffn=sizes.ffn)
    except ValueError as error:
        raise ConfigError(f"moe.ep is {moe.ep}, moe.etp is {moe.etp}, engine.nproc is {world}: {error}") from error
    block, per_node = ep * moe.etp, moe.ranks_per_node
    if per_node is not None and (block % per_node or per_node % moe.etp):
        raise ConfigError(
            f"moe.ranks_per_node is {per_node}: it must divide ep x etp = {block} and be a multiple of etp = {moe.etp}"
        )
    return folding


def own_experts(config: RunConfig, rank: int) -> OwnExperts | None:
    """Which experts of a model directory a rank reads, and which part of each; None: all, or there are none.

    Raises:
        ConfigError: the directory, or the mapping, cannot be used.
    """
    source = config.model.source
    if source in DEMOS or (config.output.verify and rank == 0):
        return None
    try:
        sizes = sizes_of(config, language_config(Path(source)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if sizes is None or (folding := folding_of(config, sizes)).ep * folding.etp == 1:
        return None
    from moe.integrations.huggingface_loading import OwnExperts

    place = folding.coordinates(rank)
    return OwnExperts(place["ep"], folding.ep, place["etp"], folding.etp)


def check_experts(config: RunConfig, text: Mapping[str, Any]) -> None:
    """Refuse experts' settings that a model of this configuration cannot use. Raises ConfigError."""
    sizes = sizes_of(config, text)
    if sizes is not None:
        folding = folding_of(config, sizes)
        check_part(config, folding.ep * folding.etp)


def node_size(hosts: Sequence[int], block: int, etp: int) -> int | None:
    """Ranks of one node of an EP x ETP block, where machines cut it into equal nodes of whole ETP groups; else None: one node.

    >>> node_size([7, 7, 9, 9], block=4, etp=1), node_size([7, 7, 7, 7], block=4, etp=1), node_size([7, 9, 7, 9], 4, 1)
    (2, None, None)
    """
    size = next((i for i, host in enumerate(hosts) if host != hosts[0]), len(hosts))
    regular = all(host == hosts[i - i % size] for i, host in enumerate(hosts))
    regular &= len(set(hosts[::size])) == len(hosts[::size])
    return size if regular and size < block and block % size == 0 and size % etp == 0 else None


@dataclass
class Experts:
    """The experts of one rank."""

    folding: Folding
    block: ExpertBlock
    layers: Sequence[ExpertLayer]
    runtime: Transport
    """Of all ranks."""
    groups: FoldingGroups | None = field(default=None, repr=False)
    """None where no expert is spread."""
    moved: MoETraffic | None = field(default=None, repr=False)

    @classmethod
    def spread(
        cls, adapter: Adapter, config: RunConfig, group: Any, runtime: Transport, links: Topology | None = None
    ) -> Experts | None:
        """Collective over all ranks of the run's group: leave each with its own experts. None where the model has none.

        links: between all ranks.
        """
        sizes = sizes_of(config, adapter.text_model.config.to_dict())
        if sizes is None:
            return None
        folding = folding_of(config, sizes)
        groups = folding.create_groups(group=group) if folding.ep * folding.etp > 1 else None
        block = _block(config, sizes, folding, groups, runtime, links)
        keep_whole = config.output.verify and runtime.rank == 0
        return cls(folding, block, adapter.spread_experts(block, keep_whole), runtime, groups)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what dispatch and combine send from here."""
        # one for all: the layers share their groups, and bytes are counted by group
        with self.layers[0].sender.count_traffic() as self.moved:
            yield

    def close(self) -> None:
        """Collective over all ranks: let go of the groups; from now on the model runs alone only."""
        if self.groups is not None:
            # nobody closes a connection that another rank still reads from
            self.runtime.all_gather(torch.zeros(1, device=self.runtime.device), same_shape=True, control=True)
            for group in set(self.groups.by_axes.values()):
                dist.destroy_process_group(group)
            self.groups = None

    def record(self) -> dict[str, Any]:
        """This rank's share of the report; see `launch.experts_report.merge_experts`."""
        assert self.moved is not None
        f, here = self.folding, self.folding.coordinates(self.runtime.rank)
        return {
            "experts": self.block.experts,
            "topk": self.block.topk,
            "ep": f.ep,
            "etp": f.etp,
            "edp": f.edp,
            "ep_rank": here["ep"],
            "etp_rank": here["etp"],
            "dispatcher": self.layers[0].dispatcher.name,
            "ranks_per_node": self.block.ranks_per_node,
            "bytes_sent": self._to_ranks(self.moved.rows),
            "metadata_bytes_sent": self._to_ranks(self.moved.metadata),
            "prefill_tokens": [layer.prefill_tokens.tolist() for layer in self.layers],
        }

    def _to_ranks(self, sent: dict[tuple[int, int], int]) -> list[int]:
        """Bytes for each rank of the run, from bytes between places of the EP x ETP block."""
        block = next(group for group in self.folding.moe_groups("etp-ep") if self.runtime.rank in group)
        row = [0] * self.folding.world
        for (_, place), size in sent.items():
            row[block[place]] = size
        return row


def _block(
    config: RunConfig,
    sizes: ExpertSizes,
    folding: Folding,
    made: FoldingGroups | None,
    runtime: Transport,
    links: Topology | None,
) -> ExpertBlock:
    moe, size = config.moe, folding.ep * folding.etp
    groups: dict[str, Any] = {}
    per_node = moe.ranks_per_node
    if made is not None:
        groups = {"ep_group": made["ep"], "etp_group": made["etp"]}
        for group in groups.values():
            connect(group, timeout_seconds=config.engine.exchange_timeout_seconds)
        if per_node is None and moe.dispatcher in ("hierarchical", "auto"):
            host = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=runtime.device)
            hosts = runtime.all_gather(host, same_shape=True, control=True)
            per_node = node_size([int(one) for one in hosts], size, folding.etp)
        if moe.dispatcher == "auto" and links is not None:
            check_part(config, size)
            groups["topology"] = links if size == folding.world else links_between(config, made["etp-ep"])
    return ExpertBlock(
        experts=sizes.experts,
        topk=sizes.topk,
        dispatcher=moe.dispatcher,
        ranks_per_node=per_node,
        chunks=moe.chunks,
        seed=config.generate.seed,
        **groups,
    )
