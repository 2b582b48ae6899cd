"""Ranks forked from the test process, for one call.

    results = fork_ranks(4, function, argument, ...)    # as run_ranks of distributed.py

A forked rank has what the test process has: its imports, and the models that it captured (compared.py), so that a call
costs little more than what the ranks themselves do. Each call makes a fresh gloo process group of the size asked for
(over the loopback interface), and its processes end with it. Where there is no fork, ranks are spawned: there the
function must stand at the top level of a test module. A rank that fails ends the call, RankFailed with its traceback;
ranks that still wait in a collective are killed.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from distributed import GRACE_S, RankFailed, collect, forget_meshes

_CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _rank(connection: Any, rank: int, size: int, path: str, search_path: list[str], call: Any) -> None:
    gc.freeze()  # what came with the fork is the test process's to collect
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.path.extend(folder for folder in search_path if folder not in sys.path)
    try:
        data = pickle.dumps((True, _run_in_group(rank, size, path, call)))
    except BaseException:
        data = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(data)


def _run_in_group(rank: int, size: int, path: str, call: Any) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    forget_meshes()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        function, arguments, keywords = call
        return function(rank, *arguments, **keywords)
    finally:
        dist.destroy_process_group()


def fork_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0, **keywords: Any
) -> list[Any]:
    """function(rank, *arguments, **keywords) on `size` processes with a gloo process group; results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        call = (function, arguments, keywords)
        shared = (size, os.path.join(folder, "store"), sys.path, call)
        connections, ranks = [], []
        try:
            for rank in range(size):
                receives, sends = _CONTEXT.Pipe(duplex=False)
                ranks.append(_CONTEXT.Process(target=_rank, args=(sends, rank, *shared), daemon=True))
                connections.append(receives)
                ranks[-1].start()
                sends.close()  # here and so in the ranks that follow: else nobody would see this one die
            return _collect(connections, ranks, timeout_s)
        finally:
            _end(ranks)


def _collect(connections: list[Any], ranks: list[Any], timeout_s: float) -> list[Any]:
    results, failures, left = collect(connections, ranks, timeout_s)
    if failures:
        for rank in left:
            ranks[rank].kill()
        raise RankFailed(failures)
    return [results[rank] for rank in range(len(ranks))]


def _end(ranks: list[Any]) -> None:
    """Those that have sent their result end by themselves, unless something holds them."""
    for process in ranks:
        if process.pid is not None:
            process.join(GRACE_S)
            if process.is_alive():
                process.kill()
                process.join(5)
