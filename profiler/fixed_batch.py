"""A model that takes batches of one size alone: where a capture at another size fails, that is what is said."""

from __future__ import annotations

from ..errors import ExitCode, ShardwrightError
from .capture import CANNOT_CAPTURE, export_step
from .inputs import example_batch_size
from .workload import Workload


def refuse_fixed_batch(workload: Workload, tried: int, error: ShardwrightError) -> None:
    """error: of a capture at `tried` samples. Raises another where the model is traced at its example batch's size."""
    own = example_batch_size(workload)
    if own == tried or not error.what.startswith(CANNOT_CAPTURE):
        return
    try:
        export_step(workload)
    except ShardwrightError:
        return
    reason = error.what.removeprefix(CANNOT_CAPTURE).lstrip(": ")
    raise ShardwrightError(
        f"{workload.name} takes batches of {own} samples alone; of {tried}: {reason}",
        means=f"microbatches and ranks have parts of a batch, so plans are made at other sizes too; {error.means}",
        change="that line: sizes that follow from the batch that is given",
        works="x.reshape(x.shape[0], -1) in place of numbers that hold for one batch",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    ) from error
