"""Mask patterns are recognised by what a mask function answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.profiler.marker_ops import sdpa_masked, sdpa_window, visible
from shardwright.profiler.mask_patterns import MaskPattern, recognise

masking = pytest.importorskip("transformers.masking_utils")


@given(length=st.integers(1, 40), window=st.integers(0, 45), causal=st.booleans())
@settings(max_examples=150, deadline=None)
def test_recognised_patterns_draw_the_same_mask(length: int, window: int, causal: bool) -> None:
    if causal:
        function = masking.sliding_window_causal_mask_function(window) if window else masking.causal_mask_function
    else:
        function = (
            masking.sliding_window_bidirectional_mask_function(window)
            if window
            else masking.bidirectional_mask_function
        )
    pattern = recognise(function, length, length)
    assert pattern is not None
    expected = masking.sdpa_mask(
        batch_size=1, q_length=length, kv_length=length, mask_function=function, allow_is_causal_skip=False
    )
    rows, columns = np.arange(length)[:, None], np.arange(length)[None, :]
    assert np.array_equal(pattern.visible(rows, columns), expected[0, 0].numpy())
    ours = visible(length, length, pattern.causal, pattern.window, torch.device("cpu"))
    assert torch.equal(ours, expected[0, 0])


def test_long_masks_are_recognised_by_rows() -> None:
    window = masking.sliding_window_causal_mask_function(4096)
    assert recognise(window, 131072, 131072) == MaskPattern(causal=True, window=4096)
    assert recognise(masking.causal_mask_function, 131072, 131072) == MaskPattern(causal=True)
    assert recognise(masking.sliding_window_causal_mask_function(9000), 8192, 8192) == MaskPattern(causal=True)


def test_masks_that_read_data_or_are_of_another_shape_stay_explicit() -> None:
    padding = masking.padding_mask_function(torch.ones(2, 8, dtype=torch.bool))
    packed = masking.packed_sequence_mask_function(torch.zeros(2, 8, dtype=torch.int64))
    prefix = masking.or_masks(masking.causal_mask_function, lambda b, h, q, k: k < 3)
    every_other = masking.and_masks(masking.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0)
    nothing = lambda b, h, q, k: (k < 0) & (q >= 0)  # noqa: E731
    for function in (masking.and_masks(masking.causal_mask_function, padding), packed, prefix, every_other, nothing):
        assert recognise(function, 8, 8) is None
    assert recognise(masking.causal_mask_function, 8, 8, q_offset=2) is None


@pytest.mark.parametrize("mask_kind", ["none", "padding", "bias"])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 3), (False, 3), (False, 0)])
def test_marker_operators_equal_written_out_attention(causal: bool, window: int, mask_kind: str) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = None
    if mask_kind == "padding":
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[1, :, :, 5:] = False
    elif mask_kind == "bias":
        mask = torch.randn(1, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    out = sdpa_masked(query, key, value, mask, 0.0, 0.3, causal, window)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
    seen = torch.ones(7, 7, dtype=torch.bool)
    for i in range(7):
        for j in range(7):
            beyond = window > 0 and (i - j >= window or (not causal and j - i >= window))
            seen[i, j] = not beyond and not (causal and j > i)
    scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    wanted = [query, key, value] + ([mask] if mask_kind == "bias" else [])
    for a, b in zip(torch.autograd.grad(out.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    if causal and window and mask is None:
        assert torch.equal(sdpa_window(query, key, value, 0.0, 0.3, window), out)
