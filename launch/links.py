"""What `auto` schedules and dispatchers know of the links between the ranks: nothing (then bytes decide), a file, or a measurement.

--topology FILE     the same on every rank, checked before any starts
--topology probe    measured once the model is loaded; experts over a part of the ranks measure that part's links
"""

from __future__ import annotations

from typing import Any

from launch.config import RunConfig
from launch.errors import ConfigError
from tokenring.topology import Topology

PROBE = "probe"


def links_of_file(config: RunConfig) -> Topology | None:
    """The links that a file describes; None where no file is given.

    Raises:
        ConfigError: it cannot be read, or describes another number of ranks.
    """
    given, world = config.engine.topology, config.engine.nproc
    if given in (None, PROBE):
        return None
    try:
        topology = Topology.load(given)
    except (OSError, ValueError) as error:
        raise ConfigError(f"engine.topology is {given!r}: {error}; give {PROBE}, or a file of Topology.save") from error
    if topology.world != world:
        raise ConfigError(
            f"engine.topology is {given!r}, which describes {topology.world} ranks, and engine.nproc is {world}; give a file "
            f"for {world} ranks, or {PROBE}"
        )
    return topology


def links_between(config: RunConfig, group: Any) -> Topology | None:
    """The links between a group's ranks; None where nobody asked. Collective over the group where they are measured.

    Raises:
        ConfigError: the file cannot be used, or describes more ranks than the group has (see `check_part`).
    """
    if config.engine.topology == PROBE:
        return Topology.probe(group, timeout_seconds=config.engine.exchange_timeout_seconds)
    return links_of_file(config)


def check_part(config: RunConfig, ranks: int) -> None:
    """Refuse a file for a dispatcher that has to choose for a part of the ranks.

    Raises:
        ConfigError: it says nothing of the links of such a part alone.
    """
    if config.moe.dispatcher == "auto" and ranks not in (1, config.engine.nproc) and links_of_file(config) is not None:
        raise ConfigError(
            f"engine.topology is {config.engine.topology!r}, which describes all {config.engine.nproc} ranks, and experts are "
            f"spread over {ranks} of them at a time; give --topology {PROBE}, or a --dispatcher by name"
        )
