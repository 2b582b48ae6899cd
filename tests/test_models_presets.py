"""The presets: what they are, how large they are, that each can be built without memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from shardwright.profiler.models import list_models, load_workload

ROWS = {row.name: row for row in list_models()}
# in millions, as their publishers state them
PUBLISHED = {
    "gpt2": 124, "gpt2-medium": 355, "gpt2-large": 774, "gpt2-xl": 1558, "llama-3-8b": 8030, "llama-3-70b": 70554,
    "llama-3-405b": 405853, "llama-3.2-1b": 1236, "qwen3-8b": 8191, "qwen2.5-7b": 7616, "mistral-7b": 7242,
    "mixtral-8x7b": 46703, "bert-large": 335, "vit-l": 304, "t5-large": 738,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROWS))
def test_stored_parameter_count_is_that_of_the_model(name: str) -> None:
    workload = load_workload(f"preset:{name}")
    assert sum(p.numel() for p in workload.model.parameters()) == ROWS[name].num_params
    assert all(p.is_meta for p in workload.model.parameters())
    assert all(t.is_meta for t in workload.example_batch.values())
    assert workload.model.training


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_count_is_the_published_one(name: str) -> None:
    assert round(ROWS[name].num_params / 1e6) == PUBLISHED[name]


def test_default_sequence_length_is_that_of_the_table() -> None:
    for name in ("gpt2", "llama-3-8b", "tiny-t5"):
        workload = load_workload(f"preset:{name}")
        assert workload.example_batch["input_ids"].shape == (2, ROWS[name].seq_len)
        assert workload.tokens_per_sample == ROWS[name].seq_len
    assert ROWS["vit-l"].seq_len is None


def test_dropout_is_on_in_the_small_models_that_test_it() -> None:
    for name in ("tiny-gpt2", "tiny-bert", "tiny-t5"):
        model = load_workload(f"preset:{name}").model
        assert any(m.p > 0 for m in model.modules() if isinstance(m, torch.nn.Dropout)), name


def test_tiny_llama_has_grouped_heads() -> None:
    config = load_workload("preset:tiny-llama").model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
