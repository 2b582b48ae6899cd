"""Recomputation against PyTorch's partitioner and per-block checkpointing, on the same joint graphs.

    python benchmarks/memory.py [--only gpt2] [--write]

Ours are the choices that a search makes on one device (planner/memory/options.py, then fewest.py), under ever lower
limits of memory: the first that is measured to need no more than theirs. Theirs are torch's min-cut partitioner at
several values of activation_memory_budget (runtime estimated by FLOPs), and checkpointing of each block: full, of every
second block, and selective in that products and attention are kept, or every second product is.

The model is captured once; its segments' joint graphs, put one behind the other, are the joint graph that is
partitioned. Every step runs op by op in the same interpreter. Peak: of live tensors beyond parameters, batch and
gradients of parameters. Recomputed: FLOPs of the step by torch.utils.flop_counter less those of a step that keeps
everything. --write puts the table into benchmarks/results/memory.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from memory_graphs import (
    Model,
    Segments,
    Whole,
    build_model,
    counted_flops,
    measured_peak,
    rewrite,
    run_pair,
    whole_graph,
)
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

from shardwright.costmodel.model import CostModel
from shardwright.planner.memory.fewest import fewest_seconds
from shardwright.planner.memory.options import again_seconds, ladders
from shardwright.planner.memory.rank_bytes import quick_peaks
from shardwright.planner.search.stage_recompute import recomputation
from shardwright.planner.sharding.sharder import Sharder
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import KEPT, levels_of
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape
from shardwright.profiler.capture import capture
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Workload
from shardwright.units import format_bytes

RESULTS = Path(__file__).parent / "results" / "memory.md"
BUDGETS = (0.2, 0.35, 0.5, 0.65, 0.8)
BATCH, WARM, REPEATS = 1, 1, 2
LIMITS = 80  # of memory, for which ours are asked
aten = torch.ops.aten
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gpt2": ("preset:gpt2", 512, {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 2048}),
    "llama": (
        "preset:llama-3.2-1b",
        512,
        {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048},
    ),
    "bert": (
        "preset:bert-base",
        512,
        {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
         "vocab_size": 2048},
    ),
    "vit": (
        "preset:vit-b",
        512,
        {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
         "image_size": 352},
    ),
}  # fmt: skip


# ---------------------------------------------------------------------- theirs


@dataclass
class Step:
    """A way to run a step, and what was measured of it. again: FLOPs recomputed."""

    name: str
    run: Callable[[], float]
    peak: int = 0
    flops: int = 0
    seconds: float = 0.0
    loss: float = field(default=0.0)


def _budget(whole: Whole, budget: float) -> tuple[fx.GraphModule, fx.GraphModule]:
    settings = {
        "activation_memory_budget": budget,
        "activation_memory_budget_runtime_estimator": "flops",
        "activation_memory_budget_solver": "dp",
        "is_non_builtin_to_include": True,  # attention is an op of ours: to be weighed as others are
    }
    return _min_cut(copy.deepcopy(whole.module), whole, settings)


def _min_cut(module: fx.GraphModule, whole: Whole, settings: dict[str, Any]) -> Any:
    given = list(range(len(whole.inputs) - 1))
    with functorch_config.patch(settings):
        return min_cut_rematerialization_partition(
            module, whole.inputs, num_fwd_outputs=1, static_lifetime_input_indices=given
        )


def _checkpointed(whole: Whole, model: Model, policy: Callable[[fx.Node, int], bool]) -> Any:
    """policy: (node of a forward, number of its block among the repeated ones) to whether it is made again."""
    module = copy.deepcopy(whole.module)
    counts = [i.segment for i in model.trained]
    repeated = {i.index for i in model.trained if counts.count(i.segment) > 1}
    number = {index: k for k, index in enumerate(sorted(repeated))}
    for node in module.graph.nodes:
        block = whole.block_of.get(node.name)
        if block not in number:
            continue
        again = policy(node, number[block])
        leaves = any(whole.block_of.get(user.name, block) != block for user in node.users)
        kept = leaves or not again
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["ac_graph_id"] = block
    return _min_cut(module, whole, {"is_non_builtin_to_include": True})


def _is_product(node: fx.Node) -> bool:
    return node.target in (aten.mm.default, aten.bmm.default, aten.addmm.default)


def _keeps_products(node: fx.Node, block: int) -> bool:
    source = node.args[0] if "getitem" in node.name and isinstance(node.args[0], fx.Node) else node
    return not (_is_product(source) or "attention" in str(source.target))


class _EverySecondProduct:
    """As torchtitan's selective checkpointing by op: every second matrix product runs again, attention does not."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def __call__(self, node: fx.Node, block: int) -> bool:
        if _is_product(node):
            self.seen[block] = self.seen.get(block, 0) + 1
            return self.seen[block] % 2 == 0
        return _keeps_products(node, block)


def their_steps(model: Model, whole: Whole) -> Iterator[Step]:
    ways: dict[str, Callable[[], Any]] = {
        **{f"min-cut, budget {budget}": lambda budget=budget: _budget(whole, budget) for budget in BUDGETS},
        "every block": lambda: _checkpointed(whole, model, lambda node, block: True),
        "every second block": lambda: _checkpointed(whole, model, lambda node, block: block % 2 == 0),
        "blocks but products": lambda: _checkpointed(whole, model, _keeps_products),
        "blocks but every second product": lambda: _checkpointed(whole, model, _EverySecondProduct()),
    }
    for name, make in ways.items():
        forward, backward = make()
        flops = counted_flops(forward, backward)
        outputs: Any = forward.graph.output_node().args[0]
        rewrite(forward, backward, [node.name for node in outputs[1:]])
        yield Step(name, lambda f=forward, b=backward: run_pair(whole, f, b), flops=flops)  # type: ignore[misc]


# ---------------------------------------------------------------------- ours


class Ours:
    """What a search would recompute on one device, under ever lower limits of memory."""

    def __init__(self, model: Model, batch: int, workload: Workload, hardware: str) -> None:
        cluster = parse_hardware(hardware)
        self.setting = Setting(model.graph, cluster, CostModel(cluster), workload)
        (solution,) = Sharder(model.graph, self.setting.cost_model).frontier(MeshShape.of({}), batch)[:1]
        (self.ladder,) = ladders(self.setting.shape, [solution], "auto")
        self.segments = Segments(model, self.setting.shape, solution)
        self.candidate = Candidate(MeshShape.of({}), batch, 1, "1f1b", 1, 0)
        self.bounds = (0, len(self.setting.shape.segments))
        self.ways = self._ways()
        self._peaks: dict[tuple[int, ...], int] = {}

    def _ways(self) -> list[tuple[int, ...]]:
        """From that which recomputes least."""
        setting, solution = self.setting, self.ladder.solution
        chains = [setting.chain(solution, rung) for rung in self.ladder.rungs]
        predicted = [quick_peaks(setting, self.candidate, chain, self.bounds).max() for chain in chains]
        found: dict[tuple[int, ...], float] = {}
        for limit in np.linspace(max(predicted), min(predicted), LIMITS):
            setting.memory_limit_bytes = int(limit) + 1
            setting.forget()
            rung = recomputation(setting, self.candidate, self.ladder, self.bounds)
            assert rung is not None
            recompute = fewest_seconds(setting, self.candidate, self.ladder, self.bounds, rung)
            found[levels_of(setting.shape, recompute)] = again_seconds(setting.shape, solution, recompute)
        return sorted(found, key=lambda levels: found[levels])

    def _peak(self, levels: tuple[int, ...]) -> int:
        if levels not in self._peaks:
            self._peaks[levels] = measured_peak(lambda: self.segments.run(levels))
        return self._peaks[levels]

    def within(self, peak: int) -> Step | None:
        """The first whose measured peak is no more, where peaks fall from each to the next."""
        low, high = 0, len(self.ways)
        while low < high:
            middle = (low + high) // 2
            if self._peak(self.ways[middle]) <= peak:
                high = middle
            else:
                low = middle + 1
        if low == len(self.ways):
            return None
        levels = self.ways[low]
        return Step(
            f"choice {low + 1} of {len(self.ways)}",
            lambda: self.segments.run(levels),
            self._peak(levels),
            self.segments.flops(levels),
        )


# ---------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    model: str
    theirs: Step
    ours: Step | None

    @property
    def fewer(self) -> float:
        """Share of their recomputed FLOPs that we do not."""
        assert self.ours is not None
        return 1.0 - self.ours.flops / self.theirs.flops if self.theirs.flops else float(self.ours.flops <= 0) - 1.0

    def cells(self) -> list[str]:
        theirs, ours = self.theirs, self.ours
        cells = [self.model, theirs.name, format_bytes(theirs.peak), f"{theirs.flops / 1e9:.2f}"]
        if ours is None:
            return [*cells, "-", "-", "none so small", "-"]
        fewer = f"{-100 * self.fewer:+.0f} %" if theirs.flops else "0 %" if not ours.flops else "more"
        ratio = f"{ours.seconds / theirs.seconds:.2f}" if theirs.seconds else ""
        return [*cells, format_bytes(ours.peak), f"{ours.flops / 1e9:.2f}", fewer, ratio]


def time_steps(steps: list[Step]) -> None:
    """CPU seconds: the least of some runs, in turn."""
    for turn in range(WARM + REPEATS):
        for step in steps:
            began = time.process_time()
            step.run()
            spent = time.process_time() - began
            if turn >= WARM:
                step.seconds = spent if not step.seconds else min(step.seconds, spent)


def rows_of(name: str, hardware: str, *, times: bool) -> Iterator[Row]:
    spec, length, overrides = MODELS[name]
    length_of = {} if name == "vit" else {"seq_len": length}
    workload = load_workload(
        spec, global_batch=BATCH, batch_size=BATCH, precision="fp32", overrides=overrides, **length_of
    )
    model = build_model(workload, capture(workload), BATCH)
    whole = whole_graph(model)
    ours = Ours(model, BATCH, workload, hardware)
    nothing = (KEPT,) * len(ours.setting.shape.segments)
    needed, loss = counted_flops(whole.module), ours.segments.run(nothing)
    for step in their_steps(model, whole):
        step.peak, step.flops = measured_peak(step.run), step.flops - needed
        best = ours.within(step.peak)
        if best is not None:
            best.flops -= needed
            if times:
                time_steps([step, best])
            assert abs(best.run() - loss) < 1e-4 * abs(loss)
        assert abs(step.run() - loss) < 1e-4 * abs(loss)
        yield Row(name, step, best)


def written(rows: list[Row]) -> str:
    with_theirs = [row for row in rows if row.ours is not None and row.theirs.flops]
    fewer = sum(row.fewer for row in with_theirs) / len(with_theirs)
    ours, theirs = (sum(getattr(row, side).flops for row in with_theirs) for side in ("ours", "theirs"))
    more = [row for row in rows if row.ours is None or row.ours.flops > row.theirs.flops]
    timed = sorted(row.ours.seconds / row.theirs.seconds for row in rows if row.ours is not None and row.theirs.seconds)
    lines = [
        "# Recomputation against PyTorch's partitioner and per-block checkpointing",
        "",
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores that were "
        f"shared, one thread, PyTorch {torch.__version__}, by benchmarks/memory.py,",
        f"which says what is measured. Four blocks of width 256, {BATCH} sample of 512 tokens, fp32.",
        "",
        f"Of {len(rows)} rows ours recomputes no more in {len(rows) - len(more)}, more in {len(more)}. Where theirs "
        f"recomputes, ours recomputes {100 * fewer:.0f} % fewer FLOPs",
        f"in the mean of rows, {100 * (1 - ours / theirs):.0f} % fewer in sum."
        + (
            f" Its step takes {timed[len(timed) // 2]:.2f} of theirs in the median, at most {timed[-1]:.2f}."
            if timed
            else ""
        ),
        "",
        "| model | theirs | peak | GFLOP again | our peak | GFLOP again | ours over theirs | CPU step over theirs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *("| " + " | ".join(row.cells()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--hardware", default="1xCPU", help="whose seconds order our choices")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--write", action="store_true", help="the table into benchmarks/results")
    args = parser.parse_args()
    rows: list[Row] = []
    for name in [args.only] if args.only else MODELS:
        for row in rows_of(name, args.hardware, times=not args.no_times):
            rows.append(row)
            print(" | ".join(row.cells()), flush=True)
    if args.write:
        RESULTS.write_text(written(rows))


if __name__ == "__main__":
    main()
