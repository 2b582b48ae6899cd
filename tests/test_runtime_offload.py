"""Copies of tensors in host memory come back as they were."""

from __future__ import annotations

import pytest
import torch

from shardwright.runtime.offload import HostMemory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_come_back_with_their_layout_and_what_they_share(device: str) -> None:
    host = HostMemory(torch.device(device))
    base = torch.arange(24.0, device=device).view(4, 6)
    outside, token = torch.ones(3, device=device), object()
    given = [base, base[1:3, ::2], base.t(), torch.arange(5, dtype=torch.int16, device=device), outside, 7, None, token]
    expected = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    for _ in range(3):  # memory is used again
        copy = host.copy(given, [outside])
        given.clear()
        copy.let_go()
        assert copy.loaded_bytes() == 0
        copy.load()
        assert copy.loaded_bytes() == 24 * 4 + 5 * 2
        given = copy.tensors()
        for found, wanted in zip(given, expected, strict=True):
            if isinstance(wanted, torch.Tensor):
                assert found.dtype == wanted.dtype and found.shape == wanted.shape and bool((found == wanted).all())
            else:
                assert found is wanted
        assert given[4] is outside and given[2].stride() == (1, 6)
        given[0][1, 0] = 100.0
        assert given[1][0, 0] == 100.0 and given[2][0, 1] == 100.0
        expected[0][1, 0] = expected[1][0, 0] = expected[2][0, 1] = 100.0


@pytest.mark.parametrize("device", DEVICES)
def test_compute_goes_on_while_many_copies_are_under_way(device: str) -> None:
    host = HostMemory(torch.device(device))
    values = [torch.randn(256, 256, device=device) for _ in range(12)]
    wanted = [value.clone() for value in values]
    copies = []
    while values:
        copies.append(host.copy([values.pop(0)], ()))
        copies[-1].let_go()
        torch.randn(256, 256, device=device) @ torch.randn(256, 256, device=device)  # may use that memory again
    for copy in copies:
        copy.load()
    for copy, value in zip(copies, wanted, strict=True):
        assert torch.equal(copy.tensors()[0], value)
