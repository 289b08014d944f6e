"""The page a person reads after a run: rich tables on a terminal, the same as plain lines elsewhere.

Everything comes from the one object of `--json` (`launch.records.merge`); nothing is measured or decided here.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from launch.experts_report import expert_lines, expert_rows
from launch.sparse_report import HEADERS, beside_dense_line, columns_line, sparse_lines, sparse_rows

WIDEST_MATRIX = 12
"""Ranks up to which bytes are shown link by link; the JSON always has all of them."""


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first column is left-aligned, the others right."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Lines:
    """Text under a title; `urgent` is set for what the user should act on."""

    title: str
    lines: tuple[str, ...]
    urgent: bool = False


def blocks(report: Mapping[str, Any]) -> list[Table | Lines]:
    """The report as titled blocks in reading order."""
    found: list[Table | Lines | None] = [
        _summary(report),
        _ranks(report),
        _links(report),
        *_sparse(report),
        *_experts(report),
        _stages(report),
        _verify(report),
        Lines("Warnings", tuple(report["warnings"]), urgent=True) if report["warnings"] else None,
        Lines("Notes", tuple(report["notes"])) if report["notes"] else None,
        Lines("Text", tuple(report["text"].splitlines()) or ("(empty)",)),
    ]
    return [block for block in found if block is not None]


def as_text(report: Mapping[str, Any]) -> str:
    """The page as plain text, the same at any width."""
    out = io.StringIO()
    for block in blocks(report):
        out.write(f"{block.title}\n")
        if isinstance(block, Table):
            out.writelines(f"  {line}\n" for line in _columns([block.headers, *block.rows]))
        else:
            out.writelines(f"  {line}\n" for line in block.lines)
        out.write("\n")
    return out.getvalue().rstrip("\n") + "\n"


def show(report: Mapping[str, Any], stream: TextIO) -> None:
    """Write the page to a stream: tables with colour when it is a terminal, else `as_text`."""
    if not stream.isatty():
        stream.write(as_text(report))
        stream.flush()
        return
    from rich.console import Console

    console = Console(file=stream)
    for block in blocks(report):
        console.print(_rich(block))


def human_bytes(count: float) -> str:
    """Bytes in the largest binary unit that keeps at least one whole.

    >>> human_bytes(0), human_bytes(1536), human_bytes(5 * 2**30)
    ('0 B', '1.5 KiB', '5.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _known_links(report: Mapping[str, Any]) -> str:
    """What `auto` knew of the links, where it was told."""
    links = report.get("links")
    return f", links known as a {links['kind']} of {links['gbytes_per_s']:.3g} GB/s a link" if links else ""


def _summary(report: Mapping[str, Any]) -> Lines:
    before, after = report["tokens_before"], report["tokens_after"]
    share = f" ({after / before:.1%} kept)" if before else ""
    seconds = report["seconds"]
    lines = [
        f"{_plural(report['ranks'], 'rank')} by {report['engine']}, schedule {report['schedule']}{_known_links(report)}",
        *(_machine(machine) for machine in report["hardware"]),
        f"{_plural(report['frames'], 'frame')}, {before:,} visual tokens before reduction, {after:,} after{share}",
        f"{_plural(len(report['generated_ids']), 'token')} written",
    ]
    if "first_token" in seconds:
        lines.append(f"{seconds['first_token']:.2f} s to the first token, after loading")
    if report["tokens_per_second"] is not None:
        lines.append(f"{report['tokens_per_second']:.2f} tokens per second after it")
    if "total" in seconds:
        lines.append(f"{seconds['total']:.1f} s in all")
    return Lines(f"tokenring {report['version']}", tuple(lines))


def _machine(machine: Mapping[str, Any]) -> str:
    ranks = machine["ranks"]
    which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    parts = [
        f"{machine['cores']} cores {machine['cpu']}" if "cores" in machine else None,
        human_bytes(machine["memory_bytes"]) if "memory_bytes" in machine else None,
        machine["device"] if machine.get("device", "cpu") != "cpu" else None,
        f"torch {machine['torch']}" if "torch" in machine else None,
    ]
    return f"{which} on {machine['host']}: {', '.join(part for part in parts if part)}"


def _ranks(report: Mapping[str, Any]) -> Table:
    sent = [sum(row) for row in report["bytes_sent"]]
    columns = (
        report["tokens_per_rank"],
        report["cache_bytes_per_rank"],
        report["peak_bytes_per_rank"],
        sent,
    )
    rows = [
        (str(rank), f"{tokens:,}", human_bytes(cache), human_bytes(peak), human_bytes(out))
        for rank, (tokens, cache, peak, out) in enumerate(zip(*columns))
    ]
    if len(rows) > 1:
        totals = [sum(column) for column in columns]
        rows.append(("all", f"{totals[0]:,}", *(human_bytes(total) for total in totals[1:])))
    return Table("Ranks", ("rank", "tokens", "cache (allocated)", "peak memory", "sent"), tuple(rows))


def _links(report: Mapping[str, Any]) -> Table | Lines | None:
    world = report["ranks"]
    if world == 1:
        return None
    if world > WIDEST_MATRIX:
        return Lines("Bytes per link", (f"{world} x {world} links: see bytes_sent in the JSON",))
    rows = tuple(
        (str(source), *("-" if source == peer else human_bytes(size) for peer, size in enumerate(row)))
        for source, row in enumerate(report["bytes_sent"])
    )
    return Table("Bytes per link", ("from \\ to", *map(str, range(world))), rows)


def _sparse(report: Mapping[str, Any]) -> list[Table | Lines]:
    attention = report["attention"]
    if attention is None:
        return []
    rows = tuple(sparse_rows(attention, human_bytes))
    return [Lines("Sparse prefill", sparse_lines(attention)), Table("Layers", HEADERS, rows)]


def _experts(report: Mapping[str, Any]) -> list[Table | Lines]:
    """Experts' bytes beside all others: frames' tokens on their way to their ranks, and attention."""
    if report["experts"] is None:
        return []
    rows = expert_rows(report)
    named = [(str(rank), row) for rank, row in enumerate(rows)]
    if len(rows) > 1:
        named.append(("all", tuple(map(sum, zip(*rows)))))
    shown = tuple((name, f"{tokens:,}", *map(human_bytes, sizes)) for name, (tokens, *sizes) in named)
    headers = ("rank", "tokens of experts, prefill", "rows sent", "metadata sent", "sent for all else")
    return [Lines("Experts", expert_lines(report["experts"])), Table("Bytes of experts", headers, shown)]


def _stages(report: Mapping[str, Any]) -> Table:
    """Seconds and peak memory of each stage: the slowest and the largest rank."""
    peaks: dict[str, int] = {}
    for rank in report["stage_peak_bytes_per_rank"]:
        for stage, size in rank.items():
            peaks[stage] = max(size, peaks.get(stage, 0))
    rows = tuple(
        (stage, f"{seconds:.2f}", human_bytes(peaks[stage]) if stage in peaks else "-")
        for stage, seconds in report["seconds"].items()
        if stage not in ("first_token", "total")
    )
    return Table("Stages", ("stage", "seconds, slowest rank", "peak memory, largest rank"), rows)


def _verify(report: Mapping[str, Any]) -> Lines | None:
    verify = report["verify"]
    if verify is None:
        return None
    from launch.records import verified

    known = {
        *("max_logit_diff", "tolerance", "same_tokens", "first_difference", "written_within_tolerance"),
        *("max_logit_diff_all", "sdpa_eager_diff_all", "tolerance_all", "all_within_tolerance"),
        *("columns", "columns_chosen_otherwise", "columns_allowed_share", "columns_within_tolerance", "beside_dense"),
    }
    lines = [_written_logits(verify), _same_tokens(verify), _all_logits(verify)]
    lines += [columns_line(verify), beside_dense_line(verify)]
    lines += [f"{name.replace('_', ' ')}: {_figure(value)}" for name, value in verify.items() if name not in known]
    shown = tuple(line for line in lines if line is not None)
    pairs = "over the same pairs" if "columns" in verify else "and plain attention"
    return Lines(f"Compared with one rank {pairs}", shown, urgent=not verified(report))


def _written_logits(verify: Mapping[str, Any]) -> str:
    apart, allowed = verify["max_logit_diff"], verify["tolerance"]
    verdict = _verdict(float(apart) <= float(allowed))
    return f"written tokens: logits differ by at most {_small(apart)} (tolerance {_small(allowed)}): {verdict}"


def _same_tokens(verify: Mapping[str, Any]) -> str:
    if verify["same_tokens"]:
        return "the same tokens as one rank"
    first = verify.get("first_difference")
    if first is None:
        return "not the same tokens as one rank"
    text = f"first difference at written token {first['position'] + 1}: {first['token']} here, {first['alone']} on one rank"
    text += f"; gap of its best two logits there {_small(first['gap'])}"
    if "written_within_tolerance" not in verify:
        return text
    excused = float(first["gap"]) < float(verify["tolerance"])
    return f"{text}, {'below' if excused else 'not below'} the tolerance: {_verdict(excused)}"


def _all_logits(verify: Mapping[str, Any]) -> str | None:
    if "max_logit_diff_all" not in verify:
        return None
    text = f"all positions of the prompt: at most {_small(verify['max_logit_diff_all'])} apart"
    if "sdpa_eager_diff_all" in verify:
        text += f"; sdpa and eager alone differ by {_small(verify['sdpa_eager_diff_all'])}"
    if "tolerance_all" in verify:
        text += f", allowed is {_small(verify['tolerance_all'])}"
    if "all_within_tolerance" in verify:
        text += f": {_verdict(verify['all_within_tolerance'])}"
    return text


def _small(value: Any) -> str:
    return f"{float(value):.2e}"


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figure(item)}" for name, item in value.items())
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _rich(block: Table | Lines) -> Any:
    from rich import box
    from rich.panel import Panel
    from rich.table import Table as RichTable
    from rich.text import Text

    if isinstance(block, Lines):
        style = "yellow" if block.urgent else "dim" if block.title == "Notes" else "cyan"
        body = Text("\n".join(block.lines))
        return Panel(body, title=Text(block.title), title_align="left", border_style=style, box=box.ROUNDED)
    table = RichTable(title=Text(block.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, header in enumerate(block.headers):
        table.add_column(Text(header), justify="left" if number == 0 else "right")
    for row in block.rows:
        table.add_row(*(Text(cell) for cell in row), style="bold" if row[0] == "all" else None)
    return table
