"""Start worker processes on this machine with torchrun's launcher, follow what they report, and say who died of what.

Only the loopback interface is used: ranks meet through a file, and gloo and NCCL are bound to it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import ExitCode, ShardwrightError

LAST_LINES = 20
POLL_S = 0.1
Event = dict[str, Any]


def launch(
    task: Mapping[str, Any], num_processes: int, on_event: Callable[[Event], None], *, debug: bool = False
) -> None:
    """Run shardwright/worker.py on num_processes local processes; on_event gets what rank 0 reports, in order.

    task: what to do, as JSON; see worker.py. Raises the ShardwrightError that a worker raised, or one with the last
    lines of the rank that died first; the other ranks are ended, not waited for.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="shardwright-") as folder_name:
        folder = Path(folder_name)
        (folder / "logs").mkdir()
        (folder / "events").touch()
        (folder / "task.json").write_text(json.dumps({**task, "folder": folder_name, "debug": debug}))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(folder / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            max_restarts=0,
            monitor_interval=POLL_S,
            local_addr="127.0.0.1",
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
        )
        start = elastic_launch(config, entrypoint=sys.executable)
        with _environment(num_processes), _following(folder / "events", on_event):
            try:
                start("-u", "-m", "shardwright.worker", str(folder / "task.json"))
            except ChildFailedError as error:
                raise _root_cause(folder, num_processes, {r: f.exitcode for r, f in error.failures.items()}) from None
            except SignalException:
                raise KeyboardInterrupt from None


@contextmanager
def _environment(num_processes: int) -> Iterator[None]:
    """What the workers inherit. They share this machine's cores and talk over the loopback interface only."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    ours = {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes))),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "PYTHONUNBUFFERED": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # the launcher's own would listen on every interface
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _following(path: Path, on_event: Callable[[Event], None]) -> Iterator[None]:
    """Call on_event for each line that is added to the file, until the block ends; then for what is left."""
    ended = threading.Event()

    def follow() -> None:
        rest = ""
        with path.open() as file:
            while True:
                last_round = ended.is_set()
                *lines, rest = (rest + file.read()).split("\n")
                for line in lines:
                    on_event(json.loads(line))
                if last_round:
                    return
                ended.wait(POLL_S)

    thread = threading.Thread(target=follow, name="shardwright-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=10)


def _root_cause(folder: Path, num_processes: int, exit_codes: Mapping[int, int]) -> ShardwrightError:
    """The error of the rank that began it. One that left without a word comes first: its death made others raise."""
    records = {
        rank: json.loads(path.read_text())
        for rank in range(num_processes)
        if (path := folder / f"error-{rank}.json").is_file()
    }
    silent = [rank for rank in sorted(exit_codes) if rank not in records and exit_codes[rank] != -signal.SIGTERM]
    if not silent:
        users = [record for record in records.values() if "what" in record]
        if users:
            first = min(users, key=lambda record: record["time"])
            return ShardwrightError(
                first["what"],
                means=first["means"],
                change=first["change"],
                works=first["works"],
                exit_code=ExitCode(first["exit_code"]),
            )
    rank = silent[0] if silent else min(records, key=lambda r: records[r]["time"], default=min(exit_codes))
    lines = _last_lines(folder, rank)
    tail = "".join(f"\n  {line}" for line in lines) if lines else " it printed nothing"
    return ShardwrightError(
        f"rank {rank} of {num_processes} ended with {_how(exit_codes.get(rank, 1))}",
        means=f"the step cannot go on without it; the other ranks were ended. Its last lines:{tail}",
        change="what the lines above complain of; --debug shows more",
        exit_code=ExitCode.INTERNAL,
    )


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"signal {name}{hint}"


def _last_lines(folder: Path, rank: int) -> list[str]:
    lines: list[str] = []
    for name in ("stdout.log", "stderr.log"):
        for path in folder.glob(f"logs/*/*/{rank}/{name}"):
            lines += path.read_text(errors="replace").splitlines()
    return [line for line in lines if line.strip()][-LAST_LINES:]
