"""What a model's constructor wrote, though it ran on meta: recorded there, and run again for the tensors asked for.

Most tensors get their first value from an initializer that can be called later (initial_values.py). Others have only
what the constructor said: `nn.Parameter(torch.zeros(1, 1, width))`, a table of sinusoids, the two factors of a weight
norm. Building under `Recorder` notes each operation on meta tensors; `FirstValues` runs those that lead to one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class _Literals(TorchFunctionMode):
    """torch.tensor(numbers) under torch.device("meta") forgets the numbers before any operation is seen: copy them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in (torch.tensor, torch.as_tensor) or kwargs.get("device") not in (None, torch.device("meta")):
            return func(*args, **kwargs)
        source = args[0] if args else kwargs.get("data")
        if isinstance(source, torch.Tensor):
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        with torch.device("cpu"):
            numbers = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return numbers.to("meta").requires_grad_(requires_grad)


@dataclass(frozen=True)
class _Ref:
    """A meta tensor as it was when an operation saw it: `.data = ...` may give the same object another storage."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Ref:
        storage = tensor.untyped_storage()._cdata
        return cls(storage, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


@dataclass(frozen=True)
class _Step:
    """args and kwargs hold a _Ref in place of each meta tensor."""

    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[_Ref | None, ...]

    def reads(self) -> set[int]:
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return {leaf.storage for leaf in leaves if isinstance(leaf, _Ref)}

    def writes(self) -> set[int]:
        return {output.storage for output in self.outputs if output is not None}


class Recorder(TorchDispatchMode):
    """Notes every operation that gives meta tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._kept: dict[int, Any] = {}  # storages live on, so that none takes another's identity
        self._literals = _Literals()

    def __enter__(self) -> Recorder:
        self._literals.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._literals.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        noted_args, noted_kwargs = tree_map_only(torch.Tensor, self._note, (tuple(args), dict(kwargs)))
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(leaf.is_meta for leaf in leaves):
            outputs = tuple(self._note(leaf) if leaf.is_meta else None for leaf in leaves)
            self.steps.append(_Step(len(self.steps), func, noted_args, noted_kwargs, outputs))
        return result

    def _note(self, tensor: torch.Tensor) -> Any:
        if not tensor.is_meta:
            return tensor
        self._kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return _Ref.of(tensor)


class FirstValues:
    """Values of a model's tensors as its constructor left them. Kept beside the model; never copied with it."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.steps, self._kept = recorder.steps, recorder._kept
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {name: _Ref.of(tensor) for name, tensor in named if tensor.is_meta}

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstValues:
        return self

    def value(self, name: str, seed: int) -> torch.Tensor | None:
        """On the CPU; None where the constructor did not make it.

        Draws depend on the seed and on their place in the constructor, so that tensors made of the same draws agree.
        """
        wanted = self.tensors.get(name)
        needed = self._leading_to(wanted.storage) if wanted is not None else []
        if wanted is None or not needed:
            return None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return _run(needed, wanted, seed)

    def _leading_to(self, storage: int) -> list[_Step]:
        """The steps that write this storage, and those that write what they read, in order."""
        wanted = {storage}
        needed: list[_Step] = []
        for step in reversed(self.steps):
            if wanted & step.writes():
                needed.append(step)
                wanted |= step.reads()
        return needed[::-1]


def _run(steps: list[_Step], wanted: _Ref, seed: int) -> torch.Tensor:
    bases: dict[tuple[int, torch.dtype], torch.Tensor] = {}  # a tensor over each storage

    def real(ref: _Ref) -> torch.Tensor:
        return bases[(ref.storage, ref.dtype)].as_strided(ref.shape, ref.stride, ref.offset)

    for step in steps:
        args, kwargs = tree_map_only(_Ref, real, (step.args, dict(step.kwargs)))
        if str(kwargs.get("device", "")).startswith("meta"):
            kwargs["device"] = torch.device("cpu")
        torch.default_generator.manual_seed((seed << 24) + step.index)
        result = step.func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for ref, found in zip(step.outputs, leaves, strict=True):
            if ref is None or (ref.storage, ref.dtype) in bases:
                continue
            if found.stride() != ref.stride:  # laid out as on meta, so that views of it are the same
                found = torch.empty_strided(ref.shape, ref.stride, dtype=ref.dtype).copy_(found)
            bases[(ref.storage, ref.dtype)] = found
    return real(wanted)


_ATTRIBUTE = "_shardwright_first_values"


def remember(model: nn.Module, recorder: Recorder) -> None:
    model.__dict__[_ATTRIBUTE] = FirstValues(model, recorder)


def first_values(model: nn.Module) -> FirstValues | None:
    return model.__dict__.get(_ATTRIBUTE)
