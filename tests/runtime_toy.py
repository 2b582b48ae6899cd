"""A small model as hand-made segment programs, for tests of the runtime without capture or passes.

Segments are written as plain functions of whole tensors, with the collectives of a data- and tensor-parallel version
put in by hand through `Comm`. The reference runs the same functions on one process: there every collective is the
identity.

    ids -> prologue -> pos            (from inputs and a buffer only)
    embed: h0, tag                    (emb.weight; tag is an integer value)
    block 0..n-1: h                   (column- and row-cut weights; the skip h0 goes to all; tag and pos too)
    norm: h                           (BatchNorm-like: writes a buffer)
    head: logits                      (emb.weight again, cut by vocabulary over tp; head.bias; an unused output)
    loss                              (labels are an input)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shardwright.passes.program import SegmentProgram
from shardwright.passes.split import SplitBackward
from shardwright.plans.document import (
    Certificate,
    Hashes,
    MemoryPolicy,
    Mesh,
    Microbatch,
    Plan,
    PlanningTime,
    Predicted,
    Schedule,
    Stage,
)
from shardwright.profiler.graph import ModelGraph, Segment, SegmentInstance, ValueInfo
from shardwright.profiler.workload import OptimizerSpec, Precision, Workload
from shardwright.runtime.mesh import RankGrid, build_mesh
from shardwright.runtime.program import Compiled, Program
from shardwright.schedules import build_schedule

VOCAB, WIDTH, HIDDEN, LENGTH = 7, 6, 5, 3


class _Sum(torch.autograd.Function):
    """Forward: sum over the group where `ahead`; backward: sum over the group where `behind`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any, ahead: bool, behind: bool) -> torch.Tensor:
        ctx.group, ctx.behind = group, behind
        x = x.clone()
        if ahead:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad = grad.clone()
        if ctx.behind:
            dist.all_reduce(grad, group=ctx.group)
        return grad, None, None, None


class Comm:
    """Collectives of one rank; the identity where an axis has one rank or `dry` asks for shapes only."""

    def __init__(self, grid: RankGrid | None = None, dry: bool = False) -> None:
        self.grid, self.dry = grid, dry

    def size(self, axis: str) -> int:
        return self.grid.size(axis) if self.grid else 1

    def coord(self, axis: str) -> int:
        return self.grid.coord(axis) if self.grid else 0

    def sum(self, x: torch.Tensor, axis: str, *, ahead: bool, behind: bool) -> torch.Tensor:
        if self.size(axis) == 1 or self.dry:
            return x
        assert self.grid is not None
        return _Sum.apply(x, self.grid.group(axis), ahead, behind)

    def whole_vocab(self, local: torch.Tensor) -> torch.Tensor:
        """Pieces of the last dimension -> all of it, by padding with zeros and summing."""
        if self.size("tp") == 1:
            return local
        step = -(-VOCAB // self.size("tp"))
        start = min(VOCAB, step * self.coord("tp"))
        whole = nn.functional.pad(local, (start, VOCAB - start - local.shape[-1]))
        return self.sum(whole, "tp", ahead=True, behind=False)


Body = Callable[[Comm, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor], list[torch.Tensor]]


def prologue(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    (table,), (ids,) = buffers, inputs
    return [table[: ids.shape[1]] * (ids != 0).unsqueeze(-1).to(table.dtype)]


def embed(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    (weight,), (ids, pos) = params, inputs
    return [nn.functional.embedding(ids, weight) + pos, ids % 2]


def block(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    gain, up, up_bias, down, shift, scalar = params
    h, skip, tag, pos = inputs
    # gain stands before the cut product: its gradient is partial over tp; shift behind it: whole on every rank
    inner = nn.functional.linear(comm.sum(h, "tp", ahead=False, behind=True) * gain, up, up_bias)
    out = comm.sum(nn.functional.linear(torch.tanh(inner), down), "tp", ahead=True, behind=False)
    # what is used whole on every tp rank contributes once: its gradient is not partial
    noise = 1.0 + 0.01 * (key.sum() % 5).to(h.dtype)
    out = (out + shift) * scalar * noise
    return [h + out + 0.1 * skip * tag.unsqueeze(-1).to(h.dtype) + 0.01 * pos]


def norm(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    (mean,), (h, count) = buffers, inputs
    total = comm.sum(h.sum((0, 1)), "dp", ahead=True, behind=True)
    samples = comm.sum(count.sum().to(h.dtype), "dp", ahead=True, behind=False)
    current = total / samples
    return [h - current, (0.9 * mean + 0.1 * current).detach()]


def norm_by_buffer(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    """Its result depends on what the microbatches before have written."""
    out, update = norm(comm, params, buffers, inputs, key)
    return [out * (1.0 + buffers[0]), update]


def head(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    (weight, bias), (h,) = params, inputs
    h = comm.sum(h, "tp", ahead=False, behind=True)
    return [comm.whole_vocab(nn.functional.linear(h, weight)) + bias, h.sum().detach()]


def loss(comm: Comm, params: list, buffers: list, inputs: list, key: torch.Tensor) -> list[torch.Tensor]:
    logits, labels = inputs
    local = nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="sum")
    count = comm.sum(torch.tensor(float(labels.numel()), dtype=torch.float64), "dp", ahead=True, behind=False)
    return [(comm.sum(local, "dp", ahead=True, behind=False) / count).to(logits.dtype)]


@dataclass(frozen=True)
class ToySegment:
    body: Body
    num_outputs: int
    grads: tuple[bool, ...] = ()  # of inputs
    tangents: tuple[int, ...] = ()
    param_grads: tuple[bool, ...] = ()
    shards: tuple[dict[str, int], ...] = ()
    partial_tp: tuple[bool, ...] = ()  # gradient partial over tp
    mutated: tuple[int, ...] = ()
    is_prologue: bool = False
    random: bool = False


SEGMENTS = {
    "prologue": ToySegment(prologue, 1, grads=(False,), is_prologue=True),
    "embed": ToySegment(
        embed, 2, grads=(False, False), tangents=(0,), param_grads=(True,), shards=({},), partial_tp=(False,)
    ),
    "block": ToySegment(
        block,
        1,
        grads=(True, True, False, False),
        tangents=(0,),
        param_grads=(True, True, True, True, False, True),
        shards=({}, {"tp": 0}, {"tp": 0}, {"tp": 1}, {}, {}),
        partial_tp=(True, False, False, False, False, False),
        random=True,
    ),
    "norm": ToySegment(norm, 1, grads=(True, False), tangents=(0,), mutated=(0,)),
    "head": ToySegment(
        head,
        2,
        grads=(True,),
        tangents=(0,),
        param_grads=(True, True),
        shards=({"tp": 0}, {}),
        partial_tp=(False, False),
    ),
    "loss": ToySegment(loss, 1, grads=(True, False), tangents=(0,)),
}


@dataclass
class Toy:
    """graph has placeholders for the joint graphs: the runtime reads there how buffers are updated, no more."""

    graph: ModelGraph
    model: nn.Module
    num_blocks: int
    segments: dict[str, ToySegment] = field(default_factory=lambda: dict(SEGMENTS))


class ToyModel(nn.Module):
    """Holds the parameters under the names that the graph uses; its forward is the reference's business."""

    def __init__(self, num_blocks: int, dtype: torch.dtype, tie: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype))

        self.emb = nn.Module()
        self.emb.weight = draw(VOCAB, WIDTH)
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            entry = nn.Module()
            entry.gain, entry.up, entry.up_bias = draw(WIDTH), draw(HIDDEN, WIDTH), draw(HIDDEN)
            entry.down, entry.shift, entry.scalar = draw(WIDTH, HIDDEN), draw(WIDTH), draw()
            entry.shift.requires_grad_(False)
            self.blocks.append(entry)
        self.head = nn.Module()
        self.head.weight = self.emb.weight if tie else draw(VOCAB, WIDTH)
        self.head.bias = draw(VOCAB)
        self.unused = draw(4, 2)
        self.register_buffer("table", torch.randn(LENGTH, WIDTH, generator=generator, dtype=torch.float64).to(dtype))
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=dtype))


def make_toy(
    num_blocks: int = 3,
    batch_size: int = 4,
    dtype: torch.dtype = torch.float64,
    tie: bool = True,
    reads_buffer: bool = False,
) -> Toy:
    model = ToyModel(num_blocks, dtype, tie)
    rows: list[tuple[str, list[str], list[str], list[str], list[str]]] = [
        ("prologue", [], ["table"], ["input:ids"], ["prologue.0/pos"]),
        ("embed", ["emb.weight"], [], ["input:ids", "prologue.0/pos"], ["embed.0/h", "embed.0/tag"]),
    ]
    hidden = "embed.0/h"
    for k in range(num_blocks):
        names = [f"blocks.{k}.{n}" for n in ("gain", "up", "up_bias", "down", "shift", "scalar")]
        rows.append(("block", names, [], [hidden, "embed.0/h", "embed.0/tag", "prologue.0/pos"], [f"block.{k}/h"]))
        hidden = f"block.{k}/h"
    rows.append(("norm", [], ["mean"], [hidden, "input:ones"], ["norm.0/h"]))
    head_weight = "emb.weight" if tie else "head.weight"
    rows.append(("head", [head_weight, "head.bias"], [], ["norm.0/h"], ["head.0/logits", "head.0/extra"]))
    rows.append(("loss", [], [], ["head.0/logits", "input:labels"], ["loss.0/loss"]))

    instances, base = [], 0
    for index, (segment, params, buffers, inputs, outputs) in enumerate(rows):
        names = [tuple(row) for row in (params, buffers, inputs, outputs)]
        instances.append(SegmentInstance(index, segment, *names, base, ""))
        base += int(SEGMENTS[segment].random)
    toy = Toy(_graph(model, instances, batch_size, dtype), model, num_blocks)
    if reads_buffer:
        toy.segments["norm"] = dataclasses.replace(SEGMENTS["norm"], body=norm_by_buffer)
    return toy


def _update_graph() -> torch.fx.GraphModule:
    """Of norm: (output, new mean)."""
    graph = torch.fx.Graph()
    mean, h = graph.placeholder("buffer_0"), graph.placeholder("input_0")
    decayed = graph.call_function(torch.ops.aten.mul.Scalar, (mean, 0.9))
    graph.output((h, graph.call_function(torch.ops.aten.add.Tensor, (decayed, h))))
    return torch.fx.GraphModule({}, graph)


def _graph(model: nn.Module, instances: list[SegmentInstance], batch_size: int, dtype: torch.dtype) -> ModelGraph:
    params = {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    values = {
        "input:ids": ValueInfo("input:ids", (batch_size, LENGTH), torch.int64, False),
        "input:ones": ValueInfo("input:ones", (batch_size, LENGTH), torch.int64, False),
        "input:labels": ValueInfo("input:labels", (batch_size, LENGTH), torch.int64, False),
    }
    example = make_batch(batch_size)
    env = {f"input:{n}": t for n, t in example.items()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for inst in instances:
            segment = SEGMENTS[inst.segment]
            outputs = segment.body(
                Comm(),
                [tensors[n] for n in inst.params],
                [tensors[n] for n in inst.buffers],
                [env[n] for n in inst.inputs],
                torch.zeros(4, dtype=torch.int64),
            )
            for name, tensor in zip(inst.outputs, outputs, strict=False):
                env[name] = tensor
                values[name] = ValueInfo(name, tuple(tensor.shape), tensor.dtype, tensor.dtype.is_floating_point)
    segments = {}
    for name, toy in SEGMENTS.items():
        first = next((inst for inst in instances if inst.segment == name), None)
        if first is None:
            continue
        empty = torch.fx.GraphModule({}, torch.fx.Graph())
        infos = [tensors[p] for p in first.params]
        segments[name] = Segment(
            name=name,
            joint=_update_graph() if toy.mutated else empty,
            forward=empty,
            param_shapes=tuple(tuple(p.shape) for p in infos),
            param_dtypes=tuple(p.dtype for p in infos),
            param_requires_grad=tuple(p.requires_grad for p in infos),
            num_buffers=len(first.buffers),
            mutated_buffers=toy.mutated,
            inputs=tuple(values[n] for n in first.inputs),
            outputs=tuple(values[n] for n in first.outputs),
            has_random=toy.random,
            structure_hash=name,
            is_prologue=toy.is_prologue,
        )
    return ModelGraph(
        name="toy",
        segments=segments,
        instances=instances,
        values=values,
        input_names=("input:ids", "input:ones", "input:labels"),
        params=params,
        buffers={n: (tuple(b.shape), b.dtype) for n, b in model.named_buffers()},
        tied={"head.weight": "emb.weight"} if model.head.weight is model.emb.weight else {},  # type: ignore[union-attr]
        loss="loss.0/loss",
        outputs=("head.0/logits",),
        batch_size=batch_size,
        batch_dims={"ids": 0, "ones": 0, "labels": 0},
    )


def make_batch(size: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, VOCAB, (size, LENGTH), generator=generator),
        "ones": torch.ones(size, LENGTH, dtype=torch.int64),
        "labels": torch.randint(0, VOCAB, (size, LENGTH), generator=generator),
    }


def segment_programs(toy: Toy, grid: RankGrid, batch_size: int) -> dict[str, SegmentProgram]:
    """What the passes would deliver: full recomputation, local shapes of this rank.

    A batch that does not divide over dp is run whole by every data-parallel rank.
    """
    if batch_size % grid.size("dp"):
        grid = dataclasses.replace(grid, sizes={**grid.sizes, "dp": 1}, coords={**grid.coords, "dp": 0})
    programs = {}
    metas = _local_metas(toy, grid, batch_size)
    for name in toy.graph.segments:
        programs[name] = _program(name, toy, grid, metas)
    return programs


def _cut(size: int, parts: int, index: int) -> int:
    step = -(-size // parts)
    return max(0, min(size, (index + 1) * step) - min(size, index * step))


def _local_metas(toy: Toy, grid: RankGrid, batch_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    rows = _cut(batch_size, grid.size("dp"), grid.coord("dp"))
    metas = {}
    for name, value in toy.graph.values.items():
        shape = (rows, *value.shape[1:]) if value.shape and value.shape[0] == toy.graph.batch_size else value.shape
        metas[name] = (tuple(shape), value.dtype)
    return metas


def _program(name: str, toy: Toy, grid: RankGrid, metas: dict) -> SegmentProgram:
    segment = toy.segments[name]
    inst = next(inst for inst in toy.graph.instances if inst.segment == name)
    num_params, num_buffers, num_inputs = len(inst.params), len(inst.buffers), len(inst.inputs)
    comm = Comm(grid)

    def split(args: tuple) -> tuple[list, list, list]:
        values = list(args)
        return values[:num_params], values[num_params : num_params + num_buffers], values[num_params + num_buffers :]

    def forward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        params, buffers, rest = split(args)
        inputs, key = rest[:num_inputs], rest[num_inputs]
        with torch.no_grad():
            outputs = segment.body(comm, params, buffers, inputs, key)
        return (*outputs, *inputs)

    def backward(*args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        params, buffers, rest = split(args)
        key, inputs, tangents = rest[0], rest[1 : 1 + num_inputs], rest[1 + num_inputs :]
        with torch.enable_grad():
            params = [p.detach().requires_grad_(g) for p, g in zip(params, segment.param_grads, strict=True)]
            inputs = [
                x.detach().requires_grad_(g) if x.is_floating_point() else x
                for x, g in zip(inputs, segment.grads, strict=True)
            ]
            outputs = segment.body(comm, params, buffers, inputs, key)
            wanted = [t for t in (*params, *inputs) if t.requires_grad]
            chosen = [outputs[slot] for slot in segment.tangents]
            found = iter(torch.autograd.grad(chosen, wanted, tangents, allow_unused=True))
        return tuple(next(found) if t.requires_grad else None for t in (*params, *inputs))

    def backward_inputs(*args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = backward(*args)
        return *grads[num_params:], *grads[:num_params]

    def backward_weights(*args: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return args[num_params + num_buffers + 1 :]

    dp = ("dp",) if grid.size("dp") > 1 else ()
    return SegmentProgram(
        name=name,
        forward=forward,  # type: ignore[arg-type]
        backward=backward if segment.tangents else None,  # type: ignore[arg-type]
        num_params=num_params,
        num_buffers=num_buffers,
        mutated_buffers=segment.mutated,
        num_inputs=num_inputs,
        num_outputs=len(inst.outputs),
        num_saved=num_inputs,
        tangent_outputs=segment.tangents,
        input_grads=segment.grads,
        param_grads=segment.param_grads,
        param_shards=segment.shards,
        grad_partial_axes=tuple((*dp, *(("tp",) if p else ())) for p in segment.partial_tp),
        output_meta=tuple(metas[n] for n in inst.outputs),
        input_meta=tuple(metas[n] for n in inst.inputs),
        split=SplitBackward(backward_inputs, backward_weights, reads_params=False),  # type: ignore[arg-type]
    )


def reference(
    toy: Toy, batch: dict[str, torch.Tensor], microbatch: int, *, step: int = 0, seed: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(loss, gradients, buffers) of the model in float64 on one process, over the same microbatches."""
    params = {n: p.detach().double().requires_grad_(p.requires_grad) for n, p in toy.model.named_parameters()}
    buffers = {n: b.detach().clone().double() for n, b in toy.model.named_buffers()}
    size = batch["ids"].shape[0]
    total = torch.zeros((), dtype=torch.float64)
    for k, start in enumerate(range(0, size, microbatch)):
        env = {f"input:{n}": t[start : start + microbatch] for n, t in batch.items()}
        for inst in toy.graph.instances:
            segment = toy.segments[inst.segment]
            key = torch.tensor([seed, step, k, inst.random_base])
            outputs = segment.body(
                Comm(), [params[n] for n in inst.params], [buffers[n] for n in inst.buffers],
                [env[n] for n in inst.inputs], key,
            )  # fmt: skip
            for slot, update in zip(segment.mutated, outputs[segment.num_outputs :], strict=True):
                buffers[inst.buffers[slot]] = update
            env.update(zip(inst.outputs, outputs, strict=False))
        weight = min(microbatch, size - start) / size
        total = total + env[toy.graph.loss] * weight
    trainable = {n: p for n, p in params.items() if p.requires_grad}
    found = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    grads = {n: g for n, g in zip(trainable, found, strict=True) if g is not None}
    return total.detach(), grads, buffers


def make_plan(
    toy: Toy,
    *,
    pp: int = 1,
    dp: int = 1,
    tp: int = 1,
    zero: int = 0,
    schedule: str = "1f1b",
    chunks: int = 1,
    microbatch: int = 4,
    count: int = 4,
    cuts: list[int] | None = None,
    extents: dict[str, int] | None = None,
) -> Plan:
    """cuts: how many instances (after the prologue) each stage takes; even where not given."""
    body = [inst.index for inst in toy.graph.instances if inst.segment != "prologue"]
    num_stages = pp * chunks
    if cuts is None:
        cuts = [len(body) * (s + 1) // num_stages - len(body) * s // num_stages for s in range(num_stages)]
    ranks = torch.arange(pp * dp * tp).view(pp, dp * tp)
    places = build_schedule(schedule, pp, count, chunks).stage_rank if pp > 1 else [0] * num_stages
    stages, start = [], 0
    for s, count_here in enumerate(cuts):
        stages.append(Stage(segments=body[start : start + count_here], ranks=ranks[places[s]].tolist()))
        start += count_here
    assert start == len(body)
    return Plan(
        hashes=Hashes(model="m", shapes="s", hardware="h", version="0"),
        workload={},
        hardware={"name": f"{pp * dp * tp}xCPU"},
        mesh=Mesh(pp=pp, dp=dp, tp=tp),
        microbatch=Microbatch(size=microbatch, count=count),
        schedule=Schedule(name=schedule, virtual_stages=chunks),
        stages=stages,
        placement_axes=["dp", "tp"],
        placements={},
        zero=zero,
        zero_extents=extents or {},
        memory_policy=MemoryPolicy(),
        predicted=Predicted(
            step_s=1.0,
            tokens_per_s_per_device=1.0,
            mfu=0.5,
            peak_bytes=[1] * num_stages,
            bubble_fraction=0.0,
            exposed_comm_s=0.0,
        ),
        certificate=Certificate(status="feasible", lower_bound_s=0.0, gap_fraction=0.0),
        planning_s=PlanningTime(capture=0.0, solve=0.0, total=0.0),
    )


def make_workload(toy: Toy, **changes: Any) -> Workload:
    dtype = toy.graph.params["emb.weight"][1]
    settings: dict[str, Any] = {
        "model": toy.model,
        "example_batch": make_batch(toy.graph.batch_size),
        "global_batch": 16,
        "optimizer": OptimizerSpec(name="SGD", factory=torch.optim.SGD, options={"lr": 0.1}, state_tensors=0),
        "precision": Precision(compute=dtype, master=torch.promote_types(dtype, torch.float32)),
    }
    return Workload(**{**settings, **changes})


def make_program(toy: Toy, plan: Plan, **changes: Any) -> Program:
    """changes: of the workload."""
    mesh = build_mesh(plan.mesh)
    grid = RankGrid.of(mesh)
    options = {name: changes.pop(name) for name in ("adopt", "values") if name in changes}

    def rebuild(shapes: dict[str, tuple[int, ...]]) -> dict[str, SegmentProgram]:
        return segment_programs(toy, grid, shapes["ids"][0])

    programs = segment_programs(toy, grid, plan.microbatch.size)
    compiled = Compiled(toy.graph, programs, rebuild)
    return Program(plan, compiled, make_workload(toy, **changes), mesh=mesh, **options)
