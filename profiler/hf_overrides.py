"""Settings of a configuration changed by name: by the family's own keys, or by one name for every family.

A configuration of several models (a vision tower and a language model) has a part for each. A setting that only parts
know is changed in every part that knows it; `text_config.hidden_size` names one part's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ShardwrightError
from .near import near_matches

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


def apply_overrides(
    config_class: Any, cleaned: dict[str, Any], parsed: Any, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration's JSON with settings changed. parsed: the object that `cleaned` gives."""
    own, of_parts = _divide(parsed, overrides)
    changed = {**cleaned, **_changed(config_class, cleaned, parsed, own)} if own else dict(cleaned)
    if own.keys() & {"hidden_size"}:
        changed.pop("head_dim", None)
    for name, settings in of_parts.items():
        part = getattr(parsed, name)
        before = cleaned.get(name) or {}
        changed[name] = {"model_type": part.model_type, **apply_overrides(type(part), before, part, settings)}
    if own:
        _repeat_pattern(config_class, changed)
    return changed


def parts_of(parsed: Any) -> dict[str, Any]:
    """The configurations inside this one, by the name of their attribute."""
    names = getattr(type(parsed), "sub_configs", {})
    found = {name: getattr(parsed, name, None) for name in names}
    return {name: part for name, part in found.items() if hasattr(part, "to_dict")}


def all_parts(parsed: Any) -> list[Any]:
    """The configuration and those inside it, at any depth."""
    return [parsed, *(deeper for part in parts_of(parsed).values() for deeper in all_parts(part))]


def _own_names(parsed: Any) -> set[str]:
    return {*parsed.to_dict(), *getattr(type(parsed), "attribute_map", {})}


def _key(parsed: Any, name: str) -> str | None:
    """What this configuration calls a setting; None where it has none such."""
    written = parsed.to_dict()
    key = next((key for key in _SETTING_NAMES.get(name, ()) if key in written), name)
    return key if key in _own_names(parsed) and key not in parts_of(parsed) else None


def knows(parsed: Any, name: str) -> bool:
    """Whether the configuration, or a part of it, has this setting."""
    return _key(parsed, name) is not None or any(knows(part, name) for part in parts_of(parsed).values())


def _divide(parsed: Any, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(settings of the configuration itself, settings of each of its parts)"""
    own: dict[str, Any] = {}
    of_parts: dict[str, dict[str, Any]] = {}
    parts = parts_of(parsed)
    for name, value in overrides.items():
        first, dot, rest = name.partition(".")
        if dot and first in parts:
            of_parts.setdefault(first, {})[rest] = value
        elif _key(parsed, name) is not None:
            own[name] = value
        else:
            takers = [part for part in parts if knows(parts[part], name)]
            if not takers:
                raise _unknown_setting(parsed, name, value)
            for part in takers:
                of_parts.setdefault(part, {})[name] = value
    return own, of_parts


def _unknown_setting(parsed: Any, name: str, value: Any) -> ShardwrightError:
    known = [*_own_names(parsed), *_SETTING_NAMES, *(f"{part}.{name}" for part in parts_of(parsed))]
    return ShardwrightError(
        f"{parsed.model_type} has no setting {name!r}",
        means="near matches: " + (", ".join(near_matches(name, known)) or "none"),
        change=f"the override {name}={value}",
        works=f"num_layers={value}" if isinstance(value, int) else "a key of the configuration",
    )


def _changed(config_class: Any, cleaned: Mapping[str, Any], parsed: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    known = _own_names(parsed)
    changed: dict[str, Any] = {}
    for name, value in own.items():
        key = _key(parsed, name)
        assert key is not None
        key = getattr(config_class, "attribute_map", {}).get(key, key)
        changed[key] = value
        twin = _DECODER_TWIN.get(key)
        if twin is not None and twin in known and twin not in own:
            changed[twin] = value
    return changed


def _repeat_pattern(config_class: Any, changed: dict[str, Any]) -> None:
    """A list of layer types as long as there are layers now: the pattern again, or its beginning."""
    pattern = changed.get("layer_types")
    without_pattern = config_class.from_dict({k: v for k, v in changed.items() if k != "layer_types"})
    count = getattr(without_pattern, "num_hidden_layers", None)
    if isinstance(pattern, list) and count is not None and count != len(pattern):
        changed["layer_types"] = [pattern[index % len(pattern)] for index in range(count)]
