"""Which dimension of each entry of a batch counts its samples.

An entry that merely is as long as the batch (class weights, an attention bias, a table) is no sample. So the training
step is traced once with a symbol for each dimension of that length: those that the model ties to each other come out as
one symbol, or as two that size_ties.py finds to be the same; those that it ties to its own sizes as numbers. The
samples are counted by the symbol that most entries have in front; everything else is shared, each microbatch gets it
whole. Where that hangs on what size_ties.py found, which entries that are shared may have too, or on which of equally
many stands first, it is for the user to say. A model that fixes its sizes in the trace is captured at a second size
instead; what that leaves open is for the user to say.

What the user declares (Workload.batch_dims) holds without a look. A model of ours, or of transformers with arguments
whose meaning its documentation fixes, needs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..errors import ShardwrightError
from .batches import batch_fields, resize_batch, resized_dims
from .capture import export_step
from .inputs import example_batch_size
from .size_ties import one_of_each, takes_for_one, tied_sizes
from .workload import Workload

# what transformers calls tensors of one row a sample
_TRANSFORMERS_SAMPLES = {
    "input_ids", "attention_mask", "token_type_ids", "labels", "decoder_input_ids", "decoder_attention_mask",
    "pixel_values", "inputs_embeds", "input_values", "input_features", "start_positions", "end_positions",
}  # fmt: skip


def with_batch_dims(workload: Workload) -> Workload:
    """The workload with batch_dims for every entry. Raises ShardwrightError where a declaration cannot be."""
    tensors = workload.example_batch
    if batch_fields(workload) is not None:
        return dataclasses.replace(workload, batch_dims=resized_dims(workload))
    declared = dict(workload.batch_dims or {})
    _check(declared, tensors, example_batch_size(workload))
    if set(tensors) <= set(declared):
        return workload
    size = example_batch_size(workload)
    open_entries = [name for name, t in tensors.items() if name not in declared and size in t.shape]
    found: dict[str, int | None] = dict.fromkeys((name for name in tensors if name not in declared), None)
    found |= {name: 0 for name in open_entries if tensors[name].shape[0] == size}
    if not _is_plain(workload, open_entries, size):
        found |= _traced(workload, open_entries, declared, size)
    return dataclasses.replace(workload, batch_dims={name: {**found, **declared}[name] for name in tensors})


def _is_plain(workload: Workload, entries: list[str], size: int) -> bool:
    """Where samples stand in front without doubt, or a size of 1 could not tell."""
    if size < 2 or len(workload.example_batch) == 1:
        return True
    documented = type(workload.model).__module__.startswith("transformers.") and not workload.loss
    return documented and set(entries) <= _TRANSFORMERS_SAMPLES


def _traced(
    workload: Workload, entries: list[str], declared: Mapping[str, int | None], size: int
) -> dict[str, int | None]:
    marked = {name: [d for d, s in enumerate(workload.example_batch[name].shape) if s == size] for name in entries}
    marked |= {name: [dim] for name, dim in declared.items() if dim is not None}
    symbols: dict[str, list[str]] = {}
    stands: dict[str, str] = {}
    with contextlib.suppress(ShardwrightError):  # a step that cannot be traced with symbols has none
        symbols, stands = _symbols(workload, marked)
    tied = _renamed(symbols, stands)
    unsure = _undecided(symbols, tied, declared)
    if unsure:
        raise _ambiguous(workload, unsure, size, _BY_TIES)
    symbols = tied
    equals = _equally_many(symbols, declared)
    if equals:
        raise _ambiguous(workload, equals, size, _BY_VOTE)
    dims = _counting(symbols, declared)
    found = {} if dims is None else {name: dims.get(name) for name in entries if name in symbols}
    fixed = [n for n in entries if n in symbols and marked[n][0] == 0 and not symbols[n][0]]
    # sizes that the model itself has fixed tell nothing of the others
    if len(entries) > 1 and (dims is None or (fixed and len(dims) < 2)):
        by_sizes = _by_sizes(workload, entries, declared, size)
        return found if by_sizes is None else by_sizes
    return found


def _by_sizes(
    workload: Workload, entries: list[str], declared: Mapping[str, int | None], size: int
) -> dict[str, int | None] | None:
    """By captures at a second size of the batch: an entry holds samples where the model takes no other length of it
    than of the rest. None where they do not say. Raises ShardwrightError where it takes both, or more than one entry
    could be the odd one."""
    counted = [name for name in entries if workload.example_batch[name].shape[0] == size]
    shared: list[str] = []
    read = _read_at_another_size(workload, counted, declared, size)
    if read is not None:
        counted = [name for name in counted if name in read]  # what nothing reads says nothing
        if len(counted) < 2:
            return None
    else:
        shared = _spared(workload, counted, declared, size)
        if not shared:  # no batch of another size: the capture that follows says where it stops
            return None
    rest = [name for name in counted if name not in shared]
    unsure = shared if len(shared) > 1 else _spared(workload, rest, declared, size)
    if unsure:
        raise _ambiguous(workload, unsure, size)
    return {**dict.fromkeys(rest, 0), **dict.fromkeys(shared)}


def _spared(workload: Workload, names: list[str], declared: Mapping[str, int | None], size: int) -> list[str]:
    """Those that are read, and may keep their length where all others have another."""
    found = []
    for name in names:
        others = [other for other in names if other != name]
        if name in (_read_at_another_size(workload, others, declared, size) or ()):
            found.append(name)
    return found


def _read_at_another_size(
    workload: Workload, names: list[str], declared: Mapping[str, int | None], size: int
) -> set[str] | None:
    """What the step reads at another size, where of the open entries just these are as long; None where it fails, or
    takes two for as long as each other that are not."""
    dims = {**dict.fromkeys(workload.example_batch), **dict.fromkeys(names, 0), **declared}
    if all(dim is None for dim in dims.values()):
        return None
    taken = {s for tensor in workload.example_batch.values() for s in tensor.shape}
    other = next(s for s in range(size + 1, size + len(taken) + 2) if s not in taken)
    try:
        exported = export_step(resize_batch(dataclasses.replace(workload, batch_dims=dims), other))
    except ShardwrightError:
        return None
    if takes_for_one(exported.graph, size, other):
        return None
    return {name for name, node in _placeholders(workload, exported).items() if node.users}


def _placeholders(workload: Workload, exported: Any) -> dict[str, fx.Node]:
    """Of the entries."""
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    given = exported.graph_signature.user_inputs
    return {name: nodes[input_] for name, input_ in zip(workload.example_batch, given, strict=True)}


_BY_SIZES = "the model fixes the size of its batch where it is traced, and takes these at either length"
_BY_TIES = (
    "some of these are as long as each other only by what the model looks up or puts in order (gather, index, "
    "argsort), which what all samples share may be as well"
)

_BY_VOTE = "the model ties neither to the other, and as many entries are as long as one as as the other"


def _ambiguous(workload: Workload, unsure: list[str], size: int, why: str = _BY_SIZES) -> ShardwrightError:
    shapes = ", ".join(f"{name!r} of shape {tuple(workload.example_batch[name].shape)}" for name in unsure)
    return ShardwrightError(
        f"the batch has {size} samples, and whether these hold one row for each is open: {shapes}",
        means=f"what holds samples is cut over microbatches and ranks, the rest goes to each whole; {why}",
        change=", ".join(f"batch_dims[{name!r}]" for name in unsure),
        works=f"batch_dims={ {name: 0 for name in unsure} }, with None for what all samples share",
    )


def _symbols(workload: Workload, marked: Mapping[str, list[int]]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(entry -> what each of its dimensions came out as: a symbol, or "" where it is a number; symbol -> the one that
    stands for all that are tied to it). Entries that nothing reads are left out."""
    exported = export_step(workload, marked)
    found = {}
    for name, node in _placeholders(workload, exported).items():
        if node.users:
            sizes: Any = node.meta["val"].shape
            found[name] = [str(s.node.expr) if isinstance(s, torch.SymInt) and _free(s) else "" for s in sizes]
    of_samples = one_of_each(tied_sizes(exported.graph, of_samples=True))
    same = one_of_each(tied_sizes(exported.graph))
    return _renamed(found, of_samples), same


def _renamed(symbols: Mapping[str, list[str]], stands: Mapping[str, str]) -> dict[str, list[str]]:
    return {name: [stands.get(symbol, symbol) for symbol in row] for name, row in symbols.items()}


def _free(size: torch.SymInt) -> bool:
    return bool(size.node.expr.free_symbols)


def _counting(symbols: Mapping[str, list[str]], declared: Mapping[str, int | None]) -> dict[str, int] | None:
    """Entry -> dimension with a symbol that counts samples: those declared, and the one in front of most other entries.
    One that an entry has twice counts none."""
    counts = _declared_symbols(symbols, declared)
    front = _in_front(symbols, declared)
    if front and not counts & front.keys():
        counts.add(max(front, key=front.__getitem__))
    if not counts:
        return None
    return {
        name: dim for name, row in symbols.items() for dim, symbol in list(enumerate(row))[::-1] if symbol in counts
    }


def _declared_symbols(symbols: Mapping[str, list[str]], declared: Mapping[str, int | None]) -> set[str]:
    return {symbols[n][d] for n, d in declared.items() if d is not None and n in symbols} - {""}


def _in_front(symbols: Mapping[str, list[str]], declared: Mapping[str, int | None]) -> Counter[str]:
    """How many open entries each symbol stands in front of, those left out that an entry has twice."""
    twice = {s for row in symbols.values() for s, count in Counter(row).items() if s and count > 1}
    return Counter(r[0] for n, r in symbols.items() if n not in declared and r and r[0] and r[0] not in twice)


def _undecided(
    plain: Mapping[str, list[str]], tied: Mapping[str, list[str]], declared: Mapping[str, int | None]
) -> list[str]:
    """The open entries that may hold samples where which of them do hangs on ties: with them and without, the symbols
    in front of the most are not one. Without ties among what stands in front, none."""
    before, after = _in_front(plain, declared), _in_front(tied, declared)
    counts = _declared_symbols(tied, declared)
    if len(before) == len(after) or counts & after.keys():
        return []
    row_of = {row[0]: tied[name][0] for name, row in plain.items() if row}
    most = {row_of[symbol] for symbol in _leading(before)} | _leading(after) | counts
    return [n for n, row in tied.items() if n not in declared and row and row[0] in most] if len(most) > 1 else []


def _equally_many(symbols: Mapping[str, list[str]], declared: Mapping[str, int | None]) -> list[str]:
    """The open entries with the symbols that stand in front of the most, where those are several, or no more than are
    declared to have another."""
    front, counts = _in_front(symbols, declared), _declared_symbols(symbols, declared)
    most = _leading(front)
    said = sum(
        bool(counts & set(symbols[name])) for name, dim in declared.items() if dim is not None and name in symbols
    )
    if counts & front.keys() or not most or (len(most) == 1 and max(front.values()) > said):
        return []
    return [name for name, row in symbols.items() if name not in declared and row and row[0] in most]


def _leading(front: Counter[str]) -> set[str]:
    return {symbol for symbol, count in front.items() if count == max(front.values())}


def _check(declared: Mapping[str, int | None], tensors: Mapping[str, torch.Tensor], size: int) -> None:
    for name, dim in declared.items():
        if name not in tensors:
            raise ShardwrightError(
                f"batch_dims names {name!r}; the batch has {', '.join(tensors)}",
                change=f"batch_dims[{name!r}]",
                works="the name of an entry",
            )
        shape = tuple(tensors[name].shape)
        if dim is not None and not (0 <= dim < len(shape) and shape[dim] == size):
            raise ShardwrightError(
                f"batch_dims says that dimension {dim} of {name!r} counts samples; its shape is {shape} and the batch "
                f"has {size} samples",
                means="every entry that holds samples has one for each of the batch",
                change=f"batch_dims[{name!r}]",
                works=f"{{{name!r}: {shape.index(size) if size in shape else None}}}",
            )
