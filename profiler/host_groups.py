"""Hosts with their devices: from one term of a hardware name, or from an entry of the catalog."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from ..errors import ShardwrightError
from .accelerators import Accelerator, accelerators
from .cluster import Device, Figure, HostGroup, Link
from .cpu_calibration import read_cpu_calibration
from .measured_rates import MeasuredRates
from .measurements import cached_rates, cpus_here

MAX_DEVICES = 1 << 18
MAX_DIGITS = 9
GRAMMAR = "[NODESx]GPUSxNAME[-FORM][-MEMORY], parts joined by +; or local; or a path to a .toml file"
FORMS = {"SXM": "SXM", "SXM2": "SXM", "SXM4": "SXM", "SXM5": "SXM", "SXM6": "SXM", "HGX": "SXM", "DGX": "SXM",
         "PCIE": "PCIE", "NVL": "NVL", "NVL72": "NVL72", "OAM": "OAM"}  # fmt: skip
NAME_ALIASES = {"4090": "RTX4090", "RTX-4090": "RTX4090", "GEFORCE-RTX-4090": "RTX4090", "MI250": "MI250X"}
_TERM = re.compile(r"(?:(\d+)\s*x\s*)?(\d+)\s*x\s*([A-Za-z0-9][A-Za-z0-9\- ]*)", re.IGNORECASE)


def notes_on(groups: tuple[HostGroup, ...]) -> tuple[str, ...]:
    notes = []
    if any(group.device.kind == "cpu" and not group.device.measured for group in groups):
        notes.append("CPU figures are the catalog's nominal ones; `shardwright profile` measures this machine")
    if len({group.device.name for group in groups}) > 1:
        notes.append("mixed devices: every group is costed by its slowest and smallest member")
    return tuple(notes)


def parse_term(term: str, spec: str) -> HostGroup:
    match = _TERM.fullmatch(term.strip())
    if not match:
        raise _bad_spec(term.strip(), spec)
    num_hosts, num_devices = _count(match[1] or "1"), _count(match[2])
    if num_hosts < 1 or num_devices < 1:
        raise ShardwrightError(f"{term.strip()!r} names no device", change="--hardware", works=f"1x{match[3]}")
    if num_hosts * num_devices > MAX_DEVICES:
        raise _too_many(f"{num_hosts * num_devices:,}")
    return host_group(find_accelerator(match[3]), num_hosts, num_devices)


def _count(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _too_many(digits if len(digits) < 30 else f"a number of {len(digits)} digits")
    return int(digits)


def _too_many(number: str) -> ShardwrightError:
    return ShardwrightError(
        f"the hardware has {number} devices",
        means=f"clusters of up to {MAX_DEVICES:,} devices are planned for",
        change="--hardware",
        works="2048x8xH100-SXM-80GB",
    )


def checked_groups(groups: tuple[HostGroup, ...]) -> tuple[HostGroup, ...]:
    number = sum(group.num_devices for group in groups)
    if number > MAX_DEVICES:
        raise _too_many(f"{number:,}")
    return groups


def _bad_spec(term: str, spec: str) -> ShardwrightError:
    """Says what is wrong with a term that is not COUNTxNAME: usually a bare name or an unknown one."""
    bare = re.sub(r"^[\dx\s]+x", "", term, flags=re.IGNORECASE)
    known = _near_names(bare)
    works = f"8x{known[0]}" if known else "2x8xH100-SXM-80GB"
    return ShardwrightError(
        f"cannot read hardware {spec!r}" + (f": {term!r}" if term != spec else ""),
        means=f"it is not of the form {GRAMMAR}",
        change="--hardware",
        works=works,
    )


def _near_names(name: str) -> list[str]:
    """Catalog keys near a name, by the whole key and by its first part; longest common text first."""
    catalog = accelerators()
    wanted = _normal(name)
    keys = {key: key for key in catalog} | {entry.name: entry.key for entry in catalog.values() if entry.default}
    near = difflib.get_close_matches(wanted, list(keys), n=6, cutoff=0.5)
    return list(dict.fromkeys(keys[match] for match in near))[:3]


def _normal(name: str) -> str:
    upper = re.sub(r"\s+", "-", name.strip().upper()).removeprefix("NVIDIA-").removeprefix("AMD-")
    for alias, full in NAME_ALIASES.items():
        if upper == alias or upper.startswith(alias + "-"):
            return full + upper[len(alias) :]
    return upper


def find_accelerator(name: str) -> Accelerator:
    """NAME[-FORM][-MEMORY], in any case. The bare name gives the entry marked default."""
    catalog = accelerators()
    first, *rest = _normal(name).split("-")
    family = [entry for entry in catalog.values() if entry.name == first]
    if not family:
        near = _near_names(name)
        raise ShardwrightError(
            f"unknown accelerator {name.strip()!r}" + (f"; near: {', '.join(near)}" if near else ""),
            means="it is not in the catalog, so its speed and memory are not known; "
            f"known names: {', '.join(sorted({entry.name for entry in catalog.values()}))}",
            change="--hardware, or describe it in a .toml file",
            works=f"8x{near[0]}" if near else "8xH100-SXM-80GB",
        )
    matching = family
    for part in rest:
        memory = re.fullmatch(r"(\d+)(?:GI?B|G)?", part)
        if part in FORMS:
            matching = [entry for entry in matching if entry.form == FORMS[part]]
        elif memory:
            matching = [entry for entry in matching if entry.memory_gib == int(memory[1])]
        else:
            matching = []
        if not matching:
            raise ShardwrightError(
                f"no {first} with {part!r}",
                means=f"the catalog has {', '.join(entry.key for entry in family)}",
                change="--hardware",
                works=f"8x{next(entry.key for entry in family if entry.default)}",
            )
    return next((entry for entry in matching if entry.default), matching[0])


def host_group(entry: Accelerator, num_hosts: int, num_devices: int) -> HostGroup:
    """num_hosts hosts of num_devices each. More devices than a host of that kind holds are spread over full hosts."""
    if entry.device.kind == "cpu":
        return _cpu_group(entry, num_hosts, num_devices)
    if entry.host_devices and num_devices > entry.host_devices:
        if num_devices % entry.host_devices:
            raise ShardwrightError(
                f"{num_devices} {entry.name} in one host: a host of that kind holds {entry.host_devices}",
                means="what exceeds a full host would be on another host, which the name does not say",
                change="--hardware",
                works=f"{num_devices // entry.host_devices}x{entry.host_devices}x{entry.key}",
            )
        num_hosts, num_devices = num_hosts * (num_devices // entry.host_devices), entry.host_devices
    return HostGroup(
        count=num_hosts,
        devices_per_host=num_devices,
        device=entry.device,
        local=entry.local,
        network=entry.network,
        bridge=entry.bridge,
        bridge_devices=entry.bridge_devices,
        domain_devices=entry.domain_devices if entry.domain_devices > entry.host_devices else 0,
    )


def _cpu_group(entry: Accelerator, num_hosts: int, num_processes: int) -> HostGroup:
    """Processes share the machine's cores, memory and memory bus. A cached calibration replaces the nominal figures,
    and what `shardwright profile` measured with as many processes, the time of ops."""
    device, local = entry.device, entry.local
    calibration = read_cpu_calibration()
    if calibration is not None:
        device, local = calibration.apply(device, local)
    shared = with_rates(share_cpu(device, num_processes), cached_rates(cpus_here(num_processes)), "the cache")
    return HostGroup(num_hosts, num_processes, shared, share_link(local, num_processes), entry.network)


def with_rates(device: Device, rates: MeasuredRates | None, source: str) -> Device:
    """The device whose ops take what was measured; a CPU's figures are then those too."""
    if rates is None:
        return device
    figures = list(device.figures)
    figures.append(Figure("ops measured", rates.num_points, "measured", f"shardwright profile, from {source}", ""))
    if device.kind != "cpu":
        return replace(device, rates=rates, figures=tuple(figures))
    products, memory = rates.product_flops_per_s(), rates.memory_bytes_per_s()
    return replace(
        device,
        rates=rates,
        peaks=tuple((dict(device.peaks) | products).items()),
        memory_bytes_per_s=memory or device.memory_bytes_per_s,
        measured=device.measured or bool(products and memory),
        figures=tuple(figures),
    )


def share_cpu(device: Device, num_processes: int) -> Device:
    """One of num_processes equal shares of a machine."""
    return replace(
        device,
        memory_bytes=device.memory_bytes // num_processes,
        nominal_memory_bytes=device.nominal_memory_bytes // num_processes,
        memory_bytes_per_s=device.memory_bytes_per_s / num_processes,
        peaks=tuple((dtype, rate / num_processes) for dtype, rate in device.peaks),
        nvme_bytes=device.nvme_bytes // num_processes,
    )


def share_link(link: Link, num_processes: int) -> Link:
    """Loopback traffic is copied by the same cores: its figure is for two processes that send at once."""
    share = min(1.0, 2 / num_processes)
    return replace(link, bytes_per_s=link.bytes_per_s * share, latency_s=link.latency_s / share)
