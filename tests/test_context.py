"""The context axis: each sequence cut over ranks, attention exact, gradients summed, the loss counted once."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import workload_of
from forked import fork_ranks
from torch import fx, nn

import shardwright
from shardwright import api
from shardwright.errors import ShardwrightError
from shardwright.kernels.ops import attention, attention_backward, make_key
from shardwright.passes.attention_ring import steps
from shardwright.passes.attention_rows import attention_rows, attention_rows_backward, pieces
from shardwright.passes.build import build_segment_programs
from shardwright.passes.redistribute import Emitter, MeshAxis
from shardwright.planner.space.candidates import enumerate_candidates, widest_sequence_axis
from shardwright.planner.space.choices import Choices
from shardwright.plans.document import Plan
from shardwright.profiler.batches import resize_batch

pytestmark = pytest.mark.usefixtures("shared_captures")
SEQ_LEN = 12


class Attention(nn.Module):
    """heads: of queries; pairs of them share one of keys. kind: what a query sees."""

    def __init__(self, kind: str, width: int = 8, heads: int = 8) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.q, self.kv, self.o = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.heads // 2, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        mask = None if seen is None else seen[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.kind == "causal", enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, kind: str, length: int = SEQ_LEN, width: int = 8) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(16, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(Attention(kind, width) for _ in range(2))
        self.head = nn.Linear(width, 16)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor, seen: torch.Tensor | None = None) -> Any:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x), seen)
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), logits


@functools.cache
def _workload(kind: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """What is planned here is captured once, for the ranks too."""
    return _new_workload(kind)


def _new_workload(kind: str, length: int = SEQ_LEN, width: int = 8) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = {name: torch.randint(16, (4, length)) for name in ("ids", "labels")}
    batch["labels"][1, :7] = -100
    if kind == "padded":
        batch["seen"] = torch.arange(length)[None, :] >= torch.tensor([[0], [3], [7], [1]])
    return workload_of(Model(kind, length, width), batch), batch


def _step(rank: int, kind: str, plan: str) -> Any:
    workload, batch = _workload(kind)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    loss = program.forward_backward(program.shard_batch(batch))
    return loss.item(), program.gradients()


def _outputs(rank: int, plan: str) -> Any:
    workload, batch = _workload("full")
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    part = program.shard_batch(batch)
    return program.evaluate(part).item(), [out[1] for out in program.outputs(part)]


def _planned(kind: str, num_devices: int, force: dict[str, Any]) -> Plan:
    workload, _ = _workload(kind)
    return shardwright.plan(workload, f"{num_devices}xCPU", force={"prefer": "memory", **force}, self_test=False)


def _assert_as_on_one_device(kind: str, plan: Plan) -> None:
    results = fork_ranks(plan.mesh.num_devices, _step, kind, plan.to_json())
    workload, batch = _new_workload(kind)
    expected, _ = workload.model(**batch)
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


@pytest.mark.parametrize(("form", "ranks"), [("ulysses", 2), ("ring", 3)])
def test_each_form_of_attention_is_exact(form: str, ranks: int) -> None:
    _assert_as_on_one_device("causal", _planned("causal", ranks, {"cp": ranks, "attention": form}))


def test_causal_work_of_a_ring_is_balanced() -> None:
    def pairs(rank: int, ranks: int, part: int = 8) -> int:
        """Queries with keys that they see, over all steps."""
        seen = 0
        for piece in steps(MeshAxis("cp", ranks, rank, ""), 2 * ranks * part, causal=True):
            rows, keys = len(piece.rows), len(piece.keys)  # type: ignore[union-attr]
            seen += rows * (rows + 1) // 2 if piece.causal else rows * keys  # type: ignore[union-attr]
        return seen

    for ranks in (2, 3, 8, 64):
        tokens = 16 * ranks
        work = [pairs(rank, ranks) for rank in range(ranks)]
        assert sum(work) == tokens * (tokens + 1) // 2 and max(work) <= 1.03 * sum(work) / ranks


def test_what_a_model_returns_is_whole_on_every_rank() -> None:
    results = fork_ranks(2, _outputs, _planned("full", 2, {"cp": 2}).to_json())
    workload, batch = _new_workload("full")
    with torch.no_grad():
        loss, logits = workload.model.eval()(**batch)
    for evaluated, outputs in results:
        assert evaluated == pytest.approx(loss.item(), rel=1e-9)
        torch.testing.assert_close(torch.cat(outputs), logits, rtol=1e-9, atol=1e-12)


def test_a_ring_of_all_keys_is_exact() -> None:
    _assert_as_on_one_device("full", _planned("full", 2, {"cp": 2, "attention": "ring"}))


@pytest.mark.parametrize(("form", "kind"), [("gather", "causal"), ("ulysses", "causal"), ("ring", "full")])
def test_each_form_of_attention_moves_the_bytes_of_its_paper(form: str, kind: str) -> None:
    length, width = 8192, 2048
    with torch.device("meta"):
        model = Model(kind, length, width)
    batch = {name: torch.zeros(4, length, dtype=torch.int64) for name in ("ids", "labels")}
    workload = workload_of(model, batch)
    plan = shardwright.plan(workload, "4xH100", force={"cp": 4, "attention": form}, self_test=False)
    queries = 2 * length * width * 8  # of both blocks, float64; each key head serves two of queries
    moved = _attention_bytes(plan, workload)
    if form == "gather":  # keys and values, and their gradients
        assert moved == {("forward", "all_gather"): queries, ("backward", "reduce_scatter"): queries}
    elif form == "ring":  # blocks of keys and values n - 1 times, with their gradients, which go n times
        assert moved == {("forward", "send"): 3 * queries // 4, ("backward", "send"): 7 * queries // 4}
    else:  # queries, keys, values and results, and the gradient of each; and results again, of which one form is kept
        each = 3 * queries
        assert moved == {("forward", "all_to_all"): each, ("backward", "all_to_all"): each + queries}


def _attention_bytes(plan: Plan, workload: Any) -> dict[tuple[str, str], int]:
    """(phase, kind) -> bytes of the whole tensors that collectives of cp move, as counted in the programs of a rank.
    What goes with the loss is left out."""
    graph = api._capture_for_running(resize_batch(workload, plan.microbatch.size), plan.fusions)
    axes = {name: MeshAxis(name, plan.mesh.shape.size(name), 0, name) for name in plan.placement_axes}
    programs = build_segment_programs(graph, plan, axes, torch.device("cpu"))
    found: Counter[tuple[str, str]] = Counter()
    for instance in graph.instances[:-1]:
        for one in programs[instance.segment].collectives:
            if one.axis == "cp" and one.kind != "all_reduce":
                found[one.phase, one.kind] += one.num_bytes
    return dict(found)


def test_a_form_that_heads_do_not_divide_for_is_refused() -> None:
    with pytest.raises(ShardwrightError, match="attention=ulysses does not go with cp=3") as caught:
        _planned("causal", 3, {"cp": 3, "attention": "ulysses"})
    assert caught.value.exit_code == 4
    with pytest.raises(ShardwrightError, match="no sequence is cut"):
        _planned("causal", 2, {"attention": "ulysses"})


@pytest.mark.parametrize(
    "force",
    [
        {"cp": 2, "dp": 2, "zero": 3},
        {"cp": 4},
        {"cp": 2, "tp": 2, "attention": "ring"},
        {"cp": 2, "pp": 2},
    ],
    ids=str,
)
def test_it_goes_with_the_other_axes(force: dict[str, Any]) -> None:
    _assert_as_on_one_device("causal", _planned("causal", 4, force))


def test_microbatches_of_several_sequences_are_refused() -> None:
    workload, _ = _workload("causal")
    with pytest.raises(ShardwrightError, match="microbatch=2") as caught:
        shardwright.plan(workload, "2xCPU", force={"cp": 2, "microbatch": 2}, self_test=False)
    assert caught.value.exit_code == 4 and "microbatch=1" in caught.value.works


def test_widths_of_the_context_axis_are_tried_where_sequences_are_long() -> None:
    def widths(tokens: int) -> set[int]:
        most = widest_sequence_axis(tokens, 8)
        found = enumerate_candidates(Choices(), 8, 8, 4, max_tensor=8, max_sequence=most)
        return {candidate.mesh.sequence_ranks for candidate in found}

    assert widths(8192) == {1} and widths(16384) == {1, 2, 4} and widths(131072) == {1, 2, 4, 8}


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
