"""Private names of torch that the profiler uses, in one place to mend at the next release."""

from __future__ import annotations

import contextlib

from torch.fx.experimental import proxy_tensor


def last_traced_node_name() -> str:
    """Name of the node that make_fx added last."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    return next(reversed(mode.tracer.graph.nodes)).name


def null_context() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
