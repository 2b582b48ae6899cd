"""How dimensions travel through view ops: which output dimension carries the sharding of an input dimension."""

from __future__ import annotations

from collections.abc import Sequence


def reshape_pairs(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(input dim, output dim, exact) for each dimension whose sharding survives a reshape.

    Dimensions are grouped so that products agree. Within a group only the leading dimension survives, and unless both
    sides of the group are that single dimension (exact), only when both leading sizes divide evenly.
    """
    pairs: list[tuple[int, int, bool]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        product_left = product_right = 1
        if i < len(before):
            left.append(i)
            product_left *= before[i]
            i += 1
        if j < len(after):
            right.append(j)
            product_right *= after[j]
            j += 1
        while product_left != product_right:
            if product_left < product_right and i < len(before):
                left.append(i)
                product_left *= before[i]
                i += 1
            elif j < len(after):
                right.append(j)
                product_right *= after[j]
                j += 1
            else:
                return pairs  # sizes with zeros: nothing to say
        lead_left = next((d for d in left if before[d] != 1), None)
        lead_right = next((d for d in right if after[d] != 1), None)
        if lead_left is None or lead_right is None:
            continue
        exact = before[lead_left] == after[lead_right]
        pairs.append((lead_left, lead_right, exact))
    return pairs
