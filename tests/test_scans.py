"""Scans of state-space and linear-attention models of transformers: one operator each, split by samples and heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scan_models
import torch
from compared import assert_same_numbers, compared
from one_op import assert_same, one_op

from shardwright import api, tasks
from shardwright.ops.placement import P
from shardwright.profiler import scan_ops
from shardwright.profiler.work import op_work
from shardwright.profiler.workload import Workload

pytest.importorskip("transformers.models.qwen3_next")
B, T, H, G, N = 4, 6, 4, 2, 3  # samples, steps, heads, groups of heads, size of a state


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _operands(function: str, groups: int = G) -> list[object]:
    if function.startswith("mamba2"):
        tensors = [_draw(B, T, H, 5), _draw(B, T, H), -_draw(H).exp(), _draw(B, T, groups, N), _draw(B, T, groups, N),
                   _draw(H), _draw(H), None]  # fmt: skip
        options = {"chunk_size": 4, "dt_softplus": True, "dt_limit": (0.0, float("inf"))}
    elif function.startswith("mamba"):
        tensors = [_draw(B, H, T), _draw(B, H, T), -_draw(H, N).exp(), _draw(B, N, T), _draw(B, N, T), _draw(H),
                   _draw(B, H, T), None]  # fmt: skip
        options = {"delta_softplus": True}
    else:
        tensors = [_draw(B, T, groups, N), _draw(B, T, groups, N), _draw(B, T, H, 5), -_draw(B, T, H).exp(),
                   _draw(B, T, H).sigmoid(), None, None, None]  # fmt: skip
        options = {"chunk_size": 4, "use_qk_l2norm_in_kernel": True}
    return [*tensors, function, json.dumps(options)]


FUNCTIONS = ["mamba2:mamba2_chunk_scan", "mamba:mamba_selective_scan", "qwen3_next:torch_chunk_gated_delta_rule"]


@pytest.mark.parametrize(
    ("function", "groups"), [*((name, G) for name in FUNCTIONS), *((n, 1) for n in FUNCTIONS[::2])]
)
def test_a_scan_splits_by_samples_and_by_heads(function: str, groups: int) -> None:
    torch.manual_seed(0)
    operands = _operands(function, groups)
    forward = one_op(scan_ops.scan, *operands)
    backward = one_op(scan_ops.scan_backward, torch.randn_like(forward.whole[0]), *operands)
    for op in (forward, backward):
        strategies = op.strategies(2)
        assert len(strategies) == 3, "whole, by samples, by heads"
        for strategy in strategies:
            for one, whole in zip(op.sharded([strategy], {"dp": 2}), op.whole, strict=True):
                assert_same(one, whole)
    by_heads = backward.strategies(2)[-1]
    assert (P in by_heads.outputs) == (groups == 1 or function == FUNCTIONS[1]), "what all heads share gets a sum"
    assert op_work(backward.node).flops == 3 * op_work(forward.node).flops > 0


def test_a_plan_can_name_no_function_but_a_scan_of_transformers() -> None:
    for name in ("os:system", "mamba2:apply_mask_to_padding_states", "..os:mamba2_chunk_scan"):
        with pytest.raises(ValueError, match="no scan"):
            scan_ops.find(name)


def _workload(name: str) -> Workload:
    spec = f"{Path(scan_models.__file__)}:{name}"
    return tasks.check_workload({"model": spec, "kind": "factory", "global_batch": 4})


@pytest.mark.parametrize("name", scan_models.MODELS)
def test_the_graph_does_not_grow_with_the_sequence(name: str) -> None:
    counts = []
    for workload in (_workload(f"make_{name}"), _workload(f"long_{name}")):
        graph = api.capture_for_planning(workload)
        nodes = [node for segment in graph.segments.values() for node in segment.joint.graph.nodes]
        assert sum(node.target is scan_ops.scan for node in nodes) == 1
        counts.append(len(nodes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("name", "axis"), [("mamba2", "tp"), ("mamba", "dp"), ("qwen3_next", "dp")])
def test_the_program_gives_what_the_model_gives(name: str, axis: str, tmp_path: Path) -> None:
    force = {"pp": "1", "tp": "1", "dp": "1", axis: "2"}
    plan = api.plan(_workload(f"make_{name}"), "2xCPU", force=force)
    assert_same_numbers(compared(plan, tmp_path))
