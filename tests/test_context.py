"""The context axis: each sequence cut over ranks, attention exact, gradients summed, the loss counted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import workload_of
from distributed import run_ranks
from torch import fx, nn

import shardwright
from shardwright.errors import ShardwrightError
from shardwright.kernels.ops import attention, attention_backward, make_key
from shardwright.passes.attention_rows import attention_rows, attention_rows_backward, pieces
from shardwright.passes.redistribute import Emitter, MeshAxis
from shardwright.plans.document import Plan

SEQ_LEN = 12


class Attention(nn.Module):
    """heads: of queries; pairs of them share one of keys. kind: what a query sees."""

    def __init__(self, kind: str, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.q, self.kv, self.o = nn.Linear(8, 4 * heads), nn.Linear(8, 4 * heads), nn.Linear(4 * heads, 8)

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.heads // 2, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        mask = None if seen is None else seen[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "causal", enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, kind: str, heads: int = 4) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(16, 8), nn.Embedding(SEQ_LEN, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.blocks = nn.ModuleList(Attention(kind, heads) for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x), seen)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def _workload(kind: str, heads: int = 4) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = {name: torch.randint(16, (4, SEQ_LEN)) for name in ("ids", "labels")}
    batch["labels"][1, :7] = -100
    if kind == "padded":
        batch["seen"] = torch.arange(SEQ_LEN)[None, :] >= torch.tensor([[0], [3], [7], [1]])
    return workload_of(Model(kind, heads), batch), batch


def _step(rank: int, kind: str, plan: str) -> Any:
    workload, batch = _workload(kind)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    loss = program.forward_backward(program.shard_batch(batch))
    return loss.item(), program.gradients()


def _planned(kind: str, num_devices: int, force: dict[str, Any]) -> Plan:
    workload, _ = _workload(kind)
    return shardwright.plan(workload, f"{num_devices}xCPU", force={"prefer": "memory", **force}, self_test=False)


def _assert_as_on_one_device(kind: str, plan: Plan) -> None:
    results = run_ranks(plan.mesh.num_devices, _step, kind, plan.to_json())
    workload, batch = _workload(kind)
    expected = workload.model(**batch)
    expected.backward()
    for loss, gradients in results:
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, parameter in workload.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def _rows_of(plan: Plan, start: str, axis: str = "cp") -> list[str]:
    at = plan.placement_axes.index(axis)
    return [row[at] for rows in plan.placements.values() for key, row in rows.items() if key.startswith(start)]


@pytest.mark.parametrize("kind", ["causal", "full", "padded"])
def test_a_cut_sequence_gives_the_numbers_of_one_device(kind: str) -> None:
    plan = _planned(kind, 2, {"cp": 2})
    _assert_as_on_one_device(kind, plan)
    assert all(row.startswith("S(2)") for row in _rows_of(plan, "attention"))
    products = [row for row in _rows_of(plan, "mm") + _rows_of(plan, "addmm") if "->" in row]
    assert 2 * sum("S(" in row for row in products) > len(products)
    assert set(_rows_of(plan, "param_grad")) == {"P"} and set(_rows_of(plan, "param_")) <= {"R", "P"}


@pytest.mark.parametrize(
    "force",
    [{"cp": 2, "dp": 2, "zero": 1}, {"cp": 2, "dp": 2, "zero": 3}, {"cp": 4}, {"cp": 2, "tp": 2}, {"cp": 2, "pp": 2}],
    ids=str,
)
def test_it_goes_with_the_other_axes(force: dict[str, Any]) -> None:
    _assert_as_on_one_device("causal", _planned("causal", 4, force))


def test_microbatches_of_several_sequences_are_refused() -> None:
    workload, _ = _workload("causal")
    with pytest.raises(ShardwrightError, match="microbatch=2") as caught:
        shardwright.plan(workload, "2xCPU", force={"cp": 2, "microbatch": 2}, self_test=False)
    assert caught.value.exit_code == 4 and "microbatch=1" in caught.value.works


# --------------------------------------------------------------------------- attention of some rows


def _graph_of(op: Any, arguments: list[Any]) -> fx.Node:
    """A captured node of the op."""
    graph = fx.Graph()

    def node_of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        placeholder = graph.placeholder(f"x{len(graph.nodes)}")
        placeholder.meta["val"] = value
        return placeholder

    node = graph.call_function(op, tuple(map(node_of, arguments)))
    node.meta["val"] = op(*arguments)
    return node


def _local(lowering: Any, node: fx.Node, arguments: list[Any], axis: MeshAxis) -> list[Any]:
    """What one rank's program of the op gives."""
    graph = fx.Graph()
    given = [a for a in arguments if isinstance(a, torch.Tensor)]
    local = [graph.placeholder(f"x{k}") if isinstance(a, torch.Tensor) else a for k, a in enumerate(arguments)]
    results = lowering(Emitter(graph), node, local, axis)
    graph.output(tuple(r for r in results if r is not None))
    return list(fx.GraphModule(nn.Module(), graph)(*given))


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 3), (True, 7), (False, 4), (True, 1)])
@pytest.mark.parametrize("mask", [None, "bool", "rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_rows_of_attention_are_those_of_the_whole(causal: bool, window: int, mask: str | None, dropout: float) -> None:
    torch.manual_seed(0)
    num, ranks = 10, 3
    q, grad = (torch.randn(2, 4, num, 4, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(2, 2, num, 4, dtype=torch.float64) for _ in range(2))
    key = make_key(0, 0, 0, 0) if dropout else None
    masks = {"bool": torch.arange(num) >= torch.tensor([[[[2]]], [[[0]]]]), "rows": torch.randn(num, num).double()}
    given = None if mask is None else masks[mask]
    shape = [2, 4, num, num] if dropout else None

    def options(start: int) -> list[Any]:
        return [0.5, causal, window, dropout, 1, shape, [0, 0, start, 0] if dropout else None]

    whole = [q, k, v, given, key, *options(0)]
    node = _graph_of(attention, whole)
    out, lse = node.meta["val"]
    back = _graph_of(attention_backward, [grad, *whole[:5], out, lse, *whole[5:], False])
    parts = []
    for rank in range(ranks):
        cut = slice(4 * rank, min(4 * rank + 4, num))
        own = given[cut] if mask == "rows" and given is not None else given
        local = [q[:, :, cut], k, v, own, key, *options(cut.start)]
        axis = MeshAxis("cp", ranks, rank, "")
        mine = _local(attention_rows, node, local, axis)
        given_back = [grad[:, :, cut], *local[:5], out[:, :, cut], lse[:, :, cut], *local[5:], False]
        parts.append((mine, _local(attention_rows_backward, back, given_back, axis)))
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([mine[0] for mine, _ in parts], 2), out, **close)
    torch.testing.assert_close(torch.cat([grads[0] for _, grads in parts], 2), back.meta["val"][0], **close)
    for j in (1, 2):
        torch.testing.assert_close(sum(grads[j] for _, grads in parts), back.meta["val"][j], **close)


def test_a_window_leaves_a_corner_of_the_keys_before() -> None:
    own, corner = pieces(100, 50, 400, causal=True, window=8, masked=False)
    assert own.keys == range(100, 150) and corner.rows == range(7) and corner.keys == range(93, 100)
    assert len(pieces(0, 50, 400, causal=True, window=8, masked=False)) == 1
