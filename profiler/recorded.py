"""What a model's constructor wrote, though it ran on meta: recorded there, and run again for the tensors asked for.

Most tensors get their first value from an initializer that can be called later (initial_values.py). Others have only
what the constructor said: `nn.Parameter(torch.zeros(1, 1, width))`, a table of sinusoids, the two factors of a weight
norm. Building under `Recorder` notes each operation on meta tensors; `FirstValues` runs those that lead to one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
class _Step:
    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[torch.Tensor, ...]

    def inputs(self) -> Iterator[torch.Tensor]:
        return (leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, torch.Tensor))


class Recorder(TorchDispatchMode):
    """Notes every operation that gives meta tensors, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
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
        result = func(*args, **kwargs)
        outputs = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if any(output.is_meta for output in outputs):
            self.steps.append(_Step(len(self.steps), func, args, kwargs, outputs))
        return result


class FirstValues:
    """Values of a model's tensors as its constructor left them. Kept beside the model; never copied with it."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.steps = recorder.steps
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.tensors = {name: tensor.detach() for name, tensor in named}

    def __deepcopy__(self, memo: dict[int, Any]) -> FirstValues:
        return self

    def value(self, name: str, seed: int) -> torch.Tensor | None:
        """On the CPU; None where the constructor did not make it.

        Draws depend on the seed and on their place in the constructor, so that tensors made of the same draws agree.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        needed = self._leading_to(_storage(tensor))
        if not needed:
            return None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return self._run(needed, tensor, seed)

    def _leading_to(self, storage: int) -> list[_Step]:
        """The steps that write this storage, and those that write what they read, in order."""
        wanted, needed = {storage}, []
        for step in reversed(self.steps):
            written = {_storage(output) for output in step.outputs}
            if wanted & written:
                needed.append(step)
                wanted |= {_storage(tensor) for tensor in step.inputs() if tensor.is_meta}
        return needed[::-1]

    @staticmethod
    def _run(steps: list[_Step], wanted: torch.Tensor, seed: int) -> torch.Tensor | None:
        made: dict[int, torch.Tensor] = {}  # by identity of the meta tensor
        views: dict[int, torch.Tensor] = {}  # by storage: any tensor over it

        def real(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                return tensor
            if id(tensor) not in made:  # an alias that no step made, such as the Parameter around a tensor
                base = views[_storage(tensor)]
                made[id(tensor)] = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            return made[id(tensor)]

        for step in steps:
            args, kwargs = tree_map_only(torch.Tensor, real, (step.args, dict(step.kwargs)))
            if str(kwargs.get("device", "")).startswith("meta"):
                kwargs["device"] = torch.device("cpu")
            torch.default_generator.manual_seed((seed << 24) + step.index)
            result = step.func(*args, **kwargs)
            outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            for meta, value in zip(step.outputs, outputs, strict=True):
                made[id(meta)] = value
                views.setdefault(_storage(meta), value)
        return real(wanted) if _storage(wanted) in views else None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_ATTRIBUTE = "_shardwright_first_values"


def remember(model: nn.Module, recorder: Recorder) -> None:
    model.__dict__[_ATTRIBUTE] = FirstValues(model, recorder)


def first_values(model: nn.Module) -> FirstValues | None:
    return model.__dict__.get(_ATTRIBUTE)
