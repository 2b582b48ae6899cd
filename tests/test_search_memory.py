"""What a rank holds: ZeRO's table, repeated parameters, in-flight activations of the order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planner_fakes import Case, Sizes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright.costmodel import memory
from shardwright.costmodel.activation_memory import peak_memory
from shardwright.costmodel.memory import StageState, StateBytes
from shardwright.errors import ShardwrightError
from shardwright.planner.memory.rank_bytes import cached_schedule, in_flight_profiles, quick_peaks, rank_breakdown
from shardwright.planner.search.step_time import find_cuts, stage_times
from shardwright.planner.space.candidates import Candidate
from shardwright.planner.stages.chain import NOTHING, whole_segments
from shardwright.planner.stages.setting import Setting
from shardwright.plans.axes import MeshShape
from shardwright.profiler.workload import OptimizerSpec, Precision

MIXED = StateBytes(compute=2, master=4, reduce=4, state_tensors=2, single_copy=False)
SINGLE = StateBytes(compute=4, master=4, reduce=4, state_tensors=2, single_copy=True)
STAGE = StageState(1000, 800, 10, 100)


def held(kinds=MIXED, dp=4, zero=0, m=8, kind="gpu"):
    return memory.state_memory(STAGE, kinds, dp, zero, m, kind)


@pytest.mark.parametrize(
    ("zero", "parameters", "gradients", "optimizer"),
    [(0, 2000, 3200, 9600), (1, 2000, 3200 + 800, 2400), (2, 2000, 800, 2400), (3, 500, 800, 2400)],
)
def test_zero_shards_one_more_kind_of_state_at_each_stage(zero, parameters, gradients, optimizer):
    found = held(zero=zero)
    assert (found.parameters, found.gradients, found.optimizer) == (parameters, gradients, optimizer)
    assert found.step_gradients == (3200 if zero == 0 else 800)


def test_where_master_and_compute_type_are_one_the_parameters_are_the_optimizers_copy():
    assert [held(SINGLE, zero=zero).parameters for zero in range(4)] == [4000, 4000, 4000, 1000]
    assert [held(SINGLE, zero=zero).optimizer for zero in range(4)] == [6400, 1600, 1600, 1600]


def test_one_data_parallel_rank_shards_nothing():
    assert held(dp=1, zero=3) == held(dp=1, zero=0)


def test_uneven_shards_are_rounded_up():
    state = StageState(10, 10, 0, 10)
    assert memory.state_memory(state, MIXED, 4, 1, 2, "gpu").optimizer == 3 * 3 * 4


def test_one_rank_and_one_microbatch_keep_gradients_in_the_compute_type():
    assert held(dp=1, m=1).gradients == 1600 and held(dp=1, m=2).gradients == 3200
    assert held(dp=1, m=1).step_gradients == 1600 + 3200  # and turn them into the master type for the step


def test_the_optimizer_step_counts_where_it_needs_more_than_the_pipeline():
    small, large = (
        memory.rank_items(
            [held(dp=1, m=1)],
            activation_bytes=act,
            beside={"workspace": 5},
            communication_bytes=7,
            device_kind="cpu",
            num_groups=1,
        )
        for act in (100, 9000)
    )
    assert small["activations"] == 0 and small["workspace"] == 3200 and small["gradients"] == 4800
    assert large["activations"] == 9000 and large["workspace"] == 5 and large["gradients"] == 1600
    assert memory.reserve_bytes("gpu", 2) > memory.reserve_bytes("gpu", 1) > 0 == memory.reserve_bytes("cpu", 9)


def test_what_one_stage_at_a_time_needs_is_not_added_up_over_the_chunks_of_a_rank():
    one, two = (
        memory.rank_items(
            [held(zero=3)] * count,
            activation_bytes=10**6,
            beside={"workspace": 7, "gathered_parameters": 400},
            communication_bytes=0,
            device_kind="cpu",
            num_groups=1,
        )
        for count in (1, 2)
    )
    assert one["gathered_parameters"] == two["gathered_parameters"] == 400
    assert two["parameters"] == 2 * one["parameters"] and two["optimizer"] == 2 * one["optimizer"]


def setting_of(case: Case) -> Setting:
    return Setting(case.graph, case.cluster, case.cost_model, case.workload)


@pytest.mark.parametrize(
    ("schedule", "pp", "m", "v"),
    [
        ("gpipe", 4, 6, 1),
        ("1f1b", 4, 6, 1),
        ("interleaved_1f1b", 2, 6, 3),
        ("chimera", 4, 6, 1),
        ("bitpipe", 2, 30, 2),
        ("1f1b_2bp", 2, 30, 1),
        ("breadth_first", 2, 30, 2),
    ],
)
def test_profiles_and_the_simulated_order_agree_on_activations(schedule, pp, m, v):
    case = Case(Sizes(layers=10), "4xCPU", 6)
    setting = setting_of(case)
    candidate = Candidate(MeshShape.of({"pp": pp}), 1, m, schedule, v, 0)
    chain = setting.chain(case.sharder.solve(MeshShape.of(), 1), NOTHING)
    cuts = find_cuts(setting, candidate, chain, ignore_memory=True)
    order = cached_schedule(schedule, pp, m, v)
    peaks, _ = peak_memory(order.ranks, stage_times(setting, candidate, chain, cuts.bounds))
    quick = quick_peaks(setting, candidate, chain, cuts.bounds)
    for rank in range(pp):
        items = rank_breakdown(setting, candidate, chain, cuts.bounds, rank)
        assert items["activations"] == pytest.approx(peaks[rank], abs=1)
        assert sum(items.values()) <= quick[rank] + 20
        assert sum(items.values()) >= 0.97 * quick[rank]


def test_a_roll_back_of_the_step_keeps_parameters_and_state():
    kept = StateBytes(compute=2, master=4, reduce=4, state_tensors=2, single_copy=False, kept_tensors=3)
    for zero, elements in ((0, 800), (1, 200)):
        assert held(kept, zero=zero).step_temporaries - held(zero=zero).step_temporaries == 3 * 4 * elements


def test_profiles_hold_the_closed_forms():
    assert [p.tolist() for p in in_flight_profiles("1f1b", 3, 8, 1)] == [[[3]], [[2]], [[1]]]
    rows = in_flight_profiles("interleaved_1f1b", 4, 16, 2)
    assert [int(p.sum(axis=1).max()) for p in rows] == [2 * (4 - r - 1) + 4 + 1 for r in range(4)]


def test_a_tied_weight_is_held_once_by_a_stage_that_reads_it_twice():
    tied, loose = (Case(Sizes(layers=4, tied=t), "4xCPU", 4) for t in (True, False))
    elements = []
    for case in (tied, loose):
        chain = setting_of(case).chain(case.sharder.solve(MeshShape.of(), 1), NOTHING)
        n = chain.num_instances
        elements.append((chain.param_of[0, n], chain.param_of[0, n - 1] + chain.param_of[n - 1, n]))
    assert elements[0][0] == elements[1][0] - 1000 * 64
    assert elements[0][1] == elements[1][1]  # on two stages it is held twice


def test_recomputation_trades_saved_bytes_for_workspace_and_time():
    case = Case(Sizes(layers=6), "4xCPU", 4)
    setting, solution = setting_of(case), case.sharder.solve(MeshShape.of(), 2)
    kept, again = (
        setting.chain(solution, NOTHING),
        setting.chain(solution, whole_segments(setting.shape, solution, ["block"])),
    )
    assert again.activation_bytes.sum() < 0.5 * kept.activation_bytes.sum()
    assert again.backward_s.sum() == pytest.approx(kept.backward_s.sum() + kept.forward_s[1:-1].sum())
    assert (again.written_workspace_bytes[1:-1] > kept.written_workspace_bytes[1:-1]).all()


def test_prologue_work_is_rerun_by_the_stages_that_need_it_and_never_sent():
    case = Case(Sizes(layers=4), "4xCPU", 4)
    chain = setting_of(case).chain(case.sharder.solve(MeshShape.of(), 1), NOTHING)
    assert chain.prologue_of(0, 1) == [] and chain.prologue_of(1, 3) == [0]
    hidden = 128 * 64 * 2
    assert np.allclose(chain.cut_forward_bytes, [0, hidden, hidden, hidden, hidden, hidden, 0])


def test_state_bytes_follow_the_precision():
    kinds = StateBytes.of(Precision(torch.float64, torch.float64, torch.float64), 1)
    assert kinds == StateBytes(8, 8, 8, 1, True, True)
    assert not StateBytes.of(Precision(grad_reduce=torch.bfloat16), 2).reduces_in_master


class _Made(TorchDispatchMode):
    """Counts the tensors of one size that ops make anew."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(arg.alias_info and arg.alias_info.is_write for arg in func._schema.arguments):
            self.count += sum(t.numel() == self.numel for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_what_a_step_allocates_is_what_is_counted(factory, options):
    """A fused update makes nothing of a parameter's size; a foreach update of Adam one tensor for each parameter."""
    spec = OptimizerSpec("", factory, options)
    parameters = [torch.nn.Parameter(torch.randn(37)) for _ in range(3)]
    optimizer = factory(parameters, lr=0.1, **({**options, "fused": True} if spec.is_fused else options))
    for _ in range(2):  # the first step makes the state
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with _Made(37) as made:
            optimizer.step()
    assert made.count == spec.step_tensors * len(parameters)


def test_a_fused_step_fits_where_a_foreach_step_does_not():
    """8 B parameters take 2 + 2 + 12 bytes each, and 4 in the gradient that the step reads: 149.6 GiB of 155."""
    sizes = Sizes(32, 4096, 14336, 1024, 128256, 512)
    found = Case(sizes, "1xB200", 1).search()
    assert max(found.predicted.peak_bytes) > 140 * 2**30
    with pytest.raises(ShardwrightError, match="nothing fits"):
        case = Case(sizes, "1xB200", 1, optimizer=OptimizerSpec(options={"foreach": True}), knows_host=False)
        case.search()
