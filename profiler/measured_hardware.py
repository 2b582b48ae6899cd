"""What was measured of a job, op by op and link by link, and the hardware file that it becomes (docs/profile.md)."""

from __future__ import annotations

import datetime
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ShardwrightError
from ..units import GB
from .files import replace_text
from .measured_rates import MeasuredRates
from .measurements import Where

UNEVEN = 1.15  # times slower or quicker than the median of all: the pair is written out


@dataclass(frozen=True)
class MeasuredLink:
    """hosts: the pair; the same twice for what joins the processes of one. bytes_per_s: of one process, one way."""

    hosts: tuple[int, int]
    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Profile:
    """devices: as a hardware file names those of one host. failed: ops that no figure was had of, with the reason."""

    where: Where
    devices: str
    num_hosts: int
    rates: MeasuredRates
    links: list[MeasuredLink]
    memory_gib: float
    failed: dict[str, str]
    num_new: int

    def link_between_hosts(self) -> MeasuredLink | None:
        """The median of all pairs of hosts."""
        return _median([link for link in self.links if link.hosts[0] != link.hosts[1]])

    def link_inside(self) -> MeasuredLink | None:
        return _median([link for link in self.links if link.hosts[0] == link.hosts[1]])

    def uneven_pairs(self) -> list[MeasuredLink]:
        usual = self.link_between_hosts()
        pairs = [link for link in self.links if link.hosts[0] != link.hosts[1]]
        if usual is None:
            return []
        return [link for link in pairs if not 1 / UNEVEN <= link.bytes_per_s / usual.bytes_per_s <= UNEVEN]


def _median(links: Sequence[MeasuredLink]) -> MeasuredLink | None:
    if not links:
        return None
    return MeasuredLink(
        links[0].hosts,
        statistics.median(link.latency_s for link in links),
        statistics.median_low(link.bytes_per_s for link in links),
    )


def write_hardware(made: Profile, path: Path) -> None:
    """As a file that --hardware takes. Raises ShardwrightError where it cannot be written."""
    today, source = datetime.date.today().isoformat(), f"shardwright profile on {made.where.device}"
    lines = [f"# {source}, {made.where.versions}, {today}, {platform.system()}", f"name = {_text(path.stem)}", ""]
    lines += ["[[hosts]]", f'devices = "{made.devices}"', f"count = {made.num_hosts}"]
    lines.append(f"memory_gib = {made.memory_gib:.3f}")
    for key, link in (("local_link", made.link_inside()), ("network_link", made.link_between_hosts())):
        if link is not None:
            lines.append(f"{key} = {{ {_figures(link)}, source = {_text(source)}, date = {_text(today)} }}")
    for table in made.rates.tables():
        lines += ["", "[[hosts.rates]]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    for link in made.uneven_pairs():
        lines += ["", "[[links]]", f"hosts = {list(link.hosts)}", *_figures(link).split(", ")]
    try:
        replace_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise ShardwrightError(
            f"cannot write {path}: {error.strerror}",
            means="what was measured is kept in the cache, and the next run writes it without measuring again",
            change="-o",
            works="a folder that you may write to",
        ) from None


def _figures(link: MeasuredLink) -> str:
    return f"gb_per_s = {link.bytes_per_s / GB:.6g}, latency_us = {max(link.latency_s * 1e6, 0.01):.4g}"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{number:.6g}" for number in value) + "]"
    return _text(str(value))


def as_document(made: Profile) -> Mapping[str, Any]:
    """For --json."""
    return {
        "device": made.where.device,
        "versions": made.where.versions,
        "processes": made.where.processes,
        "hosts": made.num_hosts,
        "measured": made.num_new,
        "failed": made.failed,
        "rates": made.rates.tables(),
        "links": [
            {"hosts": list(link.hosts), "gb_per_s": link.bytes_per_s / GB, "latency_us": link.latency_s * 1e6}
            for link in made.links
        ],
    }
