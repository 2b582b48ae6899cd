"""A call whose backward the user wrote, traced once forward and backward, so that it can be run again as plain ops.

A Function, or a hook on a gradient, is Python: what it does may hang on closures, on attributes, on what changed since.
So it is traced where it is called, as it then stands. What is kept is two graphs of plain ops; running them does what
the call did, and two calls are the same exactly when their graphs are.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import fx
from torch.autograd.function import Function, FunctionCtx, once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .nodes import named_arguments

aten = torch.ops.aten
Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]
_MOST_OUTPUTS = 4  # of a Function that tells absent gradients from zeros: each pattern is a trace of its own


@dataclass(frozen=True)
class Graphs:
    """forward(tensors) -> results, new values of written tensors, saved. backward(saved, gradients) -> gradients."""

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    num_saved: int
    gradient_layouts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Replayed:
    """One traced call. Tensors that the call reads without being given them are its last arguments.

    wanted: arguments that take a gradient. differentiable: results that do. returned: result -> the argument that it
    is, written in place. written: further arguments that the call writes. partial: by which gradients of differentiable
    results are given, where not all are and the call can tell.
    """

    name: str
    place: str
    graphs: Graphs
    wanted: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    returned: dict[int, int]
    written: tuple[int, ...]
    layouts: tuple[Any, ...]
    partial: dict[tuple[bool, ...], Graphs] = field(default_factory=dict)
    implicit: tuple[torch.Tensor, ...] = ()

    @property
    def num_results(self) -> int:
        return len(self.differentiable)

    def digest(self) -> str:
        facts = (self.wanted, self.differentiable, sorted(self.returned.items()), self.written, self.layouts)
        parts = [self.name, repr(facts)]
        for pattern, graphs in [((), self.graphs), *sorted(self.partial.items())]:
            parts.append(repr(pattern))
            parts += [_text(g) for g in (graphs.forward, graphs.backward) if g is not None]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(Again.apply(self, *tensors))

    def without_gradient(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Results and written values alone."""
        found = self.graphs.forward.forward(*_laid_out(tensors, self.layouts))
        return list(found[: self.num_results + len(self.written)])


class Again(Function):
    @staticmethod
    def forward(ctx: Any, replayed: Replayed, *tensors: torch.Tensor) -> Any:
        tensors = _laid_out(tensors, replayed.layouts)
        found = replayed.graphs.forward.forward(*tensors)
        end = replayed.num_results + len(replayed.written)
        results, saved = list(found[:end]), found[end:]
        fixed = [i for i in range(end) if i >= replayed.num_results or not replayed.differentiable[i]]
        for i in fixed:
            results[i] = results[i].detach()
        ctx.mark_non_differentiable(*(results[i] for i in fixed))
        ctx.set_materialize_grads(False)
        ctx.replayed = replayed
        ctx.save_for_backward(*saved, *(tensors if replayed.partial else ()))
        ctx.results = [(r.shape, r.dtype, r.device) for r in results]
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        replayed: Replayed = ctx.replayed
        graphs, saved = replayed.graphs, list(ctx.saved_tensors)
        wanted = [i for i, d in enumerate(replayed.differentiable) if d]
        pattern = tuple(gradients[i] is not None for i in wanted)
        if pattern in replayed.partial:
            graphs = replayed.partial[pattern]
            found = graphs.forward.forward(*saved[replayed.graphs.num_saved :])
            saved = list(found[replayed.num_results + len(replayed.written) :])
            wanted = [i for i, given in zip(wanted, pattern, strict=True) if given]
        if graphs.backward is None:
            return (None, *[None] * len(replayed.wanted))
        given = [gradients[i] for i in wanted]
        for k, i in enumerate(wanted):
            if given[k] is None:
                shape, dtype, device = ctx.results[i]
                given[k] = torch.zeros(shape, dtype=dtype, device=device)
        layouts = [(*graphs.gradient_layouts[k],) for k in range(len(wanted))]
        found = iter(graphs.backward.forward(*saved[: graphs.num_saved], *_laid_out(given, layouts)))
        return (None, *[next(found) if take else None for take in replayed.wanted])


def layout(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride())


def _laid_out(tensors: Sequence[Any], layouts: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    """In the layouts in which they were traced, as the ops on them were chosen for those."""
    found = []
    for tensor, strides in zip(tensors, layouts, strict=True):
        if tuple(tensor.stride()) != strides:
            formats = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
            fits = (f for f in formats if tensor.dim() == _DIMS.get(f, tensor.dim()) and _strides(tensor, f) == strides)
            memory_format = next(fits, None)
            if memory_format is not None:
                tensor = tensor.contiguous(memory_format=memory_format)
        found.append(tensor)
    return tuple(found)


_DIMS = {torch.channels_last: 4, torch.channels_last_3d: 5}


def _strides(tensor: torch.Tensor, memory_format: torch.memory_format) -> tuple[int, ...]:
    return tuple(torch.empty(tensor.shape, device="meta").contiguous(memory_format=memory_format).stride())


# --------------------------------------------------------------------------- tracing


def trace(run: Run, tensors: Sequence[torch.Tensor], name: str, place: str, *, tells_absent: bool = False) -> Replayed:
    """run: the call, of tensors only, under autograd. tensors: fake ones, as they are given to it.

    tells_absent: its backward is given None, not zeros, for a result that nothing reads; found out while it is traced
    where it is a Function that says so.
    """
    found, tells = _Trace(run, tensors, name, place).traced(None)
    implicit = found.implicit
    partial: dict[tuple[bool, ...], Graphs] = {}
    num_taken = sum(found.differentiable)
    if (tells or tells_absent) and num_taken > 1:
        if num_taken > _MOST_OUTPUTS:
            raise ShardwrightError(
                f"{name} ({place}) has {num_taken} results and tells absent gradients from zeros",
                means=f"each set of absent gradients is a backward of its own: {_MOST_OUTPUTS} results at most",
                change="ctx.set_materialize_grads(False) in it, or its results",
                works=f"{_MOST_OUTPUTS} results at most",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        for pattern in product((True, False), repeat=num_taken):
            if any(pattern) and not all(pattern):
                other, _ = _Trace(run, tensors, name, place).traced(pattern)
                if [id(t) for t in other.implicit] != [id(t) for t in implicit]:
                    raise _refusal(name, place, "reads other tensors where some of its gradients are absent")
                partial[pattern] = other.graphs
    return Replayed(
        name=name,
        place=place,
        graphs=found.graphs,
        wanted=(*found.wanted, *[False] * len(implicit)),
        differentiable=found.differentiable,
        returned=found.returned,
        written=found.written,
        layouts=tuple(layout(t) for t in (*tensors, *implicit)),
        partial=partial,
        implicit=implicit,
    )


def _refusal(name: str, place: str, what: str, works: str = "a Function of its arguments alone") -> ShardwrightError:
    return ShardwrightError(
        f"{name} ({place}) {what}",
        means="a captured graph cannot carry that, and would compute something else",
        change=f"{name}, or leave it out of the model",
        works=works,
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


@dataclass
class _Found:
    graphs: Graphs
    wanted: tuple[bool, ...]
    differentiable: tuple[bool, ...]
    returned: dict[int, int]
    written: tuple[int, ...]
    implicit: tuple[torch.Tensor, ...]


class _Trace:
    """One trace of a call and its backward."""

    def __init__(self, run: Run, tensors: Sequence[torch.Tensor], name: str, place: str) -> None:
        self.run, self.tensors, self.name, self.place = run, tensors, name, place
        enabled = torch.is_grad_enabled()
        self.wanted = tuple(enabled and t.requires_grad for t in tensors)
        self.differentiable: tuple[bool, ...] = ()
        self.returned: dict[int, int] = {}
        self.written: tuple[int, ...] = ()
        self.boundary = ""
        self.gradients: list[str] = []  # nodes that stand for the gradients of results

    def traced(self, pattern: tuple[bool, ...] | None) -> tuple[_Found, bool]:
        """pattern: which gradients of differentiable results are given; None: all."""
        with _torch.outside_trace(), torch.enable_grad(), _watched_materializing() as told:
            plain = [t.detach() for t in self.tensors]
            module = make_fx(lambda *flat: self._joint(flat, pattern))(*plain)
        _refuse_random(module, self.name, self.place)
        lifted = _lift_constants(module)
        self._refuse_outer_writes(module.graph, len(plain))
        found = _Found(
            self._split(module, plain + lifted), self.wanted, self.differentiable, self.returned, self.written,
            tuple(lifted),
        )  # fmt: skip
        return found, bool(told)

    def _refuse_outer_writes(self, graph: fx.Graph, num_given: int) -> None:
        """To what it is not given: a statistic of gradients, a counter of a module that it closes over."""
        outer = set([n for n in graph.nodes if n.op == "placeholder"][num_given:])
        for node in graph.nodes:
            if any(_memory(n) in outer for n in _writes(node)):
                raise _refusal(
                    self.name, self.place, f"writes to a tensor that it is not given ({node.target})",
                    works="the tensor written in the model's forward, or given to the Function as an argument",
                )  # fmt: skip

    def _joint(self, flat: Sequence[torch.Tensor], pattern: tuple[bool, ...] | None) -> tuple[Any, ...]:
        leaves = [t.detach().requires_grad_(w) for t, w in zip(flat, self.wanted, strict=True)]
        inputs = [leaf.clone() for leaf in leaves]  # as no leaf may be written in place
        with torch.set_grad_enabled(any(self.wanted)):
            results = self.run(inputs)
        self.returned = {k: i for k, r in enumerate(results) for i, t in enumerate(inputs) if r is t and t._version}
        self.written = tuple(i for i, t in enumerate(inputs) if t._version and i not in self.returned.values())
        self.differentiable = tuple(r.requires_grad for r in results)
        outputs = [r.detach() for r in results] + [inputs[i].detach() for i in self.written]
        self.boundary = _torch.last_traced_node_name()
        taken = [r for r in results if r.requires_grad]
        if pattern is not None:
            taken = [r for r, given in zip(taken, pattern, strict=True) if given]
        self.gradients.clear()
        tangents = []
        for result in taken:
            tangents.append(torch.empty_like(result.detach()))
            self.gradients.append(_torch.last_traced_node_name())
        wrt = [leaf for leaf, w in zip(leaves, self.wanted, strict=True) if w]
        found: Sequence[Any] = [None] * len(wrt)
        if wrt and taken:
            found = torch.autograd.grad(taken, wrt, tangents, allow_unused=True)
        return (*outputs, *found)

    def _split(self, module: fx.GraphModule, given: Sequence[torch.Tensor]) -> Graphs:
        graph = module.graph
        results = list(next(n for n in graph.nodes if n.op == "output").args[0])
        end = len(self.differentiable) + len(self.written)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        forward_nodes = set(placeholders)
        for node in graph.nodes:
            forward_nodes.add(node)
            if node.name == self.boundary:
                break
        tangents = [n for n in graph.nodes if n.name in set(self.gradients)]
        needed = _needed([r for r in results[end:] if isinstance(r, fx.Node)], graph, forward_nodes)
        saved = [n for n in graph.nodes if n in needed and n in forward_nodes]
        forward = _subgraph(graph, forward_nodes, placeholders, [*results[:end], *saved])
        forward = _plain(forward, given)
        if not any(isinstance(r, fx.Node) for r in results[end:]):
            return Graphs(forward, None, len(saved), ())
        layouts = tuple(layout(n.meta["val"]) for n in tangents)
        values = [n.meta["val"] for n in (*saved, *tangents)]
        backward = _plain(_subgraph(graph, needed - forward_nodes, [*saved, *tangents], results[end:]), values)
        return Graphs(forward, backward, len(saved), layouts)


def _needed(results: Sequence[fx.Node], graph: fx.Graph, stop: set[fx.Node]) -> set[fx.Node]:
    """What the backward reads, down to and with what the forward left, and what it writes to memory that it reads."""
    found: set[fx.Node] = set()
    stack = list(results)
    writes = [n for n in graph.nodes if n not in stop and _writes(n)]
    while stack:
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                if node not in stop:
                    stack.extend(node.all_input_nodes)
        read = {_memory(node) for node in found}
        stack = [n for n in writes if n not in found and any(_memory(w) in read for w in _writes(n))]
    return found


def _writes(node: fx.Node) -> list[fx.Node]:
    """The operands that an op writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    given = named_arguments(node)
    names = [a.name for a in node.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    values = [value for name in names for value in _listed(given.get(name))]
    return [value for value in values if isinstance(value, fx.Node)]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _memory(node: fx.Node) -> fx.Node:
    """The node whose memory this one is in: itself, or what it is a view of."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
        if node.target is not operator.getitem and not any(r.alias_info is not None for r in returns):
            break
        node = node.args[0]
    return node


def _subgraph(
    graph: fx.Graph, within: set[fx.Node], given: Sequence[fx.Node], results: Sequence[Any]
) -> fx.GraphModule:
    """given -> results, with all of `within` that writes in place. Devices become the CPU, as in every segment."""
    made = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(given):
        env[node] = made.placeholder(f"given_{i}")
    cpu = torch.device("cpu")
    for node in graph.nodes:
        if node in env or node not in within or node.op != "call_function":
            continue
        env[node] = made.node_copy(node, lambda n: env[n])
        env[node].args = fx.node.map_aggregate(env[node].args, lambda a: cpu if isinstance(a, torch.device) else a)
        env[node].kwargs = {k: cpu if isinstance(v, torch.device) else v for k, v in env[node].kwargs.items()}
    made.output(tuple(env[r] if isinstance(r, fx.Node) else None for r in results))
    return fx.GraphModule(torch.nn.Module(), made)


def _plain(module: fx.GraphModule, values: Sequence[torch.Tensor]) -> fx.GraphModule:
    """Without writes in place, detaches and copies of what nothing writes to."""
    graph = module.graph
    graph.eliminate_dead_code()
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in graph.nodes):
        with _torch.outside_trace(), torch.no_grad(), _torch.fake_cpu(values) as fakes:
            module = make_fx(torch.func.functionalize(fx.Interpreter(module).run, remove="mutations_and_views"))(*fakes)
        graph = module.graph
        for node in list(graph.nodes):  # into what was given: a gradient that is the hook's own to change
            if node.target is aten.copy_.default and not node.users:
                graph.erase_node(node)
    for node in list(graph.nodes):
        copies = node.target is aten.clone.default and not node.kwargs
        if node.op == "call_function" and (copies or node.target in (aten.detach.default, aten.alias.default)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _lift_constants(module: fx.GraphModule) -> list[torch.Tensor]:
    """Tensors that are read without being given become last placeholders."""
    graph = module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"]
    by_id: dict[int, fx.Node] = {}
    lifted: list[torch.Tensor] = []
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, str(node.target))
        if _is_literal(node, tensor):
            for copied in list(node.users):
                with graph.inserting_before(copied):
                    number = graph.call_function(aten.full.default, ([], tensor.item()), {"dtype": tensor.dtype})
                number.meta = dict(copied.meta)
                copied.replace_all_uses_with(number)
                graph.erase_node(copied)
            graph.erase_node(node)
            continue
        if id(tensor) not in by_id:
            with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
                by_id[id(tensor)] = graph.placeholder(f"implicit_{len(lifted)}")
            by_id[id(tensor)].meta["val"] = tensor
            last.append(by_id[id(tensor)])
            lifted.append(tensor)
        node.replace_all_uses_with(by_id[id(tensor)])
        graph.erase_node(node)
    return lifted


def _is_literal(node: fx.Node, tensor: torch.Tensor) -> bool:
    """Is it a number that the code itself writes, as in gradient[:5] = 0?"""
    is_real = type(tensor) is torch.Tensor and tensor.dim() == 0 and not tensor.is_meta
    return is_real and all(user.target is aten.lift_fresh_copy.default for user in node.users)


def _refuse_random(module: fx.GraphModule, name: str, place: str) -> None:
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            raise _refusal(
                name, place, f"draws random numbers ({node.target})",
                works="numbers drawn outside it, by torch.rand or dropout, and given to it",
            )  # fmt: skip


@contextlib.contextmanager
def _watched_materializing() -> Iterator[list[bool]]:
    """Collects that a Function asks for None in place of zeros."""
    told: list[bool] = []
    original = FunctionCtx.set_materialize_grads

    def watched(self: Any, value: bool) -> None:
        if not value:
            told.append(True)
        original(self, value)

    FunctionCtx.set_materialize_grads = watched  # type: ignore[method-assign]
    try:
        yield told
    finally:
        FunctionCtx.set_materialize_grads = original  # type: ignore[method-assign]


def _text(module: fx.GraphModule) -> str:
    kinds = []
    for node in module.graph.nodes:
        kinds.append(f"{node.name}={node.op}:{node.target}{node.args!r}{node.kwargs!r}")
    return "\n".join(kinds)
