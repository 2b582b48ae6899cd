"""Measures the job at hand, op by op and link by link: what `shardwright profile` does in each of its processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from .errors import ExitCode, ShardwrightError
from .measuring_links import measure_links, ranks_by_host
from .profiler.cpu_calibration import host_memory_bytes, machine_name, threads_each
from .profiler.discovery import accelerator_key
from .profiler.measured_hardware import Profile
from .profiler.measurements import Case, Measurements, Row, Where, cpus_here, here, rates_of
from .profiler.measuring import DTYPES, Together, all_series, measure
from .runtime.together import num_ranks, of_all_ranks, on_rank_0
from .units import GIB

Tell = Callable[[Row, int, int], None]


def _where(device: torch.device) -> Where:
    if device.type == "cuda":
        return here(torch.cuda.get_device_name(device), 1)
    processes = of_all_ranks(machine_name()).count(machine_name())
    torch.set_num_threads(threads_each(processes))
    return cpus_here(processes)


def _refuse_unlike(device: torch.device, by_host: Sequence[Sequence[int]]) -> None:
    """Hosts of one file are alike: what is measured is the mean over all."""
    own = machine_name().partition(", ")[2] if device.type == "cpu" else torch.cuda.get_device_name(device)
    kinds = sorted(set(of_all_ranks(own)))
    counts = sorted({len(ranks) for ranks in by_host})
    if len(kinds) > 1 or len(counts) > 1:
        what = " and ".join(kinds) if len(kinds) > 1 else f"{' and '.join(map(str, counts))} processes a host"
        raise ShardwrightError(
            f"the hosts of this job are unlike: {what}",
            means="one figure for all of them would be that of none",
            change="the hosts of the job, or the processes on each",
            works="one run for each kind of host, and a hardware file with the [[hosts]] of all",
            exit_code=ExitCode.USAGE,
        )


def profile(
    device: torch.device,
    dtypes: Sequence[str],
    *,
    ops: Sequence[str] = (),
    cache: Path | None = None,
    refresh: bool = False,
    links: bool = True,
    tell: Tell = lambda *_: None,
) -> Profile:
    """Every process of the job calls it, rank 0 keeps and tells. ops: to measure; none: all. cache: of measurements;
    None: the user's.

    Raises ShardwrightError for an unknown dtype or op, and where no cache can be written.
    """
    _refuse_unknown("--dtypes", dtypes, list(DTYPES))
    series = all_series(device, dtypes)
    _refuse_unknown("--ops", ops, list(dict.fromkeys(one.op for one in series)))
    series = [one for one in series if not ops or one.op in ops]
    by_host = ranks_by_host(_host_name())
    _refuse_unlike(device, by_host)
    where, several = _where(device), num_ranks() > 1
    together = Together(dist.barrier, _mean) if several else Together()
    if not several or dist.get_rank() == 0:
        with Measurements(where, cache) as kept:
            before = on_rank_0(lambda: _known(kept, dtypes, ops, refresh))
            rows = measure(series, device, kept, before, tell, together)
    else:
        before = on_rank_0(dict)
        rows = measure(series, device, None, before, lambda *_: None, together)
    found = measure_links(by_host, device) if links and several else []
    return Profile(
        where,
        f"{len(by_host[0])}x{accelerator_key(device)}",
        len(by_host),
        rates_of(list({**before, **{row.case: row for row in rows}}.values())),
        found,
        (host_memory_bytes() / where.processes if device.type == "cpu" else _free_bytes(device)) / GIB,
        {f"{row.case.op} {row.case.dtype} {row.case.size}": row.error for row in rows if row.seconds is None},
        sum(row.case not in before for row in rows),
    )


def _known(kept: Measurements, dtypes: Sequence[str], ops: Sequence[str], refresh: bool) -> dict[Case, Row]:
    if refresh:
        kept.forget(dtypes, ops)
    return kept.rows()


def _mean(number: float) -> float:
    return sum(of_all_ranks(number)) / num_ranks()


def _refuse_unknown(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ShardwrightError(
                f"{option} {name}",
                means=f"known: {', '.join(known)}",
                change=option,
                works=f"{option} {','.join(known[:2])}",
                exit_code=ExitCode.USAGE,
            )


def _host_name() -> str:
    """Processes with their own network stand for hosts of their own."""
    namespace = ""
    if os.path.exists("/proc/self/ns/net"):
        namespace = os.readlink("/proc/self/ns/net")
    return f"{socket.gethostname()} {namespace} {os.environ.get('GROUP_RANK', '')}"


def _free_bytes(device: torch.device) -> float:
    return float(torch.cuda.mem_get_info(device)[1])
