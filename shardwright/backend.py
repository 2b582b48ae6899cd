"""torch.compile(model, backend="shardwright"): found through the torch_dynamo_backends entry point.

Each graph that Dynamo finds goes through AOTAutograd, so loss.backward() and the user's optimizer work as with any
other backend. Its forward and backward graphs then go through Shardwright's passes, and either run op by op or through
Inductor. Under torchrun the parameters' gradients are averaged over the ranks inside the backward graph: each rank
passes its own part of the batch, as with DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from .amounts import byte_amount, gib_amount
from .backend_test import holds_collectives, tested_at_first_call
from .costmodel.model import CostModel
from .equal_gradients import watched
from .errors import ExitCode, ShardwrightError, near_matches
from .memory_budget import budget_of
from .passes import _torch
from .passes.activation_limit import Limits, partition_within, saved_bytes
from .passes.data_parallel import average_gradients
from .passes.fuse_norm import Wins, fuse_add_rms_norm
from .profiler.hardware import parse_hardware
from .units import MIB

_torch.note_checkpoint_arguments()  # before Dynamo traces what this backend is to compile


@dataclass(frozen=True)
class BackendOptions:
    """torch.compile(..., options={...}).

    data_parallel: average gradients over the ranks where torch.distributed is initialized with more than one.
    broadcast: take rank 0's parameters and buffers before the first training step, as DistributedDataParallel does.
    bucket_mib: size of one all-reduce.
    inductor: generate code with Inductor instead of running op by op.
    fuse: put our fused RMSNorm in where the cost model of this machine's GPU says that it wins ("auto"), everywhere
    (True) or nowhere (False).
    activation_limit: most memory for tensors kept from forward to backward ("600MiB", or bytes); the rest is
    recomputed.
    memory_gib: most memory of a training step, in GiB: parameters, gradients, what the optimizer keeps (state_tensors
    of each parameter's size, 2 as Adam does), and what forward and backward hold; recomputation makes the last fit.
    self_test: compare each compiled graph with the one that it was made of when it is first called.
    """

    data_parallel: bool = True
    broadcast: bool = True
    bucket_mib: float = 25.0
    inductor: bool = False
    fuse: bool | str = "auto"
    activation_limit: int | str | None = None
    memory_gib: float | None = None
    state_tensors: int = 2
    self_test: bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        known = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in known:
                raise ShardwrightError(
                    f"unknown option {name!r} of the shardwright backend",
                    means=near_matches(name, known),
                    change="torch.compile(..., options={...})",
                    works=f"one of {', '.join(known)}",
                )
        parsed = cls(**(options or {}))
        parsed.limit_bytes, parsed.memory_bytes  # noqa: B018  refuses a malformed limit now rather than at a step
        if type(parsed.state_tensors) is not int or parsed.state_tensors < 0:
            raise ShardwrightError(
                f"state_tensors={parsed.state_tensors!r} is no number of tensors",
                means="of each trained parameter's size, that your optimizer keeps",
                change="state_tensors",
                works="state_tensors=2 for Adam, 1 for SGD with momentum, 0 for SGD",
            )
        return parsed

    @property
    def limit_bytes(self) -> int | None:
        return byte_amount(self.activation_limit, "activation_limit")

    @property
    def memory_bytes(self) -> int | None:
        return gib_amount(self.memory_gib)


def shardwright(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. Raises ShardwrightError for an unknown option or mode."""
    if mode not in (None, "default"):
        raise ShardwrightError(
            f"mode={mode!r} belongs to the inductor backend",
            change="torch.compile(..., mode=...)",
            works="options={'inductor': True}",
        )
    settings = BackendOptions.parse(options)
    if torch.is_grad_enabled():
        _refuse_frozen_checkpoints(graph_module)
    ranks = dist.get_world_size() if settings.data_parallel and dist.is_available() and dist.is_initialized() else 1
    parameters = {
        slot
        for slot, tensor in enumerate(example_inputs)
        if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
    }
    static_slots = _torch.static_input_slots(graph_module.graph)
    changed = _fuse(graph_module, example_inputs, settings)

    budget = room = None
    if settings.memory_bytes is not None and options is not None and torch.is_grad_enabled():
        budget = budget_of(options, settings.memory_bytes, settings.state_tensors)
        room = budget.room_for(example_inputs)
    limits = Limits(settings.limit_bytes, room)

    def split(joint: fx.GraphModule, joint_inputs: Any, **keywords: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Takes forward and backward as one graph, before gradients are averaged in it."""
        pair = partition_within(joint, joint_inputs, limits=limits, min_cut=settings.inductor, **keywords)
        if budget is not None:
            budget.keep(saved_bytes(pair[0], keywords["num_fwd_outputs"]))
        return pair

    talking = holds_collectives(graph_module)

    def noting(take: Callable[..., Any]) -> Callable[..., Any]:
        def take_noted(graph: fx.GraphModule, *arguments: Any, **keywords: Any) -> Any:
            nonlocal talking
            talking = talking or holds_collectives(graph)
            return take(graph, *arguments, **keywords)

        return take_noted

    def compiled(num_ranks: int) -> Callable[..., Any]:
        return _torch.aot_compile(
            changed,
            example_inputs,
            forward_compiler=noting(partial(_compile, settings=settings)),
            backward_compiler=partial(_compile_backward, settings=settings, parameters=parameters, ranks=num_ranks),
            partition=noting(split),
            decompositions=_torch.inductor_decompositions() if settings.inductor else None,
        )

    run = compiled(ranks)
    if settings.self_test and not talking:
        # made without averaging, as another rank may not compile now: no collective may wait for it
        run = tested_at_first_call(run, lambda: run if ranks == 1 else compiled(1), graph_module)
    if ranks == 1 or not parameters:
        return run
    run = watched(run, parameters)
    return _broadcast_first(run, static_slots) if settings.broadcast else run


def _refuse_frozen_checkpoints(graph_module: fx.GraphModule) -> None:
    """A reentrant checkpoint none of whose arguments takes a gradient gives none to what its function uses beside them;
    Dynamo takes it for one of the other kind, which does."""
    graphs = [module.graph for module in graph_module.modules() if isinstance(module, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        if not node.kwargs.get("use_reentrant") or node.target is not _torch.CHECKPOINT:
            continue
        found = [given.meta.get("example_value") for given in node.all_input_nodes]
        if not any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in found):
            continue
        takes_gradient = node.meta.get(_torch.ARGUMENT_TAKES_GRADIENT)
        if takes_gradient:
            continue
        what = "has no argument that takes a gradient, so in eager what its function uses beside them gets none"
        if takes_gradient is None:  # traced before Dynamo was asked to note it
            what = (
                "may have no argument that takes a gradient: the graph does not tell its arguments, which pass "
                "gradients on in eager, from what its function uses beside them, which then gets none"
            )
        raise ShardwrightError(
            f"a reentrant checkpoint {what}",
            means="torch.compile gives gradients to both, under any backend: the compiled model may train otherwise",
            change="torch.utils.checkpoint.checkpoint(..., use_reentrant=True)",
            works="use_reentrant=False, by which both are trained in eager too",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )


def _fuse(graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: BackendOptions) -> fx.GraphModule:
    """RMSNorm, with the residual addition before it, as one operator; the graph itself where that wins nothing."""
    wins = _fusing_wins(settings.fuse, any(_on_gpu(tensor) for tensor in example_inputs))
    if wins is None:
        return graph_module
    traced = _torch.trace_to_aten(graph_module)
    if traced is None:
        return graph_module
    fused = fuse_add_rms_norm(traced, (), wins=wins)
    changed = any(str(node.target).startswith("shardwright.") for node in fused.graph.nodes)
    return fused if changed else graph_module


def _on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _fusing_wins(choice: bool | str, on_gpu: bool) -> Wins | None:
    """on_gpu: the graph computes on one, whatever else this machine has."""
    if isinstance(choice, bool):
        return (lambda flops, bytes_saved: True) if choice else None
    if not on_gpu:
        return None
    try:
        cost_model = CostModel(parse_hardware("local"))
    except ShardwrightError:  # an accelerator that the catalog lacks: nothing is known to win
        return None
    # memory is a roof: it wins where the traffic saved takes longer than the arithmetic
    return lambda flops, bytes_saved: (
        cost_model.op_seconds("aten.add.Tensor", 0.0, bytes_saved, torch.bfloat16)
        > cost_model.op_seconds("aten.add.Tensor", flops, 0.0, torch.bfloat16)
    )


def _compile(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, settings: BackendOptions, is_backward: bool = False
) -> _torch.BoxedFunction:
    if settings.inductor:
        return _torch.inductor_compile(graph_module, example_inputs, is_backward=is_backward)
    return _torch.make_boxed_func(graph_module.forward)


def _compile_backward(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    settings: BackendOptions,
    parameters: set[int],
    ranks: int,
) -> _torch.BoxedFunction:
    if ranks > 1 and parameters:
        slots = [slot for slot, index in _torch.gradient_inputs(graph_module) if index in parameters]
        average_gradients(
            graph_module,
            slots,
            group_name=_torch.world_group_name(),
            group_size=ranks,
            bucket_bytes=int(settings.bucket_mib * MIB),
        )
    return _compile(graph_module, example_inputs, settings=settings, is_backward=True)


# Parameters and buffers that already equal rank 0's. Keyed by tensor, so that a second graph or a recompilation, which
# may happen on some ranks only, starts no collective of its own.
_equal_everywhere: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _broadcast_first(run: Callable[..., Any], static_slots: Sequence[int]) -> Callable[..., Any]:
    """Before the first call with gradients: an evaluation on one rank alone must not wait for the others."""
    done = False

    def broadcast_then_run(*arguments: Any) -> Any:
        nonlocal done
        if not done and torch.is_grad_enabled():
            done = True
            for slot in static_slots:
                tensor = arguments[slot]
                if isinstance(tensor, torch.Tensor) and tensor not in _equal_everywhere:
                    dist.broadcast(tensor.detach(), src=0)
                    _equal_everywhere[tensor] = True
        return run(*arguments)

    return broadcast_then_run
