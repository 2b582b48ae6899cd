"""Say what this machine has of what Shardwright uses, and what to do about what is missing.

Exit code 0 where everything that planning and running on this machine needs is there, else 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from .. import __version__
from ..errors import ExitCode
from . import _options

NAME = "doctor"
HELP = "check this machine's installation"


@dataclass(frozen=True)
class Finding:
    """needed: planning or running does not work without it."""

    part: str
    ok: bool
    found: str
    needed: bool
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def execute(args: argparse.Namespace) -> int:
    findings = examine()
    healthy = all(finding.ok for finding in findings if finding.needed)
    if args.json:
        _options.print_json({"ok": healthy, "findings": [asdict(finding) for finding in findings]})
    else:
        from rich.text import Text

        from ..render import make_console, make_table

        table = make_table("", "part", "found", "")
        for finding in findings:
            mark = ("ok", "green") if finding.ok else ("no", "red" if finding.needed else "yellow")
            table.add_row(Text(*mark), finding.part, finding.found, finding.note)
        make_console().print(table)
    return ExitCode.DONE if healthy else ExitCode.INTERNAL


def examine() -> list[Finding]:
    return [
        _python(),
        Finding("shardwright", True, __version__, True),
        _torch(),
        _try("solver (HiGHS)", _solver, needed=True, note="pip install highspy"),
        _try("solver (CP-SAT)", _cp_sat, needed=False, note="pip install ortools: proves small schedules optimal"),
        _try("gloo", _gloo, needed=True, note="this build of PyTorch has no gloo: runs on CPU are impossible"),
        _try("nccl", _nccl, needed=False, note="only for NVIDIA GPUs"),
        _try("accelerators", _accelerators, needed=False, note="none found: plans can still be made for any"),
        _try("transformers", lambda: _version("transformers"), needed=False, note="pip install 'shardwright[hf]'"),
        _try("triton", lambda: _version("triton"), needed=False, note="kernels fall back to their PyTorch references"),
        _try(
            "torch.compile", _entry_point, needed=False, note="install the package: its entry point is not registered"
        ),
        _try(
            "CPU calibration",
            _calibration,
            needed=False,
            note="nominal figures; --hardware local measures this machine",
        ),
    ]


def _try(part: str, look: Callable[[], str], *, needed: bool, note: str) -> Finding:
    try:
        return Finding(part, True, look(), needed)
    except Exception as error:  # a broken installation fails in any way it likes; the report must go on
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        return Finding(part, False, reason, needed, note)


def _python() -> Finding:
    ok = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", ok, platform.python_version(), True, "" if ok else "3.10 to 3.13 are supported")


def _torch() -> Finding:
    finding = _try("PyTorch", lambda: _version("torch"), needed=True, note="pip install torch")
    if not finding.ok:
        return finding
    release = tuple(int(part) for part in finding.found.split("+")[0].split(".")[:2])
    ok = (2, 11) <= release <= (2, 13)
    return Finding("PyTorch", ok, finding.found, True, "" if ok else "2.11 to 2.13 are supported")


def _version(package: str) -> str:
    importlib.import_module(package)
    return importlib.metadata.version(package)


def _solver() -> str:
    import pulp

    from ..planner.solver import solve_model

    problem = pulp.LpProblem("doctor", pulp.LpMinimize)
    x = pulp.LpVariable("x", 0, 3, cat="Integer")
    problem += -2 * x
    solve_model(problem)
    if pulp.value(x) != 3:
        raise RuntimeError(f"max 2x, x <= 3 gave x = {pulp.value(x)}")
    return f"highspy {importlib.metadata.version('highspy')}, pulp {importlib.metadata.version('pulp')}"


def _cp_sat() -> str:
    """One microbatch through two ranks: forwards there, input gradients back, and the first rank's weight gradient."""
    from ..schedules import loop_placement
    from ..schedules.graph import OrderGraph
    from ..schedules.problem import problem_of_shares
    from ..schedules.synthesis.exact import solve

    graph = OrderGraph(problem_of_shares(1, loop_placement(2, 1), (1.0, 1.0, 1.0)))
    found = solve(graph, None, 10.0, 0.0, time_limit_s=10.0)
    if found is None:
        raise RuntimeError("not installed, or it does not run")
    if (found.makespan_s, found.bound_s) != (5.0, 5.0):
        raise RuntimeError(f"a makespan of 5 came out as {found.makespan_s:g}, at least {found.bound_s:g}")
    return f"ortools {importlib.metadata.version('ortools')}"


def _gloo() -> str:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_gloo_available()):
        raise RuntimeError("not in this build")
    return "available"


def _nccl() -> str:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        raise RuntimeError("not in this build")
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _accelerators() -> str:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise RuntimeError("none")
    return f"{count} x {torch.cuda.get_device_name(0)}"


def _entry_point() -> str:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="shardwright")
    if not found:
        raise RuntimeError("not registered")
    return 'backend="shardwright"'


def _calibration() -> str:
    from ..profiler.cpu_calibration import calibration_path, read_cpu_calibration

    if read_cpu_calibration() is None:
        raise RuntimeError("not measured yet")
    return str(calibration_path())
