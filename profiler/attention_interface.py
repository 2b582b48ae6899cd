"""Attention as one operator, with its pattern as flags: what a transformers model is told to use while it is captured.

transformers lets a model's attention and mask functions be chosen by name in its configuration. Under torch.export its
own choices build an S x S mask and hand it to every block. Ours recognise causal and window patterns (mask_patterns),
send at most the padding ([B, 1, 1, T]) through the blocks, and call
    aten::scaled_dot_product_attention   causal or full, with or without an explicit mask
    shardwright::sdpa_window             causal with a sliding window
    shardwright::sdpa_masked             any of these patterns together with padding or a bias
which capture replaces by shardwright::attention (of ..kernels, which whoever replaces them imports). Run eagerly they
compute the same, so the single-device reference runs inside the same context.

What these cannot say (soft caps, sinks, sparse indices) runs the model's own eager attention with an explicit mask.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ExitCode, ShardwrightError
from . import experts
from .marker_ops import sdpa_masked, sdpa_window, visible
from .mask_indices import NotElementwise, at_all_indices
from .mask_patterns import MaskPattern, recognise
from .reference_dtype import widened

NAME = "shardwright"  # under which the functions are registered with transformers
# Arguments of attention functions that our operators cannot express where they are given.
_INEXPRESSIBLE = ("softcap", "s_aux", "sinks", "indices", "block_indices", "cache")


@dataclass
class _Context:
    """What one forward has seen. Masks are known again by identity; `kept` keeps identities from being reused."""

    patterns: dict[int, tuple[MaskPattern, torch.Tensor | None]] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    zeros: set[int] = field(default_factory=set)
    explicit: dict[tuple, torch.Tensor] = field(default_factory=dict)
    positions_given: bool = False

    def clear(self, *_: Any) -> None:
        """Before each forward of the whole model."""
        for seen in (self.patterns, self.kept, self.zeros, self.explicit):
            seen.clear()
        self.positions_given = False

    def keep(self, mask: torch.Tensor, pattern: MaskPattern, padding: torch.Tensor | None) -> torch.Tensor:
        self.patterns[id(mask)] = (pattern, padding)
        self.kept.append(mask)
        return mask


_ACTIVE: ContextVar[_Context | None] = ContextVar("shardwright_attention", default=None)


@contextlib.contextmanager
def shardwright_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the transformers models within `model` use the attention, masks and experts of this module.

    Their configurations come back as they were. A model of another kind is left alone, and so is one whose
    configuration says "eager". A model in float64 runs in float64 throughout (reference_dtype.py).
    """
    with contextlib.ExitStack() as stack:
        state = _Context()
        token = _ACTIVE.set(state)
        stack.callback(_ACTIVE.reset, token)
        if _holds_transformers(model):
            _enter_transformers(model, state, stack)
        _allow_disabled_autocast(stack)
        if _is_float64(model):
            stack.enter_context(widened(model))
        yield


def _holds_transformers(model: nn.Module) -> bool:
    """Told without an import: other packages import transformers in part, in places where all of it does not import."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return any(base.__module__.split(".")[0] == "transformers" for base in classes)


def _allow_disabled_autocast(stack: contextlib.ExitStack) -> None:
    """Outside an autocast region `with torch.autocast(x.device.type, enabled=False)` does nothing: let it be nothing.

    Rotary tables are commonly made so, or ask first whether autocast is on; for the meta device torch refuses either.
    """
    original, asked = torch.autocast, torch.is_autocast_enabled

    def autocast(device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: bool | None = None) -> Any:
        if not enabled and not asked():
            return contextlib.nullcontext()
        return original(device_type, dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)

    def is_autocast_enabled(*device_type: Any) -> bool:
        return device_type != ("meta",) and asked(*device_type)

    _set(stack, torch, "is_autocast_enabled", is_autocast_enabled)
    _set(stack, torch, "autocast", autocast)
    _set(stack, torch.amp, "autocast", autocast)


def _is_float64(model: nn.Module) -> bool:
    """All of it: what is float64 in part names its types for itself."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return types == {torch.float64}


def _enter_transformers(model: nn.Module, state: _Context, stack: contextlib.ExitStack) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
    experts_registered = experts.register(NAME)
    changed: set[int] = set()
    for owner in model.modules():
        if not isinstance(owner, PreTrainedModel):
            continue
        supported = _takes_a_named_attention(owner)
        for config in _configs_of(owner, PreTrainedModel):
            if id(config) in changed:
                continue
            changed.add(id(config))
            if supported and config._attn_implementation not in (None, "eager"):
                _set(stack, config, "_attn_implementation_internal", NAME)
            if experts_registered and hasattr(config, "_experts_implementation_internal"):
                _set(stack, config, "_experts_implementation_internal", NAME)
        handle = owner.register_forward_pre_hook(_note_positions, with_kwargs=True)
        stack.callback(handle.remove)
    if not changed:
        return
    stack.callback(model.register_forward_pre_hook(state.clear, prepend=True).remove)
    original = getattr(masking_utils, "find_packed_sequence_indices", None)
    if original is not None:
        # While tracing transformers cannot see that a model's own positions 0, 1, 2, ... hold no packed sequences
        _set(
            stack,
            masking_utils,
            "find_packed_sequence_indices",
            lambda ids: original(ids) if state.positions_given else None,
        )
    if any(hasattr(module, "has_relative_attention_bias") for module in model.modules()):
        stack.enter_context(_NoteZeros(state))


def _takes_a_named_attention(owner: nn.Module) -> bool:
    """Models written before the interface keep their own attention. Not all that use it declare it."""
    source = sys.modules.get(type(owner).__module__)
    uses_it = hasattr(source, "ALL_ATTENTION_FUNCTIONS") and getattr(owner, "_supports_sdpa", False)
    return bool(getattr(owner, "_supports_attention_backend", False) or uses_it)


def _configs_of(owner: nn.Module, model_class: type) -> Iterator[Any]:
    """The configuration objects of a model and of its modules, but not those of models nested in it."""
    yield owner.config
    pending = list(owner.children())
    while pending:
        module = pending.pop()
        if isinstance(module, model_class):
            continue
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            yield config
        pending.extend(module.children())


def _set(stack: contextlib.ExitStack, target: Any, name: str, value: Any) -> None:
    stack.callback(setattr, target, name, getattr(target, name))
    setattr(target, name, value)


def _note_positions(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    state = _ACTIVE.get()
    if state is not None and kwargs.get("position_ids") is not None:
        state.positions_given = True


class _NoteZeros(TorchFunctionMode):
    """Remembers what torch.zeros made. T5's cross-attention adds zeros [1, H, S, T] to its scores in every block."""

    def __init__(self, state: _Context) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.zeros:
            self.state.zeros.add(id(result))
            self.state.kept.append(result)
        return result


# --------------------------------------------------------------------------- masks


def make_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask interface. None where the attention's own causal flag says all; else a boolean mask.

    A mask whose pattern is known holds only the padding, [B, 1, 1, T]; attention_forward knows it again and adds the
    pattern as flags. Any other is explicit, [B, 1, S, T].
    """
    from transformers import masking_utils

    state = _ACTIVE.get()
    position = kwargs.get("cache_position")  # what early 5.x versions give in place of q_length
    if q_length is None:
        q_length = position.shape[0] if position is not None else kv_length
    function = mask_function or masking_utils.causal_mask_function
    pattern = None
    if state is not None and (attention_mask is None or attention_mask.shape[-1] == kv_length):
        pattern = recognise(function, q_length, kv_length, q_offset, kv_offset)
    if pattern is not None and not pattern.is_full and not allow_is_causal_skip and not allow_is_bidirectional_skip:
        pattern = None  # the caller reads the mask's entries itself
    if pattern is None:
        arguments = dict(
            batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=function,
            attention_mask=attention_mask, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, device=device,
        )  # fmt: skip
        place = {"cache_position": position} if position is not None else {"q_length": q_length, "q_offset": q_offset}
        arguments |= place | {k: v for k, v in kwargs.items() if k not in place}
        if arguments.get("use_vmap"):
            with contextlib.suppress(NotElementwise):
                broadcast = {"mask_function": at_all_indices(function), "use_vmap": False}
                return masking_utils.sdpa_mask(**{**arguments, **broadcast})
        return masking_utils.sdpa_mask(**arguments)
    assert state is not None
    if attention_mask is None:
        skippable = allow_is_causal_skip if pattern.causal else allow_is_bidirectional_skip or pattern.is_full
        if pattern.window == 0 and skippable and q_length == kv_length:
            return None
        everything = torch.ones(1, 1, 1, kv_length, dtype=torch.bool, device=device)
        return state.keep(everything, pattern, None)
    padding = attention_mask.to(torch.bool)[:, None, None, :]
    return state.keep(padding, pattern, padding)


# --------------------------------------------------------------------------- attention


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface. query [B, H, S, D], key and value [B, Hkv, T, D]; returns [B, S, H, D]."""
    state = _ACTIVE.get() or _Context()
    pattern, mask = _pattern_and_mask(state, module, attention_mask, is_causal, query)
    inexpressible = [name for name in _INEXPRESSIBLE if kwargs.get(name) is not None]
    if inexpressible or getattr(module, "sinks", None) is not None:
        return _eager(
            state, module, query, key, value, pattern, mask, dropout, scaling, position_bias, inexpressible, kwargs
        )
    if position_bias is not None and id(position_bias) not in state.zeros:
        mask = position_bias if mask is None else _bias_and_mask(position_bias, mask)
    scale = float(scaling) if scaling is not None else 1 / math.sqrt(query.shape[-1])
    dropout = float(dropout)
    if pattern.window and pattern.causal and mask is None:
        out = sdpa_window(query, key, value, dropout, scale, pattern.window)
    elif pattern.window or (pattern.causal and mask is not None):
        out = sdpa_masked(query, key, value, mask, dropout, scale, pattern.causal, pattern.window)
    else:
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, mask, dropout, pattern.causal, scale=scale, enable_gqa=grouped
        )
    return out.transpose(1, 2).contiguous(), None


def _pattern_and_mask(
    state: _Context, module: nn.Module, attention_mask: torch.Tensor | None, is_causal: bool | None, query: torch.Tensor
) -> tuple[MaskPattern, torch.Tensor | None]:
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)) and query.shape[2] > 1
    if attention_mask is None:
        return MaskPattern(causal=causal), None
    known = state.patterns.get(id(attention_mask))
    if known is not None:
        return known
    lost = any(not pattern.is_full for pattern, _ in state.patterns.values())
    if lost and attention_mask.dim() == 4 and attention_mask.shape[2] == 1 and query.shape[2] > 1:
        raise ShardwrightError(
            f"{type(module).__name__} changes its attention mask on the way to attention",
            means="a causal or window pattern would be lost, so the model is not captured",
            change="the model's attention implementation",
            works="attn_implementation='eager'",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )
    return MaskPattern(), attention_mask  # explicit, [B, 1, S, T] or a user's own


def _bias_and_mask(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _eager(
    state: _Context,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: MaskPattern,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    position_bias: torch.Tensor | None,
    inexpressible: list[str],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """The model's own eager attention, which takes an additive mask with the pattern in it."""
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if eager is None:
        raise ShardwrightError(
            f"{type(module).__name__} gives attention {', '.join(inexpressible) or 'sinks'}, and has no eager form",
            means="neither our attention operator nor the model's own code can be captured",
            change="MODEL",
            works="a factory of yours whose attention is written out in torch ops",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )
    additive = _additive(state, pattern, mask, query, key)
    given = {"position_bias": position_bias} if position_bias is not None else {}
    out, _ = eager(module, query, key, value, additive, scaling=scaling, dropout=dropout, **given, **kwargs)
    return out, None


def _additive(
    state: _Context, pattern: MaskPattern, mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """0 where seen and the dtype's least number where not; made once for all blocks that share it."""
    if pattern.is_full and (mask is None or mask.dtype != torch.bool):
        return mask
    shape = (query.shape[2], key.shape[2])
    found = (pattern, id(mask), shape, query.dtype)
    if found not in state.explicit:
        seen = visible(*shape, pattern.causal, pattern.window, query.device)[None, None]
        least = torch.finfo(query.dtype).min
        if mask is not None and mask.dtype != torch.bool:
            state.explicit[found] = mask.masked_fill(~seen, least)
        else:
            seen = seen if mask is None else seen & mask
            state.explicit[found] = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(
                ~seen, least
            )
    return state.explicit[found]
