"""Compare two plans: choices, time, memory and placements. Reads the documents alone."""

from __future__ import annotations

import argparse

from ..errors import ExitCode
from . import _options

NAME = "diff"
HELP = "compare two plans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="FIRST", help="path of a plan.json")
    parser.add_argument("second", metavar="SECOND", help="path of another")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    from ..planner.report.diff import compare
    from ..plans.document import Plan
    from ..render_reasons import print_difference

    difference = compare(Plan.load(args.first), Plan.load(args.second))
    if args.json:
        _options.print_json(difference.to_dict())
    else:
        print_difference(difference)
    return ExitCode.DONE
