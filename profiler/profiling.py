"""Measures the job at hand, op by op and link by link, and writes it as a hardware file (docs/profile.md)."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ExitCode, ShardwrightError
from ..units import GB, GIB
from .cpu_calibration import host_memory_bytes, machine_name, threads_each
from .discovery import accelerator_key
from .files import replace_text
from .measured_rates import MeasuredRates
from .measurements import Case, Measurements, Row, Where, cpus_here, here, rates_of
from .measuring import DTYPES, Together, all_series, measure
from .measuring_links import MeasuredLink, measure_links, ranks_by_host

UNEVEN = 1.15  # times slower or quicker than the median of all: the pair is written out
Tell = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Profile:
    """devices: as a hardware file names those of one host. failed: ops that no figure was had of, with the reason."""

    where: Where
    devices: str
    num_hosts: int
    rates: MeasuredRates
    links: list[MeasuredLink]
    memory_gib: float
    failed: dict[str, str]
    num_new: int

    def link_between_hosts(self) -> MeasuredLink | None:
        """The median of all pairs of hosts."""
        return _median([link for link in self.links if link.hosts[0] != link.hosts[1]])

    def link_inside(self) -> MeasuredLink | None:
        return _median([link for link in self.links if link.hosts[0] == link.hosts[1]])

    def uneven_pairs(self) -> list[MeasuredLink]:
        usual = self.link_between_hosts()
        pairs = [link for link in self.links if link.hosts[0] != link.hosts[1]]
        if usual is None:
            return []
        return [link for link in pairs if not 1 / UNEVEN <= link.bytes_per_s / usual.bytes_per_s <= UNEVEN]


def _median(links: Sequence[MeasuredLink]) -> MeasuredLink | None:
    if not links:
        return None
    return MeasuredLink(
        links[0].hosts,
        statistics.median(link.latency_s for link in links),
        statistics.median_low(link.bytes_per_s for link in links),
    )


def _where(device: torch.device, alone: bool) -> Where:
    if device.type == "cuda":
        return here(torch.cuda.get_device_name(device), 1)
    processes = _gathered(machine_name(), alone).count(machine_name())
    torch.set_num_threads(threads_each(processes))
    return cpus_here(processes)


def _gathered(value: str, alone: bool) -> list[str]:
    """Of all processes."""
    found: list[Any] = [value]
    if not alone:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def _refuse_unlike(device: torch.device, by_host: Sequence[Sequence[int]], alone: bool) -> None:
    """Hosts of one file are alike: what is measured is the mean over all."""
    own = machine_name().partition(", ")[2] if device.type == "cpu" else torch.cuda.get_device_name(device)
    kinds = sorted(set(_gathered(own, alone)))
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
    alone = not (dist.is_available() and dist.is_initialized())
    by_host = [[0]] if alone else ranks_by_host(_host_name())
    _refuse_unlike(device, by_host, alone)
    where, first = _where(device, alone), alone or dist.get_rank() == 0
    if first:
        with Measurements(where, cache) as kept:
            if refresh:
                kept.forget(dtypes, ops)
            before = kept.rows()
            _shared(before, alone)
            rows = measure(series, device, kept, before, tell, _together(alone))
    else:
        before = _shared({}, alone)
        rows = measure(series, device, None, before, lambda *_: None, _together(alone))
    found = measure_links(by_host, device) if links and not alone else []
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


def _shared(rows: dict[Case, Row], alone: bool) -> dict[Case, Row]:
    """What rank 0 knows, on every rank."""
    if alone:
        return rows
    held: list[Any] = [rows]
    dist.broadcast_object_list(held, src=0)
    return dict(held[0])


def _together(alone: bool) -> Together:
    if alone:
        return Together()

    def mean(number: float) -> float:
        found: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(found, number)
        return sum(found) / len(found)

    return Together(dist.barrier, mean)


def write_hardware(made: Profile, path: Path) -> None:
    """As a file that --hardware takes. Raises ShardwrightError where it cannot be written."""
    today, source = datetime.date.today().isoformat(), f"shardwright profile on {made.where.device}"
    lines = [f"# {source}, {made.where.versions}, {today}, {platform.system()}", f"name = {_text(path.stem)}", ""]
    lines += ["[[hosts]]", f'devices = "{made.devices}"', f"count = {made.num_hosts}"]
    lines.append(f"memory_gib = {made.memory_gib:.3f}")
    for key, link in (("local_link", made.link_inside()), ("network_link", made.link_between_hosts())):
        if link is not None:
            lines.append(f"{key} = {{ {_figures(link)}, source = {_text(source)}, date = {_text(today)} }}")
    for table in made.rates.tables():
        lines += ["", "[[hosts.rates]]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    for link in made.uneven_pairs():
        lines += ["", "[[links]]", f"hosts = {list(link.hosts)}", *_figures(link).split(", ")]
    try:
        replace_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise ShardwrightError(
            f"cannot write {path}: {error.strerror}",
            means="what was measured is kept in the cache, and the next run writes it without measuring again",
            change="-o",
            works="a folder that you may write to",
        ) from None


def _figures(link: MeasuredLink) -> str:
    return f"gb_per_s = {link.bytes_per_s / GB:.6g}, latency_us = {max(link.latency_s * 1e6, 0.01):.4g}"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{number:.6g}" for number in value) + "]"
    return _text(str(value))


def as_document(made: Profile) -> Mapping[str, Any]:
    """For --json."""
    return {
        "device": made.where.device,
        "versions": made.where.versions,
        "processes": made.where.processes,
        "hosts": made.num_hosts,
        "measured": made.num_new,
        "failed": made.failed,
        "rates": made.rates.tables(),
        "links": [
            {"hosts": list(link.hosts), "gb_per_s": link.bytes_per_s / GB, "latency_us": link.latency_s * 1e6}
            for link in made.links
        ],
    }
