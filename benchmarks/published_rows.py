"""Reads published training runs (a folder of CSV files; not part of the repository) into Row records.

What a row ran is said as the planner's own terms: a transformers configuration, a cluster of the catalog, a software
stack, and forced choices. What a publisher's software does and its rows do not say is written down once in HABITS, from
its documentation. A row that cannot be said so carries the reason.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOUBTFUL = ("SUSPECT", "WARN", "LOW TRUST", "inconsistent", "derived from a digitised", "single layer")
EXPERTS = re.compile(r"moe|-a\d+b|deepseek|gpt.oss|mixtral|A22B", re.IGNORECASE)
NARROW = re.compile(r"fp8|float8|fp4|mxfp", re.IGNORECASE)
TUNING = re.compile(r"\b(LoRA|SFT)\b|finetun", re.IGNORECASE)


@dataclass(frozen=True)
class Model:
    """kind: llama or gpt. eager: attention as its formula writes it, with its scores in memory. dropout: after
    attention and each half of a layer. fused_norm: one kernel for each norm."""

    kind: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int
    tied: bool
    eager: bool = False
    dropout: bool = False
    fused_norm: bool = True

    def config(self, layers: int) -> dict[str, Any]:
        """Of transformers, with another number of layers."""
        if self.kind == "gpt":
            drop = 0.1 if self.dropout else 0.0
            return {
                # projections apart, as tensor ranks cut the publishers' own by heads; softmax in the scores' dtype
                "model_type": "biogpt",
                "hidden_size": self.hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": self.heads,
                "intermediate_size": self.ffn,
                "vocab_size": self.vocab,
                "max_position_embeddings": self.seq_len,
                "attention_probs_dropout_prob": 0.0 if not self.eager else drop,
                "hidden_dropout_prob": drop,
                "activation_dropout": 0.0,
                "layerdrop": 0.0,
                "hidden_act": "gelu",  # one kernel, as the publishers' own
                "tie_word_embeddings": self.tied,
            }
        return {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }

    @property
    def layer_params(self) -> int:
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return 2 * h * h + 2 * h * kv + (3 if self.kind == "llama" else 2) * h * self.ffn

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, attention at the half that is causal."""
        dense = 6 * (self.layers * self.layer_params + self.vocab * self.hidden)
        return dense + self.layers * 6 * self.seq_len * self.hidden

    @property
    def megatron_flops_per_token(self) -> float:
        """By the formula of Megatron's papers (arXiv:2104.04473, section 3), without recomputation."""
        h, s, n, v = self.hidden, self.seq_len, self.layers, self.vocab
        return 72 * n * h * h * (1 + s / (6 * h) + v / (12 * h * n))


@dataclass(frozen=True)
class Where:
    """network: a link of the catalog; "" is the accelerator's usual one."""

    gpu: str
    num_gpus: int
    per_host: int
    network: str = ""


@dataclass
class Row:
    """One published run. force: as `--force`. sums: dtype in which gradients are kept and summed. left_out: why it
    cannot be predicted. unlike: what it ran that is said by something near it. quiet: for sweeps on shared networks."""

    source: str
    number: int
    name: str
    outcome: str
    gpu: str
    num_gpus: int
    model: Model | None = None
    where: Where | None = None
    stack: str = "shardwright"
    compute: str = "bfloat16"
    sums: str = "float32"
    global_batch: int = 0
    force: dict[str, str] = field(default_factory=dict)
    even_stages: int = 0
    measured_s: float | None = None
    measured_gib: float | None = None
    quiet: bool = True
    left_out: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Layouts within it are ranked against each other."""
        length = self.model.seq_len if self.model else 0
        return f"{self.source} {self.name} {length} tokens {self.num_gpus}x{self.gpu}"

    @property
    def layout(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.force.items() if key != "cuts")


@dataclass(frozen=True)
class Habits:
    """Of one source. zero: stage. sums: dtype of gradients, "" for that of compute. sequence: are norms and residuals
    split over the tensor axis? even: layers in equal numbers on stages."""

    stack: str
    zero: int = 0
    sums: str = "float32"
    sequence: bool = True
    eager: bool = False
    dropout: bool = False
    even: bool = True


# By the beginning of a file's name.
HABITS = {
    "aleph": Habits("scaling", zero=1, sums="", sequence=False),
    "bigscience": Habits("deepspeed", zero=1, sums="", sequence=False, eager=True, dropout=True),
    "dlperf": Habits("megatron_2021", sums="", sequence=False, eager=True, dropout=True),
    "llm_foundry": Habits("llm_foundry", zero=3),
    "megatron": Habits("megatron_2021", sums="", sequence=False, eager=True, dropout=True),
    "nanotron": Habits("nanotron", even=False),
    "nvidia_nemo": Habits("megatron", zero=1),
    "paper_korthikanti": Habits("megatron_2021", sums="", sequence=False, eager=True, dropout=True),
    "paper_llama3": Habits("megatron", zero=2),
    "paper_zero_bubble": Habits(
        "megatron_2021", sums="", eager=True, dropout=True
    ),  # memory as published has scores in it
    "torchtitan": Habits("torchtitan_eager", zero=3),
    "vtrain": Habits("megatron_2021", sums="", sequence=False, eager=True, dropout=True),
}
USUAL = Habits("megatron", zero=1)
GPUS = (
    ("GB300|B300|MI35", ""),
    ("GB200", "GB200-NVL72-186GB"),
    ("B200", "B200-SXM-180GB"),
    ("H200", "H200-SXM-141GB"),
    ("H100-9[56]GB", "H100-SXM-96GB"),
    ("H100-NVL", "H100-NVL-94GB"),
    ("H100|H800", "H100-SXM-80GB"),
    ("A100-40GB|A100-SXM4-40", "A100-SXM-40GB"),
    ("A100|A800", "A100-SXM-80GB"),
    ("V100.*16", "V100-SXM-16GB"),
    ("V100", "V100-SXM-32GB"),
    ("MI300X", "MI300X-OAM-192GB"),
    ("MI250X", "MI250X-OAM-64GB"),
)
NETWORKS = (
    (r"EFA 4x100|EFA.*400\s?Gb", "EFA-400"),
    ("EFA", "EFA-3200"),
    ("4x100Gb OmniPath", "OmniPath-Shared2"),
    ("1x IB EDR", "InfiniBand-EDR-Shared8"),
    ("1600Gbps RoCE", "RoCE-200"),
    ("400Gb/s (RDMA|RoCE)", "RoCE-400"),
    ("RoCE", "RoCE"),
    ("HDR", "InfiniBand-HDR"),
)
SCHEDULES = {"ZB-1p": "zb_h1", "ZB-2p": "zb_h2", "ZB-2p*": "zb_h2", "ZB-V": "zb_v", "v-half": "v_half",
             "v-min": "v_min", "zbv": "zb_v", "gpipe": "gpipe"}  # fmt: skip
VTRAIN = {"# GPUs": "num_gpus", "global batch": "global_batch", "micro batch": "micro_batch", "hidden size": "hidden",
          "attention heads": "heads", "# layers": "layers", "sequence length": "seq_len", "tensor parallelism": "tp",
          "data parallelism": "dp", "pipeline parallelism": "pp"}  # fmt: skip


def habits_of(source: str) -> Habits:
    return next((habits for start, habits in HABITS.items() if source.startswith(start)), USUAL)


def read_rows(folder: Path, only: str = "") -> Iterator[Row]:
    """All rows of the tables of training runs in folder, those left out among them."""
    for path in sorted(folder.glob("*.csv")):
        if only and not path.stem.startswith(only):
            continue
        with path.open(encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns = table.fieldnames or []
            if "# GPUs" in columns:
                table_rows = [_vtrain_row(row) for row in table]
            elif "outcome" in columns:
                table_rows = list(table)
            else:
                continue
        for number, row in enumerate(table_rows):
            yield read_row(path.stem, number, row)


def _vtrain_row(row: dict[str, str]) -> dict[str, str]:
    """In the other tables' columns."""
    found = {name: row[column] for column, name in VTRAIN.items()}
    seconds = str(float(row["iteration time (ms)"]) / 1e3)
    name = f"GPT {found['layers']}x{found['hidden']}"
    return found | {"model": name, "gpu": "A100-40GB", "outcome": "ok", "step_time_s": seconds, "dtype": "fp16"}


class _Cells:
    """A row's cells, with what is missing as "" or 0."""

    def __init__(self, row: dict[str, str]) -> None:
        self.row = row

    def __getitem__(self, name: str) -> str:
        return self.row.get(name) or ""

    def number(self, name: str, default: int = 0) -> int:
        try:
            return int(float(self[name]))
        except ValueError:
            return default

    def note(self, name: str) -> str:
        found = re.search(rf"(?:^|;)\s*{name}=([^;]*)", self["notes"])
        return found[1].strip() if found else ""


def read_row(source: str, number: int, cells: dict[str, str]) -> Row:
    """left_out names all that stands in the way."""
    row, habits = _Cells(cells), habits_of(source)
    out = Row(source, number, row["model"], row["outcome"], row["gpu"], row.number("num_gpus"), stack=habits.stack)
    if "STATUS=failed" in row["notes"]:
        out.outcome = "failed"
    out.left_out += _not_expressible(row)
    out.model = _model(source, row, habits)
    out.where = _where(row)
    if out.model is None:
        out.left_out.append("sizes of the model not published")
    if out.where is None:
        out.left_out.append("GPU not in the catalog")
    if out.model is None or out.where is None:
        return out
    out.compute = "float16" if row["dtype"].startswith("fp16") else "bfloat16"
    out.sums = _sums(source, row, habits, out.compute)
    out.global_batch = row.number("global_batch")
    if not out.global_batch:
        out.left_out.append("global batch not published")
    if source.startswith("torchtitan") and row["compile"] == "yes":
        out.stack = "torchtitan_compiled"
    _force(source, row, habits, out)
    if out.outcome == "ok" and out.global_batch:
        out.measured_s = _measured_s(source, row, out.model, out.global_batch)
    out.measured_gib = float(row["memory_gib"]) if row["memory_gib"] else None
    if out.outcome == "ok" and out.measured_s is None and out.measured_gib is None:
        out.left_out.append("step time not published")
    out.quiet = source != "nanotron_ultrascale_h100" or _is_quiet(out)
    return out


def _not_expressible(row: _Cells) -> list[str]:
    found = []
    if row.number("ep", 1) > 1 or EXPERTS.search(row["model"]):
        found.append("sizes of experts are not read from tables")
    if NARROW.search(row["dtype"]):
        found.append("fp8 or fp4 products")
    if row["dtype"] == "unknown":
        found.append("data type not published")
    if TUNING.search(row["notes"] + row["model"]):
        found.append("fine-tuning")
    if "offload" in row["recompute"] or "act_cpu_offload=True" in row["notes"]:
        found.append("activations in host memory")
    if any(word in row["notes"] + row["model"] for word in DOUBTFUL):
        found.append("marked as doubtful")
    return found


def _model(source: str, row: _Cells, habits: Habits) -> Model | None:
    layers, hidden = row.number("layers"), row.number("hidden")
    if not layers or not hidden or not row.number("seq_len"):
        return None
    name = row["model"].lower()
    kind = "llama" if any(word in name for word in ("llama", "qwen", "mistral", "internlm")) else "gpt"
    heads = row.number("heads") or row.number("kv_heads") or max(1, hidden // 128)
    if hidden % heads:
        heads = max(1, hidden // 128)
    kernel = row["flash_attention"]
    eager = (habits.eager and kernel != "yes") or kernel in ("torch", "fused")
    if _again_only_attention(source, row):
        eager = False  # neither keeps scores
    vocab = row.number("vocab") or (51200 if source.startswith(("paper", "vtrain", "megatron")) else 50304)
    return Model(
        kind=kind,
        layers=layers,
        hidden=hidden,
        ffn=row.number("ffn_hidden") or 4 * hidden,
        heads=heads,
        kv_heads=heads if kind == "gpt" else row.number("kv_heads") or heads,
        vocab=vocab,
        seq_len=row.number("seq_len"),
        tied=(kind == "gpt" and "untied embeddings" not in row["notes"]) or "tie_embeddings=True" in row["notes"],
        eager=eager,
        dropout=habits.dropout and kernel != "yes",
        fused_norm=not source.startswith("aleph") or "RMS" in kernel,
    )


def _where(row: _Cells) -> Where | None:
    gpu = next((name for pattern, name in GPUS if re.search(pattern, row["gpu"])), "")
    if not gpu or not row.number("num_gpus"):
        return None
    network = next((link for pattern, link in NETWORKS if re.search(pattern, row["interconnect"])), "")
    if network == "RoCE":
        network = "RoCE-200" if gpu.startswith("A100") else "RoCE-400"
    num_gpus = row.number("num_gpus")
    return Where(gpu, num_gpus, min(num_gpus, row.number("gpus_per_node") or 8), network)


def _sums(source: str, row: _Cells, habits: Habits, compute: str) -> str:
    if source.startswith("llm_foundry"):
        return "float32" if "mp_mode=DEFAULT" in row["notes"] else compute
    if source.startswith("bigscience") and compute == "bfloat16":
        return "float32"
    if source.startswith("megatron") and row["flash_attention"] == "yes":
        return "float32"
    return habits.sums or compute


def _force(source: str, row: _Cells, habits: Habits, out: Row) -> None:
    assert out.model is not None
    tp, pp, cp = (row.number(name, 1) or 1 for name in ("tp", "pp", "cp"))
    dp = row.number("dp") or max(1, out.num_gpus // (tp * pp * cp))
    if dp * tp * pp * cp != out.num_gpus:
        out.left_out.append("layout does not multiply to the number of GPUs")
    steps = row.note("acc_steps")
    micro = row.number("micro_batch") or (out.global_batch // dp // int(steps) if steps else 0)
    if not micro:
        out.left_out.append("microbatch not published")
        return
    micro = max(1, min(micro, out.global_batch // dp))
    out.force = {"pp": str(pp), "dp": str(dp), "tp": str(tp), "optimizer_state": "device"}
    zero, extent = _zero(source, row, habits, dp)
    out.force |= {"zero": str(zero), "microbatch": str(micro)}
    if zero:
        out.force["zero_extent"] = str(extent)
    if tp > 1:
        out.force |= _tensor_force(source, row, habits)
    if cp > 1:
        out.force["cp"] = str(cp)
    out.force["recompute"] = _recompute(row, out)
    if pp > 1:
        _force_schedule(source, row, habits, out, pp)
    if out.stack == "scaling" and not out.model.fused_norm:
        out.stack = "scaling_unfused"
    if "flash_attentionv1" in row["flash_attention"]:
        out.stack += "+flash1"


def _tensor_force(source: str, row: _Cells, habits: Habits) -> dict[str, str]:
    """All cut weights over the tensor axis, where small models need not."""
    said = "sequence_parallel=True" in row["notes"] or "sequence parallel +" in row["notes"]
    if (
        habits.sequence
        or said
        or _again_only_attention(source, row)
        or (source.startswith("megatron") and row["flash_attention"] == "yes")
    ):
        return {"prefer": "memory"}
    return {"prefer": "state", "sequence_parallel": "off"}


def _zero(source: str, row: _Cells, habits: Habits, dp: int) -> tuple[int, int]:
    """(stage, ranks that split state)."""
    shard = row.number("fsdp_shard")
    stage = int(row.note("zero_stage") or habits.zero)
    if source.startswith("llm_foundry") and "SHARD_GRAD_OP" in row["notes"]:
        stage = 2
    if source.startswith("megatron") and row["flash_attention"] == "yes":
        stage = 1
    return (stage if dp > 1 else 0), (shard if 1 < shard < dp and dp % shard == 0 else dp)


def _again_only_attention(source: str, row: _Cells) -> bool:
    return source.startswith("paper_korthikanti") and row["recompute"].startswith("selective")


def _recompute(row: _Cells, out: Row) -> str:
    if row["recompute"].startswith("full"):
        return "all"
    if _again_only_attention(out.source, row):
        out.unlike.append("recomputes attention's scores: a fused kernel, which does too")
        out.stack = "megatron"
        return "none"
    if row["recompute"].startswith("selective"):
        return "selective"
    if not out.source.startswith("vtrain") and row["recompute"] in ("", "not stated", "not stated (recipe)"):
        out.unlike.append("recomputation not stated: none")
    return "none"


def _force_schedule(source: str, row: _Cells, habits: Habits, out: Row, pp: int) -> None:
    assert out.model is not None
    text, chunks = row["schedule"], row.number("vpp", 1) or 1
    if "vocab" in text or "interlaced" in text:
        out.left_out.append("vocabulary over pipeline ranks")
        return
    schedule = SCHEDULES.get(text, "1f1b")
    if schedule in ("zb_v", "v_half", "v_min"):
        chunks = 2
    elif text == "1F1B-I":
        schedule, chunks = "interleaved_1f1b", max(2, round((out.model.layers + 2) / pp))
    elif source.startswith("paper_llama3"):
        schedule, chunks = "interleaved_1f1b", 8
    elif chunks > 1:
        schedule = "interleaved_1f1b"
    elif "nterleaved" in text:
        out.left_out.append("virtual stages not published")
    out.force["schedule"] = schedule
    if chunks > 1:
        out.force["virtual_stages"] = str(chunks)
    if habits.even:
        out.even_stages = pp * chunks


def _measured_s(source: str, row: _Cells, model: Model, global_batch: int) -> float | None:
    """Published step time; else from tokens/s; else from the publisher's own formula of FLOPs."""
    published = row["step_time_s"] or row.note("derived_step_time_s")
    if published:
        return float(published)
    tokens, gpus = global_batch * model.seq_len, row.number("num_gpus")
    if not row["value"]:
        return None
    value = float(row["value"])
    if row["metric"] == "tokens_per_s_per_gpu":
        return tokens / (value * gpus)
    if row["metric"] == "mfu" and source.startswith("paper_korthikanti"):
        return model.megatron_flops_per_token * tokens / (value * 312e12 * gpus)
    if row["metric"] == "tflops_per_gpu" and source.startswith("paper_llama3"):
        return model.flops_per_token * tokens / (value * 1e12 * gpus)
    return None


def _is_quiet(row: Row) -> bool:
    """The nanotron sweep ran on a shared network, where steps of one layout vary by factors of ten and more: with
    tensor parallelism across hosts, and in pipelines over many hosts, under ZeRO-0, or with four and more
    tensor-parallel ranks. No model of a healthy network gives that."""
    hosts = math.ceil(row.num_gpus / 8)
    pp, dp, tp = (int(row.force.get(name, "1")) for name in ("pp", "dp", "tp"))
    if pp > 1:
        return hosts <= 8 and tp <= 2 and (row.force.get("zero") == "1" or dp == 1)
    return hosts <= 32 and tp <= 8
