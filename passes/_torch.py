"""Every private PyTorch name that the passes lean on, so that the next release is one file to mend."""

from __future__ import annotations

import copy
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the _c10d_functional ops
from torch import fx
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._guards import CompileContext
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

BoxedFunction = Callable[[list[Any]], Sequence[Any]]

__all__ = ["default_partition", "make_boxed_func", "suggest_memory_format"]


def has_kernel(op: torch._ops.OpOverload, device_type: str, *, of_this_build: bool) -> bool:
    """Is there a kernel of op for "cpu" or "cuda": its own, or one composed of other ops?

    of_this_build: says the dispatcher of this process. Otherwise, for ops of aten, the list of PyTorch's kernels says,
    which tells of CUDA in a build without it too; other ops count as having one.
    """
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    built = key != "CUDA" or torch.backends.cuda.is_built()
    if op.namespace == "aten" and not (of_this_build and built):
        return key in _listed_kernels().get(op.name(), {key})
    if not of_this_build:
        return True
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(op.name(), key)


@functools.cache
def _listed_kernels() -> dict[str, frozenset[str]]:
    """ "aten::NAME.OVERLOAD" -> dispatch keys of its kernels, both where it is composite. By torchgen's list of them,
    which is installed with torch; empty without it. An op that the list gives no keys has a kernel for all.
    """
    spec = importlib.util.find_spec("torchgen")
    path = Path(spec.origin or "").parent / "packaged/ATen/native/native_functions.yaml" if spec is not None else None
    if path is None or not path.is_file():
        return {}
    keys: dict[str, set[str]] = {}
    delegates: dict[str, str] = {}
    name, in_dispatch = "", False
    for line in path.read_text().splitlines():
        if line.startswith("- func: "):
            name, in_dispatch = "aten::" + line.removeprefix("- func: ").partition("(")[0], False
        elif line.startswith("  structured_delegate: "):
            delegates[name] = "aten::" + line.split(":", 1)[1].strip()
        elif line.startswith("  ufunc_inner_loop:"):  # generated for both
            delegates[name] = ""
        elif line.startswith("  dispatch:"):
            in_dispatch = True
            keys[name] = set()
        elif in_dispatch and line.startswith("    ") and ":" in line:
            keys[name].update(part.strip() for part in line.partition(":")[0].split(","))
        elif in_dispatch and line.strip() and not line.lstrip().startswith("#"):
            in_dispatch = False
    everywhere = frozenset(("CPU", "CUDA"))
    found = {
        name: everywhere if any(key.startswith("Composite") for key in listed) else frozenset(listed)
        for name, listed in keys.items()
    }
    for name, target in sorted(delegates.items(), key=lambda item: item[1]):  # those without a target come first
        found[name] = found.get(name, frozenset()) | (found.get(target, everywhere) if target else everywhere)
    return found


def output_node(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def fake_mode_of(values: Any) -> FakeTensorMode:
    """The fake mode that the given example values live in."""
    for value in pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise AssertionError("no fake tensor among the values of a traced graph")


def gradient_inputs(backward: fx.GraphModule) -> Iterator[tuple[int, int]]:
    """(output slot of the backward graph, index of the compiled function's input that it is the gradient of).

    Raises NotImplementedError where autograd replaced an input by the base of a view, so that its gradient has no slot.
    """
    descriptors = output_node(backward.graph).meta["desc"]
    for slot, descriptor in enumerate(descriptors):
        if type(descriptor).__name__ != "GradAOTOutput":
            continue
        index = getattr(descriptor.grad_of, "idx", None)
        if index is None:
            raise NotImplementedError(f"gradient of {type(descriptor.grad_of).__name__}")
        yield slot, index


def copy_graph_module(graph_module: fx.GraphModule) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the copy of a pytree spec looks at its own deprecated names
        return fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))


def partition_keeping(
    joint: fx.GraphModule, joint_inputs: Any, budget: float, options: dict[str, Any]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """PyTorch's min-cut partitioner, keeping at most this fraction (0 to 1) of what it would keep.

    The joint graph stays intact.
    """
    mine = copy_graph_module(joint)
    with functorch_config.patch(activation_memory_budget=budget):
        return min_cut_rematerialization_partition(mine, joint_inputs, **options)


def compiled_frame() -> Any:
    """Which function's graph Dynamo has compiled now; the same for its variants of other shapes."""
    found = CompileContext.current_compile_id()
    return None if found is None else found.frame_id


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def inductor_compile(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool
) -> BoxedFunction:
    from torch._inductor.compile_fx import compile_fx_inner

    output = output_node(graph_module.graph)
    # all outputs keep the strides they were traced with: autograd's wrapper was made for those
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))  # type: ignore[arg-type]
    return compile_fx_inner(graph_module, example_inputs, is_backward=is_backward)  # type: ignore[return-value]


def static_input_slots(dynamo_graph: fx.Graph) -> list[int]:
    """Placeholders of a Dynamo graph that are a module's parameters or buffers."""
    placeholders: Iterable[fx.Node] = (node for node in dynamo_graph.nodes if node.op == "placeholder")
    return [
        slot
        for slot, node in enumerate(placeholders)
        if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    ]


def trace_to_aten(dynamo_graph: fx.GraphModule) -> fx.GraphModule | None:
    """Dynamo's graph as aten ops, before autograd; same inputs and outputs. None where shapes are symbolic."""
    from torch.fx.experimental.proxy_tensor import make_fx

    placeholders = [node for node in dynamo_graph.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta.get("example_value") for node in placeholders]
    if not all(isinstance(fake, FakeTensor) and all(isinstance(n, int) for n in fake.shape) for fake in fakes):
        return None
    with fake_mode_of(fakes):
        return make_fx(dynamo_graph, pre_dispatch=True)(*fakes)


def group_by_name(name: str) -> Any:
    """The process group that functional collectives know under this name."""
    known: Any = name  # a type of torch's own for strings like this one
    return torch._C._distributed_c10d._resolve_process_group(known)


def world_group_name() -> str:
    """The name under which functional collectives know the default process group."""
    group = torch.distributed.group.WORLD
    assert group is not None
    return group.group_name


def aot_compile(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    forward_compiler: Callable[..., BoxedFunction],
    backward_compiler: Callable[..., BoxedFunction],
    partition: Callable[..., tuple[fx.GraphModule, fx.GraphModule]],
    decompositions: dict[Any, Callable[..., Any]] | None,
) -> Callable[..., Any]:
    """AOTAutograd as Dynamo backends use it."""
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(
        fw_compiler=forward_compiler,
        bw_compiler=backward_compiler,
        partition_fn=partition,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )
    return compiler(graph_module, example_inputs)


CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
ARGUMENT_TAKES_GRADIENT = "shardwright_argument_takes_gradient"


@functools.cache
def note_checkpoint_arguments() -> None:
    """Has Dynamo note in a checkpoint's node whether any argument of it takes a gradient where gradients are recorded:
    among the node's operands, arguments and what the function uses beside them come in any order."""
    from torch._dynamo.variables.higher_order_ops import CheckpointHigherOrderVariable as Checkpoint

    called = getattr(Checkpoint, "_call_function", None)
    if called is None:  # by another name in this torch: nodes then carry no note, and are refused where that matters
        return

    def call_noted(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        result = called(self, tx, args, kwargs)
        takes_gradient = not torch.is_grad_enabled() or any(map(_takes_gradient, args[1:]))
        nodes = reversed(tx.output.current_tracer.graph.nodes)
        node = next((node for node in nodes if node.target is CHECKPOINT), None)
        if node is not None:
            node.meta[ARGUMENT_TAKES_GRADIENT] = takes_gradient
        return result

    Checkpoint._call_function = call_noted  # type: ignore[method-assign]


def _takes_gradient(variable: Any) -> bool:
    """Only tensors themselves: in eager those in lists and dicts pass nothing on."""
    from torch._dynamo.variables import TensorVariable

    variable = variable.realize()
    if not isinstance(variable, TensorVariable):
        return False
    example = variable.as_proxy().node.meta.get("example_value")
    return isinstance(example, torch.Tensor) and example.requires_grad
