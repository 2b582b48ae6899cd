"""Shardwright: automatic parallelization planner and compiler pass for PyTorch.

Loads lazily: `import shardwright` imports neither torch nor any of the folders beside this one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a source checkout the sub-packages stand beside this folder rather than inside it (package-dir in pyproject.toml).
# Python started in the checkout's root finds this folder before any installed copy, so it must find the others too.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "plans" / "document.py").is_file():
    __path__.append(str(_CHECKOUT))

_EXPORTS = {
    "Cluster": ".profiler.hardware",
    "ExitCode": ".errors",
    "LossScaling": ".profiler.workload",
    "OptimizerSpec": ".profiler.workload",
    "Parallel": ".doors",
    "Plan": ".plans.document",
    "Precision": ".profiler.workload",
    "ShardwrightError": ".errors",
    "Workload": ".profiler.workload",
    "build": ".api",
    "check": ".checking",
    "check_sharding": ".ops.register",
    "compare": ".planner.report.diff",
    "explain": ".reasons",
    "join_torchrun": ".devices",
    "load_workload": ".api",
    "parallelize": ".doors",
    "plan": ".api",
    "register_sharding": ".ops.register",
    "why_not": ".reasons",
}

__all__ = [
    "Cluster",
    "ExitCode",
    "LossScaling",
    "OptimizerSpec",
    "Parallel",
    "Plan",
    "Precision",
    "ShardwrightError",
    "Workload",
    "__version__",
    "build",
    "check",
    "check_sharding",
    "compare",
    "explain",
    "join_torchrun",
    "load_workload",
    "parallelize",
    "plan",
    "register_sharding",
    "why_not",
]

if TYPE_CHECKING:
    from .api import build, load_workload, plan
    from .checking import check
    from .devices import join_torchrun
    from .doors import Parallel, parallelize
    from .errors import ExitCode, ShardwrightError
    from .ops.register import check_sharding, register_sharding
    from .planner.report.diff import compare
    from .plans.document import Plan
    from .profiler.hardware import Cluster
    from .profiler.workload import LossScaling, OptimizerSpec, Precision, Workload
    from .reasons import explain, why_not


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shardwright' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
