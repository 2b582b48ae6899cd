"""Checkpoints by torch.distributed.checkpoint (DCP), whose layout a later program need not share.

Keys of the flat state:

    model.NAME              the parameter as the optimizer steps over it (the master copy)
    buffer.NAME             a buffer
    optimizer.NAME.STATE    one entry of the optimizer's state for that parameter

Beside DCP's files stands program.json: {"format", "step", "groups": hyperparameters of each parameter group}. It is
written last, so that a folder without it is an unfinished checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import ExitCode, ShardwrightError
from .parameters import local_tensor

if TYPE_CHECKING:
    from .program import Program

FORMAT = "shardwright.checkpoint/1"
_DOCUMENT = "program.json"


def state_dict(program: Program) -> dict[str, torch.Tensor]:
    """This rank's tensors by the keys above, without copies: DTensors, or plain tensors that one rank holds alone."""
    state: dict[str, torch.Tensor] = {f"model.{n}": p.detach() for n, p in program.named_parameters()}
    state.update({f"buffer.{name}": tensor for name, tensor in program.named_buffers()})
    optimizer = program.optimizer
    if optimizer is not None:
        for parameter, entries in optimizer.state.items():
            name = program.store.name_of(parameter)
            for key, value in entries.items():
                if isinstance(value, torch.Tensor):
                    state[f"optimizer.{name}.{key}"] = _as_parameter(program, name, value)
    return state


def _as_parameter(program: Program, name: str, value: torch.Tensor) -> torch.Tensor:
    """Optimizer state that lies as its parameter does; a count of steps is the same everywhere."""
    shape = program.store.local_parameters[name].shape
    same = value.shape == shape and not isinstance(value, DTensor)
    return program.store.as_dtensor(name, value) if same else value


@torch.no_grad()
def load_state_dict(program: Program, state: Mapping[str, torch.Tensor]) -> None:
    """Copy values in. Each may be laid out as here, or be a whole tensor, of which each rank takes its shard."""
    program.settle()
    if any(key.startswith("optimizer.") for key in state):
        make_optimizer_state(program)
    for key, target in state_dict(program).items():
        if key not in state:
            continue
        name = key.split(".", 1)[1]
        if key.startswith("optimizer."):
            name = name.rsplit(".", 1)[0]
        source, here = local_tensor(state[key]), local_tensor(target)
        if source.shape != here.shape and name in program.store.specs:
            source = source[program.store.local_index(name)]
        here.copy_(source)
    program.store.refresh()


@torch.no_grad()
def make_optimizer_state(program: Program) -> None:
    """Give the optimizer the state that it makes on its first step, without moving a parameter."""
    optimizer = program.optimizer
    if optimizer is None or optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    held = (program.store.parameters, program.store.local_parameters)
    grads = [{name: p.grad for name, p in row.items()} for row in held]
    for row in held:
        for name, parameter in row.items():
            parameter.grad = torch.zeros_like(parameter) if program.store.specs[name].has_grad else None
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for row, before in zip(held, grads, strict=True):
        for name, parameter in row.items():
            parameter.grad = before[name]


def save(program: Program, path: str | Path) -> None:
    """Every rank calls it. Written beside the path and renamed at the end: an old checkpoint survives a failure."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    first = program.grid.rank == 0
    _on_first_rank(program, lambda: _clear(partial, path))
    with _quiet():
        dcp.save(state_dict(program), storage_writer=FileSystemWriter(partial))
    if first:
        optimizer = program.optimizer
        groups = [_plain_options(group) for group in optimizer.param_groups] if optimizer is not None else []
        document = {"format": FORMAT, "step": program.step_index, "groups": groups}
        (partial / _DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
        old = path.with_name(path.name + ".old")
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()


def _clear(partial: Path, path: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    probe = path.with_name(path.name + ".probe")
    probe.touch()
    probe.unlink()


def _on_first_rank(program: Program, action: Any) -> None:
    """Rank 0 acts; all raise if it fails."""
    message: list[Any] = [None]
    if program.grid.rank == 0:
        try:
            action()
        except OSError as error:
            message = [f"{error.filename or ''}: {error.strerror}"]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise ShardwrightError(
            f"cannot write the checkpoint at {message[0]}",
            means="nothing was saved",
            change="the path",
            works="a folder that you may write to",
        )


def load(program: Program, path: str | Path) -> None:
    """Every rank calls it. The checkpoint may come from any layout of the same model; each rank reads its own shards.

    Optimizer state is loaded where the checkpoint has it. Raises ShardwrightError where the folder is no finished
    checkpoint, lacks a tensor, or has one of another shape.
    """
    path = Path(path)
    document = _read_document(path)
    reader = FileSystemReader(path)
    found = reader.read_metadata().state_dict_metadata
    with_optimizer = any(key.startswith("optimizer.") for key in found)
    own = state_dict(program)
    _check_shapes(path, found, {k: tensor for k, tensor in own.items() if not k.startswith("optimizer.")})
    if with_optimizer:
        make_optimizer_state(program)
        own = state_dict(program)
        _check_shapes(path, found, own)
    state = {k: tensor for k, tensor in own.items() if with_optimizer or not k.startswith("optimizer.")}
    with _quiet():
        dcp.load(state, storage_reader=reader)
    program.step_index = int(document["step"])
    if program.optimizer is not None and with_optimizer:
        for group, options in zip(program.optimizer.param_groups, document["groups"], strict=False):
            group.update(options)
    program.store.refresh()


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
        document: dict[str, Any] = json.loads((path / _DOCUMENT).read_text())
    except (OSError, ValueError) as error:
        raise ShardwrightError(
            f"{path} is not a finished checkpoint: {error}",
            means=f"{_DOCUMENT} is written last",
            change="the path",
            works="a folder that program.save wrote",
        ) from None
    if document.get("format") != FORMAT:
        raise ShardwrightError(
            f"{path} has format {document.get('format')!r}; this version reads {FORMAT!r}",
            change="the path",
            works="a checkpoint of this version",
            exit_code=ExitCode.PLAN_MISMATCH,
        )
    return document


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a parameter group that JSON can hold."""
    options = {}
    for key, value in group.items():
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if key != "params" and isinstance(value, (int, float, bool, str, list, tuple, type(None))):
            options[key] = value
    return options
