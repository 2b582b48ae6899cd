"""Say for each op of a plan what was chosen and what it costs, or what another choice would have cost.

PLAN is the path of a plan.json. Shown are the ops and tensors that take longest: their placements on each mesh axis,
the collectives that their results ask for, module and source line. --why-not plans again with a choice forced (pp, dp,
tp, zero, schedule, ..., or PATTERN=FORM as in `shardwright plan --force`) and shows what changes and what binds.
"""

from __future__ import annotations

import argparse

from ..errors import ExitCode, ShardwrightError
from . import _options

NAME = "explain"
HELP = "say what a plan decided for each op, and why not otherwise"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN")
    parser.add_argument(
        "--op", metavar="PATTERN", help="only these modules or ops, such as 'layers.*.mlp' or 'aten.mm.*'"
    )
    parser.add_argument("--segment", metavar="NAME", help="only this distinct segment")
    parser.add_argument("--all", action="store_true", help="every op, in program order")
    parser.add_argument(
        "--why-not",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="force this besides, plan again and compare (repeatable: all of them at once)",
    )
    parser.add_argument("--time-limit", type=_options.positive_seconds, metavar="SECONDS", help="of planning again")
    parser.add_argument("--hardware", metavar="NAME", help="the plan's hardware, where it came from a TOML file")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")
    _options.add_trust_option(parser)


def execute(args: argparse.Namespace) -> int:
    plan = _options.load_plan(args, args.plan)
    choices = _options.parse_assignments(args.why_not, "--why-not")
    return _why_not(plan, choices, args) if choices else _explain(plan, args)


def _explain(plan, args: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    from .. import reasons
    from ..render_reasons import print_explanation

    if args.segment is not None and args.segment not in plan.placements:
        raise ShardwrightError(
            f"--segment {args.segment}: the plan has no such segment",
            means=f"its segments: {', '.join(plan.placements)}",
            change="--segment",
            works=f"--segment {max(plan.placements, key=plan.segments.count)}",
        )
    with _options.progress_line() as progress:
        progress(f"capturing {plan.workload.get('model', 'the model')}")
        explained = reasons.explain(plan, hardware=args.hardware, trust_model=args.trust_model)
    rows = explained.matching(args.segment, args.op)
    if not rows:
        modules = sorted({row.module for row in explained.rows if row.module})
        raise ShardwrightError(
            f"--op {args.op}: no op or module goes by that name",
            means=f"{len(explained.rows)} ops and tensors were looked through",
            change="--op",
            works=f"--op {modules[0] if modules else 'aten.mm.*'}",
        )
    if args.json:
        _options.print_json(explained.to_dict(rows))
    else:
        print_explanation(plan, explained, rows, whole=args.all)
    return ExitCode.DONE


def _why_not(plan, choices: dict[str, str], args: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    from .. import reasons
    from ..render_reasons import print_why_not

    with _options.progress_line() as progress:
        answer = reasons.why_not(
            plan,
            choices,
            hardware=args.hardware,
            time_limit_s=args.time_limit,
            progress=progress,
            trust_model=args.trust_model,
        )
    if args.json:
        refusal = answer.refusal
        _options.print_json(
            {
                "forced": answer.forced,
                "difference": answer.difference.to_dict() if answer.difference else None,
                "refusal": {"what": refusal.what, "means": refusal.means} if refusal else None,
            }
        )
    else:
        print_why_not(plan, answer, args.why_not)
    return ExitCode.DONE
