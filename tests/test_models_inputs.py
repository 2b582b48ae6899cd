"""Example batches: valid for the model, the same for the same seed, of any size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.batches import make_batch, resize_batch
from shardwright.profiler.initial_values import materialize
from shardwright.profiler.inputs import BatchField, draw_batch, target_length
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Workload

TEXT = (
    BatchField("input_ids", (12,), torch.int64, "tokens", high=50, pad=7),
    BatchField("attention_mask", (12,), torch.int64, "padding"),
    BatchField("labels", (12,), torch.int64, "masked", of="input_ids"),
)


@given(batch_size=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_masked_batches_are_consistent(batch_size: int, seed: int) -> None:
    batch = draw_batch(TEXT, batch_size, seed=seed)
    tokens, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert tokens.shape == mask.shape == labels.shape == (batch_size, 12)
    assert ((tokens >= 0) & (tokens < 50)).all()
    assert (tokens[mask == 0] == 7).all() and (labels[mask == 0] == -100).all()
    assert (mask[:, 1:] <= mask[:, :-1]).all() and mask[0].all(), "padding comes last; the first sample has none"
    assert ((labels == -100) | (labels == tokens)).all()
    assert ((labels != -100).sum(1) >= 1).all(), "each sample has a label, so that no mean is of nothing"
    again = draw_batch(TEXT, batch_size, seed=seed)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_causal_labels_equal_the_tokens_but_are_not_the_same_tensor() -> None:
    pytest.importorskip("transformers")
    batch = make_batch(load_workload("preset:tiny-llama"), 3)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bert", "tiny-t5", "tiny-vit", "mlp", "tiny-unet"])
def test_resized_batches_run_through_the_model(name: str) -> None:
    if name not in ("mlp", "tiny-unet"):
        pytest.importorskip("transformers")
    workload = resize_batch(load_workload(f"preset:{name}", precision="fp32"), 5)
    assert workload.batch_size == workload.spec["batch_size"] == 5
    assert all(t.shape[0] == 5 and t.is_meta for t in workload.example_batch.values())
    real = materialize(workload)
    model, batch = real.model, dict(real.example_batch)
    if real.loss is None:
        loss = model(**batch).loss
    else:
        loss = real.loss(model(batch["input" if name == "mlp" else "image"]), batch)
    assert loss.isfinite() and loss.dim() == 0


def test_a_users_batch_is_resampled_from_its_own_rows() -> None:
    example = {"x": torch.arange(4)[:, None] * 10, "weights": torch.ones(3)}
    workload = Workload(torch.nn.Identity(), example, global_batch=4, batch_size=4)
    batch = make_batch(workload, 7, seed=1)
    assert batch["x"].shape == (7, 1) and set(batch["x"].flatten().tolist()) <= {0, 10, 20, 30}
    assert torch.equal(batch["weights"], torch.ones(3)), "no batch dimension, so left as it is"
    meta = Workload(torch.nn.Identity(), {"x": torch.zeros(4, 2, device="meta")}, global_batch=4)
    assert make_batch(meta, 3)["x"].shape == (3, 2)


def test_target_length_and_bad_sizes() -> None:
    assert (target_length(512), target_length(4)) == (128, 4)
    with pytest.raises(ShardwrightError):
        resize_batch(load_workload("preset:mlp"), 0)
