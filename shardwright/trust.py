"""Whose code a plan may make this user run.

A plan can name a model that Python builds (package.module:factory); to run or explain it means to import that module
and to call that function. That is done where this user's own command line or script made the plan, which leaves its
seal in the cache folder, or where it is confirmed (--trust-model).
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from .errors import ExitCode, ShardwrightError
from .planner.plan import Plan
from .profiler.discovery import cache_folder

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
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        os.close(handle)
        os.replace(temporary, path)
    except OSError:
        pass


def require(plan: Plan, trusted: bool, option: str = "--trust-model") -> None:
    """Raises ShardwrightError, exit code 7, where the plan would import code that this user has not chosen."""
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
