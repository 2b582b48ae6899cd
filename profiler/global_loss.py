"""A loss that is divided by a number of the whole batch, as of the tokens that count, over microbatches.

Cross entropy with ignored targets is a sum over tokens by the count of those that are not ignored, a masked mean one by
the sum of its mask. A mean of the microbatches' quotients is not the quotient of the batch. So sum and divisor travel
apart: a divisor that depends on the batch alone is computed for all microbatches before the first forward (its nodes
are an output of a prologue segment), summed, and given to the graph as an input. With n_k that of microbatch k:

    mean over k, by share w_k of the samples, of  S_k / (w_k sum_j n_j)   =   (sum_k S_k) / (sum_j n_j)

Two passes, of whole graphs before they are cut:
    split_mean_losses   cross entropy and negative log-likelihood as sum by weight of targets
    separate_totals     such divisors as inputs
Which nodes they touch depends on the ops alone, never on a size, so every capture of a model has the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .nodes import emit, value
from .work import is_view

aten = torch.ops.aten
SHARE = "(share)"  # entry of a batch: what part of the samples a microbatch holds
_SUM, _MEAN = 2, 1
# name -> position of `reduction` among the arguments, what is taken where it is left out
_LOSSES = {
    "cross_entropy_loss": 3, "nll_loss_nd": 3, "nll_loss": 3, "mse_loss": 2, "l1_loss": 2, "smooth_l1_loss": 2,
    "huber_loss": 2, "binary_cross_entropy_with_logits": 4, "binary_cross_entropy": 3, "kl_div": 2,
    "soft_margin_loss": 2, "hinge_embedding_loss": 3, "margin_ranking_loss": 4,
}  # fmt: skip
_REDUCTIONS = {"sum": "sum", "mean": "mean", "count_nonzero": "sum"}
# ops that treat samples alike, one by one, beside the pointwise ones and views
_PER_SAMPLE = {"_to_copy", "to", "constant_pad_nd", "cat", "stack", "clone", "contiguous", "reshape", "flatten",
               "arange", "full", "full_like", "ones_like", "zeros_like", "new_ones", "new_zeros", "new_full", "ones",
               "zeros", "scalar_tensor", "embedding", "index_select", "type_as", "expand_as", "one_hot",
               "pad", "where", "masked_fill"}  # fmt: skip
_OF_ONE = {"mul", "div", "neg", "_to_copy", "to", "view", "reshape", "squeeze", "unsqueeze", "alias", "clone"}


@dataclass
class Totals:
    """nodes: entry of the batch that stands for a total -> the node of a microbatch's part of it. kinds: entry -> "sum"
    where the parts add up, "mean" where they count by their shares. placeholders: name of the node -> entry."""

    nodes: dict[str, fx.Node] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    placeholders: dict[str, str] = field(default_factory=dict)


def op_name(node: fx.Node) -> str:
    """ "sum" for aten.sum.dim_IntList; "" for what is no op of aten."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.removeprefix("aten::") if schema is not None and schema.name.startswith("aten::") else ""


def reduction_of(node: fx.Node) -> int | None:
    """Of a loss: 0 none, 1 mean, 2 sum; None for what is no loss."""
    position = _LOSSES.get(op_name(node))
    if position is None:
        return None
    given = node.args[position] if len(node.args) > position else node.kwargs.get("reduction", _MEAN)
    return given if isinstance(given, int) else None


# --------------------------------------------------------------------------- means as quotients


def split_mean_losses(graph: fx.Graph) -> None:
    """In place. What is divided by is the sum of the targets' weights, 1 each where classes have none."""
    for node in list(graph.nodes):
        name = op_name(node)
        if name not in ("cross_entropy_loss", "nll_loss_nd", "nll_loss") or reduction_of(node) != _MEAN:
            continue
        target: Any = node.args[1]
        if value(target).is_floating_point():  # a distribution for each sample: none is ignored
            continue
        weight, _, ignore, *rest = [*node.args[2:], *[None, _MEAN, -100, 0.0][len(node.args) - 2 :]][:4]
        weight, ignore = node.kwargs.get("weight", weight), node.kwargs.get("ignore_index", ignore)
        smoothing = node.kwargs.get("label_smoothing", rest[0]) if name == "cross_entropy_loss" else 0.0
        with graph.inserting_before(node):
            given = (node.args[0], target, weight, _SUM, ignore)
            total = emit(graph, node, node.target, *given, *([smoothing] if name == "cross_entropy_loss" else []))
            quotient = emit(graph, node, aten.div.Tensor, total, _weight_of_targets(graph, node, weight, ignore))
        node.replace_all_uses_with(quotient)
        graph.erase_node(node)


def _weight_of_targets(graph: fx.Graph, node: fx.Node, weight: Any, ignore: Any) -> fx.Node:
    target, dtype = node.args[1], value(node).dtype
    counts = emit(graph, node, aten.ne.Scalar, target, ignore)
    if weight is None:
        return emit(graph, node, aten._to_copy.default, emit(graph, node, aten.sum.default, counts), dtype=dtype)
    valid = emit(graph, node, aten.masked_fill.Scalar, target, emit(graph, node, aten.logical_not.default, counts), 0)
    flat = emit(graph, node, aten.reshape.default, valid, [-1])
    weights = emit(graph, node, aten.index_select.default, weight, 0, flat)
    kept = emit(graph, node, aten._to_copy.default, emit(graph, node, aten.reshape.default, counts, [-1]), dtype=dtype)
    return emit(graph, node, aten.sum.default, emit(graph, node, aten.mul.Tensor, weights, kept))


# --------------------------------------------------------------------------- divisors as inputs


def separate_totals(graph: fx.Graph, samples: Collection[fx.Node], state: Collection[fx.Node]) -> Totals:
    """In place. samples: placeholders of entries that hold samples. state: parameters, buffers that the forward writes
    and the random key. Nodes that are computed before the first forward are marked: meta["hoist"]."""
    found = Totals()
    known = _Known(graph, set(samples), set(state))
    after = [node for node in graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[Any, fx.Node] = {}

    def entry(key: Any, name: str, like: torch.Tensor) -> fx.Node:
        if key not in inputs:
            with graph.inserting_after(after):
                inputs[key] = graph.placeholder(f"total_{len(inputs)}")
            inputs[key].meta["val"] = like
            found.placeholders[inputs[key].name] = name
        return inputs[key]

    for node in list(graph.nodes):
        divisor = known.divisor(node)
        parts = known.totals_in(divisor) if divisor is not None else None
        if divisor is None or not parts:
            continue
        kind = known.kind_over(node)
        if kind is None:
            continue  # not a quotient of two totals: as its microbatch has it
        replaced: dict[fx.Node, fx.Node] = {}
        for part, how in parts.items():
            name = f"(total {len(found.nodes)})" if part not in inputs else found.placeholders[inputs[part].name]
            replaced[part] = entry(part, name, value(part))
            if name not in found.nodes:
                found.nodes[name], found.kinds[name] = part, how
                known.hoist(part)
        with graph.inserting_before(node):
            whole = known.copied(graph, divisor, replaced)
            if kind == "sum":  # see the formula above
                share = entry(SHARE, SHARE, value(node).new_empty(()))
                whole = emit(graph, node, aten.mul.Tensor, whole, share)
        node.replace_input_with(divisor, whole)
    return found


class _Known:
    """fixed: nodes that depend on the batch, unchanging buffers and constants alone. of_samples: on the samples."""

    def __init__(self, graph: fx.Graph, samples: set[fx.Node], state: set[fx.Node]) -> None:
        self.fixed: set[fx.Node] = set()
        self.of_samples: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                fixed, of_samples = node not in state, node in samples
            elif node.op == "call_function":
                fixed = not node.meta.get("random") and all(n in self.fixed for n in node.all_input_nodes)
                of_samples = any(n in self.of_samples for n in node.all_input_nodes)
            else:
                fixed, of_samples = True, False
            if fixed:
                self.fixed.add(node)
            if of_samples:
                self.of_samples.add(node)

    def divisor(self, node: fx.Node) -> fx.Node | None:
        """What a division, or a reciprocal, divides by, if it is one number that is fixed and follows the samples."""
        position = {"div": 1, "reciprocal": 0}.get(op_name(node))
        if position is None or node.target is aten.div.Tensor_mode:
            return None
        found = node.args[position]
        if not isinstance(found, fx.Node) or found not in self.fixed or found not in self.of_samples:
            return None
        return found if _is_number(found) else None

    def totals_in(self, divisor: fx.Node) -> dict[fx.Node, str] | None:
        """The totals that it is a function of, and their kinds; None where it is computed from anything else."""
        found: dict[fx.Node, str] = {}
        stack = [divisor]
        while stack:
            node = stack.pop()
            if node not in self.of_samples:
                continue
            kind = self._total(node)
            if kind is not None:
                found[node] = kind
            elif node.op == "call_function" and _is_number(node):
                stack.extend(node.all_input_nodes)
            else:
                return None
        return found

    def _total(self, node: fx.Node) -> str | None:
        kind = _REDUCTIONS.get(op_name(node)) if node.op == "call_function" else None
        if kind is None or not reduces_all(node) or not self._is_per_sample(node.args[0]):
            return None
        return kind

    def _is_per_sample(self, last: Any) -> bool:
        """Does each sample's part of a tensor depend on this sample alone?"""
        seen, stack = set(), [last]
        while stack:
            node = stack.pop()
            if node in seen or node not in self.of_samples or node.op == "placeholder":
                continue
            seen.add(node)
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            inner = op_name(node) in (*_REDUCTIONS, "any", "all", "amax", "amin") and _spares_first(node)
            if not (pointwise or is_view(node) or op_name(node) in _PER_SAMPLE or inner):
                return False
            stack.extend(node.all_input_nodes)
        return True

    def kind(self, node: Any) -> str | None:
        """ "sum" or "mean" over samples of what a division divides; None for anything else."""
        if not isinstance(node, fx.Node) or node not in self.of_samples or node.op != "call_function":
            return None
        reduction = reduction_of(node)
        if reduction in (_MEAN, _SUM):
            return "mean" if reduction == _MEAN else "sum"
        name = op_name(node)
        if name in _REDUCTIONS:
            return _REDUCTIONS[name] if reduces_all(node) else None
        if not _is_number(node) or name not in (*_OF_ONE, "add", "sub"):
            return None
        if name == "div" and node.args[1] in self.of_samples:
            return None
        kinds = {self.kind(n) for n in node.all_input_nodes if n in self.of_samples}
        if name in ("add", "sub") and len([n for n in node.args[:2] if n in self.of_samples]) < 2:
            return None
        many = name == "mul" and len(kinds) + sum(n in self.of_samples for n in node.all_input_nodes) > 2
        return kinds.pop() if len(kinds) == 1 and not many else None

    def kind_over(self, node: fx.Node) -> str | None:
        """Of what is divided: where it is no number yet, of the sums that the quotients end in."""
        if op_name(node) == "div" and (kind := self.kind(node.args[0])) is not None:
            return kind
        is_factor = op_name(node) == "reciprocal" or node.args[0] in self.fixed
        return "sum" if is_factor and self._only_summed(node) else None

    def _only_summed(self, node: fx.Node) -> bool:
        """Do all uses of a factor end in sums over everything, by products and quotients alone?"""
        for user in node.users:
            name, others = op_name(user), [n for n in user.all_input_nodes if n is not node]
            if name == "sum" and reduces_all(user):
                continue
            if name == "mul" and _is_number(node) and others and self.kind(others[0]) == "sum":
                continue
            linear = name in (*_OF_ONE, "sum") and not (name == "div" and user.args[1] is node)
            if not linear or (name == "div" and others and others[0] in self.of_samples) or not user.users:
                return False
            if not self._only_summed(user):
                return False
        return bool(node.users)

    def hoist(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            one = stack.pop()
            if one.op == "call_function" and not one.meta.get("hoist"):
                one.meta["hoist"] = True
                stack.extend(one.all_input_nodes)

    def copied(self, graph: fx.Graph, node: fx.Node, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same function of the totals."""
        if node in replaced or node not in self.of_samples:
            return replaced.get(node, node)
        replaced[node] = graph.node_copy(node, lambda n: self.copied(graph, n, replaced))
        return replaced[node]


def _is_number(node: fx.Node) -> bool:
    val = value(node)
    return isinstance(val, torch.Tensor) and val.numel() == 1


def _dims(node: fx.Node) -> list[int]:
    """That a reduction reduces, counted from the front."""
    rank = value(node.args[0]).dim()
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(rank))
    return [d % max(rank, 1) for d in dims]


def reduces_all(node: fx.Node) -> bool:
    return set(_dims(node)) == set(range(value(node.args[0]).dim()))


def _spares_first(node: fx.Node) -> bool:
    return 0 not in _dims(node)
