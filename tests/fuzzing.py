"""What people and machines do to command lines, plans and hardware files: mutations drawn from a seed."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

from fuzzing_options import drawn_line

NUMBERS = [
    "0",
    "-1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e309",
    "99999999999999999999",
    "1" * 400,
    "0x10",
    "²",
    "\uff11",
    "1_000",
    " 8",
    "+2",
    "8 ",
    "1e3",
    "9223372036854775808",
]
WORDS = [
    "",
    " ",
    ".",
    "..",
    "/",
    "//",
    "~",
    "-",
    "--",
    "\x00",
    "é",
    "💥",
    "a" * 5000,
    "None",
    "null",
    "{}",
    "[]",
    "%s",
    "$HOME",
    "*",
    "=",
    "==",
    "a=b=c",
    ",",
    ":",
    "::",
    "x:y",
    "os:getcwd",
    "no.such.module:f",
    "/proc/version",
    "preset:",
    "hf:",
    "hf:/",
    "preset:tiny-gpt2:x",
    "plan.json",
    "a.toml",
    "'",
    '"',
    "\n",
    "\\",
]
HARDWARE = [
    "4xCPU",
    "1xCPU",
    "0xCPU",
    "x",
    "4x",
    "xCPU",
    "4xcpu",
    "4x4xCPU",
    "2x8xH100-80GB",
    "8xH100-90GB",
    "8xH1000",
    "+",
    "4xCPU+",
    "4xCPU+4xH100",
    "99999999999999999999xCPU",
    "1000000x8xH100",
    "-4xCPU",
    "4xCPU-",
    "localhost",
    "8xA100-40GB-40GB",
    "\uff11xCPU",
]
FORCES = [
    "pp=2",
    "tp=2",
    "dp=2",
    "pp=0",
    "pp=-1",
    "pp=3",
    "pp=1e9",
    "zero=4",
    "zero=3",
    "zero=-1",
    "microbatch=3",
    "microbatch=0",
    "schedule=zb_v",
    "schedule=",
    "schedule=auto",
    "virtual_stages=0",
    "virtual_stages=99",
    "recompute=some",
    "recompute=all",
    "offload=auto",
    "cuts=1,2",
    "cuts=",
    "cuts=9,9,9",
    "cp=2",
    "ep=2",
    "chunks=0",
    "pp",
    "=2",
    "PP=2",
    "zero_extent=3",
    "zero_extent=parameters:2",
    "layers.*=colwise",
    "*=S(9)",
    "*=S(-1)",
    "*=R",
    "(=R",
    "x=P",
    "transformer.h.*.mlp.c_fc.weight=S(0)",
]
_TINY = ["preset:tiny-gpt2", "--hardware", "4xCPU", "--global-batch", "8"]
_BASES = [
    ["plan", *_TINY, "--layers", "2", "--seq-len", "8"],
    ["plan", *_TINY, "--layers", "1", "--json"],
    ["plan", *_TINY, "--memory-limit", "600MiB", "--time-limit", "5", "--top", "3", "--layers", "1"],
    [
        "plan",
        *_TINY,
        "--override",
        "hidden_size=16",
        "--override",
        "num_heads=2",
        "--dtype",
        "fp32",
        "--strict",
        "--layers",
        "1",
    ],
    ["plan", "PLAN"],
    ["plan", "PLAN", "--json"],
    ["diff", "PLAN", "PLAN"],
    ["diff", "PLAN", "PLAN", "--json"],
    ["explain", "PLAN"],
    ["explain", "PLAN", "--op", "mlp*", "--all"],
    ["explain", "PLAN", "--segment", "segment1", "--json"],
    ["hardware"],
    ["hardware", "2x8xH100-80GB"],
    ["hardware", "TOML"],
    ["models"],
    ["models", "--json"],
    ["doctor", "--json"],
    ["schedule", "--ranks", "2", "--microbatches", "3", "--time-limit", "0.2"],
    ["schedule", "--ranks", "2", "--microbatches", "2", "--name", "1f1b", "--gantt"],
    [
        "schedule",
        "--ranks",
        "3",
        "--microbatches",
        "4",
        "--memory",
        "2",
        "--recompute",
        "--offload",
        "0.5",
        "--times",
        "1,2,1",
        "--transfer",
        "0.1",
        "--stage-extra",
        "1,1",
        "--time-limit",
        "0.2",
        "--json",
    ],
    ["schedule", "--ranks", "2", "--microbatches", "2", "--placement", "v", "--chunks", "2", "--time-limit", "0.2"],
]


def command_line(generator: random.Random, plan: str, toml: str) -> list[str]:
    """A command line that somebody could have meant, with one to three faults in it. Half are drawn from the parser's
    options, every third of them without a fault."""
    drawn = generator.random() < 0.5
    words = drawn_line(generator) if drawn else generator.choice(_BASES)
    line = [{"PLAN": plan, "TOML": toml}.get(word, word) for word in words]
    for _ in range(0 if drawn and generator.random() < 0.3 else generator.randint(1, 3)):
        kind = generator.choice(
            ["value", "value", "value", "drop", "double", "swap", "word", "force", "hardware", "number"]
        )
        at = generator.randrange(len(line))
        if kind == "value":
            line[at] = generator.choice([*WORDS, *NUMBERS])
        elif kind == "drop" and len(line) > 1:
            del line[at]
        elif kind == "double":
            line.insert(at, line[at])
        elif kind == "swap":
            other = generator.randrange(len(line))
            line[at], line[other] = line[other], line[at]
        elif kind == "word":
            line.insert(at + 1, generator.choice(WORDS))
        elif kind == "force" and line[0] in ("plan", "explain"):
            line += ["--force" if line[0] == "plan" else "--why-not", generator.choice(FORCES)]
        elif kind == "hardware" and "--hardware" in line[:-1]:
            line[line.index("--hardware") + 1] = generator.choice(HARDWARE)
        elif kind == "number":
            places = [i for i, word in enumerate(line) if word.replace(".", "").isdigit()]
            if places:
                line[generator.choice(places)] = generator.choice(NUMBERS)
    return line


def mutated(document: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """The document with one to three values elsewhere than they were."""
    document = copy.deepcopy(document)
    for _ in range(generator.randint(1, 3)):
        parent, key = _place(document, generator)
        _change(parent, key, generator)
    return document


def _place(document: Any, generator: random.Random) -> tuple[Any, Any]:
    parent, key = document, generator.choice(list(document))
    while isinstance(parent[key], (dict, list)) and parent[key] and generator.random() < 0.8:
        parent = parent[key]
        key = generator.choice(list(parent) if isinstance(parent, dict) else list(range(len(parent))))
    return parent, key


_VALUES = [
    None,
    True,
    0,
    -1,
    1,
    2,
    3,
    7,
    10**30,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "R",
    "S(7)",
    "S(-1)",
    "P->P",
    "all",
    "no/such:thing",
    "canary:factory",
    "\x00",
    [],
    {},
    [[]],
    ["R"],
    {"a": 1},
    "1f1b",
    "chimera",
    "x" * 3000,
]


def _change(parent: Any, key: Any, generator: random.Random) -> None:
    value, kind = (
        parent[key],
        generator.choice(["value", "value", "remove", "repeat", "reverse", "empty", "scale", "key"]),
    )
    if kind == "value":
        parent[key] = generator.choice(_VALUES)
    elif kind == "remove":
        del parent[key]
    elif kind == "repeat" and isinstance(value, list):
        parent[key] = value * 2
    elif kind == "reverse" and isinstance(value, list):
        parent[key] = value[::-1]
    elif kind == "empty" and isinstance(value, (list, dict, str)):
        parent[key] = type(value)()
    elif kind == "scale" and isinstance(value, (int, float)):
        parent[key] = value * generator.choice([-1, 0, 2, 0.5, 1e30])
    elif kind == "key" and isinstance(parent, dict):
        parent[generator.choice(["", "extra", "pp", "\x00"])] = parent.pop(key)


def text_of(document: Any) -> str:
    return json.dumps(document)


# fmt: off
_TOML_VALUES = ["1", "0", "-3", "2.5", "1e-9", "inf", "nan", "9" * 30, "true", "[]", "[0, 0]", "[true, false]",
                "{}", "{ a = 1 }", '""', '"x"', '"InfiniBand-HDR"', '"4xL40S"', "2026-03-01", "07:32:00", "[[1], [2]]"]
# fmt: on


def mutated_text(text: str, generator: random.Random) -> str:
    """A text file with lines and characters lost, doubled, swapped or exchanged for others."""
    for _ in range(generator.randint(1, 3)):
        kind = generator.choice(["character", "cut", "line", "double", "number", "word", "value", "value"])
        at = generator.randrange(max(1, len(text)))
        lines = text.split("\n")
        row = generator.randrange(len(lines))
        if kind == "character":
            text = text[:at] + generator.choice('[]{}=",.#\x00é\n 09-') + text[at + 1 :]
        elif kind == "cut":
            text = text[:at]
        elif kind == "value":  # another type, mostly
            places = [match.span(1) for match in re.finditer(r"= *([^{,}\n]+)", text)]
            if places:
                start, end = generator.choice(places)
                text = text[:start] + generator.choice(_TOML_VALUES) + text[end:]
        elif kind in ("line", "double"):
            text = "\n".join([*lines[:row], *([lines[row]] * 2 if kind == "double" else []), *lines[row + 1 :]])
        else:
            words = text.split(" ")
            places = [
                i for i, w in enumerate(words) if (w.strip("\n,}]").replace(".", "").isdigit()) == (kind == "number")
            ]
            if places:
                choices = (
                    [*NUMBERS, '"x"', "[]", "true", "{}"] if kind == "number" else [*WORDS, "-1", "[1, 2]", '"8xH100"']
                )
                words[generator.choice(places)] = generator.choice(choices)
                text = " ".join(words)
    return text
