"""Link lab: ranks in network namespaces, joined by links whose rate is capped, to test claims about link directions.

    python -m benchmarks.linklab raw  --topology mesh --mbit 40     what raw sockets reach: the denominator of every bound
    python -m benchmarks.linklab probe                              what Topology.probe finds, and what choosing by it costs
    python -m benchmarks.linklab run  --topology mesh --mbit 40     each schedule beside its own bound
    python -m benchmarks.linklab grid                               many cells: the best schedule, the choice of "auto"
    python -m benchmarks.linklab sparse                             AnchorAttention over ranks beside every dense schedule

Needs root, `ip` and `tc`, on Linux. Everything it makes has a name of its own process and is taken down at the end.
"""
