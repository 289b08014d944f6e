"""Sharing of links: against the definition of max-min fairness, and against sums written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenring.links.flows import fair_rates, finish_times

routes = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), min_size=1, max_size=12)
rates = st.lists(st.floats(0.1, 10), min_size=6, max_size=6)
limits = st.lists(st.one_of(st.just(math.inf), st.floats(0.05, 5)), min_size=12, max_size=12)


@given(routes, rates, limits)
def test_sharing_is_max_min_fair(paths: list[list[int]], capacity: list[float], own: list[float]) -> None:
    """The definition: no link overfull, and every flow at its limit or on a full link where nobody is faster."""
    own = own[: len(paths)]
    found = fair_rates(paths, dict(enumerate(capacity)), own)
    load = [sum(rate for rate, path in zip(found, paths) if link in path) for link in range(6)]
    assert all(total <= rate * (1 + 1e-6) for total, rate in zip(load, capacity))
    for rate, path, limit in zip(found, paths, own):
        fastest = {link: max(r for r, p in zip(found, paths) if link in p) for link in path}
        held = [
            link for link in path if load[link] >= capacity[link] * (1 - 1e-6) and rate >= fastest[link] * (1 - 1e-6)
        ]
        assert rate <= limit * (1 + 1e-6) and (held or rate >= limit * (1 - 1e-6))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8), st.floats(0.1, 10))
def test_one_link_moves_every_byte_without_a_gap(sizes: list[float], capacity: float) -> None:
    """On one link the k-th smallest ends when all smaller ones and as much of each larger one have moved."""
    ends = finish_times([["a"]] * len(sizes), {"a": capacity}, [math.inf] * len(sizes), sizes)
    expected = [sum(min(size, other) for other in sizes) / capacity for size in sizes]
    assert ends == pytest.approx(expected)
