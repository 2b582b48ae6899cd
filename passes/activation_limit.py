"""Split a joint graph so that what the forward keeps for the backward, or all that both hold, stays under a limit.

Keeps everything where that fits. Else PyTorch's min-cut partitioner (Chen et al., "Training Deep Nets with Sublinear
Memory Cost", 2016, with a max-flow cut) recomputes in the backward, with a budget lowered until the rest fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from ..units import GIB, format_bytes
from . import _torch
from .live_bytes import peak_bytes
from .recompute_runs import mark_runs

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)  # fractions of what min-cut alone would keep
SHARES, RUNS = (0.5, 0.75, 1.0), (8, 16, 32)  # of runs that are recomputed; how many runs there are
Pair = tuple[fx.GraphModule, fx.GraphModule]


@dataclass(frozen=True)
class Limits:
    """saved_bytes: most of what is kept from forward to backward. live_bytes: most that either holds at once with what
    is kept, beside parameters and inputs. None: no limit."""

    saved_bytes: int | None = None
    live_bytes: int | None = None


def partition_within(
    joint: fx.GraphModule, joint_inputs: Any, *, limits: Limits, min_cut: bool, **options: Any
) -> Pair:
    """min_cut: start from the min-cut partition, which recomputes what a fusing code generator gets for nothing. Raises
    ShardwrightError where even full recomputation keeps more than the limits."""
    if limits == Limits():
        if min_cut:
            return _torch.partition_keeping(joint, joint_inputs, 1.0, options)
        return _torch.default_partition(joint, joint_inputs, **options)
    num_outputs = options["num_fwd_outputs"]
    least_saved = least_live = math.inf
    pairs = _partitions(joint, joint_inputs, min_cut, options)
    if limits.live_bytes is not None:
        pairs = itertools.chain(pairs, _recomputed_in_runs(joint, joint_inputs, options))
    for pair in pairs:
        saved, live = saved_bytes(pair[0], num_outputs), live_bytes(pair, num_outputs)
        if saved <= (limits.saved_bytes or math.inf) and (limits.live_bytes is None or live <= limits.live_bytes):
            return pair
        least_saved, least_live = min(least_saved, saved), min(least_live, live)
    if limits.live_bytes is not None and least_live > limits.live_bytes:
        raise _no_room(int(least_live), limits.live_bytes)
    assert limits.saved_bytes is not None
    raise ShardwrightError(
        f"the forward keeps at least {format_bytes(least_saved)} for the backward; "
        f"activation_limit is {format_bytes(limits.saved_bytes)}",
        means="recomputing everything that can be recomputed does not go below this",
        change="torch.compile(..., options={'activation_limit': ...}), or a smaller batch",
        works=f"options={{'activation_limit': {least_saved}}}",
        exit_code=ExitCode.DOES_NOT_FIT,
    )


def _no_room(least: int, room: int) -> ShardwrightError:
    return ShardwrightError(
        f"forward and backward hold at least {format_bytes(least)} at once beside parameters and optimizer state, for "
        f"which memory_gib leaves {format_bytes(max(0, room))}",
        means="recomputing everything that can be recomputed does not go below this",
        change="torch.compile(..., options={'memory_gib': ...}), or a smaller batch",
        works=f"memory_gib greater by {(least - room) / GIB:.3g}",
        exit_code=ExitCode.DOES_NOT_FIT,
    )


def _partitions(joint: fx.GraphModule, joint_inputs: Any, min_cut: bool, options: dict[str, Any]) -> Iterator[Pair]:
    """That which keeps most first. The joint graph stays intact."""
    if not min_cut:
        yield _torch.default_partition(_torch.copy_graph_module(joint), joint_inputs, **options)
    for budget in BUDGETS:
        yield _torch.partition_keeping(joint, joint_inputs, budget, options)


def _recomputed_in_runs(joint: fx.GraphModule, joint_inputs: Any, options: dict[str, Any]) -> Iterator[Pair]:
    """Run by run, more and more of them, then shorter runs."""
    for num_runs in RUNS:
        for share in SHARES:
            marked = _torch.copy_graph_module(joint)
            mark_runs(marked.graph, options["num_fwd_outputs"], share, num_runs)
            yield _torch.partition_keeping(marked, joint_inputs, 1.0, options)


def live_bytes(pair: Pair, num_outputs: int) -> int:
    """Most that is held at once beside parameters and inputs. What the backward is given stays until it is done."""
    forward, backward = pair
    return max(peak_bytes(forward.graph), saved_bytes(forward, num_outputs) + peak_bytes(backward.graph))


def saved_bytes(forward: fx.GraphModule, num_outputs: int) -> int:
    """Bytes that the forward hands to its backward, each tensor once, its own inputs and outputs not counted."""
    results = list(_torch.output_node(forward.graph).args[0])  # type: ignore[arg-type]
    saved = {node for node in results[num_outputs:] if isinstance(node, fx.Node) and node.op != "placeholder"}
    total = 0
    for node in saved - set(results[:num_outputs]):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            total += value.numel() * value.element_size()
    return total
