"""The catalog of accelerators and links: TOML files beside this one, read once into Device and Link records."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ShardwrightError
from ..units import GB, GIB
from .device import Device, Figure, Link

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CATALOG_FOLDER = Path(__file__).parent / "catalog"


@dataclass(frozen=True)
class Accelerator:
    """A catalog entry: the device and the host it usually stands in. host_devices 0: any number (CPU processes)."""

    key: str
    name: str
    form: str
    default: bool
    device: Device
    local: Link
    network: Link
    bridge: Link | None
    bridge_devices: int
    host_devices: int
    domain_devices: int

    @property
    def memory_gib(self) -> int:
        return round(self.device.nominal_memory_bytes / GIB)


def read_toml(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def _read_figures(entry_key: str, entry: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Figure]:
    """The inline tables { value, source } of an entry, by key."""
    figures = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            source = sources[value["source"]]
            where = source["title"] + (f" <{source['url']}>" if source["url"] else "")
            figures[key] = Figure(f"{entry_key}.{key}", float(value["value"]), source["kind"], where, source["date"])
    return figures


@cache
def links() -> dict[str, Link]:
    """Catalog name -> Link."""
    document = read_toml(CATALOG_FOLDER / "links.toml")
    result = {}
    for name, entry in document["links"].items():
        figures = _read_figures(name, entry, document["sources"])
        peer = figures.get("peer_gb_per_s")
        result[name] = Link(
            name=name,
            family=entry["family"],
            bytes_per_s=figures["gb_per_s"].value * GB,
            latency_s=figures["latency_us"].value * 1e-6,
            peer_bytes_per_s=peer.value * GB if peer else 0.0,
            multicast=entry.get("multicast", False),
            figures=tuple(figures.values()),
        )
    return result


@cache
def accelerators() -> dict[str, Accelerator]:
    """Catalog key (NAME-FORM-MEMORYGB) -> entry."""
    document = read_toml(CATALOG_FOLDER / "accelerators.toml")
    by_name = links()
    result = {}
    for key, entry in document["accelerators"].items():
        figures = _read_figures(key, entry, document["sources"])

        def value(name: str, scale: float, figures: dict[str, Figure] = figures) -> float:
            return figures[name].value * scale if name in figures else 0.0

        device = Device(
            name=key,
            kind=entry["kind"],
            memory_bytes=int(value("usable_memory_gib", GIB)),
            nominal_memory_bytes=int(value("memory_gib", GIB)),
            memory_bytes_per_s=value("memory_gb_per_s", GB),
            peaks=tuple(
                (name.removesuffix("_tflops"), figure.value * 1e12)
                for name, figure in figures.items()
                if name.endswith("_tflops")
            ),
            host_link=by_name[entry["host_link"]],
            host_memory_bytes=int(value("host_memory_gib", GIB)),
            nvme_bytes=int(value("nvme_gib", GIB)),
            nvme_bytes_per_s=value("nvme_gb_per_s", GB),
            figures=tuple(figures.values()),
        )
        result[key] = Accelerator(
            key=key,
            name=entry["name"],
            form=entry["form"],
            default=entry["default"],
            device=device,
            local=by_name[entry["local_link"]],
            network=by_name[entry["network_link"]],
            bridge=by_name[entry["bridge_link"]] if "bridge_link" in entry else None,
            bridge_devices=entry.get("bridge_devices", 1),
            host_devices=entry.get("host_devices", 0),
            domain_devices=entry.get("domain_devices", 0),
        )
    return result


def find_link(name: str) -> Link:
    """By catalog name, any case."""
    by_name = {known.lower(): link for known, link in links().items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4)
    matches = [by_name[match].name for match in near]
    raise ShardwrightError(
        f"unknown link {name!r}" + (f"; near: {', '.join(matches)}" if matches else ""),
        means="it is not in the catalog, so its bandwidth and latency are not known",
        change="the link's name in the cluster file, or give gb_per_s and latency_us there",
        works=matches[0] if matches else "InfiniBand-NDR",
    )
