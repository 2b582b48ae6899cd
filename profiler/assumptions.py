"""What a forward asks of its data in Python: what holds for the example batch is assumed, and verified as it runs.

Models look at labels, masks, lengths and image grids to refuse bad ones (`if labels.max() >= vocab_size: raise`) or to
choose a path. A trace takes one path. Where the question hangs on whole-number or boolean entries of the batch alone,
the answer for the example batch is taken, and the loss is handed through shardwright::assumed, which raises where a
batch answers otherwise. What constants alone make has their size too (`unique` of a grid of windows), and stays a
constant. Whether numbers are finite is taken to be so, and verified likewise, and so is what a check asks that does
nothing but raise (checks_of_data.py). Other questions about real numbers, or about what parameters make of them, are
refused as before: their answers change from step to step.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import ExitCode, ShardwrightError
from . import _torch
from .checks_of_data import GAUSSIAN_NLL, Check, check_asked, gaussian_nll
from .nodes import needed_for, value
from .random_forms import base_name
from .random_ops import draws
from .selected_targets import SELECT, ctc_loss_in_rows, selection_of_rows
from .where import users_line

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_QUESTIONS = {torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__,
              torch.Tensor.tolist, torch.Tensor.is_nonzero}  # fmt: skip

_INDEXED = {torch.Tensor.__getitem__}
_REPEATED = {torch.repeat_interleave, torch.Tensor.repeat_interleave}
_SIZED = {torch.unique, torch.Tensor.unique, torch.unique_consecutive, torch.Tensor.unique_consecutive, torch.nonzero,
          torch.Tensor.nonzero, torch.argwhere, torch.Tensor.argwhere, torch.masked_select,
          torch.Tensor.masked_select}  # fmt: skip
_FINITE = {torch.ops.aten.isfinite.default: True, torch.ops.aten.isnan.default: False,
           torch.ops.aten.isinf.default: False}  # fmt: skip


_WRITES_BY_INDEX = {torch.Tensor.__setitem__, torch.Tensor.index_put_, torch.Tensor.index_put, torch.index_put}
# All that is looked at: a trace calls tens of thousands of other functions, each of which is asked for once.
_LOOKED_AT = {
    *_QUESTIONS, *_WRITES_BY_INDEX, *_INDEXED, *_REPEATED, *_SIZED, *SELECT, torch.tensor, torch.nn.functional.ctc_loss,
    GAUSSIAN_NLL,
}  # fmt: skip


class Assumptions(TorchFunctionMode):
    """On while a step is exported. entries: makes the example batch, by name in the order of its placeholders."""

    def __init__(self, entries: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        super().__init__()
        self._entries = entries
        self.held: list[tuple[torch.Tensor, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _LOOKED_AT:
            return func(*args, **(kwargs or {}))
        if func in _QUESTIONS and isinstance(args[0], torch.Tensor) and not kwargs:
            found = self._answer(args[0])
            check = check_asked() if func is torch.Tensor.__bool__ and (found is None or found[1]) else None
            whole = None if check is None else self._whole(check, args[0])
            if check is not None and (whole is not None or (found is None and check.test is None)):
                self.held.append((_is(args[0], check.answer) if whole is None else whole, users_line()))
                return check.answer
            if found is not None:
                return self._assumed(func, args[0], *found)
        if func in _WRITES_BY_INDEX and len(args) > 1:
            _require_fitting_masks(args[0], args[1])
        if func is torch.tensor and args and _holds_traced_numbers(args[0]):
            return _as_tensor(args[0], kwargs or {})
        if _size_follows_from_values(func, args, kwargs):
            made = self._of_constants(func, args, kwargs or {})
            if made is not None:
                return made
        if func in SELECT and (selected := selection_of_rows(args, kwargs)) is not None:
            return selected
        if func is GAUSSIAN_NLL:
            loss, passes = gaussian_nll(*args, **(kwargs or {}))
            self.held += [] if passes is None else [(passes, users_line())]
            return loss
        if func is torch.nn.functional.ctc_loss:
            in_rows = ctc_loss_in_rows(args, kwargs)
            if in_rows is not None:
                self.held.append((in_rows[1], users_line()))
                return in_rows[0]
        return func(*args, **(kwargs or {}))

    def _whole(self, check: Check, asked: torch.Tensor) -> torch.Tensor | None:
        """Does the whole check pass? None where each part is for itself, or only its shortcuts make it possible; of the
        attempt then nothing stays in the trace."""
        running = _torch.running_trace()
        if check.test is None or running is None:
            return None
        graph, _ = running
        for known in (asked, None):
            before, undo = set(graph.nodes), _torch.undo_of_trace()
            holds = check.holds(known)
            made = [node for node in graph.nodes if node not in before]
            if holds is not None and not any(_writes_or_draws(n) or _torch.has_sizes_of_data(value(n)) for n in made):
                return holds
            undo()
        return None

    def _assumed(self, func: Any, asked: torch.Tensor, answer: torch.Tensor, hangs_on_data: bool) -> Any:
        number = answer.tolist() if func is torch.Tensor.tolist else answer.item()
        is_truth = func in (torch.Tensor.__bool__, torch.Tensor.is_nonzero)
        if hangs_on_data:
            self.held.append((_is(asked, bool(number)) if is_truth else _holds(asked, answer), users_line()))
        return bool(number) if is_truth else number

    @functools.cached_property
    def entries(self) -> dict[str, torch.Tensor]:
        with _torch.outside_trace_and_fakes():
            return dict(self._entries())

    def _answer(self, asked: torch.Tensor) -> tuple[torch.Tensor, bool] | None:
        """The value for the example batch, and whether any entry has a part in it; None where that cannot be said."""
        traced = _torch.traced_node(asked)
        if traced is None:
            return None
        node, root = traced
        placeholders = [n for n in node.graph.nodes if n.op == "placeholder"]
        given = dict(zip(placeholders[len(placeholders) - len(self.entries) :], self.entries.values(), strict=True))
        finite = {n: torch.tensor(_FINITE[n.target]) for n in node.graph.nodes if n.target in _FINITE}
        given |= finite
        needed = needed_for([node], lambda n: n in finite) | {n for n in finite if n is node}
        entries = [n for n in needed if n.op == "placeholder"]
        if any(n not in given or given[n].is_meta or given[n].is_floating_point() for n in entries):
            return None
        if any(n.op not in ("placeholder", "call_function", "get_attr") for n in needed):
            return None
        with _torch.outside_trace_and_fakes(), torch.no_grad():
            checked = any(m in finite for n in needed for m in (n, *n.all_input_nodes))
            answers = [_value(node, needed, {**given, **drawn}, root) for drawn in _possible_draws(needed)]
        if answers[0].is_meta:  # a constant that the model makes beside its parameters, which are on meta
            return None
        if not all(torch.equal(answer, answers[0]) for answer in answers):
            raise _by_chance()
        return answers[0], bool(entries) or checked

    def _of_constants(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result where no entry has a part in it: it is the same in every step, and so is its size."""
        leaves, spec = tree_flatten((args, kwargs))
        found = [self._answer(leaf) if isinstance(leaf, torch.Tensor) else (leaf, False) for leaf in leaves]
        if any(answer is None or answer[1] for answer in found):
            return None
        with _torch.outside_trace_and_fakes():
            args, kwargs = tree_unflatten([answer[0] for answer in found if answer is not None], spec)
            made = func(*args, **kwargs)
        return tree_map(lambda x: torch.tensor(x.tolist(), dtype=x.dtype).reshape(x.shape), made)

    def verified(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, on the condition that all of it holds."""
        for holds, line in self.held:
            loss = torch.ops.shardwright.assumed(loss, holds, line)
        return loss


def _writes_or_draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and (node.target._schema.is_mutable or draws(node))


def _require_fitting_masks(tensor: torch.Tensor, indices: Any) -> None:
    """As PyTorch does, and as a trace on shapes alone does not: an entry that masks samples is as long as they are."""
    dim = 0
    for index in indices if isinstance(indices, (tuple, list)) else (indices,):
        if index is Ellipsis:
            return
        masks = isinstance(index, torch.Tensor) and index.dtype == torch.bool
        if masks and any(a != b for a, b in zip(index.shape, tensor.shape[dim:], strict=False)):
            raise IndexError(f"a mask of shape {tuple(index.shape)} does not fit a tensor of {tuple(tensor.shape)}")
        dim += index.dim() if masks else index is not None


def _possible_draws(needed: set[fx.Node]) -> list[dict[fx.Node, torch.Tensor]]:
    """What the random numbers that a question hangs on may be: the least, middle and largest ones, and all between."""
    draw = [n for n in needed if n.op == "call_function" and draws(n)]
    if any(base_name(n.target) not in ("rand", "rand_like", "bernoulli") for n in draw):  # type: ignore[arg-type]
        raise _by_chance()
    largest = 1 - 2**-11 if any(value(n).dtype in (torch.float16, torch.bfloat16) for n in draw) else 1 - 2**-24
    ends = ((0.0, 0.0), (0.5, 0.5), (largest, largest), (0.0, largest), (largest, 0.0)) if draw else ((0.0, 0.0),)
    return [{n: _ramp(value(n), first, last) for n in draw} for first, last in ends]


def _ramp(like: torch.Tensor, first: float, last: float) -> torch.Tensor:
    """Numbers in a row from first to last: an order of random numbers is a matter of chance too."""
    return torch.linspace(first, last, like.numel(), dtype=torch.float64).to(like.dtype).reshape(like.shape)


def _by_chance() -> ShardwrightError:
    return ShardwrightError(
        f"{users_line()} decides by a random number",
        means="a graph takes one path: the one that was drawn as it was captured, the same at every step",
        change="that line, or the setting of the model that leads there (in transformers: layerdrop)",
        works="layerdrop=0.0, or torch.where(torch.rand(()) < p, a, b), which computes both",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _size_follows_from_values(func: Any, args: Any, kwargs: Any) -> bool:
    if func in _INDEXED:
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
    if func in _REPEATED:
        return any(isinstance(given, torch.Tensor) for given in (*args[1:], *(kwargs or {}).values()))
    return func in _SIZED


def _holds_traced_numbers(values: Any) -> bool:
    """Does a list hold tensors of one number? torch.tensor would ask each for it."""
    listed = isinstance(values, (list, tuple)) and bool(values)
    return (
        listed
        and all(isinstance(v, (torch.Tensor, int, float)) for v in values)
        and any(isinstance(v, torch.Tensor) and v.dim() == 0 and _torch.traced_node(v) is not None for v in values)
    )


def _as_tensor(values: Any, kwargs: Any) -> torch.Tensor:
    """What torch.tensor makes of them: a copy through which no gradient goes."""
    numbers = [v.detach() if isinstance(v, torch.Tensor) else torch.tensor(v) for v in values]
    settings = {name: kwargs[name] for name in ("dtype", "device") if kwargs.get(name) is not None}
    made = torch.stack(numbers)
    made = made.to(**settings) if settings else made
    return made.requires_grad_() if kwargs.get("requires_grad") else made


def _is(asked: torch.Tensor, answer: bool) -> torch.Tensor:
    """As a truth value: any number but zero is true."""
    return (asked != 0).reshape(()) == answer


def _holds(asked: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    if answer.dim() == 0:
        return asked == answer.item()
    return (asked == torch.tensor(answer.tolist(), dtype=answer.dtype)).all()


def _value(node: fx.Node, needed: set[fx.Node], given: Mapping[fx.Node, torch.Tensor], root: Any) -> torch.Tensor:
    env: dict[fx.Node, Any] = dict(given)
    for n in node.graph.nodes:
        if n not in needed or n in env:
            continue
        if n.op == "get_attr":
            env[n] = getattr(root, str(n.target))
            continue
        args, kwargs = fx.node.map_arg((n.args, dict(n.kwargs)), lambda m: env[m])
        env[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    return env[node]


def separate_conditions(graph: fx.Graph, state: Collection[fx.Node]) -> tuple[dict[fx.Node, str], list[str]]:
    """(node that must be true of every microbatch -> the user's line, lines that ask computed numbers). state:
    parameters, buffers that the forward writes and the random key. Nodes of the first kind are marked: meta["hoist"].
    """
    changing = set(state)
    found: dict[fx.Node, str] = {}
    later: list[str] = []
    for node in graph.nodes:
        if node.meta.get("random") or any(n in changing for n in node.all_input_nodes):
            changing.add(node)
    for node in graph.nodes:
        if node.target is torch.ops.shardwright.assumed.default:
            _, holds, line = node.args
            if holds in changing:
                later.append(line)
                continue
            found.setdefault(holds, line)
            for one in needed_for([holds]):
                if one.op == "call_function":
                    one.meta["hoist"] = True
    return found, list(dict.fromkeys(later))


_noted: ContextVar[list[tuple[torch.Tensor, str]] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noted() -> Iterator[list[tuple[torch.Tensor, str]]]:
    """Inside, nothing raises: (does it hold, line) of each question is put on a list, and no device is waited for."""
    entries: list[tuple[torch.Tensor, str]] = []
    token = _noted.set(entries)
    try:
        yield entries
    finally:
        _noted.reset(token)


def answered_otherwise(line: str) -> ShardwrightError:
    return ShardwrightError(
        f"a batch answers the question at {line} otherwise than the example batch did",
        means="the program takes the path that the example batch takes, so this step would not be the model's",
        change="the batch, where the line checks for bad data; else plan with an example batch of this kind",
        works="Workload(example_batch=...) whose whole-number entries lead to the same answer",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def _assumed(x: torch.Tensor, holds: torch.Tensor, line: str) -> torch.Tensor:
    entries = _noted.get()
    if entries is not None:
        entries.append((holds, line))
    elif not bool(holds):
        raise answered_otherwise(line)
    return x.clone()


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return grad, None, None


_LIBRARY.define("assumed(Tensor x, Tensor holds, str line) -> Tensor")
_LIBRARY.impl("assumed", _assumed, "CompositeExplicitAutograd")
torch.library.register_fake("shardwright::assumed", lambda x, holds, line: torch.empty_like(x), lib=_LIBRARY)
torch.library.register_autograd("shardwright::assumed", _gradients, setup_context=_setup_context, lib=_LIBRARY)
