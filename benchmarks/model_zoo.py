"""Tiny random-weight models by name, as factories that `shardwright check benchmarks/model_zoo.py:NAME` takes.

`causal_TYPE` is the causal language model of that model type, built by the zoo file that the environment variable
SHARDWRIGHT_ZOO names (a module with names() and tiny(model_type) -> (model, inputs)). The others, encoders,
encoder-decoders, vision, audio and state-space models of transformers, are listed in OTHERS. FAMILIES, of every other
field, are configurations for hf: and diffusers: (zoo_configs.py), models written out (zoo_written.py) or
wrapped (zoo_wrapped.py) and models of other packages (zoo_packages.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import zoo_configs
import zoo_packages
import zoo_wrapped
import zoo_written

BATCH, LENGTH, VOCABULARY = 8, 16, 96
CAUSAL = "causal_"
FAMILY = "family_"
_FACTORIES = {name: module for module in (zoo_written, zoo_wrapped, zoo_packages) for name in module.NAMES}
FAMILIES = tuple(FAMILY + name for name in (*zoo_configs.HF, *zoo_configs.DIFFUSERS, *_FACTORIES))
# what configurations call their sizes; each model takes those that it has
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, decoder_vocab_size=VOCABULARY, hidden_size=32,
    d_model=32, dim=32, n_embd=32, emb_dim=32, embedding_size=32,
    encoder_layers=2, decoder_layers=2, num_hidden_layers=2, num_layers=2, n_layers=2, n_layer=2, depth=2,
    num_decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, num_attention_heads=4, num_heads=4,
    n_heads=4, n_head=4, intermediate_size=64, encoder_ffn_dim=64, decoder_ffn_dim=64, ffn_dim=64, d_ff=64, d_kv=8,
    hidden_dim=64, max_position_embeddings=64, max_source_positions=64, max_target_positions=64, image_size=16,
    patch_size=4, num_labels=5, state_size=8, head_dim=8, num_key_value_heads=4, d_inner=64, max_length=64,
    attention_window=8, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
    num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, num_mel_bins=8, block_size=4, num_random_blocks=1,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0, use_cache=False,
)  # fmt: skip


@dataclass(frozen=True)
class Other:
    """auto: class of transformers that builds it. kind: what its batch holds. settings: besides SIZES."""

    model_type: str
    auto: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


# sizes of models that work in stages, which are lists
_RESIDUAL = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], image_size=32)
_WINDOWS = dict(embed_dim=8, depths=[1, 2], num_heads=[2, 4], window_size=4, image_size=32, patch_size=2)
STAGES: dict[str, dict[str, Any]] = {
    "xmod": dict(default_language="en_XX"),
    "resnet": _RESIDUAL,
    "regnet": {**_RESIDUAL, "groups_width": 4},
    "bit": {**_RESIDUAL, "num_groups": 4},
    "convnext": dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32),
    "convnextv2": dict(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=32),
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "focalnet": dict(embed_dim=8, hidden_sizes=[8, 16], depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3],
                     image_size=32, patch_size=2),
    "poolformer": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=32),
    "segformer": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4],
                      decoder_hidden_size=16, image_size=32),
    "pvt": dict(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], image_size=32),
    "cvt": dict(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2], image_size=32),
    "swiftformer": dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64),
    "levit": dict(hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
                  image_size=64),
    "hiera": dict(embed_dim=8, depths=[1, 1], num_heads=[2, 4], image_size=[32, 32], patch_size=[3, 3],
                  num_query_pool=1, masked_unit_size=[4, 4]),
    "efficientnet": dict(width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=64, image_size=64),
    "mobilenet_v1": dict(depth_multiplier=0.25, image_size=64),
    "mobilenet_v2": dict(depth_multiplier=0.25, image_size=64),
    "mobilevit": dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], image_size=64,
                      patch_size=2),
}  # fmt: skip


def _table() -> dict[str, Other]:
    masked = ("albert", "bert", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
              "electra", "ernie", "esm", "flaubert", "fnet", "funnel", "ibert", "layoutlm", "luke", "megatron-bert",
              "mobilebert",
              "modernbert", "mpnet", "nystromformer", "rembert", "roberta", "roberta-prelayernorm", "roformer",
              "squeezebert", "xlm", "xlm-roberta", "xmod", "yoso", "big_bird")  # fmt: skip
    pairs = ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian",
             "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "switch_transformers",
             "t5", "umt5")  # fmt: skip
    images = ("beit", "bit", "convnext", "convnextv2", "cvt", "data2vec-vision", "deit", "dinov2", "efficientnet",
              "focalnet", "hiera", "levit", "mobilenet_v1", "mobilenet_v2", "mobilevit", "poolformer", "pvt", "regnet",
              "resnet", "segformer", "swin", "swiftformer", "swinv2", "vit", "vit_msn")  # fmt: skip
    sounds = ("hubert", "sew", "unispeech", "wav2vec2", "wav2vec2-conformer", "wavlm", "data2vec-audio")
    states = ("mamba", "mamba2", "falcon_mamba", "rwkv")
    listed = [Other(name, "AutoModelForMaskedLM", "tokens", STAGES.get(name, {})) for name in masked]
    listed += [Other(name, "AutoModelForSeq2SeqLM", "pairs") for name in pairs]
    listed += [Other(name, "AutoModelForImageClassification", "image", STAGES.get(name, {})) for name in images]
    listed += [Other(name, "AutoModelForAudioClassification", "sound") for name in sounds]
    listed += [Other("audio-spectrogram-transformer", "AutoModelForAudioClassification", "spectrogram")]
    listed += [Other(name, "AutoModelForCausalLM", "tokens") for name in states]
    return {other.model_type.replace("-", "_"): other for other in listed}


OTHERS = _table()


@cache
def zoo() -> Any:
    path = os.environ.get("SHARDWRIGHT_ZOO")
    if not path:
        raise RuntimeError("SHARDWRIGHT_ZOO names no file with causal language models")
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def causal(model_type: str) -> tuple[Any, dict[str, Any]]:
    """The zoo's model with its own inputs as labels: a causal model shifts them itself."""
    model, inputs = zoo().tiny(model_type)
    return model, {**inputs, "labels": inputs["input_ids"].clone()}


def other(name: str) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    entry = OTHERS[name]
    config = transformers.AutoConfig.for_model(entry.model_type)
    for key, value in {**SIZES, **entry.settings}.items():
        if key in config.to_dict() or key in getattr(config, "attribute_map", {}):
            old = getattr(config, key, None)
            kept = isinstance(old, (list, dict)) or isinstance(old, tuple) != isinstance(value, tuple)
            if key in entry.settings or not kept:
                setattr(config, key, value)
    if entry.kind == "pairs":
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    model = getattr(transformers, entry.auto).from_config(config).float().train(False)
    return model, _batch(entry.kind, config)


def _batch(kind: str, config: Any) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(1)

    def tokens() -> Any:
        return torch.randint(3, VOCABULARY - 1, (BATCH, LENGTH), generator=draw)

    def classes() -> Any:
        return torch.randint(0, config.num_labels, (BATCH,), generator=draw)

    if kind == "tokens":
        return {"input_ids": tokens(), "labels": tokens()}
    if kind == "pairs":
        return {"input_ids": tokens(), "labels": tokens()}
    if kind == "image":
        size = getattr(config, "image_size", 32)
        height = size if isinstance(size, int) else size[0]
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(BATCH, channels, height, height, generator=draw), "labels": classes()}
    if kind == "sound":
        return {"input_values": torch.randn(BATCH, 400, generator=draw), "labels": classes()}
    return {
        "input_values": torch.randn(BATCH, config.max_length, config.num_mel_bins, generator=draw),
        "labels": classes(),
    }


def family_spec(name: str, folder: Path) -> dict[str, Any]:
    """What load_workload takes, as in Workload.spec. Configurations are written into the folder."""
    name = name.removeprefix(FAMILY)
    batch = {"global_batch": zoo_written.BATCH, "batch_size": zoo_written.BATCH}
    if name in _FACTORIES:
        return {"model": f"{_FACTORIES[name].__file__}:{name}", "kind": "factory", **batch}
    scheme = "hf" if name in zoo_configs.HF else "diffusers"
    file = folder / name / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    config = zoo_configs.HF[name] if scheme == "hf" else zoo_configs.DIFFUSERS[name]
    file.write_text(json.dumps(config))
    settings = {"seq_len": zoo_configs.SEQ_LEN.get(name, 16), "overrides": zoo_configs.OVERRIDES.get(name, {})}
    return {"model": f"{scheme}:{file}", **settings, **batch}


def __getattr__(name: str) -> Callable[[], tuple[Any, dict[str, Any]]]:
    if name.startswith(CAUSAL):
        return lambda: causal(name.removeprefix(CAUSAL).replace("__", "-"))
    if name in OTHERS:
        return lambda: other(name)
    raise AttributeError(name)
