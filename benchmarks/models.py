"""Which architectures plan, and compute the same numbers in parallel? Writes docs/models.md.

    python benchmarks/models.py --zoo path/to/zoo.py [--only llama,bert] [--layouts "tp=4"] [--plan-only]

Every model is tiny and random (benchmarks/model_zoo.py). For each layout the check is that of `shardwright check`:
float64, two steps on four processes, loss and every gradient against the model as written. Results are appended to
--results, one JSON line a model and layout, so that a sweep can be stopped and taken up again.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ZOO = Path(__file__).parent / "model_zoo.py"
LAYOUTS: dict[str, dict[str, str]] = {
    "planner's choice": {},
    "tp=2 dp=2": {"pp": "1", "tp": "2", "dp": "2", "prefer": "memory"},
    "tp=4": {"pp": "1", "tp": "4", "prefer": "memory"},
    "zero=3": {"pp": "1", "dp": "4", "zero": "3"},
}
PROCESSES = 4
MEMORY_LIMIT_BYTES = 10 << 30  # of address space, for a trial
TOLERANCE = 1e-9
TIME_LIMIT_S = 600
LIKE = "the zoo's trial"
_last = ""  # model that this worker compared last


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
        model, batch = _made(name)
        if sum(p.numel() for p in model.parameters()) > 60e6:
            return "not tiny at these sizes"
        loss = model(**batch).loss
        loss.backward()
    except (Exception, MemoryError) as error:
        return f"does not run as written: {_first_line(error)}"
    try:
        torch.export.export(model, (), batch, strict=False)
    except Exception as error:
        return f"torch.export refuses it: {_first_line(error)}"
    return ""


def _made(name: str) -> tuple[Any, dict[str, Any]]:
    sys.path.insert(0, str(ZOO.parent))
    try:
        import model_zoo
    finally:
        sys.path.pop(0)
    return getattr(model_zoo, name)()


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {_without_paths(text)}"[:200]


def _without_paths(text: str) -> str:
    return re.sub(r"(/[\w.+-]+)+/site-packages/", "", text)


def _compare(rank: int, plan: str) -> dict[str, Any]:
    import test_check_matrix

    global _last
    model = json.loads(Path(plan).read_text())["workload"]["model"]
    if model != _last:  # keep one model's captures, not hundreds
        test_check_matrix._captured.clear()
        gc.collect()
        _last = model
    return test_check_matrix._compare(rank, plan)


def one(name: str, layout: str, plan_only: bool) -> dict[str, Any]:
    """The row of one model under one layout."""
    from distributed import RankFailed, run_ranks

    from shardwright import api, tasks
    from shardwright.errors import ShardwrightError

    started, row = time.perf_counter(), {"model": name, "layout": layout}
    try:
        with time_limit(TIME_LIMIT_S), tempfile.TemporaryDirectory() as folder:
            workload = tasks.check_workload({"model": f"{ZOO}:{name}", "global_batch": 8, "kind": "factory"})
            plan = api.plan(workload, f"{PROCESSES}xCPU", force=LAYOUTS[layout])
            row["planned"], row["split"] = True, plan.predicted.split.get("tp", {})
            row["conservative"] = sorted({op.op for op in plan.conservative_ops})
            if plan_only:
                return {**row, "seconds": round(time.perf_counter() - started, 1)}
            path = Path(folder) / "plan.json"
            plan.save(path)
            found = run_ranks(plan.mesh.num_devices, _compare, str(path), timeout_s=TIME_LIMIT_S)[0]
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
        row["why"] = "a rank failed: " + next(iter(error.failures.values())).strip().splitlines()[-1][:250]
    except Exception as error:
        row["why"], row["traceback"] = _first_line(error), True
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The latest row of each model and layout."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    return {(row["model"], row["layout"]): row for row in rows}


def write_page(rows: dict[tuple[str, str], dict[str, Any]], path: Path) -> None:
    names = sorted({name for name, _ in rows})
    groups = {
        "Causal language models": [n for n in names if n.startswith("causal_")],
        "Encoders, encoder-decoders, vision, audio, state spaces": [n for n in names if not n.startswith("causal_")],
    }
    import torch
    import transformers

    out = io.StringIO()
    print("# Models\n", file=out)
    print(
        f"Written by `benchmarks/models.py` on {date.today()}: torch {torch.__version__.split('+')[0]}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}, four gloo processes on {os.cpu_count()} CPU "
        "cores. Every model is a tiny, randomly initialized version of its architecture. A layout passes where loss "
        "and every gradient of two training steps in float64 agree to 1e-9 with the model as written on one process. "
        "Beside a tensor layout stands the share of parameters that it splits.\n",
        file=out,
    )
    for title, members in groups.items():
        counted = [n for n in members if not rows.get((n, LIKE), {}).get("why")]
        print(f"## {title}\n", file=out)
        print(
            f"{len(members)} tried, of which {len(counted)} run as written and are taken by `torch.export`.\n", file=out
        )
        print("| | of those | share |\n| --- | --- | --- |", file=out)
        planned = [n for n in counted if any(rows.get((n, layout), {}).get("planned") for layout in LAYOUTS)]
        print(f"| planned | {len(planned)} | {_share(len(planned), len(counted))} |", file=out)
        for layout in LAYOUTS:
            good = [n for n in counted if rows.get((n, layout), {}).get("ok")]
            print(f"| checked, {layout} | {len(good)} | {_share(len(good), len(counted))} |", file=out)
        print(f"\n| model | {' | '.join(LAYOUTS)} | remarks |\n| --- |{' --- |' * (len(LAYOUTS) + 1)}", file=out)
        for name in members:
            left_out = rows.get((name, LIKE), {}).get("why", "")
            cells = ["" if left_out else _cell(rows.get((name, layout))) for layout in LAYOUTS]
            reasons = Counter(
                rows[(name, layout)]["why"] for layout in LAYOUTS if rows.get((name, layout), {}).get("why")
            )
            remarks = left_out or "; ".join(reasons)
            clean = remarks.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
            print(f"| {name.removeprefix('causal_').replace('__', '-')} | {' | '.join(cells)} | {clean} |", file=out)
        print(file=out)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(out.getvalue())
    temporary.replace(path)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else ""


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row.get("ok") and row.get("split") and "tp" in row["layout"]:
        return f"yes, {row['split']['parameters']:.0%}"
    return "yes" if row.get("ok") else "planned" if row.get("planned") and "why" not in row else "no"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, help="a file with names() and tiny(model_type)")
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
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
    import model_zoo

    names = [f"causal_{n.replace('-', '__')}" for n in model_zoo.zoo().names()] if args.zoo else []
    names += list(model_zoo.OTHERS)
    only = {n for n in args.only.split(",") if n}
    names = [n for n in names if not only or n in only or n.removeprefix("causal_") in only]
    rows = read(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        for name in names:
            for layout in (LIKE, *[text.strip() for text in args.layouts.split(",")]):
                known = rows.get((name, layout))
                done = known is not None and (args.plan_only or "ok" in known or "why" in known)
                if done and not (args.again and known is not None and known.get("why") and layout != LIKE):
                    continue
                if layout == LIKE:
                    row = {"model": name, "layout": LIKE, "why": runs_and_exports(name)}
                elif rows[(name, LIKE)]["why"]:
                    continue
                else:
                    row = one(name, layout, args.plan_only)
                rows[(name, layout)] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(json.dumps(row), file=sys.stderr, flush=True)
    write_page(rows, args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
