"""How long does a whole plan take, and how much memory? By model, by depth, and beside autoparallel.

    python benchmarks/planning.py [--write] [--skip sizes,depths,gaps,reference]

sizes       `shardwright plan --json` of Llama 3 8B, 70B and 405B, each in a process of its own
depths      Llama 3 8B's width with 8 to 126 layers: capture, and everything after it
gaps        of the placement solver, on every preset
reference   meta-pytorch/autoparallel, where it is installed: the sharding alone (all that it decides) of the same
            Hugging Face Llama 3 8B on the same mesh, in a process of its own. It needs a CUDA device for its figures.

--write puts the tables in benchmarks/results/planning.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "planning.md"
# model, cluster, global batch, and the target in seconds
SIZES = (
    ("preset:llama-3-8b", "8x8xH100-80GB", 1024, 15),
    ("preset:llama-3-70b", "32x8xH100-80GB", 1024, 20),
    ("preset:llama-3-405b", "2048x8xH100-80GB", 16384, 60),
)
SEQ_LEN = 8192
DEPTHS = (8, 16, 32, 64, 126)
GAP_CLUSTERS = ("8xH100-80GB", "4x8xH100-80GB")
REFERENCE_MESHES = ((64,), (8, 8))
REFERENCE_LIMIT_S = 900


def plan_in_process(arguments: list[str]) -> tuple[dict[str, Any], float, float]:
    """(the plan, wall seconds, peak resident GiB) of `shardwright plan ... --json`."""
    started = time.perf_counter()
    script = "import resource,sys; from shardwright.cli import main; code = main(sys.argv[1:]); "
    script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wall_s = time.perf_counter() - started
    return json.loads(done.stdout), wall_s, int(done.stderr.split()[-1]) / 2**20


def sizes(out: io.StringIO) -> None:
    row(out, "model", "devices", "plan", "capture s", "solve s", "total s", "wall s", "target s", "peak GiB", "step s")
    row(out, *["---"] * 10)
    for model, hardware, batch, target_s in SIZES:
        options = ["--hardware", hardware, "--global-batch", str(batch), "--seq-len", str(SEQ_LEN)]
        plan, wall_s, peak_gib = plan_in_process([model, *options])
        mesh, took = plan["mesh"], plan["planning_s"]
        layout = " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) + f" zero={plan['zero']}"
        devices = plan["hardware"]["num_devices"]
        row(out, model, f"{devices:,}", layout, *(f"{took[k]:.1f}" for k in ("capture", "solve", "total")),
            f"{wall_s:.1f}", target_s, f"{peak_gib:.2f}", f"{plan['predicted']['step_s']:.2f}")  # fmt: skip


def depths(out: io.StringIO) -> None:
    row(out, "layers", "capture s", "after capture s", "after capture, by 8 layers", "capture, by 8 layers")
    row(out, *["---"] * 5)
    first: dict[str, float] = {}
    for layers in DEPTHS:
        options = ["--hardware", "8x8xH100-80GB", "--global-batch", "1024", "--seq-len", str(SEQ_LEN)]
        forced = ["--force", "tp=8", "--force", "pp=1", "--force", "dp=8"]
        took = plan_in_process(["preset:llama-3-8b", "--layers", str(layers), *options, *forced])[0]["planning_s"]
        after_s = took["total"] - took["capture"]
        first = first or {"capture": took["capture"], "after": after_s}
        row(out, layers, f"{took['capture']:.2f}", f"{after_s:.2f}", f"{after_s / first['after']:.2f}x",
            f"{took['capture'] / first['capture']:.2f}x of {layers / DEPTHS[0]:.2f}x layers")  # fmt: skip


def gaps(out: io.StringIO) -> None:
    from shardwright import api
    from shardwright.errors import ShardwrightError
    from shardwright.profiler.models import list_models

    row(out, "model", "cluster", "plan", "status", "gap", "solver s")
    row(out, *["---"] * 6)
    for name in [model.name for model in list_models()]:
        for cluster in GAP_CLUSTERS:
            try:
                plan = api.plan(f"preset:{name}", cluster, global_batch=256)
            except ShardwrightError as error:
                row(out, name, cluster, error.what[:60], "", "", "")
                continue
            proof = plan.certificate.sharding
            assert proof is not None
            layout = " ".join(f"{axis}={size}" for axis, size in plan.mesh.model_dump().items() if size > 1)
            row(out, name, cluster, layout or "one device", proof.status, f"{proof.gap_fraction:.3%}",
                f"{proof.seconds:.2f}")  # fmt: skip


def reference(out: io.StringIO) -> None:
    try:
        import autoparallel  # noqa: F401
    except ImportError:
        print("autoparallel is not installed.", file=out)
        return
    row(out, "mesh", "autoparallel s", "its peak GiB", "ours s, whole plan", "ours, peak GiB")
    row(out, *["---"] * 5)
    for mesh in REFERENCE_MESHES:
        script = f"import planning; planning.run_reference({mesh!r})"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=REFERENCE_LIMIT_S,
            cwd=Path(__file__).parent,
        )
        wall_s = time.perf_counter() - started
        said = done.stdout.split()[-1] if done.returncode == 0 else ""
        failure = "" if said else f"fails: {done.stderr.strip().splitlines()[-1][:80]}"
        sizes_text = dict(zip(("dp", "tp"), mesh, strict=False))
        forced = [part for axis, size in sizes_text.items() for part in ("--force", f"{axis}={size}")]
        options = ["--hardware", "8x8xH100-80GB", "--global-batch", "64", "--seq-len", "4096"]
        _, own_s, own_gib = plan_in_process(["preset:llama-3-8b", *options, *forced])
        row(out, "x".join(map(str, mesh)), failure or f"{wall_s:.1f}", said, f"{own_s:.1f}", f"{own_gib:.2f}")


def run_reference(mesh_shape: tuple[int, ...]) -> None:
    """Prints the peak resident GiB of autoparallel placing Llama 3 8B: one sequence of 4,096 tokens a rank."""
    import torch
    from autoparallel.api import AutoParallel
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM

    from shardwright.profiler.models import load_workload

    world_size = 1
    for size in mesh_shape:
        world_size *= size
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    mesh = init_device_mesh("cuda", mesh_shape, mesh_dim_names=("dp", "tp")[: len(mesh_shape)])
    config = load_workload("preset:llama-3-8b", global_batch=world_size, seq_len=4096).model.config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    batch = torch.Size((mesh_shape[0], 4096))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    lies = (Shard(0),) + (Replicate(),) * (mesh.ndim - 1)
    with AutoParallel(model, lambda: torch.zeros(batch, dtype=torch.long, device="cuda"), mesh, policy) as auto:
        auto.add_parameter_memory_constraint(low=None, high=None)
        auto.add_input_constraints([lies])
        auto.optimize_placement()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def row(out: io.StringIO, *cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", file=out)
    print(" | ".join(str(cell) for cell in cells), flush=True)


PARTS = {"sizes": sizes, "depths": depths, "gaps": gaps, "reference": reference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--skip", default="", help="parts to leave out, with commas between")
    args = parser.parse_args()
    import torch

    out = io.StringIO()
    print("# Planning time\n", file=out)
    print(
        f"`benchmarks/planning.py` on {datetime.date.today()}: torch {torch.__version__.split('+')[0]}, Python "
        f"{platform.python_version()}, {os.cpu_count()} CPU cores, one thread, sequences of {SEQ_LEN:,} tokens.",
        file=out,
    )
    for name, part in PARTS.items():
        if name not in args.skip.split(","):
            print(f"\n## {name.capitalize()}\n", file=out)
            part(out)
    if args.write:
        RESULTS.write_text(out.getvalue())


if __name__ == "__main__":
    main()
