"""The actions of a pipeline rank, as the schedules write them and the simulator and the runtime read them."""

from __future__ import annotations

import re
from typing import NamedTuple

FORWARD = "F"
BACKWARD = "B"  # input and weight gradients in one
BACKWARD_INPUT = "I"
BACKWARD_WEIGHT = "W"
RECOMPUTE = "R"  # the forward again, whose activations were not kept
OFFLOAD = "O"  # the copy of the activations to host memory, begun as the forward ended, is over, and they are let go
LOAD = "L"  # memory is taken for them and the copy back begins; the backward waits for its end
KINDS = (FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, RECOMPUTE, OFFLOAD, LOAD)

_PATTERN = re.compile(rf"(\d+)([{''.join(KINDS)}])(\d+)")


class Action(NamedTuple):
    """One piece of work on one virtual stage for one microbatch. Prints as '3F0', as torch's pipelining does."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def parse_action(text: str) -> Action:
    """Reverse of str(action)."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not an action such as '3F0'")
    return Action(match[2], int(match[1]), int(match[3]))
