"""What a node of a captured graph is: its value, and the line that it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import fx

from .where import is_ours

_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def emit(graph: fx.Graph, like: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the graph's insertion point, with its value, told to come from where `like` does."""
    new = graph.call_function(op, args, kwargs)
    new.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "random")}
    operands = fx.node.map_arg((args, kwargs), value)
    with value(next(n for n in new.all_input_nodes)).fake_mode:
        new.meta["val"] = op(*operands[0], **operands[1])
    return new


def source_of(node: fx.Node) -> str:
    """'file:line' of the user's code that a node comes of: the innermost frame of the stack that the trace kept."""
    return users_line_in(node.meta.get("stack_trace", ""))


def users_line_in(trace: str) -> str:
    """'file:line' of the innermost frame of a printed stack that is the user's; "" where there is no frame."""
    found = [match.groups() for match in _FRAME.finditer(trace)]
    own = [(file, line) for file, line in found if "/torch/" not in file and not is_ours(Path(file))]
    return ":".join((own or found)[-1]) if found else ""


def needed_for(wanted: Iterable[Any], stop: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
    """The nodes that these are computed with, themselves included; at nodes where stop holds it goes no further, and
    leaves them out. What is no node counts for nothing."""
    found: set[fx.Node] = set()
    stack = [node for node in wanted if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found and not stop(node):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """What an op is called with, by the names of its schema, defaults included; empty where it has none."""
    schema: Any = getattr(node.target, "_schema", None)
    arguments = schema.arguments if schema is not None else []
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**defaults, **dict(zip([a.name for a in arguments], node.args, strict=False)), **node.kwargs}
