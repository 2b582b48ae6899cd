"""Command lines drawn from the parser's own options, so that an option is tried as soon as there is one."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from shardwright.cli import make_parser
from shardwright.profiler.model_kinds import KINDS

# A value that could be meant, by how the option names it. PLAN and TOML stand for files that are there.
_VALUES: dict[str, Sequence[str]] = {
    "N": ("1", "2", "3", "4", "8", "12"),
    "SECONDS": ("0.05", "1", "3"),
    "SIZE": ("600MiB", "2GiB", "1B", "1TiB"),
    "KIND": tuple(KINDS),
    "PATH": ("out.json", "missing/out.json", ".", ""),
    "PLAN": ("PLAN",),
    "PLAN.json": ("PLAN",),
    "FIRST": ("PLAN",),
    "SECOND": ("PLAN",),
    "PATTERN": ("*", "*mlp*", "aten.mm.*", "transformer.h.*", "nothing.*", "["),
    "MODEL": ("preset:tiny-gpt2", "preset:tiny-gpt2", "preset:tiny-llama", "PLAN", "own:factory"),
    "F,I,W": ("1,1,1", "1,1.4,0.6", "0,0,1", "1,1"),
    "T": ("0", "0.1", "5"),
    "A,B": ("0,0", "0.15,0.4", "1"),
    "M": ("1", "2", "0.5", "100"),
    "P": ("auto", "loop", "v", "0,1,1,0", "0,0"),
}
# The same, where the name of the option says more.
_OF_OPTION: dict[str, Sequence[str]] = {
    "--hardware": ("4xCPU", "1xCPU", "2xCPU", "2x8xH100-80GB", "8xA100-40GB", "TOML"),
    "--dtype": ("bf16", "fp16", "fp32", "fp64", "float32", "int8"),
    "--state-dtype": ("fp32", "bf16", "fp64", "fp16"),
    "--optimizer": ("AdamW", "SGD", "Adagrad", "LBFGS", "Muon", "Adam"),
    "--force": ("pp=2", "tp=2", "dp=4", "zero=3", "microbatch=1", "schedule=1f1b", "recompute=all", "cp=2"),
    "--why-not": ("pp=1", "tp=4", "zero=0", "schedule=gpipe", "transformer.h.*.mlp.c_fc=rowwise"),
    "--override": ("hidden_size=16", "num_heads=2", "vocab_size=50", "num_layers=1", "nothing=1", "num_heads=x"),
    "--segment": ("segment1", "segment2", "prologue0", "x"),
    "--name": ("auto", "1f1b", "zb-v", "gpipe", "interleaved_1f1b"),
    "name": ("4xCPU", "2x8xH100-80GB", "TOML", "local"),
}
_SHRINKS = {
    "profile": ["--ops", "sum"],
    "plan": ["--layers", "1", "--seq-len", "8"],
    "check": ["--layers", "1", "--seq-len", "4"],
}


def subcommands() -> dict[str, argparse.ArgumentParser]:
    actions = make_parser()._actions
    return dict(next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices)


def drawn_line(generator: random.Random) -> list[str]:
    """A command with what it needs, and up to four options that it has; values are mostly such as could be meant."""
    parsers = subcommands()
    heavy = {"run", "check"}  # they start processes
    name = generator.choices(list(parsers), [0.15 if n in heavy else 1.0 for n in parsers])[0]
    actions = [action for action in parsers[name]._actions if action.dest != "help"]
    needed = [action for action in actions if action.required]
    options = [action for action in actions if not action.required]
    line = [name, *_SHRINKS.get(name, [])]
    for action in [*needed, *generator.sample(options, min(len(options), generator.randint(0, 4)))]:
        line += _words(action, generator)
    if name == "plan" and "--hardware" not in line:
        line += ["--hardware", "4xCPU"]
    if name == "plan" and "--global-batch" not in line:
        line += ["--global-batch", "8"]
    if name == "schedule" and "--time-limit" not in line:
        line += ["--time-limit", "0.2"]
    return line


def _words(action: argparse.Action, generator: random.Random) -> list[str]:
    flag = [generator.choice(action.option_strings)] if action.option_strings else []
    if action.nargs == 0:
        return flag
    return [*flag, generator.choice(values_of(action))]


def values_of(action: argparse.Action) -> Sequence[str]:
    """Any number where nothing else is known of an option."""
    for key in (*action.option_strings, action.dest):
        if key in _OF_OPTION:
            return _OF_OPTION[key]
    if action.choices:
        return [str(choice) for choice in action.choices]
    return _VALUES.get(str(action.metavar), _VALUES["N"])
