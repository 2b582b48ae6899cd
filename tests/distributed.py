"""Worker processes for tests with several ranks, started once and used again.

    results = run_ranks(4, function, argument, ...)    # function(rank, *arguments) on 4 processes; results by rank

Each call makes a fresh gloo process group of the size asked for (over the loopback interface) and destroys it
afterwards, so that tests share processes but no state of torch.distributed. Function and arguments travel by pickle:
the function must stand at the top level of a test module. A rank that fails ends the call: RankFailed carries its
traceback, and ranks that still wait in a collective are replaced.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

GRACE_S = 2.0  # how long the other ranks may still take once one has failed


class RankFailed(RuntimeError):
    """At least one rank raised, died or ran out of time. failures: rank -> traceback."""

    def __init__(self, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__("\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items())))


def _worker(connection: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            reply = (True, _run_one(message))
            data = pickle.dumps(reply)
        except BaseException:
            data = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(data)


def _run_one(message: bytes) -> Any:
    import torch.distributed as dist

    rank, size, path, search_path, payload = pickle.loads(message)
    for folder in search_path:
        if folder not in sys.path:
            sys.path.append(folder)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        function, arguments, keywords = pickle.loads(payload)
        return function(rank, *arguments, **keywords)
    finally:
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """DTensor caches by the value of a mesh: an equal one of the next call would find this one's dead groups there."""
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()


class _Worker:
    def __init__(self, context: Any) -> None:
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_worker, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def stop(self, patience_s: float = 0.0) -> None:
        """An idle worker ends when its connection closes; one that hangs is killed."""
        self.connection.close()
        self.process.join(patience_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


def collect(
    connections: list[Any], processes: list[Any], timeout_s: float
) -> tuple[dict[int, Any], dict[int, str], set[int]]:
    """(results, failures, ranks that were still running when time was up) of ranks that each send (good, value)."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    deadline = time.monotonic() + timeout_s
    while waiting and time.monotonic() < deadline:
        for ready in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            rank = waiting.pop(ready)
            try:
                good, value = pickle.loads(ready.recv_bytes())
            except (EOFError, OSError):
                processes[rank].join(1)
                good, value = False, f"died with exit code {processes[rank].exitcode}"
            (results if good else failures)[rank] = value
            if not good:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank in waiting.values():
        failures.setdefault(rank, f"still running when time was up ({timeout_s} s, or {GRACE_S} s after a failure)")
    return results, failures, set(waiting.values())


class Pool:
    """Processes are forked from a server that has imported torch once, so that each starts in milliseconds."""

    def __init__(self) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self.context = multiprocessing.get_context(method)
        if method == "forkserver":
            self.context.set_forkserver_preload(["shardwright.runtime.program", "torch.distributed.tensor"])
        self.workers: list[_Worker] = []

    def run(self, size: int, payload: bytes, timeout_s: float) -> list[Any]:
        while len(self.workers) < size:
            self.workers.append(_Worker(self.context))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "store")
            for rank in range(size):
                self.workers[rank].connection.send_bytes(pickle.dumps((rank, size, path, sys.path, payload)))
            return self._collect(size, timeout_s)

    def _collect(self, size: int, timeout_s: float) -> list[Any]:
        mine = self.workers[:size]
        results, failures, left = collect(
            [worker.connection for worker in mine], [worker.process for worker in mine], timeout_s
        )
        if failures:
            # A worker that died or hangs is replaced in its place: a process always has the same rank, because DTensor
            # caches coordinates by the value of the mesh.
            for rank, worker in enumerate(self.workers):
                if rank in left or not worker.process.is_alive():
                    worker.stop()
                    self.workers[rank] = _Worker(self.context)
            raise RankFailed(failures)
        return [results[rank] for rank in range(size)]

    def close(self) -> None:
        for worker in self.workers:
            worker.stop(patience_s=5.0)
        self.workers = []


_pool: Pool | None = None


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0, **keywords: Any
) -> list[Any]:
    """function(rank, *arguments, **keywords) on `size` processes with a gloo process group; results by rank."""
    global _pool
    if _pool is None:
        _pool = Pool()
        atexit.register(_pool.close)
    return _pool.run(size, pickle.dumps((function, arguments, keywords)), timeout_s)
