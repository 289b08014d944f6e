"""Two pictures of a run: which tokens were kept, and what each rank did when.

    kept.png       sample frames; cells whose token was dropped are dimmed
    timeline.png   one row a rank: the stages of the whole run; compute, transfer and idle time of the prefill; and two
                   attention layers of it close up

A transfer is drawn from the moment it was posted to the moment its wait returned: the rank knows no more. Idle time is what
it spent inside waits.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.output import write_atomic
from launch.records import RankRecord, unpack_image

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT_PNG = "kept.png"
TIMELINE_PNG = "timeline.png"
MOST_SAMPLES = 8
DIMMED = 0.22
INK, PAPER, IDLE = "#24292f", "#ffffff", "#dadde1"
LAYERS, ATTENTION, TRANSFER = "#b5d3e7", "#1f6aa5", "#e8912d"
STAGES = ("#4c78a8", "#72b7b2", "#59a14f", "#edc948", "#f28e2b", "#b07aa1", "#9c755f", "#bab0ac", "#e15759")
COMPUTE_KINDS = ("compute", "merge")
TRANSFER_KINDS = ("send",)


def write(folder: Path, records: Sequence[RankRecord]) -> str | None:
    """Draw both pictures into `folder`; a picture with nothing to show is left out.

    Returns:
        None, or why there are no pictures (matplotlib is not installed).
    """
    try:
        import matplotlib
    except ImportError:
        return "no pictures were drawn: matplotlib is not installed (extra `bench`)"
    ordered = sorted(records, key=lambda record: record.rank)
    samples = sorted((sample for record in ordered for sample in record.kept), key=lambda sample: sample["frame"])
    with matplotlib.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK}):
        if samples:
            _save(kept_figure(spread_evenly(samples, MOST_SAMPLES)), folder / KEPT_PNG)
        if any(record.events for record in ordered):
            _save(timeline_figure(ordered), folder / TIMELINE_PNG)
    return None


def spread_evenly(samples: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, first and last included.

    >>> spread_evenly(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(samples) <= most:
        return list(samples)
    return [samples[round(number * (len(samples) - 1) / (most - 1))] for number in range(most)]


def kept_figure(samples: Sequence[Mapping[str, Any]]) -> Figure:
    """Sample frames with dropped cells dimmed."""
    from matplotlib.figure import Figure

    columns = len(samples) if len(samples) <= 3 else 4 if len(samples) % 4 in (0, 3) else 3
    rows = math.ceil(len(samples) / columns)
    height, width = _picture(samples[0]).shape[:2]
    side = 3.1
    figure = Figure(
        figsize=(columns * side, rows * (side * height / width + 0.34) + 0.5), facecolor=PAPER, layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, sample in zip(axes.flat, samples):
        cells = sample["grid"][0] * sample["grid"][1]
        ax.imshow(_picture(sample), interpolation="nearest")
        ax.set_title(
            f"frame {sample['frame']}, {sample['seconds']:.2f} s: {len(sample['cells'])} of {cells}", fontsize=9.5
        )
    kept = sum(len(sample["cells"]) for sample in samples)
    total = sum(math.prod(sample["grid"]) for sample in samples)
    figure.suptitle(
        f"Kept tokens: {kept} of {total} in these frames ({kept / total:.1%}); bright cells stay", fontsize=12
    )
    return figure


def _picture(sample: Mapping[str, Any]) -> np.ndarray:
    """The frame with dropped cells dimmed and grey, kept cells as they are; grey cells where the record has no image."""
    import numpy as np

    h, w = sample["grid"]
    kept = np.zeros(h * w, dtype=bool)
    kept[list(sample["cells"])] = True
    image = unpack_image(sample["image"]) if sample.get("image") else np.full((h * 8, w * 8, 3), 200, np.uint8)
    scale = math.ceil(320 / max(image.shape[:2]))
    image = image.repeat(scale, axis=0).repeat(scale, axis=1).astype(np.float32) / 255
    rows = np.minimum(np.arange(image.shape[0]) * h // image.shape[0], h - 1)
    columns = np.minimum(np.arange(image.shape[1]) * w // image.shape[1], w - 1)
    stays = kept.reshape(h, w)[rows][:, columns][..., None]
    grey = image.mean(axis=2, keepdims=True)
    # Lifted a little from black, so that dropped parts of a dark frame still differ from an empty page.
    return np.clip(np.where(stays, image, 0.06 + DIMMED * (0.7 * grey + 0.3 * image)), 0, 1)


def timeline_figure(records: Sequence[RankRecord]) -> Figure:
    """Stages of the whole run; below them compute, transfer and idle time of the prefill, whole and close up."""
    from matplotlib.figure import Figure

    whole = prefill_window(records)
    near = None if whole is None else close_up(records, *whole)
    panels = 1 + (whole is not None) + (near is not None)
    row = 0.26 + 2.0 / (len(records) + 4)
    size = (11.5, min(panels * (row * len(records) + 1.4), 48))
    figure = Figure(figsize=size, facecolor=PAPER, layout="constrained")
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    _draw_stages(axes[0], records)
    if whole is not None:
        _draw_work(axes[1], records, *whole, "Prefill")
    if near is not None:
        _draw_work(axes[2], records, *near, "Two attention layers of the prefill, close up")
    return figure


def prefill_window(records: Sequence[RankRecord]) -> tuple[float, float] | None:
    """First start and last stop of the stage `prefill`, or None where nothing was recorded inside it."""
    stages = [event for record in records for event in record.events if _is_stage(event, "prefill")]
    if not stages:
        return None
    low, high = min(event["start"] for event in stages), max(event["stop"] for event in stages)
    inside = any(_spans(record, COMPUTE_KINDS, low, high) for record in records)
    return (low, high) if inside else None


def close_up(records: Sequence[RankRecord], low: float, high: float) -> tuple[float, float] | None:
    """From one attention layer in the middle of the prefill to the second one after it, on rank 0's steps."""
    starts = [
        event["start"]
        for event in records[0].events
        if event["kind"] == "compute" and event["name"] == "step 0" and low <= event["start"] <= high
    ]
    if len(starts) < 5:
        return None
    middle = len(starts) // 2
    return starts[middle], starts[middle + 2]


def union_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals.

    >>> union_seconds([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, reach = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reach))
        reach = max(reach, stop)
    return total


def _draw_stages(ax: Axes, records: Sequence[RankRecord]) -> None:
    names = list(dict.fromkeys(e["name"] for record in records for e in record.events if e["kind"] == "stage"))
    colour = {name: STAGES[number % len(STAGES)] for number, name in enumerate(names)}
    for row, record in enumerate(records):
        for name in names:
            spans = [(event["start"], event["stop"]) for event in record.events if _is_stage(event, name)]
            ax.broken_barh(_widths(spans), (row - 0.34, 0.68), facecolors=colour[name], linewidth=0)
    stop = max((event["stop"] for record in records for event in record.events), default=1.0)
    _dress(ax, records, stop, "Stages of the whole run")
    ax.set_xlabel("seconds since all ranks met")
    _legend(ax, [(name, colour[name]) for name in names])


def _draw_work(ax: Axes, records: Sequence[RankRecord], low: float, high: float, title: str) -> None:
    """Upper part of a row: what the rank does. Lower part: what is on the wire meanwhile."""
    length = max(high - low, 1e-9)
    unit, factor = ("milliseconds", 1e3) if length < 1 else ("seconds", 1.0)

    def bars(spans: Sequence[tuple[float, float]], row: float, height: float, colour: str) -> None:
        moved = [((start - low) * factor, (stop - low) * factor) for start, stop in spans]
        ax.broken_barh(_widths(moved), (row, height), facecolors=colour, linewidth=0)

    for row, record in enumerate(records):
        attention, idle = _spans(record, COMPUTE_KINDS, low, high), _spans(record, ("wait",), low, high)
        bars([(low, high)], row - 0.38, 0.5, LAYERS)
        bars(idle, row - 0.38, 0.5, IDLE)
        bars(attention, row - 0.38, 0.5, ATTENTION)
        bars(_spans(record, TRANSFER_KINDS, low, high), row + 0.14, 0.2, TRANSFER)
        shares = f"{union_seconds(attention) / length:.0%} attention\n{union_seconds(idle) / length:.0%} idle"
        ax.text(1.01, row, shares, transform=ax.get_yaxis_transform(), va="center", fontsize=8.5)
    _dress(ax, records, length * factor, title)
    ax.set_xlabel(unit)
    entries = [
        ("attention", ATTENTION),
        ("other layers", LAYERS),
        ("idle: waiting", IDLE),
        ("transfer under way", TRANSFER),
    ]
    _legend(ax, entries)


def _is_stage(event: Mapping[str, Any], name: str) -> bool:
    return event["kind"] == "stage" and event["name"] == name


def _spans(record: RankRecord, kinds: Sequence[str], low: float, high: float) -> list[tuple[float, float]]:
    """Start and stop of the events of these kinds that touch [low, high], cut to it."""
    return [
        (max(event["start"], low), min(event["stop"], high))
        for event in record.events
        if event["kind"] in kinds and event["stop"] >= low and event["start"] <= high
    ]


def _widths(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(start, stop - start) for start, stop in spans]


def _dress(ax: Axes, records: Sequence[RankRecord], stop: float, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=24)
    ax.set_yticks(range(len(records)), [f"rank {record.rank}" for record in records])
    ax.set_ylim(len(records) - 0.5, -0.5)
    ax.set_xlim(0.0, max(stop, 1e-9))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#d0d4d9", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)


def _legend(ax: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """One line of colour patches between the title and the rows."""
    from matplotlib.patches import Patch

    ax.legend(
        handles=[Patch(facecolor=colour, label=name) for name, colour in entries],
        loc="lower left",
        bbox_to_anchor=(-0.008, 0.985),
        ncols=max(1, len(entries)),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )


def _save(figure: Figure, path: Path) -> None:
    """Through memory, so that the file appears whole. A bare Figure draws with Agg: no display, no global state."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    write_atomic(path, out.getvalue())
