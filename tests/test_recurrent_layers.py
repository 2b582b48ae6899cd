"""nn.LSTM, nn.GRU and nn.RNN: a layer's direction is one operator, with the numbers and gradients of torch's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import recurrent_models
import torch
from compared import assert_same_numbers, compared
from matrix import cells
from one_op import assert_same, one_op
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from shardwright import api, tasks
from shardwright.errors import ShardwrightError
from shardwright.ops.placement import P
from shardwright.profiler.batches import make_batch
from shardwright.profiler.recurrent_layers import recurrent_layers
from shardwright.profiler.work import op_work
from shardwright.profiler.workload import Workload

ours = torch.ops.shardwright
OPTIONS = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True}),
    ("LSTM", {"bias": False}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("GRU", {"bias": False, "batch_first": True}),
    ("RNN", {"bidirectional": True, "batch_first": True}),
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
]


def _results(run: Callable[[], list[torch.Tensor]], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    outs = run()
    weighted = sum((out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(weighted, leaves)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_the_operator_gives_what_torch_gives(kind: str, options: dict[str, object], packed: bool) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, kind)(4, 5, **options).double()
    batch_first, num = layer.batch_first, layer.num_layers * (2 if layer.bidirectional else 1)
    x = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(num, 3, layer.proj_size or 5, dtype=torch.float64, requires_grad=True)
    cell = torch.randn(num, 3, 5, dtype=torch.float64, requires_grad=True)
    state = (hidden, cell) if kind == "LSTM" else hidden

    def run() -> list[torch.Tensor]:
        given = x if batch_first else x.transpose(0, 1)
        if packed:
            given = pack_padded_sequence(given, torch.tensor([4, 6, 2]), batch_first, enforce_sorted=False)
        out, last = layer(given, state)
        if packed:
            out, _ = pad_packed_sequence(out, batch_first, padding_value=0.5, total_length=7)
        return [out, *(last if kind == "LSTM" else [last])]

    leaves = [x, *layer.parameters(), hidden, *([cell] if kind == "LSTM" else [])]
    expected = _results(run, leaves)
    with recurrent_layers():
        found = _results(run, leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.lstm is not None and torch._VF.lstm is torch.lstm


def _operands(kind: str, samples: int = 5) -> list[object]:
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    carried, hidden = (2 * 3 if kind == "lstm" else 3), 3
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    projection = draw(hidden, hidden) if kind == "lstm" else None
    return [draw(samples, 4, gates * hidden), draw(samples, carried), draw(gates * hidden, hidden),
            draw(gates * hidden), projection, torch.tensor([4, 1, 3, 2, 4]), kind, True]  # fmt: skip


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_relu"])
def test_it_splits_by_samples_and_its_backward_passes_sums(kind: str) -> None:
    torch.manual_seed(0)
    operands = _operands(kind)
    forward = one_op(ours.recurrence.default, *operands)
    out, last, kept = forward.whole
    _, state, weight, _, projection, lengths, _, reverse = operands
    grads = torch.randn_like(out), torch.randn_like(last)
    backward = one_op(
        ours.recurrence_backward.default, *grads, out, kept, state, weight, projection, lengths, kind, reverse
    )
    for op, least in ((forward, 2), (backward, 3)):
        strategies = op.strategies(2)
        assert len(strategies) == least
        for strategy in strategies:
            found = op.sharded([strategy], {"dp": 2})
            for one, whole in zip(found, op.whole, strict=True):
                assert_same(one, whole)
    assert any(P in strategy.inputs for strategy in backward.strategies(2))


def test_flops_are_those_of_the_hidden_sides_matmuls() -> None:
    operands = _operands("lstm")
    operands[4:6] = None, None
    assert op_work(one_op(ours.recurrence.default, *operands).node).flops == 2 * 5 * 4 * 12 * 3


def _workload(name: str) -> Workload:
    spec = f"{Path(recurrent_models.__file__)}:make_{name}"
    return tasks.check_workload({"model": spec, "kind": "factory", "global_batch": 4})


LAYOUTS = [
    ("lstm_dropout", {"dp": "2", "zero": "3", "microbatch": "2"}),
    ("lstm_dropout", {"tp": "2", "recompute": "all"}),
    ("lstm_both_ways", {"dp": "2"}),
    ("gru", {"dp": "2", "recompute": "all"}),
    ("packed", {"dp": "2"}),
]


@pytest.mark.parametrize(("name", "force"), cells(LAYOUTS, LAYOUTS[1:]), ids=str)
def test_a_recurrent_model_gives_the_numbers_of_the_reference(name: str, force: dict[str, str], tmp_path: Path) -> None:
    plan = api.plan(_workload(name), "2xCPU", force={"pp": "1", "tp": "1", "dp": "1", **force})
    assert_same_numbers(compared(plan, tmp_path))


@pytest.mark.parametrize("name", ["rnn", "lstm_both_ways", "cells"])
def test_in_float32_the_program_gives_the_losses_of_plain_torch(name: str) -> None:
    """torch picks other ops for recurrences in float32 on CPUs; the captured graph holds one that runs anywhere."""
    workload = api.load_workload(f"{Path(recurrent_models.__file__)}:make_{name}", global_batch=4)
    program = api.build(api.plan(workload, "1xCPU"), workload)
    batch = dict(make_batch(workload, 4, seed=1))
    model, _ = recurrent_models._factory(name)
    expected = model(**batch)
    assert program.forward_backward(batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_long_sequence_makes_no_longer_graph() -> None:
    def count(name: str) -> int:
        graph = api.capture_for_planning(_workload(name))
        return sum(len(segment.joint.graph.nodes) for segment in graph.segments.values())

    assert count("long") == count("lstm_dropout") < 250


@pytest.mark.parametrize("name", ["packed_longest", "packed_reads", "packed_maps", "packed_dropout"])
def test_what_follows_from_the_lengths_is_refused_with_its_line(name: str) -> None:
    with pytest.raises(ShardwrightError, match=r"packed|longest") as caught:
        api.plan(_workload(name), "1xCPU")
    assert f"{Path(recurrent_models.__file__).name}:" in caught.value.what
