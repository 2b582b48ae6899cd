"""Reads the published training runs (a folder of CSV files; not part of the repository) into Run records.

What each framework ran is written down here once per file, from its documentation; rows marked doubtful are left out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from transformer_run import Layout, Software, Transformer

from shardwright.profiler.accelerators import find_link
from shardwright.profiler.cluster import Cluster
from shardwright.profiler.host_groups import find_accelerator, host_group

DOUBTFUL = ("SUSPECT", "WARN", "LOW TRUST", "inconsistent", "STATUS=failed")


@dataclass(frozen=True)
class Run:
    """One published configuration and its measured seconds a step."""

    file: str
    row: int
    label: str
    cluster: Cluster
    model: Transformer
    layout: Layout
    framework: str
    software: Software
    step_s: float


@cache
def _cluster(gpu: str, num_gpus: int, per_host: int, network: str) -> Cluster:
    entry = find_accelerator(gpu)
    per_host = min(num_gpus, per_host)
    hosts = max(1, num_gpus // per_host)
    group = host_group(replace(entry, host_devices=max(entry.host_devices, per_host)), hosts, per_host)
    if network:
        group = replace(group, network=find_link(network))
    return Cluster(f"{hosts}x{per_host}x{gpu}", (group,))


def _gpu(text: str) -> str:
    """Catalog key of a row's GPU."""
    for pattern, key in (
        ("GB200", "GB200-NVL72-186GB"), ("B200", "B200-SXM-180GB"), ("H200", "H200-SXM-141GB"),
        ("H100-9[56]GB", "H100-SXM-96GB"), ("H100-NVL", "H100-NVL-94GB"), ("H100", "H100-SXM-80GB"),
        ("A100-40GB|A100-SXM4-40", "A100-SXM-40GB"), ("A100", "A100-SXM-80GB"), ("V100.*16", "V100-SXM-16GB"),
        ("V100", "V100-SXM-32GB"), ("MI300X", "MI300X-OAM-192GB"), ("MI250X", "MI250X-OAM-64GB"),
        ("L40S", "L40S-PCIE-48GB"),
        ("4090", "RTX4090-PCIE-24GB"),
    ):  # fmt: skip
        if re.search(pattern, text):
            return key
    return ""


def _network(text: str, gpu: str) -> str:
    """Catalog link for a row's interconnect; '' leaves the accelerator's usual one."""
    for pattern, link in (
        (r"EFA 4x100|EFA.*400\s?Gb", "EFA-400"), ("EFA", "EFA-3200"), ("4x100Gb OmniPath", "OmniPath-Shared2"),
        ("1x IB EDR", "InfiniBand-EDR-Shared8"), ("1600Gbps RoCE", "RoCE-200"), ("400Gb/s (RDMA|RoCE)", "RoCE-400"),
        ("RoCE", "RoCE-200" if gpu.startswith("A100") else "RoCE-400"), ("HDR", "InfiniBand-HDR"),
    ):  # fmt: skip
        if re.search(pattern, text):
            return link
    return ""


def _int(row: dict[str, str], key: str, default: int = 0) -> int:
    try:
        return int(float(row[key]))
    except ValueError:
        return default


def _note(row: dict[str, str], key: str) -> str:
    found = re.search(rf"(?:^|;)\s*{key}=([^;]*)", row["notes"])
    return found[1].strip() if found else ""


def _transformer(row: dict[str, str]) -> Transformer | None:
    layers, hidden, heads = _int(row, "layers"), _int(row, "hidden"), _int(row, "heads") or _int(row, "kv_heads")
    if not (layers and hidden):
        return None
    heads = heads or hidden // 128
    gated = "llama" in row["model"].lower() or "qwen" in row["model"].lower() or "mistral" in row["model"].lower()
    return Transformer(
        layers=layers,
        hidden=hidden,
        ffn=_int(row, "ffn_hidden", 4 * hidden) or 4 * hidden,
        heads=heads,
        kv_heads=_int(row, "kv_heads", heads) or heads,
        vocab=_int(row, "vocab", 50304) or 50304,
        seq_len=_int(row, "seq_len"),
        gated=gated,
        tied="tie_embeddings=True" in row["notes"] or not gated,
    )


# What each publisher's framework runs. Flags are from its documentation; dispatch, overlap, overhead and the slowdown
# of its attention kernel are fitted to its rows (benchmarks/costmodel.py --fit steps).
FRAMEWORKS = {
    "nanotron": Software(
        overlap_tp=True, overlap_dp=True,
        dispatch_s=5.2e-05, tp_overlap=0.13, dp_overlap=0.46, step_overhead=0.03,
    ),
    "aleph": Software(
        fused_rotary=False,
        dispatch_s=1e-05, step_overhead=0.1,
    ),
    "foundry": Software(
        rotary=False, overlap_dp=True, grad_bytes=2,
        attention_slowdown=1.5, dp_overlap=0.39, step_overhead=0.039,
    ),
    "titan": Software(
        fused_norm=False, fused_rotary=False, overlap_dp=True,
        tp_overlap=0.34, dp_overlap=0.98, step_overhead=0.038,
    ),
    "nemo": Software(
        overlap_tp=True, overlap_dp=True, blocking_p2p=False, fused_accumulation=True, scattered_p2p=True,
        attention_slowdown=0.72, tp_overlap=0.86, dp_overlap=0.98, step_overhead=0.021,
    ),
    "meta": Software(
        overlap_tp=True, overlap_dp=True, blocking_p2p=False, fused_accumulation=True,
    ),
    "megatron2021": Software(
        attention="unfused", rotary=False, dropout=True, grad_bytes=2, scattered_p2p=True,
        dispatch_s=1e-05, step_overhead=0.013,
    ),
    "deepspeed": Software(
        attention="unfused", rotary=False, dropout=True, grad_bytes=2,
        step_overhead=0.12,
    ),
}  # fmt: skip


def framework_of(file: str, row: dict[str, str]) -> str:
    for prefix, name in (
        ("nanotron", "nanotron"), ("aleph", "aleph"), ("llm_foundry", "foundry"), ("torchtitan", "titan"),
        ("nvidia_nemo", "nemo"), ("paper_llama3", "meta"), ("bigscience", "deepspeed"),
    ):  # fmt: skip
        if file.startswith(prefix):
            return name
    return "nemo" if row["flash_attention"] == "yes" else "megatron2021"


def _software(framework: str, row: dict[str, str]) -> Software:
    fp8 = "8" in row["dtype"].replace("bf16", "").replace("fp16", "")
    dtype = "fp16" if row["dtype"].startswith("fp16") else "bf16"
    base = replace(FRAMEWORKS[framework], dtype=dtype, linear_dtype="fp8" if fp8 else dtype)
    kernel = row["flash_attention"]
    if framework == "aleph":
        attention = "flash" if "flash" in kernel else "unfused"
        return replace(
            base, attention=attention, attention_slowdown=1.6 if "v1" in kernel else 1.0, fused_norm="RMS" in kernel,
            fused_softmax=kernel == "fused",
        )  # fmt: skip
    if framework == "titan":
        return replace(base, compiled=row["compile"] == "yes", overlap_tp="async TP" in row["notes"])
    return base


def _layout(file: str, row: dict[str, str], model: Transformer) -> Layout | None:
    num_gpus = _int(row, "num_gpus")
    tp, pp, cp = _int(row, "tp", 1) or 1, _int(row, "pp", 1) or 1, _int(row, "cp", 1) or 1
    dp = _int(row, "dp") or num_gpus // (tp * pp * cp)
    if dp * tp * pp * cp != num_gpus or not _int(row, "global_batch"):
        return None
    notes = row["notes"]
    zero = 0
    if file.startswith(("llm_foundry", "torchtitan")) or (row["fsdp_shard"] or "0") not in {"0", "1"}:
        zero = 3
    elif _note(row, "zero_stage"):
        zero = int(_note(row, "zero_stage"))
    elif file.startswith(("aleph", "bigscience", "nvidia_nemo")) or (
        file.startswith("megatron") and row["flash_attention"] == "yes"
    ):
        zero = 1
    sequence_parallel = "sequence_parallel=True" in notes or "sequence parallel + " in notes
    if file.startswith(("nanotron", "nvidia_nemo", "torchtitan", "paper_llama3")) or (
        file.startswith("megatron") and row["flash_attention"] == "yes"
    ):
        sequence_parallel = True
    recompute = "full" if row["recompute"].startswith("full") else "none"
    if row["recompute"].startswith("selective") and file.startswith("paper_korthikanti"):
        recompute = "attention"
    elif row["recompute"].startswith("selective"):
        recompute = "half"
    schedule = {"ZB-1p": "zb-1p", "ZB-2p": "zb-2p", "ZB-2p*": "zb-2p", "ZB-V": "zb-2p"}.get(row["schedule"], "1f1b")
    micro = _int(row, "micro_batch", 1) or 1
    return Layout(
        dp=dp, tp=tp, pp=pp, cp=cp, micro_batch=min(micro, max(1, _int(row, "global_batch") // dp)),
        global_batch=_int(row, "global_batch"), zero=zero,
        virtual_stages=_int(row, "vpp", 8 if file.startswith("paper_llama3") else 1) or 1,
        schedule=schedule, recompute=recompute,
        sequence_parallel=sequence_parallel and tp > 1,
    )  # fmt: skip


def _step_s(row: dict[str, str], model: Transformer, layout: Layout, file: str) -> float | None:
    """Published step time; else from tokens/s; else from the publisher's own FLOP formula."""
    if row["step_time_s"]:
        return float(row["step_time_s"])
    if _note(row, "derived_step_time_s"):
        return float(_note(row, "derived_step_time_s"))
    tokens, gpus = layout.global_batch * model.seq_len, _int(row, "num_gpus")
    if row["metric"] == "tokens_per_s_per_gpu":
        return tokens / (float(row["value"]) * gpus)
    if row["metric"] == "mfu" and file.startswith("paper_korthikanti"):
        b, s, h, v = layout.global_batch, model.seq_len, model.hidden, model.vocab
        flops = 72 * b * model.layers * s * h * h * (1 + s / (6 * h) + v / (12 * h * model.layers))
        return flops / (float(row["value"]) * 312e12 * gpus)
    if row["metric"] == "tflops_per_gpu" and file.startswith("paper_llama3"):
        return model.flops_per_token() * tokens / (float(row["value"]) * 1e12 * gpus)
    return None


def read_runs(folder: Path) -> Iterator[Run]:
    """Every usable row of every CSV file of training runs in folder."""
    for path in sorted(folder.glob("*.csv")):
        if path.name.startswith("nccl") or path.stem.endswith(("_oom", "_failed")):
            continue
        with path.open() as file:
            for number, row in enumerate(csv.DictReader(file)):
                run = _read_run(path.stem, number, row)
                if run is not None:
                    yield run


def _read_run(file: str, number: int, row: dict[str, str]) -> Run | None:
    if row["outcome"] != "ok" or any(word in row["notes"] for word in DOUBTFUL):
        return None
    if _int(row, "ep", 1) > 1 or "single layer" in row["model"]:
        return None
    if "LoRA" in row["notes"] or "SFT" in row["notes"]:
        return None
    model, gpu = _transformer(row), _gpu(row["gpu"])
    if model is None or not gpu:
        return None
    layout = _layout(file, row, model)
    if layout is None:
        return None
    step_s = _step_s(row, model, layout, file)
    if step_s is None:
        return None
    per_host = _int(row, "gpus_per_node", 8) or 8
    cluster = _cluster(gpu, _int(row, "num_gpus"), per_host, _network(row["interconnect"], gpu))
    sizes = f"dp{layout.dp} tp{layout.tp} pp{layout.pp} mb{layout.micro_batch}"
    label = f"{row['model']} {row['num_gpus']}x{row['gpu']} {sizes}"
    framework = framework_of(file, row)
    return Run(file, number, label, cluster, model, layout, framework, _software(framework, row), step_s)
