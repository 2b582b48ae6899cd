"""Can the layouts that experts chose be forced and planned, and is the free plan no slower?

    python benchmarks/recipes.py --data DIR [--write] [--only TEXT] [--limit-s 240] [--hours H]

DIR holds CSV files of recipes: recipe, gpus, hw_precision, tp, pp, vpp, cp, ep, gbs, mbs, seq, recompute. Every bf16
recipe that trains all parameters, names its degrees and trains a model of recipe_models.py is planned twice on the same
captured graph: with the recipe's layout forced, and free. What a recipe leaves to its defaults is said in DEFAULTS.

--only TEXT        recipes whose name contains it
--write            results are kept in benchmarks/results/recipes.jsonl, one line a layout, and recipes.md is made of
                   them; those kept are not planned again
--limit-s, --hours of one search; of the whole run
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from recipe_models import MODELS, model_of

from shardwright.api import Captured, captured_for
from shardwright.costmodel.model import CostModel
from shardwright.devices import cluster_for_this_job
from shardwright.errors import ShardwrightError
from shardwright.jobs import job_of
from shardwright.planner.search.result import SearchResult
from shardwright.planner.search.search import search
from shardwright.planner.sharding.sharder import Sharder
from shardwright.profiler.cluster import Cluster
from shardwright.profiler.models import load_workload

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "recipes.jsonl"
TABLE = ROOT / "benchmarks" / "results" / "recipes.md"
# GPU of a recipe's name -> (the catalog's name, GPUs that share a fast link)
HARDWARE = {"h100": ("H100-80GB", 8), "b200": ("B200-SXM-180GB", 8), "gb200": ("GB200-NVL72-186GB", 64)}
DEFAULTS = {"gbs": 512, "mbs": 1, "seq": 4096}
TIE = 1.01  # of the step: closer than the search tells plans apart


@dataclass(frozen=True)
class Recipe:
    """One layout. dp: what tp, pp and cp leave of the GPUs. mbs: sequences of a microbatch on each data rank."""

    name: str
    model: str
    hardware: str
    gpus: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    gbs: int
    mbs: int
    seq: int
    assumed: tuple[str, ...]

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def layout(self) -> str:
        sizes = {"pp": self.pp, "dp": self.dp, "ep": self.ep, "cp": self.cp, "tp": self.tp, "v": self.vpp}
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one GPU"

    @property
    def force(self) -> dict[str, str]:
        found = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "ep": self.ep, "tp": self.tp, "microbatch": self.mbs}
        if self.vpp > 1:
            return {**_texts(found), "schedule": "interleaved_1f1b", "virtual_stages": str(self.vpp)}
        return {**_texts(found), **({"schedule": "1f1b"} if self.pp > 1 else {})}

    @property
    def key(self) -> str:
        """Recipes with the same are one layout."""
        return f"{self.model} {self.hardware} {self.layout} gbs{self.gbs} mbs{self.mbs} seq{self.seq}"


@dataclass
class Result:
    """Predicted seconds of a step with the recipe's layout and with the free plan; why one is missing."""

    key: str
    name: str
    model: str
    hardware: str
    layout: str
    batch: str
    forced_s: float | None = None
    free_s: float | None = None
    free_layout: str = ""
    gap: float | None = None
    error: str = ""
    free_error: str = ""
    search_s: float = 0.0
    assumed: list[str] = field(default_factory=list)


def _texts(values: Mapping[str, int]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}


def _number(text: str, default: int) -> tuple[int, bool]:
    """(its value, or the default; whether it was said)."""
    text = text.strip().rstrip(".").replace("SEQUENCE_LENGTH_", "")
    if text.endswith("K") and text[:-1].isdigit():
        return int(text[:-1]) * 1024, True
    return (int(text), True) if text.isdigit() else (default, False)


def read(folder: Path) -> Iterator[tuple[str, Recipe | str]]:
    """(recipe, what it asks for or why it is left out)."""
    for path in sorted(folder.glob("*.csv")):
        for row in csv.DictReader(path.open()):
            yield row["recipe"], _read_row(row)


def _read_row(row: Mapping[str, str]) -> Recipe | str:
    gpu, _, precision = row["hw_precision"].partition("_")
    if not precision.startswith("bf16"):
        return "not bf16"
    if not all(row[name].isdigit() for name in ("gpus", "tp", "pp")):
        return "degrees are not literal"
    if "peft" in row["recipe"] or "lora" in row["recipe"]:
        return "trains adapters"
    model = model_of(row["recipe"])
    if model is None:
        return "the model is not in recipe_models.py"
    if gpu not in HARDWARE:
        return f"no figures of {gpu.upper()}"
    name, per_host = HARDWARE[gpu]
    gpus, sizes = int(row["gpus"]), {key: _number(row[key] or "", 1)[0] for key in ("tp", "pp", "vpp", "cp", "ep")}
    if gpus % (sizes["tp"] * sizes["pp"] * sizes["cp"]):
        return "the degrees do not divide the GPUs"
    numbers = {key: _number(row[key] or "", default) for key, default in DEFAULTS.items()}
    hosts = max(1, gpus // per_host)
    if gpus > per_host and gpus % per_host:
        return f"{gpus} GPUs are no whole number of hosts"
    return Recipe(
        row["recipe"],
        model,
        f"{hosts}x{min(gpus, per_host)}x{name}",
        gpus,
        **sizes,
        **{key: value for key, (value, _) in numbers.items()},
        assumed=tuple(key for key, (_, said) in numbers.items() if not said),
    )


def _capture(model: str, seq: int, cluster: Cluster) -> Captured:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(MODELS[model]))
        return captured_for(
            load_workload(f"hf:{path}", global_batch=8, seq_len=seq, precision="bfloat16"), CostModel(cluster)
        )


def _search(
    captured: Captured, cluster: Cluster, recipe: Recipe, force: dict[str, str], limit_s: float
) -> SearchResult:
    workload, cost_model = replace(captured.workload, global_batch=recipe.gbs), CostModel(cluster)
    sharder = Sharder(captured.graph, cost_model, job=job_of(workload, recipe.gbs, force))
    return search(captured.graph, cost_model, workload, sharder, force=force, time_limit_s=limit_s)


def _layout(result: SearchResult) -> str:
    shape = result.mesh.shape
    sizes = {axis: size for axis, size in zip(shape.axes, shape.sizes, strict=True) if size > 1}
    chunks = result.schedule.virtual_stages
    text = " ".join(f"{axis}{size}" for axis, size in sizes.items()) or "one GPU"
    return f"{text}{f' v{chunks}' if chunks > 1 else ''} zero{result.zero} mbs{result.microbatch.size}"


def plan_both(captured: Captured, recipe: Recipe, limit_s: float) -> Result:
    cluster = cluster_for_this_job(recipe.hardware)
    batch = f"{recipe.gbs} x {recipe.seq:,}"
    found = Result(recipe.key, recipe.name, recipe.model, recipe.hardware, recipe.layout, batch)
    found.assumed = list(recipe.assumed)
    started = time.perf_counter()
    try:
        found.forced_s = _search(captured, cluster, recipe, recipe.force, limit_s).predicted.step_s
    except ShardwrightError as error:
        found.error = error.what
    try:
        free = _search(captured, cluster, recipe, {}, limit_s)
        found.free_s, found.free_layout, found.gap = free.predicted.step_s, _layout(free), free.certificate.gap_fraction
    except ShardwrightError as error:
        found.free_error = error.what
    found.search_s = time.perf_counter() - started
    return found


def run(recipes: list[Recipe], limit_s: float, ends: float, kept: dict[str, Result], write: bool) -> None:
    """Recipes of one model and length after another, so that each is captured once."""
    rows = {recipe.key: recipe for recipe in recipes if recipe.key not in kept}
    last: Any = None
    captured: Captured | None = None
    for recipe in sorted(rows.values(), key=lambda r: (r.model, r.seq, r.hardware)):
        if time.monotonic() > ends:
            break
        gpu = recipe.hardware.rsplit("x", 1)[1]
        try:
            if (recipe.model, recipe.seq, gpu) != last:
                captured, last = _capture(recipe.model, recipe.seq, cluster_for_this_job(recipe.hardware)), None
            last = recipe.model, recipe.seq, gpu
            assert captured is not None
            result = plan_both(captured, recipe, limit_s)
        except ShardwrightError as error:
            result = Result(recipe.key, recipe.name, recipe.model, recipe.hardware, recipe.layout, "", error=error.what)
        kept[recipe.key] = result
        print(_line(result), flush=True)
        if write:
            with KEPT.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def _line(result: Result) -> str:
    def seconds(value: float | None, why: str) -> str:
        return f"{value:.3f}" if value is not None else why.split(";")[0][:90]

    columns = [result.model, result.hardware, result.batch, result.layout, seconds(result.forced_s, result.error)]
    columns += [result.free_layout, seconds(result.free_s, result.free_error)]
    ratio = f"{result.forced_s / result.free_s:.2f}" if result.forced_s and result.free_s else ""
    return "| " + " | ".join([*columns, ratio]) + " |"


def table(kept: Mapping[str, Result], left_out: Counter[str]) -> str:
    rows = sorted(kept.values(), key=lambda r: r.key)
    both = [r for r in rows if r.forced_s and r.free_s]
    slower = [r for r in both if (r.free_s or 0) > TIE * (r.forced_s or 0)]
    head = ["model", "cluster", "batch", "recipe's layout", "step s", "free plan", "step s", "recipe / free"]
    lines = [
        "# Layouts of public recipes, forced and free",
        "",
        "`python benchmarks/recipes.py --data DIR --write`: predicted seconds of a step, of layouts that experts "
        "published (Megatron Bridge's recipes) and of the plan found without `--force` on the same cluster. What a "
        f"recipe leaves to its defaults is {DEFAULTS}.",
        "",
        f"{len(rows)} layouts; {len(both)} with both plans; the free one is slower by more than {TIE - 1:.0%} in "
        f"{len(slower)}.",
        f"Machine: {platform.processor() or platform.machine()}, torch {torch.__version__}.",
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---"] * len(head)) + " |",
        *map(_line, rows),
        "",
        "Left out: " + ", ".join(f"{reason} ({count})" for reason, count in left_out.most_common()) + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--limit-s", type=float, default=240.0)
    parser.add_argument("--hours", type=float, default=24.0)
    options = parser.parse_args()
    found = list(read(options.data))
    left_out = Counter(row for _, row in found if isinstance(row, str))
    recipes = [row for name, row in found if isinstance(row, Recipe) and options.only in name]
    kept: dict[str, Result] = {}
    if options.write and KEPT.exists():
        kept = {row["key"]: Result(**row) for row in map(json.loads, KEPT.read_text().splitlines())}
    layouts = {recipe.key for recipe in recipes}
    print(f"{len(recipes)} recipes, {len(layouts)} layouts, {len(kept)} of them kept; left out: {dict(left_out)}")
    run(recipes, options.limit_s, time.monotonic() + 3600 * options.hours, kept, options.write)
    if options.write:
        TABLE.write_text(table(kept, left_out))


if __name__ == "__main__":
    main()
