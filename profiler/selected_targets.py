"""Targets of connectionist temporal classification picked by a mask, one after the other: padded again.

`labels.masked_select(mask)` is as long as the data make it, so nothing that reads it can be planned. The one reader
that needs no length is F.ctc_loss, which also takes a padded row of targets for each sample: where it is given what a
mask selected, it gets the same targets in rows, those that count first. Lengths must be the mask's own, row by row,
else the flat targets would be cut elsewhere: that is handed back as a condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

SELECT = (torch.masked_select, torch.Tensor.masked_select)


class Selected:
    """What a mask selects of rows of whole numbers. flat: makes it, where anything but ctc_loss reads it."""

    def __init__(self, values: torch.Tensor, mask: torch.Tensor) -> None:
        self.values, self.mask = values, mask
        self.made: torch.Tensor | None = None

    def flat(self) -> torch.Tensor:
        if self.made is None:
            # The op itself: torch.masked_select would be answered with a Selected again.
            self.made = torch.ops.aten.masked_select.default(self.values, self.mask)
        return self.made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = lambda value: value.flat() if isinstance(value, Selected) else value  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.flat(), name)

    def rows(self) -> torch.Tensor:
        """The selected values of each row before zeros."""
        first = self.mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        return self.values.masked_fill(~self.mask, 0).gather(1, first)


def _forwarded(name: str) -> Callable[..., Any]:
    """Python looks operators up on the class, past __getattr__."""

    def operator(self: Selected, *args: Any) -> Any:
        args = tuple(arg.flat() if isinstance(arg, Selected) else arg for arg in args)
        return getattr(self.flat(), name)(*args)

    return operator


_BINARY = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_OTHERS = """eq ne lt le gt ge neg pos abs invert bool int float index complex len iter reversed contains getitem
    setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift""".split()
for _name in [*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS]:
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(Selected, f"__{_name}__", _forwarded(f"__{_name}__"))


def selection_of_rows(args: Any, kwargs: Any) -> Selected | None:
    """What masked_select is asked for, where it is whole numbers in rows, each with its own entry of the mask."""
    given = [*args, *(kwargs or {}).values()]
    if len(given) != 2 or not all(isinstance(tensor, torch.Tensor) for tensor in given):
        return None
    values, mask = given
    in_rows = values.dim() == 2 and values.shape == mask.shape and not values.is_floating_point()
    return Selected(values, mask) if in_rows else None


def ctc_loss_in_rows(args: Any, kwargs: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(the loss of padded targets, whether that is the loss asked for); None where no mask selected the targets."""
    names = ("log_probs", "targets", "input_lengths", "target_lengths")
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    targets, lengths = given["targets"], given["target_lengths"]
    if not isinstance(targets, Selected):
        return None
    counts = targets.mask.sum(1)
    lengths = lengths if isinstance(lengths, torch.Tensor) else torch.tensor(lengths)
    others = args[len(names) :]
    loss = F.ctc_loss(
        given["log_probs"],
        targets.rows(),
        given["input_lengths"],
        lengths,
        *others,
        **{name: value for name, value in (kwargs or {}).items() if name not in names},
    )
    return loss, (lengths == counts).all()
