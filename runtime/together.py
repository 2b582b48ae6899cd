"""What one rank makes for all: its result, or its error, is everyone's, so that none waits for one that failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..errors import ExitCode, ShardwrightError
from ..profiler.where import users_frame

_PARTS = ("what", "means", "change", "works", "exit_code")


def on_rank_0(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank, each of which must call it. It travels by pickle.

    Raises ShardwrightError on all ranks where rank 0 fails, whatever it failed with. Without a process group, make()
    is called as it is.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    box: list[Any] = [None, None]
    cause: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:  # raised again below, on every rank
            cause, told = error, error if isinstance(error, ShardwrightError) else _told(error)
            box[1] = {name: getattr(told, name) for name in _PARTS}
    dist.broadcast_object_list(box, src=0)
    if isinstance(cause, ShardwrightError):
        raise cause
    if box[1] is not None:
        raise ShardwrightError(box[1].pop("what"), **box[1]) from cause
    return box[0]


def _told(error: Exception) -> ShardwrightError:
    frame = users_frame(traceback.extract_tb(error.__traceback__))
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return ShardwrightError(
        f"rank 0 failed at {frame.filename}:{frame.lineno}: {type(error).__name__}: {reason}",
        means="rank 0 makes this for all ranks, so none can go on",
        change=f"that line: {frame.line or frame.name}",
        works="code that runs in one process without an error",
        exit_code=ExitCode.INTERNAL,
    )
