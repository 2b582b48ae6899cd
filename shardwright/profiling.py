"""How `shardwright profile` measures: in this process of a torchrun job, or in processes that it starts here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import devices
from .errors import ExitCode, ShardwrightError
from .job_profile import profile
from .launch import launch
from .profiler.discovery import num_accelerators
from .profiler.measured_hardware import as_document, write_hardware
from .profiler.measurements import Row

Event = dict[str, Any]


def measured_here(options: Mapping[str, Any], tell: Callable[[Event], None] | None) -> dict[str, Any] | None:
    """Every process of the job calls it. Returns the document on rank 0."""
    device = devices.join_torchrun("1xCPU" if not num_accelerators() else "local")
    made = measured(device, options, tell)
    return made if int(os.environ.get("RANK", "0")) == 0 else None


def measured(device: torch.device, options: Mapping[str, Any], tell: Callable[[Event], None] | None) -> dict[str, Any]:
    names = options["dtypes"] or ("fp32" if device.type == "cpu" else "bf16,fp32")

    def say(row: Row, done: int, of: int) -> None:
        if tell is not None:
            case = row.case
            tell({"op": case.op, "dtype": case.dtype, "size": case.size, "done": done, "of": of})

    made = profile(
        device,
        _listed(names),
        ops=_listed(options["ops"]),
        refresh=bool(options["refresh"]),
        links=bool(options["links"]),
        tell=say,
    )
    if options["output"] and int(os.environ.get("RANK", "0")) == 0:
        write_hardware(made, Path(options["output"]))
    return dict(as_document(made))


def _listed(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def measured_on_local_processes(
    hardware: str, options: Mapping[str, Any], tell: Callable[[Event], None] | None
) -> dict[str, Any]:
    """Raises ShardwrightError where the hardware is not this machine's."""
    count = _processes(hardware)
    if count == 1:
        return measured(torch.device("cuda", 0) if _on_gpus(hardware) else torch.device("cpu"), options, tell)
    found: list[dict[str, Any]] = []

    def on_event(event: Event) -> None:
        if event["event"] == "profiled":
            found.append(event["document"])
        elif tell is not None:
            tell(event)

    name = f"{count}xCPU" if not _on_gpus(hardware) else "local"
    launch({"task": "profile", "hardware": name, "options": dict(options)}, count, on_event)
    return found[-1]


def _on_gpus(hardware: str) -> bool:
    return hardware == "local" and num_accelerators() > 0


def _processes(hardware: str) -> int:
    if hardware == "local":
        return max(1, num_accelerators())
    cluster = devices.cluster_for_this_job(hardware)
    if cluster.worst_device().kind != "cpu" or len(cluster.groups) != 1 or cluster.num_hosts != 1:
        raise ShardwrightError(
            f"--hardware {hardware} is not this machine",
            means="only what is at hand can be measured",
            change="--hardware",
            works="local, or 2xCPU; on a cluster: torchrun ... -m shardwright profile",
            exit_code=ExitCode.USAGE,
        )
    return cluster.num_devices
