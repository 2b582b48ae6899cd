"""Where nothing fits, what is named fits: first on the hardware at hand, then on other hardware."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planner_fakes import LLAMA_8B, Case, Sizes

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.workload import OptimizerSpec, Precision

pytestmark = pytest.mark.usefixtures("shared_captures")

LOW = Precision(torch.bfloat16, torch.bfloat16, torch.bfloat16)
OPTIONS = {
    "--state-dtype bf16": {"precision": LOW},
    "--optimizer SGD": {"optimizer": OptimizerSpec("SGD", torch.optim.SGD, {}, 0)},
}


def refusal(case: Case, **force: object) -> ShardwrightError:
    case.workload = replace(case.workload, spec={"seq_len": case.sizes.seq})
    with pytest.raises(ShardwrightError) as caught:
        case.search(**force)
    assert caught.value.exit_code == ExitCode.DOES_NOT_FIT
    return caught.value


def follow(text: str, sizes: Sizes, hardware: str, batch: int) -> None:
    """Plan the job that a part of the advice names."""
    kept: dict[str, object] = {}
    for option, settings in OPTIONS.items():
        if option in text:
            text = text.replace(option, "").strip()
            kept.update(settings)
    if text.startswith("--seq-len"):
        sizes = replace(sizes, seq=int(text.split()[1]))
    elif text.startswith("--hardware"):
        hardware = text.split()[1]
    else:
        assert not text
    Case(sizes, hardware, batch, **kept).search()


@pytest.mark.parametrize(
    ("sizes", "hardware", "first"),
    [
        (LLAMA_8B, "1xH200", "--state-dtype bf16"),
        (LLAMA_8B, "2xRTX4090", "--seq-len 4096 --state-dtype bf16 --optimizer SGD"),
        (Sizes(16, 2048, 8192, 512, 32000, 131072), "1xA100-40GB", "--seq-len"),
    ],
)
def test_what_is_named_fits_on_this_hardware_and_then_on_other(sizes, hardware, first):
    error = refusal(Case(sizes, hardware, 8, knows_host=False))
    parts = error.works.split(", or ")
    assert parts[0].startswith(first) and parts[-1].startswith("--hardware "), error.works
    for part in parts:
        follow(part, sizes, hardware, 8)
