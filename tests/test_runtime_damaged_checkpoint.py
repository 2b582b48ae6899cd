"""A damaged or hostile checkpoint is refused whole: nothing runs, nothing is loaded, the program stays as it was."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from runtime_toy import make_batch, make_plan, make_program, make_toy
from safetensors.torch import save_file

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.workload import OptimizerSpec
from shardwright.runtime.checkpoint_files import _STANDS_FOR, SafeReader, digests, document_digest, file_names
from shardwright.runtime.program import Program

ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2)


def _program() -> Program:
    toy = make_toy()
    return make_program(toy, make_plan(toy), optimizer=ADAM)


def _state(program: Program) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in program.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    program = _program()
    program.step(make_batch(8))
    program.save(folder)
    return folder


def _refused(program: Program, folder: Path, match: str | None = None) -> None:
    before, step = _state(program), program.step_index
    with pytest.raises(ShardwrightError, match=match) as caught:
        program.load(folder)
    assert caught.value.exit_code in (ExitCode.USAGE, ExitCode.PLAN_MISMATCH)
    after = _state(program)
    assert after.keys() == before.keys() and program.step_index == step
    assert all(torch.equal(after[key], before[key]) for key in before)


def damage(folder: Path, generator: random.Random) -> str:
    """One fault of the kinds that disks, copies and people make. Returns what was done."""
    path = generator.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    kind = generator.choice(["flip", "cut", "grow", "remove", "zero", "swap"])
    at = generator.randrange(max(1, len(data)))
    if kind == "flip":
        data[at] ^= 1 << generator.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += b"\0"
    elif kind == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
        data[at] ^= 0xFF
    if kind == "remove":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(generator.choice(sorted(p for p in folder.iterdir() if p != path)).read_bytes())
    else:
        path.write_bytes(data)
    return f"{kind} {path.name} at {at}"


FIRST = int(os.environ.get("SHARDWRIGHT_FUZZ_SEED", "0"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("SHARDWRIGHT_FUZZ_CHECKPOINTS", "12"))))
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(seed: int, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    done = damage(folder, random.Random(seed))
    program = _program()
    if seed % 2:  # one that has optimizer state to lose
        program.step(make_batch(8, seed=5))
    print(done)
    _refused(program, folder)


def _sealed_again(folder: Path) -> None:
    """What somebody would do who wants the change to pass."""
    document = json.loads((folder / "program.json").read_text())
    document["files"] = digests(folder, file_names(folder))
    document["sha256"] = document_digest(document)
    (folder / "program.json").write_text(json.dumps(document))


class _Payload:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("function", [os.system, exec, getattr, torch.load, __import__], ids=lambda f: f.__name__)
def test_an_index_that_would_run_code_is_refused_before_it_does(function, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    flag = tmp_path / "ran"
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(_Payload(function, f"touch {flag}" if function is os.system else f"open({str(flag)!r}, 'w')"), file)
    _sealed_again(folder)
    _refused(_program(), folder, "which no index of a checkpoint has")
    assert not flag.exists()


@pytest.mark.parametrize("name", [*_STANDS_FOR, ("pathlib", "PosixPath"), ("torch", "float32")], ids=lambda n: n[1])
def test_an_index_cannot_write_to_what_it_names(name: tuple[str, str], saved: Path, tmp_path: Path) -> None:
    """The opcode BUILD sets attributes on whatever stands before it, classes and functions included."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    attribute = b"Vreplaced\nVinnocent\ns"
    for build in (b"}" + attribute + b"b.", b"N}" + attribute + b"\x86b."):  # as a state, as the state of slots
        (folder / ".metadata").write_bytes(f"c{name[0]}\n{name[1]}\n".encode() + build)
        _sealed_again(folder)
        _refused(_program(), folder)
    module = __import__(name[0], fromlist=["x"])
    assert not hasattr(getattr(module, name[1], None), "replaced") and not hasattr(str, "replaced")


def test_an_index_that_points_outside_of_its_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    index = pickle.loads((folder / ".metadata").read_bytes())
    shutil.copy(folder / "__0_0.distcp", tmp_path / "other.distcp")
    for info in index.storage_data.values():
        info.relative_path = "../other.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    _sealed_again(folder)
    _refused(_program(), folder, "outside the folder")


def test_a_failure_in_the_middle_of_reading_writes_nothing(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[-200:] = os.urandom(200)  # the end of the last tensor's archive
    (folder / "__0_0.distcp").write_bytes(data)
    _sealed_again(folder)
    program = _program()
    _refused(program, folder, "damaged")
    assert not program.optimizer.state
    program.load(saved)
    assert program.step_index == 1


def test_a_load_holds_no_second_copy_of_the_state(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is verified needs no copy to fall back on: no tensor of the program is cloned or brought to the host."""
    program = _program()
    program.step(make_batch(8))
    for name in ("clone", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("a copy"))
    program.load(saved)
    assert program.step_index == 1


def test_a_file_that_is_lost_between_reading_and_writing_stops_the_program(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = _program()
    reads = []

    def read(self: object, plan: object, planner: object) -> object:
        reads.append(planner)
        if len(reads) == 2:
            raise OSError(5, "Input/output error", "__0_0.distcp")
        return own(self, plan, planner)

    own = SafeReader.read_data
    monkeypatch.setattr(SafeReader, "read_data", read)
    for refused in (lambda: program.load(saved), lambda: program.step(make_batch(8)), lambda: program.save(saved)):
        with pytest.raises(ShardwrightError, match="Input/output error") as caught:
            refused()
        assert "some values are the old ones" in caught.value.means
    program.load(saved)
    assert float(program.step(make_batch(8))) > 0


def test_weights_alone_do_not_mend_a_half_loaded_optimizer(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, whole = _program(), _program()
    whole.load(saved)
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    save_file(weights, tmp_path / "model.safetensors")
    with monkeypatch.context() as patch:
        reads = iter([SafeReader.read_data])  # the first succeeds

        def read(*arguments: object) -> object:
            if (own := next(reads, None)) is None:
                raise OSError(5, "Input/output error")
            return own(*arguments)

        patch.setattr(SafeReader, "read_data", read)
        with pytest.raises(ShardwrightError, match="Input/output error"):
            program.load(saved)
    program.load(tmp_path / "model.safetensors")
    program.load_values()
    program.load_state_dict({f"model.{name}": value for name, value in weights.items()})
    for refused in (program.state_dict, lambda: program.step(make_batch(8)), lambda: program.save(tmp_path / "new")):
        with pytest.raises(ShardwrightError, match="Input/output error"):
            refused()
    program.load_state_dict(whole.state_dict())
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in program.state_dict().items())
    assert float(program.step(make_batch(8))) > 0


def _load_damaged(rank: int, folder: str) -> str:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, dp=2, zero=3), optimizer=ADAM)
    try:
        program.load(folder)
    except ShardwrightError as error:
        return error.what
    return ""


def test_what_one_rank_finds_is_raised_on_all(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved, folder)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 4
    (folder / "__0_0.distcp").write_bytes(data)
    found = run_ranks(2, _load_damaged, str(folder))
    assert "__0_0.distcp is not as it was written" in found[0] and found[0] == found[1]


def _load_of_another_size(rank: int, folder: str) -> str:
    toy = make_toy(num_blocks=4)
    program = make_program(toy, make_plan(toy, pp=2), optimizer=ADAM)
    before = _state(program)
    try:
        program.load(folder)
    except ShardwrightError as error:
        assert all(torch.equal(value, before[key]) for key, value in program.state_dict().items())
        return error.what
    return ""


def test_a_tensor_that_one_stage_alone_misses_is_raised_on_all(saved: Path) -> None:
    found = run_ranks(2, _load_of_another_size, str(saved))
    assert "is missing" in found[0] and found[0] == found[1]


def _load_state_on_one(rank: int) -> str:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, dp=2), optimizer=ADAM)
    state = _state(program)
    wanted = {key: value.clone() + 1 for key, value in state.items()}
    if rank:
        wanted[next(iter(wanted))] = torch.zeros(1, dtype=torch.float64)
    try:
        program.load_state_dict(wanted)
    except ShardwrightError as error:
        assert all(torch.equal(value, state[key]) for key, value in program.state_dict().items())
        return error.what
    return ""


def test_a_state_that_one_rank_cannot_take_is_taken_by_none() -> None:
    found = run_ranks(2, _load_state_on_one)
    assert "another rank could not load" in found[0] and "has shape (1,)" in found[1]


def test_safetensors_of_another_shape_change_nothing(tmp_path: Path) -> None:
    program = _program()
    tensors = {name: torch.ones(p.shape, dtype=p.dtype) for name, p in program.workload.model.named_parameters()}
    last = list(tensors)[-1]
    tensors[last] = torch.ones(1)  # which copying would repeat
    save_file(tensors, tmp_path / "model.safetensors")
    _refused(program, tmp_path / "model.safetensors", "another size|has shape")


def test_a_safetensors_file_cut_short_is_refused(tmp_path: Path) -> None:
    program = _program()
    save_file({n: p.detach().clone() for n, p in program.workload.model.named_parameters()}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    for length in (0, 4, 40, len(data) - 8):
        (tmp_path / "a.safetensors").write_bytes(data[:length])
        _refused(program, tmp_path / "a.safetensors", "cannot read")


@pytest.mark.parametrize("name", ["a.safetensors", "*a.safetensors", "./a.safetensors", "*./a.safetensors", None])
def test_sums_name_a_file_in_any_way_or_not_at_all(name: str | None, tmp_path: Path) -> None:
    program = _program()
    file = tmp_path / "a.safetensors"
    save_file({n: torch.ones_like(p) for n, p in program.workload.model.named_parameters()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if name else "0" * 64
    (tmp_path / "SHA256SUMS").write_text(f"# sums\n{digest} {'' if name and name[0] == '*' else ' '}{name or 'b'}\n")
    program.load(tmp_path)
    if name:
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        _refused(program, file, "not as it was written")


@pytest.mark.parametrize("where", ["values", "sums"])
def test_a_flipped_byte_of_safetensors_is_found_by_the_sums_beside_them(where: str, tmp_path: Path) -> None:
    program = _program()
    file, sums = tmp_path / "a.safetensors", tmp_path / "SHA256SUMS"
    save_file({n: torch.ones_like(p) for n, p in program.workload.model.named_parameters()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.write_text(f"{'0' * 64} *other.bin\n{digest}  a.safetensors\n")
    program.load(tmp_path)
    damaged = {"values": file, "sums": sums}[where]
    data = bytearray(damaged.read_bytes())
    data[{"values": -3, "sums": 80}[where]] ^= 1
    damaged.write_bytes(data)
    _refused(program, file, "not as it was written")


def test_a_state_of_another_shape_is_not_repeated_into_place() -> None:
    program = _program()
    before = _state(program)
    wrong = {**before, next(iter(before)): torch.zeros(1, dtype=torch.float64)}
    with pytest.raises(ShardwrightError, match="neither the whole tensor nor this rank's part"):
        program.load_state_dict(wrong)
    assert all(torch.equal(value, before[key]) for key, value in program.state_dict().items())
