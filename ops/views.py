"""How dimensions travel through view ops: which output dimension carries the sharding of an input dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def inner_pairs(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((input dim, output dim), (leading input dim, leading output dim)): where axes outside cut the second pair down
    to one element, the first two carry each other's sharding. So are tokens that lie together with one sample."""
    found = []
    for left, right in _groups(before, after):
        left, right = [d for d in left if before[d] != 1], [d for d in right if after[d] != 1]
        if not left or not right or before[left[0]] == after[right[0]]:
            continue
        if len(left) > 1 and after[right[0]] % before[left[0]] == 0:  # samples and tokens become one dimension
            found.append(((left[1], right[0]), (left[0], right[0])))
        elif len(right) > 1 and before[left[0]] % after[right[0]] == 0:
            found.append(((left[0], right[1]), (left[0], right[0])))
    return found


def reshape_pairs(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(input dim, output dim, exact) for each dimension whose sharding survives a reshape.

    Dimensions are grouped so that products agree. Within a group only the leading dimension survives, and unless both
    sides of the group are that single dimension (exact), only when both leading sizes divide evenly.
    """
    pairs: list[tuple[int, int, bool]] = []
    for left, right in _groups(before, after):
        lead_left = next((d for d in left if before[d] != 1), None)
        lead_right = next((d for d in right if after[d] != 1), None)
        if lead_left is None or lead_right is None:
            continue
        exact = before[lead_left] == after[lead_right]
        pairs.append((lead_left, lead_right, exact))
    return pairs


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Dimensions of both sides whose products agree; none behind sizes of zero, of which there is nothing to say."""
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
                return
        yield left, right
