"""What RMSNorm holds in plain PyTorch, measured beside what is said of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright.costmodel.norms import rms_norm_scratch_bytes
from shardwright.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference

ROWS, WIDTH = 64, 512


class _Peak(TorchDispatchMode):
    """The most bytes of new tensors that live at once."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.live: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            key = storage._cdata
            if key not in self.live and key not in self.given:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
        return out


def _scratch_bytes(call: Callable[[], Any], given: list[torch.Tensor]) -> int:
    with _Peak(given) as peak:
        call()
    return peak.peak_bytes - given[0].numel() * given[0].element_size()


@pytest.mark.parametrize("cast_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_scratch_of_rms_norm_is_as_measured(dtype: torch.dtype, cast_first: bool) -> None:
    x, weight, grad = torch.randn(ROWS, WIDTH).to(dtype), torch.ones(WIDTH, dtype=dtype), torch.randn(ROWS, WIDTH)
    grad, size = grad.to(dtype), x.element_size()
    forward = _scratch_bytes(lambda: rms_norm_reference(x, weight, 1e-6, cast_first), [x, weight])
    rstd = rms_norm_reference(x, weight, 1e-6, cast_first)[1]
    backward = _scratch_bytes(
        lambda: rms_norm_backward_reference(grad, None, x, rstd, weight, cast_first), [x, weight, grad, rstd]
    )
    for measured, is_backward in ((forward, False), (backward, True)):
        said = rms_norm_scratch_bytes(x.numel(), size, cast_first=cast_first, is_backward=is_backward)
        assert measured / x.numel() == pytest.approx(said / x.numel(), abs=0.2), "vectors take the rest"
