"""hf: and diffusers: of every kind: the class, the batch and the loss follow from a configuration alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from shardwright import checking
from shardwright.errors import ShardwrightError
from shardwright.profiler.batches import make_batch
from shardwright.profiler.capture import compute_loss
from shardwright.profiler.initial_values import materialize
from shardwright.profiler.models import load_workload, make_reference_dtype, reload_workload
from shardwright.profiler.workload import Workload

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zoo_configs

HF_ROWS = [
    ("whisper", "speech-to-text"), ("wav2vec2_ctc", "ctc"), ("hubert_sound", "audio-classification"),
    ("wavlm_frames", "frame-classification"), ("clip", "image-text-pairs"), ("llava", "image-text-to-text"),
    ("gemma3", "image-text-to-text"), ("detr", "object-detection"), ("segformer", "semantic-segmentation"),
    ("swin2sr", "super-resolution"), ("masked_image", "masked-image-modeling"), ("videomae", "video-classification"),
    ("patchtst", "forecasting"), ("bert_sentence", "text-classification"), ("electra_choices", "multiple-choice"),
    ("distilbert_answers", "question-answering"),
]  # fmt: skip


def load(folder: Path, name: str, scheme: str = "hf", **options: Any) -> Workload:
    config = zoo_configs.HF[name] if scheme == "hf" else zoo_configs.DIFFUSERS[name]
    file = folder / "config.json"
    file.write_text(json.dumps({**config, **options.pop("config", {})}))
    options = {"seq_len": zoo_configs.SEQ_LEN.get(name, 16), "overrides": zoo_configs.OVERRIDES.get(name)} | options
    return load_workload(f"{scheme}:{file}", global_batch=3, batch_size=3, precision="fp32", **options)


def trains(workload: Workload, unused: str = " ") -> None:
    """unused: what parameters have in their name that the model as written never reads."""
    made = materialize(workload)
    loss = compute_loss(made.model, made.loss, made.example_batch)
    assert loss.isfinite() and loss.dim() == 0
    loss.backward()
    trained = [name for name, p in made.model.named_parameters() if p.requires_grad and unused not in name]
    without = [name for name in trained if made.model.get_parameter(name).grad is None]
    assert not without, "every parameter takes part"


@pytest.mark.parametrize(("name", "kind"), HF_ROWS)
def test_a_transformers_model_of_each_kind_trains_from_its_configuration(name: str, kind: str, tmp_path: Path) -> None:
    workload = load(tmp_path, name)
    assert workload.spec["kind"] == kind
    assert type(workload.model).__name__ == zoo_configs.HF[name]["architectures"][0]
    # LLaVA takes its features from the last layer but one
    trains(workload, "vision_tower" if name == "llava" else " ")


@pytest.mark.parametrize("name", ["sdxl", "autoencoder", "dit", "flux", "sd3", "wan"])
def test_a_diffusers_model_trains_from_its_configuration(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    workload = load(tmp_path, name, "diffusers")
    trains(make_reference_dtype(reload_workload(workload.spec, precision="bf16")))
    again = reload_workload(json.loads(json.dumps(dict(workload.spec))))
    shapes = {key: tensor.shape for key, tensor in workload.example_batch.items()}
    assert shapes == {key: tensor.shape for key, tensor in again.example_batch.items()}


def test_each_sample_has_as_many_placeholders_as_its_image_has_features(tmp_path: Path) -> None:
    batch = make_batch(load(tmp_path, "llava"), 4)
    placeholders = batch["input_ids"] == zoo_configs.HF["llava"]["image_token_index"]
    assert (placeholders.sum(1) == (8 // 4) ** 2).all()
    assert (batch["labels"][placeholders] == -100).all(), "an image's places are no targets"
    assert torch.equal(batch["labels"][~placeholders], batch["input_ids"][~placeholders])
    with pytest.raises(ShardwrightError, match="takes 4 tokens") as caught:
        load(tmp_path, "llava", seq_len=5)
    assert caught.value.works == "--seq-len 64"


def test_targets_of_speech_never_hold_the_blank(tmp_path: Path) -> None:
    labels = make_batch(load(tmp_path, "wav2vec2_ctc"), 64)["labels"]
    assert set(labels.flatten().tolist()) == set(range(1, 12)), "0, the padding token, is the blank"


def test_the_kind_can_be_asked_for(tmp_path: Path) -> None:
    assert load(tmp_path, "bert_sentence", kind="token-classification").spec["kind"] == "token-classification"
    text_only = load(tmp_path, "whisper", config={"architectures": None}, kind="audio-classification")
    assert reload_workload(text_only.spec).spec["kind"] == "audio-classification"
    with pytest.raises(ShardwrightError, match="no such head for bert") as caught:
        load(tmp_path, "bert_sentence", kind="ctc")
    assert "--kind" in str(caught.value)
    with pytest.raises(ShardwrightError, match="unknown"):
        load(tmp_path, "bert_sentence", kind="sentence-classification")


def test_inputs_that_no_configuration_tells_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ShardwrightError, match="pix2struct"):
        load(tmp_path, "vit", config={"model_type": "pix2struct", "architectures": None})
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "MochiTransformer3DModel"}))
    with pytest.raises(ShardwrightError, match="MochiTransformer3DModel"):
        load_workload(f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ShardwrightError, match="_class_name"):
        load_workload(f"diffusers:{tmp_path}")


def test_settings_of_a_composite_configuration_reach_its_parts(tmp_path: Path) -> None:
    both = load(tmp_path, "llava", overrides={"num_layers": 3}).model.config
    assert both.text_config.num_hidden_layers == both.vision_config.num_hidden_layers == 3
    one = load(tmp_path, "llava", overrides={"text_config.num_layers": 3}).model.config
    assert (one.text_config.num_hidden_layers, one.vision_config.num_hidden_layers) == (3, 2)
    with pytest.raises(ShardwrightError, match="no setting"):
        load(tmp_path, "llava", overrides={"text_config.num_layer": 3})


def test_no_part_of_a_model_keeps_keys_and_values(tmp_path: Path) -> None:
    config = load(tmp_path, "internvl").model.config
    assert not config.text_config.use_cache


@pytest.mark.parametrize("scheme", ["hf", "diffusers"])
def test_a_big_model_of_several_parts_is_shrunk_for_a_check(scheme: str, tmp_path: Path) -> None:
    if scheme == "hf":
        config: dict[str, Any] = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    else:
        pytest.importorskip("diffusers")
        config = {"_class_name": "FluxTransformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = load_workload(f"{scheme}:{tmp_path}", global_batch=2).spec
    small = reload_workload(checking.shrink(spec))
    assert sum(p.numel() for p in small.model.parameters()) < checking.SMALL_PARAMS
    trains(small, "vision_tower")


def test_values_that_only_a_constructor_writes_are_its_own(tmp_path: Path) -> None:
    """A weight norm's two factors, and a class token made of zeros: no initializer writes them later."""
    model = materialize(load(tmp_path, "wav2vec2_ctc")).model
    weight = model.wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight
    assert torch.equal(weight.original0, weight.original1.norm(dim=(0, 1), keepdim=True)), "as weight_norm makes them"
    yolos = materialize(load(tmp_path, "yolos")).model.vit.embeddings
    assert not yolos.cls_token.any()
    clip = materialize(load(tmp_path, "clip")).model
    assert clip.logit_scale.item() == pytest.approx(clip.config.logit_scale_init_value)
    again = materialize(load(tmp_path, "wav2vec2_ctc")).model
    assert torch.equal(weight.original1, again.wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original1)
