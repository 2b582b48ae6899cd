"""What a norm computed in plain PyTorch holds beside its operands and results."""

from __future__ import annotations


def rms_norm_scratch_bytes(elements: float, element_bytes: int, *, cast_first: bool, is_backward: bool) -> float:
    """Bytes at the worst moment of shardwright's RMSNorm ops where no kernel of one launch runs them, as on CPUs.

    elements: of x. Counted in kernels/rms_norm.py, whose values between are of 4 bytes at least. Forward: x in that
    type, the normed rows, and these in x's own type before the weight is multiplied in. Backward: the normed rows, the
    gradient times the weight, and the product of the two; of narrow types the gradient is there in the wide type too,
    and with cast_first the normed rows in x's own.
    """
    wide = max(element_bytes, 4)
    is_narrow = wide > element_bytes
    if is_backward:
        cast = element_bytes if cast_first and is_narrow else 0
        return elements * (3 * wide - element_bytes + cast)
    if not cast_first:
        return elements * 2 * wide if is_narrow else 0.0
    return elements * (2 * wide + element_bytes if is_narrow else wide)
