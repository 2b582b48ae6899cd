"""The ledger's peak of live bytes beside that of the running program, small models on the CPU.

    python benchmarks/memory_prediction.py [--only gpt2] [--layout zero=3] [--detail] [--json PATH] [--write]

Measured by a dispatch mode that shares no code with the ledger (tests/live_bytes.py), over the second step, in
float32: the worst rank. It looks into ops of our own that are written in Python, not into compiled kernels; `allocated`
is what PyTorch's profiler says of the allocator over the third step, with those. Predicted: the plan's own peak of that
rank, without reserve and slack. --write puts the table into benchmarks/results/memory_prediction.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from distributed import run_ranks
from live_bytes import all_tensors, allocated_peak, peak_of

MODELS = {
    "gpt2": ("preset:tiny-gpt2", {"hidden_size": 64}),
    "llama": ("preset:tiny-llama", {"hidden_size": 64}),
    "bert": ("preset:tiny-bert", {"hidden_size": 64}),
    "t5": ("preset:tiny-t5", {}),
    "vit": ("preset:tiny-vit", {"hidden_size": 64}),
    "mixtral": ("preset:tiny-mixtral", {"hidden_size": 64}),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "keep all": (1, {"recompute": "none", "microbatch": 8}),
    "recompute all": (1, {"recompute": "all", "microbatch": 8}),
    "selective": (1, {"recompute": "selective", "microbatch": 8}),
    "pp=2 1f1b": (2, {"pp": 2, "schedule": "1f1b", "microbatch": 4, "recompute": "none"}),
    "zero=3": (2, {"dp": 2, "zero": 3, "microbatch": 8, "recompute": "none"}),
}


def measure(rank: int, spec: str, overrides: dict[str, Any], ranks: int, force: dict[str, Any]) -> dict[str, Any]:
    import torch

    import shardwright
    from shardwright.data import make_batch
    from shardwright.planner.report.timeline import memory_ledgers
    from shardwright.profiler.models import load_workload

    before = all_tensors()  # of rows measured in the same process
    workload = load_workload(spec, global_batch=16, seq_len=32, precision="fp32", overrides=overrides)
    plan = shardwright.plan(workload, f"{ranks}xCPU", force=force, self_test=False)
    program = shardwright.build(plan, workload, self_test=False)
    batch = program.shard_batch(make_batch(workload, 16, seed=1))
    program.step(batch)
    inputs = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    live = peak_of(lambda: program.step(batch), [*before, *inputs])
    allocated = live.begun_bytes + allocated_peak(lambda: program.step(batch))
    ledger = memory_ledgers(plan)[rank if plan.mesh.pp > 1 else 0]
    items = dict(ledger.worst.items)
    predicted = sum(size for kind, size in items.items() if kind != "reserve")
    kinds: Counter[str] = Counter()
    for size, origin in live.at_peak:
        kinds[origin] += size
    return {
        "predicted": predicted,
        "measured": live.peak_bytes,
        "allocated": allocated,
        "begun": live.begun_bytes,
        "op": live.peak_op,
        "items": items,
        "made_by": dict(kinds.most_common(14)),
        "held": program.memory.held(program.optimizer),
    }


def worst_of(name: str, layout: str) -> dict[str, Any]:
    """The rank that holds most."""
    ranks, force = LAYOUTS[layout]
    rows = run_ranks(ranks, measure, *MODELS[name], ranks, force)
    row = max(rows, key=lambda found: found["measured"])
    errors = {"error": row["predicted"] / row["measured"] - 1, "of_allocated": row["predicted"] / row["allocated"] - 1}
    return {"model": name, "layout": layout, **errors, **row}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Predicted and measured memory",
        "",
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, PyTorch "
        f"{importlib.metadata.version('torch')}, by benchmarks/memory_prediction.py, which says what is measured. KiB.",
        "",
        "| model | layout | predicted | live tensors | predicted over | allocated | predicted over |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        sizes = [f"{row[kind] / 1024:.1f}" for kind in ("predicted", "measured", "allocated")]
        errors = [f"{100 * row[kind]:+.1f} %" for kind in ("error", "of_allocated")]
        cells = [row["model"], row["layout"], sizes[0], sizes[1], errors[0], sizes[2], errors[1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--detail", action="store_true", help="what was alive at the peak")
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--write", action="store_true", help="the table into benchmarks/results")
    args = parser.parse_args()
    rows = []
    for name in [args.only] if args.only else MODELS:
        for layout in [args.layout] if args.layout else LAYOUTS:
            try:
                row = worst_of(name, layout)
            except RuntimeError as error:
                print(f"{name:8s} {layout:14s} failed: {str(error).strip().splitlines()[-1][:90]}", flush=True)
                continue
            rows.append(row)
            print(
                f"{name:8s} {layout:14s} predicted {row['predicted'] / 1024:9.1f} KiB  measured "
                f"{row['measured'] / 1024:9.1f} KiB  {100 * row['error']:+6.1f} %  allocated "
                f"{row['allocated'] / 1024:9.1f} KiB  {100 * row['of_allocated']:+6.1f} %  at {row['op']}",
                flush=True,
            )
            if args.detail:
                print("   predicted", {k: v for k, v in row["items"].items() if v})
                print("   held     ", row["held"], "begun", row["begun"])
                print("   made by  ", row["made_by"])
    if args.write:
        (Path(__file__).parent / "results" / "memory_prediction.md").write_text(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
