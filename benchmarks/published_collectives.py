"""Published nccl-tests curves (nccl_collectives.csv; not part of the repository) beside what the cost model says.

python benchmarks/published_collectives.py --data FOLDER                 error by kind and size
python benchmarks/published_collectives.py --data FOLDER --fit --write   constants of links, fitted to all-reduces
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from published_statistics import quantile

from shardwright.costmodel.constants import CONSTANTS_FILE, Constants, default_constants
from shardwright.costmodel.model import CostModel
from shardwright.profiler.accelerators import find_link
from shardwright.profiler.cluster import Cluster
from shardwright.profiler.device import GroupLink
from shardwright.profiler.host_groups import find_accelerator, host_group

KINDS = {"all_reduce": "all_reduce", "allreduce": "all_reduce", "allgather": "all_gather", "all_gather": "all_gather",
         "reducescatter": "reduce_scatter", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all"}  # fmt: skip
# An untuned cluster, a run that its source calls slow, and runs with an algorithm forced.
LEFT_OUT = ("anomalous", "slower than", "algo=Ring", "(ring)", "factor 1.969")


@dataclass(frozen=True)
class Collective:
    kind: str
    num_bytes: int
    seconds: float
    cluster: Cluster
    group: GroupLink
    from_torch: bool  # timed from Python, which adds tens of microseconds


def _network(text: str) -> str:
    for pattern, link in (
        ("EFA 4x100", "EFA-400"),
        ("EFA", "EFA-3200"),
        ("RoCE", "RoCE-400"),
        ("HDR", "InfiniBand-HDR"),
    ):
        if pattern in text:
            return link
    return "InfiniBand-NDR"


def read_collectives(folder: Path) -> Iterator[Collective]:
    path = folder / "nccl_collectives.csv"
    if not path.is_file():
        return
    names = ("GB200", "B200", "H200", "H100", "A100")
    with path.open() as file:
        for row in csv.DictReader(file):
            name = next((name for name in names if row["gpu"].startswith(name)), None)
            if name is None or not row["num_gpus"] or any(word in row["notes"] for word in LEFT_OUT):
                continue
            size, num_bytes, hosts = int(row["num_gpus"]), int(row["size_bytes"]), int(row["nodes"])
            kind = KINDS[row["collective"].lower()]
            if row["time_us"]:
                seconds = float(row["time_us"]) * 1e-6
            else:
                passes = 2 if kind == "all_reduce" else 1
                seconds = passes * num_bytes * (size - 1) / size / (float(row["busbw_GBps"]) * 1e9)
            group = replace(
                host_group(find_accelerator(name), hosts, size // hosts),
                network=find_link(_network(row["interconnect"])),
            )
            cluster = Cluster(row["gpu"], (group,))
            yield Collective(
                kind, num_bytes, seconds, cluster, cluster.axis_links({"dp": size}, "dp"), "torch" in row["notes"]
            )


# Constants that are fitted to all-reduces.
FITTED = [
    *(f"link_efficiency.{key}" for key in ("NVLink3", "NVLink4", "NVLink5", "infiniband", "roce", "efa")),
    "multicast_efficiency.NVLink4",
    "multicast_efficiency.NVLink5",
    "tree_efficiency.default",
    "chunk_bytes.default",
    "chunk_bytes.efa",
]
PRIOR_WEIGHT = 0.02  # keeps constants that the data barely constrain near where they start


def fit(folder: Path, constants: Constants) -> dict[str, float]:
    """Mean |log error| of all-reduces from 64 KiB, each published curve weighing the square root of its points."""
    curves: dict[Cluster, list[Collective]] = defaultdict(list)
    for one in read_collectives(folder):
        # the other kinds were published as means over a shared network, with a definition of bandwidth left open
        if one.kind == "all_reduce" and one.num_bytes >= (1 << 20 if one.from_torch else 1 << 16):
            curves[one.cluster].append(one)
    start = {name: constants.get(*name.split(".")) for name in FITTED}

    def loss_of(values: dict[str, float]) -> float:
        table = constants.replaced(values)
        total = weight = 0.0
        for cluster, points in curves.items():
            model = CostModel(cluster, table)
            errors = [abs(math.log(model.collective_seconds(p.kind, p.num_bytes, p.group) / p.seconds)) for p in points]
            total, weight = total + sum(errors) / math.sqrt(len(errors)), weight + math.sqrt(len(errors))
        prior = sum(abs(math.log(values[name] / start[name])) for name in values) / len(values)
        return total / weight + PRIOR_WEIGHT * prior

    return descend(start, loss_of)


def descend(values: dict[str, float], loss_of: Callable[[dict[str, float]], float]) -> dict[str, float]:
    """Coordinate descent with shrinking multiplicative steps; efficiencies stay below one."""
    best = loss_of(values)
    for step in (1.25, 1.25, 1.12, 1.12, 1.06, 1.03):
        for name in values:
            for factor in (step, 1 / step):
                trial = {**values, name: values[name] * factor}
                if "efficiency" in name and trial[name] > 1.0:
                    continue
                loss = loss_of(trial)
                if loss < best - 1e-6:
                    values, best = trial, loss
                    break
        print(f"step {step}: loss {best:.4f}")
    return values


def report(folder: Path, constants: Constants) -> None:
    """Median and 90th percentile of |predicted / measured - 1| by kind and size."""
    errors: dict[str, list[float]] = defaultdict(list)
    for one in read_collectives(folder):
        seconds = CostModel(one.cluster, constants).collective_seconds(one.kind, one.num_bytes, one.group)
        size = "1 MiB and more" if one.num_bytes >= 1 << 20 else "below 1 MiB"
        errors[f"{one.kind}, {size}"].append(abs(seconds / one.seconds - 1))
    for name, found in errors.items():
        print(f"{name:34s} {len(found):5d} {quantile(found, 0.5):7.1%} {quantile(found, 0.9):7.1%}")


def write(values: dict[str, float]) -> None:
    """Into the constants file, in place, where a group has that key."""
    text = CONSTANTS_FILE.read_text()
    for name, value in values.items():
        group, key = name.split(".")
        pattern = rf'(\[constants\.{group}\][^\[]*?\n{re.escape(key)} = \{{ value = )[^,]+, source = "\w+"'
        text = re.sub(pattern, lambda found, value=value: f'{found[1]}{value:.3g}, source = "nccl"', text, count=1)
    CONSTANTS_FILE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that has nccl_collectives.csv")
    parser.add_argument("--fit", action="store_true", help="fit the constants of links and print them")
    parser.add_argument("--write", action="store_true", help="with --fit: write costmodel/constants.toml")
    args = parser.parse_args()
    if not args.fit:
        report(args.data, default_constants())
        return
    values = fit(args.data, default_constants())
    for name, value in values.items():
        print(f"{name} = {value:.4g}")
    if args.write:
        write(values)


if __name__ == "__main__":
    main()
