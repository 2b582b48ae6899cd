"""Entries that an op takes for as long as another are both cut like samples, though a trace keeps their sizes apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import WIDE
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import shardwright
from shardwright.errors import ShardwrightError
from shardwright.profiler.batch_dims import with_batch_dims
from shardwright.profiler.workload import Workload

SAMPLES, LENGTH, WIDTH = 8, 6, 4
Forward = Callable[["Net", dict[str, torch.Tensor]], torch.Tensor]


class Net(nn.Module):
    def __init__(self, step: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.into, self.head = step, nn.Linear(3, WIDTH), nn.Linear(WIDTH, 5)
        self.recurrent = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, **entries: torch.Tensor) -> torch.Tensor:
        return self.step(self, entries)


def picked_log_probability(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    log_p = net.head(net.into(e["x"]).mean(1)).log_softmax(-1)
    return -log_p.gather(1, e["y"][:, None]).mean()


def connectionist(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    log_p = net.head(net.into(e["x"])).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_p, e["targets"], e["lengths"], e["target_lengths"], reduction="mean")


def packed(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = pack_padded_sequence(net.into(e["x"]), e["lengths"].cpu(), batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(net.recurrent(rows)[0], batch_first=True, total_length=LENGTH)
    return F.cross_entropy(net.head(out.sum(1)), e["y"])


def sorted_by_another(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    order = e["lengths"].argsort(descending=True)
    return F.cross_entropy(net.head(net.into(e["x"])[order].mean(1)), e["y"][order])


def last_step(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = net.into(e["x"])[torch.arange(len(e["lengths"])), e["lengths"] - 1]
    return F.cross_entropy(net.head(hidden), e["y"])


def scattered(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = net.head(net.into(e["x"]).mean(1))
    targets = torch.zeros(len(logits), 5, dtype=logits.dtype).scatter(1, e["y"][:, None], 1.0)
    return (logits.softmax(-1) - targets).square().mean()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(SAMPLES, LENGTH, 3, generator=generator, dtype=torch.float64),
        "y": torch.randint(1, 5, (SAMPLES,), generator=generator),
        "lengths": torch.randint(4, LENGTH + 1, (SAMPLES,), generator=generator),
        "targets": torch.randint(1, 5, (SAMPLES, 2), generator=generator),
        "target_lengths": torch.randint(1, 3, (SAMPLES,), generator=generator),
    }


READ = {
    picked_log_probability: ("x", "y"),
    connectionist: ("x", "targets", "lengths", "target_lengths"),
    packed: ("x", "lengths", "y"),
    sorted_by_another: ("x", "lengths", "y"),
    last_step: ("x", "lengths", "y"),
    scattered: ("x", "y"),
}


def workload_of(step: Forward) -> Workload:
    model, entries = Net(step).double(), batch()
    return Workload(model, {name: entries[name] for name in READ[step]}, SAMPLES, precision=WIDE, name=step.__name__)


@pytest.mark.parametrize("step", READ, ids=lambda step: step.__name__)
def test_every_entry_is_found_to_hold_samples(step: Forward) -> None:
    assert with_batch_dims(workload_of(step)).batch_dims == dict.fromkeys(READ[step], 0)


@pytest.mark.parametrize("step", [picked_log_probability, connectionist], ids=lambda step: step.__name__)
def test_microbatches_have_their_own_part_of_each(step: Forward) -> None:
    workload = workload_of(step)
    program = shardwright.build(shardwright.plan(workload, "1xCPU", force={"global_microbatch": 2}), workload)
    given: dict[str, Any] = dict(workload.example_batch)
    found = program.forward_backward(program.shard_batch(given))
    parts = [step(workload.model, {n: t[k : k + 2] for n, t in given.items()}) for k in range(0, SAMPLES, 2)]  # type: ignore
    assert found.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)


def test_a_table_that_entries_index_stays_whole() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, ids: torch.Tensor, table: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(table[ids]), y)

    entries = {"ids": torch.arange(SAMPLES) % 5, "table": torch.rand(SAMPLES, 3), "y": torch.arange(SAMPLES) % 3}
    found = with_batch_dims(Workload(Table(), entries, SAMPLES, name="table")).batch_dims
    assert found == {"ids": 0, "table": None, "y": 0}


def best_key(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    hidden = net.into(e["x"]).mean(1)
    return (hidden - e["values"][(hidden @ e["keys"].T).argmax(1)]).square().mean()


def sorted_table(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    return (net.into(e["x"]).mean(1) @ e["values"][e["priority"].argsort()].T).softmax(-1).square().mean()


def gathered_table(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    return (net.into(e["x"]).mean(1) @ e["values"].gather(1, e["columns"]).T).softmax(-1).square().mean()


SHARED = {best_key: ("keys", "values"), sorted_table: ("values", "priority"), gathered_table: ("values", "columns")}


def beside_shared(step: Forward, x_last: bool = False, **declared: int | None) -> Workload:
    generator = torch.Generator().manual_seed(2)
    rows = {n: torch.randn(SAMPLES, WIDTH, generator=generator, dtype=torch.float64) for n in ("keys", "values")}
    rows["priority"] = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    rows["columns"] = torch.randint(0, WIDTH, (SAMPLES, WIDTH), generator=generator)
    shared = {name: rows[name] for name in SHARED[step]}
    entries = {**shared, "x": batch()["x"]} if x_last else {"x": batch()["x"], **shared}
    model = Net(step).double()
    return Workload(model, entries, SAMPLES, precision=WIDE, name=step.__name__, batch_dims=declared or None)


@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("step", SHARED, ids=lambda step: step.__name__)
def test_a_tie_of_what_is_shared_does_not_outvote_samples(step: Forward, x_last: bool) -> None:
    with pytest.raises(ShardwrightError) as refused:
        with_batch_dims(beside_shared(step, x_last))
    assert "is open" in str(refused.value) and all(
        f"batch_dims['{name}']" in refused.value.change for name in ("x", *SHARED[step])
    )


@pytest.mark.parametrize("step", SHARED, ids=lambda step: step.__name__)
def test_what_is_said_to_be_shared_goes_whole_to_each_microbatch(step: Forward) -> None:
    workload = beside_shared(step, **dict.fromkeys(SHARED[step]))
    program = shardwright.build(shardwright.plan(workload, "1xCPU", force={"global_microbatch": 2}), workload)
    found = program.forward_backward(program.shard_batch(dict(workload.example_batch)))
    assert found.item() == pytest.approx(step(workload.model, dict(workload.example_batch)).item(), rel=1e-12)  # type: ignore


def test_samples_said_alone_do_not_settle_what_ties_join() -> None:
    with pytest.raises(ShardwrightError, match=r"'keys'.*'values'"):
        with_batch_dims(beside_shared(best_key, x=0))


def test_samples_in_more_entries_than_a_tie_joins_are_found() -> None:
    def with_targets(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = net.into(e["x"]).mean(1) + e["more"]
        looked_up = e["values"][(hidden @ e["keys"].T).argmax(1)]
        return F.cross_entropy(net.head(hidden + looked_up), e["y"])

    entries = {**beside_shared(best_key, x_last=True).example_batch, "y": batch()["y"]}
    entries["more"] = torch.rand(SAMPLES, WIDTH, dtype=torch.float64)
    found = with_batch_dims(Workload(Net(with_targets).double(), entries, SAMPLES, precision=WIDE, name="memory"))
    assert found.batch_dims == {"keys": None, "values": None, "x": 0, "y": 0, "more": 0}


def test_lengths_of_ctc_are_of_samples_beside_a_shared_entry() -> None:
    def weighted(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
        return connectionist(net, e) * e["weights"].square().mean()

    entries = {"weights": torch.rand(SAMPLES, dtype=torch.float64)} | {n: batch()[n] for n in READ[connectionist]}
    found = with_batch_dims(Workload(Net(weighted).double(), entries, SAMPLES, precision=WIDE, name="weighted"))
    assert found.batch_dims == {"weights": None, **dict.fromkeys(READ[connectionist], 0)}


def looked_up(net: Net, e: dict[str, torch.Tensor]) -> torch.Tensor:
    return (net.into(e["x"]).mean(1) @ e["table"].T).softmax(-1).square().mean()


@pytest.mark.parametrize("order", [("x", "table"), ("table", "x")], ids=str)
def test_of_two_lengths_that_nothing_ties_neither_is_taken_for_the_batch(order: tuple[str, str]) -> None:
    entries = {"x": batch()["x"], "table": torch.rand(SAMPLES, WIDTH, dtype=torch.float64)}
    entries = {name: entries[name] for name in order}
    workload = Workload(Net(looked_up).double(), entries, SAMPLES, precision=WIDE, name="looked_up")
    with pytest.raises(ShardwrightError, match=r"'x' of shape.*'table' of shape|'table' of shape.*'x' of shape"):
        with_batch_dims(workload)
    with pytest.raises(ShardwrightError, match=r"is open: 'table' of shape"):
        with_batch_dims(dataclasses.replace(workload, batch_dims={"x": 0}))
    found = with_batch_dims(dataclasses.replace(workload, batch_dims={"table": None}))
    assert found.batch_dims == {"x": 0, "table": None}
