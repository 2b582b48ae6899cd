"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain integer arithmetic.

The same few lines serve Python integers and int64 tensors: a 32-bit word is kept in 64 bits, so that a product of two
words wraps to the right 64 bits, and its high half is a shift and a mask.
"""

from __future__ import annotations

from typing import TypeVar

import torch

Word = TypeVar("Word", int, torch.Tensor, "int | torch.Tensor")

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF
NUM_ROUNDS = 10


def _cross(product, other, key):
    """(high word of product) ^ other ^ key. The mask comes last, so `other` may carry dirt above 32 bits."""
    high = product >> 32
    if isinstance(high, torch.Tensor) and not (isinstance(other, torch.Tensor) and other.shape != high.shape):
        high ^= other
        high ^= key
        high &= MASK_32
        return high
    return (high ^ other ^ key) & MASK_32


def philox4x32(counter, key):
    """Four words of counter and two of key, each an int or an int64 tensor in [0, 2**32), to four words of output.

    Words that are plain integers stay so until a tensor meets them, which spares most of the first two rounds when only
    the first word of the counter is a tensor.
    """
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(NUM_ROUNDS):
        product0, product1 = word0 * MULTIPLIER_0, word2 * MULTIPLIER_1
        # the low words are left unmasked: they are only ever xored into something that is masked afterwards
        word0, word1, word2, word3 = _cross(product1, word1, key0), product1, _cross(product0, word3, key1), product0
        key0, key1 = (key0 + WEYL_0) & MASK_32, (key1 + WEYL_1) & MASK_32
    return word0, word1 & MASK_32, word2, word3 & MASK_32
