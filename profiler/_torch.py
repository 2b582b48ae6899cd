"""Private names of torch that the profiler uses, in one place to mend at the next release."""

from __future__ import annotations

import contextlib
import functools
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.autograd import graph as autograd_graph
from torch.fx import _lazy_graph_module
from torch.fx import proxy as fx_proxy
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

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


class _Frames:
    """The running frames as torch's CapturedTraceback gives them. A line that was seen before costs a look-up; torch
    reads a hundred of them anew for each node, which is a tenth of a trace."""

    def __init__(self) -> None:
        # by identity, as a code object's hash is that of all it holds; each stays alive in its entry
        self._seen: dict[tuple[int, int], tuple[Any, traceback.FrameSummary]] = {}

    def extract(self) -> _Frames:
        return self

    def summary(self) -> traceback.StackSummary:
        """Outermost first."""
        found = []
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            key = (id(code), frame.f_lasti)
            known = self._seen.get(key)
            if known is None:
                line = traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name)
                known = self._seen[key] = code, line
            found.append(known[1])
            frame = frame.f_back  # type: ignore[assignment]
        found.reverse()
        return traceback.StackSummary(found)


@contextlib.contextmanager
def lines_kept() -> Iterator[None]:
    """Inside, a trace that notes the source of each node finds each line once."""
    original = fx_proxy.CapturedTraceback
    fx_proxy.CapturedTraceback = _Frames()  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        fx_proxy.CapturedTraceback = original  # type: ignore[misc]


@contextlib.contextmanager
def helpers_lines_kept(is_users: Callable[[str], bool]) -> Iterator[None]:
    """Inside, the source of a node shows functions of the user's that a forward calls; torch notes forwards alone.

    is_users: of a file's name.
    """
    original = fx_proxy.TracerBase._filter_traceback_frames

    def filtered(tracer: Any, stack: traceback.StackSummary) -> traceback.StackSummary:
        kept = original(tracer, stack)
        if not kept:
            return kept
        known = set(map(id, kept))
        first = next(place for place, frame in enumerate(stack) if id(frame) in known)
        inner = enumerate(stack)
        return traceback.StackSummary(f for k, f in inner if id(f) in known or (k > first and is_users(f.filename)))

    fx_proxy.TracerBase._filter_traceback_frames = filtered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        fx_proxy.TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


def outside_trace() -> contextlib.AbstractContextManager[object]:
    """Inside, a running trace sees nothing; fake tensors stay fake."""
    return proxy_tensor.disable_proxy_modes_tracing()


@contextlib.contextmanager
def fake_cpu(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Fake CPU tensors of these shapes and strides, and inside a mode that they belong to."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with unset_fake_temporarily(), mode:
        yield [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu") for t in tensors]


no_checkpoint_contexts = checkpoint.noop_context_fn


def is_selection(context: object) -> bool:
    """Is this the context by which selective checkpointing notes what is kept?"""
    return isinstance(context, checkpoint._CachingTorchDispatchMode)


@contextlib.contextmanager
def checkpoint_replaced(resumed: Callable[..., Iterator[None]], reentrant: Callable[..., Any]) -> Iterator[None]:
    """What checkpoint() does, of both kinds, is resumed(original, ...) and reentrant(original, ...)."""
    generator, apply = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction.apply
    checkpoint._checkpoint_without_reentrant_generator = functools.partial(resumed, generator)
    checkpoint.CheckpointFunction.apply = functools.partial(reentrant, apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        checkpoint._checkpoint_without_reentrant_generator = generator
        del checkpoint.CheckpointFunction.apply  # the inherited one again


def function_modes() -> list[Any]:
    """The torch function modes that are on, outermost first."""
    return list(_get_current_function_mode_stack())


@contextlib.contextmanager
def engine_replaced(engine: Callable[..., Any]) -> Iterator[None]:
    """engine(original, ...) runs in place of autograd's engine, under backward() and grad() alike."""
    original = torch.autograd._engine_run_backward
    torch.autograd._engine_run_backward = functools.partial(engine, original)
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = original


def engine_restored() -> contextlib.AbstractContextManager[None]:
    """Inside, autograd's own engine runs, whatever it was replaced by: for gradients of ours, not of the model's."""
    return engine_replaced(lambda _replaced, *args, **kwargs: autograd_graph._engine_run_backward(*args, **kwargs))


ModuleBackwardHook = torch.nn.modules.module.BackwardHook


@contextlib.contextmanager
def backward_hook_replaced(kind: Callable[..., Any]) -> Iterator[None]:
    """kind(module, hooks, pre_hooks) is what a module makes to run its full-backward hooks."""
    original = torch.nn.modules.module.BackwardHook
    torch.nn.modules.module.BackwardHook = kind  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.nn.modules.module.BackwardHook = original  # type: ignore[misc]


def global_module_hooks() -> list[dict[int, Any]]:
    """Tables of the forward hooks and pre-hooks that run for every module of the process."""
    return [torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks]


def decompositions_of(*names: str) -> dict[Any, Callable[..., Any]]:
    """torch's own, of every overload that makes a new tensor."""
    packets = [getattr(torch.ops.aten, name) for name in names]
    table: dict[Any, Callable[..., Any]] = dict(get_decompositions(packets))
    return {op: function for op, function in table.items() if not op._schema.is_mutable}


def writes_operands(op: Any) -> bool:
    """Does an op write into what it is given?"""
    return isinstance(op, torch._ops.OpOverload) and op._schema.is_mutable


def traced_node(tensor: torch.Tensor) -> tuple[Any, Any] | None:
    """(node, what holds its graph's attributes) of a tensor of the running trace; None of any other."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)
    return None if slot is None else (slot.proxy.node, getattr(mode.tracer, "root", None))


def running_trace() -> tuple[Any, Any] | None:
    """(graph, what holds its attributes) of the running trace, as it stands."""
    mode = proxy_tensor.get_proxy_mode()
    return None if mode is None else (mode.tracer.graph, getattr(mode.tracer, "root", None))


def undo_of_trace() -> Callable[[], None]:
    """Call what this gives, and nothing made since stays in the running trace. An op may give back the tensor that it
    was given (`x.to(x.dtype)`), which then stands for the op's node: it stands for what it stood for again."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    tracer, known = mode.tracer, set(mode.tracer.graph.nodes)
    stood_for: list[tuple[Any, Any]] = list(tracer.tensor_tracker.items())

    def undo() -> None:
        for node in reversed(tracer.graph.nodes):
            if node not in known:
                tracer.graph.erase_node(node)
        for tensor, proxy in stood_for:
            if tracer.tensor_tracker.get(tensor) is not proxy:
                tracer.tensor_tracker[tensor] = proxy

    return undo


def has_sizes_of_data(made: Any) -> bool:
    """Is any of the tensors that an op gave as large as data say, or any of its numbers one of data?"""
    return bool(symbolic_shapes.free_unbacked_symbols(made)) if made is not None else False


@contextlib.contextmanager
def outside_trace_and_fakes() -> Iterator[None]:
    """Inside, tensors are real, and a running trace sees nothing."""
    with proxy_tensor.disable_proxy_modes_tracing(), unset_fake_temporarily():
        yield


def _fake_ctc_loss(mode: Any, _op: Any, log_probs: torch.Tensor, targets: torch.Tensor, *_: Any, **__: Any) -> Any:
    """torch has none, as the second result is as wide as the longest target; here, as the widest that they can be."""
    samples = log_probs.shape[1] if log_probs.dim() == 3 else 1
    width = 2 * (targets.shape[1] if targets.dim() == 2 else targets.shape[0]) + 1
    with mode:
        return log_probs.new_empty(samples), log_probs.new_empty(samples, log_probs.shape[0], width)


def _fake_ctc_loss_backward(mode: Any, _op: Any, _grad: Any, log_probs: torch.Tensor, *_: Any, **__: Any) -> Any:
    with mode:
        return log_probs.new_empty(log_probs.shape)


for _overload in ("default", "Tensor"):
    for _name, _fake in (("_ctc_loss", _fake_ctc_loss), ("_ctc_loss_backward", _fake_ctc_loss_backward)):
        _op = getattr(getattr(torch.ops.aten, _name), _overload)
        if _op not in fake_impls.op_implementations_dict:
            fake_impls.register_op_impl(_op)(_fake)


def _fake_histc(mode: Any, _op: Any, x: torch.Tensor, bins: int = 100, *_: Any, **__: Any) -> torch.Tensor:
    """Of whole numbers too, which CUDA counts: torch's fake one runs the kernel of CPUs, which does not."""
    with mode:
        return x.new_empty(bins)


if torch.ops.aten.histc.default not in fake_impls.op_implementations_dict:
    fake_impls.register_op_impl(torch.ops.aten.histc.default)(_fake_histc)


def takes_groups(*operands: torch.Tensor) -> bool:
    """Has the device a product of groups of rows for these? It takes bfloat16 in rows of multiples of 16 bytes."""
    return hasattr(torch, "_grouped_mm") and all(
        t.is_cuda
        and t.dtype == torch.bfloat16
        and t.numel() > 0
        and all(size % 8 == 0 for size in (t.shape[-1], *t.shape[1:-1]))
        for t in operands
    )


def grouped_product(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[M, A], [E, A, B] -> [M, B], or [A, M], [M, B] -> [E, A, B]. ends: [E], the row behind the last of each group."""
    return torch._grouped_mm(left, right, offs=ends)
