"""Checkpoints by torch.distributed.checkpoint (DCP), whose layout a later program need not share.

Keys of the flat state:

    model.NAME              the parameter as the optimizer steps over it (the master copy)
    buffer.NAME             a buffer
    optimizer.NAME.STATE    one entry of the optimizer's state for that parameter; more in optimizer_state.py
    loss_scale.state        under float16: [scale, finite steps since it changed]

Beside DCP's files stands program.json: {"format", "step", "groups": parameters and options of each group, "files":
SHA-256 of each, "sha256": of the document itself}. It is written last, so that a folder without it is an unfinished
checkpoint.

A load that fails leaves the program as it was, without a copy of it: everything is verified, and read once to see that
it can be read, before the first value is written.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import ExitCode, ShardwrightError
from ..plans.axes import stage_axes
from ..units import format_bytes
from . import optimizer_state
from .checkpoint_files import SafeReader, damaged, digests, document_digest, file_names, first_difference
from .parameter_groups import merged, options_for, options_of, set_options
from .parameters import local_tensor
from .state_keys import LOSS_SCALE, by_our_keys
from .together import num_ranks, of_all_ranks, on_every_rank, on_rank_0
from .trained import Trained

FORMAT = "shardwright.checkpoint/2"
_DOCUMENT = "program.json"


def state_dict(program: Trained) -> dict[str, torch.Tensor]:
    """This rank's tensors by the keys above, without copies: DTensors, or plain tensors that one rank holds alone."""
    state: dict[str, torch.Tensor] = {f"model.{n}": p.detach() for n, p in program.named_parameters()}
    state.update({f"buffer.{name}": tensor for name, tensor in program.named_buffers()})
    if program.scaler is not None:
        state[LOSS_SCALE] = program.scaler.state
    return {**state, **optimizer_state.entries(program)}


@torch.no_grad()
def load_state_dict(program: Trained, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
    """Copy values in. Each may be laid out as here, or be a whole tensor, of which each rank takes its shard; keys are
    those above, or the model's own names. strict: all parameters that the rank holds must be there."""
    program.settle()
    state = on_every_rank(lambda: by_our_keys(program, state, strict=strict))
    with optimizer_state.new_state(program, any(map(optimizer_state.is_state, state))):

        def paired() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
            optimizer_state.make_what_is_missing(program, optimizer_state.saved_shapes(state.items()))
            return [
                (key, local_tensor(target), _own_part(program, key, state[key], local_tensor(target)))
                for key, target in state_dict(program).items()
                if key in state
            ]

        pairs = on_every_rank(paired, others="another rank could not load: ")
    with program.half_loaded.watched([key for key, _, _ in pairs]):
        for _, here, given in pairs:
            here.copy_(given)
        optimizer_state.put_numbers(program, {key: here for key, here, _ in pairs})
    program.store.refresh()


def _own_part(program: Trained, key: str, given: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """A tensor laid out as here, or this rank's shard of a whole one. No other shape: copy_ would repeat it."""
    name = _parameter_of(key)
    source = local_tensor(given)
    spec = program.store.specs.get(name)
    if source.shape != here.shape and spec is not None and tuple(source.shape) == tuple(spec.shape):
        source = source[program.store.local_index(name)]
    if source.shape != here.shape:
        raise ShardwrightError(
            f"{key} has shape {tuple(source.shape)}; this rank holds {tuple(here.shape)}",
            means="it is neither the whole tensor nor this rank's part of it; nothing was loaded",
            change="the state dictionary",
            works="program.state_dict() of a program with the same plan, or whole tensors",
        )
    return source


def save(program: Trained, path: str | Path) -> None:
    """Every rank calls it. Written beside the path and renamed at the end: an old checkpoint survives a failure."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    on_every_rank(lambda: optimizer_state.refuse_more_than_state(program.optimizer))
    state = on_every_rank(lambda: state_dict(program))
    on_rank_0(lambda: _writing(lambda: _clear(partial, path)))
    num_bytes = _bytes_written(program, state)
    try:
        with _quiet():
            dcp.save(state, storage_writer=FileSystemWriter(partial))
    except CheckpointException as error:  # on every rank, with the failures of all
        failures = [cause for cause, _ in error.failures.values()]
        raise on_rank_0(lambda: _given_up(partial, path, failures, num_bytes)) from None
    names = on_rank_0(lambda: file_names(partial))  # a shared folder may be listed late elsewhere
    shares = of_all_ranks(on_every_rank(lambda: digests(partial, names[program.grid.rank :: num_ranks()])))
    files = {name: digest for share in shares for name, digest in share.items()}
    groups = merged(of_all_ranks(options_of(program)))
    on_rank_0(lambda: _writing(lambda: _finish(program, partial, path, files, groups)))


def _bytes_written(program: Trained, state: Mapping[str, torch.Tensor]) -> int:
    """By all ranks: what several hold alike is written once."""
    store, grid = program.store, program.grid
    first = grid.is_zero([axis for axis in grid.sizes if axis not in stage_axes()])
    of_parameters = 0
    whole: dict[str, int] = {}
    for key, tensor in state.items():
        name = _parameter_of(key)
        if name not in store.specs:
            whole |= {key: local_tensor(tensor).nbytes} if first else {}  # which other stages may hold too
        elif store.counts_once(name):
            of_parameters += local_tensor(tensor).nbytes
    found = of_all_ranks((of_parameters, whole))
    return sum(count for count, _ in found) + sum({k: n for _, held in found for k, n in held.items()}.values())


def _parameter_of(key: str) -> str:
    """Of a parameter, a buffer, or what the optimizer keeps of a parameter."""
    return optimizer_state.parameter_of(key) or key.split(".", 1)[1]


def _finish(
    program: Trained, partial: Path, path: Path, files: Mapping[str, str], groups: list[dict[str, Any]]
) -> None:
    """Write the document, and put the new checkpoint in the place of an old one."""
    document: dict[str, Any] = {"format": FORMAT, "step": program.step_index, "groups": groups, "files": files}
    document["sha256"] = document_digest(document)
    (partial / _DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
    old = path.with_name(path.name + ".old")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(partial, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _given_up(partial: Path, path: Path, failures: list[BaseException], num_bytes: int) -> ShardwrightError:
    """Nothing unfinished stays behind: it would take the room that the next try needs."""
    cause = next((f for f in failures if isinstance(f, OSError)), failures[0])
    said = (getattr(cause, "strerror", "") or str(cause) or type(cause).__name__).split("\n")[0][:200]
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free
    full = free < num_bytes
    return ShardwrightError(
        f"cannot write the checkpoint at {path}: {said}; it takes {format_bytes(num_bytes)}, and {format_bytes(free)} "
        "are free there",
        means="nothing was saved; an older checkpoint at this path is as it was",
        change="what else lies there, or the path" if full else "the path",
        works=f"a file system with {format_bytes(num_bytes)} free beside an older checkpoint"
        if full
        else "a folder that every rank may write to",
    )


def _clear(partial: Path, path: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(path.name + ".probe")
    probe.touch()
    probe.unlink()


def _writing(action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise ShardwrightError(
            f"cannot write the checkpoint at {error.filename or ''}: {error.strerror}",
            means="nothing was saved",
            change="the path",
            works="a folder that you may write to",
        ) from None


def load(program: Trained, path: str | Path) -> None:
    """Every rank calls it. The checkpoint may come from any layout of the same model; each rank reads its own shards.

    Optimizer state is loaded where the checkpoint has it. Raises ShardwrightError where the folder is no finished
    checkpoint, is damaged, lacks a tensor, or has one of another shape; the program is then as it was before.
    """
    path = Path(path)
    program.settle()
    document, reader = on_every_rank(lambda: _verified(path, program.grid.rank))
    found = reader.read_metadata().state_dict_metadata
    with_optimizer = any(map(optimizer_state.is_state, found))
    state = _loaded_state(program, found, with_optimizer=False)
    on_every_rank(lambda: _check_shapes(path, found, state))
    with optimizer_state.new_state(program, with_optimizer):
        on_every_rank(lambda: optimizer_state.make_what_is_missing(program, _saved_shapes(found)))
        state = _loaded_state(program, found, with_optimizer=with_optimizer)
        on_every_rank(lambda: _check_shapes(path, found, state))
        options = on_every_rank(lambda: options_for(program, document["groups"]) if with_optimizer else [])
        _read(path, state, reader, _Rehearsal())
    with program.half_loaded.watched(state):
        _read(path, state, reader, DefaultLoadPlanner())
        optimizer_state.put_numbers(program, state)
    program.step_index = document["step"]
    if with_optimizer:
        set_options(program, options)
    program.store.refresh()


class _Rehearsal(DefaultLoadPlanner):
    """Everything that this rank would load is read and decoded, one tensor after the other, and written nowhere."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return torch.empty_like(super().resolve_tensor(read_item), device="meta")


def _read(path: Path, state: dict[str, torch.Tensor], reader: SafeReader, planner: DefaultLoadPlanner) -> None:
    """DCP gathers the failures of all ranks, and all raise."""
    try:
        with _quiet():
            dcp.load(state, storage_reader=reader, planner=planner)
    except CheckpointException as error:
        causes = " ".join(str(cause) for cause, _ in error.failures.values())
        raise damaged(path, causes.split("\n")[0][:200]) from None


def _loaded_state(program: Trained, found: Mapping[str, Any], *, with_optimizer: bool) -> dict[str, torch.Tensor]:
    """What is to come from a checkpoint that has these entries. One made in another dtype has no loss scale."""
    whole = state_dict(program)
    state = {k: tensor for k, tensor in whole.items() if with_optimizer or not optimizer_state.is_state(k)}
    if LOSS_SCALE not in found:
        state.pop(LOSS_SCALE, None)
    return state


def _saved_shapes(found: Mapping[str, Any]) -> optimizer_state.Shapes:
    tensors = {key: entry for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    return {key: (tuple(entry.size), entry.properties.dtype) for key, entry in tensors.items()}


def _verified(path: Path, rank: int) -> tuple[dict[str, Any], SafeReader]:
    """The document and a reader, once all files are known to be as they were written; ranks share the reading."""
    document = _read_document(path)
    if problem := first_difference(path, document["files"], rank, num_ranks()):
        raise damaged(path, problem)
    reader = SafeReader(path, document["files"])
    reader.read_metadata()
    return document, reader


def _check_shapes(path: Path, found: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in wanted.items():
        entry = found.get(key)
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != tuple(tensor.shape):
            have = "is missing" if entry is None else f"has shape {tuple(getattr(entry, 'size', ()))}"
            raise ShardwrightError(
                f"{key} {have} in {path}; this model has shape {tuple(tensor.shape)}",
                means="the checkpoint is of another model, or of another optimizer",
                change="the checkpoint's path",
                works="a checkpoint that program.save wrote for this model",
                exit_code=ExitCode.PLAN_MISMATCH,
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a process alone is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / _DOCUMENT).read_text())
    except OSError as error:
        raise ShardwrightError(
            f"{path} is not a finished checkpoint: {error}",
            means=f"{_DOCUMENT} is written last",
            change="the path",
            works="a folder that program.save wrote",
        ) from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{_DOCUMENT}: {error}") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ShardwrightError(
            f"{path} has format {found!r}; this version reads {FORMAT!r}",
            means="it was written by another version, or is damaged; nothing was loaded",
            change="the path",
            works="a checkpoint of this version",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    if document.get("sha256") != document_digest(document):
        raise damaged(path, f"{_DOCUMENT} is not as it was written")
    step, groups, files = (document.get(key) for key in ("step", "groups", "files"))
    sound = type(step) is int and step >= 0 and isinstance(groups, list) and isinstance(files, dict)
    if not sound or not all(
        isinstance(group, dict) and isinstance(group.get("parameters", []), list) for group in groups
    ):
        raise damaged(path, f"{_DOCUMENT} lacks the step, the parameter groups or the checksums")
    return document
