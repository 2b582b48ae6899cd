"""A backward in two parts computes what it computes in one, and nothing twice."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from captured import PRESETS, Recorded, graph_of, recorded
from matrix import cells
from torch import fx

from shardwright.passes.build import build_segment_program
from shardwright.passes.partition import partition
from shardwright.passes.program import SegmentProgram
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.shard import ShardContext, shard_segment
from shardwright.passes.split import split_backward
from shardwright.plans.placements import whole

aten = torch.ops.aten
HEAVY = {aten.mm, aten.addmm, aten.bmm, aten.convolution_backward, aten.embedding_dense_backward,
         torch.ops.shardwright.attention, torch.ops.shardwright.attention_backward}  # fmt: skip


def context_of(preset: str) -> ShardContext:
    return ShardContext((MeshAxis("tp", 1, 0, ""),), (whole(graph_of(preset)),), torch.device("cpu"))


def heavy_ops(graph: fx.Graph) -> Counter[Any]:
    packets = (getattr(node.target, "overloadpacket", None) for node in graph.nodes)
    return Counter(packet for packet in packets if packet in HEAVY)


def gradients(program: SegmentProgram, one: Recorded, *, apart: bool) -> tuple[list[Any], list[Any]]:
    """(of parameters, of inputs) on the recorded values."""
    held = {node.name: value for node, value in one.placeholders.items()}
    params, buffers, again, inputs, tangents = (
        [value.clone() for name, value in held.items() if name.startswith(kind)]
        for kind in ("param_", "buffer_", "buffer_", "input_", "tangent_")
    )
    key = held["key"]
    _, _, saved = program.run_forward(params, buffers, inputs, key)
    if not apart:
        return program.run_backward(params, again, key, saved, tangents)
    assert program.split is not None
    of_inputs, carried = program.run_backward_input(params, again, key, saved, tangents)
    sent = [None if grad is None else grad.clone() for grad in of_inputs]
    read = params if program.split.reads_params else [None] * len(params)
    of_params = program.run_backward_weight(read, again, key, carried)
    for grad, before in zip(of_inputs, sent, strict=True):
        assert grad is None or torch.equal(grad, before), "the second part wrote over what was sent"
    return of_params, of_inputs


@pytest.mark.parametrize("preset", cells(PRESETS, ["tiny-gpt2", "tiny-llama", "mlp", "tiny-unet", "tiny-mixtral"]))
def test_both_parts_give_the_gradients_of_the_whole(preset: str) -> None:
    for one in recorded(preset):
        program = build_segment_program(one.segment, context_of(preset), recompute=False, splits=True)
        if program.backward is None:
            continue
        apart, together = (gradients(program, one, apart=choice) for choice in (True, False))
        for found, expected in zip(itertools.chain(*apart), itertools.chain(*together), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


EVERY = [(preset, recompute) for preset in PRESETS for recompute in ("kept", "recomputed")]


@pytest.mark.parametrize(("preset", "recompute"), cells(EVERY, EVERY[::3]))
def test_no_op_of_weight_runs_in_both(preset: str, recompute: str) -> None:
    for segment in graph_of(preset).segments.values():
        joint = shard_segment(segment, context_of(preset))
        _, backward, _ = partition(joint, segment, recompute == "recomputed" and not segment.is_prologue)
        if backward is None:
            continue
        split = split_backward(backward, len(segment.param_shapes))
        assert heavy_ops(split.inputs.graph) + heavy_ops(split.weights.graph) == heavy_ops(backward.graph)


def test_weight_gradients_wait_for_the_second_part() -> None:
    block = max(recorded("tiny-llama"), key=lambda one: len(one.segment.param_shapes)).segment
    program = build_segment_program(block, context_of("tiny-llama"), recompute=False, splits=True)
    assert program.split is not None and not program.split.reads_params
    matrices = sum(len(shape) == 2 for shape in block.param_shapes)
    assert len(program.split.into_slots) == matrices > 0, "each is one product, written where it is summed"


def test_a_backward_that_recomputes_stays_whole() -> None:
    """Between its parts, all that was recomputed would be held, which no plan counts."""
    for segment in graph_of("tiny-llama").segments.values():
        program = build_segment_program(segment, context_of("tiny-llama"), recompute=True, splits=True)
        assert program.split is None or segment.is_prologue


def test_the_debug_switch_writes_the_graph_after_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWRIGHT_DUMP", str(tmp_path))
    preset = PRESETS[0]
    segment = next(one.segment for one in recorded(preset) if not one.segment.is_prologue)
    build_segment_program(segment, context_of(preset), recompute=False, splits=True)
    written = {path.name.removeprefix(f"{segment.name}."): path.read_text() for path in tmp_path.glob("rank0/*.py")}
    assert {
        "joint.0-shard.py", "forward.0-partition.py", "forward.2-tidy.py", "forward.3-reuse.py",
        "backward.0-partition.py", "backward.2-tidy.py", "backward.3-write_gradients.py", "backward.4-reuse.py",
        "backward_inputs.1-reuse.py", "backward_weights.1-write_gradients.py", "backward_weights.2-reuse.py",
    } <= set(written)  # fmt: skip
    assert all("def forward" in text for text in written.values()) and "torch.ops" in written["joint.0-shard.py"]
