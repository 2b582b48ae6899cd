"""Seconds of one op on one device: a roofline with an efficiency for each class of op.

    matmul, convolution   flops / (peak * efficiency) + memory_share * bytes / (bandwidth * memory_efficiency), and
                          never less than the memory time alone
    attention             the greater of arithmetic and memory time (tiles overlap the two)
    everything else       the greater of vector arithmetic and memory time
    views                 nothing

and none less than the launch of a kernel. The memory term is added, not overlapped, for matrix products: it stands for
the ramp, the tail and the operands of products too thin to hide them, which makes efficiency fall for small sizes.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

from ..ops.facts import KINDS
from ..profiler.device import Device, dtype_key
from .constants import Constants

# First match wins; tried on the op's bare name ('mm' of 'aten.mm.default').
OP_CLASSES: tuple[tuple[str, str], ...] = (
    # ops that only rename memory
    (r"_?(unsafe_)?view(_as_\w+)?|reshape(_as)?|_reshape_alias|t|transpose|permute|expand(_as)?|(un)?squeeze|alias|detach"
     r"|lift_fresh|select|slice|split(_with_sizes)?|chunk|narrow|as_strided|unbind|getitem|diagonal|unfold|movedim"
     r"|sym_\w+|empty\w*|new_empty\w*|scalar_tensor|_local_scalar_dense|item|wait_tensor|view_dtype|swapaxes", "view"),
    (r".*(attention|sdpa).*(backward|bwd|grad).*", "attention_backward"),
    (r".*(attention|sdpa).*", "attention"),
    (r"mm|bmm|addmm|baddbmm|matmul|linear|_scaled_mm|_grouped_mm|einsum|dot|mv|_int_mm|addbmm|linear_backward|gemm"
     r"|_scaled_grouped_mm|inner|outer|expert_mlp(_backward)?"
     r"|recurrence(_backward)?|linear_cross_entropy(_backward)?", "matmul"),
    (r".*conv.*", "convolution"),
    (r".*(layer_norm|rms_norm|rmsnorm|group_norm|batch_norm|instance_norm).*", "normalization"),
    (r"embedding.*|gather|index|index_select|index_put.*|_unsafe_index.*|scatter.*|index_add.*|take.*|nll_loss.*|sort|topk"
     r"|argsort|cumsum|cumprod|searchsorted|bincount|nonzero|unique.*|repeat_interleave.*|roll|flip", "gather"),
    (r"sum|mean|amax|amin|max|min|prod|var.*|std.*|any|all|argmax|argmin|norm|linalg_vector_norm|_?(log_)?softmax.*"
     r"|logsumexp|cross_entropy.*|.*pool.*|count_nonzero|_foreach_norm.*", "reduction"),
    (r"clone|copy_?|_to_copy|contiguous|cat|stack|fill.*|zeros.*|ones.*|full.*|arange.*|pad|constant_pad_nd|repeat|tril|triu"
     r"|slice_backward|select_backward|slice_scatter|select_scatter|new_zeros|new_ones|new_full|to|convert_element_type",
     "copy"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), name) for pattern, name in OP_CLASSES)


def bare_name(op_name: str) -> str:
    """'torch.ops.aten.mm.default', 'aten::mm' and 'mm' all give 'mm'; '<built-in function getitem>' gives 'getitem'."""
    name = re.sub(r"^<built-in function (\w+)>$", r"\1", op_name.strip())
    parts = [part for part in re.split(r"::|\.", name) if part]
    parts = [part for part in parts if part not in {"torch", "ops", "default", "operator", "_operator"}]
    if len(parts) > 1 and parts[0] in {
        "aten",
        "prims",
        "prim",
        "shardwright",
        "_c10d_functional",
        "quantized",
        "higher_order",
    }:
        parts = parts[1:]
    return parts[0] if parts else op_name


def op_class(op_name: str) -> str:
    """One of the names in OP_CLASSES, else 'pointwise'; of an op that was added with its class, that."""
    return KINDS.get(op_name) or _class_of_name(op_name)


@cache
def _class_of_name(op_name: str) -> str:
    name = bare_name(op_name).lower()
    for pattern, found in _COMPILED:
        if pattern.fullmatch(name):
            return found
    return "pointwise"


def matmul_rate(constants: Constants, dtype: object, device: Device) -> float:
    """FLOP/s that large matrix products reach."""
    return device.peak_flops_per_s(dtype) * matmul_efficiency(constants, dtype, device)


def device_keys(device: Device, dtype: object = None) -> tuple[str, ...]:
    """Keys of a device in the constants, nearest first: 'H100-SXM-96GB', 'H100-fp8', 'H100', 'gpu'."""
    family = device.name.split("-")[0]
    typed = () if dtype is None else (f"{device.name}-{dtype_key(dtype)}", f"{family}-{dtype_key(dtype)}")
    return (*typed[:1], device.name, *typed[1:], family, device.kind)


def matmul_efficiency(constants: Constants, dtype: object, device: Device) -> float:
    """Fraction of the dense peak that large matrix products hold in training. Measured peaks are what is reached."""
    if device.measured:
        return 1.0
    keys = device_keys(device, dtype)
    return constants.get("matmul_efficiency", *keys) * constants.get("sustained_fraction", *keys)


def memory_rate(constants: Constants, kind: str, device: Device) -> float:
    """Bytes/s of device memory that ops of this class reach."""
    efficiency = 1.0 if device.measured else constants.get("memory_efficiency", kind)
    return device.memory_bytes_per_s * efficiency


@lru_cache(maxsize=4096)
def _rates(constants: Constants, kind: str, dtype: object, device: Device) -> tuple[float, float, float, float]:
    """(FLOP/s, bytes/s, share of memory time added to arithmetic instead of hidden by it, least seconds)."""
    base = "attention" if kind.startswith("attention") else kind
    bytes_per_s = memory_rate(constants, base, device)
    launch_s = constants.get("launch_s", device.kind)
    if kind not in {"matmul", "convolution", "attention", "attention_backward"}:
        vector = device.peak_flops_per_s("float64" if dtype_key(dtype) == "fp64" else "float32")
        return vector * constants.get("vector_efficiency", device.kind), bytes_per_s, 0.0, launch_s
    rate = matmul_rate(constants, dtype, device)
    if kind != "matmul":
        rate *= constants.get(f"{kind}_efficiency", *device_keys(device))
    share = 0.0 if base == "attention" else constants.get("matmul_memory_share", device.kind)
    return rate, bytes_per_s, share, launch_s


def op_seconds(
    constants: Constants,
    op_name: str,
    flops: float,
    bytes_moved: float,
    dtype: object,
    device: Device,
    launches: int = 1,
) -> float:
    """Seconds of one op, alone on the device. flops: multiply and add count as two. bytes_moved: read and written.
    launches: kernels that follow each other."""
    kind = op_class(op_name)
    if kind == "view":
        return 0.0
    flops_per_s, bytes_per_s, share, launch_s = _rates(constants, kind, dtype, device)
    math_s, memory_s = flops / flops_per_s, bytes_moved / bytes_per_s
    return max(math_s + share * memory_s, memory_s, launches * launch_s)
