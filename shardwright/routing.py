"""Counts of a router, read from a file: how unevenly tokens fall on ranks that have a part of the experts each."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from .costmodel.experts import imbalances
from .errors import ShardwrightError

_WORKS = '[[120, 80, 95, 105], [90, 110, 100, 100]], or lines "layer,expert,count"'


def forced_imbalance(path: str) -> str:
    """As `--force expert_imbalance` takes it, of a file that has the tokens that chose each expert of each layer.

    JSON: a list for each layer with experts, of as many counts as it has experts. CSV: layer,expert,count.
    """
    try:
        text = Path(path).read_text()
        counts = _of_json(text) if text.lstrip().startswith("[") else _of_csv(text)
    except OSError as error:
        raise _unreadable(path, str(error.strerror or error)) from error
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if not counts or any(len(layer) < 2 or min(layer) < 0 or sum(layer) == 0 for layer in counts):
        raise _unreadable(path, "each layer needs counts of two experts or more, none below zero, not all zero")
    found = imbalances(counts)
    if not found:
        raise _indivisible(path, [len(layer) for layer in counts])
    return "/".join(f"{ranks}:{factor:.4g}" for ranks, factor in found.items())


def _of_json(text: str) -> list[list[float]]:
    found = json.loads(text)
    if not all(isinstance(layer, list) for layer in found):
        raise ValueError("a list of numbers is needed for each layer")
    if not all(isinstance(n, (int, float)) and not isinstance(n, bool) for layer in found for n in layer):
        raise ValueError("counts are numbers")
    return [[float(n) for n in layer] for layer in found]


def _of_csv(text: str) -> list[list[float]]:
    layers: dict[int, dict[int, float]] = {}
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        if row and not (number == 1 and not row[0].strip().isdigit()):
            if len(row) != 3:
                raise ValueError(f"line {number} has {len(row)} entries, not layer,expert,count")
            experts = layers.setdefault(int(row[0]), {})
            experts[int(row[1])] = experts.get(int(row[1]), 0.0) + float(row[2])
    num_experts = 1 + max((expert for experts in layers.values() for expert in experts), default=-1)
    return [[layers[layer].get(expert, 0.0) for expert in range(num_experts)] for layer in sorted(layers)]


def _indivisible(path: str, num_experts: list[int]) -> ShardwrightError:
    layers: dict[int, int] = {}
    for layer, count in enumerate(num_experts):
        layers.setdefault(count, layer)
    named = ", ".join(f"{count} (layer {layer})" for count, layer in layers.items())
    return ShardwrightError(
        f"the layers of {path} have {named} experts, and no number of ranks divides all of these",
        means="the same ranks hold the experts of every layer, each as many as the others",
        change="--routing FILE",
        works="a file of layers whose numbers of experts share a divisor, such as 8 and 12; "
        "or without --routing, --force expert_imbalance=1.2",
    )


def _unreadable(path: str, why: str) -> ShardwrightError:
    return ShardwrightError(
        f"the counts of {path} cannot be read: {why}",
        means="the file has, for each layer with experts, how many tokens chose each of them",
        change="--routing FILE",
        works=f"a file with {_WORKS}",
    )
