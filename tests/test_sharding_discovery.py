"""The planner finds by itself what people found by hand: told by placements and by counts of collectives.

Each case gives a model and a cluster under which one known layout is right, and looks for what defines that layout.
"""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardwright import api
from shardwright.costmodel.model import CostModel
from shardwright.planner.interfaces import ShardingSolution
from shardwright.planner.sharding.sharder import Sharder
from shardwright.plans.axes import MeshShape
from shardwright.plans.document import Plan
from shardwright.profiler.capture import capture
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Precision, Workload

pytestmark = pytest.mark.usefixtures("shared_captures")

SMALL_DECODER = {"num_layers": 4, "hidden_size": 512, "intermediate_size": 1536, "num_heads": 8, "num_kv_heads": 8}
HOST = """
[[hosts]]
count = {count}
devices = "8xA100-SXM-40GB"
network_link = {{ name = "InfiniBand-HDR", gb_per_s = {gb_per_s}, latency_us = 10 }}
"""


def plan(model: str, hardware: str, **how) -> Plan:
    force = how.pop("force", {})
    return api.plan(load_workload(model, **how), hardware, force=force)


@cache
def decoder(hidden: int = 4096, seq_len: int = 2048) -> ModelGraph:
    """A Llama of two wide layers, which are one distinct block."""
    sizes = {"num_layers": 2, "hidden_size": hidden, "intermediate_size": 4 * hidden, "num_heads": 32}
    workload = load_workload("preset:llama-3-8b", global_batch=8, seq_len=seq_len, overrides=sizes)
    return api.capture_for_planning(workload)


def solved(graph: ModelGraph, hardware: str, tp: int, local_batch: int) -> tuple[ShardingSolution, Counter[str]]:
    """The solution and its collectives on the tensor axis by kind, summed over all instances."""
    sharder = Sharder(graph, CostModel(parse_hardware(hardware)))
    solution = sharder.solve(MeshShape.of({"tp": tp}), local_batch)
    return solution, collectives(sharder, (MeshShape.of({"tp": tp}), local_batch))


def collectives(sharder: Sharder, mesh: tuple[MeshShape, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    for instance in sharder.graph.instances:
        found.update(move.kind for move in sharder.moves[mesh][instance.segment] if move.axis == "tp")
    return found


def block_of(graph: ModelGraph) -> str:
    """The distinct segment with the most instances."""
    return Counter(i.segment for i in graph.instances).most_common(1)[0][0]


def on_tensor_axis(solution: ShardingSolution, segment: str, start: str) -> list[str]:
    return [texts[1] for key, texts in solution.placements[segment].items() if key.startswith(start)]


# --------------------------------------------------------------------------- data parallelism and ZeRO


def test_plain_data_parallelism_where_memory_is_plenty() -> None:
    found = plan("preset:gpt2", "8xA100-80GB", global_batch=512, seq_len=1024)
    assert (found.mesh.pp, found.mesh.dp, found.mesh.tp) == (1, 8, 1)
    assert found.zero < 3, "no parameter is gathered; the optimizer's work may be shared out"
    assert set(found.memory_policy.recompute.values()) == {"none"}
    params = [texts[0] for rows in found.placements.values() for key, texts in rows.items() if "param_grad" in key]
    assert params and set(params) == {"P"}, "each gradient is a sum over the data axis, once a step"


def test_parameters_are_sharded_over_the_data_axis_where_they_do_not_fit() -> None:
    """8 B parameters with their optimizer take 128 GB: more than a device has, little beside 64 of them."""
    found = plan("preset:llama-3-8b", "8x8xA100-40GB", global_batch=64, seq_len=4096)
    assert found.zero == 3 and found.mesh.dp >= 8 and found.mesh.pp == 1


@pytest.mark.parametrize(("gb_per_s", "inside"), [(1.0, True), (40.0, False)])
def test_state_is_split_inside_a_node_and_repeated_across_where_the_network_is_slow(
    gb_per_s: float, inside: bool, tmp_path: Path
) -> None:
    path = tmp_path / "hosts.toml"
    path.write_text(HOST.format(count=4, gb_per_s=gb_per_s))
    found = plan(
        "preset:llama-3.2-3b",
        str(path),
        global_batch=256,
        seq_len=2048,
        force={"pp": "1", "tp": "1", "zero": "3", "optimizer_state": "device"},
    )
    extents = found.zero_extents or {"parameters": 32}
    assert (extents["parameters"] == 8) is inside


# --------------------------------------------------------------------------- Megatron


def test_columns_then_rows_in_wide_layers() -> None:
    """Two products in each half of a block: the first by columns, the second by rows, one exchange each way."""
    graph = decoder(hidden=8192, seq_len=512)
    solution, found = solved(graph, "8xH100-80GB", tp=8, local_batch=1)
    name = block_of(graph)
    shapes = graph.segments[name].param_shapes
    places = {shape: solution.placements[name][f"param_{k}"][1] for k, shape in enumerate(shapes)}
    assert places[(8192, 32768)] == "S(1)", "down: rows"
    assert places[(32768, 8192)] == "S(0)", "gate and up: columns"
    exchanges = found["all_reduce"] + (found["all_gather"] + found["reduce_scatter"]) / 2 + found["all_to_all"]
    blocks = Counter(i.segment for i in graph.instances)[name]
    assert 4 * blocks <= exchanges <= 4 * blocks + 4, found  # two forward, two backward; embedding and head


def test_norms_run_on_shards_of_the_sequence_where_activations_weigh() -> None:
    graph = decoder()
    sharder = Sharder(graph, CostModel(parse_hardware("8xH100-80GB")))
    smallest = sharder.frontier(MeshShape.of({"tp": 8}), 4)[-1]
    fastest = sharder.frontier(MeshShape.of({"tp": 8}), 4)[0]
    name = block_of(graph)
    assert on_tensor_axis(smallest, name, "input_0")[0].startswith("S("), "the residual stream is split"
    assert smallest.costs[name].saved_bytes < 0.75 * fastest.costs[name].saved_bytes or (
        smallest.placements == fastest.placements
    )


def test_frontier_gets_slower_and_smaller() -> None:
    sharder = Sharder(decoder(), CostModel(parse_hardware("8xH100-80GB")))
    points = sharder.frontier(MeshShape.of({"tp": 8}), 1)
    assert len(points) > 1
    for fast, small in itertools.pairwise(points):
        assert fast.objective_s <= small.objective_s * (1 + 1e-9) and fast.weighed_bytes(1) > small.weighed_bytes(1)


def test_the_loss_is_taken_on_shards_of_the_vocabulary() -> None:
    """No rank holds, or gathers, all logits of a row: maxima and sums of rows are exchanged instead."""
    graph = decoder()
    sharder = Sharder(graph, CostModel(parse_hardware("8xH100-80GB")))
    solution, head = sharder.solve(MeshShape.of({"tp": 8}), 1), graph.instances[-1].segment
    logits = [t for k, t in solution.placements[head].items() if k.startswith("_log_softmax") and ">" not in k]
    assert logits and all("@log_softmax_cols" in axes[1] for axes in logits if "->" in axes[1])
    weight = [p for p, shape in enumerate(graph.segments[head].param_shapes) if len(shape) == 2]
    assert solution.placements[head][f"param_{weight[0]}"][1] == "S(0)"
    logits_bytes = 2048 * graph.segments[head].param_shapes[weight[0]][0] * 2.0
    assert all(move.full_bytes < logits_bytes / 8 for move in sharder.moves[(MeshShape.of({"tp": 8}), 1)][head])


# --------------------------------------------------------------------------- experts, and switching dimensions


def test_experts_are_split_over_the_axis() -> None:
    graph = api.capture_for_planning(
        load_workload("preset:mixtral-8x7b", global_batch=8, seq_len=2048, overrides={"num_layers": 2})
    )
    solution, _ = solved(graph, "8xH100-80GB", tp=8, local_batch=1)
    name = block_of(graph)
    experts = [k for k, shape in enumerate(graph.segments[name].param_shapes) if len(shape) == 3]
    assert len(experts) == 2
    assert {solution.placements[name][f"param_{k}"][1] for k in experts} == {"S(0)"}


class SpatialTemporalBlock(nn.Module):
    """Attention over the places of each frame, then over the frames of each place: [B, T, S, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.spatial, self.temporal = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.after_spatial, self.after_temporal = nn.Linear(width, width), nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def attend(self, x: torch.Tensor, qkv: nn.Linear, out: nn.Linear) -> torch.Tensor:
        b, s, c = x.shape
        q, k, v = qkv(x).view(b, s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, t, s, c = x.shape
        y = self.attend(self.norms[0](x).reshape(t, s, c), self.spatial, self.after_spatial)
        x = x + y.view(1, t, s, c)
        y = self.norms[1](x).reshape(t, s, c).transpose(0, 1)
        y = self.attend(y, self.temporal, self.after_temporal)
        return x + y.transpose(0, 1).reshape(1, t, s, c)


class VideoModel(nn.Module):
    def __init__(self, width: int = 256, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SpatialTemporalBlock(width, heads) for _ in range(layers))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            video = block(video)
        return video.square().mean()


def test_a_spatial_temporal_transformer_switches_the_dimension_that_is_split() -> None:
    """Dynamic sequence parallelism (Zhao et al. 2024, arXiv:2403.10266): frames split for the attention over places,
    places split for that over frames, an all-to-all between, and nothing gathered inside the blocks."""
    with torch.device("meta"):
        model = VideoModel()
    video = torch.empty(1, 64, 1024, 256, device="meta")
    workload = Workload(
        model, {"video": video}, global_batch=1, precision=Precision(*[torch.float32] * 3), name="video"
    )
    graph = capture(workload)
    solution, found = solved(graph, "8xA100-80GB", tp=8, local_batch=1)
    assert found["all_to_all"] >= 2, found
    large = 64 * 1024 * 256 * 4 / 2
    sharder = Sharder(graph, CostModel(parse_hardware("8xA100-80GB")))
    sharder.solve(MeshShape.of({"tp": 8}), 1)
    for moves in sharder.moves[(MeshShape.of({"tp": 8}), 1)].values():
        for move in moves:
            assert move.kind == "all_to_all" or move.full_bytes < large, move
    inputs = [n for n in solution.placements[block_of(graph)] if n.startswith("attention") and ">" not in n]
    assert inputs, "attention is one op"
