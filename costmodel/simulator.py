"""The one event simulator: ordered actions on ranks, transfers between them, reductions and copies beside them.

Each rank runs its list in order. An action starts when the rank is free and its input has arrived. What each action
waits for, with s a virtual stage and S their number:

    F(s)   F(s-1) of the same microbatch, after the transfer        B, I(S-1)  F(S-1)
    B, I(s) B or I(s+1), after the transfer, and F(s)               W(s)       I(s)          R(s)  F(s)
    O(s)   the copy of its activations to host memory               B, I(s)    also the copy back, where there is L(s)

Copies to host memory and back run beside compute, one at a time each way, the former in the order in which their
forwards end, the latter in the order of L; O and L themselves take no time.

A transfer between two ranks starts when its producer ends, holds the link of that (source, destination) pair for its
occupancy, in the order of production, and arrives a latency later. It never holds up compute. Between two stages of one
rank nothing is sent. A fused B sends its gradient when all of it is done.

A stage's gradients are reduced once a step, from its last backward on, beside the work of the rank's other stages and
one stage after another. Then comes the rank's tail.

Because the order on every rank and every link is given, start times are the longest paths of a graph without cycles,
and one pass in any feasible order finds them: O(number of actions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .actions import Action
from .activation_memory import peak_memory
from .stage_times import StageTimes, StepTimes
from .timeline import Timeline
from .trace import COLLECTIVE, COMPUTE, HOST_IN, HOST_OUT, SEND, Event

NOT_YET = -1.0


class Deadlock(RuntimeError):
    """The lists can never finish. `waiting` gives the action that each stuck rank waits at."""

    def __init__(self, waiting: dict[int, Action]) -> None:
        self.waiting = waiting
        super().__init__(
            "no rank can go on; waiting: " + ", ".join(f"rank {rank} at {action}" for rank, action in waiting.items())
        )


@dataclass(frozen=True)
class Pipeline:
    """Who runs what, and in which order.

    ranks: the list of actions of each. placements: the rank of each virtual stage, one row for each direction;
    direction: the row of each microbatch, where not all use row 0.
    """

    ranks: Sequence[Sequence[Action]]
    placements: Sequence[Sequence[int]]
    num_microbatches: int
    direction: Sequence[int] | None = None

    @property
    def row_of(self) -> Sequence[int]:
        return [0] * self.num_microbatches if self.direction is None else self.direction


def simulate(pipeline: Pipeline, times: StepTimes, *, with_events: bool = False, with_memory: bool = True) -> Timeline:
    """Run the lists. Raises Deadlock where they cannot finish.

    with_events: also record transfers and collectives. with_memory: also find the peaks (a third of the time).
    """
    ranks, stages = pipeline.ranks, times.stages
    ran = _run(pipeline, times)
    waiting = {rank: row[len(ran.ends[rank])] for rank, row in enumerate(ranks) if len(ran.ends[rank]) < len(row)}
    if waiting:
        raise Deadlock(waiting)
    compute_end = [row[-1] if row else 0.0 for row in ran.ends]
    reductions = [_reductions(row, ends, stages) for row, ends in zip(ranks, ran.ends, strict=True)]
    exposed = [_comm_inside(row, stages) for row in ranks]
    finish = []
    for rank, end in enumerate(compute_end):
        finish.append(max([end, *(reduced for _, _, reduced in reductions[rank])]))
        exposed[rank] += finish[rank] - end
    done = list(finish)
    everyone = max(finish, default=0.0)
    for rank, tail in enumerate(times.tails):
        begin = everyone if times.tails_wait else done[rank]
        finish[rank] = begin + tail.optimizer_s + tail.gather_s
        exposed[rank] += tail.gather_s
    peaks, in_flight = peak_memory(ranks, stages) if with_memory else ([], [])
    return Timeline(
        ranks=ranks,
        starts=ran.starts,
        ends=ran.ends,
        makespan_s=max(finish, default=0.0),
        compute_end_s=compute_end,
        busy_s=ran.busy_s,
        exposed_comm_s=[max(0.0, seconds) for seconds in exposed],  # differences of times may round below 0
        peak_bytes=peaks,
        peak_in_flight=in_flight,
        extra=[
            *_transfers(pipeline, times, ran),
            *_collectives(reductions),
            *_tails(times, done),
        ]
        if with_events
        else [],
    )


@dataclass
class _Ran:
    """When everything happened. Of slots (stage * microbatches + microbatch): when its input, its gradient, its copy
    in host memory and its copy back are there."""

    starts: list[list[float]]
    ends: list[list[float]]
    busy_s: list[float]
    forward_in: list[float]
    gradient_in: list[float]
    copied_out: dict[int, float]
    copied_in: dict[int, float]


def _run(pipeline: Pipeline, times: StepTimes) -> _Ran:
    """Every rank goes on until it waits for a value; whoever sends that value wakes it."""
    ranks, m, stages, row_of = pipeline.ranks, pipeline.num_microbatches, times.stages, pipeline.row_of
    num_ranks, last, size = len(ranks), len(stages) - 1, len(stages) * m
    onward, back = _links(pipeline, times)
    # when a slot's input, gradient, backward of the input and forward are there: in each the value that an action of
    # the kind waits for. A gradient is only there after all forwards of its microbatch.
    forward_in, gradient_in, input_done, forward_done = ([NOT_YET] * size for _ in range(4))
    forward_in[:m] = [0.0] * m
    copied_out = _to_copy(pipeline, times)
    copied_in: dict[int, float] = {}
    ready_of = {"F": forward_in, "B": gradient_in, "I": gradient_in, "W": input_done, "R": forward_done}
    ready_of |= {"O": forward_done, "L": [0.0] * size}
    seconds_of = _seconds_of(stages)
    out_free, in_free, clock, busy = ([0.0] * num_ranks for _ in range(4))
    starts: list[list[float]] = [[] for _ in ranks]
    ends: list[list[float]] = [[] for _ in ranks]
    link_free: dict[tuple[int, int], float] = {}
    blocked = [-1] * num_ranks  # slot of the value that a rank waits for
    runnable = list(range(num_ranks))

    while runnable:
        rank = runnable.pop()
        actions, now, work = ranks[rank], clock[rank], 0.0
        begun, ended = starts[rank], ends[rank]
        i, n = len(begun), len(actions)
        while i < n:
            kind, stage, microbatch = actions[i]
            slot = stage * m + microbatch
            start = ready_of[kind][slot]
            if start < 0.0:
                blocked[rank] = slot
                break
            if start < now:
                start = now
            if copied_in and start < copied_in.get(slot, 0.0):
                start = copied_in[slot]
            seconds = seconds_of[kind][stage]
            now = start + seconds
            begun.append(start)
            ended.append(now)
            work += seconds
            i += 1
            # what the end of this action sets free
            if kind == "F":
                forward_done[slot] = now
                if slot in copied_out:
                    # O waits for the copy
                    out_free[rank] = copied_out[slot] = forward_done[slot] = (
                        max(out_free[rank], now) + stages[stage].offload_s
                    )
                if stage == last:
                    gradient_in[slot] = now
                    continue
                target, arrivals = slot + m, forward_in
                receiver, latency, occupancy = onward[row_of[microbatch]][stage]
            elif kind == "B" or kind == "I":
                input_done[slot] = now
                if stage == 0:
                    continue
                target, arrivals = slot - m, gradient_in
                receiver, latency, occupancy = back[row_of[microbatch]][stage]
            else:
                if kind == "L":
                    in_free[rank] = copied_in[slot] = max(in_free[rank], now) + stages[stage].offload_s
                continue
            if receiver == rank:
                arrivals[target] = now
                continue
            sent = now
            if occupancy:
                free = link_free.get((rank, receiver), 0.0)
                link_free[rank, receiver] = sent = (free if free > now else now) + occupancy
            arrivals[target] = sent + latency
            if blocked[receiver] == target:
                blocked[receiver] = -1
                runnable.append(receiver)
        clock[rank] = now
        busy[rank] += work
    return _Ran(starts, ends, busy, forward_in, gradient_in, copied_out, copied_in)


_Link = tuple[int, float, float]  # receiving rank, latency and occupancy


def _links(pipeline: Pipeline, times: StepTimes) -> tuple[list[list[_Link]], list[list[_Link]]]:
    """Where each stage sends its activations and its gradients to: for each direction, by stage."""
    hops, num_stages = times.hop_list, len(times.stages)
    onward: list[list[_Link]] = []
    back: list[list[_Link]] = []
    for row in pipeline.placements:
        gaps = range(num_stages - 1)
        onward.append([(row[s + 1], hops[s].forward_latency_s, hops[s].forward_occupancy_s) for s in gaps])
        back.append([(-1, 0.0, 0.0)])  # the first stage sends no gradient
        back[-1] += [(row[s], hops[s].backward_latency_s, hops[s].backward_occupancy_s) for s in gaps]
    return onward, back


def _seconds_of(stages: Sequence[StageTimes]) -> dict[str, list[float]]:
    forward_s = [stage.forward_s for stage in stages]
    return {
        "F": forward_s,
        "B": [stage.backward_input_s + stage.backward_weight_s for stage in stages],
        "I": [stage.backward_input_s for stage in stages],
        "W": [stage.backward_weight_s for stage in stages],
        "R": forward_s,
        "O": [0.0] * len(stages),
        "L": [0.0] * len(stages),
    }


def _to_copy(pipeline: Pipeline, times: StepTimes) -> dict[int, float]:
    """Slots whose activations take time on their way to host memory, which begins when they are computed."""
    if not any(stage.offload_s for stage in times.stages):
        return {}
    offloads = (action for row in pipeline.ranks for action in row if action.kind == "O")
    return {action.stage * pipeline.num_microbatches + action.microbatch: NOT_YET for action in offloads}


def _comm_inside(actions: Sequence[Action], stages: Sequence[StageTimes]) -> float:
    """Seconds of the collectives inside a rank's actions."""
    total = 0.0
    if any(stage.forward_comm_s or stage.backward_comm_s for stage in stages):
        for kind, stage, _ in actions:
            if kind == "F" or kind == "R":
                total += stages[stage].forward_comm_s
            elif kind in "BI":
                total += stages[stage].backward_comm_s
    return total


def _reductions(
    actions: Sequence[Action], ends: Sequence[float], stages: Sequence[StageTimes]
) -> list[tuple[int, float, float]]:
    """(stage, begin, end) of each reduction of gradients on a rank."""
    last_backward: dict[int, float] = {}
    if any(stage.reduce_s for stage in stages):
        for (kind, stage, _), end in zip(actions, ends, strict=True):
            if kind == "B" or kind == "W":
                last_backward[stage] = end
    found = []
    free = 0.0
    for stage, end in sorted(last_backward.items(), key=lambda item: item[1]):
        if seconds := stages[stage].reduce_s:
            begin = max(free, end)
            free = begin + seconds
            found.append((stage, begin, free))
    return found


def _transfers(pipeline: Pipeline, times: StepTimes, ran: _Ran) -> Iterator[Event]:
    """Events of what goes to other ranks, to host memory and back."""
    onward, back = _links(pipeline, times)
    m, last = pipeline.num_microbatches, len(times.stages) - 1
    for rank, actions in enumerate(pipeline.ranks):
        for kind, stage, i in actions:
            slot, row = stage * m + i, pipeline.row_of[i]
            if kind == "F" and slot in ran.copied_out:
                end = ran.copied_out[slot]
                yield Event(rank, HOST_OUT, "offload", stage, i, end - times.stages[stage].offload_s, end)
            elif kind == "L":
                end = ran.copied_in[slot]
                yield Event(rank, HOST_IN, "load", stage, i, end - times.stages[stage].offload_s, end)
            if kind == "F" and stage != last:
                (receiver, *seconds), end = onward[row][stage], ran.forward_in[slot + m]
            elif kind in "BI" and stage != 0:
                (receiver, *seconds), end = back[row][stage], ran.gradient_in[slot - m]
            else:
                continue
            sent_s = float(sum(seconds))
            if receiver != rank and sent_s:
                yield Event(rank, f"{SEND}:{receiver}", "send", stage, i, end - sent_s, end)


def _collectives(reductions: Sequence[Sequence[tuple[int, float, float]]]) -> Iterator[Event]:
    for rank, found in enumerate(reductions):
        for stage, begin, end in found:
            yield Event(rank, COLLECTIVE, "reduce", stage, -1, begin, end)


def _tails(times: StepTimes, done: Sequence[float]) -> Iterator[Event]:
    for rank, tail in enumerate(times.tails):
        begin = max(done) if times.tails_wait else done[rank]
        middle = begin + tail.optimizer_s
        yield Event(rank, COMPUTE, "optimizer", -1, -1, begin, middle)
        if tail.gather_s:
            yield Event(rank, COLLECTIVE, "gather", -1, -1, middle, middle + tail.gather_s)
