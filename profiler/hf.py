"""transformers configurations become models on the meta device. Nothing is fetched; no other code is run.

What a configuration may not do here, and why:
  auto_map                 names Python code beside the configuration; it is dropped, never executed
  attn_implementation      may name a kernel on a hub ("org/repo"); dropped, so that the library's own code is built
  quantization_config      replaces layers by quantized ones that cannot be trained; dropped
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError
from .near import near_matches

KINDS = ("causal-lm", "masked-lm", "seq2seq", "image-classification")
_AUTO_CLASS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
}
# Heads that a checkpoint of a base model carries; they say nothing of how it is to be trained.
_BASE_SUFFIXES = ("Model", "ForPreTraining", "PreTrainedModel", "LMHeadModel", "EncoderModel")
_NEVER_EXECUTED = ("auto_map", "custom_pipelines", "trust_remote_code", "code_revision")
_DROPPED = (
    *_NEVER_EXECUTED,
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("quantization_config", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "kernel_config"),
    *("torch_dtype", "dtype"),
)
# One name for each setting that --set and small versions use, whatever the family calls it.
_SETTING_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    "num_kv_heads": ("num_key_value_heads",),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "encoder_ffn_dim"),
}
_DECODER_TWIN = {
    "num_layers": "num_decoder_layers",
    "encoder_layers": "decoder_layers",
    "encoder_attention_heads": "decoder_attention_heads",
    "encoder_ffn_dim": "decoder_ffn_dim",
}


def require_transformers() -> Any:
    """The transformers module, or the error that says how to install it."""
    try:
        with offline(), own_folders_hidden():
            import transformers
    except ImportError:
        raise ShardwrightError(
            "the package transformers is not installed",
            means="it builds hf: models and most presets; preset:mlp, preset:tiny-unet and your factories do without",
            change="install the extra",
            works="pip install 'shardwright[hf]'",
        ) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ShardwrightError(
            f"transformers {transformers.__version__} is installed; version 5.0 or later is needed",
            change="install the extra",
            works="pip install -U 'shardwright[hf]'",
        )
    return transformers


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing inside may use the network through Hugging Face's libraries. The caller's settings come back after."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    saved = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        import huggingface_hub.constants as hub_constants
    except ImportError:
        hub_constants = None  # type: ignore[assignment]
    was_offline = getattr(hub_constants, "HF_HUB_OFFLINE", None)
    if was_offline is not None:
        hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if was_offline is not None:
            # read by the library at import: with our variables set it would say offline for the rest of the process
            hub_constants.HF_HUB_OFFLINE = any(_is_true(value) for value in saved.values())


@contextlib.contextmanager
def own_folders_hidden() -> Iterator[None]:
    """Inside, `import kernels` never finds this repository's folder of that name.

    transformers imports Hugging Face's package `kernels` where it sees one; run from the top of a checkout, Python's
    search path begins with the current folder, where ours stands.
    """
    own = Path(__file__).resolve().parents[1]
    saved = list(sys.path)
    sys.path[:] = [entry for entry in saved if Path(entry or ".").resolve() != own]
    try:
        yield
    finally:
        sys.path[:] = saved + [entry for entry in sys.path if entry not in saved]


def _is_true(value: str | None) -> bool:
    return value is not None and value.upper() in ("1", "ON", "YES", "TRUE")


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration as JSON, from a config.json or the folder that holds it."""
    path = Path(path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        looks_like_a_hub_name = not path.suffix and len(path.parts) == 2 and not path.is_absolute()
        raise ShardwrightError(
            f"{file} does not exist",
            means="hf: takes a path to a transformers configuration on this machine; nothing is ever downloaded"
            + (f" (a name on a hub, such as {path}, is not a path)" if looks_like_a_hub_name else ""),
            change="MODEL",
            works="hf:path/to/config.json, or preset:llama-3-8b (shardwright models lists them)",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardwrightError(
            f"cannot read {file}: {error}",
            means="it is not a transformers configuration",
            change="MODEL",
            works="hf:path/to/config.json",
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ShardwrightError(
            f"{file} has no 'model_type'",
            means="it is not a transformers configuration",
            change="MODEL",
            works="a config.json as save_pretrained writes it, with a model_type",
        )
    return config


def _clean(value: Any) -> Any:
    """The configuration without what could run code, fetch, or choose an implementation; nested ones too."""
    if isinstance(value, dict):
        return {key: _clean(entry) for key, entry in value.items() if key not in _DROPPED}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return value


def config_object(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Any:
    """The transformers configuration object of a configuration's JSON, with settings changed by name.

    overrides takes the configuration's own keys, and num_layers, hidden_size, num_heads, num_kv_heads,
    intermediate_size for whatever the family calls these; attn_implementation may be "eager", the model's own code.
    """
    transformers = require_transformers()
    model_type = config["model_type"]
    mapping = transformers.CONFIG_MAPPING
    if model_type not in mapping:
        own_code = [key for key in _NEVER_EXECUTED[:1] if key in config]
        raise ShardwrightError(
            f"model_type {model_type!r} is not known to transformers {transformers.__version__}"
            + (f", and code named by a configuration ({own_code[0]}) is never executed" if own_code else ""),
            means="its layers are defined only by code that Shardwright does not run"
            if own_code
            else "near matches: " + (", ".join(near_matches(model_type, list(mapping.keys()))) or "none"),
            change="MODEL",
            works="package.module:factory, a function of yours that builds the model"
            if own_code
            else "a model_type of this version, or a newer transformers (pip install -U transformers)",
        )
    cleaned = _clean(dict(config))
    overrides = dict(overrides or {})
    attention = overrides.pop("attn_implementation", None)
    if attention not in (None, "sdpa", "eager"):
        raise ShardwrightError(
            f"attn_implementation={attention!r}",
            means="no other implementation can be captured without running its kernel",
            change="the override attn_implementation",
            works="attn_implementation=eager",
        )
    config_class = mapping[model_type]
    try:
        with offline(), own_folders_hidden(), _quiet(transformers):
            result = config_class.from_dict(cleaned)
            if overrides:
                changed = _apply_overrides(config_class, cleaned, result, overrides)
                result = config_class.from_dict(changed)
    except ShardwrightError:
        raise
    except Exception as error:  # transformers checks values with many kinds of exceptions
        raise ShardwrightError(
            f"transformers refuses this {model_type} configuration: {_first_line(error)}",
            means="a value in it is wrong, or two contradict each other",
            change="the configuration" + (f" or the overrides {dict(overrides)}" if overrides else ""),
            works="the file as save_pretrained wrote it",
        ) from None
    if attention is not None:
        result._attn_implementation = attention
    if hasattr(result, "use_cache"):
        result.use_cache = False  # a training step has no use for past keys and values
    if getattr(result, "is_encoder_decoder", False) and getattr(result, "decoder_start_token_id", None) is None:
        # targets are shifted right behind this token; some configurations leave it to generation settings
        pad = getattr(result, "pad_token_id", None)
        result.decoder_start_token_id = pad if isinstance(pad, int) else 0
    return result


def _apply_overrides(
    config_class: Any, cleaned: dict[str, Any], parsed: Any, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    known = {**parsed.to_dict(), **getattr(config_class, "attribute_map", {})}
    changed = dict(cleaned)
    for name, value in overrides.items():
        names = [key for key in _SETTING_NAMES.get(name, ()) if key in parsed.to_dict()] or [name]
        key = names[0]
        if key not in known:
            raise ShardwrightError(
                f"{parsed.model_type} has no setting {name!r}",
                means="near matches: " + (", ".join(near_matches(name, [*known, *_SETTING_NAMES])) or "none"),
                change=f"the override {name}={value}",
                works=f"num_layers={value}" if isinstance(value, int) else "a key of the configuration",
            )
        key = getattr(config_class, "attribute_map", {}).get(key, key)
        changed[key] = value
        twin = _DECODER_TWIN.get(key)
        if twin is not None and twin in known and twin not in overrides:
            changed[twin] = value
        if name == "hidden_size":
            changed.pop("head_dim", None)
    without_pattern = config_class.from_dict({k: v for k, v in changed.items() if k != "layer_types"})
    count = getattr(without_pattern, "num_hidden_layers", None)
    if isinstance(changed.get("layer_types"), list) and count is not None and count != len(changed["layer_types"]):
        pattern = changed["layer_types"]
        changed["layer_types"] = [pattern[index % len(pattern)] for index in range(count)]
    return changed


def own_seq_len(config: Any) -> int | None:
    """The longest sequence that the configuration names, in tokens; None where it names none."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            # roberta and its kin count positions from pad_token_id + 1
            return value - 2 if name == "max_position_embeddings" and value % 2**7 == 2 else value
    return None


def check_seq_len(model: nn.Module, config: Any, seq_len: int) -> None:
    """Refuse a sequence longer than a table of learned positions. Rotary and relative positions have no such limit."""
    limit = own_seq_len(config)
    tables = [
        module.num_embeddings
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in path or path.endswith("wpe")) and "relative" not in path
    ]
    longest = min([*tables, limit]) if tables and limit else None
    if seq_len < 1 or (longest is not None and seq_len > longest):
        raise ShardwrightError(
            f"seq_len {seq_len}: {config.model_type} has positions for 1 to {longest or 'any number of'} tokens",
            means="its table of learned positions has no row for the others",
            change="--seq-len",
            works=f"--seq-len {longest or 1024}",
        )


def resolve_kind(config: Any) -> str:
    """Which of KINDS a configuration object describes, by its architectures, else by its model_type."""
    require_transformers()
    with offline(), own_folders_hidden():
        from transformers.models.auto import modeling_auto

    model_type = config.model_type
    names = {}  # kind -> classes of this model_type for it
    for kind, (_, mapping) in _AUTO_CLASS.items():
        classes = getattr(modeling_auto, mapping).get(model_type)
        if classes:
            names[kind] = (classes,) if isinstance(classes, str) else tuple(classes)
    architectures = [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]
    for architecture in architectures:
        for kind, classes in names.items():
            if architecture in classes:
                return kind
    foreign = [name for name in architectures if not name.endswith(_BASE_SUFFIXES)]
    candidates = list(names)
    # a class that this version of transformers lacks or renamed still tells its kind by its ending
    for architecture in foreign:
        for kind, ending in (
            ("causal-lm", "ForCausalLM"),
            ("masked-lm", "ForMaskedLM"),
            ("seq2seq", "ForConditionalGeneration"),
            ("image-classification", "ForImageClassification"),
        ):
            if architecture.endswith(ending) and kind in candidates:
                return kind
    if not candidates or foreign:
        raise ShardwrightError(
            f"{model_type} ({', '.join(architectures) or 'no architectures named'}) is none of: {', '.join(KINDS)}",
            means="there is no training loss that could be chosen for it",
            change="MODEL, or 'architectures' in the configuration",
            works=f"architectures: [{names[candidates[0]][0]!r}]" if candidates else "package.module:factory",
            exit_code=ExitCode.USAGE,
        )
    if "seq2seq" in candidates and (getattr(config, "is_encoder_decoder", False) or "causal-lm" not in candidates):
        return "seq2seq"
    if "masked-lm" in candidates and not getattr(config, "is_decoder", False):
        return "masked-lm"
    return candidates[0]


def build_model(config: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, in training mode. Takes no memory for weights, whatever its size."""
    transformers = require_transformers()
    auto_class = getattr(transformers, _AUTO_CLASS[kind][0])
    config.architectures = config.architectures or []  # transformers walks it where a type has several classes
    try:
        with offline(), own_folders_hidden(), _quiet(transformers), torch.device("meta"):
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
            model.tie_weights()  # early 5.x versions leave it to the loading of weights
    except Exception as error:  # layers check their settings with many kinds of exceptions
        raise ShardwrightError(
            f"transformers cannot build {config.model_type}: {_first_line(error)}",
            means="a value of the configuration is wrong, or it needs a package that is not installed",
            change="the configuration, or the overrides",
            works="the file as save_pretrained wrote it",
        ) from error
    if kind == "causal-lm" and getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # the default where a class name says nothing; set, it gives no warning
    return model.train()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Advice on generation and checkpoints is of no use here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:3])}"
