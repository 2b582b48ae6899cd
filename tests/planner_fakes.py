"""A transformer's worth of segments and a sharder that answers by arithmetic, so that the search is tested alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from shardwright.costmodel.model import CostModel
from shardwright.costmodel.segment import RecomputePoint, SegmentCost
from shardwright.planner.interfaces import ShardingSolution
from shardwright.plans.axes import MeshShape
from shardwright.profiler.graph import ModelGraph, Segment, SegmentInstance, ValueInfo
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload


def fake_segment(name: str, shapes: list[tuple[int, ...]], *, is_prologue: bool = False) -> Segment:
    return Segment(
        name=name,
        joint=None,
        forward=None,
        param_shapes=tuple(shapes),
        param_dtypes=(torch.bfloat16,) * len(shapes),
        param_requires_grad=(True,) * len(shapes),
        num_buffers=0,
        mutated_buffers=(),
        inputs=(),
        outputs=(),
        has_random=False,
        structure_hash=name,
        is_prologue=is_prologue,
    )


@dataclass(frozen=True)
class Sizes:
    """Of a dense decoder."""

    layers: int = 8
    hidden: int = 64
    ffn: int = 256
    kv: int = 64
    vocab: int = 1000
    seq: int = 128
    tied: bool = False

    @property
    def block_params(self) -> int:
        return 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv + 3 * self.hidden * self.ffn


LLAMA_8B = Sizes(32, 4096, 14336, 1024, 128256, 8192)
LLAMA_70B = Sizes(80, 8192, 28672, 1024, 128256, 8192)
LLAMA_405B = Sizes(126, 16384, 53248, 1024, 128256, 8192)


def transformer_graph(sizes: Sizes) -> ModelGraph:
    hidden = (1, sizes.seq, sizes.hidden)
    values, instances = {}, []
    segments = {
        "rope": fake_segment("rope", [], is_prologue=True),
        "embed": fake_segment("embed", [(sizes.vocab, sizes.hidden)]),
        "block": fake_segment("block", [(sizes.block_params // sizes.hidden, sizes.hidden)]),
        "head": fake_segment("head", [(sizes.vocab, sizes.hidden)]),
    }
    params = {"embed.weight": (segments["embed"].param_shapes[0], torch.bfloat16, True)}

    def add(segment: str, names: tuple[str, ...], inputs: tuple[str, ...], out: str, shape=hidden) -> str:
        value = f"{segment}.{len(instances)}/{out}"
        values[value] = ValueInfo(value, shape, torch.bfloat16, segment != "rope")
        instances.append(SegmentInstance(len(instances), segment, names, (), inputs, (value,), 0, segment))
        return value

    tables = add("rope", (), ("input:positions",), "cos", (1, sizes.seq, 128))
    state = add("embed", ("embed.weight",), ("input:ids",), "h")
    for layer in range(sizes.layers):
        name = f"layers.{layer}.weight"
        params[name] = (segments["block"].param_shapes[0], torch.bfloat16, True)
        state = add("block", (name,), (state, tables), "h")
    tied = {}
    if sizes.tied:
        tied["head.weight"] = "embed.weight"
    else:
        params["head.weight"] = (segments["head"].param_shapes[0], torch.bfloat16, True)
    loss = add("head", ("embed.weight" if sizes.tied else "head.weight",), (state, "input:labels"), "loss", ())
    return ModelGraph(
        name="fake",
        segments=segments,
        instances=instances,
        values=values,
        input_names=("input:ids", "input:positions", "input:labels"),
        params=params,
        buffers={},
        tied=tied,
        loss=loss,
        batch_size=1,
        batch_dims={"input_ids": 0, "labels": 0},
        structure_hash="fake",
    )


@dataclass
class FakeSharder:
    """Megatron's scheme by arithmetic: everything divides by tp, two all-reduces of the hidden state a block."""

    graph: ModelGraph
    sizes: Sizes
    cost_model: CostModel
    dtype: torch.dtype = torch.bfloat16
    calls: list[tuple[int, int, int]] = field(default_factory=list)
    widest_tp: int = 64
    gap: float = 0.0

    def frontier(self, mesh: MeshShape, local_batch: int) -> list[ShardingSolution]:
        found = self.solve(mesh, local_batch)
        return [] if found is None else [found]

    def leanest(self, mesh: MeshShape, local_batch: int, *, state_share: float) -> ShardingSolution | None:
        return self.solve(mesh, local_batch)

    def solve(self, mesh: MeshShape, local_batch: int) -> ShardingSolution | None:
        dp, tp = mesh.batch_ranks, mesh.tensor_ranks
        self.calls.append((dp, tp, local_batch))
        if tp > self.widest_tp:
            return None
        s, cluster = self.sizes, self.cost_model.cluster
        width = self.dtype.itemsize
        tokens = local_batch * s.seq
        group = cluster.axis_links({"pp": 1, "dp": max(1, cluster.num_devices // tp), "cp": 1, "ep": 1, "tp": tp}, "tp")
        state_bytes = tokens * s.hidden * width

        def cost(params: int, flops: float, saved: float, kept: float, comms: int, workspace: float) -> SegmentCost:
            forward_s = self.cost_model.op_seconds("mm", flops / tp, 3 * saved / tp, self.dtype)
            comm_s = comms * self.cost_model.collective_seconds("all_reduce", state_bytes, group) if tp > 1 else 0.0
            return SegmentCost(
                forward_s, forward_s, forward_s if params else 0.0, comm_s, comm_s, math.ceil(params / tp),
                math.ceil(params / tp), 0, int(saved / tp), int(kept), int(kept), int(workspace / tp),
                3 * flops / tp, (RecomputePoint((), forward_s, comm_s, int(kept), is_whole=True),),
            )  # fmt: skip

        attention = 2 * tokens * s.seq * s.hidden  # causal
        rope_again = RecomputePoint((), 1e-6, 0, 0, is_whole=True)
        costs = {
            "rope": SegmentCost(1e-6, 0, 0, 0, 0, 0, 0, 0, 0, 0, s.seq * 128 * width, 0, 0.0, (rope_again,)),
            "embed": cost(s.vocab * s.hidden, 0.0, 0, 0, 1, 0),
            "block": cost(
                s.block_params,
                2 * tokens * s.block_params + attention,
                tokens * (4 * s.hidden + 2 * s.kv + 3 * s.ffn) * width,
                state_bytes,
                2,
                tokens * s.ffn * width * 2,
            ),
            "head": cost(
                s.vocab * s.hidden, 2.0 * tokens * s.vocab * s.hidden, tokens * s.vocab * width, state_bytes, 1,
                tokens * s.vocab * 4,
            ),
        }  # fmt: skip
        boundary = {name: local_batch * s.seq * s.hidden * width for name in self.graph.values}
        counts = {name: sum(i.segment == name for i in self.graph.instances) for name in costs}
        objective = sum(
            counts[n] * (c.forward_s + c.backward_s + c.forward_comm_s + c.backward_comm_s) for n, c in costs.items()
        )
        return ShardingSolution(
            costs,
            {name: {} for name in costs},
            boundary,
            objective,
            objective * (1 - self.gap),
            self.gap,
            0.0,
            "optimal",
        )


class Case:
    """Graph, cluster, cost model, workload and sharder that belong together. knows_host: how much memory hosts have."""

    def __init__(
        self,
        sizes: Sizes,
        hardware: str,
        global_batch: int,
        *,
        memory_limit_bytes: int | None = None,
        knows_host: bool = True,
        **kw,
    ):
        self.sizes = sizes
        self.graph = transformer_graph(sizes)
        self.cluster = parse_hardware(hardware, memory_limit_bytes=memory_limit_bytes)
        if not knows_host:
            alone = [replace(group.device, host_memory_bytes=0) for group in self.cluster.groups]
            groups = [replace(g, device=d) for g, d in zip(self.cluster.groups, alone, strict=True)]
            self.cluster = replace(self.cluster, groups=tuple(groups))
        self.cost_model = CostModel(self.cluster)
        precision = kw.pop("precision", Precision())
        self.workload = Workload(
            model=nn.Identity(),
            example_batch={"ids": torch.zeros(1, sizes.seq, dtype=torch.long)},
            global_batch=global_batch,
            optimizer=kw.pop("optimizer", OptimizerSpec()),
            precision=precision,
        )
        self.sharder = FakeSharder(self.graph, sizes, self.cost_model, precision.compute, **kw)

    def search(self, **force: object):
        from shardwright.planner.search.search import search

        options = {k: force.pop(k) for k in ("time_limit_s", "memory_limit_bytes", "progress") if k in force}
        forced = {name: str(value) for name, value in force.items()}
        return search(self.graph, self.cost_model, self.workload, self.sharder, force=forced, **options)
