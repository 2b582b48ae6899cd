"""From torch.export's graph to one that the rest can rely on: only functional aten ops and ours, no bookkeeping nodes.

Every pass takes an fx.Graph and changes it in place; they run in the order of `normalize`. What each leaves behind:
    inline_scopes         no higher-order set_grad_enabled/autocast wrappers
    refuse_transforms     no torch.vmap
    refuse_sizes_from_data  no tensor whose shape follows from the data in another
    count_users           every node among the users of what it reads
    place_hooks           (gradient_hooks.py) each hook on a gradient right behind the tensor that it is on
    number_draws          a number on each random op, in program order
    replace_synonyms      one name for each op: mul for multiply, bitwise_and for __and__
    drop_bookkeeping      no asserts, no casts to the same dtype, no aliases
    pin_dtypes            no tensor whose type is that of torch's default when the graph runs
    drop_unread_writes    no writes into memory that nothing reads, as modules built in a forward initialize
    refuse_param_writes   no writes to parameters: what multiplies or divides one by 1 goes, any other is refused;
                          nor to what takes a gradient, where autograd does not see it
    replace_random        every random op as ones of ours, counter-based (random_ops.py)
    replace_batch_norm    batch and instance norms as sums, so that statistics can be taken over a sharded batch
    replace_inplace       no in-place ops: new values, also of views of what is written; buffers written are listed
    widen_losses          losses of half-precision models in float32, as autocast has them (loss_precision.py)
    split_mean_losses     cross entropy's mean over targets as their sum by their count (global_loss.py)
    replace_global_pool   a pool to one value as the mean that it is: torch's own kernel restrides its result in place
    replace_embedding_bag bags of embeddings as lookups and sums, whose tables can be split
    dense_embeddings      no gradients of tables in sparse layout: their values are the same
    replace_batched_products  matmul of stacks in several dimensions as one op, which they do not merge for
    replace_attention     scaled_dot_product_attention as one op of ours (attention_ops.py)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from .attention_ops import replace_attention
from .batch_norms import replace_batch_norm
from .batched_products import replace_batched_products
from .embedding_bags import replace_embedding_bag
from .global_loss import split_mean_losses
from .loss_precision import widen_losses
from .nodes import source_of, value
from .random_ops import number_draws, replace_random
from .where import is_users_line
from .writes import drop_unread_writes, is_inplace, refuse_param_writes, refuse_writes_beside_gradients, replace_inplace

aten = torch.ops.aten
ours = torch.ops.shardwright

_BOOKKEEPING = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_ALIASES = {aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.contiguous.default, aten.expand.default, aten.view.default, aten.reshape.default,
}  # fmt: skip
_SYNONYMS = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg", "absolute": "abs",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne", "clip": "clamp",
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor", "concat": "cat", "concatenate": "cat",
    "fix": "trunc", "arctan2": "atan2", "special_expit": "sigmoid",
    "special_erf": "erf", "special_log1p": "log1p", "special_exp2": "exp2",
}  # fmt: skip
_POOLED = {aten.adaptive_avg_pool1d.default: [-1], aten.adaptive_avg_pool2d.default: [-2, -1]}


def normalize(
    graph_module: fx.GraphModule,
    param_placeholders: Collection[str],
    buffer_placeholders: set[str],
    place_hooks: Callable[[fx.Graph], None] = lambda graph: None,
) -> tuple[dict[str, fx.Node], fx.Node]:
    """Run all passes. Returns the written buffers (placeholder name -> node of the new value) and the random key."""
    graph = graph_module.graph
    inline_scopes(graph_module)
    refuse_transforms(graph)
    refuse_sizes_from_data(graph)
    refuse_opaque_constants(graph_module)
    count_users(graph)
    place_hooks(graph)
    number_draws(graph)
    replace_synonyms(graph)
    drop_bookkeeping(graph)
    pin_dtypes(graph)
    drop_unread_writes(graph)
    refuse_param_writes(graph, param_placeholders)
    refuse_writes_beside_gradients(graph)
    key = add_key(graph)
    replace_random(graph, key)
    replace_batch_norm(graph)
    mutated = replace_inplace(graph, buffer_placeholders)
    widen_losses(graph)
    split_mean_losses(graph)
    replace_global_pool(graph)
    replace_embedding_bag(graph)
    dense_embeddings(graph)
    replace_batched_products(graph)
    replace_attention(graph, key)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.args = ((*output.args[0], *mutated.values()),)  # so that what buffers become is not dead code
    graph.eliminate_dead_code()
    refuse_numbers_from_data(graph)
    graph.lint()
    return mutated, key


def count_users(graph: fx.Graph) -> None:
    """An export leaves nodes (slices of what is written in place) that are not among the users of what they read."""
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users.setdefault(node)


def refuse_opaque_constants(graph_module: fx.GraphModule) -> None:
    """torch.export keeps functions that it does not trace (under vmap, in a mask) as attributes of the graph."""
    for node in graph_module.graph.nodes:
        for operand in node.all_input_nodes:
            held = getattr(graph_module, str(operand.target), None) if operand.op == "get_attr" else None
            if held is not None and not isinstance(held, (torch.Tensor, torch.nn.Module)):
                raise ShardwrightError(
                    f"{source_of(node) or 'the model'} calls a function that is not traced ({held!r:.80})",
                    means="the graph does not show what it computes, so it cannot be planned",
                    change="that line: write the function out in tensor ops, without torch.vmap",
                    works="attn_implementation='eager', or a mask that the model is given",
                    exit_code=ExitCode.UNSUPPORTED_MODEL,
                )


def refuse_transforms(graph: fx.Graph) -> None:
    """torch.vmap and its like leave their bookkeeping in a trace, beside ops on tensors without the added dimension."""
    for node in graph.nodes:
        if node.op == "call_function" and "functorch" in (getattr(node.target, "__module__", None) or ""):
            line = source_of(node)
            place = line if is_users_line(line) else "the loss"
            raise ShardwrightError(
                f"{place} calls a transform of torch.func ({getattr(node.target, '__name__', node.target)})",
                means="the graph would show ops on one sample alone, so it cannot be planned",
                change="that line: write the function out for the whole batch, without torch.vmap",
                works="torch.einsum, broadcasting, or ops with a batch dimension",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )


def refuse_sizes_from_data(graph: fx.Graph) -> None:
    """A tensor whose size follows from data (x[mask], nonzero, unique) stands with a symbol in its shape. The cause is
    a number made of data before it, where there is one."""
    number: fx.Node | None = None
    for node in graph.nodes:
        number = number or (node if _makes_number(node) else None)
        made = value(node) if node.op == "call_function" else None
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if not isinstance(tensor, torch.Tensor) or all(isinstance(size, int) for size in tensor.shape):
                continue
            if number is not None:
                raise _number_from_data(number)
            raise ShardwrightError(
                f"{source_of(node) or 'the model'} makes a tensor whose size follows from data ({node.target})",
                means="its shape is known only as it runs, so neither its memory nor its time can be planned",
                change="that line: the number of entries must follow from the configuration",
                works="torch.where(mask, x, 0) in place of x[mask]",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )


def refuse_numbers_from_data(graph: fx.Graph) -> None:
    """A graph whose shapes follow from the data in a tensor (x.item(), x.tolist()) has no cost to plan with."""
    for node in graph.nodes:
        if _makes_number(node):
            raise _number_from_data(node)


def _makes_number(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (aten._local_scalar_dense.default, aten.item.default)


def _number_from_data(node: fx.Node) -> ShardwrightError:
    return ShardwrightError(
        f"{source_of(node) or 'the model'} makes a number of the data in a tensor ({node.target})",
        means="what is computed after it has shapes that are known only as it runs, so it cannot be planned",
        change="that line: x.item() and x.tolist() must not decide sizes or control flow",
        works="torch.where(mask, a, b), or sizes that follow from the configuration",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


# --------------------------------------------------------------------------- scopes and bookkeeping


def inline_scopes(graph_module: fx.GraphModule) -> None:
    """Splice the bodies of wrap_with_set_grad_enabled and wrap_with_autocast into the graph.

    What was computed without gradients is detached, so the joint trace differentiates exactly what eager would.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        if name == "wrap_with_set_grad_enabled":
            enabled, body_node, *operands = node.args
            detach = not enabled
        else:
            _device, _dtype, autocast, _cache, body_node, *operands = node.args
            detach = False
            if autocast:
                within = getattr(graph_module, body_node.target).graph.nodes
                line = next((source_of(inner) for inner in (node, *within) if source_of(inner)), "an unknown line")
                raise ShardwrightError(
                    f"the model opens torch.autocast around {line}",
                    means="precision is part of the plan; a cast region inside the model cannot be planned",
                    change="remove the autocast region and set the precision of the workload",
                    works="--dtype bfloat16",
                    exit_code=ExitCode.UNSUPPORTED_MODEL,
                )
        body = getattr(graph_module, body_node.target)
        inline_scopes(body)
        _inline(graph, node, body, operands, detach)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _loses_gradient(made: fx.Node) -> bool:
    """Without gradients, all but a tensor that takes one and was written in place: that stays what it was."""
    tensor = value(made)
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return False
    return not (is_inplace(made.target) and value(made.args[0]).requires_grad)


def _inline(graph: fx.Graph, node: fx.Node, body: fx.GraphModule, operands: list[Any], detach: bool) -> None:
    environment: dict[fx.Node, Any] = dict(
        zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True)
    )
    outputs: Any = ()
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                outputs = fx.node.map_arg(inner.args[0], lambda n: environment[n])
                continue
            environment[inner] = graph.node_copy(inner, lambda n: environment[n])
            if detach:
                environment[inner].meta["without_gradient"] = True
        if detach:
            detached = []
            for out in outputs:
                if isinstance(out, fx.Node) and _loses_gradient(out):
                    new = graph.call_function(aten.detach.default, (out,))
                    new.meta = dict(out.meta)
                    detached.append(new)
                else:
                    detached.append(out)
            outputs = tuple(detached)
    for user in list(node.users):
        assert user.target is operator.getitem, user.format_node()
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def replace_synonyms(graph: fx.Graph) -> None:
    """What an op is, and how it is split, is told by its name."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.name.startswith("aten::"):
            continue
        name = schema.name.removeprefix("aten::")
        plain = _SYNONYMS.get(name.removesuffix("_") if not name.endswith("__") else name)
        if plain is None:
            continue
        packet = getattr(aten, plain + ("_" if schema.is_mutable else ""), None)
        overload = getattr(packet, node.target._overloadname, None)
        if overload is not None and _takes_the_same(overload._schema, schema):
            node.target = overload


def _takes_the_same(one: Any, other: Any) -> bool:
    return [(a.type, a.kwarg_only) for a in one.arguments] == [(a.type, a.kwarg_only) for a in other.arguments]


def drop_bookkeeping(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:  # guard functions that newer exports append
            graph.erase_node(node)
            continue
        if node.op != "call_function":
            continue
        if node.target in _BOOKKEEPING:
            graph.erase_node(node)
        elif node.target in _ALIASES or (node.target in _CASTS and _same(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def pin_dtypes(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        made, names = value(node), [argument.name for argument in node.target._schema.arguments]
        given = node.kwargs.get("dtype") is not None or (
            "dtype" in names and names.index("dtype") < len(node.args) and node.args[names.index("dtype")] is not None
        )
        if "dtype" not in names:
            _pin_promotion(graph, node, made)
        elif not given and isinstance(made, torch.Tensor) and not node.all_input_nodes:
            node.kwargs = {**node.kwargs, "dtype": made.dtype}


def _pin_promotion(graph: fx.Graph, node: fx.Node, made: Any) -> None:
    """An integer tensor times 0.5, and a real one times 0.5j, may have the default dtype of when it runs: make it a
    number of that dtype first."""
    read = [n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]
    if not isinstance(made, torch.Tensor) or made.dtype not in (torch.float64, torch.complex128) or not read:
        return
    real = [n for n in read if value(n).dtype.is_floating_point or value(n).dtype.is_complex]
    op: Any = node.target  # an OpOverload
    if op.overloadpacket is aten.where and op is not aten.where.self and not real:
        _pin_where(graph, node, made.dtype)
    elif not real and (torch.Tag.pointwise in op.tags or len(read) == 1):
        dtype = made.dtype if torch.Tag.pointwise in op.tags else torch.float64
        node.replace_input_with(read[0], _as_dtype(graph, node, read[0], dtype))


def _pin_where(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """where(mask, 0.1, 0.3): the numbers as numbers of that dtype."""
    given: Any = node.args
    condition, *others = given
    with graph.inserting_before(node):
        for k, other in enumerate(others):
            if not isinstance(other, fx.Node):
                others[k] = graph.call_function(aten.full.default, ([], other), {"dtype": dtype})
                others[k].meta = {**node.meta, "val": value(node).new_empty(())}
    others = [o if value(o).dtype == dtype else _as_dtype(graph, node, o, dtype) for o in others]
    node.target, node.args = aten.where.self, (condition, *others)


def _as_dtype(graph: fx.Graph, before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    with graph.inserting_before(before):
        wide = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
    wide.meta = {**node.meta, "val": value(node).to(dtype)}
    return wide


def _same(node: fx.Node) -> bool:
    """Does this op return its input as it is? Only then, so that nothing changes memory layout or type."""
    before, after = value(node.args[0]), value(node)
    if not isinstance(before, torch.Tensor) or node.kwargs.get("copy") or node.kwargs.get("memory_format") not in (
        None, torch.preserve_format, torch.contiguous_format,
    ):  # fmt: skip
        return False
    return (
        before.dtype == after.dtype and before.shape == after.shape and before.stride() == after.stride()
        and before.device == after.device
    )  # fmt: skip


def replace_global_pool(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        dims = _POOLED.get(node.target) if node.op == "call_function" else None
        sizes = node.args[1] if dims else ()
        if dims and all(size == 1 for size in (sizes if isinstance(sizes, (list, tuple)) else [sizes])):
            with graph.inserting_before(node):
                new = graph.call_function(aten.mean.dim, (node.args[0], dims, True))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)


# --------------------------------------------------------------------------- randomness and attention


def dense_embeddings(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target is aten.embedding.default and len(node.args) > 4:
            node.args = (*node.args[:4], False)


def add_key(graph: fx.Graph) -> fx.Node:
    """The random key (int64[4]: seed, step, microbatch, base) as the last placeholder."""
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        key = graph.placeholder("random_key")
    with (
        value(last).fake_mode
        if isinstance(value(last), torch.Tensor) and hasattr(value(last), "fake_mode")
        else _null()
    ):
        key.meta["val"] = torch.empty(4, dtype=torch.int64, device="meta")
    return key


class _null:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
