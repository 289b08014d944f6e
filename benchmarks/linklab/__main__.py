"""The command: `python -m benchmarks.linklab raw | probe | run | grid | sparse`."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.linklab import report, sparse
from benchmarks.linklab.cells import Cell
from benchmarks.linklab.crew import CrewError, hire
from benchmarks.linklab.lab import LabError, build, require
from benchmarks.linklab.measure import Result, measure
from benchmarks.linklab.probing import probe, table
from benchmarks.linklab.raw import link_rates, patterns
from benchmarks.linklab.wiring import NAMES, wire
from benchmarks.record import kept, write

GRID = {"topology": "mesh,ring,switch,nodes:2x2,bus", "mbit": "40,100", "gqa": "1,4", "ratio": "1,0.25"}
ONE = {"topology": "mesh", "mbit": "40", "gqa": "1", "ratio": "1"}


def main(words: list[str] | None = None) -> int:
    """Exit code 0, or 2 where the lab cannot be built or an option is wrong, 1 where a rank failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _parser().parse_args(words)
    try:
        require()
        options.do(options)
    except (LabError, ValueError) as error:
        print(f"linklab: {error}", file=sys.stderr)
        return 2
    except CrewError as error:
        print(f"linklab: {error}", file=sys.stderr)
        return 1
    return 0


def raw(options: argparse.Namespace) -> None:
    """What sockets and gloo reach."""
    rows = []
    for topology, mbit in itertools.product(_names(options.topology), _numbers(options.mbit)):
        wiring = wire(topology, options.ranks, mbit, options.inter_mbit)
        with build(wiring) as lab, hire(lab) as crew:
            rates = link_rates(crew, options.repeat)
            found = patterns(crew, rates, options.repeat, options.seconds)
        shares = {f"{a}>{b}": rates[a, b] / (nominal * 1e6 / 8) for (a, b), nominal in wiring.shaped.items()}
        title = (
            f"{topology}, {options.ranks} ranks, {mbit:g} Mbit/s: raw sockets reach {min(shares.values()):.1%} of it"
        )
        print(report.pattern_table(title, found), flush=True)
        rows.append({"topology": topology, "ranks": options.ranks, "mbit": mbit, "raw_share_of_nominal": shares})
        rows[-1]["patterns"] = [asdict(pattern) for pattern in found]
    if options.out:
        write(options.out, "seconds of three patterns by plain sockets and by gloo", rows)


def probes(options: argparse.Namespace) -> None:
    """What `Topology.probe` finds from inside, and what choosing by it costs."""
    wanted = itertools.product(_names(options.topology), _numbers(options.mbit))
    rows = [probe(wire(name, options.ranks, mbit, options.inter_mbit), options.seconds) for name, mbit in wanted]
    print(table(rows))
    if options.out:
        write(options.out, "topologies that the probe found in the lab", [asdict(row) for row in rows])


def cells(options: argparse.Namespace) -> None:
    """Every schedule in every cell."""
    asked = itertools.product(
        _names(options.topology), _numbers(options.mbit), _numbers(options.gqa), _numbers(options.ratio)
    )
    grid = [
        Cell(
            topology=topology,
            world=options.ranks,
            mbit=mbit,
            inter_mbit=options.inter_mbit if topology.startswith("nodes") else None,
            gqa=int(gqa),
            ratio=ratio,
            mask=options.mask,
            direction=options.direction,
        )
        for topology, mbit, gqa, ratio in asked
    ]
    names = _names(options.schedules) if options.schedules else None
    results: list[Result] = []
    for result in measure(grid, names, options.repeat, options.seconds):
        print(report.cell_table(result), flush=True)
        results.append(result)
    if len(results) > 1:
        print(report.grid_table(results))
    if options.out:
        what = f"seconds of each schedule, {options.direction}, medians of {options.repeat}, {options.ranks} ranks"
        write(options.out, what, [result.to_dict() for result in results])


def sparse_prefill(options: argparse.Namespace) -> None:
    """AnchorAttention over ranks beside every dense schedule."""
    asked = sparse.Prefill(length=options.length, heads=tuple(options.heads), world=options.ranks)
    cells = list(itertools.product(_names(options.topology), _numbers(options.mbit)))
    what = f"seconds of one forward pass, medians of {options.repeat}: {asked}"
    rows = kept(options.out, what) if options.out else []
    for result in sparse.measure(asked, cells, _names(options.identify), options.repeat):
        print(sparse.table(result), flush=True)
        rows.append(result.to_dict())
        if options.out:
            write(options.out, what, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linklab", description="Ranks on links whose rate is capped."
    )
    commands = parser.add_subparsers(required=True, metavar="raw | probe | run | grid | sparse")
    several = GRID | {"mbit": "40"}
    kinds = (
        ("raw", raw, ONE, 0.2, 5),
        ("probe", probes, several, 2.0, 1),
        ("run", cells, ONE, 0.4, 5),
        ("grid", cells, GRID, 0.3, 3),
    )
    for name, do, defaults, seconds, repeat in kinds:
        command = commands.add_parser(name, help=do.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(do=do)
        command.add_argument(
            "--topology", default=defaults["topology"], help=f"of {', '.join(NAMES)}; several by commas"
        )
        command.add_argument("--ranks", type=int, default=4, help="how many")
        command.add_argument(
            "--mbit", default=defaults["mbit"], help="Mbit/s of a link and direction; several by commas"
        )
        command.add_argument("--inter-mbit", type=float, help="of a node's uplink; a quarter of --mbit where not given")
        if do is not probes:
            command.add_argument("--repeat", type=int, default=repeat, help="timed rounds")
        size = "how long to probe" if do is probes else "size: what the fastest has to take"
        command.add_argument("--seconds", type=float, default=seconds, help=size)
        command.add_argument("--out", type=Path, help="JSON file to write")
        if do is cells:
            command.add_argument("--gqa", default=defaults["gqa"], help="query heads per key head; several by commas")
            command.add_argument("--ratio", default=defaults["ratio"], help="Sq / Skv; several by commas")
            command.add_argument("--mask", default="full", choices=("full", "causal"), help="causal is over zigzag")
            command.add_argument(
                "--direction", default="forward", choices=("forward", "backward"), help="what is timed"
            )
            command.add_argument("--schedules", help="by commas; all where not given")
    _add_sparse(commands)
    return parser


def _add_sparse(commands: Any) -> None:
    words = {"help": sparse_prefill.__doc__, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    command = commands.add_parser("sparse", **words)
    command.set_defaults(do=sparse_prefill)
    command.add_argument("--topology", default="mesh,switch", help=f"of {', '.join(NAMES)}; several by commas")
    command.add_argument("--ranks", type=int, default=4, help="how many")
    command.add_argument("--mbit", default="40,400", help="Mbit/s of a link and direction; several by commas")
    command.add_argument("--length", type=int, default=16384, help="positions of the whole sequence")
    command.add_argument("--heads", type=int, nargs=2, default=(2, 2), metavar=("QUERY", "KEY"), help="of 64 dims")
    command.add_argument("--identify", default="pooled,rescore", help="by commas")
    command.add_argument("--repeat", type=int, default=3, help="timed rounds")
    command.add_argument("--out", type=Path, help="JSON file to write")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _names(text)]


if __name__ == "__main__":
    sys.exit(main())
