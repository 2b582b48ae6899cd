"""torch's random ops as functions of the counter-based draws: one form each, for the captured graph and for the eager
reference alike.

A form draws at most once. What it does with its numbers are plain torch ops, which shard as such.

    op                                     draw        value
    rand, uniform                          uniform     from + u (to - from)
    randn, normal, log_normal              normal      mean + std z; its exponential
    exponential, geometric, cauchy         uniform     by the inverse of the distribution function
    randint, random                        uniform64   low + floor(u (high - low))
    randperm                               uniform64   the order of n numbers
    bernoulli(p), dropout of all kinds     keep        1 where the leading 32 bits are at least round((1 - p) 2^32)
    bernoulli(tensor)                      uniform     1 where u < p
    multinomial                            uniform     largest of p / exponential; with replacement, inverse of the sums
    rrelu                                  uniform     slope lower + u (upper - lower) below zero

Torch's own formulas were read for shapes and signs (ATen's Dropout.cpp, Distributions.cpp), so that each form draws as
often, over the same shape, as the op does inside: the reference sees only what an op draws inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ours = torch.ops.shardwright
Arguments = Mapping[str, Any]
_ALPHA = 1.7580993408473766  # of SELU: what alpha dropout sets an element to, and rescales by (Klambauer et al. 2017)
_INT_MAX = {torch.uint8: 2**8 - 1, torch.int8: 2**7 - 1, torch.int16: 2**15 - 1, torch.int32: 2**31 - 1,
            torch.int64: 2**63 - 1, torch.bool: 1, torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11,
            torch.bfloat16: 2**8}  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """The draw of one random op: its number, and the key."""

    key: torch.Tensor
    index: int = 0

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._new(ours.rand_uniform.default, shape, dtype, device)

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._new(ours.rand_normal.default, shape, dtype, device)

    def keep(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, p: float) -> torch.Tensor:
        """1 with probability 1 - p, else 0."""
        return ours.rand_keep.default(
            self.key, list(shape), list(shape), [0] * len(shape), self.index, dtype, device, p
        )

    def _new(self, op: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes = list(shape)
        if dtype.is_complex:
            parts = op(self.key, [*sizes, 2], [*sizes, 2], [0] * (len(sizes) + 1), self.index, dtype.to_real(), device)
            return torch.view_as_complex(parts)
        return op(self.key, sizes, sizes, [0] * len(sizes), self.index, dtype, device)


_LONG = 4  # how a schema's default spells int64
Form = Callable[[Draw, Arguments], torch.Tensor]


def bind(op: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by their names in the op's schema, defaults filled in."""
    schema = op._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return {**given, **dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}


def _like(a: Arguments) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the result, of a factory or of an op on `self`."""
    own = a.get("self")
    default = own.dtype if own is not None else torch.get_default_dtype()
    device = own.device if own is not None else torch.device("cpu")
    given = a.get("dtype")
    dtype = torch.int64 if given == _LONG else given or default
    return dtype, torch.device(a.get("device") or device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What logarithms and the like are worked out in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shape(a: Arguments) -> list[int]:
    return list(a["size"] if "size" in a else a["self"].shape)


def _uniform(draw: Draw, a: Arguments) -> torch.Tensor:
    low, high = a.get("from", 0.0), a.get("to", 1.0)
    u = draw.uniform(_shape(a), *_like(a))
    return u if (low, high) == (0.0, 1.0) else u * (high - low) + low


def _normal(draw: Draw, a: Arguments) -> torch.Tensor:
    """A mean or a deviation given as a tensor gets a gradient of zeros, as in torch."""
    mean, std = a.get("mean", 0.0), a.get("std", 1.0)
    tensors = [t.detach() for t in (mean, std) if isinstance(t, torch.Tensor)]
    if tensors:
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        dtype, device = tensors[0].dtype, tensors[0].device
    else:
        shape, (dtype, device) = _shape(a), _like(a)
    z = draw.normal(shape, dtype, device)
    if dtype.is_complex:
        z = z * math.sqrt(0.5)
    if tensors:
        given = [t for t in (mean, std) if isinstance(t, torch.Tensor)]
        mean, std = (t.detach() if isinstance(t, torch.Tensor) else t for t in (mean, std))
        return _with_zeros(z * std + mean, given)
    return z if (mean, std) == (0.0, 1.0) else z * std + mean


def _with_zeros(drawn: torch.Tensor, given: Sequence[torch.Tensor]) -> torch.Tensor:
    """A draw does not follow what it is given. torch gives that zeros, not no gradient: a parameter is decayed."""
    for tensor in given:
        if tensor.is_floating_point() and drawn.is_floating_point():
            never = torch.zeros((), dtype=torch.bool, device=drawn.device)
            drawn = torch.where(never, tensor.to(drawn.dtype), drawn)
    return drawn


def _log_normal(draw: Draw, a: Arguments) -> torch.Tensor:
    return _normal(draw, a).exp()


def _positive_exponential(u: torch.Tensor) -> torch.Tensor:
    """-log(1 - u), and never zero: its reciprocal and its logarithm are taken."""
    return torch.log1p(-u).neg().clamp(min=torch.finfo(u.dtype).eps / 2)


def _exponential(draw: Draw, a: Arguments) -> torch.Tensor:
    dtype, device = _like(a)
    u = draw.uniform(_shape(a), _wide(dtype), device)
    return (_positive_exponential(u) / a["lambd"]).to(dtype)


def _geometric(draw: Draw, a: Arguments) -> torch.Tensor:
    dtype, device = _like(a)
    u = draw.uniform(_shape(a), torch.float64, device)
    return (torch.log1p(-u) / math.log1p(-a["p"])).ceil().clamp(min=1).to(dtype)


def _cauchy(draw: Draw, a: Arguments) -> torch.Tensor:
    dtype, device = _like(a)
    u = draw.uniform(_shape(a), _wide(dtype), device)
    return (torch.tan((u - 0.5) * math.pi) * a["sigma"] + a["median"]).to(dtype)


def _bernoulli(draw: Draw, a: Arguments) -> torch.Tensor:
    """The probability: a number; a tensor `p`, broadcast; or self."""
    dtype, device = _like(a)
    p = a.get("p", a["self"])
    if not isinstance(p, torch.Tensor):
        return draw.keep(_shape(a), dtype, device, 1 - p)
    p = p.detach()
    u = draw.uniform(_shape(a), p.dtype if p.is_floating_point() else torch.float32, device)
    return _with_zeros((u < p).to(dtype), [a.get("p", a["self"])])


def _integers(draw: Draw, a: Arguments) -> torch.Tensor:
    """randint, randint_like, random. A range of more than 2^53 values is drawn in steps."""
    dtype, device = _like(a)
    low = a.get("from", a.get("low", 0))
    high = a["to"] if a.get("to") is not None else a.get("high")
    if high is None:
        high = _INT_MAX[dtype] + 1
    u = draw.uniform(_shape(a), torch.float64, device)
    span = high - low
    return ((u * span).floor().to(torch.int64) + low).to(dtype)


def _permutation(draw: Draw, a: Arguments) -> torch.Tensor:
    dtype, device = _like(a)
    u = draw.uniform([a["n"]], torch.float64, device)
    return torch.sort(u, stable=True)[1].to(dtype)


def _multinomial(draw: Draw, a: Arguments) -> torch.Tensor:
    p, count = a["self"].detach(), a["num_samples"]
    wide = _wide(p.dtype)
    if count == 1 or not a["replacement"]:
        race = p.to(wide) / _positive_exponential(draw.uniform(p.shape, wide, p.device))
        return race.argmax(-1, keepdim=True) if count == 1 else race.topk(count)[1]
    sums = p.to(torch.float64).cumsum(-1)
    u = draw.uniform([*p.shape[:-1], count], torch.float64, p.device)
    return torch.searchsorted(sums, u * sums[..., -1:], right=True).clamp(max=p.shape[-1] - 1)


# --------------------------------------------------------------------------- dropout


def _drops(a: Arguments) -> bool:
    x = a["self"] if "self" in a else a["input"]
    return bool(a.get("train")) and 0 < a["p"] < 1 and x.numel() > 0


def _dropout_form(feature: bool, alpha: bool) -> Form:
    """feature: one draw for each channel, shape [N, C, 1, ...]. alpha: keeps mean and variance of SELU networks."""

    def form(draw: Draw, a: Arguments) -> torch.Tensor:
        x, p = a["self"] if "self" in a else a["input"], a["p"]
        if not _drops(a):
            return torch.mul(x, 0) if a.get("train") and p == 1 and x.numel() else x
        shape = list(x.shape)
        if not feature and not alpha:
            return ours.dropout.default(x, draw.key, p, draw.index, shape, [0] * len(shape))
        kept = draw.keep([*shape[:2], *[1] * (len(shape) - 2)] if feature else shape, x.dtype, x.device, p)
        if not alpha:
            return x * (kept / (1 - p))
        scale = 1 / math.sqrt((_ALPHA**2 * p + 1) * (1 - p))
        return x * (kept * scale) + ((kept - 1) * (_ALPHA * scale) + _ALPHA * scale * p)

    return form


def _slopes(draw: Draw, a: Arguments) -> torch.Tensor:
    x = a["self"]
    return draw.uniform(x.shape, x.dtype, x.device) * (a["upper"] - a["lower"]) + a["lower"]


def _rrelu(draw: Draw, a: Arguments) -> torch.Tensor:
    x = a["self"]
    if not a["training"]:
        return torch.nn.functional.leaky_relu(x, (a["lower"] + a["upper"]) / 2)
    return torch.where(x <= 0, x * _slopes(draw, a), x)


FORMS: dict[str, Form] = {
    "rand": _uniform, "rand_like": _uniform, "uniform": _uniform,
    "randn": _normal, "randn_like": _normal, "normal": _normal, "normal_functional": _normal,
    "log_normal": _log_normal, "exponential": _exponential, "geometric": _geometric, "cauchy": _cauchy,
    "bernoulli": _bernoulli,
    "randint": _integers, "randint_like": _integers, "random": _integers, "randperm": _permutation,
    "multinomial": _multinomial,
    "dropout": _dropout_form(False, False), "feature_dropout": _dropout_form(True, False),
    "alpha_dropout": _dropout_form(False, True), "feature_alpha_dropout": _dropout_form(True, True),
    "rrelu": _rrelu,
}  # fmt: skip
_SOMETIMES: dict[str, Callable[[Arguments], bool]] = {
    "rrelu": lambda a: a["training"],
    "scaled_dot_product_attention": lambda a: 0 < a["dropout_p"] < 1,
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"), _drops),
}


def base_name(op: torch._ops.OpOverload) -> str:
    """aten::normal_ -> normal; the name of an op of another namespace whole."""
    namespace, _, name = op._schema.name.partition("::")
    return name.rstrip("_") if namespace == "aten" else op._schema.name


def is_random(op: Any) -> bool:
    """Does torch say that the op draws, or may draw, random numbers?"""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in op.tags


def may_draw(op: torch._ops.OpOverload, arguments: Arguments) -> bool:
    """Not where its arguments switch the drawing off: dropout of probability 0, or outside training."""
    name = base_name(op)
    if name in _SOMETIMES:
        return _SOMETIMES[name](arguments)
    switched_off = any(arguments.get(switch) == 0 for switch in ("dropout_p", "dropout"))
    return not switched_off and name != "_fused_sdp_choice"


def writes_self(op: torch._ops.OpOverload) -> bool:
    return op._schema.name.endswith("_") and op._schema.is_mutable
