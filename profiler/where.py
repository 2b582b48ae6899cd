"""Where in the user's code something is: a definition, or the line that is running."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OURS = Path(__file__).parents[1]  # this package (or checkout)
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_TESTED = ("tests", "examples", "benchmarks")  # beside it in a checkout, and the user's as far as errors go


def is_ours(path: Path) -> bool:
    return path.is_relative_to(_OURS) and path.relative_to(_OURS).parts[0] not in (*_TESTED, ".venv")


def is_users_line(line: str) -> bool:
    """Of 'file:line', or '' where a trace knows none."""
    return bool(line) and not is_ours(Path(line.rpartition(":")[0]))


@functools.lru_cache(maxsize=4096)
def is_users_file(name: str) -> bool:
    """Of no library and not of this package."""
    is_librarys = "/torch/" in name or "site-packages" in name or name.startswith(("<", _STDLIB))
    return not is_librarys and not is_ours(Path(name))


def users_frame(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary:
    """The innermost of these that is the user's; of a library's where none is, and the innermost of all else."""
    outside = [f for f in frames if "/torch/" not in f.filename and not is_ours(Path(f.filename))]
    own = [f for f in outside if is_users_file(f.filename)]
    return (own or outside or frames)[-1]


def users_line() -> str:
    """'file:line' of the user's code that is running."""
    frame = users_frame(
        traceback.StackSummary.extract(traceback.walk_stack(sys._getframe(1)), lookup_lines=False)[::-1]
    )
    return f"{frame.filename}:{frame.lineno}"


def place_of(thing: Any) -> str:
    """'file:line' where a class, a function or what wraps one is defined."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = inspect.unwrap(thing) if callable(thing) else thing
    thing = getattr(thing, "__func__", thing)
    if not inspect.isclass(thing) and not hasattr(thing, "__code__"):
        thing = type(thing)
    code = getattr(thing, "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}"
    try:
        forward = getattr(thing, "forward", None) or thing
        file = inspect.getsourcefile(thing) or "an unknown file"
        line = getattr(getattr(forward, "__code__", None), "co_firstlineno", None)
        return f"{file}:{line}" if line else file
    except TypeError:
        return "an unknown place"


def name_of(thing: Any) -> str:
    while isinstance(thing, functools.partial):
        thing = thing.func
    return getattr(thing, "__qualname__", type(thing).__qualname__)
