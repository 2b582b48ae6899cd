"""What this machine's CPU does, measured once and kept in a cache folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import ShardwrightError
from ..units import GB, GIB
from .cluster import Device, Figure, Link
from .files import replace_text

CALIBRATION_VERSION = 1
# Each measurement stops after this long; five of them, and gloo, stay under three seconds.
MEASURE_S = 0.25


@dataclass(frozen=True)
class CpuCalibration:
    """Of the whole machine, all cores at work. loopback: one of two processes that exchange at once, one direction."""

    version: int
    machine: str
    date: str
    num_cores: int
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: dict[str, float]  # dtype key -> FLOP/s of a large matrix product
    loopback_bytes_per_s: float
    loopback_latency_s: float

    def _figure(self, name: str, value: float) -> Figure:
        return Figure(f"CPU.{name}", value, "measured", f"calibrate_cpu on {self.machine}", self.date)

    def apply(self, device: Device, local: Link) -> tuple[Device, Link]:
        """The catalog's CPU and loopback with the measured figures in place."""
        peaks = dict(device.peaks) | self.flops_per_s
        figures = [self._figure(f"{dtype}_tflops", rate / 1e12) for dtype, rate in self.flops_per_s.items()]
        figures.append(self._figure("memory_gib", self.memory_bytes / GIB))
        figures.append(self._figure("memory_gb_per_s", self.memory_bytes_per_s / GB))
        link_figures = (
            self._figure("loopback_gb_per_s", self.loopback_bytes_per_s / GB),
            self._figure("loopback_latency_us", self.loopback_latency_s * 1e6),
        )
        measured = replace(
            device,
            memory_bytes=self.memory_bytes,
            nominal_memory_bytes=self.memory_bytes,
            memory_bytes_per_s=self.memory_bytes_per_s,
            peaks=tuple(peaks.items()),
            nvme_bytes=0,
            measured=True,
            figures=tuple(figures),
        )
        link = replace(
            local,
            bytes_per_s=self.loopback_bytes_per_s,
            latency_s=self.loopback_latency_s,
            measured=True,
            figures=link_figures,
        )
        return measured, link


def cache_folder() -> Path:
    """$SHARDWRIGHT_CACHE, else $XDG_CACHE_HOME/shardwright, else ~/.cache/shardwright."""
    if "SHARDWRIGHT_CACHE" in os.environ:
        return Path(os.environ["SHARDWRIGHT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright"


def calibration_path() -> Path:
    return cache_folder() / "cpu.json"


def machine_name() -> str:
    """Tells one machine from another, so that a home folder shared by many does not mix their figures."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else model
    return f"{platform.node()}, {num_cores()} cores, {model}"


def num_cores() -> int:
    """Cores that this process may use, as the scheduler's mask and a container's quota allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def threads_each(num_processes: int) -> int:
    """Of one of so many processes that share this machine: what OMP_NUM_THREADS says, else its share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else max(1, (os.cpu_count() or 1) // num_processes)


def host_memory_bytes() -> int:
    """Physical memory, or the container's limit where that is less."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            total = min(total or int(limit), int(limit))
    return total


def read_cpu_calibration() -> CpuCalibration | None:
    """The cached result of calibrate_cpu on this machine; None where there is none, or it is another machine's."""
    try:
        document = json.loads(calibration_path().read_text())
        found = CpuCalibration(**document)
    except (OSError, ValueError, TypeError):
        return None
    return found if found.version == CALIBRATION_VERSION and found.machine == machine_name() else None


def calibrate_cpu(*, refresh: bool = False) -> CpuCalibration:
    """Measure this machine (under 3 s), or return the cached result. Measures each time where there is no cache."""
    if not refresh and (cached := read_cpu_calibration()) is not None:
        return cached
    latency_s, bytes_per_s = _measure_gloo()
    result = CpuCalibration(
        version=CALIBRATION_VERSION,
        machine=machine_name(),
        date=datetime.date.today().isoformat(),
        num_cores=num_cores(),
        memory_bytes=host_memory_bytes(),
        memory_bytes_per_s=_measure_memory(),
        flops_per_s={name: _measure_matmul(name) for name in ("fp32", "fp64", "bf16")},
        loopback_bytes_per_s=bytes_per_s,
        loopback_latency_s=latency_s,
    )
    path = calibration_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(asdict(result), indent=1))
    return result


def _best_s(run: Callable[[], object]) -> float:
    """Shortest of the runs that fit MEASURE_S: noise only ever adds."""
    run()
    best, end = float("inf"), time.perf_counter() + MEASURE_S
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best


def _measure_matmul(dtype_name: str) -> float:
    """FLOP/s of an n x n product on all cores."""
    import torch

    n = 512
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}[dtype_name]
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    return 2 * n**3 / _best_s(lambda: torch.mm(a, b))


def _measure_memory() -> float:
    """Bytes/s read and written by an addition over 64 MiB operands, on all cores."""
    import torch

    a, b = torch.ones(1 << 24), torch.ones(1 << 24)
    out = torch.empty_like(a)
    return 3 * a.numel() * 4 / _best_s(lambda: torch.add(a, b, out=out))


def _measure_gloo() -> tuple[float, float]:
    """(seconds of a smallest message, bytes/s a direction) between two ends that exchange at once over loopback.

    An all-reduce between two ranks moves the tensor once each way, so bytes over seconds is one direction's rate. The
    two ends are threads of this process: gloo releases the interpreter lock, and no process has to be started.
    """
    import torch
    import torch.distributed as dist

    small, large = torch.zeros(1), torch.zeros(1 << 21)  # 4 B, 8 MiB
    seconds: dict[str, float] = {}

    def end(rank: int, folder: str) -> None:
        store = dist.FileStore(f"{folder}/store", 2)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = datetime.timedelta(seconds=10)
        group = dist.ProcessGroupGloo(store, rank, 2, options)
        for name, tensor, repeats in (("latency", small, 30), ("rate", large, 6)):
            mine = tensor.clone()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                group.allreduce([mine]).wait()  # type: ignore[attr-defined]
                times.append(time.perf_counter() - start)
            if rank == 0:
                seconds[name] = sorted(times)[len(times) // 2]

    with tempfile.TemporaryDirectory() as folder:
        threads = [threading.Thread(target=end, args=(rank, folder), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=15)
    if "rate" not in seconds:
        raise ShardwrightError(
            "gloo did not exchange a message over loopback within 15 s",
            means="processes of this machine cannot reach each other at 127.0.0.1",
            change="the firewall or network namespace",
            works="shardwright plan ... --hardware 4xCPU, which plans with nominal figures",
        )
    return seconds["latency"], large.numel() * 4 / max(seconds["rate"] - seconds["latency"], 1e-9)
