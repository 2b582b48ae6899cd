"""The independent judge of schedules, a module outside the project."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def load_judge(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("schedule_judge", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def shared_judge() -> ModuleType | None:
    """None where its folder is not there (SHARDWRIGHT_SHARED, or beside the checkout)."""
    shared = Path(os.environ.get("SHARDWRIGHT_SHARED", Path(__file__).parents[1] / ".." / "shared"))
    path = shared / "schedules" / "judge.py"
    return load_judge(path) if path.is_file() else None
