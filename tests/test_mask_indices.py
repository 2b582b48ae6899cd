"""Mask functions that transformers would apply by vmap are applied to all indices at once, where that is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardwright.profiler.mask_indices import NotElementwise, at_all_indices

GROUPS = torch.tensor([[0, 0, -1, 1, 1], [-1, 0, 0, 0, 1]])
SHIFT = torch.tensor([1, 0])


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return k <= q


def same_group(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (GROUPS[b, q] == GROUPS[b, k]) & (GROUPS[b, q] >= 0)


def in_window(b: Any, h: Any, q: Any, k: Any) -> Any:
    result = q.new_ones((), dtype=torch.bool)
    return result & ((q - k).abs() < 3) | (k == 0)


def shifted(b: Any, h: Any, q: Any, k: Any) -> Any:
    return torch.where(q - SHIFT[b] >= 2, k // 2 == q // 2, k - SHIFT[b] <= q)


def by_vmap(function: Callable[..., Any]) -> torch.Tensor:
    """Each index on its own."""
    return torch.stack(
        [
            torch.stack(
                [torch.stack([torch.as_tensor(function(b, h, q, k)) for k in torch.arange(5)]) for q in torch.arange(5)]
            )
            for b in torch.arange(2)
            for h in [torch.tensor(0)]
        ]
    )[:, None]


@pytest.mark.parametrize("function", [causal, same_group, in_window, shifted])
def test_functions_of_indices_give_the_mask_of_each_index_on_its_own(function: Callable[..., Any]) -> None:
    b, h, q, k = torch.arange(2), torch.arange(1), torch.arange(5), torch.arange(5)
    indices = b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], k[None, None, None, :]
    found = at_all_indices(function)(*indices).expand(2, 1, 5, 5)
    assert torch.equal(found, by_vmap(function))


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: k <= q.max(),  # of one index, of all
        lambda b, h, q, k: GROUPS[b][q] == GROUPS[b][k],  # a row at a time
        lambda b, h, q, k: q + SHIFT >= k,  # a vector beside an index
        lambda b, h, q, k: k.sum() <= q,
        lambda b, h, q, k: k <= len(q.shape) + q,
    ],
)
def test_functions_of_more_than_one_index_at_a_time_are_left_alone(function: Callable[..., Any]) -> None:
    b, q = torch.arange(2)[:, None, None, None], torch.arange(5)[None, None, :, None]
    with pytest.raises(NotElementwise):
        at_all_indices(function)(b, torch.zeros(1, 1, 1, 1, dtype=torch.int64), q, q.transpose(2, 3))
