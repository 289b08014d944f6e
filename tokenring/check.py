"""The proof of a plan, on the same object that the executor runs.

held      every slot that is computed on, sent or merged is held by then, whole, with the rows that are asked for
paired    a transfer stands at the same (step, lane) on both of its ends, in one order for each pair, and never leads home
covered   the tiles of all ranks hold every allowed (query, key) pair exactly once, and no other
merged    every partial ends exactly once at the rank that owns its queries
live      with every lane a first-in-first-out queue of grouped exchanges (NCCL's condition), no rank waits for ever
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tokenring.check_slots import LANES, PlanError, check_slots
from tokenring.plan import PAYLOAD_LANE, RETURN_LANE, Compute, Piece, Plan, Slot, Step, Transfer
from tokenring.segments import Tile, rows_in, union

__all__ = ["PlanError", "Report", "check"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a proven plan holds, over all ranks."""

    ranks: int
    pairs: int
    transfers: int
    bytes: int


def check(plan: Plan) -> Report:
    """Prove a plan, or raise PlanError."""
    steps = [plan.steps(rank) for rank in range(plan.world)]
    transfers = _paired(steps)
    for rank in range(plan.world):
        check_slots(plan, rank, steps[rank])
    pairs = _covered(plan, steps)
    _merged(plan, steps)
    _live(steps)
    total = sum(plan.bytes_sent(rank) for rank in range(plan.world))
    return Report(plan.world, pairs, transfers, total)


def _paired(steps: list[tuple[Step, ...]]) -> int:
    sends: defaultdict[tuple[int, int, int, int], list[Transfer]] = defaultdict(list)
    receives: defaultdict[tuple[int, int, int, int], list[Transfer]] = defaultdict(list)
    for rank, mine in enumerate(steps):
        for index, step in enumerate(mine):
            for lane in LANES:
                for transfer in step.sends[lane]:
                    if transfer.source != rank or transfer.destination == rank:
                        raise PlanError(
                            f"rank {rank}, step {index}: sends {transfer}, which is not from it to another rank"
                        )
                    sends[(index, lane, rank, transfer.destination)].append(transfer)
                for transfer in step.receives[lane]:
                    if transfer.destination != rank:
                        raise PlanError(f"rank {rank}, step {index}: receives {transfer}, which is not for it")
                    receives[(index, lane, transfer.source, rank)].append(transfer)
    for key in {**sends, **receives}:
        _same_messages(key, sends[key], receives[key])
    return sum(map(len, sends.values()))


def _same_messages(key: tuple[int, int, int, int], sent: list[Transfer], received: list[Transfer]) -> None:
    index, lane, source, destination = key
    if sent == received:
        return
    for transfer in (Counter(sent) - Counter(received)) + (Counter(received) - Counter(sent)):
        verb = "sent but not received" if sent.count(transfer) > received.count(transfer) else "received but not sent"
        raise PlanError(f"step {index}, lane {lane}: {transfer} is {verb}")
    raise PlanError(
        f"step {index}, lane {lane}: rank {destination} receives in another order than rank {source} sends; "
        "messages between two ranks match in order"
    )


def _covered(plan: Plan, steps: list[tuple[Step, ...]]) -> int:
    found: defaultdict[tuple[int, int], list[Tile]] = defaultdict(list)
    for rank, mine in enumerate(steps):
        slots = _all_slots(plan, rank, mine)
        for compute in (c for step in mine for c in step.computes):
            for q_owner, k_owner, tile in _by_owner(slots[compute.q], slots[compute.kv], compute):
                found[(q_owner, k_owner)].append(tile)
    pairs = 0
    for q_owner in range(plan.world):
        for k_owner in range(plan.world):
            pairs += _exactly_once(plan, q_owner, k_owner, found[(q_owner, k_owner)])
    return pairs


def _all_slots(plan: Plan, rank: int, steps: tuple[Step, ...]) -> dict[str, Slot]:
    slots = {what: plan.problem.own(what, rank) for what in ("q", "kv")}
    return slots | {slot.name: slot for step in steps for slot in step.slots}


def _by_owner(q: Slot, kv: Slot, compute: Compute) -> Iterator[tuple[int, int, Tile]]:
    """A compute's tiles, cut at the pieces of both slots and moved to the owners' row space."""
    for q_row, q_piece in _placed(q):
        for k_row, k_piece in _placed(kv):
            area = Tile(q_row, q_row + q_piece.rows, k_row, k_row + k_piece.rows)
            for tile in compute.tiles:
                part = _common(tile, area)
                if part is not None:
                    yield q_piece.owner, k_piece.owner, part.shift(q_piece.start - q_row, k_piece.start - k_row)


def _placed(slot: Slot) -> Iterator[tuple[int, Piece]]:
    row = 0
    for piece in slot.pieces:
        yield row, piece
        row += piece.rows


def _common(a: Tile, b: Tile) -> Tile | None:
    """The pairs of both."""
    lowers = [x for x in (a.lower, b.lower) if x is not None]
    uppers = [x for x in (a.upper, b.upper) if x is not None]
    q_start, q_stop = max(a.q_start, b.q_start), min(a.q_stop, b.q_stop)
    k_start, k_stop = max(a.k_start, b.k_start), min(a.k_stop, b.k_stop)
    if q_start >= q_stop or k_start >= k_stop:
        return None
    return Tile(q_start, q_stop, k_start, k_stop, max(lowers, default=None), min(uppers, default=None)).trim()


def _exactly_once(plan: Plan, q_owner: int, k_owner: int, tiles: list[Tile]) -> int:
    allowed = plan.problem.tiles(plan.problem.own("q", q_owner).pieces, plan.problem.own("kv", k_owner).pieces)
    where = f"queries of rank {q_owner} and keys of rank {k_owner}"
    for index, tile in enumerate(tiles):
        inside = sum(part.pairs() for a in allowed if (part := _common(tile, a)))
        if inside != tile.pairs():
            raise PlanError(f"{where}: {tile} holds {tile.pairs() - inside} pairs that the mask forbids")
        for other in tiles[:index]:
            if (both := _common(tile, other)) is not None:
                raise PlanError(f"{where}: {both.pairs()} pairs are computed twice, in {other} and {tile}")
    total, wanted = sum(t.pairs() for t in tiles), sum(a.pairs() for a in allowed)
    if total != wanted:
        raise PlanError(f"{where}: {wanted - total} of {wanted} allowed pairs are never computed")
    return total


def _merged(plan: Plan, steps: list[tuple[Step, ...]]) -> None:
    ends: Counter[tuple[int, str]] = Counter(
        (rank, name) for rank, mine in enumerate(steps) for step in mine for name in step.merges
    )
    returns: defaultdict[tuple[int, str], list[Transfer]] = defaultdict(list)
    for transfer in (t for mine in steps for step in mine for t in step.sends[RETURN_LANE]):
        returns[(transfer.source, transfer.source_slot)].append(transfer)
    for rank, mine in enumerate(steps):
        for index, step in enumerate(mine):
            for partial in (result for compute in step.computes for result in compute.results):
                parts = [(t.destination, t.destination_slot, t.pieces) for t in returns.pop((rank, partial.name), ())]
                if not _ends_once(partial, parts or [(rank, partial.name, partial.pieces)], ends):
                    raise PlanError(
                        f"rank {rank}, step {index}: partial {partial.name} is not merged exactly once by its owner"
                    )
    if ends:
        rank, name = next(iter(ends))
        raise PlanError(f"rank {rank}: merges {name}, which no compute makes")
    if returns:
        raise PlanError(f"{next(iter(returns.values()))[0]} is no partial of a compute")


def _ends_once(partial: Slot, parts: list[tuple[int, str, tuple[Piece, ...]]], ends: Counter[tuple[int, str]]) -> bool:
    """Whether the parts are the partial, each row once, and each part is merged once at the rank that owns it."""
    merged = [ends.pop((at, name), 0) == 1 and all(p.owner == at for p in rows) for at, name, rows in parts]
    moved = [r for _, _, rows in parts for r in partial.locate(rows)]
    return all(merged) and rows_in(moved) == rows_in(union(moved)) == partial.rows


def _live(steps: list[tuple[Step, ...]]) -> None:
    """Play every rank's program; exchanges of a lane start in order, and end when all their peers have reached theirs."""
    queues = {
        (rank, lane): [i for i, s in enumerate(mine) if s.sends[lane] or s.receives[lane]]
        for rank, mine in enumerate(steps)
        for lane in LANES
    }
    programs = {rank: _program(mine) for rank, mine in enumerate(steps)}
    pushed: set[tuple[int, int, int]] = set()
    done: set[tuple[int, int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in programs.items():
            while program and (program[0][0] == "push" or (rank, *program[0][1:]) in done):
                verb, lane, index = program.pop(0)
                if verb == "push":
                    pushed.add((rank, lane, index))
                moved = True
        for (rank, lane), queue in queues.items():
            while queue and _ready(steps, queues, pushed, done, rank, lane, queue[0]):
                done.add((rank, lane, queue.pop(0)))
                moved = True
    stuck = {rank: program[0] for rank, program in programs.items() if program}
    if stuck:
        rank, (_, lane, index) = next(iter(stuck.items()))
        raise PlanError(
            f"deadlock: rank {rank} waits for ever for step {index} on lane {lane} ({len(stuck)} ranks are stuck)"
        )


def _program(steps: tuple[Step, ...]) -> list[tuple[str, int, int]]:
    """The pushes and waits of the executor, in its order."""
    program: list[tuple[str, int, int]] = []
    for index in range(len(steps)):
        program += [("push", PAYLOAD_LANE, index), ("push", RETURN_LANE, index)]
        program += [("wait", RETURN_LANE, index - 1), ("wait", PAYLOAD_LANE, index)]
    program.append(("wait", RETURN_LANE, len(steps) - 1))
    return [p for p in program if p[2] >= 0 and (steps[p[2]].sends[p[1]] or steps[p[2]].receives[p[1]])]


def _ready(
    steps: list[tuple[Step, ...]],
    queues: dict[tuple[int, int], list[int]],
    pushed: set[tuple[int, int, int]],
    done: set[tuple[int, int, int]],
    rank: int,
    lane: int,
    index: int,
) -> bool:
    """Whether the head exchange of a lane can end: pushed here, and every peer has it pushed, at its head or behind it."""
    if (rank, lane, index) not in pushed:
        return False
    step = steps[rank][index]
    peers = {t.destination for t in step.sends[lane]} | {t.source for t in step.receives[lane]}
    return all(
        (peer, lane, index) in done or ((peer, lane, index) in pushed and queues[(peer, lane)][0] == index)
        for peer in peers
    )
