"""What one torch.compile(..., options={"memory_gib": ...}) leaves the graphs that Dynamo makes of a model.

Of the budget go the parameters and buffers that the graphs read, gradients, what the user's optimizer keeps of each
trained parameter, and what a process holds before its first tensor. Between their forwards and backwards all graphs
keep what they saved: each that is compiled gets what those before it leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .costmodel.memory import reserve_bytes, slack_factor
from .errors import ExitCode, ShardwrightError
from .passes._torch import compiled_frame
from .units import GIB, format_bytes


@dataclass
class MemoryBudget:
    """state_tensors: of a parameter's size, that the optimizer keeps."""

    num_bytes: int
    state_tensors: int
    _parameters: dict[int, tuple[int, bool]] = field(default_factory=dict)  # memory -> bytes, and whether it is trained
    _kept: dict[Any, int] = field(default_factory=dict)  # graph -> bytes from forward to backward

    def room_for(self, inputs: Sequence[Any]) -> int:
        """Bytes that the graph being compiled, which takes these inputs, may hold at once beside what lasts."""
        kind = "cpu"
        own: set[int] = set()
        passing = 0
        for tensor in inputs:
            if not isinstance(tensor, torch.Tensor):
                continue
            kind = "cpu" if tensor.device.type == "cpu" else "gpu"
            size = tensor.numel() * tensor.element_size()
            if isinstance(tensor, (torch.nn.Parameter, torch.nn.Buffer)):
                self._parameters[id(tensor)] = size, tensor.requires_grad
                own.add(id(tensor))
            else:
                passing += size
        trained = sum(size for size, trains in self._parameters.values() if trains)
        of_others = sum(size for key, (size, trains) in self._parameters.items() if trains and key not in own)
        whole = sum(size for size, _ in self._parameters.values()) + self.state_tensors * trained
        usable = int(self.num_bytes / slack_factor(kind)) - reserve_bytes(kind, 0)
        self._refuse_above(whole + trained, usable)
        others = sum(size for frame, size in self._kept.items() if frame != compiled_frame())
        return usable - whole - of_others - passing - others

    def _refuse_above(self, lasting: int, usable: int) -> None:
        if lasting > usable:
            missing = lasting - usable
            raise ShardwrightError(
                f"parameters, gradients and {self.state_tensors} optimizer tensors take {format_bytes(lasting)}; "
                f"memory_gib={self.num_bytes / GIB:g} leaves {format_bytes(usable)}",
                means="no recomputation makes these smaller, and the optimizer of your script is its own",
                change="memory_gib, state_tensors (0 for SGD), or @shardwright.parallelize, which can keep optimizer "
                "state in host memory",
                works=f"options={{'memory_gib': {(self.num_bytes + 1.2 * missing) / GIB:.3g}}}",
                exit_code=ExitCode.DOES_NOT_FIT,
            )

    def keep(self, saved_bytes: int) -> None:
        """By the graph that was compiled, from forward to backward; of its variants the most counts."""
        frame = compiled_frame()
        self._kept[frame] = max(saved_bytes, self._kept.get(frame, 0))


# By the options of one torch.compile call, which it hands to the backend with every graph; kept, so that no other call
# gets the same identity.
_budgets: dict[int, tuple[Mapping[str, Any], MemoryBudget]] = {}


def budget_of(options: Mapping[str, Any], num_bytes: int, state_tensors: int) -> MemoryBudget:
    return _budgets.setdefault(id(options), (options, MemoryBudget(num_bytes, state_tensors)))[1]
