"""`shardwright profile`: ops and links measured, kept, written as a hardware file, and planned with."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks

from shardwright.costmodel.compute import op_seconds
from shardwright.costmodel.constants import default_constants
from shardwright.costmodel.measured import measured_seconds
from shardwright.errors import ShardwrightError
from shardwright.job_profile import _refuse_unlike
from shardwright.measuring_links import hosts_of, measure_links
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.measured_hardware import MeasuredLink, Profile, write_hardware
from shardwright.profiler.measured_rates import MeasuredRates, Measurement, Point
from shardwright.profiler.measurements import Case, Measurements, Row, Where, cached_rates, cpus_here, here
from shardwright.profiler.measuring import Series, Sized, Together, all_series, measure

CPU = torch.device("cpu")


def _rates(slower: float = 1.0) -> MeasuredRates:
    """Squares at 1e9 FLOP/s, products of a row at 1e8; additions at 1e9 bytes/s from 1 us on."""
    rows = []
    for n in (64, 256, 1024):
        moved = 4.0 * 3 * n * n
        rows.append(Measurement("mm", "fp32", "square", Point(2.0 * n**3, moved, slower * 2.0 * n**3 / 1e9)))
        moved = 4.0 * (n * n + 2 * n)
        rows.append(Measurement("mm", "fp32", "row", Point(2.0 * n * n, moved, slower * 2.0 * n * n / 1e8)))
    for moved in (1e3, 1e6):
        rows.append(Measurement("add", "fp32", "", Point(moved / 12, moved, slower * moved / 1e9)))
    return MeasuredRates(rows)


def _sized(op: str, size: int, run: object) -> Sized:
    return Sized(Case(op, "fp32", "", str(size)), 1.0, 4.0 * size, lambda: (torch.ones(size),), run)  # type: ignore[arg-type]


def _fails(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel for this device")


def test_seconds_of_what_was_measured_are_what_was_measured() -> None:
    rates = _rates()
    for measurement in rates.measurements():
        op, dtype, _, point = measurement
        kind = "matmul" if op == "mm" else "pointwise"
        found = measured_seconds(rates, op, kind, dtype, point.flops, point.bytes_moved)
        assert found == pytest.approx(point.seconds, rel=1e-9)


def test_between_sizes_seconds_are_a_power_of_the_work_and_beyond_them_the_rate_holds() -> None:
    rates = _rates()
    n = 2048
    assert measured_seconds(rates, "mm", "matmul", "fp32", 2.0 * n**3, 12.0 * n * n) == pytest.approx(2 * n**3 / 1e9)
    assert measured_seconds(rates, "add", "pointwise", "fp32", 1.0, math.sqrt(1e3 * 1e6)) == pytest.approx(
        math.sqrt(1e-6 * 1e-3)
    )
    assert measured_seconds(rates, "add", "pointwise", "fp32", 1.0, 10.0) == pytest.approx(1e-6)  # what starting costs


def test_a_thinner_product_takes_longer_for_the_same_arithmetic() -> None:
    rates, flops = _rates(), 2.0 * 256**3
    seconds = [measured_seconds(rates, "mm", "matmul", "fp32", flops, flops / d) for d in (40.0, 10.0, 2.0, 0.4, 0.1)]
    assert seconds == sorted(seconds)  # type: ignore[type-var]
    assert seconds[-1] == pytest.approx(4 * seconds[-2], rel=1e-6)  # four times the bytes, at the rate of the thinnest


def test_an_op_stands_for_its_class_and_another_dtype_for_nothing() -> None:
    rates = _rates()
    assert measured_seconds(rates, "mul", "pointwise", "fp32", 1.0, 1e6) == pytest.approx(1e-3)
    assert measured_seconds(rates, "mul", "pointwise", "bf16", 1.0, 1e6) is None
    assert measured_seconds(rates, "convolution", "convolution", "fp32", 1.0, 1e6) is None


def test_noise_never_makes_a_larger_op_quicker() -> None:
    points = [Point(1.0, 1e3, 1e-3), Point(1.0, 1e4, 1e-4), Point(1.0, 1e5, 2e-4)]
    rates = MeasuredRates(Measurement("add", "fp32", "", point) for point in points)
    found = [measured_seconds(rates, "add", "pointwise", "fp32", 1.0, p.bytes_moved) for p in points]
    assert found == sorted(found)  # type: ignore[type-var]
    assert found[-1] == pytest.approx(2e-4)


def test_an_op_that_fails_is_kept_with_its_error_and_ends_only_its_series(tmp_path: Path) -> None:
    series = [
        Series("bad", "fp32", "", [_sized("bad", 1, _fails), _sized("bad", 4, _fails)]),
        Series("good", "fp32", "", [_sized("good", 1, torch.neg), _sized("good", 4, torch.neg)]),
    ]
    with Measurements(Where("here", "torch", 1), tmp_path / "kept.sqlite") as kept:
        rows = measure(series, CPU, kept, {}, lambda *_: None)
        assert [(row.case.op, row.seconds is None) for row in rows] == [("bad", True), ("good", False), ("good", False)]
        assert "no kernel for this device" in kept.rows()[Case("bad", "fp32", "", "1")].error


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    ran: list[str] = []

    def counted(name: str) -> object:
        return lambda x: ran.append(name)

    def stop(x: torch.Tensor) -> None:
        raise KeyboardInterrupt

    first = [Series("a", "fp32", "", [_sized("a", 1, counted("a1")), _sized("a", 4, stop)])]
    again = [Series("a", "fp32", "", [_sized("a", 1, counted("a1")), _sized("a", 4, counted("a4"))])]
    where, path = Where("here", "torch", 1), tmp_path / "kept.sqlite"
    with Measurements(where, path) as kept, pytest.raises(KeyboardInterrupt):
        measure(first, CPU, kept, {}, lambda *_: None)
    ran.clear()
    with Measurements(where, path) as kept:
        measure(again, CPU, kept, kept.rows(), lambda *_: None)
    assert set(ran) == {"a4"}
    with Measurements(Where("elsewhere", "torch", 1), path) as kept:
        assert kept.rows() == {}


def test_what_failed_on_one_process_is_no_figure_of_any() -> None:
    together = Together(mean=lambda number: math.nan)
    (row,) = measure([Series("a", "fp32", "", [_sized("a", 1, torch.neg)])], CPU, None, {}, lambda *_: None, together)
    assert row.seconds is None and row.error


def test_every_case_runs_at_its_smallest_size() -> None:
    smallest = [Series(one.op, one.dtype, one.form, one.sizes[:1]) for one in all_series(CPU, ["fp32"])]
    rows = measure(smallest, CPU, None, {}, lambda *_: None)
    assert [row.error for row in rows if row.seconds is None] == []
    assert all(row.bytes_moved > 0 for row in rows)


def test_a_hardware_file_holds_what_was_measured_and_plans_go_by_it(tmp_path: Path) -> None:
    links = [MeasuredLink(pair, 5e-5, 1e9 if pair != (1, 2) else 2e8) for pair in ((0, 1), (0, 2), (1, 2))]
    for name, slower in (("quick", 1.0), ("slow", 3.0)):
        made = Profile(Where("here", "torch", 1), "1xCPU", 3, _rates(slower), links, 4.0, {}, 8)
        write_hardware(made, tmp_path / f"{name}.toml")
    quick, slow = (parse_hardware(str(tmp_path / f"{name}.toml")) for name in ("quick", "slow"))
    assert quick.num_devices == 3
    for read, made in zip(quick.device(0).rates.measurements(), _rates().measurements(), strict=True):  # type: ignore[union-attr]
        assert read[:3] == made[:3] and read.point == pytest.approx(made.point, rel=1e-5)
    assert quick.device(0).peak_flops_per_s("fp32") == pytest.approx(1e9)
    assert quick.link_between(0, 1).bytes_per_s == pytest.approx(1e9)
    assert quick.link_between(1, 2).bytes_per_s == pytest.approx(2e8)
    seconds = [
        op_seconds(default_constants(), "aten.mm.default", 2.0 * 256**3, 12.0 * 256**2, "fp32", cluster.device(0))
        for cluster in (quick, slow)
    ]
    assert seconds == pytest.approx([2 * 256**3 / 1e9, 6 * 256**3 / 1e9], rel=1e-5)


@pytest.mark.parametrize(
    "rates",
    ['op = "mm"', 'op = "mm"\ndtype = "fp32"\nflops = [1.0]\nbytes = [1.0, 2.0]\nseconds = [1.0]',
     'op = "mm"\ndtype = "fp32"\nflops = [1.0]\nbytes = [1.0]\nseconds = [-1.0]',
     'op = "mm"\ndtype = "fp32"\nflops = ["x"]\nbytes = [1.0]\nseconds = [1.0]'],
)  # fmt: skip
def test_a_hardware_file_with_other_rates_is_refused(rates: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'[[hosts]]\ndevices = "2xCPU"\n[[hosts.rates]]\n{rates}\n')
    with pytest.raises(ShardwrightError, match="rates"):
        parse_hardware(str(path))


def test_names_of_cpus_take_what_was_measured_with_as_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path))
    assert parse_hardware("2xCPU").device(0).rates is None
    with Measurements(cpus_here(2)) as kept:
        kept.put(Row(Case("add", "fp32", "", "1"), 1.0, 12.0, 1e-6))
    assert parse_hardware("2xCPU").device(0).rates is not None
    assert parse_hardware("4xCPU").device(0).rates is None
    with monkeypatch.context() as other:
        other.setenv("OMP_NUM_THREADS", "7")  # of other threads nothing was measured
        assert parse_hardware("2xCPU").device(0).rates is None
    (tmp_path / "measurements.sqlite").write_bytes(b"no database")
    assert parse_hardware("2xCPU").device(0).rates is None
    assert cached_rates(cpus_here(2)) is None
    with pytest.raises(ShardwrightError, match="cannot keep"), Measurements(here("x", 1)):
        pass


def test_a_cache_of_another_program_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "measurements.sqlite"
    sqlite3.connect(path).execute("CREATE TABLE measurements (x TEXT)")
    row = Row(Case("a", "fp32", "", "1"), 1.0, 1.0, 1.0)
    with Measurements(Where("here", "torch", 1), path) as kept:
        for use in (kept.rows, lambda: kept.put(row), lambda: kept.forget([])):
            with pytest.raises(ShardwrightError, match="cannot keep"):
                use()


def test_a_hardware_file_is_one_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / 'a"b.toml'
    write_hardware(Profile(Where("here", "torch", 1), "1xCPU", 1, _rates(), [], 4.0, {}, 8), path)
    assert parse_hardware(str(path)).name == 'a"b'


def _unlike(rank: int) -> str:
    try:
        _refuse_unlike(CPU, [[0], [1, 2]])
    except ShardwrightError as error:
        return error.what
    return ""


def test_hosts_that_are_unlike_are_refused() -> None:
    assert all("unlike" in text for text in run_ranks(2, _unlike))


def _links(rank: int, hosts: list[list[int]]) -> list[MeasuredLink]:
    return measure_links(hosts, CPU)


def test_ranks_agree_on_the_links_of_hosts_and_inside_them() -> None:
    both = run_ranks(2, _links, [[0, 1]])
    assert both[0] == both[1]
    (inside,) = both[0]
    assert inside.hosts == (0, 0) and 0 < inside.latency_s < 1 and 1e5 < inside.bytes_per_s < 1e12
    (between,) = run_ranks(2, _links, [[0], [1]])[0]
    assert between.hosts == (0, 1) and 1e5 < between.bytes_per_s < 1e12


def test_of_many_hosts_each_is_measured_with_a_few() -> None:
    assert len(list(hosts_of([[k] for k in range(4)]))) == 6
    many = list(hosts_of([[k] for k in range(64)]))
    assert len(many) < 64 * 7 and {host for pair in many for host in pair} == set(range(64))


def test_the_command_measures_on_several_processes_and_its_file_plans(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    environment = {**os.environ, "SHARDWRIGHT_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "shardwright", "profile", "--hardware", "2xCPU", "--ops", "add", "-o", str(path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=True)
    document = json.loads(done.stdout)
    assert document["processes"] == 2 and document["failed"] == {} and document["measured"] >= 5
    assert [link["hosts"] for link in document["links"]] == [[0, 0]]
    assert parse_hardware(str(path)).num_devices == 2
    rows = sqlite3.connect(tmp_path / "measurements.sqlite").execute("SELECT COUNT(*) FROM measurements").fetchone()
    assert rows[0] == document["measured"]


@pytest.mark.parametrize(
    "arguments", [["--hardware", "8xH100"], ["--dtypes", "fp31"], ["--ops", "nothing"], ["--hardware", "2x2xCPU"]]
)
def test_what_cannot_be_measured_here_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from shardwright.cli import main

    assert main(["profile", *arguments]) == 2
    assert arguments[1] in capsys.readouterr().err
