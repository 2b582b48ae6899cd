"""The model is called as its user calls it, and only what holds samples is cut like samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from call_models import SAMPLES, WAYS, Logits, Nested, Shared, entries, nested, position_loss, shared_entries
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright.checking import _test_untouched
from shardwright.errors import ShardwrightError
from shardwright.profiler.batch_dims import with_batch_dims
from shardwright.profiler.workload import Precision, Workload
from shardwright.tasks import TASKS, check_workload

DOUBLE = Precision(torch.float64, torch.float64, torch.float64)


def workload_of(model: nn.Module, batch: Any, **options: Any) -> Workload:
    settings = {"example_batch": batch, "global_batch": SAMPLES, "precision": DOUBLE, "name": "calls", **options}
    return Workload(model=model.double(), **settings)


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def _gradients(rank: int, kind: type[nn.Module], batch: Any, later: Any, options: dict[str, Any]) -> Any:
    force = options.pop("force", {})
    workload = workload_of(seeded(kind), batch, **options)
    plan = shardwright.plan(workload, f"{2 if force else 1}xCPU", force=force)
    program = shardwright.build(plan, workload)
    loss = program.forward_backward(program.shard_batch(later))
    return plan.microbatch.count, loss.item(), program.gradients()


def assert_equal_to_eager(found: tuple[int, float, Any], model: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    assert found[1] == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[2][name], parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_the_model_gets_every_entry_as_its_user_passes_them(way: str) -> None:
    kind, batch, call, loss = WAYS[way]
    found = _gradients(0, kind, batch(1), batch(2), {"loss": loss})
    model = seeded(kind)
    assert_equal_to_eager(found, model, call(model, batch(2)))


NESTED_FILE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, data, views, scale, kind="mean"):
        h = sum(self.a(v) for v in (*views, data["x"])) * scale
        return nn.functional.cross_entropy(h, data["y"], reduction=kind)

def make():
    torch.manual_seed(0)
    data = {"x": torch.randn(8, 4), "y": torch.zeros(8, dtype=torch.int64)}
    return Model(), {"data": data, "views": [torch.randn(8, 4), torch.randn(8, 4)], "scale": 0.5, "kind": "sum"}
"""


def _checked(rank: int, path: str, events: tuple[str, ...]) -> Any:
    found: list[Any] = []
    for event in events:
        task = {"plan": path, "steps": 1, "trust_model": True}
        TASKS[event](task, torch.device("cpu"), lambda **said: found.append(said))
    return found


def test_check_and_run_hand_over_batches_as_their_user_makes_them(tmp_path: Path) -> None:
    (tmp_path / "nested.py").write_text(NESTED_FILE)
    workload = check_workload(shardwright.load_workload(f"{tmp_path}/nested.py:make", global_batch=8).spec)
    shardwright.plan(workload, "1xCPU", force={"microbatch": 4}).save(tmp_path / "plan.json")
    compared, *ran = run_ranks(1, _checked, str(tmp_path / "plan.json"), ("check", "run"))[0]
    assert max(compared["gradients"].values()) < 1e-9
    assert compared["losses"] == pytest.approx(compared["reference_losses"], rel=1e-9)
    assert [event["event"] for event in ran] == ["built", "step"]


def test_nested_batches_are_cut_over_data_ranks_and_microbatches() -> None:
    force = {"dp": 2, "global_microbatch": 4}
    for found in run_ranks(2, _gradients, Nested, nested(1), nested(2), {"force": force}):
        assert found[0] == 2
        model = seeded(Nested)
        assert_equal_to_eager(found, model, model(**nested(2)))


def test_what_merely_is_as_long_as_the_batch_is_shared() -> None:
    dims = with_batch_dims(workload_of(Shared(), shared_entries())).batch_dims
    assert dims == {"bias": None, "ids": 0, "positions": 1, "weight": None, "labels": 0, "scales": None}


def test_a_check_tests_the_model_as_it_is_on_entries_that_are_no_samples() -> None:
    """It resizes the batch, and must cut what is cut in the plan."""
    batch = {name: value.float() if value.is_floating_point() else value for name, value in shared_entries().items()}
    tested = Workload(model=Shared(), example_batch=batch, global_batch=SAMPLES, name="s")
    said: list[str] = []
    _test_untouched(tested, said.append)
    assert said == ["self-test of s as it is"]


def test_shared_entries_and_samples_along_other_dimensions_give_the_numbers_of_the_whole_batch() -> None:
    force = {"dp": 2, "global_microbatch": 4}
    for found in run_ranks(2, _gradients, Shared, shared_entries(1), shared_entries(2), {"force": force}):
        assert found[0] == 2
        model = seeded(Shared)
        assert_equal_to_eager(found, model, model(**shared_entries(2)))


def test_what_the_user_declares_is_not_looked_into() -> None:
    batch = {**shared_entries(), "scales": torch.rand(SAMPLES, dtype=torch.float64)}
    dims = with_batch_dims(workload_of(Shared(), batch, batch_dims={"scales": 0, "bias": None})).batch_dims
    assert dims is not None and dims["scales"] == 0 and dims["ids"] == 0 and dims["positions"] == 1


class Fixed(nn.Module):
    """Asks for the size of its batch, so that a trace with symbols has none left. SAMPLES classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, SAMPLES)

    def forward(self, x: Any, weight: Any, labels: Any, unread: Any, scales: Any = None) -> torch.Tensor:
        out = self.head(x) * (2.0 if len(x) == SAMPLES else 1.0)
        loss = F.mse_loss(out * weight, labels[:, None] + 0 * out)
        return loss if scales is None else loss * scales.sum()


def fixed_entries(*more: str) -> dict[str, torch.Tensor]:
    flat = {name: torch.rand(SAMPLES, dtype=torch.float64) for name in ("weight", "labels", "unread", *more)}
    return {"x": torch.rand(SAMPLES, 3, dtype=torch.float64), **flat}


def test_where_a_model_fixes_its_sizes_a_second_size_tells_samples_from_what_is_shared() -> None:
    dims = with_batch_dims(workload_of(Fixed(), fixed_entries())).batch_dims
    assert dims == {"x": 0, "weight": None, "labels": 0, "unread": 0}


def test_what_two_sizes_leave_open_is_for_the_user_to_say() -> None:
    with pytest.raises(ShardwrightError, match="is open: 'scales' of shape") as raised:
        with_batch_dims(workload_of(Fixed(), fixed_entries("scales")))
    assert raised.value.change == "batch_dims['scales']" and len(raised.value.lines()) == 4
    declared = {"scales": None}
    dims = with_batch_dims(workload_of(Fixed(), fixed_entries("scales"), batch_dims=declared)).batch_dims
    assert dims == {"x": 0, "weight": None, "labels": 0, "unread": 0, "scales": None}


class InBatch(nn.Module):
    """Fixes the size of its batch, and reads one entry alone; or writes where an entry masks samples."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Any, unread: Any = None, mask: Any = None) -> torch.Tensor:
        out = self.head(x)
        if mask is None:
            return F.cross_entropy(out @ out.t(), torch.arange(len(x)))
        out = out * 1
        out[mask > 0.5] = 0.0
        return out.square().mean()


@pytest.mark.parametrize("other", ["unread", "mask"])
def test_entries_that_mask_samples_hold_one_for_each_and_unread_ones_raise_no_question(other: str) -> None:
    entries = {"x": torch.rand(SAMPLES, 3, dtype=torch.float64), other: torch.rand(SAMPLES, dtype=torch.float64)}
    assert with_batch_dims(workload_of(InBatch().double(), entries)).batch_dims == {"x": 0, other: 0}


@pytest.mark.parametrize(
    ("declared", "said"),
    [({"bais": None}, "batch_dims names 'bais'"), ({"positions": 0}, "dimension 0 of 'positions'")],
)
def test_a_declaration_that_cannot_be_is_refused_by_name(declared: dict[str, int | None], said: str) -> None:
    with pytest.raises(ShardwrightError, match=said):
        with_batch_dims(workload_of(Shared(), shared_entries(), batch_dims=declared))


def test_a_workload_that_declares_otherwise_than_its_plan_is_refused() -> None:
    workload = workload_of(seeded(Shared), shared_entries())
    plan = shardwright.plan(workload, "1xCPU")
    other = dataclasses.replace(workload, batch_dims={"scales": 0})
    with pytest.raises(ShardwrightError, match="cuts 'scales' along dimension None"):
        shardwright.build(plan, other)


def _refused(change: Any) -> str:
    workload = workload_of(seeded(Nested), nested())
    program = shardwright.build(shardwright.plan(workload, "1xCPU"), workload)
    batch = nested()
    change(batch)
    with pytest.raises(ShardwrightError) as raised:
        program.step(batch)
    return str(raised.value)


def test_a_batch_of_another_form_is_refused_by_name() -> None:
    assert "'extras.scale' of the batch was 1.5" in _refused(lambda b: setattr(b["extras"], "scale", 2.0))
    assert "'extras.mask' of the batch was a tensor" in _refused(lambda b: setattr(b["extras"], "mask", None))
    assert "not in both: odd" in _refused(lambda b: b.update(odd=torch.ones(3)))


def test_an_entry_that_nothing_takes_is_refused_by_name() -> None:
    with pytest.raises(ShardwrightError, match=r"Logits\.forward takes no 'mask'"):
        shardwright.plan(workload_of(Logits(), {"ids": entries()["ids"], "mask": entries()["mask"]}), "1xCPU")
    program = shardwright.build(*_planned_logits())
    with pytest.raises(ShardwrightError, match="the batch has 'mask', which the example batch had not"):
        program.step(entries())


def _planned_logits() -> Any:
    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return position_loss(output, (None, batch["labels"]))

    workload = workload_of(Logits(), {n: entries()[n] for n in ("ids", "labels")}, loss=loss)
    return shardwright.plan(workload, "1xCPU"), workload


def test_inputs_say_which_entries_the_model_is_given() -> None:
    model, batch = seeded(Logits), entries()
    renamed = {"tokens": batch["ids"], "labels": batch["labels"]}

    def loss(output: torch.Tensor, given: Any) -> torch.Tensor:
        return position_loss(output, (None, given["labels"]))

    found = _gradients(0, Logits, tuple(renamed.values()), tuple(renamed.values()),
                       {"loss": position_loss, "model_inputs": (0,)})  # fmt: skip
    assert_equal_to_eager(found, model, loss(model(batch["ids"]), batch))
    with pytest.raises(ShardwrightError, match="which the batch lacks"):
        shardwright.plan(workload_of(Logits(), renamed, loss=loss, model_inputs=("ids",)), "1xCPU")


def test_what_no_graph_can_carry_is_refused_by_name() -> None:
    with pytest.raises(ShardwrightError, match="'extras' of the batch is of type set"):
        workload_of(Nested(), {"ids": entries()["ids"], "extras": {1, 2}})
