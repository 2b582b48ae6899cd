"""Find the order in which pipeline ranks run their actions, for given times and memory.

Times are those of one rank's share of the model: each of its chunks takes that part of them. Memory counts microbatches
whose activations a rank's share holds.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import TYPE_CHECKING

from ..errors import ExitCode, ShardwrightError
from . import _options

if TYPE_CHECKING:
    from ..schedules import PipelineSchedule
    from ..schedules.problem import PipelineProblem
    from ..schedules.synthesis.synthesize import Synthesis

NAME = "schedule"
HELP = "find the order of a pipeline's actions"
AUTO = "auto"
MAX_ACTIONS = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    problem = parser.add_argument_group("pipeline")
    problem.add_argument("--ranks", type=_options.positive, required=True, metavar="N", help="pipeline ranks")
    problem.add_argument("--microbatches", type=_options.positive, required=True, metavar="N", help="in one step")
    problem.add_argument(
        "--chunks",
        type=_options.positive,
        default=2,
        metavar="N",
        help="virtual stages on a rank, at most (default: 2)",
    )
    problem.add_argument(
        "--times", default="1,1,1", metavar="F,I,W", help="of forward, input and weight gradients (default: 1,1,1)"
    )
    problem.add_argument("--transfer", default="0", metavar="T", help="time between two ranks (default: 0)")
    problem.add_argument(
        "--stage-extra", default="0,0", metavar="A,B", help="shares that the first and the last stage carry besides"
    )
    problem.add_argument("--memory", metavar="M", help="microbatches that a rank holds, at most (default: no limit)")
    problem.add_argument("--recompute", action="store_true", help="activations may be let go and recomputed")
    problem.add_argument(
        "--offload", metavar="T", help="they may go to host memory; a share's take T there and T back (default: no)"
    )
    choice = parser.add_argument_group("choice")
    choice.add_argument("--name", default=AUTO, metavar="NAME", help="auto (default), 1f1b, zb-v, v-half, ...")
    choice.add_argument(
        "--placement", default=AUTO, metavar="P", help="auto (default), loop, v, or the rank of each stage: 0,1,1,0"
    )
    choice.add_argument("--time-limit", type=_options.positive_seconds, metavar="SECONDS", help="stop searching then")
    output = parser.add_argument_group("output").add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print orders and figures as JSON, and nothing else")
    output.add_argument("--gantt", action="store_true", help="draw the timeline")


def execute(args: argparse.Namespace) -> int:
    problems = _problems(args)
    with _options.progress_line(enabled=not args.json) as progress:
        progress("searching")
        found = _searched(problems, args) if args.name == AUTO else _published(problems, args)
    timeline = found.schedule.simulate(found.problem.stages, found.problem.hops)
    held = max(timeline.peak_bytes) / found.schedule.num_chunks
    if args.json:
        figures = {
            "makespan": found.makespan_s,
            "bubble_fraction": timeline.bubble_fraction,
            "peak_memory": held,
            "recomputed": len(found.schedule.places("R")),
            "offloaded": len(found.schedule.places("O")),
            "lower_bound": found.bound_s,
            "gap_fraction": found.gap_fraction,
            "name": found.name,
            "seconds": found.seconds,
        }
        _options.print_json(found.schedule.to_judge() | figures, indent=None)
        return ExitCode.DONE
    from ..render import make_console

    console = make_console()
    if args.gantt:
        from ..gantt import render_gantt

        console.print(render_gantt(timeline, console.width))
    console.print(
        f"{found.name}; virtual stages on a rank: {found.schedule.num_chunks}, placed: {_shape(found.schedule)}\n"
        f"makespan {found.makespan_s:g}, bubble {timeline.bubble_fraction:.1%}, {held:g} microbatches held\n"
        f"{_let_go(found.schedule)}"
        f"no order of the placements tried takes less than {found.bound_s:g} (gap {found.gap_fraction:.1%}); "
        f"found in {found.seconds:.1f} s"
    )
    return ExitCode.DONE


def _problems(args: argparse.Namespace) -> list[PipelineProblem]:
    """One for each number of chunks, or that of the placement."""
    from ..schedules.problem import problem_of_shares
    from ..schedules.schedule import loop_placement

    p, m = args.ranks, args.microbatches
    forward_s, input_s, weight_s = _numbers(args.times, "--times", 3, "1,1.4,0.6")
    if forward_s + input_s + weight_s <= 0.0:
        raise ShardwrightError(
            f"--times {args.times}: nothing takes any time", change="--times F,I,W", works="--times 1,1.4,0.6"
        )
    (transfer_s,) = _numbers(args.transfer, "--transfer", 1, "0.1")
    first, last = _numbers(args.stage_extra, "--stage-extra", 2, "0.15,0.4")
    limit = math.inf if args.memory is None else _numbers(args.memory, "--memory", 1, str(p))[0]
    _refuse_long(p, m, args.chunks)
    given = _placement(args)
    places = [loop_placement(p, chunks) for chunks in range(1, args.chunks + 1)] if given is None else [given]
    _refuse_long(p, m, len(places[-1]) // p)
    times = (forward_s, input_s, weight_s)
    offload_s = None if args.offload is None else _numbers(args.offload, "--offload", 1, "0.5")[0]
    return [
        problem_of_shares(
            m,
            place,
            times,
            transfer_s,
            stage_extra=(first, last),
            memory_limit=limit,
            recompute=args.recompute,
            offload_s=offload_s,
        )
        for place in places
    ]


def _refuse_long(ranks: int, microbatches: int, chunks: int) -> None:
    stages, actions = ranks * chunks, 3 * microbatches * ranks * chunks
    if actions > MAX_ACTIONS:
        few = 3 * stages > MAX_ACTIONS
        raise ShardwrightError(
            f"{ranks} ranks, {microbatches} microbatches and {chunks} chunks are {actions:,} actions",
            means=f"more than {MAX_ACTIONS:,} take too long",
            change="--chunks" if few else "--microbatches",
            works="--chunks 2" if few else f"--microbatches {MAX_ACTIONS // (3 * stages)}",
        )


def _numbers(text: str, option: str, count: int, works: str) -> tuple[float, ...]:
    """Finite and not negative."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count or not all(0.0 <= value < math.inf for value in values):
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise ShardwrightError(
            f"{option} {text}: expected {wanted}, none negative", change=option, works=f"{option} {works}"
        )
    return values


def _placement(args: argparse.Namespace) -> tuple[int, ...] | None:
    """The one asked for; None where it is free."""
    from ..schedules.schedule import loop_placement, v_placement

    shapes = {"loop": loop_placement, "v": v_placement}
    if args.placement == AUTO:
        return None
    if args.placement in shapes:
        return shapes[args.placement](args.ranks, args.chunks)
    try:
        place = tuple(int(part) for part in args.placement.split(","))
    except ValueError:
        place = ()
    if not place or len(place) % args.ranks or not set(place) <= set(range(args.ranks)):
        example = ",".join(map(str, v_placement(args.ranks)))
        raise ShardwrightError(
            f"--placement {args.placement}: expected auto, loop, v, or a rank from 0 to {args.ranks - 1} for each "
            f"stage, a multiple of {args.ranks} stages",
            change="--placement",
            works=f"--placement {example if len(example) < 40 else 'v'}",
        )
    return place


def _searched(problems: list[PipelineProblem], args: argparse.Namespace) -> Synthesis:
    from ..schedules.bounds import lower_bound
    from ..schedules.placements import placed
    from ..schedules.synthesis.synthesize import synthesize

    if args.placement == AUTO:
        problems = [candidate for problem in problems for candidate in placed(problem)]
    found = synthesize(problems, time_limit_s=args.time_limit)
    if found is None:
        needed = min(_least_memory(problem) for problem in problems)
        what = f"a limit of {args.memory} microbatches leaves no room for one microbatch on every rank"
        means = f"a rank that has run a microbatch's forwards holds {needed:g}"
        if any(problem.offers for problem in problems):
            least = min(problem.num_ranks / problem.num_stages for problem in problems)
            means = f"a rank holds {least:g} while it works on one chunk"
            if math.isfinite(min(map(lower_bound, problems))):
                what = f"no order was found that holds no more than {args.memory} microbatches on a rank"
                means = f"it may exist; what keeps all activations holds {needed:g}"
            else:
                needed = least
        raise ShardwrightError(
            what,
            means=means,
            change="--memory",
            works=f"--memory {needed:g}",
            exit_code=ExitCode.DOES_NOT_FIT,
        )
    return found


def _least_memory(problem: PipelineProblem) -> float:
    most = max(len(problem.stages_of(rank)) for rank in range(problem.num_ranks))
    return most * problem.num_ranks / problem.num_stages


def _published(problems: list[PipelineProblem], args: argparse.Namespace) -> Synthesis:
    """The schedule of that name, with as many chunks as it takes and --chunks allows."""
    from dataclasses import replace

    from ..schedules.bounds import lower_bound
    from ..schedules.published.library import SCHEDULES, build_schedule, canonical_name
    from ..schedules.synthesis.synthesize import Synthesis

    began = time.monotonic()
    name = canonical_name(args.name, option="--name ")
    if args.recompute or args.offload is not None:
        option = "--recompute" if args.recompute else "--offload"
        raise ShardwrightError(
            f"schedule {name} keeps all activations; {option} lets an order let some go",
            means="published orders are run as they are",
            change="--name",
            works="--name auto",
        )
    taken = [chunks for chunks in SCHEDULES[name].chunks if chunks <= args.chunks]
    if not taken:
        least = min(SCHEDULES[name].chunks)
        raise ShardwrightError(
            f"schedule {name} takes {least} virtual stages on a rank; --chunks allows {args.chunks}",
            change="--chunks",
            works=f"--chunks {least}",
        )
    schedule = build_schedule(name, args.ranks, args.microbatches, max(taken))
    problem = next((p for p in problems if p.num_stages == schedule.num_stages), None)
    if problem is None or args.placement not in (AUTO, _shape(schedule)):
        raise ShardwrightError(
            f"schedule {name} places its stages {_shape(schedule)}, not {args.placement}",
            change="--placement",
            works="--placement auto",
        )
    problem = replace(problem, stage_rank=schedule.stage_rank)
    timeline = schedule.simulate(problem.stages, problem.hops)
    rank = max(range(args.ranks), key=timeline.peak_bytes.__getitem__)
    held = timeline.peak_bytes[rank]
    if held > problem.memory_limit[rank]:
        raise ShardwrightError(
            f"schedule {name} holds {held / schedule.num_chunks:g} microbatches on rank {rank}, the limit is "
            f"{args.memory}",
            means="it cannot run within that memory; --name auto finds an order that can",
            change="--memory",
            works=f"--memory {held / schedule.num_chunks:g}",
            exit_code=ExitCode.DOES_NOT_FIT,
        )
    bound_s = max(timeline.busy_s) if schedule.reverse_stage_rank else lower_bound(problem)
    makespan_s = timeline.makespan_s
    gap_fraction = (makespan_s - bound_s) / makespan_s
    return Synthesis(schedule, problem, makespan_s, bound_s, gap_fraction, name, time.monotonic() - began)


def _let_go(schedule: PipelineSchedule) -> str:
    """A line on what is not kept, or nothing."""
    counts = {"recomputed": len(schedule.places("R")), "offloaded": len(schedule.places("O"))}
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"of {schedule.num_stages * schedule.num_microbatches} activations {found}\n" if found else ""


def _shape(schedule: PipelineSchedule) -> str:
    from ..schedules.schedule import loop_placement, v_placement

    if schedule.reverse_stage_rank:
        return "two directions"
    for name, make in (("loop", loop_placement), ("v", v_placement)):
        if schedule.stage_rank == make(schedule.num_ranks, schedule.num_chunks):
            return name
    return ",".join(map(str, schedule.stage_rank))
