"""Annealing, justification and list scheduling in C: annealing.c, justify.c, listing.c, compiled when first needed.

As torch.compile does with its kernels, the machine's own C compiler is called (CC, cc, gcc or clang) and the result
kept in a cache folder. Where there is no compiler the same searches run in Python, some hundred times slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SOURCES = ("annealing.c", "justify.c", "listing.c", "ends.h", "pipeline.h")
# without fused multiply-adds times add up as they do in Python
FLAGS = ("-O2", "-std=c99", "-shared", "-fPIC", "-ffp-contract=off")
COMPILE_TIMEOUT_S = 60
NEVER = 1e300
_INTS, _DOUBLES = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_double)
_COUNTS = ("num_nodes", "num_ranks", "num_microbatches")
_ARRAYS = {"seconds": _DOUBLES, "lag": _DOUBLES, "change": _DOUBLES, "limit": _DOUBLES} | dict.fromkeys(
    ("rank", "before", "own", "after", "offset", "frozen", "row"), _INTS
)


class Pipeline(ctypes.Structure):
    """The struct of pipeline.h; keeps the arrays that it points to alive. `row` is written to."""

    _fields_ = (*((name, ctypes.c_int) for name in _COUNTS), *_ARRAYS.items())

    def __init__(self, num_nodes: int, num_ranks: int, num_microbatches: int, **arrays: Any) -> None:
        super().__init__(num_nodes, num_ranks, num_microbatches)
        self.arrays = {}
        for name, kind in _ARRAYS.items():
            dtype = np.float64 if kind is _DOUBLES else np.int32
            self.arrays[name] = np.ascontiguousarray(arrays[name], dtype=dtype)
            setattr(self, name, self.arrays[name].ctypes.data_as(kind))

    def order(self) -> list[np.ndarray]:
        """The row, rank by rank."""
        return np.split(self.arrays["row"], self.arrays["offset"][1:-1])


class Settings(ctypes.Structure):
    """The struct of annealing.c."""

    _fields_ = (
        ("hottest_s", ctypes.c_double),
        ("coldest_s", ctypes.c_double),
        ("bound_s", ctypes.c_double),
        ("time_limit_s", ctypes.c_double),
        ("repeated", ctypes.c_double),
        ("seed", ctypes.c_uint64),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where it cannot be compiled or loaded."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    loaded.anneal.restype = loaded.justify.restype = loaded.list_schedule.restype = ctypes.c_double
    loaded.justify.argtypes = [ctypes.POINTER(Pipeline), ctypes.c_double]
    loaded.anneal.argtypes = [ctypes.POINTER(Pipeline), ctypes.POINTER(Settings)]
    number, whole = ctypes.c_double, ctypes.c_int
    loaded.list_schedule.argtypes = [ctypes.POINTER(Pipeline), _DOUBLES, number, whole, number, number]
    return loaded


def _compiled() -> Path:
    """Path of the shared library, compiled where the cache does not have it. Raises OSError or SubprocessError."""
    sources = [Path(__file__).with_name(name) for name in SOURCES]
    content = b"".join(path.read_bytes() for path in sources) + " ".join((*FLAGS, platform.platform())).encode()
    name = f"schedules-{hashlib.sha256(content).hexdigest()[:16]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright"
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # the latter: a user without a home
        folder, writable = Path(tempfile.gettempdir()), False
    if (folder / name).is_file() and writable:
        return folder / name
    if not writable:
        folder = Path(tempfile.mkdtemp(prefix="shardwright-"))
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise OSError("no C compiler")
    handle, partial = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    command = [compiler, *FLAGS, *(str(path) for path in sources if path.suffix == ".c"), "-o", partial, "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
        os.replace(partial, folder / name)
    finally:
        Path(partial).unlink(missing_ok=True)
    return folder / name


def anneal(pipeline: Pipeline, settings: Settings) -> float | None:
    """Makespan of the best order, left in the row; infinite where the given one cannot finish. None: no library."""
    loaded = library()
    return None if loaded is None else _checked(loaded.anneal(ctypes.byref(pipeline), ctypes.byref(settings)))


def evaluate(pipeline: Pipeline) -> float | None:
    """The same without a search."""
    return anneal(pipeline, Settings(1.0, 1.0, 0.0, 0.0, 0.0, 0))


def justify(pipeline: Pipeline, time_limit_s: float) -> float | None:
    """Makespan of the justified order, left in the row; infinite where the given one cannot finish."""
    loaded = library()
    return None if loaded is None else _checked(loaded.justify(ctypes.byref(pipeline), time_limit_s))


def list_schedule(
    pipeline: Pipeline, target: np.ndarray, patience: float, in_order: bool, thrift_s: float, give_up_s: float
) -> float | None:
    """Makespan of the list, left in the row; infinite where there is none. None: no library."""
    loaded = library()
    if loaded is None:
        return None
    values = np.ascontiguousarray(target, dtype=np.float64)
    at_most = min(give_up_s, NEVER)
    return _checked(
        loaded.list_schedule(
            ctypes.byref(pipeline), values.ctypes.data_as(_DOUBLES), patience, int(in_order), thrift_s, at_most
        )
    )


def _checked(makespan_s: float) -> float:
    if makespan_s < 0.0:
        raise MemoryError("no memory for the order of a schedule")
    return makespan_s if makespan_s < NEVER else float("inf")
