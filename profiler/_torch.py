"""Private names of torch that the profiler uses, in one place to mend at the next release."""

from __future__ import annotations

import contextlib

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx import _lazy_graph_module
from torch.fx.experimental import proxy_tensor

DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


def last_traced_node_name() -> str:
    """Name of the node that make_fx added last."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    return next(reversed(mode.tracer.graph.nodes)).name


def null_context() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def lazy_recompile() -> contextlib.AbstractContextManager[None]:
    """Inside, graph modules print and compile their Python code when first called, not after every change.

    torch.export changes its graph some thirty times; of 70 blocks, each printing takes half a second.
    """
    return _lazy_graph_module._use_lazy_graph_module(True)
