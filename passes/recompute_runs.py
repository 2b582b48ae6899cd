"""Run by run recomputation of a joint graph: as checkpointing a model layer by layer does, for graphs without layers.

The forward's ops, in order, are cut into runs where the fewest bytes pass from one to the next. Of a run that is
recomputed only what passes its end is kept, so that its backward makes one run's results again at a time (Chen et
al., "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174). PyTorch's partitioner does the rest, by the
marks that torch.utils.checkpoint leaves on nodes.
"""

from __future__ import annotations

from bisect import bisect_left

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from .live_bytes import storages

MAX_RUNS = 64
LEAST_OPS = 4  # of a run


def mark_runs(joint: fx.Graph, num_outputs: int, share: float, num_runs: int) -> None:
    """In place: the first runs are recomputed, so many of all as share says."""
    forward = _forward_nodes(joint, num_outputs)
    place = {node: index for index, node in enumerate(forward)}
    passing = _passing_bytes(forward, place)
    cuts = _cuts(passing, min(num_runs, MAX_RUNS, len(forward) // LEAST_OPS))
    again = cuts[: max(1, round(share * (len(cuts) + 1)))]
    last = again[-1] if len(again) <= len(cuts) and round(share * (len(cuts) + 1)) <= len(cuts) else len(forward)
    for index, node in enumerate(forward):
        if index >= last:
            break
        run = bisect_left(cuts, index + 1)
        ends = [place[user] for user in node.users if user in place]
        crosses = any(bisect_left(cuts, end + 1) != run for end in ends)
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE if crosses else CheckpointPolicy.PREFER_RECOMPUTE
        node.meta["ac_graph_id"] = run


def _forward_nodes(joint: fx.Graph, num_outputs: int) -> list[fx.Node]:
    """What the forward's results are made of, in order."""
    output = next(node for node in reversed(joint.nodes) if node.op == "output")
    results = list(output.args[0])  # type: ignore[arg-type]
    stack = [node for node in results[:num_outputs] if isinstance(node, fx.Node)]
    found: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return [node for node in joint.nodes if node in found and node.op not in ("placeholder", "get_attr")]


def _passing_bytes(forward: list[fx.Node], place: dict[fx.Node, int]) -> list[int]:
    """[k] -> bytes made before op k that an op from k on reads."""
    change = [0] * (len(forward) + 1)
    for index, node in enumerate(forward):
        last = max((place[user] for user in node.users if user in place), default=index)
        if last > index:
            size = sum(storages(node).values())
            change[index + 1] += size
            change[last + 1] -= size
    passing, total = [], 0
    for amount in change:
        total += amount
        passing.append(total)
    return passing


def _cuts(passing: list[int], num_runs: int) -> list[int]:
    """Where the least passes, near to each of the places that divide the ops evenly."""
    count = len(passing) - 1
    cuts: list[int] = []
    for run in range(1, num_runs):
        middle, reach = count * run / num_runs, count / num_runs / 2
        window = range(max(1, round(middle - reach)), min(count, round(middle + reach)))
        if window:
            cuts.append(min(window, key=lambda k: (passing[k], abs(k - middle))))
    return sorted(set(cuts))
