"""What a plan was made for, as short digests: a plan is refused where they differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch

from . import __version__
from .errors import ExitCode, ShardwrightError
from .plans.document import Hashes, Plan
from .profiler.batches import batch_dims_of
from .profiler.cluster import Cluster
from .profiler.graph import ModelGraph
from .profiler.workload import Workload

DIGEST_LENGTH = 16


def digest(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def model_hash(graph: ModelGraph) -> str:
    """Parameters, buffers and ops, whatever the batch: a plan's placements go by the names of ops."""
    segments = {
        name: [[node.name, str(node.target)] for node in segment.joint.graph.nodes if node.op == "call_function"]
        for name, segment in graph.segments.items()
    }
    instances = [[instance.segment, instance.params, instance.buffers] for instance in graph.instances]
    return digest([graph.params, graph.buffers, graph.tied, segments, instances])


def shapes_hash(workload: Workload) -> str:
    """Global batch, shapes of a sample and dtypes."""
    dims = batch_dims_of(workload)
    samples = {name: [_sample(t, dims.get(name)), str(t.dtype)] for name, t in workload.example_batch.items()}
    precision = workload.precision
    dtypes = [str(precision.compute), str(precision.master), str(precision.grad_reduce)]
    return digest([workload.global_batch, samples, dtypes])


def _sample(tensor: torch.Tensor, dim: int | None) -> list[int]:
    return [size for d, size in enumerate(tensor.shape) if d != dim]


def with_plans_dims(plan: Plan, workload: Workload) -> Workload:
    """The workload whose entries hold their samples as the plan says. Raises ShardwrightError where it says
    otherwise."""
    planned = plan.workload.get("batch_dims")
    if planned is None or set(planned) != set(workload.example_batch):  # other entries: verify_shapes names them
        return workload
    for name, dim in (workload.batch_dims or {}).items():
        if planned[name] != dim:
            raise _mismatch(
                f"the plan cuts {name!r} along dimension {planned[name]}; this workload's batch_dims says {dim}",
                "an entry that is cut where another is shared gives each microbatch something else",
            )
    return dataclasses.replace(workload, batch_dims=planned)


def version_text() -> str:
    """The names of a captured graph's ops depend on both releases."""
    return f"shardwright {__version__}, torch {'.'.join(torch.__version__.split('.')[:2])}"


def make_hashes(graph: ModelGraph, workload: Workload, cluster: Cluster) -> Hashes:
    return Hashes(model=model_hash(graph), shapes=shapes_hash(workload), hardware=cluster.hash, version=version_text())


def verify_version(plan: Plan) -> None:
    """Raises ShardwrightError, exit code 7, where another version made the plan."""
    if plan.hashes.version != version_text():
        raise _mismatch(
            f"the plan was made by {plan.hashes.version}; this is {version_text()}",
            "ops of the captured model may have other names now, and the cost model may judge otherwise",
        )


def verify_shapes(plan: Plan, workload: Workload) -> None:
    if plan.hashes.shapes != shapes_hash(workload):
        made_for = ", ".join(
            f"{key} {plan.workload[key]}" for key in ("global_batch", "seq_len") if key in plan.workload
        )
        dims = batch_dims_of(workload)
        shapes = {name: _sample(tensor, dims.get(name)) for name, tensor in workload.example_batch.items()}
        raise _mismatch(
            f"the plan is for other shapes ({made_for}); this workload has global batch {workload.global_batch}, "
            f"samples {shapes}, {workload.precision.compute}",
            "its memory and time were predicted for the shapes it was made with",
        )


def verify_model(plan: Plan, graph: ModelGraph) -> None:
    if plan.hashes.model != model_hash(graph):
        name = plan.workload.get("model", "another model")
        raise _mismatch(
            f"the plan was made for {name} (digest {plan.hashes.model}); this model has digest {model_hash(graph)}",
            "parameters or ops differ, so its placements do not apply",
        )


def verify_hardware(plan: Plan, device: torch.device, num_processes: int) -> None:
    devices = {host.get("device", "") for host in plan.hardware.get("hosts", [])}
    name = plan.hardware.get("name", "other hardware")
    if devices and (devices == {"CPU"}) != (device.type == "cpu"):
        raise _mismatch(
            f"the plan is for {name}; this process computes on {device}", "its times and memory mean nothing here"
        )
    if plan.mesh.num_devices != num_processes:
        raise _mismatch(
            f"the plan is for {plan.mesh.num_devices} processes; this job has {num_processes}",
            "each process has its own part of the plan",
            change="the number of processes",
            works=f"torchrun --nproc-per-node {plan.mesh.num_devices} SCRIPT",
        )


def _mismatch(
    what: str,
    means: str,
    change: str = "make the plan again",
    works: str = "shardwright plan MODEL --hardware NAME -o plan.json",
) -> ShardwrightError:
    return ShardwrightError(what, means=means, change=change, works=works, exit_code=ExitCode.PLAN_MISMATCH)
