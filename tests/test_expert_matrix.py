"""Program and single-device model agree in float64 on mixtures of experts of several families, on an expert axis.

`make test-all` runs every family on every layout and in both forms; else a few of them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from compared import assert_same_numbers, compared, plan_once
from matrix import cells

_SIZES = {"num_hidden_layers": 2, "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8,
          "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2, "intermediate_size": 8,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
_SCAN = {"mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 1}
_ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 8, "topk_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 8},
    "deepseek_v3": {**_LATENT, **_ROUTED, "head_dim": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                    "n_group": 2},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "olmoe": {"num_experts": 4},
    "nemotron_h": {**_ROUTED, **_SCAN, "n_group": 1, "moe_shared_expert_intermediate_size": 8,
                   "layers_block_type": ["attention", "moe"]},
}  # fmt: skip
CLASSES = {
    "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe", "deepseek_v3": "DeepseekV3", "gpt_oss": "GptOss", "olmoe": "Olmoe",
    "nemotron_h": "NemotronH",
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep=2": {"dp": 2, "ep": 2},
    "ep=4 zero=1": {"dp": 4, "ep": 4, "zero": 1},
    "ep=4 zero=3": {"dp": 4, "ep": 4, "zero": 3},
    "ep=2 tp=2": {"dp": 2, "ep": 2, "tp": 2, "prefer": "memory"},
    "pp=2 ep=2": {"pp": 2, "dp": 2, "ep": 2, "schedule": "1f1b"},
    "pp=2 ep=2 zb_v": {"pp": 2, "dp": 2, "ep": 2, "schedule": "zb_v"},
}
FEW = [("gpt_oss", "ep=2", "dispatch"), ("nemotron_h", "ep=2", "dispatch")]


_EVERY = [
    (family, layout, form)
    for family in FAMILIES
    for layout in LAYOUTS
    for form in ("dispatch", "gather")
    if not (family == "nemotron_h" and "pp" in layout)  # two layers of different kinds
]


@pytest.mark.parametrize(("family", "layout", "form"), cells(_EVERY, FEW))
def test_a_family_computes_what_it_computes_on_one_device(family: str, layout: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / f"{family}.json"
    architectures = [f"{CLASSES[family]}ForCausalLM"]
    path.write_text(json.dumps(_SIZES | FAMILIES[family] | {"model_type": family, "architectures": architectures}))
    force = {**LAYOUTS[layout], "experts": form}
    layers = {"overrides": {"num_hidden_layers": 4}} if layout.endswith("zb_v") else {}
    spec = {"model": f"hf:{path}", "global_batch": 8, "seq_len": 6, **layers}
    if "pp" in force:
        force["global_microbatch"] = 2
    processes = math.prod(force.get(axis, 1) for axis in ("pp", "dp", "tp"))
    plan = plan_once(spec, f"{processes}xCPU", force)
    assert plan.mesh.ep == force["ep"]
    assert_same_numbers(compared(plan, tmp_path))
