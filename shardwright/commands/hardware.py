"""List the hardware in the catalog, or show every figure of one cluster with its source.

NAME is [NODESx]GPUSxNAME[-FORM][-MEMORY], joined by + for mixed clusters: 8xA100-40GB, 2x8xH100-SXM-80GB+1x4xA100.
4xCPU is four processes on one machine, local is this machine, and a path loads a TOML file.
"""

from __future__ import annotations

import argparse

from ..errors import ExitCode
from . import _options

NAME = "hardware"
HELP = "list known hardware, or show the figures of one cluster"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="a cluster, such as 2x8xH100-80GB")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    from ..profiler import hardware

    if args.name is None:
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
        if args.name is None:
            row = row | {"links": f"{row['local']}, {row['network']}"}
        table.add_row(*(row[key] for key in columns))
    make_console().print(table)
    return ExitCode.DONE
