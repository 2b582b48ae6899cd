"""What computing experts holds beside its operands and results, and to how many ranks their tokens go."""

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


def copies_of_token(num_choices: int, ranks: int, parts: int = 1) -> float:
    """Of `ranks`, to how many a token goes on average, whose choices fall on any expert alike. parts: of each rank's
    experts, of which this rank sends to one."""
    return ranks * (1.0 - (1.0 - 1.0 / (ranks * parts)) ** num_choices)


FEWER_ROWS = 1.5  # between hosts, from which on a second hop within each, with counts of its own, is worth it


def goes_by_hosts(num_choices: int, ranks: int, per_host: int) -> bool:
    """Should a token cross to each host once, and go on to its ranks from there? per_host: of `ranks`."""
    if per_host < 2 or per_host >= ranks or ranks % per_host:
        return False
    return copies_of_token(num_choices, ranks) >= FEWER_ROWS * copies_of_token(num_choices, ranks // per_host)
