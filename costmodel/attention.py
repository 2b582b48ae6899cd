"""What attention runs as on a device, its seconds and the memory it needs besides its results.

kernels/attention.py takes one of PyTorch's fused kernels where one does what is asked, and a formula over blocks of
rows elsewhere: dropout, which PyTorch's kernels draw from another generator, the gradient of a mask, values wider than
keys, float64 on GPUs, and everything on AMD accelerators. Narrower values, as of multi-head latent attention, are made
as wide. The formula reads and writes each score many times,
in float32 or wider. The choice here is that of kernels/attention_fused.lowering, which a test holds it to.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import fx

from ..profiler.device import Device
from ..profiler.nodes import named_arguments
from ..profiler.work import attention_pairs
from .compute import matmul_rate, memory_rate
from .constants import Constants

MAX_SCORES = {"cpu": 1 << 20, "gpu": 1 << 26}  # of kernels/attention_math.py, which holds so many at once
_FORMULA_LAUNCHES = 20  # kernels of one block
_TENSORS_OF_SCORES = {False: 3, True: 5}  # alive at once in a block, forward and backward
_TENSORS_OF_DROPOUT = {"cpu": {False: 3, True: 2}}  # of the generator's words beside them, as PyTorch's ops draw them
_MAX_GRID = 65535
# compute capabilities of the catalog's NVIDIA parts that differ from a data-center part of today
_CAPABILITY = ((r"V100", (7, 0)), (r"A[18]00", (8, 0)), (r"RTX4090|L40S?|L4", (8, 9)), (r"G?B[23]00", (10, 0)))
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionCall:
    """One node of a captured graph: sizes [B, H, S, D] of query, [B, Hkv, T, .] of key and value, and flags."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    mask: tuple[tuple[int, ...], torch.dtype] | None
    mask_node: fx.Node | None
    causal: bool
    window: int
    dropout_p: float
    is_backward: bool
    mask_needs_grad: bool

    @classmethod
    def read(cls, node: fx.Node) -> AttentionCall | None:
        """None where the node is no attention of ours."""
        name = str(getattr(node.target, "overloadpacket", ""))
        if name not in ("shardwright.attention", "shardwright.attention_backward"):
            return None
        is_backward, given = name.endswith("backward"), named_arguments(node)
        query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
        mask_node = given["mask"] if isinstance(given["mask"], fx.Node) else None
        mask = mask_node.meta["val"] if mask_node is not None else None
        return cls(
            tuple(query.shape),
            tuple(key.shape),
            tuple(value.shape),
            (query.dtype, key.dtype, value.dtype),
            None if mask is None else (tuple(mask.shape), mask.dtype),
            mask_node,
            bool(given["causal"]),
            int(given["window"]),
            float(given["dropout_p"]),
            is_backward,
            is_backward and bool(given["mask_needs_grad"]),
        )

    def kernel(self, device: Device) -> str:
        """'cpu', 'flash', 'efficient' or 'math', as kernels/attention_fused.lowering has it."""
        half, dim = self.dtypes[0] in _HALF, self.query[3]
        if self.mask_needs_grad or self.dropout_p > 0 or self.value[3] > dim or len(set(self.dtypes)) > 1:
            return "math"
        if not math.prod(self.query) or not math.prod(self.key):
            return "math"
        if device.kind == "cpu":
            return "cpu" if half or self.dtypes[0] in (torch.float32, torch.float64) else "math"
        if device.name.startswith("MI") or max(self.query[:2]) > _MAX_GRID:
            return "math"
        square = self.query[2] == self.key[2]
        masked = self.mask is not None or (not square and (self.causal or self.window > 0))
        if half and not masked and _flash_takes(dim, _capability(device)):
            return "flash"
        if dim % (8 if half else 4) == 0 and (half or self.dtypes[0] == torch.float32):
            return "efficient"
        return "math"

    def computed_pairs(self, device: Device) -> float:
        """Pairs that the fused kernel works out, over those that see each other: a window that is a bias skips none."""
        if not self._window_is_bias(self.kernel(device)):
            return 1.0
        queries, keys = self.query[2], self.key[2]
        whole = attention_pairs(queries, keys, self.causal, 0)
        return whole / attention_pairs(queries, keys, self.causal, self.window)

    def widened_work(self, device: Device) -> float:
        """FLOPs with values made as wide as keys, as the fused kernels want them, over those of the model."""
        keys, values = self.query[3], self.value[3]
        if values == keys or self.kernel(device) == "math":
            return 1.0
        over_keys, over_values = (3, 2) if self.is_backward else (1, 1)
        return (over_keys + over_values) * keys / (over_keys * keys + over_values * values)

    def widened_bytes(self, device: Device, share: float) -> float:
        """Of values, outputs and their gradients made as wide as keys, and of the part of results that is kept; what
        of them is held while the kernel runs is the same, as results come out as wide."""
        if self.value[3] == self.query[3] or self.kernel(device) == "math":
            return 0.0
        queries = math.prod(self.query[:3])
        values = math.prod(self.value[:3])
        elements = 2 * (queries + values) if self.is_backward else queries + values
        return float(elements * self.query[3] * self.dtypes[0].itemsize * share)

    def _window_is_bias(self, kernel: str) -> bool:
        return self.window > 0 and (kernel == "cpu" or (kernel == "efficient" and not self.causal))

    def formula_scores(self, kind: str) -> float:
        """Scores that the formula works out on a device of this kind."""
        return _formula_scores(self.query[:3], self.key[2], self.causal, self.window, MAX_SCORES[kind])

    def formula_seconds(self, constants: Constants, device: Device, share: float) -> float:
        """share: of the captured op's work, one rank's."""
        scores = self.formula_scores(device.kind) * share
        is_wide = self.dtypes[0] == torch.float64
        wide = torch.float64 if is_wide else torch.float32
        products = 5 if self.is_backward else 2
        flops = products * scores * (self.query[3] + self.value[3])
        group = "attention_formula_backward_bytes" if self.is_backward else "attention_formula_bytes"
        num_bytes = scores * constants.get(group, device.kind) * (2 if is_wide else 1)
        seconds = flops / matmul_rate(constants, wide, device) + num_bytes / memory_rate(constants, "pointwise", device)
        if self.dropout_p > 0:
            vector = device.peak_flops_per_s("float32") * constants.get("vector_efficiency", device.kind)
            seconds += scores * constants.get("random_operations", device.kind) / vector
        return max(seconds, _FORMULA_LAUNCHES * constants.get("launch_s", device.kind))

    def scratch_bytes(self, device: Device, share: float, mask_bytes: float) -> tuple[float, float]:
        """What the kernel holds while it runs, and what is kept for the next layer: the mask as the kernel wants it.

        mask_bytes: of this rank's part of the mask.
        """
        kernel = self.kernel(device)
        if kernel == "math":
            held = min(MAX_SCORES[device.kind], math.prod(self.query[:3]) * self.key[2] * share)
            return held * self._tensors_of_scores(device.kind) * (8 if self.dtypes[0] == torch.float64 else 4), 0.0
        bias, repeated = self._bias_bytes(kernel, mask_bytes), self._repeated_bytes(kernel, share)
        repeated += self.widened_bytes(device, share)
        return (repeated, bias) if self.mask is not None else (repeated + bias, 0.0)

    def _tensors_of_scores(self, kind: str) -> int:
        drawn = _TENSORS_OF_DROPOUT.get(kind, {}).get(self.is_backward, 0) if self.dropout_p > 0 else 0
        return _TENSORS_OF_SCORES[self.is_backward] + drawn

    def _bias_bytes(self, kernel: str, mask_bytes: float) -> float:
        """Of an additive mask in query's dtype, converted from one of another, or made for a window."""
        width = self.dtypes[0].itemsize
        windowed = self._window_is_bias(kernel)
        whole = self.query[2] * self.key[2]
        if self.mask is None:
            return float(whole * width) if windowed else 0.0
        shape, dtype = self.mask
        elements = mask_bytes / dtype.itemsize
        if windowed:
            elements *= whole / max(1, math.prod(shape[-2:]))
        padded = kernel == "efficient" and self.key[2] % 16
        return elements * width if windowed or padded or dtype != self.dtypes[0] else 0.0

    def _repeated_bytes(self, kernel: str, share: float) -> float:
        """The memory-efficient kernel wants a key and a value for each query head, and gives gradients of them."""
        if kernel != "efficient" or self.query[1] == self.key[1]:
            return 0.0
        tensors = 4 if self.is_backward else 2
        return tensors * self.query[0] * self.query[1] * self.key[2] * self.query[3] * self.dtypes[0].itemsize * share


@lru_cache(maxsize=4096)
def _formula_scores(query: tuple[int, ...], keys: int, causal: bool, window: int, limit: int) -> float:
    """query: [B, H, S]. Of each block of rows, the keys that any of them sees; limit: scores in a block."""
    batch, heads, rows = query
    block = min(max(1, limit // max(1, heads * keys)), max(rows, 1))
    seen = 0
    for first in range(0, rows, block):
        last = min(first + block, rows)
        begin = max(0, first - window + 1) if window > 0 else 0
        end = last if causal else last + window - 1 if window > 0 else keys
        seen += (last - first) * max(0, min(end, keys) - begin)
    return float(batch * heads * seen)


def _capability(device: Device) -> tuple[int, int]:
    return next((found for name, found in _CAPABILITY if re.match(name, device.name)), (9, 0))


def _flash_takes(dim: int, capability: tuple[int, int]) -> bool:
    large = capability in ((8, 0), (9, 0)) or capability[0] == 10
    return capability[0] >= 8 and dim % 8 == 0 and dim <= 256 and (large or not 192 < dim <= 224)
