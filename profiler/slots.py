"""The slots of a segment's joint graph: what goes in and what comes out, in which order and under which names.

Placeholders, in order: params, buffers, inputs, key, tangents (one per output that requires grad).
Results, in order: outputs, updates (new values of written buffers), param_grads, input_grads.
The name of a slot is its kind and its number, as "param_3", except that there is one key, named "key".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PARAM, BUFFER, INPUT, KEY, TANGENT = "param", "buffer", "input", "key", "tangent"
OUTPUT, UPDATE, PARAM_GRAD, INPUT_GRAD = "output", "update", "param_grad", "input_grad"
GRADIENTS = (PARAM_GRAD, INPUT_GRAD)
LASTING = (PARAM, BUFFER, KEY)  # there before a forward and after its backward


def slot_name(kind: str, index: int) -> str:
    return f"{kind}_{index}"


def slot_names(kind: str, count: int) -> list[str]:
    return [slot_name(kind, index) for index in range(count)]


def kind_of(name: str) -> str:
    """Of the slot with this name. Only a name of a slot has a kind that is one of the above."""
    return name.rpartition("_")[0] or name


def index_of(name: str) -> int:
    return int(name.rpartition("_")[2])


@dataclass(frozen=True)
class JointSignature:
    """How many slots there are of each kind, and which of them take part in gradients."""

    param_requires_grad: Sequence[bool]
    num_buffers: int
    input_requires_grad: Sequence[bool]
    num_updates: int
    output_requires_grad: Sequence[bool]

    @property
    def arguments(self) -> list[str]:
        """Placeholders of the forward: all but the tangents."""
        params, inputs = len(self.param_requires_grad), len(self.input_requires_grad)
        return [*slot_names(PARAM, params), *slot_names(BUFFER, self.num_buffers), *slot_names(INPUT, inputs), KEY]

    @property
    def results(self) -> list[str]:
        params, inputs = len(self.param_requires_grad), len(self.input_requires_grad)
        outputs = [*slot_names(OUTPUT, len(self.output_requires_grad)), *slot_names(UPDATE, self.num_updates)]
        return [*outputs, *slot_names(PARAM_GRAD, params), *slot_names(INPUT_GRAD, inputs)]

    @property
    def differentiated(self) -> list[tuple[int, bool]]:
        """(place among the arguments, whether its gradient is wanted) of parameters and inputs, in their order."""
        wanted = {PARAM: iter(self.param_requires_grad), INPUT: iter(self.input_requires_grad)}
        kinds = [kind_of(name) for name in self.arguments]
        return [(place, next(wanted[kind])) for place, kind in enumerate(kinds) if kind in wanted]

    @property
    def tangents(self) -> list[int]:
        """The output of each tangent."""
        return [index for index, requires_grad in enumerate(self.output_requires_grad) if requires_grad]

    def of_outputs(self, results: Sequence[Any]) -> list[Any]:
        return list(results[: len(self.output_requires_grad)])
