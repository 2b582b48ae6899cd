"""load_workload: configurations, presets, factories, and what users get wrong."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from shardwright.errors import ShardwrightError
from shardwright.profiler import hf
from shardwright.profiler.models import load_workload, make_reference_dtype, reload_workload
from shardwright.profiler.workload import OptimizerSpec

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
EXAMPLES = Path(__file__).parents[1] / "examples" / "models"


def write_config(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_a_configuration_file_and_its_folder_give_the_same_model(tmp_path: Path) -> None:
    file = write_config(tmp_path, model_type="llama", **TINY)
    by_file, by_folder = load_workload(f"hf:{file}", seq_len=8), load_workload(f"hf:{tmp_path}", seq_len=8)
    shapes = [(n, p.shape) for n, p in by_file.model.named_parameters()]
    assert shapes == [(n, p.shape) for n, p in by_folder.model.named_parameters()]
    assert set(by_file.example_batch) == {"input_ids", "labels"}
    assert by_file.example_batch["labels"] is not by_file.example_batch["input_ids"]


@pytest.mark.parametrize(
    ("config", "kind", "entries"),
    [
        ({"model_type": "llama"}, "causal-lm", {"input_ids", "labels"}),
        ({"model_type": "bert"}, "masked-lm", {"input_ids", "attention_mask", "labels"}),
        ({"model_type": "bert", "architectures": ["BertForPreTraining"]}, "masked-lm", None),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, "causal-lm", None),
        ({"model_type": "roberta", "architectures": ["RobertaForCausalLM"], "is_decoder": True}, "causal-lm", None),
        ({"model_type": "vit", "image_size": 8, "patch_size": 4}, "image-classification", {"pixel_values", "labels"}),
        ({"model_type": "deit", "image_size": 8, "patch_size": 4}, "image-classification", None),
    ],
)
def test_the_kind_follows_architectures_then_model_type(
    tmp_path: Path, config: dict, kind: str, entries: set | None
) -> None:
    workload = load_workload(f"hf:{write_config(tmp_path, **TINY, **config)}", seq_len=8)
    assert workload.spec["kind"] == kind
    assert entries is None or set(workload.example_batch) == entries


def test_an_encoder_decoder_without_architectures_is_sequence_to_sequence(tmp_path: Path) -> None:
    config = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    file = write_config(tmp_path, model_type="bart", vocab_size=99, encoder_ffn_dim=32, decoder_ffn_dim=32, **config)
    assert load_workload(f"hf:{file}", seq_len=8).spec["kind"] == "seq2seq"


def test_a_head_without_a_known_loss_is_refused(tmp_path: Path) -> None:
    file = write_config(tmp_path, model_type="bert", architectures=["BertForNextSentencePrediction"], **TINY)
    with pytest.raises(ShardwrightError, match="BertForNextSentencePrediction"):
        load_workload(f"hf:{file}")


def test_code_named_by_a_configuration_is_never_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').write('x')\nraise SystemExit"
    (tmp_path / "modeling_own.py").write_text(code)
    (tmp_path / "configuration_own.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    unknown = write_config(tmp_path, model_type="own", auto_map=auto_map)
    with pytest.raises(ShardwrightError, match="never executed"):
        load_workload(f"hf:{unknown}")
    # a known type is built from transformers' own code, whatever the configuration names
    known = write_config(tmp_path, model_type="llama", auto_map=auto_map, trust_remote_code=True, **TINY)
    assert type(load_workload(f"hf:{known}", seq_len=8).model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_a_configuration_chooses_no_kernel_and_no_quantization(tmp_path: Path) -> None:
    file = write_config(
        tmp_path, model_type="llama", attn_implementation="some-org/some-kernel", _attn_implementation="other/kernel",
        quantization_config={"quant_method": "fp8"}, **TINY,
    )  # fmt: skip
    config = load_workload(f"hf:{file}", seq_len=8).model.config
    assert config._attn_implementation == "sdpa"
    assert not hasattr(config, "quantization_config")


def test_nothing_is_fetched_and_the_users_own_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hf.offline():
        assert os.environ["HF_HUB_OFFLINE"] == "1" and constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ and not constants.HF_HUB_OFFLINE
    with pytest.raises(ShardwrightError, match="nothing is ever downloaded"):
        load_workload("hf:meta-llama/Meta-Llama-3-8B")


def test_a_folder_called_kernels_on_the_path_is_not_taken_for_the_package() -> None:
    root = str(Path(hf.__file__).resolve().parents[1])
    sys.path.insert(0, root)
    try:
        with hf.own_folders_hidden():
            assert root not in sys.path
        assert sys.path[0] == root
    finally:
        sys.path.remove(root)


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ShardwrightError) as caught:
        load_workload("preset:gpt2")
    assert "pip install 'shardwright[hf]'" in str(caught.value)
    assert load_workload("preset:mlp").name == "mlp"
    assert load_workload("preset:tiny-unet").name == "tiny-unet"


@pytest.mark.parametrize(
    ("spec", "near"),
    [
        ("preset:lama-3-8b", "preset:llama-3-8b"),
        ("llama-3-70b", "preset:llama-3-70b"),
        ("preset:", "shardwright models"),
    ],
)
def test_an_unknown_model_names_near_matches(spec: str, near: str) -> None:
    with pytest.raises(ShardwrightError) as caught:
        load_workload(spec)
    assert near in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 3}', '{"model_type": 3}'])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ShardwrightError):
        load_workload(f"hf:{tmp_path}")


def test_a_contradicting_configuration_is_refused(tmp_path: Path) -> None:
    file = write_config(tmp_path, model_type="llama", **{**TINY, "num_attention_heads": 5})
    with pytest.raises(ShardwrightError, match="transformers"):
        load_workload(f"hf:{file}")


def test_a_sequence_beyond_learned_positions_is_refused_and_rotary_ones_have_no_limit() -> None:
    with pytest.raises(ShardwrightError, match="seq_len 2048") as caught:
        load_workload("preset:gpt2", seq_len=2048)
    assert caught.value.works == "--seq-len 1024"
    assert load_workload("preset:tiny-llama", seq_len=4096).tokens_per_sample == 4096


def test_overrides_use_one_name_for_every_family() -> None:
    for preset in ("gpt2", "llama-3-8b", "bert-large", "t5-large", "vit-l"):
        small = load_workload(f"preset:{preset}", overrides={"num_layers": 1}).model.config
        assert small.num_hidden_layers == 1
    t5 = load_workload("preset:t5-large", overrides={"num_layers": 3}).model.config
    assert t5.num_decoder_layers == 3
    qwen = load_workload("preset:qwen3-8b", overrides={"num_layers": 2}).model.config
    assert len(qwen.layer_types) == 2
    with pytest.raises(ShardwrightError, match="num_layer"):
        load_workload("preset:gpt2", overrides={"num_layer": 1})
    with pytest.raises(ShardwrightError, match="hiden"):
        load_workload("preset:mlp", overrides={"hiden_size": 1})


def test_precision_by_name_and_for_checks() -> None:
    low = load_workload("preset:tiny-llama")
    assert (low.precision.compute, low.precision.master) == (torch.bfloat16, torch.float32)
    high = make_reference_dtype(low)
    assert {p.dtype for p in high.model.parameters()} == {torch.float64}
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    tied = make_reference_dtype(load_workload("preset:tiny-t5")).model
    assert tied.shared.weight is tied.lm_head.weight is tied.encoder.embed_tokens.weight
    assert load_workload("preset:tiny-vit", precision="fp32").example_batch["pixel_values"].dtype == torch.float32
    with pytest.raises(ShardwrightError, match="bf61"):
        load_workload("preset:mlp", precision="bf61")


def test_optimizers_by_name() -> None:
    assert load_workload("preset:mlp", optimizer="sgd").optimizer.state_tensors == 0
    assert load_workload("preset:mlp").optimizer.factory is torch.optim.AdamW
    own = OptimizerSpec("SGD", torch.optim.SGD, {"momentum": 0.9}, state_tensors=1)
    assert load_workload("preset:mlp", optimizer=own).optimizer is own
    with pytest.raises(ShardwrightError, match="adamw"):
        load_workload("preset:mlp", optimizer="adamv")


@pytest.mark.parametrize("spec", ["preset:tiny-t5", "preset:tiny-unet", f"{EXAMPLES / 'own_transformer.py'}:small"])
def test_a_workload_is_rebuilt_from_its_own_spec(spec: str) -> None:
    workload = load_workload(spec, global_batch=12, precision="fp64")
    again = reload_workload(json.loads(json.dumps(dict(workload.spec))))
    assert again.global_batch == 12 and again.precision == workload.precision
    assert {n: (t.shape, t.dtype) for n, t in again.example_batch.items()} == {
        n: (t.shape, t.dtype) for n, t in workload.example_batch.items()
    }
    assert [n for n, _ in again.model.named_parameters()] == [n for n, _ in workload.model.named_parameters()]


def test_factories_in_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_workload(f"{EXAMPLES / 'own_transformer.py'}:small")
    assert small.global_batch == 16 and not next(small.model.parameters()).is_meta
    large = load_workload(f"{EXAMPLES / 'own_transformer.py'}:large", global_batch=32)
    assert large.global_batch == 32 and next(large.model.parameters()).is_meta
    pair = load_workload(f"{EXAMPLES / 'module_and_batch.py'}:regression")
    assert pair.batch_size == 16 and pair.precision.compute == torch.float32
    (tmp_path / "my_models_1").mkdir()
    (tmp_path / "my_models_1" / "__init__.py").write_text("from .inner import make\n")
    (tmp_path / "my_models_1" / "inner.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(2, 2), {'input': torch.zeros(3, 2)}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_workload("my_models_1:make").batch_size == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def factory(): return torch.nn.Linear(2, 2)", "without example inputs"),
        ("def factory(): return torch.nn.Linear(2, 2), {'input': 3}", "no tensor"),
        ("def factory(): return 3", "returned int"),
        ("def factory(): 1 / 0", "division by zero"),
        ("def factory(size): return None", "required arguments"),
        ("def factoru(): return None", "factoru"),
        ("raise RuntimeError('broken')", "broken"),
    ],
)
def test_a_factory_that_fails_says_how(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "factory_file.py"
    file.write_text(textwrap.dedent(f"import torch\n{body}\n"))
    with pytest.raises(ShardwrightError) as caught:
        load_workload(f"{file}:factory")
    assert message in str(caught.value)


def test_a_missing_module_or_file_is_a_users_mistake() -> None:
    for spec in ("no_such_module_here:f", "no/such/file.py:f"):
        with pytest.raises(ShardwrightError):
            load_workload(spec)
