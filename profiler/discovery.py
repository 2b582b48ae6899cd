"""`local`: what is on this machine, or in this torchrun job. The only module that looks at devices and measures.

calibrate_cpu() times matrix products, memory copies and gloo messages in under 3 s and keeps the result in the user's
cache folder; from then on CPU names use the measured figures and say so.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import ShardwrightError
from ..units import GIB
from .accelerators import Accelerator, accelerators
from .cluster import Cluster, Figure
from .cpu_calibration import (
    calibrate_cpu,
    host_memory_bytes,
    machine_name,
)
from .host_groups import find_accelerator, host_group, with_rates
from .measurements import cached_rates, here

if TYPE_CHECKING:
    import torch


def discover_local(num_processes: int | None = None) -> Cluster:
    """This machine's accelerators, else its CPU; under torchrun, the job's hosts (assumed alike).

    num_processes: how many devices to take of it where torchrun's environment does not say; None: all accelerators.
    """
    world = int(os.environ.get("WORLD_SIZE", "0"))
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if not world and num_processes is not None:
        world = per_host = num_processes
    device_name, num_visible, memory_bytes = _visible_accelerator()
    if num_visible:
        num_devices = per_host or num_visible
        num_hosts = max(1, world // num_devices) if world else 1
        entry = _match_accelerator(device_name, memory_bytes)
        group = host_group(entry, num_hosts, min(num_devices, entry.host_devices or num_devices))
        found = Figure(f"{entry.key}.usable_memory_gib", memory_bytes / GIB, "measured", "torch.cuda.mem_get_info", "")
        host = host_memory_bytes() // max(1, num_devices)
        figures = tuple(f for f in group.device.figures if not f.name.endswith("usable_memory_gib"))
        device = replace(
            group.device,
            memory_bytes=memory_bytes,
            host_memory_bytes=host,
            nvme_bytes=0,
            figures=(*figures, found),
        )
        device = with_rates(device, cached_rates(here(device_name, 1)), "the cache")
        return Cluster("local", (replace(group, device=device),), notes=(f"found {num_visible} x {device_name}",))
    calibrate_cpu()
    num_processes = per_host or 1
    num_hosts = max(1, world // num_processes) if world else 1
    group = host_group(find_accelerator("CPU"), num_hosts, num_processes)
    return Cluster("local", (group,), notes=(f"no accelerator found; {machine_name()}",))


def accelerator_key(device: torch.device) -> str:
    """The catalog's name of this process's device."""
    import torch

    if device.type == "cpu":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return _match_accelerator(properties.name, int(properties.total_memory)).key


def num_accelerators() -> int:
    """How many PyTorch sees. Nothing on them is initialized."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _visible_accelerator() -> tuple[str, int, int]:
    """(name, count, bytes usable on the first) of the accelerators PyTorch sees; ('', 0, 0) without one."""
    import torch

    if not torch.cuda.is_available():
        return "", 0, 0
    properties = torch.cuda.get_device_properties(0)
    return properties.name, torch.cuda.device_count(), int(properties.total_memory)


def _match_accelerator(device_name: str, memory_bytes: int) -> Accelerator:
    """The catalog entry for a driver's device name, such as 'NVIDIA H100 80GB HBM3' or 'NVIDIA A100-SXM4-40GB'."""
    text = device_name.upper().replace("GEFORCE ", "").replace("RTX ", "RTX").replace("TESLA ", "")
    named = [entry for entry in accelerators().values() if re.search(rf"\b{entry.name}\b", re.sub(r"[-_]", " ", text))]
    form = "PCIE" if "PCIE" in text else "NVL" if "NVL" in text else ""
    preferred = [entry for entry in named if entry.form == form] if form else named
    if preferred or named:
        return min(preferred or named, key=lambda entry: abs(entry.device.memory_bytes - memory_bytes))
    raise ShardwrightError(
        f"the accelerator {device_name!r} with {memory_bytes / GIB:.1f} GiB is not in the catalog",
        means="its speed is not known, so no plan for it would mean anything",
        change="--hardware",
        works="the nearest known one, such as 1x8xH100-SXM-80GB, or a .toml file that describes it",
    )
