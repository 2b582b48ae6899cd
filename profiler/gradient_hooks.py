"""Hooks on gradients, captured as part of the backward.

A trace of the forward does not see them. So while a model is exported each hook becomes a recorded call, an identity
whose backward is what the hook does to the gradient:

    tensor.register_hook(f) in a forward        on all that reads the tensor, before it or after (place_hooks)
    hooks that a parameter carries              the same, on the parameter
    full-backward hooks and pre-hooks           on the module's arguments and results, as torch.nn.Module has them
    hooks of every module (global ones)         for modules of the model; not for those that capture puts around it

What cannot be so is refused by name: hooks that run beside the backward (after accumulation, for what they observe).
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.autograd.function import Function

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .autograd_functions import OP, Calls
from .where import is_users_file, name_of, place_of, users_line

Hook = Callable[..., Any]


def _refusal(what: str, means: str, works: str) -> ShardwrightError:
    return ShardwrightError(
        what, means=means, change="remove the hook", works=works, exit_code=ExitCode.UNSUPPORTED_MODEL
    )


def described(hook: Hook) -> str:
    for held in getattr(hook, "__closure__", None) or () if "/torch/" in place_of(hook) else ():
        with contextlib.suppress(ValueError):  # a cell that is empty
            if callable(held.cell_contents) and "/torch/" not in place_of(held.cell_contents):
                return described(held.cell_contents)  # what torch's own hook calls, as that of several tensors does
    place = place_of(hook)
    # a hook of torch's own is put where the user's code is running just now
    return f"hook {name_of(hook)} ({users_line() if '/torch/' in place else place})"


def _observes(hook: Hook, where: str) -> ShardwrightError:
    return _refusal(
        f"{described(hook)} on {where} returns nothing",
        "it would run once, as the model is captured, and never again",
        "read program.gradients() after forward_backward(), or return the changed gradient from the hook",
    )


def refuse_hooks(model: nn.Module) -> None:
    """Those that no graph can carry."""
    for name, parameter in model.named_parameters():
        for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
            raise _refusal(
                f"{described(hook)} on parameter {name} runs after its gradient is accumulated",
                "gradients are accumulated shard by shard and over microbatches, so it would see parts of them",
                f"{name}.register_hook(...), which is captured; or change .grad between forward_backward() and "
                "optimizer_step()",
            )
    for path, module in model.named_modules():
        if module._backward_hooks and module._is_full_backward_hook is False:
            hook = next(iter(module._backward_hooks.values()))
            raise _refusal(
                f"{described(hook)} on module {path or type(module).__name__} is of the old register_backward_hook",
                "what gradient it gets depends on the module's last op, so it is not captured",
                "register_full_backward_hook",
            )


class GradientHooks:
    """The hooks that one capture meets."""

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.model, self.calls = model, calls
        self.modules = {id(module): path for path, module in model.named_modules()}
        self.parameters = {
            name: list(parameter._backward_hooks.values())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter._backward_hooks
        }
        self.removed: set[int] = set()
        self.count = 0

    def record(self, tensor: torch.Tensor, hook: Hook, where: str) -> int:
        """The hook as a call in the running trace; place_hooks puts it where it belongs. Returns its number."""

        def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
            return [_OnTensor.apply(given[0], hook, where)]

        place = f"on {where}, {place_of(hook)}"
        name = f"hook {name_of(hook)}"
        replayed = self.calls.traced(run, [tensor], name, place)
        if self.calls.traced(run, [tensor], name, place).digest() != replayed.digest():
            raise _refusal(
                f"{described(hook)} on {where} computes another gradient each time that it runs",
                "it hangs on what Python keeps between its runs (a counter, a list), which a graph does not carry",
                "a hook of its gradient, settings and the model's buffers",
            )
        key = self.calls.keep(replayed)
        torch.ops.shardwright.autograd_function(self.calls.all_tensors([tensor], replayed), f"{key}@{self.count}")
        self.count += 1
        return self.count - 1

    def record_parameters(self) -> None:
        for name, hooks in self.parameters.items():
            for hook in hooks:
                self.record(self.model.get_parameter(name), hook, f"parameter {name}")

    # in the place of torch's own

    def register_hook(self, original: Any, tensor: torch.Tensor, hook: Hook) -> Any:
        if self.calls.depth or not tensor.requires_grad:
            return original(tensor, hook)
        if isinstance(tensor, nn.Parameter):
            raise _refusal(
                f"{described(hook)} is put on a parameter in each forward",
                "each step would add one more",
                "register it once, when the model is made",
            )
        return _Handle(self, self.record(tensor, hook, "a tensor of the forward"))

    def refuse_after(self, original: Any, tensor: torch.Tensor, hook: Hook) -> Any:
        if self.calls.depth:
            return original(tensor, hook)
        raise _refusal(
            f"{described(hook)} is put behind an accumulated gradient at {users_line()}, in the forward",
            "gradients are accumulated shard by shard and over microbatches, so it would see parts of them",
            "tensor.register_hook(...), which is captured",
        )

    def module_hooks(self, module: nn.Module, hooks: Sequence[Hook], pre_hooks: Sequence[Hook]) -> Any:
        if self.calls.depth:
            return _torch.ModuleBackwardHook(module, hooks, pre_hooks)
        path = self.modules.get(id(module))
        if path is None:  # one that capture put around the model
            return _NoHooks()
        return _ModuleHooks(self.calls, path or type(module).__name__, module, hooks, pre_hooks)

    def only_of_model(self, hook: Hook) -> Hook:
        def run(module: nn.Module, *args: Any) -> Any:
            return hook(module, *args) if id(module) in self.modules else None

        return run

    def switch_gradients(self, original: Any, tensor: torch.Tensor, requires_grad: bool = True) -> Any:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_filename.endswith("/torch/nn/modules/module.py"):
            frame = frame.f_back
        changes = isinstance(tensor, nn.Parameter) and tensor.requires_grad != requires_grad
        if changes and not self.calls.depth and is_users_file(frame.f_code.co_filename):
            raise ShardwrightError(
                f"{users_line()} sets requires_grad of a parameter {tuple(tensor.shape)} in the forward",
                means="whether a parameter has a gradient is one fact of a graph, not one of each use",
                change="that line",
                works="torch.func.functional_call(module, {n: p.detach() for n, p in module.named_parameters()}, x)",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        return original(tensor, requires_grad)

    # afterwards

    def place(self, graph: fx.Graph) -> None:
        """Move each hook right behind its tensor, and let all that reads the tensor read what the hook gives.

        Of several on one tensor the first registered is the last in the chain: gradients come the other way.
        """
        order = {node: i for i, node in enumerate(graph.nodes)}
        by_tensor: dict[fx.Node, list[fx.Node]] = {}
        found = set()
        for node in list(graph.nodes):
            if node.target is not OP:
                continue
            tensors, name = _call_of(node)
            if "@" not in name:
                continue
            key, _, number = name.rpartition("@")
            node.args = (tensors, key)
            found.add(int(number))
            if int(number) in self.removed:
                for user in list(node.users):
                    graph.erase_node(user)
                graph.erase_node(node)
            else:
                by_tensor.setdefault(tensors[0], []).append(node)
        assert found >= set(range(self.count)) - self.removed, "the export lost a hook"
        for tensor, nodes in by_tensor.items():
            self._chain(graph, tensor, nodes, order)

    def _chain(self, graph: fx.Graph, tensor: fx.Node, nodes: list[fx.Node], order: dict[fx.Node, int]) -> None:
        readers = [user for user in tensor.users if user not in nodes]
        like = tensor if tensor.op == "call_function" else min(readers, key=order.__getitem__, default=tensor)
        start, before = tensor, tensor
        for node in graph.nodes:
            if tensor.op == "placeholder" and node.op == "placeholder":
                before = node
        for node in reversed(nodes):
            (_, *others), key = _call_of(node)
            for other in others:
                if order[other] > order[tensor] and other.op != "placeholder":
                    raise _refusal(
                        f"{key.partition('#')[0]} reads a tensor that is made after its own",
                        "the graph would have to run it before what it reads",
                        "a hook whose closure holds settings and earlier tensors only",
                    )
            for user in list(node.users):
                graph.erase_node(user)
            node.args = ([start, *others], key)
            before.append(node)
            with graph.inserting_after(node):
                got = graph.call_function(operator.getitem, (node, 0))
            got.meta = {**tensor.meta}
            for made in (node, got):
                made.meta.update({k: like.meta[k] for k in ("nn_module_stack", "stack_trace") if k in like.meta})
            start = before = got
        for reader in readers:
            reader.replace_input_with(tensor, start)


def _call_of(node: fx.Node) -> tuple[list[fx.Node], str]:
    """What a recorded call reads, the hook's tensor first, and its name."""
    tensors, name = node.args
    return list(tensors), name  # type: ignore[arg-type, return-value]


class _Handle:
    """What register_hook returns while a model is captured."""

    def __init__(self, hooks: GradientHooks, number: int) -> None:
        self.hooks, self.number = hooks, number

    def remove(self) -> None:
        self.hooks.removed.add(self.number)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _OnTensor(Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, hook: Hook, where: str) -> torch.Tensor:
        ctx.hook, ctx.where = hook, where
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        before = gradient._version
        changed = ctx.hook(gradient)
        if changed is None and gradient._version == before:
            raise _observes(ctx.hook, ctx.where)
        return gradient if changed is None else changed, None, None


class _NoHooks:
    def setup_input_hook(self, args: Any) -> Any:
        return args

    def setup_output_hook(self, args: Any) -> Any:
        return args


class _ModuleHooks:
    """What torch.utils.hooks.BackwardHook does, as two recorded calls: on the arguments and on the results."""

    def __init__(
        self, calls: Calls, path: str, module: nn.Module, hooks: Sequence[Hook], pre_hooks: Sequence[Hook]
    ) -> None:
        self.calls, self.path, self.module = calls, path, module
        self.hooks, self.pre_hooks = hooks, pre_hooks

    def setup_input_hook(self, args: Any) -> Any:
        if not self.hooks:
            return args
        if not _take_gradients(args):
            raise _observes(self.hooks[0], f"module {self.path}, none of whose arguments takes a gradient,")
        return self._record(args, self.hooks, self._on_arguments)

    def setup_output_hook(self, result: Any) -> Any:
        results = result if isinstance(result, tuple) else (result,)
        if not self.pre_hooks or not _take_gradients(results):
            return result
        found = self._record(results, self.pre_hooks, self._on_results)
        return found if isinstance(result, tuple) else found[0]

    def _record(self, values: Any, hooks: Sequence[Hook], change: Callable[[tuple[Any, ...]], Any]) -> Any:
        slots = [i for i, v in enumerate(values) if isinstance(v, torch.Tensor)]

        def all_values(gradients: Sequence[Any]) -> list[Any]:
            every: list[Any] = [None] * len(values)
            for slot, gradient in zip(slots, gradients, strict=True):
                every[slot] = gradient
            found = change(tuple(every))
            return [found[slot] for slot in slots]

        def run(given: list[torch.Tensor]) -> list[torch.Tensor]:
            return list(_OnModule.apply(all_values, *given))

        place = f"on module {self.path}, {place_of(hooks[0])}"
        new = self.calls.record(run, [values[i] for i in slots], f"hook {name_of(hooks[0])}", place)
        changed = list(values)
        for slot, tensor in zip(slots, new, strict=True):
            changed[slot] = tensor
        return tuple(changed) if type(values) is tuple else type(values)(*changed)

    def _on_arguments(self, gradients: tuple[Any, ...]) -> Any:
        for hook in self.hooks:
            found = hook(self.module, gradients, _GradOutput(f"{described(hook)} on module {self.path}"))
            gradients = self._taken(hook, found, gradients)
        return gradients

    def _on_results(self, gradients: tuple[Any, ...]) -> Any:
        for hook in self.pre_hooks:
            gradients = self._taken(hook, hook(self.module, gradients), gradients)
        return gradients

    def _taken(self, hook: Hook, found: Any, before: tuple[Any, ...]) -> tuple[Any, ...]:
        if found is None:
            raise _observes(hook, f"module {self.path}")
        found = found if isinstance(found, tuple) else (found,)
        if len(found) != len(before):
            raise _refusal(
                f"{described(hook)} on module {self.path} returns {len(found)} gradients of {len(before)}",
                "PyTorch refuses it as well",
                f"a tuple of {len(before)}",
            )
        return found


def _take_gradients(values: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


class _OnModule(Function):
    @staticmethod
    def forward(ctx: Any, change: Callable[[Sequence[Any]], Any], *tensors: torch.Tensor) -> Any:
        ctx.change = change
        results = tuple(t.view_as(t) for t in tensors)
        ctx.needed = [t.requires_grad for t in tensors]
        ctx.mark_non_differentiable(*(r for r, t in zip(results, tensors, strict=True) if not t.requires_grad))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None, *ctx.change([g if n else None for g, n in zip(gradients, ctx.needed, strict=True)]))


class _GradOutput:
    """Stands for grad_output, which a hook on the arguments' gradients must not read: it lies in another graph."""

    def __init__(self, hook: str) -> None:
        object.__setattr__(self, "_hook", hook)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise _refusal(
            f"{object.__getattribute__(self, '_hook')} reads grad_output",
            "the gradients of a module's results and of its arguments are parts of two graphs",
            "register_full_backward_pre_hook, which changes grad_output itself; or use grad_input alone",
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = _refuse


# --------------------------------------------------------------------------- while a model is exported


@contextlib.contextmanager
def recorded_hooks(hooks: GradientHooks) -> Iterator[None]:
    original = torch.Tensor.register_hook
    torch.Tensor.register_hook = lambda tensor, hook: hooks.register_hook(original, tensor, hook)  # type: ignore[method-assign, assignment]
    after = torch.Tensor.register_post_accumulate_grad_hook
    torch.Tensor.register_post_accumulate_grad_hook = lambda tensor, hook: hooks.refuse_after(after, tensor, hook)  # type: ignore[method-assign, assignment]
    switch = torch.Tensor.requires_grad_
    torch.Tensor.requires_grad_ = lambda tensor, flag=True: hooks.switch_gradients(switch, tensor, flag)  # type: ignore[method-assign, assignment, arg-type]
    tables = _torch.global_module_hooks()
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            for number, hook in table.items():
                table[number] = hooks.only_of_model(hook)
        with (
            _torch.backward_hook_replaced(hooks.module_hooks),
            _watched_saving(hooks.calls),
            _watched_nodes(hooks.calls),
            _watched_flags(hooks),
        ):
            yield
    finally:
        torch.Tensor.register_hook = original  # type: ignore[method-assign]
        torch.Tensor.register_post_accumulate_grad_hook = after  # type: ignore[method-assign]
        torch.Tensor.requires_grad_ = switch  # type: ignore[method-assign]
        for table, held in zip(tables, before, strict=True):
            table.update(held)


@contextlib.contextmanager
def _watched_flags(hooks: GradientHooks) -> Iterator[None]:
    """parameter.requires_grad = False, as requires_grad_ does."""
    original: Any = torch.Tensor.requires_grad  # inherited from torch._C

    def switch(tensor: torch.Tensor, flag: bool) -> None:
        hooks.switch_gradients(original.__set__, tensor, flag)

    torch.Tensor.requires_grad = property(original.__get__, switch)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        del torch.Tensor.requires_grad


class _GradFn:
    """Stands for tensor.grad_fn: a node of a graph that is only traced, so that no hook on it would ever run."""

    def __init__(self, node: Any) -> None:
        object.__setattr__(self, "_node", node)

    def __getattr__(self, name: str) -> Any:
        if name in ("register_hook", "register_prehook"):
            raise _refusal(
                f"a hook is put on a grad_fn at {users_line()}",
                "the node is one of the trace, and not of the backward that runs",
                "tensor.register_hook(...), which is captured",
            )
        return getattr(object.__getattribute__(self, "_node"), name)


@contextlib.contextmanager
def _watched_nodes(calls: Calls) -> Iterator[None]:
    """Hooks on nodes of autograd's graph are refused. torch's own code gets the nodes themselves."""
    original = torch.Tensor.grad_fn  # inherited from torch._C

    def grad_fn(tensor: torch.Tensor) -> Any:
        node = original.__get__(tensor)  # type: ignore[union-attr]
        is_users = not calls.depth and "/torch/" not in sys._getframe(1).f_code.co_filename
        return _GradFn(node) if node is not None and is_users else node

    torch.Tensor.grad_fn = property(grad_fn)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        del torch.Tensor.grad_fn


@contextlib.contextmanager
def _watched_saving(calls: Calls) -> Iterator[None]:
    """Hooks on saved tensors decide where these are kept, which is the plan's to do; or they change them."""
    kind = torch.autograd.graph.saved_tensors_hooks
    original = kind.__enter__

    def enter(self: Any) -> Any:
        if not calls.depth and not type(self).__module__.startswith("torch."):
            raise _saving(self)
        if not calls.depth and type(self) is kind and not self.pack_hook.__module__.startswith("torch."):
            raise _saving(self)
        return original(self)

    kind.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__enter__ = original  # type: ignore[method-assign]


def _saving(hooks: Any) -> ShardwrightError:
    return _refusal(
        f"the model opens saved_tensors_hooks with {name_of(hooks.pack_hook)} ({place_of(hooks.pack_hook)})",
        "what is kept for the backward, where and how, is the plan's own decision",
        "without it; --force recompute=all, or offloading, spares the memory",
    )
