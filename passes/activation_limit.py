"""Split a joint graph so that what the forward keeps for the backward stays under a limit in bytes.

Keeps everything where that fits. Else PyTorch's min-cut partitioner (Chen et al., "Training Deep Nets with Sublinear
Memory Cost", 2016, with a max-flow cut) recomputes in the backward, with a budget lowered until the rest fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from ..units import format_bytes
from . import _torch

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)  # fractions of what min-cut alone would keep


def partition_within(
    joint: fx.GraphModule, joint_inputs: Any, *, limit_bytes: int | None, min_cut: bool, **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """limit_bytes: most bytes of saved tensors, inputs (and so parameters) not counted; None: no limit.

    min_cut: start from the min-cut partition, which recomputes what a fusing code generator gets for nothing. Raises
    ShardwrightError where even full recomputation keeps more than the limit.
    """
    if limit_bytes is None:
        if min_cut:
            return _torch.partition_keeping(joint, joint_inputs, 1.0, options)
        return _torch.default_partition(joint, joint_inputs, **options)
    num_outputs = options["num_fwd_outputs"]
    least: int | None = None
    if not min_cut:
        whole = _torch.copy_graph_module(joint)
        pair = _torch.default_partition(whole, joint_inputs, **options)
        least = saved_bytes(pair[0], num_outputs)
        if least <= limit_bytes:
            return pair
    for budget in BUDGETS:
        pair = _torch.partition_keeping(joint, joint_inputs, budget, options)
        kept = saved_bytes(pair[0], num_outputs)
        if kept <= limit_bytes:
            return pair
        least = kept if least is None else min(least, kept)
    assert least is not None
    raise ShardwrightError(
        f"the forward keeps at least {format_bytes(least)} for the backward; "
        f"activation_limit is {format_bytes(limit_bytes)}",
        means="recomputing everything that can be recomputed does not go below this",
        change="torch.compile(..., options={'activation_limit': ...}), or a smaller batch",
        works=f"options={{'activation_limit': {least}}}",
        exit_code=ExitCode.DOES_NOT_FIT,
    )


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
