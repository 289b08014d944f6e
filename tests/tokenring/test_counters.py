"""Counters of bytes and traces of events."""

from __future__ import annotations

from typing import Any

import tokenring as tr
from tests.tokenring.test_agreement import WORLD, local_shards


def test_counters_and_traces_nest() -> None:
    def work(group: Any) -> list:
        with tr.count_traffic(group) as outer, tr.trace(group) as events:
            tr.attention(*local_shards(group.rank()), group=group)
            with tr.count_traffic(group) as inner, tr.trace(group) as later:
                tr.attention(*local_shards(group.rank()), group=group)
            tr.attention(*local_shards(group.rank()), group=group)
        return [sum(outer.sent.values()), sum(inner.sent.values()), len(events.events), len(later.events)]

    for outer, inner, events, later in tr.run_local(WORLD, work):
        assert outer == 3 * inner > 0 and events == 3 * later > 0
