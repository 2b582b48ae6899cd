"""Your own training loop over a planned program.

    torchrun --nproc-per-node 4 examples/train_llama.py --steps 20

Rank 0 plans and the others receive the plan; each rank builds its part and passes its own part of each batch.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import shardwright
from shardwright.data import batch_source

TEXT = Path(__file__).parent / "text" / "founding.txt"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="preset:demo-llama")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--hardware", default=f"{os.environ.get('WORLD_SIZE', '1')}xCPU", help="such as 8xH100-80GB")
    parser.add_argument("--save-plan", metavar="PATH")
    args = parser.parse_args()

    shardwright.join_torchrun(args.hardware)  # gloo for CPUs, NCCL for GPUs
    workload = shardwright.load_workload(args.model, global_batch=args.global_batch, precision="float32")
    plan = shardwright.plan(workload, args.hardware)
    program = shardwright.build(plan, workload)

    rank = int(os.environ.get("RANK", "0"))
    batches = batch_source(workload, TEXT)
    for step in range(args.steps):
        part = program.shard_batch(batches(step))
        loss = program.step(part)  # forward, backward, optimizer; the same loss on every rank
        if rank == 0:
            print(f"step {step:>3}  loss {loss.item():.4f}", flush=True)

    if args.save_plan and rank == 0:
        plan.save(args.save_plan)


if __name__ == "__main__":
    main()
