"""Run a plan on local processes, with torchrun's launcher, over the loopback interface only.

Each step prints its loss, tokens/s and memory, predicted beside measured. The weights are drawn from the seed;
the data are random, or the bytes of --text.
"""

from __future__ import annotations

import argparse
import statistics

from ..errors import ExitCode, ShardwrightError
from ..units import format_bytes, format_seconds
from . import _options

NAME = "run"
HELP = "train with a plan on local processes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN.json")
    parser.add_argument("--steps", type=_options.positive, default=10, metavar="N", help="training steps (default: 10)")
    parser.add_argument(
        "--text", metavar="PATH", help="train on this text, its bytes as tokens, instead of random data"
    )
    parser.add_argument(
        "--trace", metavar="PATH", help="write the last step here, predicted beside measured, for Perfetto or Chrome"
    )
    parser.add_argument(
        "--memory-timeline",
        metavar="PATH",
        help="write the bytes of each rank over the last step here, predicted and measured, as .html or .json",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each step, and nothing else")
    _options.add_trust_option(parser)


def execute(args: argparse.Namespace) -> int:
    from pathlib import Path

    from .. import launch

    plan = _options.load_plan(args, args.plan)
    if args.text is not None and not Path(args.text).is_file():
        raise ShardwrightError(f"there is no file {args.text}", change="--text", works="a text file")
    if args.trace is not None:
        if not plan.predicted.stage_s:
            raise ShardwrightError(
                f"{args.plan} has no predicted seconds of its stages, which the trace shows beside the measured ones",
                means="the plan is from an earlier version, or was edited",
                change="make the plan again, or leave --trace out",
                works="shardwright plan MODEL --hardware NAME -o plan.json",
            )
        _options.refuse_unwritable(Path(args.trace), "--trace PATH", "--trace trace.json", "nothing was run")
    if args.memory_timeline is not None:
        from ..memory_timeline import predicted_ledgers

        _options.check_memory_timeline(args.memory_timeline, "nothing was run")
        predicted_ledgers(plan)
    _refuse_other_hardware(plan)
    wants_trace = args.trace is not None or args.memory_timeline is not None
    printer = StepPrinter(plan, as_json=args.json)
    task = {"task": "run", "plan": str(Path(args.plan).resolve()), "steps": args.steps, "trace": wants_trace}
    task["memory"] = args.memory_timeline is not None
    task["trust_model"] = args.trust_model
    if args.text is not None:
        task["text"] = str(Path(args.text).resolve())
    launch.launch(task, plan.mesh.num_devices, printer, debug=args.debug)
    printer.summary()
    if args.trace is not None:
        from ..costmodel.trace import Trace, save_chrome
        from ..planner.report.timeline import predicted_trace

        save_chrome(args.trace, [predicted_trace(plan), Trace.from_json(printer.trace)])
        if not args.json:
            print(f"trace written to {args.trace}; open it in ui.perfetto.dev or chrome://tracing")
    if args.memory_timeline is not None:
        from ..costmodel.trace import Trace
        from ..memory_timeline import write_memory_timeline

        write_memory_timeline(args.memory_timeline, plan, Trace.from_json(printer.trace))
        if not args.json:
            print(f"memory timeline written to {args.memory_timeline}")
    return ExitCode.DONE


def _refuse_other_hardware(plan) -> None:  # type: ignore[no-untyped-def]
    """Before processes are started: does this machine have what the plan needs?"""
    import torch

    count, wanted = torch.cuda.device_count() if torch.cuda.is_available() else 0, plan.mesh.num_devices
    devices = {host.get("device") for host in plan.hardware.get("hosts", [])}
    if devices and devices != {"CPU"} and count < wanted:
        raise ShardwrightError(
            f"the plan is for {wanted} GPUs ({plan.hardware.get('name')}); this machine has {count}",
            means="it cannot run here; its kind of split can be checked on local CPU processes",
            change="the hardware of the plan",
            works="shardwright check PLAN.json, or shardwright plan MODEL --hardware 4xCPU",
            exit_code=ExitCode.PLAN_MISMATCH,
        )


class StepPrinter:
    """Prints each step as it is reported; after the last, medians beside the prediction."""

    def __init__(self, plan, *, as_json: bool) -> None:  # type: ignore[no-untyped-def]
        self.plan, self.as_json = plan, as_json
        self.step_s: list[float] = []
        self.peak_bytes = 0
        self.trace: dict = {"source": "measured", "events": []}

    def __call__(self, event: dict) -> None:
        if event["event"] == "built" and not self.as_json:
            print(f"{self.plan.mesh.num_devices} processes built in {format_seconds(event['seconds'])}", flush=True)
        if event["event"] == "trace":
            self.trace = event["trace"]
        if event["event"] != "step":
            return
        self.step_s.append(event["step_s"])
        self.peak_bytes = max(event["peak_bytes"])
        tokens = self.plan.workload["global_batch"] * (self.plan.workload.get("seq_len") or 1)
        if self.as_json:
            predicted = {"predicted_step_s": self.plan.predicted.step_s, "tokens_per_s": tokens / event["step_s"]}
            _options.print_json({**event, **predicted}, indent=None)
            return
        print(
            f"step {event['step']:>4}  loss {event['loss']:.6f}  {tokens / event['step_s']:>10,.0f} tokens/s  "
            f"{format_seconds(event['step_s']):>9} (predicted {format_seconds(self.plan.predicted.step_s)})  "
            f"{format_bytes(self.peak_bytes):>10} (predicted {format_bytes(max(self.plan.predicted.peak_bytes))})",
            flush=True,
        )

    def median_step_s(self) -> float:
        """The first step, which warms up, left out."""
        return statistics.median(self.step_s[1:] or self.step_s)

    def summary(self) -> None:
        if self.as_json or not self.step_s:
            return
        predicted = self.plan.predicted
        measured_s = self.median_step_s()
        print(
            f"median step {format_seconds(measured_s)}, predicted {format_seconds(predicted.step_s)} "
            f"({predicted.step_s / measured_s:.2f}x of it); worst rank {format_bytes(self.peak_bytes)}, "
            f"predicted {format_bytes(max(predicted.peak_bytes))}"
        )
