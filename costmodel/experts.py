"""What computing experts holds beside its operands and results."""

from __future__ import annotations


def expert_scratch_bytes(rows: float, hidden: int, inner: int, element_bytes: int, *, is_backward: bool) -> float:
    """Bytes of shardwright::expert_mlp at its worst moment, beside operands and results.

    rows: choices of experts that are computed here, K of each token; hidden, inner: widths of a token and of an expert.
    Counted in profiler/expert_ops.py. Forward: activated gate and its product with up, and either the tokens' rows or
    what comes out for them. Backward: rows of tokens and of their gradients, gate and up in the order of experts,
    activated gate, product, their gradients before and after the scale, and that of both joined.
    """
    of_row = 2 * hidden + 9 * inner if is_backward else hidden + 2 * inner
    return rows * of_row * element_bytes
