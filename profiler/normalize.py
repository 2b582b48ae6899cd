"""From torch.export's graph to one that the rest can rely on: only functional aten ops and ours, no bookkeeping nodes.

Every pass takes an fx.Graph and changes it in place; they run in the order of `normalize`. What each leaves behind:
    inline_scopes         no higher-order set_grad_enabled/autocast wrappers
    drop_bookkeeping      no asserts, no casts to the same dtype, no aliases
    pin_dtypes            no tensor whose type is that of torch's default when the graph runs
    drop_unread_writes    no writes into memory that nothing reads, as modules built in a forward initialize
    refuse_param_writes   no writes to parameters: what multiplies or divides one by 1 goes, any other is refused
    replace_inplace       no in-place op on a tensor that has no other view; buffers written are listed
    replace_global_pool   a pool to one value as the mean that it is: torch's own kernel restrides its result in place
    replace_batch_norm    training batch norm as sums, so that its statistics can be taken over a sharded batch
    replace_random        every random op as one of ours, counter-based, numbered in program order
    replace_attention     scaled_dot_product_attention as one op of ours
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from ..errors import ExitCode, ShardwrightError
from .nodes import source_of, value
from .writes import drop_unread_writes, is_inplace, refuse_param_writes, replace_inplace

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
_POOLED = {aten.adaptive_avg_pool1d.default: [-1], aten.adaptive_avg_pool2d.default: [-2, -1]}
_DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default}


def normalize(
    graph_module: fx.GraphModule, param_placeholders: Collection[str], buffer_placeholders: set[str]
) -> tuple[dict[str, fx.Node], fx.Node]:
    """Run all passes. Returns the written buffers (placeholder name -> node of the new value) and the random key."""
    graph = graph_module.graph
    inline_scopes(graph_module)
    drop_bookkeeping(graph)
    pin_dtypes(graph)
    drop_unread_writes(graph)
    refuse_param_writes(graph, param_placeholders)
    mutated = replace_inplace(graph, buffer_placeholders)
    replace_global_pool(graph)
    replace_batch_norm(graph, mutated)
    key = add_key(graph)
    replace_attention(graph, key)
    replace_random(graph, key)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.args = ((*output.args[0], *mutated.values()),)  # so that what buffers become is not dead code
    graph.eliminate_dead_code()
    refuse_numbers_from_data(graph)
    graph.lint()
    return mutated, key


def refuse_numbers_from_data(graph: fx.Graph) -> None:
    """A graph whose shapes follow from the data in a tensor (x.item(), x.tolist()) has no cost to plan with."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in (aten._local_scalar_dense.default, aten.item.default):
            raise ShardwrightError(
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
                raise ShardwrightError(
                    f"the model opens torch.autocast at {source_of(node) or 'an unknown line'}",
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
        if "dtype" in names and not given and isinstance(made, torch.Tensor) and not node.all_input_nodes:
            node.kwargs = {**node.kwargs, "dtype": made.dtype}


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


def replace_batch_norm(graph: fx.Graph, mutated: dict[str, fx.Node]) -> None:
    """Training batch norm written out as sums over batch and space.

    Sums are what a sharded batch can add up; a fused kernel could only see its own shard (Ioffe and Szegedy 2015, with
    the unbiased running variance that PyTorch keeps).
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.batch_norm.default:
            continue
        x, weight, bias, mean_in, var_in, training, momentum, eps = node.args[:8]
        if not training:
            continue
        shape = value(x).shape
        dims = [d for d in range(len(shape)) if d != 1]
        count = 1
        for d in dims:
            count *= shape[d]
        stat = [1, shape[1]] + [1] * (len(shape) - 2)

        def call(op: Any, *args: Any, _node: fx.Node = node, **kwargs: Any) -> fx.Node:
            new = graph.call_function(op, args, kwargs)
            new.meta = {k: v for k, v in _node.meta.items() if k not in ("val", "tensor_meta")}
            operands = fx.node.map_arg((args, kwargs), lambda n: value(n))
            with value(x).fake_mode:  # noqa: B023
                new.meta["val"] = op(*operands[0], **operands[1])
            return new

        with graph.inserting_before(node):
            mean = call(aten.div.Scalar, call(aten.sum.dim_IntList, x, dims, True), count)
            centred = call(aten.sub.Tensor, x, mean)
            var = call(
                aten.div.Scalar, call(aten.sum.dim_IntList, call(aten.mul.Tensor, centred, centred), dims, True), count
            )
            out = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Scalar, var, eps)))
            if weight is not None:
                out = call(aten.mul.Tensor, out, call(aten.view.default, weight, stat))
            if bias is not None:
                out = call(aten.add.Tensor, out, call(aten.view.default, bias, stat))
            for buffer, new, scale in ((mean_in, mean, 1.0), (var_in, var, count / max(count - 1, 1))):
                if buffer is None or momentum is None:
                    continue
                flat = call(aten.detach.default, call(aten.view.default, new, [shape[1]]))
                old = call(aten.mul.Scalar, buffer, 1 - momentum)
                mutated[buffer.name] = call(aten.add.Tensor, old, call(aten.mul.Scalar, flat, momentum * scale))
        node.replace_all_uses_with(out)
        graph.erase_node(node)


# --------------------------------------------------------------------------- randomness and attention


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


_RANDOM_NAMES = {"rand", "rand_like", "randn", "randn_like", "bernoulli", "randint", "randint_like", "randperm",
                 "multinomial", "normal", "uniform", "normal_functional", "rrelu", "poisson", "native_dropout",
                 "bernoulli_", "uniform_", "normal_", "random_", "exponential_", "exponential",
                 "geometric_"}  # fmt: skip


def replace_random(graph: fx.Graph, key: fx.Node) -> None:
    """dropout, rand, randn and bernoulli become counter-based ops; node.meta['random'] marks each of ours."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name
        if node.target in _DROPOUTS:
            _replace_dropout(graph, node, key)
        elif name.split("::")[0] == "aten" and name.split("::")[1] in _RANDOM_NAMES:
            _replace_draw(graph, node, key, name.split("::")[1])


def _replace_dropout(graph: fx.Graph, node: fx.Node, key: fx.Node) -> None:
    x, probability, training = node.all_input_nodes[0], node.args[1], node.args[2]
    if not training or probability == 0:
        node.replace_all_uses_with(x)
        graph.erase_node(node)
        return
    with graph.inserting_before(node):
        if node.target is aten.feature_dropout.default:
            shape = list(value(x).shape)
            mask_shape = shape[:2] + [1] * (len(shape) - 2)
            ones = graph.call_function(aten.new_ones.default, (x, mask_shape))
            ones.meta = {**node.meta, "val": value(x).new_ones(mask_shape)}
            mask = graph.call_function(ours.dropout.default, (ones, key, probability, 0, mask_shape, [0] * len(shape)))
            mask.meta = {**ones.meta, "random": True}
            new = graph.call_function(aten.mul.Tensor, (x, mask))
        elif node.target is aten.alpha_dropout.default:
            raise _unsupported_random(node)
        else:
            shape = list(value(x).shape)
            new = graph.call_function(ours.dropout.default, (x, key, probability, 0, shape, [0] * len(shape)))
            new.meta["random"] = True
    new.meta = {**node.meta, **new.meta}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _replace_draw(graph: fx.Graph, node: fx.Node, key: fx.Node, name: str) -> None:
    out = value(node)
    shape = list(out.shape)
    where = [0] * len(shape)
    with graph.inserting_before(node):
        if name in ("rand", "rand_like"):
            op: Any = ours.rand_uniform.default
        elif name in ("randn", "randn_like"):
            op = ours.rand_normal.default
        elif name == "bernoulli" and len(node.args) == 1:
            draw = graph.call_function(ours.rand_uniform.default, (key, shape, shape, where, 0, out.dtype, out.device))
            draw.meta = {**node.meta, "random": True}
            less = graph.call_function(aten.lt.Tensor, (draw, node.args[0]))
            less.meta = {**node.meta, "val": out.to(torch.bool)}
            new = graph.call_function(aten._to_copy.default, (less,), {"dtype": out.dtype})
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            return
        else:
            raise _unsupported_random(node)
        new = graph.call_function(op, (key, shape, shape, where, 0, out.dtype, out.device))
    new.meta = {**node.meta, "random": True}
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _unsupported_random(node: fx.Node) -> ShardwrightError:
    return ShardwrightError(
        f"random op {node.target} at {source_of(node) or 'an unknown line'} has no counter-based form",
        means="its numbers would differ between plans and between forward and recomputation",
        change="draw with torch.rand, torch.randn, torch.bernoulli or dropout",
        works="torch.rand_like(x)",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def replace_attention(graph: fx.Graph, key: fx.Node) -> None:
    """scaled_dot_product_attention becomes shardwright::attention (two results; the second is the log-sum-exp)."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            q, k, v, mask, dropout_p, causal = (list(node.args) + [None, 0.0, False][len(node.args) - 3 :])[:6]
            mask = node.kwargs.get("attn_mask", mask)
            dropout_p = node.kwargs.get("dropout_p", dropout_p)
            causal = node.kwargs.get("is_causal", causal)
            scale = node.kwargs.get("scale")
            window = 0
        elif (
            getattr(node.target, "_schema", None) is not None and node.target._schema.name == "shardwright::sdpa_window"
        ):
            q, k, v, dropout_p, scale, window = node.args[:6]
            mask, causal = None, True
        elif (
            getattr(node.target, "_schema", None) is not None and node.target._schema.name == "shardwright::sdpa_masked"
        ):
            q, k, v, mask, dropout_p, scale, causal, window = node.args[:8]
        else:
            continue
        if value(q).dim() != 4:
            continue  # rare 3-D use: left to its decomposition
        scale = float(scale) if scale is not None else value(q).shape[-1] ** -0.5
        shape = [*value(q).shape[:3], value(k).shape[2]]
        with graph.inserting_before(node):
            args = (q, k, v, mask, key if dropout_p > 0 else None, scale, bool(causal), window, float(dropout_p), 0)
            both = graph.call_function(ours.attention.default, (*args, shape, [0] * 4))
            both.meta = {**node.meta, "val": (value(node), value(q).new_empty(shape[:3]))}
            if dropout_p > 0:
                both.meta["random"] = True
            out = graph.call_function(operator.getitem, (both, 0))
            out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
