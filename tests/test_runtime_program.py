"""The program has the numbers of the single-device model: loss and every gradient, in float64, to 1e-9 relative."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from distributed import run_ranks
from runtime_toy import make_batch, make_plan, make_program, make_toy, reference
from sparing_orders import letting_go

from shardwright.errors import ShardwrightError
from shardwright.runtime.buffers import written_buffers
from shardwright.runtime.orders import schedule_for
from shardwright.runtime.wiring import wire
from shardwright.schedules import SCHEDULES, build_schedule

TOLERANCE = 1e-9


def _compare(rank: int, layout: dict, size: int, toy_options: dict, let_go: bool = False) -> dict[str, float]:
    """Largest relative error of the loss, the gradients and the buffers, on this rank."""
    toy = make_toy(**toy_options)
    plan = make_plan(toy, **layout)
    plan = letting_go(plan) if let_go else plan
    program = make_program(toy, plan)
    batch = make_batch(size)
    loss = program.forward_backward(program.shard_batch(batch))
    expected_loss, expected, expected_buffers = reference(toy, batch, plan.microbatch.size)
    grads = program.gradients()
    assert set(grads) == set(expected), set(grads) ^ set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    errors = {
        name: float((grads[name] - g).abs().max()) / max(float(g.abs().max()), 1e-6 * scale)
        for name, g in expected.items()
    }
    for name, buffer in program.named_buffers():
        errors[name] = float((buffer - expected_buffers[name]).abs().max())
    errors["loss"] = abs(float(loss - expected_loss)) / float(expected_loss)
    return errors


def _check(size: int, layout: dict, batch: int = 16, let_go: bool = False, **toy_options) -> None:
    for errors in run_ranks(size, _compare, layout, batch, toy_options, let_go):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < TOLERANCE, (worst, errors[worst])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_data_parallel_ranks_with_uneven_shards(zero: int) -> None:
    _check(2, {"dp": 2, "zero": zero})


@pytest.mark.parametrize("zero", [0, 3])
def test_four_data_parallel_ranks(zero: int) -> None:
    _check(4, {"dp": 4, "zero": zero})


def test_one_process() -> None:
    _check(1, {})


def test_tensor_parallel_ranks_that_want_one_parameter_cut_in_two_ways() -> None:
    _check(2, {"tp": 2})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_data_and_tensor_parallel_ranks(zero: int) -> None:
    _check(4, {"dp": 2, "tp": 2, "zero": zero})


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_two_stages_with_tied_weights(schedule: str) -> None:
    _check(2, {"pp": 2, "schedule": schedule})


def test_four_stages_relay_skip_and_integer_values() -> None:
    _check(4, {"pp": 4})


def test_interleaved_stages() -> None:
    _check(2, {"pp": 2, "schedule": "interleaved_1f1b", "chunks": 2})


def test_several_virtual_stages_on_one_rank_need_no_transfer() -> None:
    _check(1, {"pp": 1, "schedule": "interleaved_1f1b", "chunks": 3})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_pipeline_and_data_parallel(zero: int) -> None:
    _check(4, {"pp": 2, "dp": 2, "zero": zero})


def test_pipeline_and_tensor_parallel() -> None:
    _check(4, {"pp": 2, "tp": 2, "schedule": "interleaved_1f1b", "chunks": 2})


@pytest.mark.parametrize("count", [1, 3, 5])
def test_interleaved_stages_on_four_ranks_with_any_number_of_microbatches(count: int) -> None:
    _check(4, {"pp": 4, "schedule": "interleaved_1f1b", "chunks": 2}, batch=4 * count, num_blocks=5)


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("zb_h1", 1), ("zb_v", 2), ("v_min", 2), ("dualpipe_v", 2), ("hanayo", 2), ("breadth_first", 2)],
)
def test_published_schedules_of_one_direction(schedule: str, chunks: int) -> None:
    _check(2, {"pp": 2, "schedule": schedule, "chunks": chunks})


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zb_h1", 1), ("zb_v", 2)])
def test_activations_recomputed_and_offloaded_one_by_one(schedule: str, chunks: int) -> None:
    """With a buffer that the forward writes, random numbers, and fused and split backwards."""
    _check(2, {"pp": 2, "schedule": schedule, "chunks": chunks}, let_go=True)


def test_recomputation_reads_buffers_as_they_were() -> None:
    layout = {"pp": 2, "schedule": "zb_h2", "cuts": [5, 2]}
    _check(2, layout, let_go=True, reads_buffer=True)
    _check(2, layout, reads_buffer=True)


@pytest.mark.parametrize("batch", [12, 18, 20])
def test_activations_let_go_with_fewer_shorter_or_more_microbatches(batch: int) -> None:
    _check(2, {"pp": 2, "schedule": "zb_h1"}, batch=batch, let_go=True)


@pytest.mark.parametrize("zero", [0, 3])
def test_activations_let_go_with_data_parallel_ranks(zero: int) -> None:
    _check(4, {"pp": 2, "dp": 2, "zero": zero, "schedule": "zb_h1"}, let_go=True)


@pytest.mark.parametrize(("schedule", "chunks"), [("chimera", 1), ("bitpipe", 2)])
@pytest.mark.parametrize("batch", [16, 10, 1])
@pytest.mark.parametrize("pp", [2, 3])
def test_two_directions(schedule: str, chunks: int, batch: int, pp: int) -> None:
    _check(pp, {"pp": pp, "schedule": schedule, "chunks": chunks}, batch=batch, num_blocks=6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_two_directions_and_data_parallel(zero: int) -> None:
    _check(4, {"pp": 2, "dp": 2, "schedule": "chimera", "zero": zero})


def test_two_directions_and_tensor_parallel() -> None:
    _check(4, {"pp": 2, "tp": 2, "schedule": "bitpipe", "chunks": 2}, num_blocks=6)


def _sums_started(rank: int, layout: dict) -> tuple[list[str], list[list[str]]]:
    """Actions of a step in order, and those that were over when each sum over the copies of a stage started."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout))
    over: list[list[str]] = []

    def spy(unit):  # type: ignore[no-untyped-def]
        start = unit.start_reduce

        def spied() -> None:
            over.append([f"{e.stage}{e.kind}{e.microbatch}" for e in program.trace.events if e.kind in "FB"])
            start()

        return spied

    for unit in program.store._mirrored:
        unit.start_reduce = spy(unit)
    program.forward_backward(program.shard_batch(make_batch(16)))
    return [f"{e.stage}{e.kind}{e.microbatch}" for e in program.trace.events if e.kind in "FB"], over


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_gradients_of_two_copies_are_summed_as_soon_as_both_are_there(layout: dict) -> None:
    for actions, over in run_ranks(2 * layout.get("dp", 1), _sums_started, {"schedule": "chimera", **layout}):
        last = max(actions.index(action) for action in actions if action[:2] == "1B")
        assert len(over[0]) == last < len(actions) - 1  # it starts inside the stage's last backward
        assert len(over) > 1 and actions[-1].startswith("0B")


def _two_steps(rank: int, layout: dict) -> torch.Tensor:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout))
    for _ in range(2):
        program.step(program.shard_batch(make_batch(16)))
    return program.buffers.tensors["mean"]


def test_buffers_that_two_directions_write_get_the_value_that_one_would_give_them() -> None:
    expected = run_ranks(1, _two_steps, {})[0]
    for found in run_ranks(2, _two_steps, {"pp": 2, "schedule": "chimera"}):
        assert torch.allclose(found, expected, rtol=1e-12, atol=0.0)


def test_buffers_whose_updates_cannot_be_joined_are_refused_in_two_directions() -> None:
    toy = make_toy()
    plan = make_plan(toy, pp=2, schedule="chimera")
    joint = toy.graph.segments["norm"].joint
    output = next(node for node in joint.graph.nodes if node.op == "output")
    output.args = ((output.args[0][1], output.args[0][1]),)  # the output now depends on the buffer
    programs = {name: mock.Mock(backward=None) for name in toy.graph.segments}
    stages = [stage.segments for stage in plan.stages]
    assert written_buffers(toy.graph, wire(toy.graph, programs, stages, [[0, 1]]))["mean"].ranks == (1,)
    with pytest.raises(ShardwrightError, match="two directions"):
        written_buffers(toy.graph, wire(toy.graph, programs, stages, [[0, 1], [1, 0]]))


def _batches(rank: int, layout: dict, sizes: list[int]) -> None:
    """One program, batches of these sizes: each gives loss, gradients and evaluation of the model."""
    toy = make_toy(num_blocks=5)
    program = make_program(toy, make_plan(toy, **layout))
    for size in sizes:
        batch = make_batch(size)
        expected_loss, expected, _ = reference(toy, batch, 4)
        before = {name: buffer.clone() for name, buffer in program.named_buffers()}
        loss = float(program.evaluate(program.shard_batch(batch)))
        assert all(torch.equal(before[name], buffer) for name, buffer in program.named_buffers())
        assert loss == pytest.approx(float(expected_loss), rel=1e-9), size
        outputs = program.outputs(program.shard_batch(batch))
        assert len(outputs) in (0, -(-size // 4))
        assert float(program.forward_backward(program.shard_batch(batch))) == pytest.approx(loss, rel=1e-9), size
        for name, grad in program.gradients().items():
            assert float((grad - expected[name]).abs().max()) < TOLERANCE, (size, name)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batches_of_other_sizes_and_evaluation_under_every_schedule(schedule: str) -> None:
    """Four microbatches of four were planned."""
    chunks = SCHEDULES[schedule].chunks[0]
    run_ranks(2, _batches, {"pp": 2, "schedule": schedule, "chunks": chunks}, [16, 10, 8, 3, 24])


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h2", "v_half", "chimera", "bitpipe"])
def test_batches_of_other_sizes_on_four_ranks(schedule: str) -> None:
    chunks = SCHEDULES[schedule].chunks[0]
    run_ranks(4, _batches, {"pp": 4, "schedule": schedule, "chunks": chunks}, [16, 10, 3])


def test_schedules_that_the_stages_do_not_follow_are_refused() -> None:
    with pytest.raises(ShardwrightError, match="on pipeline ranks"):
        schedule_for(make_plan(make_toy(), pp=2, schedule="zb_v", chunks=2), (0, 1, 0, 1), 4)


def _split_backward(rank: int, layout: dict) -> dict[str, torch.Tensor]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout))
    program.schedule = lambda count, training=True: build_schedule("1f1b", 2, count).split_backward()  # type: ignore
    program.forward_backward(program.shard_batch(make_batch(16)))
    assert {event.kind for event in program.trace.events} >= {"F", "I", "W"}
    return program.gradients()


@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "dp": 2, "zero": 2}], ids=str)
def test_input_and_weight_gradients_as_separate_actions(layout: dict) -> None:
    _, expected, _ = reference(make_toy(), make_batch(16), 4)
    for grads in run_ranks(2 * layout.get("dp", 1), _split_backward, layout):
        for name, grad in grads.items():
            assert float((grad - expected[name]).abs().max()) < TOLERANCE


def _zero_3_storage(rank: int) -> tuple[int, int, int, int]:
    """Bytes of parameters that the rank keeps, most gathered at once, bytes of all units and of the largest."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, dp=4, zero=3))
    units = program.store.units
    most = 0

    def gathered() -> int:
        return sum(t.numel() * t.element_size() for unit in units for t in unit.open_tensors().values())

    def spy(unit):  # type: ignore[no-untyped-def]
        opened = unit.open

        def spied():  # type: ignore[no-untyped-def]
            nonlocal most
            result = opened()
            most = max(most, gathered())
            return result

        return spied

    for unit in units:
        unit.open = spy(unit)
    program.step(program.shard_batch(make_batch(16)))
    assert gathered() == 0
    whole = [8 * sum(torch.Size(shape).numel() for shape in unit.shapes.values()) for unit in units]
    return program.store.param_bytes(), most, sum(whole), max(whole)


def test_zero_3_keeps_shards_and_gathers_one_segment_at_a_time() -> None:
    for kept, most, whole, largest in run_ranks(4, _zero_3_storage):
        assert kept < whole  # a quarter, but for padding, which weighs much in parameters this small
        assert most <= 2 * largest


@pytest.mark.parametrize("batch", [10, 9, 1])
@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (2, {"pp": 2}), (2, {"dp": 2, "zero": 0}), (2, {"dp": 2, "zero": 3})]
)
def test_fewer_microbatches_and_short_ones(size: int, layout: dict, batch: int) -> None:
    _check(size, layout, batch=batch)
