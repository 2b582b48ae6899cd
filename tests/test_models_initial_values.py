"""First values: the same whoever asks for whichever part, and every tensor has one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.initial_values import initial_tensors, materialize
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Workload

NAMES = ["tiny-gpt2", "tiny-llama", "tiny-mixtral", "tiny-bert", "tiny-t5", "tiny-vit", "mlp", "tiny-unet"]


@pytest.mark.parametrize("name", NAMES)
def test_any_part_equals_the_same_part_of_the_whole(name: str) -> None:
    if name not in ("mlp", "tiny-unet"):
        pytest.importorskip("transformers")
    model = load_workload(f"preset:{name}", precision="fp32").model
    torch.manual_seed(1)
    whole = dict(initial_tensors(model, seed=3))
    assert set(whole) == {n for n, _ in [*model.named_parameters(), *model.named_buffers()]}
    torch.manual_seed(2)
    for wanted in (list(whole)[::3], list(whole)[1:2], list(whole)[-1:]):
        part = dict(initial_tensors(model, wanted, seed=3))
        assert set(part) == set(wanted)
        assert all(torch.equal(part[n], whole[n]) for n in wanted)
    other = dict(initial_tensors(model, seed=4))
    assert any(not torch.equal(other[n], whole[n]) for n in whole)
    assert all(t.is_meta for t in model.parameters())


def test_values_are_those_of_the_librarys_own_initializers() -> None:
    pytest.importorskip("transformers")
    values = dict(initial_tensors(load_workload("preset:tiny-llama", precision="fp32").model))
    assert torch.equal(values["model.norm.weight"], torch.ones(32))
    assert 0.015 < values["model.embed_tokens.weight"].std() < 0.025
    expected = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    assert torch.allclose(values["model.rotary_emb.inv_freq"], expected)
    linear = dict(initial_tensors(load_workload("preset:mlp", precision="fp32").model))["0.weight"]
    assert linear.abs().max() <= 1 / 4 and linear.std() > 0.1, "kaiming uniform of 16 inputs"


def test_materialize_keeps_ties_flags_and_the_given_workload() -> None:
    pytest.importorskip("transformers")
    workload = load_workload("preset:tiny-t5", precision="fp32")
    workload.model.encoder.block[0].requires_grad_(False)
    real = materialize(workload)
    assert real.model.shared.weight is real.model.lm_head.weight
    assert not any(p.is_meta for p in real.model.parameters())
    assert not next(real.model.encoder.block[0].parameters()).requires_grad
    assert real.model.decoder.block[0].layer[0].SelfAttention.q.weight.requires_grad
    assert all(p.is_meta for p in workload.model.parameters())
    assert not any(t.is_meta for t in real.example_batch.values())


def test_a_model_with_values_gives_its_own() -> None:
    model = nn.Linear(3, 2)
    values = dict(initial_tensors(model, seed=9))
    assert torch.equal(values["weight"], model.weight) and torch.equal(values["bias"], model.bias)


def test_a_tensor_that_nothing_initializes_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), Scale())
    with pytest.raises(ShardwrightError, match=r"1\.scale"):
        materialize(Workload(model, {"input": torch.zeros(2, 3)}, global_batch=2))
