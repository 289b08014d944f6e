"""The proof of a plan, on the same object that the executor runs.

slots     what each rank does with its slots is right by itself (see `tokenring.check_slots`): among other things, every row
          and head of a partial is used exactly once, and merged only by its owner
paired    a transfer stands at the same (step, lane) on both of its ends, in one order for each pair, and never leads home
covered   the tiles of all ranks hold every allowed (query, key) pair exactly once in every head, and no other
live      with every lane a first-in-first-out queue of grouped exchanges (NCCL's condition), no rank waits for ever
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from tokenring.check_slots import PlanError, check_slots
from tokenring.plan import Plan
from tokenring.program import operations
from tokenring.segments import Range, Tile
from tokenring.step import LANES, Compute, Piece, Slot, Step, Transfer

__all__ = ["PlanError", "Report", "check"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a proven plan holds, over all ranks."""

    ranks: int
    pairs: int
    """Allowed pairs of one head; where batch entries have masks of their own, over all of them."""
    transfers: int
    bytes: int


def check(plan: Plan) -> Report:
    """Prove a plan, or raise PlanError."""
    steps = [plan.steps(rank) for rank in range(plan.world)]
    transfers = _paired(steps)
    for rank in range(plan.world):
        check_slots(plan, rank, steps[rank])
    pairs = _covered(plan, steps)
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
    found: defaultdict[tuple[int, int], list[tuple[Tile, Range]]] = defaultdict(list)
    for rank, mine in enumerate(steps):
        slots = _all_slots(plan, rank, mine)
        for compute in (c for step in mine for c in step.computes):
            heads = compute.heads or (0, plan.problem.q_heads)
            for q_owner, k_owner, tile in _by_owner(slots[compute.q], slots[compute.kv], compute):
                found[(q_owner, k_owner)].append((tile, heads))
    pairs = 0
    for q_owner in range(plan.world):
        for k_owner in range(plan.world):
            pairs += _every_head(plan, q_owner, k_owner, found[(q_owner, k_owner)])
    return pairs


def _all_slots(plan: Plan, rank: int, steps: tuple[Step, ...]) -> dict[str, Slot]:
    slots = {what: plan.problem.own(what, rank) for what in ("q", "kv")}
    return slots | {slot.name: slot for step in steps for slot in step.slots}


def _by_owner(q: Slot, kv: Slot, compute: Compute) -> Iterator[tuple[int, int, Tile]]:
    """A compute's tiles, cut at the pieces of both slots and moved to the owners' row space."""
    for tile in compute.tiles:
        for q_row, q_piece in _placed(q, tile.q_start, tile.q_stop):
            for k_row, k_piece in _placed(kv, tile.k_start, tile.k_stop):
                part = tile.common(Tile(q_row, q_row + q_piece.rows, k_row, k_row + k_piece.rows))
                if part is not None:
                    yield q_piece.owner, k_piece.owner, part.shift(q_piece.start - q_row, k_piece.start - k_row)


def _placed(slot: Slot, start: int, stop: int) -> Iterator[tuple[int, Piece]]:
    """The pieces that hold some row of start..stop-1, each with its first row."""
    row = 0
    for piece in slot.pieces:
        if row < stop and row + piece.rows > start:
            yield row, piece
        row += piece.rows


def _of_entries(plan: Plan, tile: Tile) -> Tile:
    entries = plan.shape.batch
    if tile.batch and not 0 <= tile.batch[0] < tile.batch[1] <= entries:
        raise PlanError(f"{tile} is of batch entries {tile.batch}; there are {entries}")
    return tile.of(tile.batch or (0, entries))


def _every_head(plan: Plan, q_owner: int, k_owner: int, tiles: list[tuple[Tile, Range]]) -> int:
    """Pairs of one head; every head has the same."""
    edges = sorted({0, plan.problem.q_heads, *(edge for _, heads in tiles for edge in heads)})
    pairs = 0
    for first, last in itertools.pairwise(edges):
        some = [tile for tile, heads in tiles if heads[0] <= first and last <= heads[1]]
        pairs = _exactly_once(plan, q_owner, k_owner, some)
    return pairs


def _exactly_once(plan: Plan, q_owner: int, k_owner: int, tiles: list[Tile]) -> int:
    allowed = plan.problem.tiles(plan.problem.own("q", q_owner).pieces, plan.problem.own("kv", k_owner).pieces)
    if any(tile.batch for tile in (*tiles, *allowed)):
        tiles, allowed = ([_of_entries(plan, tile) for tile in some] for some in (tiles, allowed))
    where = f"queries of rank {q_owner} and keys of rank {k_owner}"
    for index, tile in enumerate(tiles):
        inside = sum(part.pairs() for a in allowed if (part := tile.common(a)))
        if inside != tile.pairs():
            raise PlanError(f"{where}: {tile} holds {tile.pairs() - inside} pairs that the mask forbids")
        for other in tiles[:index]:
            if (both := tile.common(other)) is not None:
                raise PlanError(f"{where}: {both.pairs()} pairs are computed twice, in {other} and {tile}")
    total, wanted = sum(t.pairs() for t in tiles), sum(a.pairs() for a in allowed)
    if total != wanted:
        raise PlanError(f"{where}: {wanted - total} of {wanted} allowed pairs are never computed")
    return total


def _live(steps: list[tuple[Step, ...]]) -> None:
    """Play every rank's program; exchanges of a lane start in order, and end when all their peers have reached theirs."""
    queues = {
        (rank, lane): [i for i, s in enumerate(mine) if s.moves(lane)]
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
    return [(o.verb, o.lane, o.step) for o in operations(steps) if o.verb in ("push", "wait")]


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
