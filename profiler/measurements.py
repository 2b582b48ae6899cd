"""A cache of what ops took on machines, in SQLite: one row a device, versions, number of processes, op, dtype and size.

A row is written as soon as it is measured, so that what was stopped goes on where it was. An op that failed is a row
too, with its error and without seconds.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ShardwrightError
from .cpu_calibration import cache_folder, machine_name, threads_each
from .measured_rates import MeasuredRates, Measurement, Point

_TABLE = """
CREATE TABLE IF NOT EXISTS measurements (
    device TEXT NOT NULL, versions TEXT NOT NULL, processes INTEGER NOT NULL,
    op TEXT NOT NULL, dtype TEXT NOT NULL, form TEXT NOT NULL, size TEXT NOT NULL,
    flops REAL NOT NULL, bytes REAL NOT NULL, seconds REAL, error TEXT NOT NULL, date TEXT NOT NULL,
    PRIMARY KEY (device, versions, processes, op, dtype, form, size)
)
"""


@dataclass(frozen=True)
class Where:
    """On what it was measured. device: its name, of CPUs the machine's. processes: that measured at once on a machine,
    each on its share of it."""

    device: str
    versions: str
    processes: int


@dataclass(frozen=True)
class Case:
    """What is measured: an op at a size. size: as text."""

    op: str
    dtype: str
    form: str
    size: str


@dataclass(frozen=True)
class Row:
    """seconds: None where the op failed with error."""

    case: Case
    flops: float
    bytes_moved: float
    seconds: float | None
    error: str = ""


def measurements_path() -> Path:
    return cache_folder() / "measurements.sqlite"


class Measurements:
    """The rows of one place. Use it as a context manager."""

    def __init__(self, where: Where, path: Path | None = None) -> None:
        self.where, self.path = where, path if path is not None else measurements_path()

    def __enter__(self) -> Measurements:
        with self._refusals():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self.path, timeout=30)
            self._connection.execute(_TABLE)
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What SQLite and the file system refuse, said as our error."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise ShardwrightError(
                f"cannot keep measurements in {self.path}: {error}",
                means="what is measured would be lost",
                change="SHARDWRIGHT_CACHE, the folder for it",
                works="SHARDWRIGHT_CACHE=/tmp/shardwright; where the file is damaged or of another program, remove it",
            ) from None

    def _place(self) -> tuple[str, str, int]:
        return self.where.device, self.where.versions, self.where.processes

    def rows(self) -> dict[Case, Row]:
        with self._refusals():
            found = self._connection.execute(
                "SELECT op, dtype, form, size, flops, bytes, seconds, error FROM measurements"
                " WHERE device = ? AND versions = ? AND processes = ?",
                self._place(),
            ).fetchall()
        return {Case(*row[:4]): Row(Case(*row[:4]), *row[4:]) for row in found}

    def put(self, row: Row) -> None:
        case = row.case
        today = datetime.date.today().isoformat()
        with self._refusals(), self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*self._place(), case.op, case.dtype, case.form, case.size, row.flops, row.bytes_moved, row.seconds,
                 row.error, today),
            )  # fmt: skip

    def forget(self, dtypes: Sequence[str], ops: Sequence[str] = ()) -> None:
        """Remove the rows of this place, of these dtypes and ops; no ops: of all."""
        mine = [case for case in self.rows() if case.dtype in dtypes and (not ops or case.op in ops)]
        with self._refusals(), self._connection:
            self._connection.executemany(
                "DELETE FROM measurements WHERE device = ? AND versions = ? AND processes = ?"
                " AND op = ? AND dtype = ? AND form = ? AND size = ?",
                [(*self._place(), case.op, case.dtype, case.form, case.size) for case in mine],
            )


def rates_of(rows: Iterator[Row] | list[Row]) -> MeasuredRates:
    return MeasuredRates(
        Measurement(row.case.op, row.case.dtype, row.case.form, Point(row.flops, row.bytes_moved, row.seconds))
        for row in rows
        if row.seconds is not None
    )


def here(device: str, processes: int) -> Where:
    """With the versions that are installed. device: of Where."""
    return Where(device, f"torch {importlib.metadata.version('torch')}", processes)


def cpus_here(processes: int) -> Where:
    """This machine's cores, shared by so many processes."""
    return here(f"{machine_name()}, {threads_each(processes)} threads a process", processes)


def cached_rates(where: Where) -> MeasuredRates | None:
    """What was measured there; None where nothing was, or no cache can be read."""
    if not measurements_path().is_file():
        return None
    with contextlib.suppress(ShardwrightError), Measurements(where) as kept:
        return rates_of(list(kept.rows().values())) or None
    return None
