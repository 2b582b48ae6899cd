"""List the models that come with the package, with their parameter counts. Use them as preset:NAME."""

from __future__ import annotations

import argparse
import dataclasses

from ..errors import ExitCode
from ..units import format_count
from . import _options

NAME = "models"
HELP = "list the models that come with the package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    from ..profiler.models import list_models

    rows = list_models()
    if args.json:
        _options.print_json([{"model": f"preset:{row.name}", **dataclasses.asdict(row)} for row in rows])
        return ExitCode.DONE
    from ..render import make_console, make_table

    table = make_table("model", "parameters", "kind", "tokens", "", right=("parameters", "tokens"), whole=("model",))
    for row in rows:
        tokens = "" if row.seq_len is None else f"{row.seq_len:,}"
        table.add_row(f"preset:{row.name}", format_count(row.num_params), row.kind, tokens, row.note)
    make_console().print(table)
    return ExitCode.DONE
