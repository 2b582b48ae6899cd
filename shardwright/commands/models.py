"""List the presets shipped with the package, with their parameter counts."""

from __future__ import annotations

import argparse

from ..errors import ExitCode
from ..units import format_count
from . import _options

NAME = "models"
HELP = "list the models that come with the package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def execute(args: argparse.Namespace) -> int:
    from ..profiler.models import list_presets

    presets = list_presets()
    if args.json:
        _options.print_json([{"name": f"preset:{p.name}", "params": p.num_params, "task": p.task} for p in presets])
        return ExitCode.DONE
    from rich.table import Table

    from ..render import make_console, make_table

    table: Table = make_table("model", "parameters", "task", right=("parameters",))
    for preset in presets:
        table.add_row(f"preset:{preset.name}", format_count(preset.num_params), preset.task)
    make_console().print(table)
    return ExitCode.DONE
