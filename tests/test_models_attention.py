"""Attention as captured: the same numbers as the model's own, and no S x S mask where the pattern is known."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from shardwright.errors import ShardwrightError
from shardwright.profiler.attention_interface import shardwright_attention
from shardwright.profiler.initial_values import materialize
from shardwright.profiler.models import load_workload, make_reference_dtype
from shardwright.profiler.reference_dtype import widened
from shardwright.profiler.workload import Workload

LENGTH = 12  # not a size of any other tensor, so that an S x S tensor is known by its shape
BASE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
ENCODER = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "head_dim")}
SDPA, WINDOW, MASKED = (
    "aten.scaled_dot_product_attention.default",
    "shardwright.sdpa_window.default",
    "shardwright.sdpa_masked.default",
)
# model_type -> (configuration, attention operators expected in the exported graph)
FAMILIES: dict[str, tuple[dict, dict[str, int]]] = {
    "llama": (BASE, {SDPA: 2}),
    "mistral": ({**BASE, "sliding_window": 5}, {WINDOW: 2}),
    "qwen3": (
        {**BASE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
        {SDPA: 1, WINDOW: 2},
    ),
    "gemma3_text": (
        {**BASE, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        {SDPA: 1, WINDOW: 1},
    ),
    "gpt2": (dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), {SDPA: 2}),
    "bert": (ENCODER, {SDPA: 2}),
    "modernbert": (
        {**ENCODER, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
         "local_attention": 6, "global_attn_every_n_layers": 2},
        {SDPA: 1, MASKED: 1},
    ),
    "vit": (
        {**{k: v for k, v in ENCODER.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4},
        {SDPA: 2},
    ),
    "t5": (
        dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
        {SDPA: 4, MASKED: 2},
    ),
    "bart": (
        dict(vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
             decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48),
        {SDPA: 3},
    ),
    "gemma2": ({**BASE, "sliding_window": 5}, {}),  # soft caps: its own attention
    "gpt_oss": ({**BASE, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}, {}),  # sinks
}  # fmt: skip
EXPLICIT = ("gemma2", "gpt_oss", "t5")  # t5: the learned bias is S x S


def workload_of(folder: Path, model_type: str, **more: object) -> Workload:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **FAMILIES[model_type][0], **more}))
    return load_workload(f"hf:{folder}", seq_len=LENGTH, batch_size=3, precision="fp64")


def exported(workload: Workload) -> torch.export.ExportedProgram:
    with shardwright_attention(workload.model):
        return torch.export.export(workload.model, (), dict(workload.example_batch), strict=False)


def attention_ops(program: torch.export.ExportedProgram) -> dict[str, int]:
    names = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return {name: names[name] for name in (SDPA, WINDOW, MASKED) if names[name]}


def loss_and_grads(workload: Workload) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    workload.model.zero_grad()
    loss = workload.model(**workload.example_batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in workload.model.named_parameters() if p.grad is not None}


def assert_same_numbers(workload: Workload, own: str = "eager") -> None:
    """Loss and gradients within our context against the model's own implementation, all in float64."""
    real = materialize(workload)
    real.model.eval()  # no dropout
    with shardwright_attention(real.model):
        loss, grads = loss_and_grads(real)
    if hasattr(real.model, "set_experts_implementation"):
        real.model.set_experts_implementation("eager")
    real.model.set_attn_implementation(own)
    with widened(real.model):
        expected, expected_grads = loss_and_grads(real)
    assert loss.dtype == torch.float64 and abs(loss - expected) < 1e-12
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, expected_grads[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_numbers_equal_the_models_own_attention(tmp_path: Path, model_type: str) -> None:
    assert_same_numbers(workload_of(tmp_path, model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_export_keeps_attention_as_one_operator_and_builds_no_square_mask(tmp_path: Path, model_type: str) -> None:
    program = exported(workload_of(tmp_path, model_type))
    assert attention_ops(program) == FAMILIES[model_type][1]
    if model_type not in EXPLICIT:
        shapes = [
            tuple(n.meta["val"].shape) for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)
        ]
        assert not [shape for shape in shapes if shape[-2:] == (LENGTH, LENGTH)]


def test_a_context_leaves_no_trace_on_the_model(tmp_path: Path) -> None:
    workload = workload_of(tmp_path, "t5")
    model = workload.model
    before = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    with pytest.raises(KeyError), shardwright_attention(model):
        inside = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
        assert inside == {"shardwright"}
        raise KeyError
    assert [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")] == before
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert torch.get_default_dtype() == torch.float32


def test_a_model_that_asks_for_eager_attention_keeps_it(tmp_path: Path) -> None:
    workload = workload_of(tmp_path, "llama")
    workload.model.set_attn_implementation("eager")
    assert attention_ops(exported(workload)) == {}
    by_name = load_workload("preset:tiny-llama", overrides={"attn_implementation": "eager"})
    assert attention_ops(exported(by_name)) == {}
    with pytest.raises(ShardwrightError, match="flash"):
        load_workload("preset:tiny-llama", overrides={"attn_implementation": "flash_attention_2"})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral"])
def test_padding_travels_apart_from_the_pattern(tmp_path: Path, model_type: str) -> None:
    workload = workload_of(tmp_path, model_type)
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, 9:] = 0  # padding after the text, so that every query sees a key
    batch = {**materialize(workload).example_batch, "attention_mask": mask}
    batch["labels"] = torch.where(mask.bool(), batch["input_ids"], -100)
    padded = Workload(workload.model, batch, global_batch=3, precision=workload.precision, spec={})
    assert_same_numbers(padded)
    meta = {name: torch.empty_like(t, device="meta") for name, t in batch.items()}
    program = exported(Workload(workload.model, meta, global_batch=3))
    assert attention_ops(program) == {MASKED: 2}
    shapes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert not [shape for shape in shapes if shape[-2:] == (LENGTH, LENGTH)]


def test_packed_sequences_named_by_the_users_positions_stay_apart(tmp_path: Path) -> None:
    workload = workload_of(tmp_path, "llama")
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).repeat(3, 1)
    batch = {**materialize(workload).example_batch, "position_ids": positions}
    packed = Workload(workload.model, batch, global_batch=3, precision=workload.precision)
    assert_same_numbers(packed)
    meta = {name: torch.empty_like(t, device="meta") for name, t in batch.items()}
    program = exported(Workload(workload.model, meta, global_batch=3))
    assert any(
        n.meta["val"].dtype == torch.bool and n.meta["val"].shape[-2:] == (LENGTH, LENGTH)
        for n in program.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    ), "a mask that depends on data is explicit"


def test_dropout_in_attention_reaches_the_operator(tmp_path: Path) -> None:
    program = exported(workload_of(tmp_path, "gpt2", attn_pdrop=0.25))
    calls = [n for n in program.graph.nodes if str(n.target) == SDPA]
    assert {n.args[4] for n in calls} == {0.25}


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama", "tiny-bert", "tiny-t5", "tiny-vit"])
def test_a_float64_model_rounds_nowhere(name: str) -> None:
    program = exported(make_reference_dtype(load_workload(f"preset:{name}")))
    dtypes = {n.meta["val"].dtype for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    assert not dtypes & {torch.float32, torch.bfloat16, torch.float16}


def test_a_model_without_transformers_is_captured_where_transformers_does_not_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other packages import it in part; an optional package of the wrong version makes the rest fail."""
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    with shardwright_attention(torch.nn.Linear(2, 2)):
        pass
