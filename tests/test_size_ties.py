"""Entries that an op takes for as long as another are both cut like samples, though a trace keeps their sizes apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import WIDE
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import shardwright
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
