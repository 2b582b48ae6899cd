"""Cut the normalized forward graph into segments, and store structurally equal ones once.

A segment is a run of nodes of one block (a child of a repeated module list, found by structure) or of what stands
between blocks. Work that depends on inputs and buffers only, and stands outside the blocks, is gathered into prologue
segments, which every pipeline stage that needs them runs itself (rotary tables, masks, shifted labels).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from .nodes import needed_for, value
from .random_ops import NUMBER

# position of the random op's number among its arguments
RANDOM_INDEX_ARG = {"dropout": 3, "attention": 9, "rand_uniform": 4, "rand_normal": 4, "rand_keep": 4}


@dataclass
class Piece:
    """One run of nodes of the whole graph, before structurally equal ones are merged."""

    nodes: list[fx.Node]
    module_path: str
    prologue: bool = False
    params: list[fx.Node] = field(default_factory=list)
    buffers: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    random_base: int = 0

    @property
    def num_random(self) -> int:
        return sum(1 for n in self.nodes if n.meta.get("random"))

    def random_index(self, node: fx.Node) -> int | None:
        """The number of a node that draws, counted from the piece's first; draws that nothing reads leave gaps."""
        return node.meta[NUMBER] - self.random_base if node.meta.get("random") else None


def module_path(node: fx.Node, root: str) -> str:
    """Fully qualified path of the innermost user module that the node was traced in, without the wrapper's prefix."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    if path == root:
        return ""
    return path[len(root) + 1 :] if path.startswith(root + ".") else path


def find_block(path: str, class_of: Callable[[str], str], children: Callable[[str], list[str]]) -> str | None:
    """The outermost prefix of `path` that is an indexed child with at least one sibling of its own class."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if not part.isdigit():
            continue
        parent, own = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        siblings = [c for c in children(parent) if c != own]
        if any(class_of(s) == class_of(own) for s in siblings):
            return own
    return None


def cut(
    graph: fx.Graph,
    model: torch.nn.Module,
    root: str,
    params: set[fx.Node],
    buffers: set[fx.Node],
    written: Mapping[fx.Node, fx.Node],
    kept: list[fx.Node],
) -> list[Piece]:
    """written: buffers that the forward overwrites, with their new values. kept: nodes whose values must leave their
    segment (loss, model outputs, new values of written buffers)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = _block_of_each(graph, modules, root)
    hoisted = _hoistable(graph, params | written.keys(), blocks)
    pieces = _prologues(graph, hoisted) + _joined(_runs(graph, blocks, hoisted), written)
    _wire(graph, pieces, params, buffers, kept)
    for piece in pieces:
        piece.random_base = min((n.meta[NUMBER] for n in piece.nodes if n.meta.get("random")), default=0)
    return pieces


def _block_of_each(graph: fx.Graph, modules: dict[str, torch.nn.Module], root: str) -> dict[fx.Node, str | None]:
    def class_of(path: str) -> str:
        return type(modules[path]).__name__ if path in modules else ""

    def children(path: str) -> list[str]:
        module = modules.get(path)
        return [f"{path}.{name}" if path else name for name, _ in module.named_children()] if module is not None else []

    cache: dict[str, str | None] = {}
    found: dict[fx.Node, str | None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node, root)
        if path not in cache:
            cache[path] = find_block(path, class_of, children)
        found[node] = cache[path]
    if not any(found.values()):  # no repeated list: the model's own top-level parts are the blocks
        depth_root = _only_child_root(modules)
        for node in found:
            path = module_path(node, root)
            rest = path[len(depth_root) :].lstrip(".") if path.startswith(depth_root) else path
            found[node] = (depth_root + "." if depth_root else "") + rest.split(".")[0] if rest else None
    return found


def _only_child_root(modules: dict[str, torch.nn.Module]) -> str:
    path = ""
    while True:
        names = [name for name, _ in modules[path].named_children()]
        if len(names) != 1:
            return path
        path = f"{path}.{names[0]}" if path else names[0]


def _hoistable(graph: fx.Graph, state: set[fx.Node], blocks: dict[fx.Node, str | None]) -> set[fx.Node]:
    """Nodes outside the blocks that depend on user inputs, unchanging buffers and constants only, and draw no random
    number. state: parameters and buffers that the forward overwrites."""
    tainted: set[fx.Node] = set()
    hoisted: set[fx.Node] = set()
    for node in graph.nodes:
        if node in state or node.name == "random_key":
            tainted.add(node)
        elif node.op == "call_function":
            if any(n in tainted for n in node.all_input_nodes) or node.meta.get("random"):
                tainted.add(node)
            elif (blocks[node] is None or node.meta.get("hoist")) and all(
                n in hoisted or n.op != "call_function" for n in node.all_input_nodes
            ):
                hoisted.add(node)
    return hoisted


def _prologues(graph: fx.Graph, hoisted: set[fx.Node]) -> list[Piece]:
    """Weakly connected groups of hoisted nodes, so that a stage runs only those it needs."""
    parent: dict[fx.Node, fx.Node] = {n: n for n in hoisted}

    def find(n: fx.Node) -> fx.Node:
        while parent[n] is not n:
            parent[n] = parent[parent[n]]
            n = parent[n]
        return n

    for node in hoisted:
        for other in node.all_input_nodes:
            if other in hoisted:
                parent[find(node)] = find(other)
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in hoisted:
            groups[find(node)].append(node)
    return [Piece(nodes, "", prologue=True) for nodes in groups.values()]


def _runs(graph: fx.Graph, blocks: dict[fx.Node, str | None], hoisted: set[fx.Node]) -> list[Piece]:
    pieces: list[Piece] = []
    current: str | None = "\0"
    for node in graph.nodes:
        if node.op != "call_function" or node in hoisted:
            continue
        block = blocks[node]
        if block != current or not pieces:
            pieces.append(Piece([], block or ""))
            current = block
        pieces[-1].nodes.append(node)
    return pieces


def _joined(pieces: list[Piece], written: Mapping[fx.Node, fx.Node]) -> list[Piece]:
    """All that reads a buffer before its last write, and the writes, in one piece: the next microbatch must find what
    this one left, wherever it begins. So a norm that is called twice in a forward keeps its calls together."""
    home = {node: i for i, piece in enumerate(pieces) for node in piece.nodes}
    last = list(range(len(pieces)))  # of each piece, the last one that it is joined with
    for buffer, new in written.items():
        behind = needed_for([new])
        between, stack = {new}, [buffer]  # versions of the buffer, and who reads the first
        while stack:
            node = stack.pop()
            found = [n for n in node.users if n not in between and (node is buffer or n in behind)]
            between.update(found)
            stack.extend(n for n in found if n in behind)
        places = [home[n] for n in between if n in home]
        if places:
            last[min(places)] = max(last[min(places)], max(places))
    joined: list[Piece] = []
    end = -1
    for i, piece in enumerate(pieces):
        if i <= end:
            joined[-1].nodes.extend(piece.nodes)
        else:
            joined.append(piece)
        end = max(end, last[i])
    return joined


def _wire(
    graph: fx.Graph, pieces: list[Piece], params: set[fx.Node], buffers: set[fx.Node], kept: list[fx.Node]
) -> None:
    """Find what each piece reads and what it must give to others."""
    home = {node: i for i, piece in enumerate(pieces) for node in piece.nodes}
    order = {n: i for i, n in enumerate(graph.nodes)}
    keep = set(kept)
    for i, piece in enumerate(pieces):
        seen: dict[fx.Node, None] = {}
        for node in piece.nodes:
            for source in node.all_input_nodes:
                if home.get(source) != i:
                    seen[source] = None
        for source in seen:
            if source in params:
                piece.params.append(source)
            elif source in buffers:
                piece.buffers.append(source)
            elif source.name != "random_key" and source.op != "get_attr":
                piece.inputs.append(source)
        piece.outputs = [
            node for node in piece.nodes if node in keep or any(home.get(user, i) != i for user in node.users)
        ]
        piece.outputs.sort(key=lambda n: order[n])


def structure_hash(piece: Piece, facts: Callable[[fx.Node], str], extra: str = "") -> str:
    """Equal for two pieces exactly when the same graph, over values of the same kinds, stands in both.

    facts(node): what must agree of an operand from outside (shape, dtype, trainable or not).
    """
    number: dict[fx.Node, str] = {}
    lines: list[str] = [extra, str(piece.prologue)]
    for kind, nodes in (("p", piece.params), ("b", piece.buffers), ("i", piece.inputs)):
        for i, node in enumerate(nodes):
            number[node] = f"{kind}{i}"
            lines.append(f"{kind}{i}:{facts(node)}")
    for i, node in enumerate(piece.nodes):
        number[node] = f"n{i}"
        args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: _Name(number.get(n, n.name)))
        lines.append(f"n{i}={node.target}{args!r}{_kind(node)}{piece.random_index(node)}")
    lines.append(",".join(number[n] for n in piece.outputs))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _kind(node: fx.Node) -> str:
    val = value(node)
    if isinstance(val, torch.Tensor):
        return f"{tuple(val.shape)}{val.dtype}"
    return str(type(val))
