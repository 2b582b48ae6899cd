"""Seconds of one op on one device: a roofline with an efficiency for each class of op.

    matmul, convolution   flops / (peak * efficiency) + memory_share * bytes / (bandwidth * memory_efficiency), and
                          never less than the memory time alone
    attention             the greater of arithmetic and memory time (tiles overlap the two)
    everything else       the greater of vector arithmetic and memory time
    views                 nothing

and none less than the launch of a kernel. Where ops were measured on the device itself, what they took there stands in
place of all of it (measured.py). The memory term is added, not overlapped, for matrix products: it stands for
the ramp, the tail and the operands of products too thin to hide them, which makes efficiency fall for small sizes.
"""

from __future__ import annotations

from functools import lru_cache

from ..profiler.device import Device, dtype_key
from .constants import Constants
from .measured import measured_seconds
from .op_classes import bare_name, op_class


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
    if device.rates is not None and launches == 1:
        name, key = bare_name(op_name).lower(), dtype_key(dtype)
        found = measured_seconds(device.rates, name, kind, key, flops, bytes_moved)
        if found is not None:
            return found
    flops_per_s, bytes_per_s, share, launch_s = _rates(constants, kind, dtype, device)
    math_s, memory_s = flops / flops_per_s, bytes_moved / bytes_per_s
    return max(math_s + share * memory_s, memory_s, launches * launch_s)
