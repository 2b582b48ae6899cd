"""Private names of torch that sharding rules use, in one place to mend at the next release."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, RuntimeSchemaInfo, TupleStrategy

__all__ = ["DTensorSpec", "OpSchema", "OpSpec", "OpStrategy", "RuntimeSchemaInfo", "TensorMeta", "TupleStrategy"]


def propagator() -> Any:
    return DTensor._op_dispatcher.sharding_propagator


def offline_mesh(size: int) -> DeviceMesh:
    """A mesh of `size` imaginary ranks: no process group, no device."""
    return DeviceMesh("cpu", torch.arange(size), _init_backend=False, _rank=0)
