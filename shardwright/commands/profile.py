"""Measure ops and links of the hardware at hand, and write them as a file that --hardware takes.

Started alone it measures this machine: its accelerators, or NxCPU for N processes that share its cores. Under torchrun
every process of the job takes part, and every pair of hosts is measured. What was measured is kept in a cache
(SHARDWRIGHT_CACHE moves it), by device and versions, so that a stopped run goes on where it was; --hardware local, and
NxCPU on this machine, then plan with it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..errors import ExitCode
from . import _options

NAME = "profile"
HELP = "measure ops and links of the hardware at hand"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hardware", default="local", metavar="NAME", help="local (default), or such as 2xCPU")
    parser.add_argument("-o", "--output", metavar="FILE", help="write a hardware file, such as measured.toml")
    parser.add_argument("--dtypes", default="", metavar="LIST", help="default: fp32 on CPUs, bf16,fp32 on GPUs")
    parser.add_argument("--ops", default="", metavar="LIST", help="such as mm,attention; default: all")
    parser.add_argument("--refresh", action="store_true", help="measure again what is in the cache")
    parser.add_argument("--no-links", action="store_true", help="ops alone")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    from ..profiling import measured_here, measured_on_local_processes

    under_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    output = Path(args.output) if args.output else None
    options: dict[str, Any] = {
        "dtypes": args.dtypes,
        "ops": args.ops,
        "refresh": args.refresh,
        "links": not args.no_links,
        "output": None if output is None else str(output.resolve()),
    }
    tell = None if args.json else _Teller()
    made = measured_here(options, tell) if under_torchrun else measured_on_local_processes(args.hardware, options, tell)
    if made is None:  # not the first process of a job
        return ExitCode.DONE
    if args.json:
        _options.print_json(made)
    else:
        _print(made, output)
    return ExitCode.DONE


class _Teller:
    """One line on stderr that says what is measured."""

    def __call__(self, event: dict[str, Any]) -> None:
        if sys.stderr.isatty():
            text = f"{event['done']} of {event['of']}: {event['op']} {event['dtype']} {event['size']}"
            sys.stderr.write(f"\r\x1b[K{text}" if event["done"] < event["of"] else "\r\x1b[K")
            sys.stderr.flush()


def _print(made: dict[str, Any], output: Path | None) -> None:
    from ..render import make_console, make_table
    from ..units import format_seconds

    console = make_console()
    table = make_table("op", "dtype", "form", "sizes", "smallest", "largest", "best rate", right=("sizes",))
    for row in made["rates"]:
        best_flops = max(f / s for f, s in zip(row["flops"], row["seconds"], strict=True))
        best_bytes = max(b / s for b, s in zip(row["bytes"], row["seconds"], strict=True))
        arithmetic = row["op"].startswith(("mm", "attention"))
        rate = f"{best_flops / 1e9:,.1f} GFLOP/s" if arithmetic else f"{best_bytes / 1e9:,.1f} GB/s"
        seconds = row["seconds"]
        ends = format_seconds(seconds[0]), format_seconds(seconds[-1])
        table.add_row(row["op"], row["dtype"], row.get("form", ""), str(len(seconds)), *ends, rate)
    console.print(table)
    for link in made["links"]:
        a, b = link["hosts"]
        what = f"inside host {a}" if a == b else f"host {a} to host {b}"
        console.print(f" {what}: {link['gb_per_s']:.3g} GB/s a process, {link['latency_us']:.3g} us")
    for name, error in made["failed"].items():
        console.print(f" failed: {name}: {error}")
    points = sum(len(row["seconds"]) for row in made["rates"])
    console.print(f" {points} figures of {made['device']}; {made['measured']} measured now, the rest from the cache")
    if output is not None:
        console.print(f" hardware written to {output}")
