"""Whose code a plan may make this user run.

A plan can name a model that Python builds (package.module:factory); to run or explain it means to import that module
and to call that function. That is done where this user's own command line or script made the plan, which leaves its
seal in the cache folder, or where it is confirmed (--trust-model, trust_model=True). Whatever builds a plan's model,
command or Python function, asks workload_of for it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ExitCode, ShardwrightError
from .plans.document import Plan
from .profiler.cpu_calibration import cache_folder
from .profiler.files import replace_text

if TYPE_CHECKING:
    from .profiler.workload import Workload

BUILT_HERE = ("preset:", "hf:", "diffusers:")
_SEAL = re.compile(r"[0-9a-f]{16}")


def imports(plan: Plan) -> str:
    """What of the user's Python the plan's model needs, as MODULE:FUNCTION; '' where Shardwright builds it itself."""
    model = str(plan.workload.get("model", ""))
    return "" if model.startswith(BUILT_HERE) or ":" not in model else model


def remember(plan: Plan) -> None:
    """Note that this user made the plan. A cache folder that cannot be written to means only that it is asked later."""
    if not imports(plan):
        return
    try:
        path = _record(plan.seal)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "")
    except OSError:
        pass


def workload_of(plan: Plan, trusted: bool) -> Workload:
    """The training job that the plan describes, built anew. Raises ShardwrightError, exit code 7, as require does."""
    from .profiler.models import reload_workload

    require(plan, trusted, "trust_model=True")
    return reload_workload(plan.workload)


def require(plan: Plan, trusted: bool, option: str = "--trust-model") -> None:
    """Raises ShardwrightError, exit code 7, where the plan would import code that this user has not chosen, or where
    its model was made in Python, so that nothing says how."""
    if not (plan.workload.get("model") and plan.workload.get("kind")):
        raise ShardwrightError(
            f"the plan's model, {plan.workload.get('model')!r}, was made in Python; only its maker can build it",
            means="the plan does not say how",
            change="name a factory on the command line, or start your own script with torchrun",
            works="shardwright plan package.module:factory, or shardwright.build(Plan.load('plan.json'), workload)",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    named = imports(plan)
    if not named or trusted or _record(plan.seal).is_file():
        return
    raise ShardwrightError(
        f"the plan would import and call {named}",
        means="this user did not make the plan here, and whoever wrote it chose that code; nothing was imported",
        change=f"look at {named.rpartition(':')[0]}, then give {option}; or make the plan yourself",
        works=option,
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def _record(seal: str) -> Path:
    assert _SEAL.fullmatch(seal), seal
    return cache_folder() / "plans" / seal
