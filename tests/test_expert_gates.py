"""Experts that differ between their two products, or in how their weights lie: each is shardwright::expert_mlp."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from shardwright import Workload
from shardwright.planner.sharding.expert_costs import most_experts
from shardwright.profiler.capture import capture
from shardwright.profiler.expert_ops import expert_mlp_flops
from shardwright.profiler.experts import _activation_of, experts_forward
from shardwright.profiler.gates import gate_of, traced_gate

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER = 6, 2, 3, 4, 2
expert_mlp = torch.ops.shardwright.expert_mlp


def _clamped(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[..., ::2].clamp(max=0.7), both[..., 1::2].clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(1.7 * gate))


def _squared(both: torch.Tensor) -> torch.Tensor:
    return F.relu(both).square()


def _written_in_place(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate).mul_(2.0) * up.tanh()


def _cast_to_integers(both: torch.Tensor) -> torch.Tensor:
    return both * (both > 0).to(torch.int64) + both.to(torch.int32)


def _with_rows_made(both: torch.Tensor) -> torch.Tensor:
    return both + torch.zeros(both.shape[0], both.shape[1], dtype=both.dtype, device=both.device)


GATES = [(_clamped, 2 * INNER), (_squared, INNER), (_written_in_place, 2 * INNER)]
OTHERS = [
    F.glu, F.relu6, F.hardtanh, F.mish, F.softplus, F.leaky_relu, F.elu, F.celu, F.hardswish, F.hardsigmoid,
    F.logsigmoid, F.softshrink, F.hardshrink, F.tanhshrink, _cast_to_integers, _with_rows_made,
]  # fmt: skip


def _larger_half(both: torch.Tensor) -> torch.Tensor:
    return torch.maximum(*both.chunk(2, -1))


ALL_GATES = [*GATES, *((function, 4) for function in (*OTHERS, _larger_half))]


@pytest.mark.parametrize(("function", "width"), ALL_GATES, ids=[f.__name__ for f, _ in ALL_GATES])
def test_a_gate_is_text_that_computes_the_same_forward_and_backward(function: Callable, width: int) -> None:
    text = traced_gate(function, width, torch.float64)
    assert text is not None
    both = torch.randn(7, width, dtype=torch.float64, requires_grad=True)
    expected = function(both)
    grad = torch.randn_like(expected)
    product, found = gate_of(text).backward(both.detach(), grad)
    assert torch.equal(gate_of(text).forward(both.detach()), expected)
    assert torch.equal(product, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, both, grad)[0], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    "function",
    [
        lambda both: both * both.mean(0),  # rows of other tokens
        lambda both: both.clamp_(max=1.0),  # the rows that the backward reads
        lambda both: both * torch.ones(4, device=both.device, dtype=both.dtype).cumsum(0),
        lambda both: F.dropout(both, 0.5),
        lambda both: both.sum(),
        lambda both: both if both.max() > 1 else -both,
        lambda both: both * float(both.shape[0]),
        lambda both: both * both.shape[0],
        lambda both: both / both.shape[0] ** 0.5,
        lambda both: both * 2 if both.shape[0] > 100 else both,
        lambda both: both * 2 if both.shape[0] == 1 else both,
        lambda both: both * 2 if both.shape[0] % 2 else both,
        lambda both: both[:, : both.shape[0]],
        lambda both: F.glu(both, 0),
        lambda both: both * {}["scale"],  # type: ignore[index]
        lambda both: both * float("no number"),
    ],
    ids=[
        "batch",
        "in place",
        "other op",
        "random",
        "shape",
        "decision",
        "rows as a number",
        "rows",
        "root of rows",
        "many rows",
        "one row",
        "odd rows",
        "as many columns",
        "halves of rows",
        "KeyError",
        "ValueError",
    ],
)
def test_what_is_no_function_of_each_row_alone_is_not_taken_for_one(function: Callable) -> None:
    assert traced_gate(function, 4, torch.float64) is None


def _operands(width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    index = torch.randint(-1, EXPERTS + 1, (TOKENS, CHOICES), generator=generator)
    experts = [real(EXPERTS, width, HIDDEN), real(EXPERTS, HIDDEN, INNER), real(EXPERTS, width), real(EXPERTS, HIDDEN)]
    return [real(TOKENS, HIDDEN), index, real(TOKENS, CHOICES), *experts]


@pytest.mark.parametrize("has_biases", [True, False])
@pytest.mark.parametrize(("function", "width"), GATES[:2], ids=["clamped", "ungated"])
def test_gradients_of_any_gate_with_and_without_biases(function: Callable, width: int, has_biases: bool) -> None:
    text, operands = traced_gate(function, width, torch.float64), _operands(width)
    op = expert_mlp.bias if has_biases else expert_mlp.default
    assert torch.autograd.gradcheck(lambda *a: op(*a, text)[0], operands if has_biases else operands[:5])


def test_registrations_with_biases_agree() -> None:
    torch.library.opcheck(expert_mlp.bias, (*_operands(2 * INNER), "silu"))
    shapes = [tuple(t.shape) for t in _operands(INNER)]
    assert expert_mlp_flops(*shapes) == TOKENS * CHOICES * 4 * INNER * HIDDEN


SMALL = {"num_hidden_layers": 1, "vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8,
         "num_key_value_heads": 1, "max_position_embeddings": 16, "num_experts_per_tok": 2}  # fmt: skip
GPT_OSS = {"num_local_experts": 4, "intermediate_size": 8, "sliding_window": 4,
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
NEMOTRON = {"layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "moe_intermediate_size": 8,
            "moe_shared_expert_intermediate_size": 8, "intermediate_size": 16, "n_group": 1, "topk_group": 1,
            "mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 4, "n_groups": 1}  # fmt: skip


def _experts(name: str, options: dict[str, Any]) -> Any:
    """The experts of a family, as they stand in its model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **options)
    module = getattr(transformers, f"{name}ForCausalLM")(config).double()
    found = next(m for m in module.modules() if hasattr(m, "down_proj") and getattr(m.down_proj, "ndim", 0) == 3)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    found.limit = 1.0  # of a clamped gate, so that it is reached
    return found


@pytest.mark.parametrize(
    ("name", "options"), [("GptOss", GPT_OSS), ("NemotronH", NEMOTRON)], ids=["GptOss", "NemotronH"]
)
def test_families_compute_what_their_own_loop_over_experts_computes(name: str, options: dict[str, Any]) -> None:
    module = _experts(name, options)
    hidden, weight = torch.randn(6, 16).double().requires_grad_(), torch.rand(6, 2).double().requires_grad_()
    index = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    module.config._experts_implementation = "eager"
    ways = [module(hidden, index, weight), experts_forward(module, hidden, index, weight)]
    read = [hidden, weight, *module.parameters()]
    grads = [torch.autograd.grad(out.sin().sum(), read) for out in ways]
    for expected, found in zip((ways[0], *grads[0]), (ways[1], *grads[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "options"), [("GptOss", GPT_OSS), ("NemotronH", NEMOTRON)], ids=["GptOss", "NemotronH"]
)
def test_families_with_gates_of_their_own_have_experts_that_an_axis_can_split(name: str, options: Any) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**SMALL, **options)
        model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
        ids = torch.zeros(2, 8, dtype=torch.long)
    graph = capture(Workload(model=model, example_batch={"input_ids": ids, "labels": ids}, global_batch=2))
    assert most_experts(graph) == 4


def test_a_norm_behind_each_expert_stays_a_grouped_product() -> None:
    module = SimpleNamespace(has_post_expert_norm=True, gate_up_proj=torch.zeros(1))
    from shardwright.profiler.experts import _weights_of

    assert _weights_of(module) is None


def test_an_activation_with_parameters_is_not_taken_for_text() -> None:
    scale = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    module = SimpleNamespace(has_gate=False, act_fn=lambda x: x * scale)
    assert _activation_of(module, 4, torch.float64) is None
