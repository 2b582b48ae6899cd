"""Random ops of an exported graph, each as counter-based ops of ours (random_forms.py), or refused.

number_draws      every draw gets its number, in the order in which the model draws: also those that nothing reads
replace_random    each random op as its form; one that writes (x.uniform_()) as a copy into what it writes to
refuse_random     of a traced joint graph: random ops that came out of other ops, and that nobody has replaced
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ExitCode, ShardwrightError
from .expand import splice
from .nodes import source_of, value
from .random_forms import FORMS, Arguments, Draw, base_name, bind, is_random, may_draw, writes_self

aten = torch.ops.aten
ours = torch.ops.shardwright
NUMBER = "random_number"  # meta of a node that draws: how many draws of the model come before it
_MARKERS = ("shardwright::sdpa_window", "shardwright::sdpa_masked")


def number_draws(graph: fx.Graph) -> None:
    count = 0
    for node in graph.nodes:
        if node.op == "call_function" and draws(node):
            node.meta[NUMBER] = count
            count += 1


def draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.name in _MARKERS:
        return 0 < _arguments(node)["dropout_p"] < 1
    return is_random(node.target) and may_draw(node.target, _arguments(node))


def _arguments(node: fx.Node) -> Arguments:
    """By name, with fake tensors in place of nodes."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta.get("val", n))
    return bind(node.target, args, kwargs)  # type: ignore[arg-type]


def replace_random(graph: fx.Graph, key: fx.Node) -> None:
    """node.meta['random'] marks each op of ours that draws."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_random(node.target):
            continue
        arguments = _arguments(node)
        if arguments.get("generator") is not None:
            raise _has_a_generator(node)
        name = base_name(node.target)
        if name == "scaled_dot_product_attention" or (name not in FORMS and not may_draw(node.target, arguments)):
            continue
        if name not in FORMS:
            raise no_counter_form(node)
        if name == "dropout" and NUMBER in node.meta:
            new: Any = _dropout(graph, node, key)
        else:
            new = _expand(graph, node, key)
        if writes_self(node.target) and new is not node.args[0]:
            new = _write(graph, node, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _dropout(graph: fx.Graph, node: fx.Node, key: fx.Node) -> fx.Node:
    """What _expand would make of it, without a trace: models have hundreds."""
    x, p = node.args[:2]
    shape = list(value(x).shape)
    with graph.inserting_before(node):
        new = graph.call_function(ours.dropout.default, (x, key, p, 0, shape, [0] * len(shape)))
    new.meta = {**node.meta, "random": True}
    return new


def _expand(graph: fx.Graph, node: fx.Node, key: fx.Node) -> fx.Node:
    """The form's own ops in the place of the node; the node of the result."""
    operands = list(dict.fromkeys(node.all_input_nodes))
    form = FORMS[base_name(node.target)]  # type: ignore[arg-type]

    def run(random_key: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        given = dict(zip(operands, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: given[n])
        return form(Draw(random_key), bind(node.target, args, kwargs))  # type: ignore[arg-type]

    traced = make_fx(run, tracing_mode="real")(value(key), *(value(n) for n in operands))
    kept = {k: v for k, v in node.meta.items() if k not in (NUMBER, "tensor_meta")}

    def mark(new: fx.Node) -> None:
        new.meta.update(kept)
        if key in new.all_input_nodes:
            new.meta |= {"random": True, NUMBER: node.meta[NUMBER]}

    return splice(graph, node, traced, [key, *operands], mark)


def _write(graph: fx.Graph, node: fx.Node, drawn: fx.Node) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(aten.copy_.default, (node.args[0], drawn))
    new.meta = {k: v for k, v in node.meta.items() if k != NUMBER}
    return new


def refuse_random(graph: fx.Graph) -> None:
    """The net under all of it: torch's own mark on ops that draw."""
    for node in graph.nodes:
        if node.op == "call_function" and is_random(node.target) and may_draw(node.target, _arguments(node)):
            raise no_counter_form(node)


def no_counter_form(node: fx.Node) -> ShardwrightError:
    return ShardwrightError(
        f"random op {node.target} at {source_of(node) or 'an unknown line'} has no counter-based form",
        means="its numbers would differ between ranks, between plans, and between forward and recomputation",
        change="that line: draw with torch.rand, torch.randn, torch.randint, torch.bernoulli or dropout",
        works="torch.rand_like(x)",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _has_a_generator(node: fx.Node) -> ShardwrightError:
    return ShardwrightError(
        f"random op {node.target} at {source_of(node) or 'an unknown line'} draws from a torch.Generator of its own",
        means="a generator's state is no part of the graph: its numbers would differ between ranks and plans",
        change="that line: leave generator= out; numbers then follow from the seed of the workload",
        works="torch.rand(shape, device=x.device)",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )
