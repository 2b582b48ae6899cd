"""The one event simulator: ordered actions on ranks, transfers between them, collectives beside them.

Each rank runs its list in order. An action starts when the rank is free, its input has arrived and, under ZeRO-3, its
parameters have been gathered. What each action waits for, with s a virtual stage and S their number:

    F(s)   F(s-1) of the same microbatch, after the transfer        B, I(S-1)  F(S-1)
    B, I(s) B or I(s+1), after the transfer, and F(s)               W(s)       I(s)          R(s)  F(s)
    O(s)   the copy of its activations to host memory               B, I(s)    also the copy back, where there is L(s)

Copies to host memory and back run beside compute, one at a time each way, the former in the order in which their
forwards end, the latter in the order of L; O and L themselves take no time.

A transfer between two ranks starts when its producer ends, holds the link of that (source, destination) pair for its
occupancy, in the order of production, and arrives a latency later. It never holds up compute. Between two stages of one
rank nothing is sent. A fused B sends its gradient when all of it is done.

Because the order on every rank and every link is given, start times are the longest paths of a graph without cycles,
and one pass in any feasible order finds them: O(number of actions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .actions import Action
from .activation_memory import peak_memory
from .stage_times import Hop, StageTimes, Tail
from .trace import COLLECTIVE, COMPUTE, HOST_IN, HOST_OUT, SEND, Event, Trace


class Deadlock(RuntimeError):
    """The lists can never finish. `waiting` gives the action that each stuck rank waits at."""

    def __init__(self, waiting: dict[int, Action]) -> None:
        self.waiting = waiting
        super().__init__(
            "no rank can go on; waiting: " + ", ".join(f"rank {rank} at {action}" for rank, action in waiting.items())
        )


@dataclass
class Timeline:
    """What the simulation found. Lists are indexed by rank; starts and ends run along the rank's list of actions."""

    ranks: Sequence[Sequence[Action]]
    starts: list[list[float]]
    ends: list[list[float]]
    makespan_s: float  # to the end of the last action, reduction and tail
    compute_end_s: list[float]  # end of each rank's last action
    busy_s: list[float]  # sum of the action durations
    waited_s: list[float]  # gathers and reductions between the actions that the rank waited for
    exposed_comm_s: list[float]  # all collectives that it waited for: those, the ones inside actions, and the tail's
    peak_bytes: list[int]
    peak_in_flight: list[int]  # most microbatch activations (of single virtual stages) held at once
    extra: list[Event] = field(default_factory=list)  # transfers, collectives and tails, where events were asked for

    @property
    def compute_makespan_s(self) -> float:
        return max(self.compute_end_s, default=0.0)

    @property
    def bubble_fractions(self) -> list[float]:
        """Share of each rank's time, to the end of the last action anywhere, without an action or a collective."""
        span = self.compute_makespan_s
        used = (busy + waited for busy, waited in zip(self.busy_s, self.waited_s, strict=True))
        return [(span - seconds) / span if span else 0.0 for seconds in used]

    @property
    def bubble_fraction(self) -> float:
        """Mean idle share over the ranks: (p-1)/(m+p-1) for 1F1B with equal stages."""
        fractions = self.bubble_fractions
        return sum(fractions) / len(fractions) if fractions else 0.0

    def events(self) -> Iterator[Event]:
        for rank, actions in enumerate(self.ranks):
            for action, start, end in zip(actions, self.starts[rank], self.ends[rank], strict=True):
                yield Event(rank, COMPUTE, action.kind, action.stage, action.microbatch, start, end)
        yield from self.extra

    def trace(self, **meta: object) -> Trace:
        events = sorted(self.events(), key=lambda event: (event.start_s, event.rank))
        return Trace("predicted", tuple(events), meta)


def simulate(
    ranks: Sequence[Sequence[Action]],
    placements: Sequence[Sequence[int]],
    stages: Sequence[StageTimes],
    num_microbatches: int,
    hops: Sequence[Hop] | Hop | None = None,
    *,
    direction: Sequence[int] | None = None,
    overlap_collectives: bool = False,
    overlap_reductions: bool = False,
    tails: Sequence[Tail] | None = None,
    wait_for_all: bool = False,
    static_bytes: Sequence[int] | None = None,
    with_events: bool = False,
    with_memory: bool = True,
) -> Timeline:
    """Run the lists. Raises Deadlock where they cannot finish.

    placements: the rank of each virtual stage, one row for each direction; direction: the row of each microbatch
    (default: all use row 0). overlap_collectives: gathers and reductions run beside compute (a gather one action
    ahead), else the rank waits for each. overlap_reductions: once-a-step reductions start at their stage's last
    backward, beside the work of the rank's other stages, else after the rank's last action. wait_for_all: tails start
    when every rank is done (clipping by global norm).
    static_bytes: held on each rank throughout. with_events: also record transfers and collectives.
    with_memory: also find the peaks (a third of the time).
    """
    num_ranks, num_stages, m = len(ranks), len(stages), num_microbatches
    last = num_stages - 1
    if hops is None:
        hops = Hop()
    hop_list = [hops] * last if isinstance(hops, Hop) else list(hops)
    assert len(hop_list) >= last, f"{num_stages} stages need {last} hops, got {len(hop_list)}"
    rows = [list(row) for row in placements]
    direction = [0] * m if direction is None else list(direction)
    forward_s = [stage.forward_s for stage in stages]
    input_s = [stage.backward_input_s for stage in stages]
    weight_s = [stage.backward_weight_s for stage in stages]
    collectives = any(stage.gather_s or stage.reduce_each_s for stage in stages)
    offloaded = _offloaded(ranks, stages, m)
    copied_out: dict[int, float] = {}  # slot -> end of the copy to host memory
    copied_in: dict[int, float] = {}
    host_free = [[0.0] * num_ranks for _ in range(2)]  # to host memory, from there

    size = num_stages * m
    forward_in = [-1.0] * size  # arrival of the input of F; -1: not yet
    for microbatch in range(m):
        forward_in[microbatch] = 0.0
    gradient_in = [-1.0] * size
    forward_done = bytearray(size)
    input_done = bytearray(size)
    clock = [0.0] * num_ranks
    collective_free = [0.0] * num_ranks
    gathered = [0.0] * num_ranks  # when the gather for the rank's next action begins
    starts: list[list[float]] = [[] for _ in ranks]
    ends: list[list[float]] = [[] for _ in ranks]
    busy = [0.0] * num_ranks
    exposed = [0.0] * num_ranks
    link_free: dict[tuple[int, int], float] = {}
    extra: list[Event] = []
    blocked = [-1] * num_ranks  # slot of the token that a rank waits for
    position = [0] * num_ranks
    runnable = list(range(num_ranks))

    while runnable:
        rank = runnable.pop()
        actions, now = ranks[rank], clock[rank]
        rank_starts, rank_ends = starts[rank], ends[rank]
        i, n = position[rank], len(actions)
        work = 0.0
        while i < n:
            kind, stage, microbatch = actions[i]
            slot = stage * m + microbatch
            if kind == "F":
                ready, seconds = forward_in[slot], forward_s[stage]
                if ready < 0.0:
                    break
            elif kind == "W":
                if not input_done[slot]:
                    break
                ready, seconds = 0.0, weight_s[stage]
            elif kind == "R":
                if not forward_done[slot]:
                    break
                ready, seconds = 0.0, forward_s[stage]
            elif kind == "O":
                if not forward_done[slot]:
                    break
                ready, seconds = copied_out.get(slot, 0.0), 0.0
            elif kind == "L":
                ready, seconds = 0.0, 0.0
            else:
                if not forward_done[slot]:
                    break
                ready = gradient_in[slot] if stage != last else 0.0
                if ready < 0.0:
                    break
                if slot in copied_in and copied_in[slot] > ready:
                    ready = copied_in[slot]
                seconds = input_s[stage]
                if kind == "B":
                    seconds += weight_s[stage]
            start = ready if ready > now else now
            if collectives and stages[stage].gather_s and kind not in "OL":
                begin = (gathered[rank] if overlap_collectives else now) if i else 0.0
                gathered_at = begin + stages[stage].gather_s
                if gathered_at > start:
                    exposed[rank] += gathered_at - start
                    start = gathered_at
                if with_events:
                    extra.append(Event(rank, COLLECTIVE, "gather", stage, microbatch, begin, gathered_at))
            end = start + seconds
            rank_starts.append(start)
            rank_ends.append(end)
            work += seconds
            now = end
            i += 1
            if collectives and kind not in "OL":
                following = i
                while overlap_collectives and following < n and actions[following].kind in "OL":
                    following += 1
                if overlap_collectives and following < n:  # the next action's gather goes out as this one starts
                    gathered[rank] = max(collective_free[rank], start)
                    collective_free[rank] = gathered[rank] + stages[actions[following].stage].gather_s
                each_s = stages[stage].reduce_each_s
                if each_s and kind in "BW":
                    begin = max(collective_free[rank], end) if overlap_collectives else end
                    collective_free[rank] = begin + each_s
                    if not overlap_collectives:
                        now = end + each_s
                        exposed[rank] += each_s
                    if with_events:
                        extra.append(Event(rank, COLLECTIVE, "reduce", stage, microbatch, begin, begin + each_s))
            # what the end of this action sets free
            if kind == "F":
                forward_done[slot] = 1
                if slot in offloaded:
                    seconds = stages[stage].offload_s
                    copied_out[slot] = free = max(host_free[0][rank], end) + seconds
                    host_free[0][rank] = free
                    if with_events:
                        extra.append(Event(rank, HOST_OUT, "offload", stage, microbatch, free - seconds, free))
                if stage == last:
                    continue
                target = slot + m
                hop = hop_list[stage]
                row = rows[direction[microbatch]]
                receiver = row[stage + 1]
                latency, occupancy = hop.forward_latency_s, hop.forward_occupancy_s
                arrivals = forward_in
            elif kind == "L":
                seconds = stages[stage].offload_s
                copied_in[slot] = free = max(host_free[1][rank], end) + seconds
                host_free[1][rank] = free
                if with_events:
                    extra.append(Event(rank, HOST_IN, "load", stage, microbatch, free - seconds, free))
                continue
            elif kind in "WRO":
                continue
            else:
                input_done[slot] = 1
                if stage == 0:
                    continue
                target = slot - m
                hop = hop_list[stage - 1]
                row = rows[direction[microbatch]]
                receiver = row[stage - 1]
                latency, occupancy = hop.backward_latency_s, hop.backward_occupancy_s
                arrivals = gradient_in
            if receiver == rank:
                arrivals[target] = end
                continue
            if occupancy:
                link = (rank, receiver)
                free = link_free.get(link, 0.0)
                sent = (free if free > end else end) + occupancy
                link_free[link] = sent
            else:
                sent = end
            arrivals[target] = sent + latency
            if with_events and occupancy + latency:
                extra.append(
                    Event(rank, f"{SEND}:{receiver}", "send", stage, microbatch, sent - occupancy, sent + latency)
                )
            if blocked[receiver] == target:
                blocked[receiver] = -1
                runnable.append(receiver)
        position[rank] = i
        clock[rank] = now
        busy[rank] += work
        if i < n:
            blocked[rank] = actions[i].stage * m + actions[i].microbatch

    waiting = {rank: ranks[rank][position[rank]] for rank in range(num_ranks) if position[rank] < len(ranks[rank])}
    if waiting:
        raise Deadlock(waiting)

    compute_end = [rank_ends[-1] if rank_ends else 0.0 for rank_ends in ends]
    waited = list(exposed)
    _account_inside_comm(ranks, stages, exposed)
    finish = _reductions(ranks, stages, ends, clock, collective_free, exposed, overlap_reductions, with_events, extra)
    if tails is not None:
        everyone = max(finish)
        for rank, tail in enumerate(tails):
            begin = everyone if wait_for_all else finish[rank]
            finish[rank] = begin + tail.optimizer_s + tail.gather_s
            exposed[rank] += tail.gather_s
            if with_events:
                middle = begin + tail.optimizer_s
                extra.append(Event(rank, COMPUTE, "optimizer", -1, -1, begin, middle))
                if tail.gather_s:
                    extra.append(Event(rank, COLLECTIVE, "gather", -1, -1, middle, finish[rank]))
    peaks, in_flight = peak_memory(ranks, stages, static_bytes) if with_memory else ([], [])
    return Timeline(
        ranks=ranks,
        starts=starts,
        ends=ends,
        makespan_s=max(finish, default=0.0),
        compute_end_s=compute_end,
        busy_s=busy,
        waited_s=waited,
        exposed_comm_s=[max(0.0, seconds) for seconds in exposed],  # differences of times may round below 0
        peak_bytes=peaks,
        peak_in_flight=in_flight,
        extra=extra,
    )


def _offloaded(ranks: Sequence[Sequence[Action]], stages: Sequence[StageTimes], num_microbatches: int) -> set[int]:
    """Slots whose activations take time on their way to host memory."""
    if not any(stage.offload_s for stage in stages):
        return set()
    let_go = (action for row in ranks for action in row if action.kind == "O")
    return {action.stage * num_microbatches + action.microbatch for action in let_go}


def _account_inside_comm(ranks: Sequence[Sequence[Action]], stages: Sequence[StageTimes], exposed: list[float]) -> None:
    if not any(stage.forward_comm_s or stage.backward_comm_s for stage in stages):
        return
    for rank, actions in enumerate(ranks):
        for kind, stage, _ in actions:
            if kind == "F" or kind == "R":
                exposed[rank] += stages[stage].forward_comm_s
            elif kind in "BI":
                exposed[rank] += stages[stage].backward_comm_s


def _reductions(
    ranks: Sequence[Sequence[Action]],
    stages: Sequence[StageTimes],
    ends: list[list[float]],
    clock: list[float],
    collective_free: list[float],
    exposed: list[float],
    overlap: bool,
    with_events: bool,
    extra: list[Event],
) -> list[float]:
    """When each rank is through with its actions and its once-a-step reductions.

    With overlap, a stage's reduction starts when its last backward ends, beside the work of the rank's other stages;
    without, all of them run after the rank's last action, one after another.
    """
    finish = []
    for rank, actions in enumerate(ranks):
        done_at: dict[int, float] = {}
        if any(stage.reduce_s for stage in stages):
            for index, (kind, stage, _) in enumerate(actions):
                if kind == "B" or kind == "W":
                    done_at[stage] = ends[rank][index]
        free = collective_free[rank] if overlap else max(clock[rank], collective_free[rank])
        for stage, end in sorted(done_at.items(), key=lambda item: item[1]):
            seconds = stages[stage].reduce_s
            if not seconds:
                continue
            begin = max(free, end)
            free = begin + seconds
            if with_events:
                extra.append(Event(rank, COLLECTIVE, "reduce", stage, -1, begin, free))
        finish.append(max(free, clock[rank]))
        exposed[rank] += finish[rank] - clock[rank]
    return finish
