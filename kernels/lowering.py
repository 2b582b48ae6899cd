"""Which kernels run on a device: the Triton ones on an NVIDIA GPU where triton is installed, else the references.

triton is optional: macOS and CPU builds of torch come without it, and nothing here imports it before it is needed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


@functools.cache
def _triton_kernels(name: str) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f".{name}", __package__)


def triton_for(device: torch.device, name: str = "random_triton") -> ModuleType | None:
    """The module of Triton kernels that serves device, or None: use the reference."""
    return _triton_kernels(name) if device.type == "cuda" else None
