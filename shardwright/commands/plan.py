"""Decide how to split, order and place a training job over a cluster.

MODEL is preset:NAME (see `shardwright models`), hf:PATH of a transformers configuration, diffusers:PATH of a diffusers
model's, package.module:factory, or the path of a plan.json, which is shown again. --hardware is a name (see
`shardwright hardware`), such as 2x8xH100-80GB, 4xCPU or local, or the path of a TOML file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ExitCode, ShardwrightError
from . import _options

if TYPE_CHECKING:
    from ..profiler.cluster import Cluster

NAME = "plan"
HELP = "make a plan for a model and a cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--hardware", metavar="NAME", help="cluster to plan for (needed unless MODEL is a plan)")
    _options.add_workload_options(parser, batch_required=False)
    _options.add_plan_options(parser)
    parser.add_argument(
        "--stack",
        default="shardwright",
        metavar="NAME",
        help="software to predict for, such as megatron; `shardwright hardware --show-assumptions` lists them",
    )
    parser.add_argument(
        "--lengths",
        metavar="FILE",
        help="assign sequences of these lengths, one a line, or lognormal:median=N,sigma=X,max=N,seed=N, to groups of "
        "ranks; --global-batch of them make a step",
    )
    parser.add_argument(
        "--routing",
        metavar="FILE",
        help="tokens that chose each expert of each layer: JSON lists, or layer,expert,count",
    )
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", metavar="PATH", help="write the plan here")
    output.add_argument("--json", action="store_true", help="print the plan as JSON, and nothing else, on stdout")
    output.add_argument(
        "--memory-timeline", metavar="PATH", help="write each rank's bytes over the step here, as .html or .json"
    )
    output.add_argument("--top", type=int, default=8, metavar="N", help="runner-up plans to show (default: 8)")


def execute(args: argparse.Namespace) -> int:
    from ..plans.document import Plan

    if args.memory_timeline is not None:
        _options.check_memory_timeline(args.memory_timeline, "nothing was planned")
    if args.model.endswith(".json") and ":" not in args.model:
        return _show(Plan.load(args.model), args)
    if args.hardware is None:
        raise ShardwrightError("no hardware is named", change="--hardware", works="--hardware 4xCPU")
    force = _options.parse_assignments(args.force, "--force")
    if args.routing is not None:
        from ..routing import forced_imbalance

        force.setdefault("expert_imbalance", forced_imbalance(args.routing))
    cluster = _check_names(args, force)
    if args.output is not None:
        _options.refuse_unwritable(Path(args.output), "-o PATH", "-o plan.json", "nothing was planned")
    if args.lengths is not None:
        return _plan_lengths(args, cluster, force)
    from .. import api

    with _options.progress_line() as progress:
        workload = _options.workload_from_args(args)
        made = api.plan(
            workload,
            cluster,
            force=force,
            memory_limit_bytes=args.memory_limit,
            time_limit_s=args.time_limit,
            strict=args.strict,
            self_test=args.self_test,
            stack=args.stack,
            progress=progress,
        )
    if args.output is not None:
        made.save(args.output)
    code = _show(made, args)
    if args.output is not None:
        print(f"plan written to {args.output}", file=sys.stderr if args.json else sys.stdout)
    return code


def _plan_lengths(args: argparse.Namespace, cluster: Cluster, force: dict[str, str]) -> int:
    import json

    from ..costmodel.stacks import stack_named
    from ..lengths import plan_lengths, print_lengths, read_lengths
    from ..profiler.files import replace_text
    from ..profiler.workload import Workload

    lengths = read_lengths(args.lengths, args.global_batch)
    if args.memory_limit is not None:
        cluster = cluster.with_memory_limit(args.memory_limit)

    def workload_of(tokens: int) -> Workload:
        return _options.workload_from_args(argparse.Namespace(**{**vars(args), "seq_len": tokens}))

    with _options.progress_line() as progress:
        progress(f"capturing {args.model}")
        found = plan_lengths(workload_of, cluster, lengths, force, stack_named(args.stack))
    text = json.dumps(found.to_dict(), indent=1)
    if args.output is not None:
        replace_text(Path(args.output), text + "\n")
    if args.json:
        _options.print_json(text)
    else:
        print_lengths(found)
    return ExitCode.DONE


def _check_names(args: argparse.Namespace, force: dict[str, str]) -> Cluster:
    """The cluster. What is mistyped is said before what is missing, and before the model is traced."""
    from ..costmodel.stacks import stack_named
    from ..planner.sharding.pins import choices_of
    from ..planner.space.forcing import parse_forced
    from ..profiler.hardware import parse_hardware

    parse_forced(choices_of(force))
    stack_named(args.stack)
    cluster = parse_hardware(args.hardware)
    if args.global_batch is None:
        args.global_batch = 1
        _options.workload_from_args(args)
        raise ShardwrightError("no global batch is given", change="--global-batch", works="--global-batch 8")
    return cluster


def _show(plan, args: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    if args.memory_timeline is not None:
        from ..memory_timeline import write_memory_timeline

        write_memory_timeline(args.memory_timeline, plan)
    if args.json:
        _options.print_json(plan.to_json())
    else:
        from ..render import print_plan

        print_plan(plan, top=args.top)
        if args.memory_timeline is not None:
            print(f"memory timeline written to {args.memory_timeline}")
    return ExitCode.DONE
