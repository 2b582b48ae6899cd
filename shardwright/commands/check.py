"""Compare a planned program with the model as written: loss and every gradient, in float64, on small shapes.

MODEL is as for `shardwright plan`; a big one is shrunk. Given a plan.json, its kind of split is checked, scaled down to
four processes. Exit code 0 only where everything agrees to 1e-9.
"""

from __future__ import annotations

import argparse

from ..errors import ExitCode, ShardwrightError
from ..units import format_seconds
from . import _options

NAME = "check"
HELP = "compare a program's numbers with the single-device model's"
DEFAULT_BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--hardware", metavar="NAME", help="local processes to run on, such as 4xCPU (the default)")
    _options.add_workload_options(parser, batch_required=False)
    _options.add_force_option(parser)
    _options.add_self_test_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    _options.add_trust_option(parser)


def execute(args: argparse.Namespace) -> int:
    import time

    from .. import checking

    force = _options.parse_assignments(args.force, "--force")
    started = time.perf_counter()
    with _options.progress_line() as progress:
        if args.model.endswith(".json") and ":" not in args.model:
            if force:
                raise ShardwrightError("--force goes with a model; a plan has its choices", change="--force", works="")
            plan = _options.load_plan(args, args.model)
            result = checking.check_plan(plan, progress=progress, debug=args.debug, trust_model=args.trust_model)
        else:
            args.global_batch = args.global_batch or DEFAULT_BATCH
            hardware = args.hardware or f"{checking.DEFAULT_PROCESSES}xCPU"
            spec = _options.workload_from_args(args).spec
            result = checking.check(
                spec, hardware, force=force, progress=progress, debug=args.debug, self_test=args.self_test
            )
    if args.json:
        _options.print_json(result.to_json())
    else:
        _show(result, time.perf_counter() - started)
    return ExitCode.DONE if result.ok else ExitCode.INTERNAL


def _show(result, seconds: float) -> None:  # type: ignore[no-untyped-def]
    from rich.text import Text

    from ..checking import TOLERANCE
    from ..plans.axes import role_of, tensor_axes
    from ..render import make_console, mesh_text, schedule_text, split_text

    console = make_console()
    verdict = Text("same numbers", "bold green") if result.ok else Text("DIFFERENT NUMBERS", "bold red")
    plan = result.plan
    console.print(verdict, f"(relative tolerance {TOLERANCE:g}, float64, two steps)")
    console.print(f"  loss       {result.loss_rel_err:.2e}")
    worst = f"   worst: {result.worst_parameter}" if result.worst_parameter else ""
    console.print(f"  gradients  {result.max_grad_rel_err:.2e} over {len(result.gradient_errors)} parameters{worst}")
    console.print(f"  plan       {mesh_text(plan.mesh)}, {schedule_text(plan)}, ZeRO {plan.zero}, "
                  f"{plan.microbatch.count} microbatches of {plan.microbatch.size} "
                  f"({plan.microbatch.size // plan.mesh.shape.batch_ranks} on each data rank)")  # fmt: skip
    for axis in tensor_axes():
        if plan.mesh.shape.size(axis) > 1:
            console.print(f"  {role_of(axis).meaning.partition(':')[0]:<10} {split_text(plan, axis)}")
    console.print(f"  took       {format_seconds(seconds)}", style="dim")
    for name, error in sorted(result.gradient_errors.items(), key=lambda item: -item[1])[:8]:
        if error > TOLERANCE:
            console.print(f"  {error:.2e}  {name}", style="red")
