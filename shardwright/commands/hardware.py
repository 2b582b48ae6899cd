"""List the hardware in the catalog, or show every figure of one cluster with its source.

NAME is [NODESx]GPUSxNAME[-FORM][-MEMORY], joined by + for mixed clusters: 8xA100-40GB, 2x8xH100-SXM-80GB+1x4xA100.
4xCPU is four processes on one machine, local is this machine, and a path loads a TOML file. --show-assumptions lists
what the cost model assumes of hardware and software beside the catalog's figures.
"""

from __future__ import annotations

import argparse

from ..errors import ExitCode, ShardwrightError
from . import _options

NAME = "hardware"
HELP = "list known hardware, or show the figures of one cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a cluster, such as 2x8xH100-80GB")
    parser.add_argument(
        "--show-assumptions",
        action="store_true",
        help="list the cost model's constants, each with its meaning, kind and source",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    from ..costmodel.constants import default_constants
    from ..costmodel.stacks import stack_rows
    from ..profiler import hardware

    if args.show_assumptions:
        if args.name is not None:
            raise ShardwrightError(
                f"--show-assumptions and {args.name}: the constants are one list for all clusters",
                change="NAME",
                works="shardwright hardware --show-assumptions",
                exit_code=ExitCode.USAGE,
            )
        rows = [*default_constants().rows(), *stack_rows()]
        columns = {"name": "constant", "value": "value", "kind": "kind", "meaning": "meaning", "source": "source"}
    elif args.name is None:
        rows = hardware.known_hardware()
        columns = {"name": "name", "memory": "memory", "memory_gb_per_s": "GB/s", "peak": "peak", "links": "links"}
    else:
        rows = hardware.describe(hardware.parse_hardware(args.name))
        columns = {"what": "figure", "value": "value", "kind": "kind", "source": "source"}
    if args.json:
        _options.print_json(rows)
        return ExitCode.DONE
    from ..render import make_console, make_table

    table = make_table(*columns.values(), right=("memory", "GB/s"), whole=("name", "peak"))
    for row in rows:
        if "local" in row:
            row = row | {"links": f"{row['local']}, {row['network']}"}
        table.add_row(*(row[key] for key in columns))
    make_console().print(table)
    return ExitCode.DONE
