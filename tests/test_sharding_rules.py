"""Every sharding rule is true: ranks that run an op as a strategy says hold, together, what one rank computes.

The oracle is the op itself on whole tensors. Each rank's program comes from the sharding pass, so that size arguments,
offsets of random ops and lowerings with their collectives are under test as well. Ops and values are those of the small
models' joint graphs; ops that no small model has follow in test_sharding_rules_other.py.
"""

from __future__ import annotations

import functools

import pytest
from captured import PRESETS, recorded
from one_op import OneOp, assert_same
from torch import fx

from shardwright.profiler.op_view import is_op, view_of

SIZES = (2, 3)  # three does not divide hidden sizes, sequence lengths and vocabularies


def _signature(node: fx.Node) -> str:
    arguments = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Kind(n))
    return f"{node.target}{arguments}"


class _Kind:
    def __init__(self, node: fx.Node) -> None:
        val = node.meta["val"]
        self.text = f"{tuple(val.shape)}{tuple(val.stride())}{val.dtype}" if hasattr(val, "shape") else str(type(val))

    def __repr__(self) -> str:
        return self.text


@functools.cache
def distinct_ops() -> dict[str, list[OneOp]]:
    """By preset; a call that an earlier preset has as well is that one's."""
    seen: set[str] = set()
    found: dict[str, list[OneOp]] = {}
    for preset in PRESETS:
        found[preset] = []
        for one in recorded(preset):
            for node in one.segment.joint.graph.nodes:
                if is_op(node) and (signature := _signature(node)) not in seen:
                    seen.add(signature)
                    found[preset].append(OneOp(node, [one.values[n] for n in view_of(node).operands]))
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_shards_of_every_strategy_make_the_whole_result(preset: str) -> None:
    tried, wrong = 0, []
    for op in distinct_ops()[preset]:
        for size in SIZES:
            for strategy in op.strategies(size):
                tried += 1
                try:
                    for found, expected in zip(op.sharded([strategy], {"tp": size}), op.whole, strict=True):
                        assert_same(found, expected)
                except Exception as error:
                    wrong.append(
                        f"{op.original.format_node()} {op.view.shapes} on {size}: {strategy}: {str(error)[:300]}"
                    )
    assert not wrong, f"{len(wrong)} of {tried}:\n" + "\n".join(wrong)
    assert tried > 30
