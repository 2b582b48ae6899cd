"""What a trace of the forward alone would lose of a model: recorded while it is exported, or refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .attributes import Attributes
from .autograd_functions import Calls, guarded_engine, recorded_functions
from .copies import refuse_scripted
from .data_attribute import data_as_detached
from .gradient_hooks import GradientHooks, recorded_hooks, refuse_hooks
from .own_checkpoints import Parts, captured_through


class AsWritten:
    """One capture's record. hooks: to be placed in the graph once it is there."""

    def __init__(self, model: nn.Module) -> None:
        refuse_scripted(model)
        refuse_hooks(model)
        originals = {
            id(tensor): (module, name)
            for module in model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        }
        self.calls = Calls(originals)
        self.hooks = GradientHooks(model, self.calls)
        self.parts, self.attributes = Parts(), Attributes(model)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        with (
            self.attributes.put_back(),
            captured_through(self.parts),
            guarded_engine(self.calls),
            recorded_functions(self.calls),
            recorded_hooks(self.hooks),
            data_as_detached(self.calls),
        ):
            yield

    def begin(self) -> None:
        """In the trace, before the forward."""
        self.attributes.begin()
        self.hooks.record_parameters()

    def end(self) -> None:
        """In the trace, after the forward."""
        self.attributes.note_changes()
        self.attributes.write_buffers()
        self.parts.run_again()
