"""Hardware described in a TOML file (docs/hardware.md) -> Cluster. Nothing in it is believed before it is looked at."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ShardwrightError
from ..units import GB, GIB
from .accelerators import find_link, read_toml
from .cluster import Cluster, Figure, HostGroup, HostPairLink, Link
from .host_groups import MAX_DEVICES, checked_groups, notes_on, parse_term, with_rates
from .measured_rates import MeasuredRates

HOST_KEYS = {"devices", "count", "local_link", "network_link", "memory_gib", "host_memory_gib",
             "host_memory_gb_per_s", "nvme_gib", "nvme_gb_per_s", "domain_devices", "rates"}  # fmt: skip
LINK_KEYS = {"name", "family", "gb_per_s", "latency_us", "kind", "source", "date"}
KINDS = ("datasheet", "measured", "fitted", "assumed")
# Of memory in GiB, rates in GB/s and latencies in microseconds: beyond these a file is mistyped.
LEAST, MOST = 1e-6, 1e9


class _Table:
    """A table of the file. where: what to call it in an error. Every value is of the type that is asked for."""

    def __init__(self, where: str, entries: Any, known: set[str] | None = None) -> None:
        if not isinstance(entries, dict):
            raise ShardwrightError(
                f"{where} is {_shown(entries)}, not a table", change=where.rpartition(" ")[2], works="KEY = VALUE"
            )
        self.where, self.entries = where, entries
        for key in entries:
            if known is not None and key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
                raise ShardwrightError(
                    f"{where}: unknown key {key!r}", means=f"known keys: {', '.join(sorted(known))}", change=key,
                    works=near[0] if near else sorted(known)[0],
                )  # fmt: skip

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def figure(self, key: str) -> float:
        value = self.entries[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST <= value <= MOST:
            raise self._refused(key, f"a number from {LEAST:g} to {MOST:g} is needed", f"{key} = 50.0")
        return float(value)

    def count(self, key: str, otherwise: int) -> int:
        value = self.entries.get(key, otherwise)
        if type(value) is not int or not (1 <= value <= MAX_DEVICES or value == otherwise):
            raise self._refused(key, f"a whole number from 1 to {MAX_DEVICES:,} is needed", f"{key} = 2")
        return value

    def text(self, key: str, otherwise: str) -> str:
        value = self.entries.get(key, otherwise)
        if not isinstance(value, str):
            raise self._refused(key, "a text in quotes is needed", f'{key} = "{otherwise}"')
        return value

    def rows(self, key: str) -> list[Any]:
        value = self.entries.get(key, [])
        if not isinstance(value, list):
            raise self._refused(key, "a list of tables is needed", f"[[{key}]]")
        return value

    def _refused(self, key: str, means: str, works: str) -> ShardwrightError:
        shown = _shown(self.entries[key])
        return ShardwrightError(f"{self.where}: {key} = {shown}", means=means, change=key, works=works)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def load_cluster(path: Path) -> Cluster:
    """A TOML file of hosts and links.

    [[hosts]]: devices = "8xH100-SXM-80GB", count, local_link and network_link (a catalog name, or a table with name,
    gb_per_s, latency_us, source, kind, date), memory_gib, host_memory_gib, host_memory_gb_per_s, nvme_gib,
    nvme_gb_per_s.
    [[links]]: hosts = [0, 1] and the entries of such a table.
    """
    try:
        document = _Table(str(path), read_toml(path))
    except OSError as error:
        raise ShardwrightError(
            f"cannot read hardware file {path}: {error.strerror}",
            change="--hardware",
            works="a path to a .toml file, or a name such as 2x8xH100-SXM-80GB",
        ) from None
    except (ValueError, RecursionError) as error:  # tomllib.TOMLDecodeError
        raise ShardwrightError(
            f"{path} is not TOML: {error}", change="the file", works='[[hosts]]\ndevices = "8xH100"'
        ) from None
    hosts = document.rows("hosts")
    if not hosts:
        raise ShardwrightError(f"{path} describes no host", change="the file", works='[[hosts]]\ndevices = "8xH100"')
    groups = checked_groups(tuple(_group(path, index, entry) for index, entry in enumerate(hosts)))
    num_hosts = sum(group.count for group in groups)
    pairs = tuple(_pair(path, entry, num_hosts) for entry in document.rows("links"))
    return Cluster(name=document.text("name", path.stem), groups=groups, host_pairs=pairs, notes=notes_on(groups))


def _group(path: Path, index: int, entry: Any) -> HostGroup:
    host = _Table(f"{path}: hosts[{index}]", entry, HOST_KEYS)
    if "devices" not in host:
        raise ShardwrightError(f"{host.where} has no devices", change="devices", works='devices = "8xH100-SXM-80GB"')
    devices = host.text("devices", "8xH100-SXM-80GB")
    group = parse_term(devices, devices)
    changes: dict[str, Any] = {}
    device = group.device
    figures = list(device.figures)
    # what a host has is shared by its devices; what a device has is its own
    for key, field, unit, share in (
        ("memory_gib", "memory_bytes", GIB, 1),
        ("host_memory_gib", "host_memory_bytes", GIB, group.devices_per_host),
        ("host_memory_gb_per_s", "host_memory_bytes_per_s", GB, group.devices_per_host),
        ("nvme_gib", "nvme_bytes", GIB, group.devices_per_host),
        ("nvme_gb_per_s", "nvme_bytes_per_s", GB, group.devices_per_host),
    ):
        if key in host:
            value = host.figure(key) * unit / share
            changes[field] = int(value) if unit == GIB else value
            figures.append(Figure(f"{host.where}.{key}", host.figure(key), "measured", str(path), ""))
    if "rates" in host:
        device = with_rates(replace(device, figures=tuple(figures), **changes), _rates(host), str(path))
    else:
        device = replace(device, figures=tuple(figures), **changes)
    return replace(
        group,
        count=group.count * host.count("count", 1),
        device=device,
        local=_link(host.where, entry["local_link"]) if "local_link" in host else group.local,
        network=_link(host.where, entry["network_link"]) if "network_link" in host else group.network,
        domain_devices=host.count("domain_devices", group.domain_devices),
    )


def _rates(host: _Table) -> MeasuredRates:
    """Tables as MeasuredRates.tables makes them."""
    try:
        return MeasuredRates.of_tables(host.rows("rates"))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ShardwrightError(
            f"{host.where}: rates: {error}",
            means="each table has op, dtype, and flops, bytes and seconds as lists of one length, seconds above 0",
            change="rates",
            works="what shardwright profile -o FILE writes",
        ) from None


def _link(where: str, value: Any) -> Link:
    """A catalog name, or a table of figures."""
    if isinstance(value, str):
        return find_link(value)
    if not isinstance(value, dict):
        raise ShardwrightError(
            f"{where}: a link is a name or a table, not {_shown(value)}", change="the link", works='"InfiniBand-NDR"'
        )
    table = _Table(where, value, LINK_KEYS)
    base = find_link(table.text("name", "InfiniBand-NDR")) if "name" in table else None
    kind = table.text("kind", "measured")
    if kind not in KINDS:
        raise ShardwrightError(f"{where}: kind {_shown(kind)}", change="kind", works=", ".join(KINDS))
    if base is None and "gb_per_s" not in table:
        raise ShardwrightError(f"{where}: a link without name or gb_per_s", change="the link", works="gb_per_s = 50.0")
    rate = table.figure("gb_per_s") * GB if "gb_per_s" in table else base.bytes_per_s  # type: ignore[union-attr]
    if "latency_us" in table:
        latency_s = table.figure("latency_us") * 1e-6
    else:
        latency_s = base.latency_s if base else 10e-6
    source, date = table.text("source", where), str(value.get("date", ""))  # TOML has dates of its own
    figures = tuple(
        Figure(f"{where}.{key}", table.figure(key), kind, source, date)
        for key in ("gb_per_s", "latency_us")
        if key in table
    )
    return Link(
        name=base.name if base else "custom",
        family=table.text("family", base.family if base else "network"),
        bytes_per_s=rate,
        latency_s=latency_s,
        multicast=base.multicast if base else False,
        measured=kind == "measured" and "gb_per_s" in table,
        figures=figures or (base.figures if base else ()),
    )


def _pair(path: Path, entry: Any, num_hosts: int) -> HostPairLink:
    link = _Table(f"{path}: links", entry)
    pair = link.entries.get("hosts")
    valid = isinstance(pair, list) and all(type(host) is int and 0 <= host < num_hosts for host in pair)
    if not valid or len(set(pair)) != 2 or len(pair) != 2:  # type: ignore[arg-type]
        raise ShardwrightError(
            f"{link.where}: hosts = {_shown(pair)}",
            means=f"two different host numbers from 0 to {num_hosts - 1} are needed",
            change="hosts",
            works="hosts = [0, 1]",
        )
    a, b = pair  # type: ignore[misc]
    return HostPairLink(a, b, _link(link.where, {key: v for key, v in link.entries.items() if key != "hosts"}))
