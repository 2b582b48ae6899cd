"""Hardware names -> Cluster.

[NODESx]GPUSxNAME[-FORM][-MEMORY]   8xA100-40GB, 2x8xH100-SXM-80GB, 18x4xGB200-NVL72; joined by + for mixed clusters
NxCPU                               N processes that share one machine
local                               this machine, or this torchrun job: the only name that looks at devices
PATH.toml                           hosts and links from a file (docs/hardware.md)
"""

from __future__ import annotations

import os
from pathlib import Path

from ..units import GB, format_bytes
from .accelerators import accelerators
from .cluster import Cluster
from .discovery import discover_local
from .hardware_files import load_cluster
from .host_groups import checked_groups, notes_on, parse_term


def parse_hardware(spec: str, *, memory_limit_bytes: int | None = None) -> Cluster:
    """See the module's docstring for the grammar. memory_limit_bytes: at most this on each device.

    Raises ShardwrightError, with near matches, for names and counts that it cannot read.
    """
    text = spec.strip()
    if text.lower() == "local":
        cluster = discover_local()
    elif text.lower().endswith(".toml") or "/" in text or os.path.isfile(text):
        cluster = load_cluster(Path(text))
    else:
        groups = checked_groups(tuple(parse_term(term, text) for term in text.split("+")))
        cluster = Cluster(name=text, groups=groups, notes=notes_on(groups))
    return cluster if memory_limit_bytes is None else cluster.with_memory_limit(memory_limit_bytes)


def describe(cluster: Cluster) -> list[dict[str, str]]:
    """Rows for the `hardware` command: what, value, kind (datasheet, measured, ...) and source of each figure."""
    rows = []
    for index, group in enumerate(cluster.groups):
        device = cluster.device(sum(g.num_devices for g in cluster.groups[:index]))
        shape = f"{group.count} x {group.devices_per_host} {device.name}"
        rows.append({"what": "hosts", "value": shape, "kind": "", "source": ""})
        rows.append({"what": "memory a device", "value": format_bytes(device.memory_bytes), "kind": "", "source": ""})
        for name, link in (
            ("bridge", group.bridge),
            ("local", group.local),
            ("network", group.network),
            ("host", device.host_link),
        ):
            if link is not None:
                value = f"{link.name} {link.bytes_per_s / GB:.4g} GB/s, {link.latency_s * 1e6:.3g} us"
                rows.append({"what": f"{name} link", "value": value, "kind": "", "source": ""})
    for figure in cluster.figures():
        source = f"{figure.source} ({figure.date})" if figure.date else figure.source
        rows.append({"what": figure.name, "value": f"{figure.value:g}", "kind": figure.kind, "source": source})
    return rows


def known_hardware() -> list[dict[str, str]]:
    """One row for each catalog entry: name, memory, peak, links."""
    rows = []
    for entry in accelerators().values():
        device = entry.device
        rates = dict(device.peaks)
        best = max(("bf16", "fp16") if device.kind == "gpu" else ("fp32",), key=lambda dtype: rates.get(dtype, 0.0))
        rows.append(
            {
                "name": entry.key,
                "memory": format_bytes(device.nominal_memory_bytes),
                "memory_gb_per_s": f"{device.memory_bytes_per_s / GB:g}",
                "peak": f"{device.peak_flops_per_s(best) / 1e12:g} TFLOP/s {best}",
                "local": entry.local.name,
                "network": entry.network.name,
            }
        )
    return rows
