"""The planner's path for one published row: capture, forced layout, the search's own evaluation, and nothing else.

A model is captured once for each of its sizes and lengths, with few layers; deepened() then puts in as many as a row
has. A layer is one segment of the captured graph, so that the graph of n layers is that of three with the same segment
at n places, which a test holds to the graph of n layers captured as such.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from published_rows import Model, Row, Where

from shardwright.api import capture_for_planning, captured_for
from shardwright.costmodel.model import CostModel
from shardwright.costmodel.stacks import Stack, stack_named
from shardwright.errors import ShardwrightError
from shardwright.jobs import job_of
from shardwright.planner.search.does_not_fit import DoesNotFit
from shardwright.planner.search.result import SearchResult
from shardwright.planner.search.search import first_that_fits
from shardwright.planner.sharding.sharder import Sharder
from shardwright.planner.sharding.training import Job
from shardwright.profiler.accelerators import find_link
from shardwright.profiler.batch_dims import with_batch_dims
from shardwright.profiler.cluster import Cluster
from shardwright.profiler.graph import ModelGraph, SegmentInstance
from shardwright.profiler.host_groups import find_accelerator, host_group
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Precision, Workload

GIB = 2**30
CAPTURED_LAYERS = 3
ENOUGH_MEMORY = 64  # times a device's, where a row's time is asked for though it is said not to fit


@dataclass
class Prediction:
    """fits: with the memory of the row's devices; step_s and peak_gib then of the plan, else the time on devices with
    memory enough and the least peak. error: why the planner refused."""

    step_s: float | None = None
    peak_gib: float | None = None
    limit_gib: float | None = None
    fits: bool | None = None
    error: str = ""
    seconds: float = 0.0


def cluster_of(where: Where, memory_factor: int = 1) -> Cluster:
    entry = find_accelerator(where.gpu)
    hosts = max(1, where.num_gpus // where.per_host)
    entry = replace(entry, host_devices=max(entry.host_devices, where.per_host))
    group = host_group(entry, hosts, where.per_host)
    if where.network:
        group = replace(group, network=find_link(where.network))
    group = replace(group, device=replace(group.device, memory_bytes=group.device.memory_bytes * memory_factor))
    return Cluster(f"{hosts}x{where.per_host}x{where.gpu}", (group,))


def deepened(graph: ModelGraph, layers: int) -> ModelGraph:
    """The same model with other layers between its second and its last; its layers are instances of one segment."""
    inside = [i for i in graph.instances if not graph.segments[i.segment].is_prologue]
    name, have = Counter(i.segment for i in inside).most_common(1)[0]
    if have == layers:
        return graph
    block = [i for i in inside if i.segment == name]
    assert have > 2 and layers >= 2, f"{have} layers were captured, {layers} are asked for"
    first, second = block[0], block[1]
    linked = dict(zip(first.outputs, second.outputs, strict=True))  # a value of one layer -> the next layer's
    params, values = dict(graph.params), dict(graph.values)
    kept = [i for i in graph.instances if i not in block[1:-1]]
    made: list[SegmentInstance] = []
    before = first.outputs
    for k in range(1, layers - 1):
        outputs = tuple(f"{name}.deep{k}/{value.rsplit('/', 1)[-1]}" for value in second.outputs)
        for old, new in zip(second.outputs, outputs, strict=True):
            values[new] = replace(graph.values[old], name=new)
        own = tuple(f"{parameter}.deep{k}" for parameter in second.params)
        for old, new in zip(second.params, own, strict=True):
            params[new] = graph.params[old]
        from_before = dict(zip(first.outputs, before, strict=True))
        made.append(
            replace(
                second,
                params=own,
                inputs=tuple(from_before.get(value, value) for value in second.inputs),
                outputs=outputs,
            )
        )
        before = outputs
    assert linked, "layers are not linked"
    from_last = dict(zip(block[-2].outputs, before, strict=True))
    last = replace(block[-1], inputs=tuple(from_last.get(value, value) for value in block[-1].inputs))
    for old in block[1:-1]:
        for parameter in old.params:
            params.pop(parameter, None)
    place = kept.index(first) + 1
    ordered = [*kept[:place], *made, *(last if i is block[-1] else i for i in kept[place:])]
    instances = [replace(instance, index=k) for k, instance in enumerate(ordered)]
    return replace(graph, instances=instances, params=params, values=values)


@dataclass(frozen=True)
class Ready:
    """What rows of one model share."""

    workload: Workload
    graph: ModelGraph


# Of a stack, what weighs on placements: rows with the same share a sharder.
PLACING = (
    "product_factor",
    "hopper_factor",
    "attention_factor",
    "memory_factor",
    "op_s",
    "dispatch_s",
    "tensor_factor",
)


class PlannerPath:
    """Predicts rows of one model and length after another; keeps the captures of the latest."""

    def __init__(self) -> None:
        self._key: Any = None
        self._captured: Ready | None = None
        self._graphs: dict[int, ModelGraph] = {}
        self._sharders: dict[Any, Sharder] = {}

    def ready(self, row: Row) -> Ready:
        assert row.model is not None and row.where is not None
        key = capture_key(row)
        if key != self._key:
            self._key, self._graphs, self._sharders = key, {}, {}
            self._captured = _capture(row.model, row.compute, row.where)
        assert self._captured is not None
        layers = row.model.layers
        if layers not in self._graphs:
            graph = self._captured.graph
            if layers <= 2:
                graph = _capture(row.model, row.compute, row.where, layers).graph
            self._graphs[layers] = graph if layers <= 2 else deepened(graph, layers)
        return Ready(self._captured.workload, self._graphs[layers])

    def predict(self, row: Row, stack: Stack | None = None) -> Prediction:
        """stack: in place of the row's own."""
        started = time.perf_counter()
        try:
            found = self._predict(row, stack or stack_named(row.stack))
        except ShardwrightError as error:
            found = Prediction(error=str(error.what)[:200])
        found.seconds = time.perf_counter() - started
        return found

    def _predict(self, row: Row, stack: Stack) -> Prediction:
        try:
            result = self.search(row, stack, 1)
        except DoesNotFit as error:
            peak, limit = error.peak_bytes / GIB, (error.limit_bytes or 0) / GIB
            found = Prediction(None, peak, limit, fits=False)
            if row.measured_s is not None:
                found.step_s = self.search(row, stack, ENOUGH_MEMORY).predicted.step_s
            return found
        predicted = result.predicted
        peak = max(predicted.peak_bytes) / GIB
        return Prediction(predicted.step_s, peak, predicted.memory_limit_bytes / GIB, fits=True)

    def search(self, row: Row, stack: Stack, memory_factor: int) -> SearchResult:
        """Raises DoesNotFit where the layout needs more than so many times the memory that there is."""
        assert row.where is not None
        ready = self.ready(row)
        cost_model = CostModel(cluster_of(row.where, memory_factor), stack=stack)
        precision = Precision(getattr(torch, row.compute), torch.float32, getattr(torch, row.sums))
        workload = dataclasses.replace(ready.workload, global_batch=row.global_batch, precision=precision)
        force = dict(row.force)
        cuts = even_cuts(ready.graph, row.even_stages)
        if cuts:
            force["cuts"] = cuts
        job = job_of(workload, row.global_batch, force)
        sharder = self.sharder(row, job, cost_model)
        return first_that_fits(ready.graph, cost_model, workload, sharder, force=force)

    def sharder(self, row: Row, job: Job, cost_model: CostModel) -> Sharder:
        """The same for rows that are placed alike: on one pipeline of one data-parallel rank the job weighs nothing."""
        graph = self.ready(row).graph
        job = job if int(row.force["tp"]) > 1 else replace(job, global_batch=0)
        key = (id(graph), row.where, job, *(getattr(cost_model.stack.figures, name) for name in PLACING))
        if key not in self._sharders:
            self._sharders[key] = Sharder(graph, cost_model, job=job)
        return self._sharders[key]


def capture_key(row: Row) -> tuple[Any, ...]:
    """Rows of one key share a capture."""
    assert row.model is not None and row.where is not None
    return replace(row.model, layers=0), row.compute, row.where.gpu


def _capture(model: Model, compute: str, where: Where, layers: int = CAPTURED_LAYERS) -> Ready:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(model.config(layers)))
        overrides = {"attn_implementation": "eager"} if model.eager else {}
        workload = load_workload(
            f"hf:{path}", global_batch=8, seq_len=model.seq_len, precision=compute, overrides=overrides
        )
        if model.fused_norm:
            captured = captured_for(workload, CostModel(cluster_of(where)))
            return Ready(captured.workload, captured.graph)
        workload = with_batch_dims(workload)
        return Ready(workload, capture_for_planning(workload))


def even_cuts(graph: ModelGraph, num_stages: int) -> str:
    """Layers in equal numbers on stages; where that fails, but embedding and head make them even, each as a layer. ""
    where neither does: the search then cuts."""
    if num_stages < 2:
        return ""
    inside = [i for i in graph.instances if not graph.segments[i.segment].is_prologue]
    name, layers = Counter(i.segment for i in inside).most_common(1)[0]
    block = [i.index for i in inside if i.segment == name]
    if layers % num_stages == 0:
        return ",".join(str(block[k * layers // num_stages]) for k in range(1, num_stages))
    if len(inside) % num_stages == 0:
        each = len(inside) // num_stages
        return ",".join(str(inside[k * each].index) for k in range(1, num_stages))
    return ""
