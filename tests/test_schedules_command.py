"""shardwright schedule: JSON that can be simulated again, the chart, and mistakes that name what would work."""

from __future__ import annotations

import io
import json

import pytest

from shardwright import cli
from shardwright.costmodel.stage_times import Hop, StageTimes
from shardwright.errors import ExitCode
from shardwright.gantt import render_gantt
from shardwright.render import make_console
from shardwright.schedules import PipelineSchedule, one_f_one_b

SMALL = ("schedule", "--ranks", "4", "--microbatches", "6", "--time-limit", "0.5")


def run_main(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_json_has_the_order_and_its_figures(capsys):
    code, out, err = run_main(
        capsys, *SMALL, "--chunks", "2", "--times", "1,1.4,0.6", "--transfer", "0.1", "--memory", "3", "--json"
    )
    assert code == 0 and not err
    document = json.loads(out)
    schedule = PipelineSchedule.from_judge(document)
    schedule.check()
    share = 1 / document["v"]
    stages = [StageTimes(1.0 * share, 1.4 * share, 0.6 * share, activation_bytes=1)] * schedule.num_stages
    timeline = schedule.simulate(stages, Hop.latency(0.1))
    assert timeline.makespan_s == pytest.approx(document["makespan"])
    assert timeline.bubble_fraction == pytest.approx(document["bubble_fraction"])
    assert max(timeline.peak_bytes) * share == document["peak_memory"] <= 3
    assert document["lower_bound"] <= document["makespan"] + 1e-9
    assert document["gap_fraction"] == pytest.approx(1 - document["lower_bound"] / document["makespan"])
    assert document["seconds"] > 0 and document["name"]


@pytest.mark.parametrize(
    ("name", "makespan"), [("1f1b", 27.0), ("gpipe", 27.0), ("zb-v", 19.5), ("ZB-H1", 21.0), ("interleaved", 22.5)]
)
def test_published_schedules_are_evaluated_by_name(capsys, name, makespan):
    code, out, _ = run_main(capsys, *SMALL, "--name", name, "--json")
    assert code == 0 and json.loads(out)["makespan"] <= makespan


def test_auto_is_no_slower_than_a_published_schedule(capsys):
    options = ("--times", "1,1.4,0.6", "--transfer", "0.1", "--stage-extra", "0.15,0.4", "--memory", "4", "--json",
               "--time-limit", "20")  # fmt: skip
    best = {}
    for name in ("auto", "1f1b", "zb-v", "zb-h1", "v-half"):
        code, out, _ = run_main(capsys, *SMALL, *options, "--name", name)
        assert code == 0
        best[name] = json.loads(out)["makespan"]
    assert best["auto"] < min(makespan for name, makespan in best.items() if name != "auto")


@pytest.mark.parametrize("placement", ["loop", "v", "0,1,2,3,3,2,0,1"])
def test_a_placement_can_be_asked_for(capsys, placement):
    code, out, _ = run_main(capsys, *SMALL, "--placement", placement, "--json")
    ranks = {"loop": [0, 1, 2, 3] * 2, "v": [0, 1, 2, 3, 3, 2, 1, 0]}
    wanted = ranks.get(placement) or [int(rank) for rank in placement.split(",")]
    assert code == 0 and json.loads(out)["stage_rank"] == wanted


def test_the_chart_shows_every_rank_and_what_the_letters_mean(capsys):
    code, out, _ = run_main(capsys, *SMALL, "--name", "zb-v", "--gantt")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [["rank", str(rank)] for rank in range(4)]
    for fact in ("F0", "I0", "W0", "forward", "input gradients", "weight gradients", "idle", "makespan 19.5"):
        assert fact in out, fact


@pytest.mark.parametrize("width", [20, 60, 200])
def test_the_chart_fits_any_width_and_has_colours(width):
    timeline = one_f_one_b(3, 5).simulate([StageTimes(1.0, 1.0, 1.0)] * 3)
    file = io.StringIO()
    console = make_console(file=file, width=width)
    console.print(render_gantt(timeline, width))
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    bars = [line.split(maxsplit=2)[2] for line in lines[:3]]
    assert bars[2].startswith(".") and not bars[0].startswith(".")  # the last rank waits for its first input
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system="standard").print(render_gantt(timeline, width))
    assert "\x1b[" in file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        (("--memory", "0.5"), ExitCode.DOES_NOT_FIT, "--memory 1"),
        (("--name", "1f1b", "--memory", "2"), ExitCode.DOES_NOT_FIT, "--memory 4"),
        (("--name", "zb-w"), ExitCode.USAGE, "--name zb_v"),
        (("--name", "zb-v", "--chunks", "1"), ExitCode.USAGE, "--chunks 2"),
        (("--name", "zb-v", "--placement", "loop"), ExitCode.USAGE, "--placement auto"),
        (("--times", "1,2"), ExitCode.USAGE, "--times 1,1.4,0.6"),
        (("--times", "0,0,0"), ExitCode.USAGE, "--times 1,1.4,0.6"),
        (("--times", "a,b,c"), ExitCode.USAGE, "--times 1,1.4,0.6"),
        (("--transfer", "-1"), ExitCode.USAGE, "--transfer 0.1"),
        (("--transfer", "inf"), ExitCode.USAGE, "--transfer 0.1"),
        (("--stage-extra", "0.4"), ExitCode.USAGE, "--stage-extra 0.15,0.4"),
        (("--memory", "nan"), ExitCode.USAGE, "--memory 4"),
        (("--placement", "0,1,9,3"), ExitCode.USAGE, "--placement 0,1,2,3,3,2,1,0"),
        (("--placement", "0,1,2"), ExitCode.USAGE, "multiple of 4"),
        (("--microbatches", "10000000"), ExitCode.USAGE, "--microbatches 41666"),
        (("--ranks", "0"), ExitCode.USAGE, "--ranks"),
        (("--json", "--gantt"), ExitCode.USAGE, "not allowed with"),
    ],
)
def test_mistakes_name_what_would_work(capsys, arguments, exit_code, expected):
    code, out, err = run_main(capsys, *SMALL, *arguments)
    assert code == exit_code and not out
    assert err.startswith("error: ") and expected in err and "Traceback" not in err, err
