"""First values of parameters and buffers of a model on the meta device, the same whoever asks, and no more than asked.

The draws of a tensor depend on (seed, its name) alone. So a rank that holds three blocks makes just these, and gets
what the single-device model has there. Values are made a block at a time: a child of a ModuleList, or what is left of
the model without those.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ExitCode, ShardwrightError
from .batches import make_batch
from .copies import carry_hooks, copy_workload
from .recorded import first_values
from .workload import Workload

_UNSET_INTEGER = -(2**40) - 1  # marks integer tensors that no initializer wrote


def initial_tensors(
    model: nn.Module, names: Collection[str] | None = None, *, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (fully qualified name, value on CPU) of each parameter and buffer, tied ones once, under their first name.

    names: only these (blocks that hold none of them are not made). A model with real values gives its own. A model on
    meta is initialized as its library does: transformers' _init_weights, else reset_parameters() of each module, else
    what the constructor wrote, where the model was built under recorded.Recorder.
    Raises ShardwrightError naming a tensor that neither writes.
    """
    wanted = None if names is None else set(names)
    first_names = {id(t): name for name, t in [*_named_tensors(model)][::-1]}
    done: set[str] = set()
    for path, block in _blocks(model):
        prefix = path + "." if path else ""
        local = {name: prefix + name for name, _ in _block_tensors(model, path, block)}
        canonical = {name: first_names[id(t)] for name, t in _block_tensors(model, path, block)}
        needed = {n for n in local if canonical[n] not in done and (wanted is None or canonical[n] in wanted)}
        if not needed:
            continue
        values = _block_values(model, path, block, needed, seed)
        for name in local:
            if name in needed and canonical[name] not in done:
                done.add(canonical[name])
                yield canonical[name], values[name]


def materialize(workload: Workload, device: torch.device | str = "cpu") -> Workload:
    """The workload with real values: weights by initial_tensors(seed=workload.seed), batch by make_batch.

    The given one is not touched. For reference runs of models that fit one device.
    """
    copied = copy_workload(workload)
    model = copied.model
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                places.setdefault(id(tensor), []).append((module, name))
    by_name = dict(_named_tensors(model))
    for name, value in initial_tensors(workload.model, seed=workload.seed):
        old = by_name[name]
        new: torch.Tensor = value.to(device=device, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new.detach().clone(), requires_grad=old.requires_grad)
        for module, slot in places[id(old)]:
            (module._parameters if slot in module._parameters else module._buffers)[slot] = new  # type: ignore[assignment]
    carry_hooks(workload.model, model)
    batch = workload.example_batch
    if any(tensor.is_meta for tensor in batch.values()):
        batch = make_batch(workload, device=device, seed=workload.seed)
    else:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return dataclasses.replace(copied, example_batch=batch)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of each child of an outermost ModuleList, then ('', model) for the rest."""
    found: list[tuple[str, nn.Module]] = []

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList):
                found.extend((f"{child_path}.{index}", entry) for index, entry in enumerate(child) if entry is not None)
            else:
                visit(child_path, child)

    visit("", model)
    return [*found, ("", model)]


def _block_tensors(model: nn.Module, path: str, block: nn.Module) -> list[tuple[str, torch.Tensor]]:
    if path:
        return list(_named_tensors(block))
    inside = {f"{p}." for p, _ in _blocks(model) if p}
    return [(n, t) for n, t in _named_tensors(model) if not any(n.startswith(prefix) for prefix in inside)]


def _block_values(
    model: nn.Module, path: str, block: nn.Module, needed: Collection[str], seed: int
) -> dict[str, torch.Tensor]:
    tensors = dict(_block_tensors(model, path, block))
    if not any(tensors[name].is_meta for name in needed):
        return {name: tensors[name].detach() for name in needed}
    shell = _shell(block, set(needed))
    names = {t.data_ptr(): f"{path}.{name}" if path else name for name, t in _named_tensors(shell) if not t.is_meta}
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _SeedByName(names, seed):
        _initialize(shell, _initializer(model, path), real=set(needed))
    values = dict(_named_tensors(shell))
    recorded = first_values(model)
    unset = []
    for name in needed:
        full_name = f"{path}.{name}" if path else name
        if not _is_unset(values[name]):
            continue
        written = recorded.value(full_name, seed) if recorded is not None else None
        if written is None:
            unset.append(full_name)
        else:
            values[name] = written.detach().to(values[name].dtype)
    if unset:
        raise ShardwrightError(
            f"{len(unset)} tensors of this model on meta have no first value: {', '.join(sorted(unset)[:4])}",
            means="no reset_parameters() and no library initializer writes them",
            change="build the model with real values, or give the modules that own them a reset_parameters()",
            works="a factory without torch.device('meta')",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )
    return {name: values[name].detach() for name in needed}


def _initializer(model: nn.Module, path: str) -> object:
    """That of the innermost model around the module at `path`: a backbone inside a detector brings its own."""
    found, module = getattr(model, "_init_weights", None), model
    for part in path.split(".") if path else []:
        module = getattr(module, part)
        found = getattr(module, "_init_weights", None) or found
    return found


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


class _SeedByName(TorchFunctionMode):
    """Before anything is written to a tensor in place, seed the default generator with (seed, name of the tensor)."""

    def __init__(self, names: dict[int, str], seed: int) -> None:
        super().__init__()
        self.names, self.seed = names, seed

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, torch.Tensor) and getattr(func, "__name__", "").endswith("_") and not target.is_meta:
            name = self.names.get(target.data_ptr())
            if name is not None:
                torch.default_generator.manual_seed(_seed_of(self.seed, name))
        return func(*args, **kwargs)


def _shell(block: nn.Module, real: set[str]) -> nn.Module:
    """A copy of the block whose tensors named in `real` lie on the CPU, marked as unset; others stay on meta."""
    shell = copy.deepcopy(block)
    replaced: dict[int, torch.Tensor] = {}
    for module_path, module in shell.named_modules(remove_duplicate=False):
        module.__dict__.pop("_is_hf_initialized", None)
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None or (f"{module_path}.{name}" if module_path else name) not in real:
                    continue
                if id(tensor) not in replaced:
                    fresh = torch.empty_like(tensor, device="cpu")
                    fresh.fill_(float("nan") if fresh.dtype.is_floating_point else _unset_value(fresh.dtype))
                    parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = nn.Parameter(fresh, tensor.requires_grad) if parameter else fresh
                table[name] = replaced[id(tensor)]  # type: ignore[assignment]
    return shell


def _initialize(module: nn.Module, initialize: object, real: set[str], path: str = "") -> None:
    """Children first, then the module, as transformers does; a nested model brings its own initializer."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if any(entry.startswith(child_path + ".") for entry in real):
            own = child.__dict__.get("_init_weights") or getattr(type(child), "_init_weights", None)
            _initialize(child, child._init_weights if own else initialize, real, child_path)
    if callable(initialize):
        initialize(module)
    elif callable(reset := getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)):
        reset()


def _unset_value(dtype: torch.dtype) -> int:
    if dtype == torch.bool:
        return 0
    return _UNSET_INTEGER if dtype == torch.int64 else torch.iinfo(dtype).min


def _is_unset(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:
        return True
    if tensor.dtype.is_floating_point:
        return bool(torch.isnan(tensor).any())
    if tensor.dtype == torch.bool or not tensor.numel():
        return False
    return bool((tensor == _unset_value(tensor.dtype)).any())
