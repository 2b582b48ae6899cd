"""Each rank's actions with sends and receives put in, and the proof that no list can block the others.

A receive stands where its sender stands in one common order of all ranks' actions, right behind the send. So there is
an order in which every send meets its receive at once: the lists need no buffers (rendezvous), whether the backend has
one queue for each rank (an NCCL communicator for the whole group), one for each pair of ranks, or none (gloo).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..costmodel.actions import BACKWARD, BACKWARD_INPUT, FORWARD, Action
from ..errors import ShardwrightError
from ..schedules import PipelineSchedule

SEND_FORWARD, RECEIVE_FORWARD, SEND_BACKWARD, RECEIVE_BACKWARD = "SEND_F", "RECV_F", "SEND_B", "RECV_B"  # as torch
_SENDS = {SEND_FORWARD: 1, SEND_BACKWARD: -1}  # to which stage
_RECEIVES = {RECEIVE_FORWARD: -1, RECEIVE_BACKWARD: 1}  # from which stage
_BACKWARDS = (BACKWARD, BACKWARD_INPUT)

Lists = Sequence[Sequence[Action]]


class Result(NamedTuple):
    """What one stage hands to the next, or the gradient that it hands to the one before."""

    is_gradient: bool
    stage: int  # that made it
    microbatch: int


class Message(NamedTuple):
    source: int  # rank
    target: int
    result: Result


@lru_cache(maxsize=16)
def communicating_lists(schedule: PipelineSchedule) -> tuple[tuple[Action, ...], ...]:
    """The lists that the ranks walk, verified. Raises ShardwrightError where no order of transfers can serve them."""
    lists = with_transfers(schedule)
    verify(schedule, lists)
    return lists


def with_transfers(schedule: PipelineSchedule) -> tuple[tuple[Action, ...], ...]:
    """Neighbouring stages on one rank need no transfer."""
    rows = schedule.ranks
    lists: list[list[Action]] = [[] for _ in rows]
    at = [0] * len(rows)
    made: set[Result | None] = {None}
    going = True
    while going:
        going = False
        for rank, row in enumerate(rows):
            if at[rank] == len(row) or _needs(schedule, row[at[rank]]) not in made:
                continue
            action = row[at[rank]]
            at[rank], going = at[rank] + 1, True
            lists[rank].append(action)
            if (result := _makes(action)) is None:
                continue
            made.add(result)
            is_gradient, stage, microbatch = result
            to = stage - 1 if is_gradient else stage + 1
            if 0 <= to < schedule.num_stages and (peer := schedule.rank_of(to, microbatch)) != rank:
                kinds = (SEND_BACKWARD, RECEIVE_BACKWARD) if is_gradient else (SEND_FORWARD, RECEIVE_FORWARD)
                lists[rank].append(Action(kinds[0], stage, microbatch))
                lists[peer].append(Action(kinds[1], to, microbatch))
    waiting = {rank: row[at[rank]] for rank, row in enumerate(rows) if at[rank] < len(row)}
    if waiting:
        raise _refused(schedule, f"would wait for ever: {_at(waiting)}")
    return tuple(map(tuple, lists))


def _makes(action: Action) -> Result | None:
    """What the action hands on."""
    if action.kind == FORWARD or action.kind in _BACKWARDS:
        return Result(action.kind != FORWARD, action.stage, action.microbatch)
    return None


def _needs(schedule: PipelineSchedule, action: Action) -> Result | None:
    """What another stage hands to the action."""
    if action.kind == FORWARD and action.stage:
        return Result(False, action.stage - 1, action.microbatch)
    if action.kind in _BACKWARDS and action.stage < schedule.num_stages - 1:
        return Result(True, action.stage + 1, action.microbatch)
    return None


def verify(schedule: PipelineSchedule, lists: Lists, buffered: int = 0) -> None:
    """Walk all lists at once, in time linear in their length. Raises ShardwrightError, which names the action that each
    rank waits at, where they cannot finish, or where two ranks put the transfers between them in unlike orders.

    buffered: messages from one rank to another that may be on their way without a receive; with none a send completes
    when its receive is posted. Receives are posted at their place and waited for by the action that needs them.
    """
    _check_orders(schedule, lists)
    at = [0] * len(lists)
    sent: Counter[tuple[int, int]] = Counter()  # messages from rank to rank
    posted: Counter[tuple[int, int]] = Counter()
    made: list[set[Result | None]] = [{None} for _ in lists]  # on each rank
    under_way: set[Result] = set()
    asked: set[Result] = set()  # receives posted
    work = deque(range(len(lists)))
    while work:
        rank = work.popleft()
        while at[rank] < len(lists[rank]):
            action = lists[rank][at[rank]]
            if (message := _message(schedule, action)) is None:
                needed = _needs(schedule, action)
                if needed not in made[rank] and not (needed in under_way and needed in asked):
                    break
                made[rank].add(_makes(action))
            elif action.kind in _SENDS:
                pair = message.source, message.target
                if message.result not in made[rank] or sent[pair] >= posted[pair] + buffered:
                    break
                sent[pair] += 1
                under_way.add(message.result)
                work.append(message.target)
            else:
                posted[message.source, rank] += 1
                asked.add(message.result)
                work.append(message.source)
            at[rank] += 1
    waiting = {rank: row[at[rank]] for rank, row in enumerate(lists) if at[rank] < len(row)}
    if waiting:
        raise _refused(schedule, f"would wait for ever: {_at(waiting)}")


def _check_orders(schedule: PipelineSchedule, lists: Lists) -> None:
    """Two ranks share one queue for what goes to and fro, so both must have the same messages in the same order."""
    seen: dict[tuple[int, int], list[tuple[Message, Action]]] = {}
    for rank, row in enumerate(lists):
        for action in row:
            if (message := _message(schedule, action)) is not None:
                peer = message.target if message.source == rank else message.source
                seen.setdefault((rank, peer), []).append((message, action))
    for (rank, peer), own in seen.items():
        other = seen.get((peer, rank), [])
        for k in range(max(len(own), len(other))):
            mine, theirs = (row[k] if k < len(row) else (None, "nothing") for row in (own, other))
            if mine[0] != theirs[0]:
                what = f"rank {rank} has {mine[1]} where rank {peer} has {theirs[1]}"
                raise _refused(schedule, f"has transfers in unlike orders: {what}")


def _message(schedule: PipelineSchedule, action: Action) -> Message | None:
    kind, stage, microbatch = action
    if kind in _SENDS:
        source, target = stage, stage + _SENDS[kind]
    elif kind in _RECEIVES:
        source, target = stage + _RECEIVES[kind], stage
    else:
        return None
    ranks = schedule.rank_of(source, microbatch), schedule.rank_of(target, microbatch)
    return Message(*ranks, Result(kind in (SEND_BACKWARD, RECEIVE_BACKWARD), source, microbatch))


def _at(waiting: dict[int, Action]) -> str:
    return ", ".join(f"rank {rank} at {action}" for rank, action in waiting.items())


def _refused(schedule: PipelineSchedule, what: str) -> ShardwrightError:
    return ShardwrightError(
        f"schedule {schedule.name} {what}",
        means="no process was started on it",
        change="--force schedule=NAME",
        works="--force schedule=1f1b",
    )
