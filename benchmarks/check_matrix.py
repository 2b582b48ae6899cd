"""Every small model on every layout: does the program compute what the model as written computes?

    python benchmarks/check_matrix.py [--models tiny-gpt2,mlp] [--layouts tp=2,zero=3] [-o results/check_matrix.md]

Each row is one `shardwright check`: float64, two steps with an optimizer step between them, four microbatches a step,
loss and every gradient compared by name. tests/test_check_matrix.py compares the same without starting processes anew.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

MODELS = ("tiny-gpt2", "tiny-llama", "tiny-bert", "tiny-t5", "tiny-vit", "mlp", "tiny-unet")
GLOBAL_BATCH = 16
MICROBATCH = 4  # so that a step has four, as many as the schedules need to show their order
RESULTS = Path(__file__).parent / "results" / "check_matrix.md"


@dataclass(frozen=True)
class Layout:
    """How many local processes, and what is forced on the plan."""

    processes: int
    force: Mapping[str, str]


def _forced(processes: int, **force: object) -> Layout:
    """A tensor axis splits parameters: the batch is what the data axis splits."""
    if force.get("tp", 1) != 1:
        force["prefer"] = "memory"
    return Layout(
        processes, {"global_microbatch": str(MICROBATCH), **{key: str(value) for key, value in force.items()}}
    )


LAYOUTS: dict[str, Layout] = {
    "dp=2 zero=1": _forced(2, pp=1, dp=2, tp=1, zero=1),
    "zero=3": _forced(4, dp=4, zero=3),
    "tp=2": _forced(2, pp=1, dp=1, tp=2),
    "pp=2": _forced(2, pp=2, schedule="1f1b"),
    "pp=2 tp=2": _forced(4, pp=2, tp=2, schedule="1f1b"),
    "pp=2 dp=2 zero=3": _forced(4, pp=2, dp=2, zero=3, schedule="1f1b"),
    "interleaved pp=2": _forced(2, pp=2, schedule="interleaved_1f1b", virtual_stages=2),
    "recompute=all": _forced(2, tp=2, recompute="all"),
    "planner's choice": Layout(4, {}),
}


def spec(model: str) -> dict[str, Any]:
    return {"model": f"preset:{model}", "global_batch": GLOBAL_BATCH}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows, started = [], time.perf_counter()
    for model in arguments.models.split(","):
        for layout in arguments.layouts.split(","):
            rows.append(_row(model, layout))
            print(rows[-1], file=sys.stderr, flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(_page(rows, time.perf_counter() - started))
    return 0 if all("| yes |" in row for row in rows) else 1


def _row(model: str, name: str) -> str:
    from shardwright.checking import check
    from shardwright.errors import ShardwrightError

    layout, started = LAYOUTS[name], time.perf_counter()
    try:
        found = check(spec(model), f"{layout.processes}xCPU", force=layout.force)
    except ShardwrightError as error:
        return f"| {model} | {name} | no | {str(error).splitlines()[0]} | | | |"
    plan = found.plan
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.model_dump().items() if size > 1) or "one process"
    ran = f"{mesh}, zero={plan.zero}, {plan.microbatch.count} x {plan.microbatch.size}"
    errors = f"{found.loss_rel_err:.1e} | {found.max_grad_rel_err:.1e}"
    return (
        f"| {model} | {name} | {'yes' if found.ok else 'no'} | {ran} | {errors} | {time.perf_counter() - started:.0f} |"
    )


def _page(rows: list[str], seconds: float) -> str:
    import torch

    return "\n".join(
        [
            "# Program against single-device model",
            "",
            f"Made by `python benchmarks/check_matrix.py` on {date.today()}: torch {torch.__version__}, Python "
            f"{platform.python_version()}, CPU, {seconds / 60:.0f} minutes. Errors are relative, the worst of two "
            "steps; a gradient's is its largest difference over its largest entry. Equal means 1e-9 or better.",
            "",
            "| model | layout | equal | as run: mesh, ZeRO, microbatches x size | loss | gradient | s |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
