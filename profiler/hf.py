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

from ..errors import ShardwrightError
from .hf_overrides import all_parts, apply_overrides
from .model_kinds import choose_kind, class_name, classes_of
from .near import near_matches
from .recorded import Recorder, remember

_NEVER_EXECUTED = ("auto_map", "custom_pipelines", "trust_remote_code", "code_revision")
_DROPPED = (
    *_NEVER_EXECUTED,
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("quantization_config", "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "kernel_config"),
    *("torch_dtype", "dtype"),
)


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
                changed = apply_overrides(config_class, cleaned, result, overrides)
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
    for part in all_parts(result):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # a training step has no use for past keys and values
    if getattr(result, "is_encoder_decoder", False) and getattr(result, "decoder_start_token_id", None) is None:
        # targets are shifted right behind this token; some configurations leave it to generation settings
        pad = getattr(result, "pad_token_id", None)
        result.decoder_start_token_id = pad if isinstance(pad, int) else 0
    return result


def text_config(config: Any) -> Any:
    """The part that describes the text: of a pair of towers text_config, of an encoder and a decoder the decoder's."""
    part = getattr(config, "text_config", None)
    return part if part is not None and hasattr(part, "vocab_size") else config.get_text_config()


def own_seq_len(config: Any) -> int | None:
    """The longest sequence that the configuration names, in tokens; None where it names none."""
    text = text_config(config)
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
        if isinstance(module, nn.Embedding) and ("position" in path or path.endswith("wpe"))
        if not any(part in path for part in ("relative", "vision", "image"))
    ]
    longest = min([*tables, limit]) if tables and limit else None
    if seq_len < 1 or (longest is not None and seq_len > longest):
        raise ShardwrightError(
            f"seq_len {seq_len}: {config.model_type} has positions for 1 to {longest or 'any number of'} tokens",
            means="its table of learned positions has no row for the others",
            change="--seq-len",
            works=f"--seq-len {longest or 1024}",
        )


def resolve_kind(config: Any, asked: str | None = None) -> str:
    """Which of KINDS a configuration object describes: the one asked for, or by its architectures and model_type."""
    return choose_kind(config, _classes(config), asked)


def _classes(config: Any) -> dict[str, tuple[str, ...]]:
    require_transformers()
    with offline(), own_folders_hidden():
        from transformers.models.auto import modeling_auto
    return classes_of(config.model_type, modeling_auto)


def build_model(config: Any, kind: str, dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, in training mode. Takes no memory for weights, whatever its size."""
    transformers = require_transformers()
    name = class_name(config, _classes(config), kind)
    config.architectures = config.architectures or []  # transformers walks it where a type has several classes
    prepare_config(config, kind)
    try:
        with offline(), own_folders_hidden(), _quiet(transformers), torch.device("meta"), Recorder() as recorder:
            model_class = getattr(transformers, name)
            model = model_class._from_config(_own_config(config, model_class), dtype=dtype)
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
    remember(model, recorder)
    return model.train()


def prepare_config(config: Any, kind: str) -> None:
    """What transformers leaves to the user before a head can be trained."""
    if kind == "text-classification" and getattr(config.get_text_config(), "pad_token_id", None) is None:
        # models that read left to right classify at the last token that is no padding
        config.get_text_config().pad_token_id = config.pad_token_id = 0


def _own_config(config: Any, model_class: Any) -> Any:
    """The part of a composite configuration that the class takes: a text model of a vision-language family its text."""
    wanted = getattr(model_class, "config_class", None)
    text = config.get_text_config()
    return text if wanted is not None and not isinstance(config, wanted) and isinstance(text, wanted) else config


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
