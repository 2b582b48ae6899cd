"""What ranks do together: the result of one is everyone's, and so is a failure, so that none waits for one that failed.

Every rank calls these, in the same order. What travels does so by pickle. Without a process group they are plain calls;
what the system refuses is an error in four parts there too.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import ExitCode, ShardwrightError
from ..profiler.where import users_frame

_PARTS = ("what", "means", "change", "works", "exit_code")
_T = TypeVar("_T")


def num_ranks() -> int:
    return dist.get_world_size() if _are_several() else 1


def host_group() -> Any:
    """A process group for tensors in host memory, by which ranks agree on what Python decides without waiting for a
    device; None where there is one rank. Every rank calls it."""
    if num_ranks() == 1:
        return None
    backends = dict(part.split(":", 1) for part in dist.get_backend_config().split(",") if ":" in part)
    return dist.group.WORLD if backends.get("cpu") else dist.new_group(backend="gloo")


def of_all_ranks(own: Any) -> list[Any]:
    """What each rank gave, by rank."""
    if not _are_several():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def on_rank_0(make: Callable[[], _T]) -> _T:
    """What rank 0 makes, on every rank.

    Raises ShardwrightError on all ranks where rank 0 fails, whatever it failed with.
    """
    if not _are_several():
        return _alone(make)
    made, cause = _tried(make) if dist.get_rank() == 0 else (None, None)
    box: list[Any] = [made, None if cause is None else _parts_of(cause)]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise _again(box[1], cause) from cause
    return box[0]  # type: ignore[no-any-return]


def on_every_rank(make: Callable[[], _T], *, others: str = "") -> _T:
    """This rank's own result, where every rank has one.

    Raises ShardwrightError on all ranks where any fails, whatever it failed with: its own on those that failed, the
    first one's on the others, behind what `others` says.
    """
    if not _are_several():
        return _alone(make)
    made, cause = _tried(make)
    failed = [parts for parts in of_all_ranks(None if cause is None else _parts_of(cause)) if parts is not None]
    if failed:
        elsewhere = {**failed[0], "what": others + failed[0]["what"]}
        raise _again(elsewhere if cause is None else _parts_of(cause), cause) from cause
    return made  # type: ignore[return-value]


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _alone(make: Callable[[], _T]) -> _T:
    try:
        return make()
    except OSError as error:
        raise _told(error) from error


def _tried(make: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    try:
        return make(), None
    except Exception as error:  # raised again, on every rank
        return None, error


def _again(parts: dict[str, Any], cause: Exception | None) -> ShardwrightError:
    if isinstance(cause, ShardwrightError):
        return cause
    return ShardwrightError(parts["what"], **{name: parts[name] for name in _PARTS[1:]})


def _parts_of(error: Exception) -> dict[str, Any]:
    told = error if isinstance(error, ShardwrightError) else _told(error)
    return {name: getattr(told, name) for name in _PARTS}


def _told(error: Exception) -> ShardwrightError:
    several = _are_several()
    where = f"rank {dist.get_rank()}" if several else "this process"
    if isinstance(error, OSError) and error.filename:
        return ShardwrightError(
            f"cannot use {error.filename}: {error.strerror}",
            means=f"{where} needs it, and no rank goes on alone" if several else f"{where} needs it",
            change="the path, or its permissions",
            works="a path that this user may read, and write where something is saved",
        )
    frame = users_frame(traceback.extract_tb(error.__traceback__))
    reason = (str(error).strip().splitlines() or [""])[0][:300]
    return ShardwrightError(
        f"{where} failed at {frame.filename}:{frame.lineno}: {type(error).__name__}: {reason}",
        means="the ranks do this together, so none can go on" if several else "it cannot go on without it",
        change=f"that line: {frame.line or frame.name}",
        works="code that runs in one process without an error",
        exit_code=ExitCode.INTERNAL,
    )
