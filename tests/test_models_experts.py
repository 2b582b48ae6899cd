"""shardwright::expert_mlp against transformers' own loop over experts, and how it splits."""

from __future__ import annotations

import pytest
import torch
import transformers

from shardwright import Workload
from shardwright.planner.sharding.expert_costs import most_experts
from shardwright.profiler import experts
from shardwright.profiler.capture import capture
from shardwright.profiler.expert_ops import ACTIVATIONS, expert_mlp_flops
from shardwright.profiler.models import load_workload

expert_mlp = torch.ops.shardwright.expert_mlp
TOKENS, CHOICES, EXPERTS, HIDDEN, INNER = 6, 2, 4, 5, 3


def operands(low: int = 0, high: int = EXPERTS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    index = torch.randint(low, high, (TOKENS, CHOICES), generator=generator)
    experts = [real(EXPERTS, 2 * INNER, HIDDEN), real(EXPERTS, HIDDEN, INNER)]
    return [real(TOKENS, HIDDEN), index, real(TOKENS, CHOICES), *experts]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation: str) -> None:
    args = operands(-1, EXPERTS + 1)  # choices of experts that are elsewhere add nothing
    assert torch.autograd.gradcheck(lambda *a: expert_mlp(*a, activation)[0], args)


def test_operator_registrations_agree() -> None:
    torch.library.opcheck(expert_mlp.default, (*operands(), "silu"))


def test_experts_split_over_ranks_sum_to_the_whole_and_tokens_split_freely() -> None:
    hidden, index, weight, gate_up, down = operands()
    whole, _ = expert_mlp(hidden, index, weight, gate_up, down, "silu")
    halves = [
        expert_mlp(hidden, index - first, weight, gate_up[first : first + 2], down[first : first + 2], "silu")[0]
        for first in (0, 2)
    ]
    assert torch.allclose(sum(halves), whole, rtol=0, atol=1e-12)
    rows = [expert_mlp(hidden[r], index[r], weight[r], gate_up, down, "silu")[0] for r in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(torch.cat(rows), whole, rtol=0, atol=1e-12)


def test_the_backward_computes_gate_and_up_again_where_they_were_not_kept() -> None:
    args = [t.detach() for t in operands()]
    out, pre = expert_mlp(*args, "silu")
    backward = torch.ops.shardwright.expert_mlp_backward
    kept, again = backward(out, *args, pre, "silu"), backward(out, *args, None, "silu")
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(kept, again, strict=True))


def test_flops_are_those_of_the_chosen_experts() -> None:
    shapes = [tuple(t.shape) for t in operands()]
    assert expert_mlp_flops(*shapes) == TOKENS * CHOICES * (2 * 2 * INNER * HIDDEN + 2 * HIDDEN * INNER)


def test_a_mixture_is_captured_without_data_dependent_shapes() -> None:
    pytest.importorskip("transformers")
    from shardwright.profiler.attention_interface import shardwright_attention

    workload = load_workload("preset:tiny-mixtral")
    with shardwright_attention(workload.model):
        program = torch.export.export(workload.model, (), dict(workload.example_batch), strict=False)
    targets = [str(n.target) for n in program.graph.nodes]
    assert targets.count("shardwright.expert_mlp.default") == 2


def test_a_mixture_has_the_numbers_of_the_loop_over_experts() -> None:
    pytest.importorskip("transformers")
    from shardwright.profiler.attention_interface import shardwright_attention
    from shardwright.profiler.initial_values import materialize
    from shardwright.profiler.reference_dtype import widened

    real = materialize(load_workload("preset:tiny-mixtral", precision="fp64", batch_size=3))
    real.model.set_experts_implementation("eager")
    with widened(real.model):
        real.model(**real.example_batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in real.model.named_parameters()}
    real.model.zero_grad()
    with shardwright_attention(real.model):
        real.model(**real.example_batch).loss.backward()
    for name, parameter in real.model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-13), name


def test_a_grouped_matmul_counts_its_tokens_in_whole_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch.histc does on GPUs alone. Experts that our operator cannot say stay a grouped matmul."""
    monkeypatch.setattr(experts, "_weights_of", lambda module: None)
    config = transformers.GptOssConfig(
        num_hidden_layers=1, num_local_experts=4, vocab_size=32, hidden_size=16, intermediate_size=8, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4, num_experts_per_tok=2,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config).bfloat16()
        ids = torch.zeros(2, 4, dtype=torch.long)
    graph = capture(Workload(model=model, example_batch={"input_ids": ids, "labels": ids}, global_batch=2))
    counts = [
        n for s in graph.segments.values() for n in s.joint.graph.nodes if n.target is torch.ops.aten.histc.default
    ]
    assert counts and all(n.meta["val"].shape == (4,) and n.meta["val"].dtype == torch.int32 for n in counts)


SMALL = {"num_hidden_layers": 2, "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 32, "num_experts_per_tok": 2}  # fmt: skip
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "moe_intermediate_size": 8, "intermediate_size": 16, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DeepseekV3", {**LATENT, **ROUTED, "n_group": 2, "topk_group": 1}),
        ("Glm4Moe", {**ROUTED, "head_dim": 8, "n_group": 1, "topk_group": 1}),
        ("GraniteMoe", {"num_local_experts": 4, "intermediate_size": 8}),
        ("Qwen3Moe", {"num_experts": 4, "head_dim": 8, "moe_intermediate_size": 8, "intermediate_size": 16}),
    ],
)
def test_families_of_mixtures_have_experts_that_an_axis_can_split(name: str, options: dict[str, int]) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**SMALL, **options)
        model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
        ids = torch.zeros(2, 8, dtype=torch.long)
    graph = capture(Workload(model=model, example_batch={"input_ids": ids, "labels": ids}, global_batch=2))
    assert most_experts(graph) == 4
