"""One rank of what shardwright/launch.py starts: reads its task, does it, and reports events from rank 0.

python -m shardwright.worker TASK.json      (under torchrun's environment)
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from .errors import ExitCode, ShardwrightError

COLLECTIVE_TIMEOUT_S = 300.0


class Reporter:
    """Adds one JSON line for each event to the file that the launcher follows. Only rank 0 speaks."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / "events" if rank == 0 else None

    def __call__(self, **event: Any) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(event) + "\n")


def main(task_path: str) -> int:
    task = json.loads(Path(task_path).read_text())
    folder = Path(task["folder"])
    rank = int(os.environ["RANK"])
    if not task["debug"]:
        warnings.simplefilter("ignore")
    try:
        _run(task, folder, rank)
        return ExitCode.DONE
    except Exception as error:
        record: dict[str, Any] = {"time": time.time()}
        if isinstance(error, ShardwrightError):
            parts = {name: getattr(error, name) for name in ("what", "means", "change", "works")}
            record |= {**parts, "exit_code": int(error.exit_code)}
        temporary = folder / f"error-{rank}.partial"
        temporary.write_text(json.dumps(record))
        temporary.rename(folder / f"error-{rank}.json")
        traceback.print_exc()
        return ExitCode.INTERNAL


def _run(task: dict[str, Any], folder: Path, rank: int) -> None:
    import random

    import numpy as np
    import torch
    import torch.distributed as dist

    from .devices import join_torchrun
    from .plans.document import Plan
    from .tasks import TASKS

    for seed in (random.seed, torch.manual_seed, np.random.seed):  # a factory draws the same on every rank
        seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    device = join_torchrun(
        Plan.load(task["plan"]) if "plan" in task else task["hardware"],
        init_method=f"file://{folder / 'ranks'}",  # a file, so that nothing listens beyond the loopback interface
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    try:
        TASKS[task["task"]](task, device, Reporter(folder, rank))
    except BaseException:
        # Others may be waiting for this rank: destroying the group would wait for them. The launcher ends them.
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own exit may wait for collectives that will never end
