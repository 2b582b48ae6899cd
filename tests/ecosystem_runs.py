"""Runs the examples of other libraries' clients with and without Shardwright, and prints the losses as JSON.

Started by tests/test_ecosystem.py, alone and under torchrun: one interpreter for all, since each import takes seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

NAMES = ("plain_loop", "lora", "fabric", "trainer")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "ecosystem"))
    found = {}
    for name in sys.argv[2:] or NAMES:
        example = importlib.import_module(name)
        found[name] = {"plain": example.train(plain=True), "ours": example.train(plain=False)}
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
