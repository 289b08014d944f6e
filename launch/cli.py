"""The command `tokenring`. Options are made from the fields of `launch.config`, their help from the texts under them.

Standard output carries the result and nothing else: while a command works, everything that libraries print goes to
standard error. A mistake of the user is one line on standard error and exit code 2.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from launch import settings
from launch.config import RunConfig
from launch.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK, ConfigError, Interrupted, RunFailed, is_victim, one_line

DISTRIBUTION = "tokenring-parallel"
ENTRY = "launch.pipeline:run"
TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def main(argv: Sequence[str] | None = None, *, entry: str = ENTRY) -> int:
    """Run a command line and return its exit code. `entry` is what each rank runs (tests give their own)."""
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        if not arguments:
            return _help_for_nothing(entry)
        result = application(entry)(args=arguments, standalone_mode=False)
        return result if isinstance(result, int) else EXIT_OK
    except ConfigError as error:
        return _complain(one_line(error, 1000), EXIT_BAD_INPUT)
    except RunFailed as error:
        where = f" (logs: {error.logs})" if error.logs is not None else ""
        return _complain(error.failure.line + where, error.failure.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", Interrupted(signal.SIGINT).exit_code)
    except Interrupted as error:
        return _complain(f"stopped by {error}", error.exit_code)
    except Exception as error:
        # Typer carries its own copy of click in some versions; its usage errors are known by what they offer.
        if hasattr(error, "format_message"):
            return _complain(f"{one_line(error.format_message()).rstrip('.')} (see --help)", EXIT_BAD_INPUT)
        if type(error).__name__ == "Abort":
            return _complain("interrupted", Interrupted(signal.SIGINT).exit_code)
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tokenring {metadata.version(DISTRIBUTION)}")
        raise typer.Exit


def application(entry: str = ENTRY) -> typer.Typer:
    """The commands."""
    app = typer.Typer(
        name="tokenring",
        help="A video through a language model on several ranks: decode, encode, reduce, prefill, write.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_top_level)
    app.command("run", help="Watch a video and write about it.")(_with_options(_run_command(entry)))
    app.command("report")(report_command)
    return app


def _help_for_nothing(entry: str) -> int:
    """No command at all: the help, but as a mistake and so not on standard output."""
    with redirect_stdout(sys.stderr):
        application(entry)(args=["--help"], standalone_mode=False)
    return EXIT_BAD_INPUT


def _top_level(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the command."""


def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `tokenring run --out` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON object instead of the page.")] = False,
) -> int:
    """Render a saved run again: report.json, report.txt and the pictures, from its records."""
    from launch.records import verified
    from launch.report import show
    from launch.runner import rerender

    with _results_only():
        report = rerender(folder)
    if as_json:
        print(json.dumps(report))
    else:
        show(report, sys.stdout)
    return EXIT_OK if verified(report) else EXIT_FAILED


def _run_command(entry: str) -> Callable[..., int]:
    def run(config: Path | None, set: list[str], **flags: Any) -> int:
        values = {name.replace("__", "."): value for name, value in flags.items()}
        values["video.paths"] = tuple(values["video.paths"] or ()) or None
        resolved = settings.resolve(file=config, flags=values, sets=set or ())
        with _results_only():
            report = _execute(resolved, entry)
        return EXIT_OK if report is None else _deliver(report, resolved.config)

    return run


def _with_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command one parameter for each setting that has a flag, and --config and --set."""
    helps = settings.help_texts()
    parameters = []
    for name, setting in settings.settings().items():
        flag = setting.metadata.get("flag")
        if flag is None:
            continue
        if flag.startswith("--"):
            text = helps[name] + _default_note(setting.default)
            option = typer.Option(flag, help=text, show_default=False)
            kind = TYPES[str(setting.type).removesuffix(" | None")]
        else:
            option = typer.Argument(metavar=flag, help=helps[name], show_default=False)
            kind = list[str]
        parameters.append(_parameter(name.replace(".", "__"), kind | None, option))
    config = typer.Option("--config", metavar="FILE", help="YAML file of settings by section (video: {fps: 2}).")
    sets = typer.Option("--set", metavar="SECTION.NAME=VALUE", help="Any setting, above file and flags; repeatable.")
    parameters.append(_parameter("config", Path | None, config))
    parameters.append(_parameter("set", list[str] | None, sets))
    command.__signature__ = inspect.Signature(parameters, return_annotation=int)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, kind: Any, declared: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, declared])


def _default_note(default: Any) -> str:
    return "" if default is None or isinstance(default, bool) else f" Default: {str(default).removesuffix('.')}."


def _execute(resolved: settings.Resolved, entry: str) -> dict[str, Any] | None:
    """Run it here or as one rank of an outside launcher; None on ranks that have nothing to print."""
    from launch.engines.rendezvous import discover
    from launch.progress import Screen
    from launch.runner import run, run_as_rank

    config, origin = resolved.config, resolved.origin
    place = discover()
    if place is None:
        with _signals_as_exceptions(), Screen(quiet=config.output.quiet) as screen:
            return run(config, entry=entry, origin=origin, sink=screen)
    config, origin = _fitted_to(place, config, origin)
    with Screen(quiet=config.output.quiet or place.rank != 0) as screen:
        try:
            return run_as_rank(config, place, entry=entry, origin=origin, sink=screen)
        except Exception as error:
            _leave_as_rank(error, place)


def _fitted_to(place: Any, config: RunConfig, origin: dict[str, str]) -> tuple[RunConfig, dict[str, str]]:
    """The configuration under an outside launcher, which decides how many ranks there are and who started them."""
    from dataclasses import replace

    starter = place.source if place.source in ("torchrun", "mpi") else "torchrun"
    if origin["engine.nproc"] != settings.DEFAULT and config.engine.nproc != place.world:
        raise ConfigError(
            f"engine.nproc is {config.engine.nproc} but {place.source} started {place.world} ranks; leave out --nproc"
        )
    if origin["engine.name"] != settings.DEFAULT and config.engine.name != place.source:
        raise ConfigError(
            f"engine.name is {config.engine.name!r} but {place.source} already started this rank; leave out --engine"
        )
    engine = replace(config.engine, name=starter, nproc=place.world)
    decided = dict.fromkeys(("engine.name", "engine.nproc"), f"launcher {place.source}")
    return replace(config, engine=engine), {**origin, **decided}


def _leave_as_rank(error: Exception, place: Any) -> None:
    """Say how this rank failed and end at once: an orderly end would wait for ranks that may be gone."""
    import traceback

    from launch.runner import StoppedByRankZero
    from launch.worker import failure_of

    failure = failure_of(error, place)
    if isinstance(error, ConfigError):
        if not isinstance(error, StoppedByRankZero):
            _complain(one_line(error, 1000), EXIT_BAD_INPUT)
    else:
        traceback.print_exception(error)
        _complain(failure.line + (" (after another rank failed)" if is_victim(failure) else ""), failure.exit_code)
    sys.stderr.flush()
    os._exit(failure.exit_code)


def _deliver(report: dict[str, Any], config: RunConfig) -> int:
    """Print the result; exit code 1 when a comparison did not hold."""
    from launch.records import verified
    from launch.report import show

    if config.output.json:
        if not config.output.quiet:
            show(report, sys.stderr)
        print(json.dumps(report), flush=True)
    else:
        show(report, sys.stdout)
    if verified(report):
        return EXIT_OK
    return _complain(
        "verification failed: the ranks and plain attention differ by more than the tolerance", EXIT_FAILED
    )


@contextmanager
def _results_only() -> Iterator[None]:
    """Send standard output to standard error, C libraries included, until the result is ready."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved_stream, saved = sys.stdout, os.dup(1)
    sys.stdout = sys.stderr
    os.dup2(2, 1)
    try:
        yield
    finally:
        _flush_c_streams()
        os.dup2(saved, 1)
        os.close(saved)
        sys.stdout = saved_stream


def _flush_c_streams() -> None:
    """Text that a C library still holds back must leave before standard output is the result's again."""
    import ctypes

    ctypes.CDLL(None).fflush(None)


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the command in order: ranks stopped, nothing half written.

    Not for a process that is itself a rank: it may wait inside a collective, where Python cannot answer a signal, and must
    end at once.
    """

    def stop(number: int, _: Any) -> None:
        raise Interrupted(number)

    # One that is ignored stays so: `nohup` asks for that.
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.getsignal(number) for number in handled}
    chosen = [number for number in handled if former[number] is not signal.SIG_IGN]
    for number in chosen:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in chosen:
            signal.signal(number, former[number])


def _complain(text: str, code: int) -> int:
    print(f"tokenring: {text}", file=sys.stderr)
    return code
