"""Reads published nccl-tests curves (nccl_collectives.csv; not part of the repository)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

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
