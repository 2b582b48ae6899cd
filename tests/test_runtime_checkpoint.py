"""Checkpoints travel between layouts; safetensors are read by slices."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from matrix import cells
from runtime_toy import make_batch, make_plan, make_program, make_toy
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemWriter

from shardwright.errors import ShardwrightError
from shardwright.profiler.workload import OptimizerSpec
from shardwright.runtime import checkpoint
from shardwright.runtime.checkpoint_files import document_digest
from shardwright.runtime.program import Program

ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2)


def _save_after(rank: int, layout: dict, path: str, steps: int) -> list[float]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout), optimizer=ADAM)
    losses = [float(program.step(program.shard_batch(make_batch(8, seed=s)))) for s in range(steps)]
    program.save(path)
    losses += [float(program.step(program.shard_batch(make_batch(8, seed=s)))) for s in range(steps, steps + 2)]
    return losses[steps:]


def _resume(rank: int, layout: dict, path: str, steps: int) -> list[float]:
    toy = make_toy()
    with torch.no_grad():
        for parameter in toy.model.parameters():
            parameter.zero_()  # nothing may come from the model
    program = make_program(toy, make_plan(toy, **layout), optimizer=ADAM)
    program.load(path)
    assert program.step_index == steps
    return [float(program.step(program.shard_batch(make_batch(8, seed=s)))) for s in range(steps, steps + 2)]


LAYOUTS = [
    {},
    {"dp": 2, "zero": 1},
    {"dp": 2, "zero": 3},
    {"tp": 2},
    {"pp": 2},
    {"dp": 2, "tp": 2, "zero": 3},
    {"pp": 2, "dp": 2, "zero": 2},
    {"pp": 2, "schedule": "chimera"},
]


def _size(layout: dict) -> int:
    return layout.get("pp", 1) * layout.get("dp", 1) * layout.get("tp", 1)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_a_checkpoint_of_one_layout_goes_on_in_another(index: int, tmp_path: Path) -> None:
    first, second = LAYOUTS[index], LAYOUTS[(index + 3) % len(LAYOUTS)]
    path = str(tmp_path / "checkpoint")
    expected = run_ranks(_size(first), _save_after, first, path, 2)[0]
    for losses in run_ranks(_size(second), _resume, second, path, 2):
        assert losses == pytest.approx(expected, rel=1e-9)


def _groups(rank: int, layout: dict, path: str) -> list[list[tuple[str, float]]]:
    """Hyperparameters of this rank's groups as set, and after they were changed and loaded."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout), optimizer=ADAM)
    named = dict(program.named_parameters())
    by_kind: dict[str, list[torch.Tensor]] = {}
    for name, parameter in named.items():
        by_kind.setdefault(f"{name.partition('.')[0]} {parameter.dim()}", []).append(parameter)
    rates = {kind: 0.01 * (1 + sum(map(ord, kind)) % 17) for kind in by_kind}
    program.optimizer = torch.optim.AdamW([{"params": p, "name": k, "lr": rates[k]} for k, p in by_kind.items()])
    look = lambda: [(group["name"], group["lr"]) for group in program.optimizer.param_groups]  # noqa: E731
    before = look()
    program.step(program.shard_batch(make_batch(8)))
    program.save(path)
    for group in program.optimizer.param_groups:
        group["lr"], group["name"] = 1.0, "other"
    program.load(path)
    return [before, look()]


def test_each_stage_loads_the_options_of_its_own_groups(tmp_path: Path) -> None:
    found = run_ranks(2, _groups, {"pp": 2}, str(tmp_path / "ckpt"))
    assert found[0][0] != found[1][0]
    assert all(before == after for before, after in found)


def _with_groups(count: int) -> Program:
    toy = make_toy()
    program = make_program(toy, make_plan(toy), optimizer=ADAM)
    parameters = list(program.parameters())
    split = [parameters[i::count] for i in range(count)]
    program.optimizer = torch.optim.AdamW([{"params": part, "lr": 0.5} for part in split])
    return program


def test_groups_saved_by_position_are_loaded_by_position_or_refused(tmp_path: Path) -> None:
    program = _with_groups(2)
    for group, rate in zip(program.optimizer.param_groups, (0.01, 0.02), strict=True):
        group["lr"] = rate
    program.step(make_batch(8))
    program.save(tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "program.json"
    document = json.loads(file.read_text())
    for group in document["groups"]:
        del group["parameters"]  # as earlier versions wrote them
    document["sha256"] = document_digest(document)
    file.write_text(json.dumps(document))
    same, other = _with_groups(2), _with_groups(3)
    same.load(tmp_path / "checkpoint")
    assert [group["lr"] for group in same.optimizer.param_groups] == [0.01, 0.02]
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(ShardwrightError, match=r"2 parameter groups without the names .* optimizer has 3"):
        other.load(tmp_path / "checkpoint")
    assert all(map(torch.equal, before, other.parameters())) and not other.optimizer.state
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.5] * 3


def test_two_copies_of_a_stage_are_saved_once(tmp_path: Path) -> None:
    sizes = []
    for layout in ({"pp": 2}, {"pp": 2, "schedule": "chimera"}):
        run_ranks(2, _save_after, layout, str(tmp_path / "checkpoint"), 1)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "checkpoint").glob("*.distcp")))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_saving_again_replaces_the_old_checkpoint(tmp_path: Path) -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy), optimizer=ADAM)
    for _ in range(2):
        program.step(make_batch(8))
        program.save(tmp_path / "checkpoint")
    again = make_program(make_toy(), make_plan(toy), optimizer=ADAM)
    again.load(tmp_path / "checkpoint")
    assert again.step_index == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path) -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy))
    program.save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "program.json").unlink()
    with pytest.raises(ShardwrightError, match="not a finished checkpoint"):
        program.load(tmp_path / "checkpoint")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    toy = make_toy(num_blocks=2)
    make_program(toy, make_plan(toy)).save(tmp_path / "checkpoint")
    larger = make_toy(num_blocks=3)
    with pytest.raises(ShardwrightError, match=r"model.blocks.2.gain is missing"):
        make_program(larger, make_plan(larger)).load(tmp_path / "checkpoint")


def test_no_permission_to_write_is_the_users_mistake(tmp_path: Path) -> None:
    toy = make_toy()
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardwrightError, match="cannot write the checkpoint"):
        make_program(toy, make_plan(toy)).save(tmp_path / "file" / "checkpoint")


def _fails_on_rank_1(rank: int, path: str) -> tuple[str, list[str]]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, dp=2, zero=1))
    program.save(path)
    if rank == 1:
        FileSystemWriter.write_data = _no_room  # type: ignore[method-assign]
    try:
        program.save(path)
    except ShardwrightError as error:
        return error.what, sorted(p.name for p in Path(path).parent.iterdir())
    finally:
        FileSystemWriter.write_data = _WRITE_DATA  # type: ignore[method-assign]
    return "", []


_WRITE_DATA = FileSystemWriter.write_data


def _no_room(self: FileSystemWriter, plan: Any, planner: Any) -> Any:
    (Path(self.path) / "__0_0.distcp").write_bytes(b"half of it")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_named_with_numbers_and_loses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy), optimizer=ADAM)
    program.save(tmp_path / "checkpoint")
    monkeypatch.setattr(FileSystemWriter, "write_data", _no_room)
    with pytest.raises(
        ShardwrightError, match=r"No space left on device; it takes [\d.]+ \w+, and [\d.]+ \w+ are free"
    ):
        program.save(tmp_path / "checkpoint")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    program.load(tmp_path / "checkpoint")


def test_all_ranks_say_so_where_one_could_not_write(tmp_path: Path) -> None:
    for said, left in run_ranks(2, _fails_on_rank_1, str(tmp_path / "checkpoint")):
        assert "No space left on device" in said and left == ["checkpoint"]


def _stated_bytes(rank: int, layout: dict) -> int:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout))
    return checkpoint._bytes_written(program, checkpoint.state_dict(program))


@pytest.mark.parametrize("layout", [{"dp": 2}, {"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}], ids=str)
def test_the_bytes_that_a_checkpoint_takes_count_what_ranks_hold_alike_once(layout: dict) -> None:
    assert run_ranks(2, _stated_bytes, layout) == [_stated_bytes(0, {})] * 2


def test_a_checkpoint_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy))
    program.save(tmp_path / "checkpoint")
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(ShardwrightError, match="cannot write the checkpoint"):
        program.save(tmp_path / "checkpoint")
    program.load(tmp_path / "checkpoint")


def test_whole_tensors_load_as_a_state_dict() -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy), optimizer=ADAM)
    program.step(make_batch(8))
    state = {key: value.clone() for key, value in program.state_dict().items()}
    other = make_program(make_toy(), make_plan(toy), optimizer=ADAM)
    other.load_state_dict(state)
    other.step_index = 1
    assert float(other.step(make_batch(8))) == float(program.step(make_batch(8)))


def _load_safetensors(rank: int, layout: dict, path: str) -> float:
    toy = make_toy()
    with torch.no_grad():
        for parameter in toy.model.parameters():
            parameter.zero_()
    program = make_program(toy, make_plan(toy, **layout))
    program.load(path)
    return float(program.step(program.shard_batch(make_batch(16))))


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "zero": 3}, {"tp": 2}, {"pp": 2}, {"dp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("prefix", cells(["", "model."], ["model."]))
def test_safetensors_load_into_shards(layout: dict, prefix: str, tmp_path: Path) -> None:
    toy = make_toy()
    expected = float(make_program(toy, make_plan(toy)).step(make_batch(16)))
    tensors = {prefix + name: p.detach().clone() for name, p in toy.model.named_parameters()}
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:5]}, tmp_path / "model-00001.safetensors")
    save_file({n: tensors[n] for n in names[5:]}, tmp_path / "model-00002.safetensors")
    for loss in run_ranks(_size(layout), _load_safetensors, layout, str(tmp_path)):
        assert loss == pytest.approx(expected, rel=1e-9)


def test_safetensors_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    toy = make_toy()
    with pytest.raises(ShardwrightError, match=r"lacks .* blocks\.0\.down"):
        make_program(toy, make_plan(toy)).load(tmp_path / "model.safetensors")
