"""Options that several subcommands share, and how they become a Workload and a hardware description."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ShardwrightError
from ..units import parse_bytes
from ._stdout import write_json

if TYPE_CHECKING:
    from ..api import Progress
    from ..plans.document import Plan
    from ..profiler.workload import Workload

DTYPES = ("bfloat16", "float16", "float32", "float64")
MAX_COUNT = 1 << 40
MAX_SECONDS = 10_000_000  # four months; a clock takes no infinite time
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def add_workload_options(parser: argparse.ArgumentParser, *, batch_required: bool) -> None:
    group = parser.add_argument_group("model and training job")
    group.add_argument("--global-batch", type=positive, required=batch_required, metavar="N", help="sequences per step")
    group.add_argument("--seq-len", type=positive, metavar="N", help="tokens per sequence (default: the model's own)")
    group.add_argument(
        "--dtype", type=_dtype, metavar="NAME", help="compute dtype: bf16, fp16, fp32, fp64 (default: bf16)"
    )
    group.add_argument(
        "--state-dtype",
        type=_dtype,
        metavar="NAME",
        help="dtype of the optimizer's copy and state, and of summed gradients (default: fp32 beside bf16 and fp16)",
    )
    group.add_argument(
        "--optimizer", default=None, metavar="NAME", help="a torch.optim class, such as AdamW (default) or SGD"
    )
    group.add_argument(
        "--kind", metavar="KIND", help="how an hf: model is trained, where its configuration leaves it open"
    )
    group.add_argument(
        "--layers", type=positive, metavar="N", help="build the model with N layers instead of its own number"
    )
    group.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one key of the model's configuration (repeatable)",
    )


def add_force_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="force a choice (repeatable): pp, dp, tp, zero, zero_extent, schedule, virtual_stages, microbatch "
        "(sequences on each data rank), global_microbatch, recompute, offload, optimizer_state, cuts, or PATTERN=FORM: "
        "'layers.*.mlp.up_proj=colwise'",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = add_search_options(parser)
    group.add_argument("--strict", action="store_true", help="exit 5 where an op could only be planned conservatively")
    add_self_test_option(group)


def add_search_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("search")
    add_force_option(group)
    group.add_argument("--time-limit", type=positive_seconds, metavar="SECONDS", help="stop searching after this long")
    group.add_argument("--memory-limit", type=_bytes, metavar="SIZE", help="memory of each device, such as 600MiB")
    return group


def add_self_test_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--no-self-test",
        dest="self_test",
        action="store_false",
        help="do not compare the captured graph of your own module with the module as written",
    )


def add_trust_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--trust-model",
        action="store_true",
        help="import the Python that the plan names, though this user did not make the plan here",
    )


def load_plan(args: argparse.Namespace, path: str) -> Plan:
    """A plan whose model is about to be built. Says what of the user's own Python that imports, or refuses it."""
    from .. import trust
    from ..plans.document import Plan

    plan = Plan.load(path)
    trust.require(plan, args.trust_model)
    if named := trust.imports(plan):
        print(f"importing {named}, which the plan names", file=sys.stderr)
    return plan


def parse_assignments(pairs: Sequence[str], option: str) -> dict[str, str]:
    """['pp=2', 'tp=2'] -> {'pp': '2', 'tp': '2'}; a key given twice with different values is a mistake."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise ShardwrightError(
                f"{option} {pair}: expected KEY=VALUE", change=option, works=f"{option} {key or 'pp'}={value or '2'}"
            )
        if values.get(key, value) != value:
            raise ShardwrightError(
                f"{option} {key} is given twice: {values[key]} and {value}",
                means="only one of them can hold",
                change=option,
                works=f"{option} {key}={value}",
            )
        values[key] = value
    return values


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Values are read as JSON where they are JSON (4, true, [1, 2]), else as text."""
    return {key: _json_or_text(value) for key, value in parse_assignments(pairs, "--override").items()}


def workload_from_args(args: argparse.Namespace) -> Workload:
    import torch

    from ..profiler.models import load_workload, with_precision

    overrides = parse_overrides(args.override)
    if args.layers is not None:
        overrides["num_layers"] = args.layers
    options: dict[str, Any] = {"global_batch": args.global_batch, "seq_len": args.seq_len, "overrides": overrides}
    if args.dtype is not None:
        options["precision"] = args.dtype
    if args.kind is not None:
        options["kind"] = args.kind
    if args.optimizer is not None:
        options["optimizer"] = args.optimizer
    workload = load_workload(args.model, **options)
    if args.state_dtype is None:
        return workload
    dtype = getattr(torch, args.state_dtype)
    return with_precision(workload, replace(workload.precision, master=dtype, grad_reduce=dtype))


@contextmanager
def progress_line(enabled: bool = True) -> Iterator[Progress]:
    """A one-line spinner on stderr where that is a terminal; nothing where it is not."""
    if not enabled or not sys.stderr.isatty():
        yield lambda message: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield lambda message: status.update(message)


def refuse_unwritable(path: Path, option: str, works: str, means: str) -> None:
    """Found out before the work rather than after it."""
    folder = path.parent
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe
        return
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        reason = "it is a folder" if path.is_dir() else f"{folder} is missing or this user may not write there"
        raise ShardwrightError(f"cannot write {path}: {reason}", means=means, change=option, works=works)


def check_memory_timeline(path: str, means: str) -> None:
    """Before the work rather than after it."""
    from ..memory_timeline import check_suffix

    check_suffix(path)
    refuse_unwritable(Path(path), "--memory-timeline PATH", "--memory-timeline memory.html", means)


def print_json(document: Any, indent: int | None = 1) -> None:
    """indent: None for one line."""
    write_json(document if isinstance(document, str) else json.dumps(document, indent=indent))


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def positive(text: str) -> int:
    """At most MAX_COUNT: what is counted here is sequences, tokens, layers, ranks and steps."""
    value = int(text)
    if not 0 < value <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a number from 1 to {MAX_COUNT:,}")
    return value


def positives(text: str) -> list[int]:
    """'1,2,4'"""
    return [positive(part) for part in text.split(",") if part.strip()]


def positive_seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a number of seconds from 0 to {MAX_SECONDS:,}")
    return value


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _dtype(text: str) -> str:
    name = _SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join((*_SHORT_DTYPES, *DTYPES))}")
    return name
