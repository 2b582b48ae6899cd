"""Pipeline schedules in real time on processes whose stages sleep instead of computing, beside torch's own classes.

    python benchmarks/pipeline_sleep.py [--ranks 8] [--microbatches 16] [--unit 0.1] [--repeats 3] [--write]

One gloo process for each pipeline rank, so two cores do for eight of them. A rank's share of the model sleeps F, I and
W times --unit (--times 1,1,1), each of its chunks for its part of that, and sends a small tensor. Ours run in the
program's own engine (runtime/pipeline.py); torch's Schedule classes run the same stages through autograd, in turn with
ours. Compared: the makespan that the simulator predicts, and the measured one, of the slowest rank, median of the
repeats.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

RESULTS = Path(__file__).parent / "results" / "pipeline_sleep.md"
WIDTH = 16  # numbers in a sent tensor
OURS = {"1f1b": 1, "interleaved_1f1b": 2, "zb_v": 2, "v_half": 2}  # name -> chunks on a rank
PEERS = {"1f1b": "Schedule1F1B", "interleaved_1f1b": "ScheduleInterleaved1F1B", "zb_v": "ScheduleZBVZeroBubble"}
ALMOST = 1.05
LEAST_GAIN = 0.15
Seconds = tuple[float, float, float]


@dataclass
class _Wiring:
    stages: Sequence[Any]
    loss: str = "loss"


class SleepingRunner:
    """What runtime.stage.StageRunner is to the engine."""

    def __init__(self, number: int, wiring: _Wiring, seconds: Seconds) -> None:
        self.number, self.wiring, self.stage = number, wiring, wiring.stages[number]
        self.is_last = number == len(wiring.stages) - 1
        self.forward_s, self.input_s, self.weight_s = seconds
        self.value = torch.zeros(WIDTH)

    def forward(self, microbatch: int, *_: Any, training: bool = True) -> dict[str, torch.Tensor]:
        time.sleep(self.forward_s)
        return {name: self.value for name in self.stage.sends or (self.wiring.loss,)}

    def backward(self, microbatch: int, *_: Any, defer: bool = False) -> dict[str, torch.Tensor]:
        time.sleep(self.input_s + (0.0 if defer else self.weight_s))
        return {name: self.value for name in self.stage.grad_sends}

    def backward_weight(self, microbatch: int) -> None:
        time.sleep(self.weight_s)


def our_contestant(schedule: Any, seconds: Seconds) -> Callable[[], None]:
    from shardwright.runtime.pipeline import PipelineEngine, Work
    from shardwright.runtime.stage import Variant
    from shardwright.runtime.trace import Recorder
    from shardwright.runtime.wiring import StageWiring

    last = schedule.num_stages - 1
    values = [(f"value{stage}",) for stage in range(last)]
    stages = [
        StageWiring(
            index=s,
            direction=0,
            rank=schedule.stage_rank[s],
            instances=(),
            receives=values[s - 1] if s else (),
            sends=values[s] if s < last else (),
            grad_receives=values[s] if s < last else (),
            grad_sends=values[s - 1] if s else (),
            frees=(),
        )
        for s in range(schedule.num_stages)
    ]
    wiring, device = _Wiring(stages), torch.device("cpu")
    runners: list[Any] = [
        SleepingRunner(stage.index, wiring, seconds) for stage in stages if stage.rank == dist.get_rank()
    ]
    recorder = Recorder(dist.get_rank(), device)
    engine = PipelineEngine(runners, device, dist.group.WORLD, recorder)
    metas = {name: ((WIDTH,), torch.float32) for row in values for name in row}
    count = schedule.num_microbatches
    variants = {runner.number: [Variant([], metas, metas, {})] * count for runner in runners}

    def step() -> None:
        recorder.begin()
        work = Work([{}] * count, variants, loss_grad=lambda microbatch: torch.ones(()), training=True)
        engine.run(schedule, work)

    return step


class _Sleep(torch.autograd.Function):
    """Sleeps in both directions; with a weight of its own in the graph, so that torch can run I and W apart."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward_s: float, backward_s: float) -> torch.Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.backward_s)
        return grad.contiguous(), None, None


class SleepingModule(nn.Module):
    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forward_s, input_s, weight_s = self.seconds
        return _Sleep.apply(x, forward_s, input_s) + _Sleep.apply(self.weight, 0.0, weight_s)


def torch_contestant(kind: str, stage_rank: Sequence[int], count: int, seconds: Seconds) -> Callable[[], None]:
    from torch.distributed import pipelining

    stages = [
        pipelining.PipelineStage(SleepingModule(seconds), s, len(stage_rank), torch.device("cpu"))
        for s, rank in enumerate(stage_rank)
        if rank == dist.get_rank()
    ]
    make: Any = getattr(pipelining, kind)
    single = kind == "Schedule1F1B"
    schedule = make(stages[0] if single else stages, count, loss_fn=lambda out, target: out.sum(), scale_grads=False)
    batch, last = torch.zeros(count, WIDTH), len(stage_rank) - 1

    def step() -> None:
        inputs = [batch] if dist.get_rank() == stage_rank[0] else []
        losses: list[torch.Tensor] = []
        keywords = {"target": batch, "losses": losses} if dist.get_rank() == stage_rank[last] else {}
        schedule.step(*inputs, **keywords)

    return step


def schedules(ranks: int, count: int, times: Seconds) -> dict[str, Any]:
    """Ours by name, each with its number of chunks; auto: synthesized, two chunks a rank, 1F1B's memory."""
    from shardwright.planner.schedules import build_schedule, loop_placement
    from shardwright.planner.schedules.placements import placed
    from shardwright.planner.schedules.problem import problem_of_shares
    from shardwright.planner.schedules.synthesis import synthesize

    found = {name: build_schedule(name, ranks, count, chunks) for name, chunks in OURS.items()}
    problem = problem_of_shares(count, loop_placement(ranks, 2), ranks, times, memory_limit=ranks)
    best = synthesize(placed(problem))
    assert best is not None
    return found | {"auto": best.schedule}


def _worker(rank: int, options: argparse.Namespace, orders: Mapping[str, Any], folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    contestants: dict[str, Callable[[], None]] = {}
    for name, order in orders.items():
        seconds = _chunk_seconds(options, order)
        contestants[name] = our_contestant(order, seconds)
        if name in PEERS:
            peer = PEERS[name]
            contestants[f"torch {peer}"] = torch_contestant(peer, order.stage_rank, options.microbatches, seconds)
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(options.repeats + 1):
        for name, step in contestants.items():
            dist.barrier()
            began = time.perf_counter()
            step()
            mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            if repeat:
                measured[name].append(mine.item())
    if rank == 0:
        results.put(measured)
    dist.barrier()
    dist.destroy_process_group()


def _chunk_seconds(options: argparse.Namespace, order: Any) -> Seconds:
    forward, of_input, of_weight = (part * options.unit / order.num_chunks for part in options.times)
    return forward, of_input, of_weight


def run(options: argparse.Namespace) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(simulated makespans, measured ones), in seconds."""
    from shardwright.costmodel.simulator import StageTimes

    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    orders = schedules(options.ranks, options.microbatches, options.times)
    simulated = {
        name: order.simulate([StageTimes(*_chunk_seconds(options, order))] * order.num_stages).makespan_s
        for name, order in orders.items()
    }
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (options, orders, folder, results), nprocs=options.ranks)
    return simulated, results.get()


def table(simulated: dict[str, float], measured: dict[str, list[float]]) -> list[str]:
    median = {name: statistics.median(row) for name, row in measured.items()}
    lines = [
        "| schedule | simulated | measured | measured / simulated | torch's class | ours / torch's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, seconds in simulated.items():
        peer_s = median.get(f"torch {PEERS.get(name)}")
        beside = f"{peer_s:.3f} s | {median[name] / peer_s:.3f}" if peer_s else " | "
        lines.append(f"| {name} | {seconds:.3f} s | {median[name]:.3f} s | {median[name] / seconds:.3f} | {beside} |")
    gain = 1 - median["zb_v"] / median["1f1b"]
    lines += ["", f"ZB-V takes {gain:.1%} less than 1F1B (at least {LEAST_GAIN:.0%} is wanted)."]
    late = [name for name, seconds in simulated.items() if median[name] > ALMOST * seconds]
    lines.append(f"Further than {ALMOST - 1:.0%} from the simulator: {', '.join(late) or 'none'}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--unit", type=float, default=0.1, help="seconds")
    parser.add_argument("--times", type=lambda text: tuple(map(float, text.split(","))), default=(1.0, 1.0, 1.0))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = table(*run(options))
    print("\n".join(lines))
    if options.write:
        head = [
            "# Pipeline schedules with sleeping stages",
            "",
            f"Made by `python benchmarks/pipeline_sleep.py` on {datetime.date.today()}: torch {torch.__version__}, "
            f"{platform.machine()}, {os.cpu_count()} cores, {options.ranks} gloo processes, {options.microbatches} "
            f"microbatches, F, I, W = {', '.join(f'{t:g}' for t in options.times)} times {options.unit:g} s a rank, "
            f"median of {options.repeats}.",
            "",
        ]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
