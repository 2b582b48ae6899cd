"""Which device a process computes on and which process group carries its tensors.

Both follow from the hardware that was planned for, never from what happens to be there: a plan for CPUs runs on CPUs
beside idle GPUs. The one place that makes a process group.
"""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import ExitCode, ShardwrightError
from .plans.document import Plan
from .profiler.cluster import Cluster
from .profiler.discovery import discover_local, num_accelerators
from .profiler.hardware import parse_hardware

Hardware = Plan | Cluster | str

# Launchers that set no LOCAL_RANK of torchrun's: Slurm, Open MPI, MPICH.
_LOCAL_RANK_NAMES = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def device_type_of(hardware: Hardware) -> str:
    """ "cpu" or "cuda" (AMD accelerators are "cuda" to PyTorch)."""
    if isinstance(hardware, Plan):
        return _type_of_plan(hardware)
    if isinstance(hardware, str):
        if _is_local(hardware):
            return "cuda" if num_accelerators() else "cpu"
        hardware = parse_hardware(hardware)
    return "cpu" if all(group.device.kind == "cpu" for group in hardware.groups) else "cuda"


def _type_of_plan(plan: Plan) -> str:
    devices = {str(host.get("device", "")) for host in plan.hardware.get("hosts", [])}
    return "cpu" if devices <= {"CPU"} else "cuda"


def _is_local(name: str) -> bool:
    return name.strip().lower() == "local"


def cluster_for_this_job(hardware: Cluster | str) -> Cluster:
    """What hardware names, to a script that builds and trains itself: `local` is one device for each of its processes.

    (On the command line `local` is the whole machine, because there `run` starts a process for each device.)
    """
    if isinstance(hardware, Cluster):
        return hardware
    if not _is_local(hardware):
        return parse_hardware(hardware)
    return discover_local(dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1)


def local_rank() -> int:
    """This process's number on its host; 0 where no launcher says."""
    return next((int(os.environ[name]) for name in _LOCAL_RANK_NAMES if os.environ.get(name, "").isdigit()), 0)


def device_of(hardware: Hardware) -> torch.device:
    """This process's device of the hardware's type. Raises ShardwrightError, exit code 7, where it has none.

    Of several visible GPUs it is the one that the process group is bound to, or that torch.cuda.set_device chose, or
    the one of this process's local rank. Where each process sees one GPU alone, as under Slurm, that is the one.
    """
    if device_type_of(hardware) == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rank = local_rank()
    if count == 0:
        raise ShardwrightError(
            f"the plan is for {_name_of(hardware)}, and this process sees no GPU",
            means="it computes on the hardware it was planned for, or not at all",
            change="CUDA_VISIBLE_DEVICES, or the hardware of the plan",
            works="shardwright plan MODEL --hardware 4xCPU",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    if count == 1:
        return torch.device("cuda", 0)
    bound = _bound_device()
    if bound is not None:
        return bound
    chosen = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    if chosen:
        return torch.device("cuda", chosen)
    if rank >= count:
        raise ShardwrightError(
            f"this is process {rank} of its host, which shows it {count} GPUs",
            means="each process needs a GPU of its own",
            change="the processes of a host, or CUDA_VISIBLE_DEVICES",
            works=f"torchrun --nproc-per-node {count} SCRIPT",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    return torch.device("cuda", rank)


def _name_of(hardware: Hardware) -> str:
    if isinstance(hardware, Plan):
        return str(hardware.hardware.get("name", "GPUs"))
    return hardware if isinstance(hardware, str) else hardware.name


def _bound_device() -> torch.device | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    device = dist.group.WORLD.bound_device_id if dist.group.WORLD is not None else None
    return device if device is not None and device.type == "cuda" and device.index is not None else None


def join_torchrun(
    hardware: Hardware, *, init_method: str | None = None, timeout: timedelta | None = None
) -> torch.device:
    """Make the process group that hardware asks for, unless this process runs alone or its script has made one.

    hardware: a plan, a cluster or its name. NCCL for GPUs, bound to this process's GPU, which becomes the current one;
    gloo for CPUs. Returns the device. init_method, timeout: as in torch.distributed.init_process_group.
    Raises ShardwrightError where there is no such device, or the group that is there cannot carry its tensors.
    """
    device = device_of(hardware)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_available() and dist.is_initialized():
        check_group(device)
        return device
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and init_method is None:
        return device
    if "RANK" not in os.environ:
        return device
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        timeout=timeout,
        rank=int(os.environ["RANK"]) if init_method is not None else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if init_method is not None else -1,
        device_id=device if device.type == "cuda" else None,
    )
    atexit.register(leave)
    return device


def leave() -> None:
    """Destroy the process group, where there is one still."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_group(device: torch.device) -> None:
    """Raises ShardwrightError, exit code 7, where the process group's backend cannot carry device's tensors."""
    backends = dict(part.split(":", 1) for part in dist.get_backend_config().split(",") if ":" in part)
    backend = backends.get(device.type)  # gloo takes CUDA tensors in some collectives only
    if backend is not None and (device.type, backend) != ("cuda", "gloo"):
        return
    wanted = "torch.distributed.init_process_group('gloo')"
    if device.type == "cuda":
        wanted = "torch.distributed.init_process_group('nccl', device_id=device)"
    raise ShardwrightError(
        f"the plan computes on {device}, and the process group is {dist.get_backend_config()}",
        means=f"it does not carry all that a program sends between tensors on {device.type}",
        change="the process group",
        works=f"shardwright.join_torchrun(plan), which makes the right one, or {wanted}",
        exit_code=ExitCode.PLAN_MISMATCH,
    )
