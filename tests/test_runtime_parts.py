"""The runtime's pure parts against closed forms: shard arithmetic, flat layouts, batch cuts, wiring."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_toy import make_plan, make_toy, segment_programs

from shardwright.errors import ShardwrightError
from shardwright.runtime.batch import BatchPart, microbatch_sizes, shard_batch, split_part
from shardwright.runtime.mesh import RankGrid
from shardwright.runtime.shards import ShardLayout, chunk_bounds, shard_index
from shardwright.runtime.stage import grad_metas, value_metas
from shardwright.runtime.wiring import wire

sizes = st.integers(0, 13)
parts = st.integers(1, 5)


@given(sizes, parts)
def test_chunks_are_those_of_torch(size: int, count: int) -> None:
    expected = [len(piece) for piece in torch.arange(size).chunk(count)] if size else []
    found = [high - low for low, high in (chunk_bounds(size, count, k) for k in range(count))]
    assert found == expected + [0] * (count - len(expected))


@given(st.lists(sizes, min_size=1, max_size=3), st.lists(parts, max_size=2), st.lists(parts, max_size=2), st.data())
def test_shards_over_all_axes_cover_the_tensor_once(
    shape: list[int], tensor: list[int], state: list[int], data: st.DataObject
) -> None:
    """Axes that cut the same dimension each cut what those before left."""
    dims = [data.draw(st.sampled_from([None, *range(len(shape))])) for _ in tensor]
    seen = torch.zeros(shape, dtype=torch.int64)
    for coords in itertools.product(*map(range, tensor)):
        cuts = [(dim, cut) for dim, *cut in zip(dims, tensor, coords, strict=True) if dim is not None]
        for digits in itertools.product(*map(range, state)):
            seen[shard_index(shape, [*cuts, *((0, cut) for cut in zip(state, digits, strict=True))])] += 1
    copies = math.prod(size for dim, size in zip(dims, tensor, strict=True) if dim is None)
    assert bool((seen == copies).all())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(sizes, max_size=3), min_size=1, max_size=4), st.integers(1, 4))
def test_pack_then_unpack_gives_every_tensor_back(shapes: list[list[int]], num_ranks: int) -> None:
    named = {f"p{k}": tuple(shape) for k, shape in enumerate(shapes)}
    tensors = {name: torch.randn(shape) for name, shape in named.items()}
    layouts = [ShardLayout(named, num_ranks, rank) for rank in range(num_ranks)]
    buffer = torch.zeros(num_ranks * layouts[0].block_elements)
    for name, tensor in tensors.items():
        layouts[0].pack(buffer, name, tensor, add=False)
        layouts[0].pack(buffer, name, tensor, add=True)
    for name, tensor in tensors.items():
        assert torch.equal(layouts[0].unpack(buffer, name), 2 * tensor)
        pieces = [layout.shard(block, name) for layout, block in zip(layouts, buffer.view(num_ranks, -1), strict=True)]
        if tensor.dim():
            assert torch.equal(torch.cat(pieces), 2 * tensor)
        else:
            assert all(torch.equal(piece, 2 * tensor) for piece in pieces)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None)
def test_each_sample_is_in_one_microbatch_of_one_rank(global_size: int, per_rank: int, dp: int) -> None:
    microbatch = per_rank * dp
    rows_last = torch.arange(2)[:, None] + torch.arange(global_size) * 2
    batch = {"x": torch.arange(global_size), "y": rows_last, "shared": torch.arange(global_size)}
    dims = {"x": 0, "y": 1}
    split = []
    for rank in range(dp):
        part = shard_batch(batch, dims, microbatch, dp, rank)
        split.append(split_part(part, dims, microbatch, dp, rank) if len(part["x"]) else None)
    assert all(torch.equal(p.tensors["y"][0], 2 * p.tensors["x"]) for rows in split if rows for p in rows)
    assert all(torch.equal(p.tensors["shared"], batch["shared"]) for rows in split if rows for p in rows)
    order: list[int] = []
    counts = microbatch_sizes(global_size, microbatch, dp)
    assert sum(counts) == global_size and all(size % dp == 0 or size < dp for size in counts)
    for k in range(len(counts)):
        for rows in split:
            order += rows[k].tensors["x"].tolist() if rows else []
    assert order == list(range(global_size))


def test_a_part_that_was_cut_otherwise_is_refused() -> None:
    with pytest.raises(ShardwrightError, match="3 samples where 4"):
        split_part(BatchPart({"x": torch.arange(3)}, 8), {"x": 0}, 8, 2, 0)


def _wiring(cuts: list[int], outputs: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
    toy = make_toy(num_blocks=3)
    programs = segment_programs(toy, RankGrid.of(None), 4)
    plan = make_plan(toy, pp=len(cuts), cuts=cuts)
    return wire(toy.graph, programs, [s.segments for s in plan.stages], [range(len(cuts))], outputs=outputs)


def test_the_live_set_of_each_cut_is_relayed() -> None:
    stages = _wiring([2, 1, 1, 3]).stages  # embed, block | block | block | norm, head, loss
    assert stages[0].sends == stages[1].receives == ("embed.0/h", "embed.0/tag", "block.0/h")
    assert stages[1].sends == ("embed.0/h", "embed.0/tag", "block.1/h")
    assert stages[2].sends == ("block.2/h",)  # the skip and the tag have no user behind the blocks
    assert stages[1].grad_sends == ("embed.0/h", "block.0/h")  # an integer has no gradient
    assert stages[0].grad_receives == stages[1].grad_sends


def test_every_stage_runs_the_prologue_that_it_needs() -> None:
    stages = _wiring([2, 1, 1, 3]).stages
    assert [0 in stage.instances for stage in stages] == [True, True, True, False]


def test_values_are_freed_after_their_last_use() -> None:
    (stage,) = _wiring([7]).stages
    freed = dict(zip(stage.instances, stage.frees, strict=True))
    assert set(freed[4]) == {"embed.0/h", "embed.0/tag", "block.1/h", "prologue.0/pos"}
    assert set(freed[6]) == {"norm.0/h", "head.0/extra"}


def test_outputs_for_evaluation_reach_the_last_stage() -> None:
    plain, full = _wiring([5, 2]), _wiring([5, 2], outputs=("block.0/h",))
    assert plain.stages[0].sends == ("norm.0/h",)
    assert full.stages[0].sends == ("block.0/h", "norm.0/h")
    assert full.outputs == ("block.0/h",)


def test_gradients_may_be_sharded_unlike_their_values() -> None:
    toy = make_toy()
    programs = segment_programs(toy, RankGrid.of(None), 4)
    assert grad_metas(toy.graph, programs)["block.0/h"] == ((4, 3, 6), torch.float64)
    programs["block"] = dataclasses.replace(programs["block"], tangent_meta=(((2, 3, 6), torch.float64),))
    assert grad_metas(toy.graph, programs)["block.0/h"] == ((2, 3, 6), torch.float64)
    assert value_metas(toy.graph, programs)["block.0/h"] == ((4, 3, 6), torch.float64)
