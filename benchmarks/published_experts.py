"""Published runs of mixtures of experts beside what the planner says: the published layout forced, and its own choice.

    python benchmarks/published_experts.py ROWS.csv [--only NAME] [--forced] [--write]

ROWS.csv: model, config, hardware, precision, layout, global_batch, seq_len, measured, unit, memory_gib, source. Each
plan is made in a process of its own. --forced leaves out the planner's own choices, which take longer. --write puts the
table in benchmarks/results/experts.md.

What a row does not say is in RUNS: the model's configuration, the software, the types of training state (NeMo Automodel
keeps all of it in bfloat16). Where a layout is one that the planner has no axis for, that is said in the row.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "experts.md"
QWEN3 = {"model_type": "qwen3_moe", "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "vocab_size": 151936, "norm_topk_prob": True, "tie_word_embeddings": False,
         "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
                              "num_attention_heads": 32, "moe_intermediate_size": 768},
    "Qwen3-235B-A22B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
                                "num_attention_heads": 64, "moe_intermediate_size": 1536},
    "DeepSeek-V3": {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
                    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
                    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
                    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
                    "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4,
                    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
                    "vocab_size": 129280, "tie_word_embeddings": False},
    "gpt-oss-20B": {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
                    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
                    "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
                    "tie_word_embeddings": False},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """force: the published layout. batch: sequences of a step, where the row has none. unlike: what is said
    otherwise."""

    force: str
    stack: str
    state: str = "fp32"
    batch: int = 0
    unlike: str = ""


START = "import sys; from shardwright.cli import main; sys.exit(main(sys.argv[1:]))"
MEGATRON, FSDP = "megatron+cudnn", "torchtitan_eager+cudnn"
# (model, layout of the row) -> run
RUNS = {
    ("Qwen3-30B-A3B", "tp1 pp1 ep16 mbs1"): Run("pp=1 tp=1 dp=16 ep=16 microbatch=1", MEGATRON),
    ("Qwen3-30B-A3B", "fsdp8 ep8"): Run("pp=1 tp=1 dp=8 ep=8 zero=3", FSDP, "bf16"),
    ("DeepSeek-V3", "tp1 pp4 vp8 ep64"): Run(
        "pp=4 tp=1 ep=64 microbatch=1", FSDP, "bf16", unlike="cuts are the planner's"
    ),
    ("Qwen3-235B-A22B", "tp2 pp8 vp4 ep32"): Run(
        "pp=8 tp=2 ep=16 microbatch=1",
        MEGATRON,
        unlike="ep=16, each rank's experts cut over tp=2 besides: no ep over tp",
    ),
    ("gpt-oss-20B", "fsdp8"): Run("pp=1 tp=1 dp=8 ep=1 zero=3", FSDP, "bf16", batch=512),
}  # fmt: skip


def planned(row: dict[str, str], run: Run, *, forced: bool) -> dict[str, Any] | str:
    """The plan, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(CONFIGS[row["model"]] | {"max_position_embeddings": int(row["seq_len"])}))
        options = [
            "--hardware",
            row["hardware"],
            "--global-batch",
            str(batch_of(row, run)),
            "--seq-len",
            row["seq_len"],
        ]
        options += ["--stack", run.stack, "--state-dtype", run.state]
        options += [o for choice in run.force.split() for o in ("--force", choice)] if forced else []
        done = subprocess.run(
            [sys.executable, "-c", START, "plan", f"hf:{config}", *options, "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        return (done.stderr or done.stdout).strip().splitlines()[0][:160]
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def batch_of(row: dict[str, str], run: Run) -> int:
    return int(row["global_batch"] or run.batch)


def measured_s(row: dict[str, str], run: Run) -> float:
    value = float(row["measured"])
    if row["unit"] == "s/step":
        return value
    hosts, per_host, _ = row["hardware"].split("x", 2)
    return batch_of(row, run) * int(row["seq_len"]) / value / (int(hosts) * int(per_host))


def shown(plan: dict[str, Any] | str) -> tuple[str, str, str]:
    """(step seconds, peak GiB, layout)"""
    if isinstance(plan, str):
        return "", "", plan
    predicted, zero = plan["predicted"], plan["zero"]
    layout = " ".join(f"{axis}{size}" for axis, size in plan["mesh"].items() if size > 1)
    peak_gib = max(predicted["peak_bytes"]) / 2**30
    return f"{predicted['step_s']:.2f}", f"{peak_gib:.1f}", f"{layout} zero{zero} mbs{plan['microbatch']['size']}"


def table(rows: list[dict[str, str]], *, free: bool) -> str:
    out = io.StringIO()
    head = ["model", "hardware", "published layout", "measured s", "forced s", "off", "measured GiB", "forced GiB"]
    head += ["own choice s", "own choice GiB", "own choice"] if free else []
    for line in ([*head, "said otherwise"], ["---"] * (len(head) + 1)):
        print(f"| {' | '.join(line)} |", file=out)
    for row in rows:
        run = RUNS[row["model"], row["layout"]]
        seconds, (forced_s, forced_gib, why) = measured_s(row, run), shown(planned(row, run, forced=True))
        off = f"{float(forced_s) / seconds - 1:+.1%}" if forced_s else why
        cells = [row["model"], row["hardware"], row["layout"], f"{seconds:.2f}", forced_s, off]
        cells += [row["memory_gib"], forced_gib, *(shown(planned(row, run, forced=False)) if free else ())]
        print(f"| {' | '.join([*cells, run.unlike])} |", file=out, flush=True)
        print(out.getvalue().splitlines()[-1], file=sys.stderr, flush=True)
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--only", default="", help="rows whose model has this in its name")
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with args.rows.open() as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["layout"]) in RUNS]
    text = table([row for row in rows if args.only in row["model"]], free=not args.forced)
    print(text)
    if args.write:
        RESULTS.write_text(
            f"# Mixtures of experts, published and planned\n\n`benchmarks/published_experts.py`.\n\n{text}"
        )


if __name__ == "__main__":
    main()
