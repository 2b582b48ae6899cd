"""tensor.data while a model is exported: a trace loses sight of it, as it makes a tensor that no op gives.

Read, it is the tensor without gradients, and in the memory of the tensor: detach(). Set, it would bind other memory to
a tensor of the model, which no graph carries to the next step: refused with its line.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import ExitCode, ShardwrightError
from .autograd_functions import Calls
from .where import users_line


@contextlib.contextmanager
def data_as_detached(calls: Calls) -> Iterator[None]:
    """For the user's code; torch's own gets what it asks for."""
    original: Any = torch.Tensor.data  # inherited from torch._C

    def is_users() -> bool:
        return not calls.depth and "/torch/" not in sys._getframe(2).f_code.co_filename

    def read(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach() if is_users() else original.__get__(tensor)

    def write(tensor: torch.Tensor, new: Any) -> None:
        if is_users():
            raise ShardwrightError(
                f"{users_line()} sets .data of a tensor {tuple(tensor.shape)} in the forward",
                means="a graph keeps the tensors that it was captured with: the next step would find it as it was",
                change="that line",
                works="a buffer, written in place: self.average.copy_(new); or the assignment between steps",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        original.__set__(tensor, new)

    torch.Tensor.data = property(read, write)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        del torch.Tensor.data
