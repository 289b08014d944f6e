"""The lab: a wiring made of network namespaces, veth pairs and token buckets, and taken down again.

One namespace a box. A cable is a veth pair; each shaped end carries a token bucket (tbf), so each direction has a rate of its
own. A rank has one address, the same on all its devices, and one route for every other rank: the way the wiring names.
Names hold the process that made them and when it started, so that the next lab can sweep what a killed one left.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from benchmarks.linklab.wiring import Link, Wiring

PREFIX = "linklab"
TOOLS = ("ip", "tc")
MTU = 9000
"""Large frames: an eighth of the work per byte, and headers of 1%."""
BURST_SECONDS, LEAST_BURST_BYTES = 0.003, 10_000
"""What a link may send at once after a pause: so many seconds of its rate, but a whole frame at the least."""
QUEUE_BYTES = 32 * 1024 * 1024
"""Longer than all that the connections of a link may have under way, so that a full queue drops nothing."""
SETTINGS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/tcp_congestion_control": "reno",
    "net/ipv4/tcp_slow_start_after_idle": "0",
    "net/ipv4/tcp_no_metrics_save": "1",
    "net/ipv4/tcp_wmem": "4096 262144 1048576",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
}
"""Under /proc/sys, in every namespace: no slow start after a pause, nothing learnt from earlier connections."""


class LabError(RuntimeError):
    """The lab cannot be built here; the message says what is missing."""


class Lab:
    """A running wiring. Make it with `build`."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self._stem = f"{PREFIX}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(2)}"

    def namespace(self, name: str) -> str:
        """The network namespace of a box."""
        return f"{self._stem}-{name}"

    def address(self, rank: int) -> str:
        """The one address of a rank."""
        return f"10.77.{rank // 200}.{rank % 200 + 1}"

    def device(self, rank: int) -> str:
        """A device of the rank's namespace that has its address."""
        name = self.wiring.ranks[rank]
        return _device(self.wiring.neighbours(name)[0])

    def command(self, rank: int, *words: str) -> list[str]:
        """A command line that runs `words` in the rank's namespace."""
        return ["ip", "netns", "exec", self.namespace(self.wiring.ranks[rank]), *words]

    def retune(self, wiring: Wiring) -> None:
        """Give the links the rates of another wiring of the same cables."""
        if set(wiring.shaped) != set(self.wiring.shaped):
            raise ValueError(
                f"the lab is wired as {self.wiring.name} and cannot be retuned to {wiring.name}; build another"
            )
        self.wiring = wiring
        self._shape("change")

    def carried(self) -> dict[Link, int]:
        """Bytes that left each shaped link so far, headers included: the kernel's own count."""
        counts = {}
        for a, b in self.wiring.shaped:
            shown = _run(["tc", "-n", self.namespace(a), "-s", "-j", "qdisc", "show", "dev", _device(b)])
            counts[a, b] = sum(q["bytes"] for q in json.loads(shown) if q["kind"] == "tbf")
        return counts

    def _up(self) -> None:
        for name in self.wiring.boxes:
            _run(["ip", "netns", "add", self.namespace(name)])
            script = "; ".join(f"echo '{value}' > /proc/sys/{key}" for key, value in SETTINGS.items())
            _run(["ip", "netns", "exec", self.namespace(name), "sh", "-ec", script])
        cables = [(a, b) for a, b in self.wiring.mbit if a < b]
        pairs = (
            f"link add {_device(b)} netns {self.namespace(a)} type veth peer name {_device(a)} netns {self.namespace(b)}"
            for a, b in cables
        )
        _run(["ip", "-batch", "-"], pairs)
        for name in self.wiring.boxes:
            lines = self._bridge(name) if name in self.wiring.bridges else self._host(name)
            _run(["ip", "-n", self.namespace(name), "-batch", "-"], lines)
        self._shape("add")

    def _bridge(self, name: str) -> Iterator[str]:
        yield "link set lo up"
        yield "link add bridge type bridge forward_delay 0"
        yield "link set bridge up"
        for other in self.wiring.neighbours(name):
            yield f"link set {_device(other)} master bridge"
            yield f"link set {_device(other)} mtu {MTU} up"

    def _host(self, name: str) -> Iterator[str]:
        addresses = {n: self.address(rank) for rank, n in enumerate(self.wiring.ranks)}
        addresses |= {n: f"10.77.250.{i + 1}" for i, n in enumerate(self.wiring.routers)}
        yield "link set lo up"
        for other in self.wiring.neighbours(name):
            yield f"address add {addresses[name]}/32 dev {_device(other)}"
            yield f"link set {_device(other)} mtu {MTU} up"
        for rank, target in enumerate(self.wiring.ranks):
            if target == name:
                continue
            hop = self._next(name, rank)
            via = f"via {addresses[hop]} onlink " if hop != target and hop in addresses else ""
            yield f"route add {addresses[target]}/32 {via}dev {_device(hop)} src {addresses[name]}"

    def _next(self, name: str, target: int) -> str:
        """The box that data for a rank goes to next."""
        for (_, destination), way in self.wiring.ways.items():
            if destination == target and name in way[:-1]:
                return way[way.index(name) + 1]
        raise AssertionError(f"no way passes {name} to rank {target}")

    def _shape(self, verb: str) -> None:
        for a in {a for a, _ in self.wiring.shaped}:
            mine = {b: mbit for (source, b), mbit in self.wiring.shaped.items() if source == a}
            lines = (f"qdisc {verb} dev {_device(b)} root {_bucket(mbit)}" for b, mbit in mine.items())
            _run(["tc", "-n", self.namespace(a), "-batch", "-"], lines)

    def _down(self) -> None:
        with _undisturbed():
            _delete(name for name in _namespaces() if name.startswith(f"{self._stem}-"))


@contextmanager
def build(wiring: Wiring) -> Iterator[Lab]:
    """The lab of a wiring, taken down at the end whatever happens.

    Raises LabError without root, without `ip` and `tc`, or where the kernel refuses.
    """
    require()
    sweep()
    lab = Lab(wiring)
    try:
        lab._up()
        yield lab
    finally:
        lab._down()


def require() -> None:
    """Raise LabError, saying what is missing, where no lab can be built."""
    if not sys.platform.startswith("linux"):
        raise LabError(f"the link lab needs Linux network namespaces; this is {sys.platform}")
    if os.geteuid() != 0:
        raise LabError("the link lab makes network namespaces and needs root; run it with sudo")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise LabError(f"the link lab needs {' and '.join(missing)}; install the iproute2 package")


def sweep() -> list[str]:
    """Take down what labs of dead processes left; returns the names."""
    left = [name for name in _namespaces() if _orphan(name)]
    _delete(left)
    return left


def _delete(names: Iterable[str]) -> None:
    """Delete namespaces, all that can be; their devices go with them."""
    failed = []
    for name in names:
        try:
            _run(["ip", "netns", "delete", name])
        except LabError as error:
            failed.append(str(error))
    if failed:
        raise LabError("; ".join(failed))


def _orphan(name: str) -> bool:
    parts = name.split("-")
    if len(parts) != 5 or parts[0] != PREFIX or not parts[1].isdigit():
        return False
    return _started(int(parts[1])) != parts[2]


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "0" for one that does not exist."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return "0"


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run(["ip", "netns", "list"]).splitlines() if line]


def _bucket(mbit: float) -> str:
    """The token bucket of a rate, in the words of `tc`."""
    burst = max(LEAST_BURST_BYTES, int(mbit * 1e6 / 8 * BURST_SECONDS))
    return f"tbf rate {mbit * 1e6:.0f}bit burst {burst} limit {QUEUE_BYTES}"


def _device(other: str) -> str:
    """The name of the end of a cable that leads to a box."""
    return f"to-{other}"


def _run(command: list[str], lines: Iterable[str] | None = None) -> str:
    """One command, in a session of its own so that a key press at the terminal does not cut it short."""
    text = None if lines is None else "\n".join(lines) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise LabError(f"{' '.join(command)} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold interrupts back until the block is done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
