"""The passes over a rank's own graphs, in the order in which they run.

A pass takes a Part and changes its graph in place. SHARDWRIGHT_DUMP=DIR writes the graph after each, as Python that
reads like the model: DIR/rank0/segment3.forward.2-tidy.py. The steps before them, sharding and partition, are written
too.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch import fx

from ..errors import ShardwrightError
from .gradients import write_gradients
from .loss import early_count, fuse_cross_entropy_backward
from .reuse import reuse
from .split import SplitBackward, split_backward
from .tidy import tidy

DUMP_VARIABLE = "SHARDWRIGHT_DUMP"


@dataclass
class Part:
    """One graph of a segment. owned: placeholders whose memory it may use up. into_slots: what write_gradients did."""

    segment: str
    phase: str  # "forward", "backward", "backward_inputs" or "backward_weights"
    module: fx.GraphModule
    num_params: int
    owned: frozenset[str] = frozenset()
    into_slots: tuple[int, ...] = ()


Pass = Callable[[Part], None]


def _over_graph(change: Callable[[fx.Graph], None]) -> Pass:
    @functools.wraps(change)
    def run(part: Part) -> None:
        change(part.module.graph)

    return run


def _reuse(part: Part) -> None:
    reuse(part.module.graph, part.owned)


def _write_gradients(part: Part) -> None:
    part.into_slots = write_gradients(part.module.graph, part.num_params)


FORWARD: dict[str, Pass] = {
    "early_count": _over_graph(early_count),
    "tidy": _over_graph(tidy),
    "reuse": _reuse,
}
BACKWARD: dict[str, Pass] = {
    "fuse_cross_entropy": _over_graph(fuse_cross_entropy_backward),
    "tidy": _over_graph(tidy),
}  # then it is split, where the schedule asks for it
INPUTS: dict[str, Pass] = {"reuse": _reuse}
LAST: dict[str, Pass] = {"write_gradients": _write_gradients, "reuse": _reuse}


def improve_forward(forward: Part) -> None:
    _run(forward, FORWARD)
    forward.module.recompile()


def improve_backward(backward: Part, splits: bool) -> SplitBackward | None:
    """splits: also as two programs, of the inputs' gradients and of the parameters'; they are returned."""
    _run(backward, BACKWARD)
    split = split_backward(backward.module, backward.num_params) if splits else None
    if split is not None:
        inputs = replace(backward, phase="backward_inputs", module=split.inputs)
        weights = replace(backward, phase="backward_weights", module=split.weights, owned=frozenset())
        _run(inputs, INPUTS)
        _run(weights, LAST)
        split = replace(split, into_slots=weights.into_slots)
        split.inputs.recompile()
        split.weights.recompile()
    _run(backward, LAST, len(BACKWARD))
    backward.module.recompile()
    return split


def _run(part: Part, passes: dict[str, Pass], already: int = 0) -> None:
    for number, (name, change) in enumerate(passes.items(), already + 1):
        change(part)
        dump(part.module, f"{part.segment}.{part.phase}.{number}-{name}")


def dump(module: fx.GraphModule, name: str) -> None:
    """Write a graph where the debug switch asks for it."""
    folder = os.environ.get(DUMP_VARIABLE)
    if not folder:
        return
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    path = Path(folder) / f"rank{rank}" / f"{name}.py"
    module.recompile()
    text = module.print_readable(print_output=False, include_stride=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ShardwrightError(
            f"{path} cannot be written: {error.strerror}",
            means=f"{DUMP_VARIABLE} asks for each graph to be written below {folder}",
            change=DUMP_VARIABLE,
            works=f"{DUMP_VARIABLE}=./graphs",
        ) from None
