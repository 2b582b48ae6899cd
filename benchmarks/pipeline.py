"""Simulated and measured makespans of schedules: gloo processes whose stages sleep instead of computing.

    python benchmarks/pipeline.py [--ranks 8] [--microbatches 16] [--times 20,20,20] [-o results/pipeline.md]

times: milliseconds of F, I and W of one rank's share. Each schedule runs in the same processes, on the same stages, as
PyTorch's own classes of the same kind; a figure is the median of several steps, from a barrier to the last rank's end.
Sleeping takes no core, so two cores serve eight ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules as torch_schedules

from shardwright.costmodel.stage_times import Hop, StageTimes
from shardwright.runtime._torch import StageBase
from shardwright.runtime.pipeline import PipelineEngine, Work
from shardwright.runtime.stage import Variant
from shardwright.runtime.trace import Recorder
from shardwright.runtime.wiring import StageWiring, Wiring
from shardwright.schedules import SCHEDULES, PipelineSchedule, build_schedule, loop_placement, v_placement
from shardwright.schedules.problem import PipelineProblem
from shardwright.schedules.synthesis.synthesize import synthesize

RESULTS = Path(__file__).parent / "results" / "pipeline.md"
NAMES = ("1f1b", "interleaved_1f1b", "zb_v", "v_half", "auto")
TORCH = {
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "zb_v": "ScheduleZBVZeroBubble",
    "dualpipe_v": "ScheduleDualPipeV",
}
STEPS = 5
VALUE = ((64,), torch.float32)  # what travels: as good as nothing, so that times are those of the stages


class Sleeper:
    """What the engine asks of a stage, with sleep for its work."""

    def __init__(self, wiring: Wiring, stage: StageWiring, times_s: Sequence[float]) -> None:
        self.wiring, self.stage, self.times_s = wiring, stage, times_s
        self.number = wiring.number(stage)
        self.is_last = stage.index == wiring.num_stages - 1

    def forward(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        time.sleep(self.times_s[0])
        return {name: torch.zeros(*VALUE[0]) for name in self.stage.sends or (self.wiring.loss,)}

    def backward(self, *_: Any, defer: bool = False) -> dict[str, torch.Tensor]:
        time.sleep(self.times_s[1] + (0.0 if defer else self.times_s[2]))
        return {name: torch.zeros(*VALUE[0]) for name in self.stage.grad_sends}

    def backward_weight(self, microbatch: int) -> None:
        time.sleep(self.times_s[2])


class TorchSleeper(StageBase):
    """The same for PyTorch's own schedule classes."""

    def __init__(self, stage: int, num_stages: int, times_s: Sequence[float]) -> None:
        super().__init__(torch.nn.Module(), stage, num_stages, torch.device("cpu"), dist.group.WORLD)
        self.times_s, self.has_backward = times_s, True

    _prepare_forward_infra = _prepare_backward_infra = _create_grad_recv_info = lambda self, *_: ()

    def _transfer(self, operation: Any, stage: int) -> list[dist.P2POp]:
        if not 0 <= stage < self.num_stages:
            return []
        return [dist.P2POp(operation, torch.zeros(*VALUE[0]), self.stage_index_to_group_rank[stage])]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._transfer(dist.irecv, self.stage_index - 1)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._transfer(dist.irecv, self.stage_index + 1)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._transfer(dist.isend, self.stage_index + 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._transfer(dist.isend, self.stage_index - 1)

    def forward_one_chunk(self, *_: Any, **__: Any) -> None:
        time.sleep(self.times_s[0])

    def backward_one_chunk(self, *_: Any, full_backward: bool = True, **__: Any) -> None:
        time.sleep(self.times_s[1] + (self.times_s[2] if full_backward else 0.0))

    def backward_weight_one_chunk(self, *_: Any, **__: Any) -> None:
        time.sleep(self.times_s[2])

    def set_local_fwd_input(self, *_: Any) -> None:
        pass

    set_local_bwd_input = get_local_bwd_output = perform_reduce_grad = set_local_fwd_input


def _our_step(schedule: PipelineSchedule, times_s: Sequence[float], rank: int) -> Any:
    last, directions = schedule.num_stages - 1, enumerate(schedule.placements)
    stages = tuple(
        StageWiring(
            s, direction, place[s], (), _name(s - 1, last), _name(s, last), _name(s, last), _name(s - 1, last), ()
        )
        for direction, place in directions
        for s in range(last + 1)
    )
    wiring = Wiring(stages, last + 1, frozenset(), frozenset(), "loss", ())
    share = [seconds / schedule.num_chunks for seconds in times_s]
    runners: Any = [Sleeper(wiring, stage, share) for stage in wiring.stages_of(rank)]
    recorder = Recorder(rank, torch.device("cpu"))
    engine = PipelineEngine(runners, torch.device("cpu"), dist.group.WORLD, recorder)
    metas = {name: VALUE for s in range(last + 1) for name in _name(s, last)}
    count = schedule.num_microbatches
    variants = {runner.number: [Variant([], metas, metas, {})] * count for runner in runners}

    def step() -> None:
        recorder.begin()
        engine.run(schedule, Work([{}] * count, variants, lambda k: torch.zeros(()), True))

    return step


def _name(stage: int, last: int) -> tuple[str, ...]:
    """Of the value between a stage and the next."""
    return (f"value{stage}",) if 0 <= stage < last else ()


def _torch_step(name: str, schedule: PipelineSchedule, times_s: Sequence[float], rank: int) -> Any:
    share = [seconds / schedule.num_chunks for seconds in times_s]
    stages = [TorchSleeper(stage, schedule.num_stages, share) for stage in schedule.stages_of_rank(rank)]
    made: Any = getattr(torch_schedules, TORCH[name])
    executor = made(stages[0] if schedule.num_chunks == 1 else stages, schedule.num_microbatches, scale_grads=False)
    executor._initialize_stage = executor._initialize_stages = lambda *_, **__: None
    nothing: Any = ([()] * schedule.num_microbatches, [{}] * schedule.num_microbatches)
    return lambda: executor._step_microbatches(*nothing)


def _seconds(ways: Sequence[Any]) -> list[float]:
    """For each way of a step, the median of the last rank's times. The ways take turns: the machine's other load meets
    all of them."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(STEPS + 1):
        for step, seconds in zip(ways, found, strict=True):
            dist.barrier()
            started = time.perf_counter()
            step()
            longest = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            seconds.append(float(longest))
    return [statistics.median(seconds[1:]) for seconds in found]


def _rank(rank: int, size: int, path: str, jobs: Sequence[tuple[str, PipelineSchedule]], times_s: Sequence[float],
          results: Any) -> None:  # fmt: skip
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    for name, schedule in jobs:
        ways = [_our_step(schedule, times_s, rank)]
        if name in TORCH:
            ways.append(_torch_step(name, schedule, times_s, rank))
        ours_s, *theirs_s = _seconds(ways)
        if rank == 0:
            results.send((name, ours_s, theirs_s[0] if theirs_s else None))
    dist.destroy_process_group()


def simulated(schedule: PipelineSchedule, times_s: Sequence[float]) -> float:
    stage = StageTimes(*(seconds / schedule.num_chunks for seconds in times_s))
    return schedule.simulate([stage] * schedule.num_stages, with_memory=False).makespan_s


def _schedule(name: str, p: int, m: int, times_s: Sequence[float]) -> PipelineSchedule:
    if name != "auto":
        return build_schedule(name, p, m, SCHEDULES[name].chunks[0])
    stage = StageTimes(*(seconds / 2 for seconds in times_s), activation_bytes=1)
    places = (loop_placement(p, 2), v_placement(p, 2))
    hops = (Hop(),) * (2 * p - 1)
    found = synthesize([PipelineProblem(m, place, (stage,) * (2 * p), hops, (float("inf"),) * p) for place in places])
    assert found is not None
    return found.schedule


def measure(
    jobs: Sequence[tuple[str, PipelineSchedule]], times_s: Sequence[float]
) -> list[tuple[str, float, float | None]]:
    size = jobs[0][1].num_ranks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shardwright.runtime.pipeline"])
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, os.path.join(folder, "store"), jobs, times_s, send)
        processes = [context.Process(target=_rank, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        found = [receive.recv() for _ in jobs]
        for process in processes:
            process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--times", default="20,20,20", help="milliseconds")
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    times_s = [float(text) / 1e3 for text in asked.times.split(",")]
    jobs = [(name, _schedule(name, asked.ranks, asked.microbatches, times_s)) for name in asked.names.split(",")]
    rows = ["| schedule | simulated ms | measured ms | over | PyTorch's own, ms |", "| --- | --- | --- | --- | --- |"]
    for (name, ours_s, theirs_s), (_, schedule) in zip(measure(jobs, times_s), jobs, strict=True):
        expected_s = simulated(schedule, times_s)
        theirs = f"{theirs_s * 1e3:.0f}" if theirs_s else ""
        over = f"{100 * (ours_s / expected_s - 1):+.1f} %" if expected_s else ""
        rows.append(f"| {name} | {expected_s * 1e3:.0f} | {ours_s * 1e3:.0f} | {over} | {theirs} |")
    print("\n".join(rows))
    if asked.output:
        title = f"{asked.ranks} ranks, {asked.microbatches} microbatches, F, I, W of {asked.times} ms"
        made = f"Made by `python benchmarks/pipeline.py` on {date.today()}: torch {torch.__version__}, Python " \
               f"{platform.python_version()}, {os.cpu_count()} cores. {title}."  # fmt: skip
        asked.output.write_text("\n".join(["# Schedules, simulated and measured", "", made, "", *rows, ""]))


if __name__ == "__main__":
    main()
