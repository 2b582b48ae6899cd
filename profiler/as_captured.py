"""A model that is captured again, for another size of its batch, is captured as it was the first time.

Since then its user may have frozen a layer or called eval(); the program follows both without another graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class AsCaptured:
    """Which parameters of a model train, and the mode of each module, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._modes = {name: module.training for name, module in model.named_modules()}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the model is as it was then; afterwards, as it is now."""
        now = AsCaptured(self._model)
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        for name, module in self._model.named_modules():
            module.training = self._modes.get(name, module.training)
