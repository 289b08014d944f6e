"""Long inputs: windows, refusals, flat memory."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain

import pytest
import torch

from tests.token_reduction.cases import METHODS, batch, one
from token_reduction import Budget, VisualTokens, build, reduce_stream
from token_reduction.tokens import take_channels


def runs_of(tokens: VisualTokens, lengths: list[int]):
    t, h, w = tokens.grid[0]
    first = 0
    for frames in lengths:
        rows = torch.arange(first * h * w, (first + frames) * h * w)
        channels = take_channels(tokens.channels, rows)
        yield VisualTokens(tokens.x[rows], [0, len(rows)], [(frames, h, w)], tokens.positions[:, rows], channels)
        first += frames
    assert first == t


@pytest.mark.parametrize("name", METHODS)
def test_a_stream_equals_its_windows_whatever_runs_the_reader_yields(name):
    tokens = batch(((11, 4, 4),))
    method, cells = build(name), 16
    expected = []
    for number, (first, last) in enumerate(((0, 4), (4, 8), (8, 11))):
        rows = slice(first * cells, last * cells)
        channels = take_channels(tokens.channels, rows)
        grid = [(last - first, 4, 4)]
        part = VisualTokens(tokens.x[rows], [0, (last - first) * cells], grid, tokens.positions[:, rows], channels)
        kept = method.reduce(part, Budget.ratio(0.3), torch.Generator().manual_seed(number))
        expected.append((kept.index + first * cells).tolist())
    for lengths in ([11], [1] * 11, [3, 5, 3]):
        seen = []
        stream = reduce_stream(
            method,
            runs_of(tokens, lengths),
            Budget.ratio(0.3),
            window=4,
            progress=lambda done, kept, seen=seen: seen.append((done, kept)),
        )
        got = list(stream)
        assert [w.index.tolist() for w in got] == expected
        assert torch.equal(torch.cat([w.positions for w in got], 1), tokens.positions[:, list(chain(*expected))])
        assert seen[-1] == (11, sum(map(len, expected))) and [done for done, _ in seen] == [4, 8, 11]


def test_a_count_of_a_stream_is_kept_exactly_and_needs_the_length():
    tokens = batch(((11, 4, 4),))
    stream = reduce_stream(build("divprune"), runs_of(tokens, [5, 6]), Budget.count(23), window=4, total_frames=11)
    assert sum(w.index.numel() for w in stream) == 23
    with pytest.raises(ValueError, match="needs total_frames"):
        next(reduce_stream(build("divprune"), runs_of(tokens, [11]), Budget.count(23), window=4))
    for wrong in (9, 12):
        with pytest.raises(ValueError, match=f"{wrong} (frames )?that were said"):
            list(reduce_stream(build("uniform"), runs_of(tokens, [11]), Budget.count(23), window=4, total_frames=wrong))


def test_an_hour_at_once_is_refused_with_the_estimate_and_the_way_out():
    x = torch.zeros(1, 384).expand(921_600, 384)  # no memory: the refusal looks at sizes alone
    hour = VisualTokens(x, [0, 921_600], [(3600, 16, 16)], torch.zeros(1, 921_600, dtype=torch.int64))
    for name in ("divprune", "facility"):
        with pytest.raises(
            ValueError, match=rf"{name} of item 0 with 921600 tokens to 92160 .* multiply-adds.*32 frames"
        ):
            build(name).reduce(hour, Budget.ratio(0.1))
    outgrowing = {"divprune", "facility", "todre", "mmtok", "catp", "cdpruner", "fastvid"}
    for name in METHODS:
        assert build(name).work((32, 16, 16), 819, 384) < 2e11  # what the message advises is cheap
        assert (build(name).work((3600, 16, 16), 92_160, 384) > 0) == (name in outgrowing)


def test_memory_of_a_selection_is_linear_in_its_tokens():
    """Peak memory of 8,192 tokens beside 4,096: the matrix of all pairs would take 512 MiB in float64."""
    code = """
import resource, sys, torch
from token_reduction import Budget, VisualTokens, build
torch.set_num_threads(1)
x = torch.randn(int(sys.argv[1]), 32, generator=torch.Generator().manual_seed(0))
tokens = VisualTokens(x, [0, len(x)], [(len(x) // 64, 8, 8)], torch.zeros(1, len(x), dtype=torch.int64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, options in (("divprune", {}), ("cdpruner", {"relevance": False}), ("facility", {"sampler": "stochastic", "accuracy": 0.5})):
    build(name, **options).reduce(tokens, Budget.count(32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    used = []
    for n in ("4096", "8192"):
        done = subprocess.run([sys.executable, "-c", code, n], capture_output=True, text=True, check=True)
        used.append(int(done.stdout))
    assert used[1] < 100_000  # KiB
    assert used[1] < 3 * max(used[0], 30_000)


def test_bad_streams_are_refused():
    tokens = batch(((4, 4, 4),))
    with pytest.raises(ValueError, match="at least 1 frame"):
        next(reduce_stream(build("uniform"), [tokens], Budget.ratio(0.5), window=0))
    with pytest.raises(ValueError, match="a run is one item, got 3"):
        next(reduce_stream(build("uniform"), [batch()], Budget.ratio(0.5), window=4))
    with pytest.raises(ValueError, match=r"share \(h, w\)"):
        list(reduce_stream(build("uniform"), [tokens, one(torch.zeros(4, 12))], Budget.ratio(0.5), window=8))


def test_streams_refuse_windows_budgets_and_runs_of_another_kind():
    for runs, budget, window, said in (
        ([], Budget.ratio(0.5), 1.5, "in whole numbers, got 1.5"),
        ([], None, 2, "needs a Budget, got None"),
        ([torch.zeros(3, 3)], Budget.ratio(0.5), 2, "runs are VisualTokens, got Tensor"),
    ):
        with pytest.raises(ValueError, match=said):
            list(reduce_stream(build("uniform"), runs, budget, window=window))
