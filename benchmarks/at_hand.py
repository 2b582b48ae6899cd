"""Plans made with what `shardwright profile` measured, beside the steps that they take.

    python benchmarks/at_hand.py [--models gpt2,llama,vit] [--processes 1,2,4] [--steps N] [--write]
    python benchmarks/at_hand.py --links [--rates 400,400,100,400] [--model llama] [--steps N] [--write]

The first profiles this CPU with each number of processes, plans, runs the plan, and prints predicted over measured
seconds of a step. The second needs root, ip and tc: it makes a network namespace for each rank, joined by a bridge
whose ports pass so many Mbit/s each way (tbf), profiles that cluster under torchrun, and runs layouts forced one by one
and the planner's choice. It prints the rates that were found, and whether predicted and measured agree on the order.
Both keep their measurements in a temporary folder. Run them on a quiet machine: whatever runs beside counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from parallel_step import MODELS

from shardwright import api
from shardwright.devices import join_torchrun
from shardwright.errors import ShardwrightError
from shardwright.launch import launch
from shardwright.plans.document import Plan
from shardwright.profiler.batches import make_batch
from shardwright.profiler.models import reload_workload

RESULTS = Path(__file__).parent / "results" / "at_hand.md"
WARM_UP = 3
SUBNET = "10.77.0"
HUB = "swhub"
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"dp": 4, "zero": 0},
    {"dp": 4, "zero": 3},
    {"tp": 4},
    {"pp": 4, "microbatch": 1, "schedule": "1f1b"},
    {"pp": 4, "microbatch": 2, "schedule": "gpipe"},
    {"pp": 2, "dp": 2, "microbatch": 1},
    {"pp": 2, "tp": 2, "microbatch": 1},
    {"dp": 2, "tp": 2, "zero": 0},
    {"dp": 2, "tp": 2, "zero": 3},
)


def planned(model: str, hardware: str, force: dict[str, Any] | None = None) -> Plan:
    name, seq_len, settings, batch = MODELS[model]
    length = {} if seq_len is None else {"seq_len": seq_len}
    return api.plan(name, hardware, force=force, global_batch=batch, overrides=settings, precision="float32", **length)


def median_of(steps: Sequence[float]) -> float:
    return statistics.median(steps[WARM_UP:])


# --------------------------------------------------------------------------- processes of this machine


def measure_steps(models: Sequence[str], processes: Sequence[int], num_steps: int, folder: Path) -> Iterator[list[str]]:
    yield ["model", "processes", "plan", "predicted ms", "measured ms", "predicted / measured"]
    for count in processes:
        command = [sys.executable, "-m", "shardwright", "profile", "--hardware", f"{count}xCPU"]
        subprocess.run(command, check=True, capture_output=True)
        for model in models:
            plan = planned(model, f"{count}xCPU")
            path = folder / "plan.json"
            path.write_text(plan.to_json())
            found: list[float] = []

            def keep(event: dict[str, Any], found: list[float] = found) -> None:
                if event["event"] == "step":
                    found.append(event["step_s"])

            launch({"task": "run", "plan": str(path), "steps": num_steps + WARM_UP}, count, keep)
            step_s = median_of(found)
            yield _row(model, count, layout_of(plan), plan.predicted.step_s, step_s)


def layout_of(plan: Plan) -> str:
    sizes = " ".join(f"{axis}={size}" for axis, size in plan.mesh.model_dump().items() if size > 1)
    return f"{sizes or 'one process'} zero={plan.zero} {plan.schedule.name}".strip()


def _row(model: str, what: object, layout: str, predicted_s: float, measured_s: float) -> list[str]:
    numbers = f"{predicted_s * 1e3:.1f}", f"{measured_s * 1e3:.1f}", f"{predicted_s / measured_s:.2f}"
    return [model, str(what), layout, *numbers]


# --------------------------------------------------------------------------- uneven links


def sh(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def namespaces(rates_mbit: Sequence[float]) -> Iterator[list[str]]:
    """Names of network namespaces, one a rank, at SUBNET.1 and so on; the bridge has one of its own."""
    names = [f"sw{k}" for k in range(len(rates_mbit))]
    remove(names)
    try:
        sh("ip", "netns", "add", HUB)
        sh("ip", "-n", HUB, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", HUB, "link", "set", "br0", "up")
        for k, (name, rate) in enumerate(zip(names, rates_mbit, strict=True)):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
            sh("ip", "-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{k}", "netns", HUB)
            sh("ip", "-n", name, "addr", "add", f"{SUBNET}.{k + 1}/24", "dev", "eth0")
            sh("ip", "-n", HUB, "link", "set", f"port{k}", "master", "br0", "up")
            sh("ip", "-n", name, "link", "set", "eth0", "up")
            for place, device in ((name, "eth0"), (HUB, f"port{k}")):
                limit = ["rate", f"{rate}mbit", "burst", "64kb", "latency", "50ms"]
                sh("tc", "-n", place, "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield names
    finally:
        remove(names)


def remove(names: Sequence[str]) -> None:
    for name in (*names, HUB):
        subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun(names: Sequence[str], *arguments: str) -> str:
    """One process in each namespace; what rank 0 prints."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    started = []
    for k, name in enumerate(names):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(len(names)), "--node-rank", str(k), "--nproc-per-node", "1"]
        command += ["--master-addr", f"{SUBNET}.1", "--master-port", "29500", *arguments]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
        )
    outputs = [process.communicate(timeout=600) for process in started]
    for process, (_, errors) in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a rank ended with {process.returncode}:\n{errors[-3000:]}")
    return outputs[0][0]


def worker(path: str, num_steps: int) -> None:
    """A rank of a plan: rank 0 prints the seconds of its steps."""
    plan = Plan.load(path)
    device = join_torchrun(plan)
    workload = reload_workload(plan.workload)
    program = api.build(plan, workload, device=device)
    found = []
    for step in range(num_steps + WARM_UP):
        batch = make_batch(workload, workload.global_batch, seed=step)
        part = program.shard_batch(workload.call.batch_of(batch))
        torch.distributed.barrier()
        started = time.perf_counter()
        program.step(part).item()
        torch.distributed.barrier()
        found.append(time.perf_counter() - started)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()


def measure_layouts(model: str, rates: Sequence[float], num_steps: int, folder: Path, out: list[str]) -> None:
    hardware = folder / "cluster.toml"
    with namespaces(rates) as names:
        printed = torchrun(names, "-m", "shardwright", "profile", "-o", str(hardware), "--json")
        links = json.loads(printed[printed.index("{") :])["links"]
        out += ["| ranks | set Mbit/s | found Mbit/s | found / set |", "| --- | --- | --- | --- |"]
        for link in links:
            a, b = link["hosts"]
            wanted, found = min(rates[a], rates[b]), link["gb_per_s"] * 8e3
            out.append(f"| {a} and {b} | {wanted:g} | {found:.1f} | {found / wanted:.2f} |")
        out += ["", "| layout | predicted ms | measured ms | predicted / measured |", "| --- | --- | --- | --- |"]
        rows: list[tuple[str, float, float]] = []
        for force in (*LAYOUTS, None):
            name = "the planner's choice" if force is None else " ".join(f"{k}={v}" for k, v in force.items())
            try:
                plan = planned(model, str(hardware), force)
            except ShardwrightError as error:
                out.append(f"| {name} | {error.what[:80]} | | |")
                continue
            path = folder / "plan.json"
            path.write_text(plan.to_json())
            steps = json.loads(torchrun(names, __file__, "--worker", str(path), "--steps", str(num_steps)))
            name = f"{name}: {layout_of(plan)}" if force is None else name
            rows.append((name, plan.predicted.step_s, median_of(steps)))
            out.append("| " + " | ".join(_row(*("", "", *rows[-1]))[2:]) + " |")
            print(out[-1], flush=True)
    forced, (_, _, chosen_s) = rows[:-1], rows[-1]
    fastest_s = min(measured for _, _, measured in forced)
    order = correlation([p for _, p, _ in forced], [m for _, _, m in forced])
    out += ["", f"Rank correlation {order:.2f}; the planner's choice takes {chosen_s / fastest_s:.2f} of the fastest."]


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of values without ties."""

    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=lambda k: values[k])
        return [order.index(k) for k in range(len(values))]

    n = len(first)
    apart = sum((a - b) ** 2 for a, b in zip(ranks(first), ranks(second), strict=True))
    return 1 - 6 * apart / (n * (n * n - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gpt2,llama,vit")
    parser.add_argument("--model", default="llama")
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--links", action="store_true")
    parser.add_argument("--rates", default="400,400,100,400")
    parser.add_argument("--worker")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.steps)
        return
    out: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["SHARDWRIGHT_CACHE"] = name
        if options.links:
            if os.geteuid() or not shutil.which("tc"):
                sys.exit("--links needs root, ip and tc")
            rates = [float(rate) for rate in options.rates.split(",")]
            measure_layouts(options.model, rates, options.steps, Path(name), out)
        else:
            processes = [int(count) for count in options.processes.split(",")]
            for index, row in enumerate(measure_steps(options.models.split(","), processes, options.steps, Path(name))):
                out.append("| " + " | ".join(row) + " |")
                if index == 0:
                    out.append("| " + " | ".join(["---"] * len(row)) + " |")
                print(out[-1], flush=True)
    print("\n".join(out))
    if options.write:
        write("links" if options.links else "steps", out)


def write(part: str, lines: list[str]) -> None:
    """Replaces one part of the results."""
    kept = json.loads(RESULTS.with_suffix(".json").read_text()) if RESULTS.with_suffix(".json").exists() else {}
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    kept[part] = {"machine": f"{machine}, load {os.getloadavg()[0]:.1f} at the end", "lines": lines}
    RESULTS.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    text = [
        "# Plans at hand: predicted and measured",
        "",
        "`python benchmarks/at_hand.py --write`, and `--links --write`.",
    ]
    for name, title in (("steps", "Processes of one machine"), ("links", "Uneven links")):
        if name in kept:
            text += ["", f"## {title}", "", kept[name]["machine"], "", *kept[name]["lines"]]
    RESULTS.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
