"""Programs built for cuda:1 on fake tensors, and ops that the planned device has no kernel for."""

from __future__ import annotations

import inspect

import pytest
import torch
from captured import PRESETS, graph_of
from torch import nn

from shardwright import api
from shardwright.costmodel.model import CostModel
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.passes import _torch
from shardwright.passes.build import build_segment_program
from shardwright.passes.device_kernels import missing_kernels
from shardwright.passes.redistribute import MeshAxis
from shardwright.passes.shard import ShardContext
from shardwright.planner.sharding.sharder import Sharder
from shardwright.plans.axes import MeshShape, placement_axes
from shardwright.plans.placements import read_placements
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.workload import Workload

DEVICE = torch.device("cuda", 1)
aten = torch.ops.aten


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_built_for_one_gpu_puts_no_tensor_elsewhere(preset):
    graph = graph_of(preset)
    solution = Sharder(graph, CostModel(parse_hardware("1xH100"))).solve(MeshShape.of(), 6)
    axes = tuple(MeshAxis("", 1, 0, "") for _ in placement_axes(MeshShape.of()))
    context = ShardContext(axes, tuple(read_placements(solution.placements, len(axes))), DEVICE)
    for segment in graph.segments.values():
        program = build_segment_program(segment, context, recompute=False)
        for graph_module in filter(None, (program.forward, program.backward)):
            for node in graph_module.graph.nodes:
                for tensor in tensors_of(node.meta.get("val")):
                    assert tensor.device == DEVICE, f"{segment.name}: {node.format_node()}"
                for value in (*node.args, *node.kwargs.values()):
                    assert not isinstance(value, torch.device) or value == DEVICE
    for device_type in ("cpu", "cuda"):
        assert not missing_kernels(graph, device_type, of_this_build=False)
    assert not missing_kernels(graph, "cpu", of_this_build=True)


@pytest.mark.parametrize(
    "op,cpu,cuda",
    [
        (aten.mkldnn_rnn_layer.default, True, False),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, True, False),
        (aten.histogram.bin_ct, True, False),
        (aten._thnn_fused_lstm_cell.default, False, True),
        (aten.add.Tensor, True, True),  # generated from one inner loop
        (aten.silu_backward.default, True, True),  # by way of its out variant
        (aten.clone.default, True, True),  # composed of others
        (aten.matmul.default, True, True),  # no kernel of its own on any
    ],
)
def test_pytorchs_own_list_tells_which_ops_a_gpu_lacks_without_one(op, cpu, cuda):
    assert _torch.has_kernel(op, "cpu", of_this_build=False) == cpu
    assert _torch.has_kernel(op, "cpu", of_this_build=True) == cpu
    assert _torch.has_kernel(op, "cuda", of_this_build=False) == cuda


@torch.library.custom_op("test_device_kernels::only_cpu", mutates_args=(), device_types="cpu")
def only_cpu(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@torch.library.custom_op("test_device_kernels::only_cuda", mutates_args=(), device_types="cuda")
def only_cuda(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


for op in (only_cpu, only_cuda):
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, grad: grad)


class Net(nn.Module):
    def __init__(self, op) -> None:
        super().__init__()
        self.layer, self.op = nn.Linear(4, 4), op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self.layer(x))


def workload_with(op) -> Workload:
    example = {"x": torch.zeros(4, 4)}
    return Workload(Net(op), example, global_batch=4, batch_size=4, loss=lambda output, batch: output.square().mean())


LINE_OF_CALL = inspect.getsourcelines(Net.forward)[1] + 1


def test_an_op_without_a_kernel_is_refused_at_build_with_its_line():
    plan = api.plan(workload_with(only_cuda), "1xCPU")  # how a user's op was compiled elsewhere is not known here
    with pytest.raises(ShardwrightError, match=r"test_device_kernels.only_cuda.default, which has no kernel") as caught:
        api.build(plan, workload_with(only_cuda))
    assert f"{__file__}:{LINE_OF_CALL}" in caught.value.what
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_MODEL and "register_kernel" in caught.value.works
    assert api.build(api.plan(workload_with(only_cpu), "1xCPU"), workload_with(only_cpu)).device.type == "cpu"
    graph = api.capture_for_planning(workload_with(only_cpu))
    (missing,) = missing_kernels(graph, "cuda", of_this_build=True)
    assert missing.op == "test_device_kernels.only_cpu.default" and missing.source == f"{__file__}:{LINE_OF_CALL}"


def test_an_op_that_pytorch_has_on_cpus_alone_is_refused_when_a_gpu_is_planned_for(monkeypatch):
    monkeypatch.setattr(_torch, "_listed_kernels", lambda: {"aten::tanh": frozenset({"CPU"})})
    with pytest.raises(ShardwrightError, match=r"runs aten.tanh.default, which has no kernel for cuda") as caught:
        api.plan(workload_with(torch.tanh), "1xH100")
    assert f"{__file__}:{LINE_OF_CALL}" in caught.value.what
    assert api.plan(workload_with(torch.tanh), "1xCPU").mesh.num_devices == 1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def test_a_recurrent_layer_has_kernels_on_a_gpu_and_costs_its_steps():
    example = {"x": torch.zeros(4, 100, 4)}
    loss = lambda output, batch: output.square().mean()  # noqa: E731
    graph = api.capture_for_planning(Workload(Recurrent(), example, global_batch=4, batch_size=4, loss=loss))
    assert not missing_kernels(graph, "cuda", of_this_build=False)
    model = CostModel(parse_hardware("1xH100"))
    solved = Sharder(graph, model).solve(MeshShape.of(), 4)
    launch_s = model.table.get("launch_s", "gpu")
    assert solved.objective_s > 100 * (12 + 24) * launch_s, "a kernel waits for the one of the step before"
