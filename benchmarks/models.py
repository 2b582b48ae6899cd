"""Which architectures plan, and compute the same numbers in parallel? Writes docs/models.md.

    python benchmarks/models.py --families
    python benchmarks/models.py --zoo path/to/zoo.py [--only llama,bert] [--layouts "tp=4"] [--plan-only]

Every model is tiny and random (benchmarks/model_zoo.py). For each layout the check is that of `shardwright check`:
float64, two steps on four processes (families: two), loss and every gradient against the model as written. Results are
appended to --results, one JSON line a model and layout, so that a sweep can be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models_page
from models_page import FAMILY_LAYOUTS, FAMILY_PROCESSES, LAYOUTS, LIKE, PROCESSES, Layouts

ROOT = Path(__file__).parents[1]
ZOO = Path(__file__).parent / "model_zoo.py"
MEMORY_LIMIT_BYTES = 10 << 30  # of address space, for a trial
TOLERANCE = 1e-9
TIME_LIMIT_S = 300
_last = ""  # model that is captured


class _TooSlow(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: Any) -> None:
        raise _TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def runs_and_exports(name: str) -> str:
    """_trial in a process of its own, since some models are gigantic however small their configuration."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: (_limit_memory(), sender.send(_trial(name))))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(TIME_LIMIT_S) else f"not tried in {TIME_LIMIT_S} s"
    except EOFError:
        return "does not run as written: more memory than there is"
    finally:
        process.kill()
        process.join()


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def _trial(name: str) -> str:
    """'' where the model as written runs forward and backward and torch.export takes it; else why not."""
    import torch

    sys.stdout = io.StringIO()
    try:
        if name.startswith(model_zoo().FAMILY):
            return _family_trial(name)
        model, batch = getattr(model_zoo(), name)()
        if sum(p.numel() for p in model.parameters()) > 60e6:
            return "not tiny at these sizes"
        loss = model(**batch).loss
        loss.backward()
    except (Exception, MemoryError) as error:
        return f"does not run as written: {_first_line(error)}"
    try:
        torch.export.export(model, (), batch, strict=False)
    except Exception as error:
        return f"{models_page.REFUSED}{_first_line(error)}"
    return ""


def _family_trial(name: str) -> str:
    """The training step that its loader makes, with real values in float32."""
    import torch

    from shardwright.profiler.capture import TrainingStep
    from shardwright.profiler.initial_values import materialize
    from shardwright.profiler.models import reload_workload

    with tempfile.TemporaryDirectory() as folder:
        made = materialize(reload_workload(model_zoo().family_spec(name, Path(folder)), precision="fp32"))
    step = TrainingStep(made.model, made.loss)
    step(dict(made.example_batch)).backward()
    try:
        torch.export.export(step, (dict(made.example_batch),), strict=False)
    except Exception as error:
        return f"{models_page.REFUSED}{_first_line(error)}"
    return ""


@functools.cache
def model_zoo() -> Any:
    sys.path.insert(0, str(ZOO.parent))
    try:
        import model_zoo as found
    finally:
        sys.path.pop(0)
    return found


def _raised(trace: str) -> str:
    """The line of a traceback that names the exception; what follows it may be advice."""
    lines = [line for line in trace.strip().splitlines() if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
    return _without_paths((lines or trace.strip().splitlines())[-1])[:250]


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {_without_paths(text)}"[:200]


def _without_paths(text: str) -> str:
    return re.sub(r"(/[\w.+-]+)+/site-packages/", "", text)


def compare_on_ranks(plan: Any, workload: Any, path: str) -> dict[str, Any]:
    """Rank 0's comparison. The ranks are forked from here once the model is captured, and share that."""
    import pickle

    import test_check_matrix
    from distributed import Pool

    from shardwright import api
    from shardwright.profiler.batches import resize_batch

    class Forked(Pool):
        def __init__(self) -> None:
            self.context, self.workers = multiprocessing.get_context("fork"), []

    api.capture(resize_batch(workload, plan.microbatch.size))
    pool = Forked()
    gc.freeze()  # a collection in a rank would walk, and so copy, all that it shares with this process
    gc.disable()  # and what it makes lives until its process ends
    try:
        payload = pickle.dumps((test_check_matrix._compare, (path,), {}))
        return pool.run(plan.mesh.num_devices, payload, TIME_LIMIT_S)[0]
    finally:
        gc.enable()
        gc.unfreeze()
        for worker in pool.workers:
            worker.stop()


def layouts_of(name: str) -> Layouts:
    return FAMILY_LAYOUTS if name.startswith(model_zoo().FAMILY) else LAYOUTS


@contextlib.contextmanager
def captured_once(name: str) -> Iterator[None]:
    """Here too the last model's capture is kept for its next layout."""
    from unittest import mock

    import test_check_matrix

    from shardwright import api

    global _last
    if name != _last:
        test_check_matrix._captured.clear()
        gc.collect()
        _last = name
    with mock.patch.object(api, "capture", test_check_matrix._once(api.capture)):
        yield


def one(name: str, layout: str, plan_only: bool) -> dict[str, Any]:
    """The row of one model under one layout."""
    from distributed import RankFailed

    from shardwright import api, tasks
    from shardwright.errors import ShardwrightError

    started, row = time.perf_counter(), {"model": name, "layout": layout, "measured": models_page.measured()}
    try:
        with time_limit(TIME_LIMIT_S), tempfile.TemporaryDirectory() as folder, captured_once(name):
            if name.startswith(model_zoo().FAMILY):
                spec, processes = model_zoo().family_spec(name, Path(folder)), FAMILY_PROCESSES
            else:
                spec, processes = {"model": f"{ZOO}:{name}", "global_batch": 8, "kind": "factory"}, PROCESSES
            workload = tasks.check_workload(spec)
            planning = time.process_time()
            plan = api.plan(workload, f"{processes}xCPU", force=layouts_of(name)[layout])
            row["planned"], row["split"] = True, plan.predicted.split.get("tp", {})
            row["plan_s"] = round(time.process_time() - planning, 1)
            row["conservative"] = sorted({op.op for op in plan.conservative_ops})
            if plan_only:
                return {**row, "seconds": round(time.perf_counter() - started, 1)}
            path = Path(folder) / "plan.json"
            plan.save(path)
            found = compare_on_ranks(plan, workload, str(path))
        losses = zip(found["losses"], found["reference_losses"], strict=True)
        worst = max(abs(a - b) / max(abs(b), 1e-300) for a, b in losses)
        worst = max(worst, *found["gradients"].values())
        row |= {"ok": bool(worst <= TOLERANCE), "error": worst}
        if not row["ok"]:
            row["why"] = f"differs by {worst:.1e}"
    except _TooSlow:
        row["why"] = f"not done in {TIME_LIMIT_S} s"
    except ShardwrightError as error:
        row["why"] = _without_paths(error.what)[:300]
    except RankFailed as error:
        row["why"] = "a rank failed: " + _raised(next(iter(error.failures.values())))
    except Exception as error:
        row["why"], row["traceback"] = _first_line(error), True
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The latest row of each model and layout."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {(row["model"], row["layout"]): row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="a file with names() and tiny(model_type)")
    parser.add_argument("--only", default="", help="names in the order to run them, with commas between")
    parser.add_argument("--families", action="store_true", help="the models of every field but language, and no others")
    parser.add_argument("--layouts", default="", help="instead of all, with commas between")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--again", action="store_true", help="also what is in the results already, unless it passed")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "models.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "models.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if args.zoo is not None:
        os.environ["SHARDWRIGHT_ZOO"] = str(args.zoo.resolve())
    sys.path[1:1] = [str(ROOT / "tests"), str(Path(__file__).parent)]
    zoo = model_zoo()
    names = [f"causal_{n.replace('-', '__')}" for n in zoo.zoo().names()] if args.zoo else []
    names = [*([] if args.families else [*names, *zoo.OTHERS]), *zoo.FAMILIES]
    only = [n for n in args.only.split(",") if n]
    short = {n: n.removeprefix("causal_").removeprefix(zoo.FAMILY) for n in names}
    if only:  # in the order in which they are asked for
        names = [n for asked in only for n in names if asked in (n, short[n])]
    layouts = [text.strip() for text in args.layouts.split(",") if text.strip()]
    rows = read(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        for name in names:
            for layout in (LIKE, *(layouts or layouts_of(name))):
                known = rows.get((name, layout))
                done = known is not None and (args.plan_only or "ok" in known or "why" in known)
                if done and not (args.again and known is not None and known.get("why") and layout != LIKE):
                    continue
                if layout == LIKE:
                    row = {"model": name, "layout": LIKE, "why": runs_and_exports(name)}
                elif models_page.is_left_out(name, rows):
                    continue
                else:
                    row = one(name, layout, args.plan_only)
                rows[(name, layout)] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(json.dumps(row), file=sys.stderr, flush=True)
    models_page.write(rows, args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
