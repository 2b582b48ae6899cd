"""Every sharding rule is true: the shards' results, put together as the rule says, are the whole result."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import Partial, Shard

from shardwright.kernels import ops as kernels
from shardwright.kernels.sharding import SHARDING_RULES, shape_of

RANKS = 2
KEY = kernels.make_key(3, 1, 1, 2)
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _attention_cases():
    for heads, kv_heads, mask_shape, causal, window, p in [
        (4, 4, None, True, 0, 0.0),
        (4, 2, (2, 1, 1, 4), False, 0, 0.0),
        (4, 1, (4, 6, 4), False, 0, 0.3),
        (4, 2, (1, 4, 6, 4), True, 2, 0.3),
        (4, 2, (6, 4), False, 3, 0.0),
        (2, 2, (2, 2, 6, 4), False, 0, 0.0),
    ]:
        query, key, value = randn(2, heads, 6, 8), randn(2, kv_heads, 4, 8), randn(2, kv_heads, 4, 8)
        mask = None if mask_shape is None else randn(*mask_shape)
        rng = (KEY if p else None,)
        options = (0.5, causal, window, p, 1, (2, heads, 6, 4), (0, 0, 0, 0))
        forward = (query, key, value, mask, *rng, *options)
        yield kernels.attention, forward
        out, lse = kernels.attention(*forward)
        for mask_needs_grad in (False, True):
            yield (
                kernels.attention_backward,
                (randn(2, heads, 6, 8), query, key, value, mask, *rng, out, lse, *options, mask_needs_grad),
            )


def cases():
    yield from _attention_cases()
    x, residual, weight = randn(4, 6, 5), randn(4, 6, 5), randn(5)
    box = ((4, 6, 5), (0, 0, 0))
    for op in (kernels.rand_uniform, kernels.rand_normal):
        yield op, (KEY, (4, 6, 5), *box, 1, torch.float64, torch.device("cpu"))
    yield kernels.bernoulli, (x.sigmoid(), KEY, 1, *box)
    yield kernels.dropout, (x, KEY, 0.4, 1, *box)
    yield kernels.rms_norm, (x, weight, 1e-5, True)
    yield kernels.add_rms_norm, (x, residual, weight, 1e-5, False)
    _, sum, rstd = kernels.add_rms_norm(x, residual, weight, 1e-5, False)
    for grad_sum in (randn(4, 6, 5), None):
        yield kernels.add_rms_norm_backward, (randn(4, 6, 5), grad_sum, sum, rstd, weight, False)


def cut(tensor, place, rank):
    if isinstance(place, Shard):
        return tensor.chunk(RANKS, place.dim)[rank]
    if isinstance(place, Partial):
        return tensor * (0.25 + 0.5 * rank)
    return tensor


def local_args(op, args, row, num_outputs, rank):
    """What a rewriting pass does: cut the operands, and tell random operators where the shard lies."""
    names = [argument.name for argument in op._schema.arguments]
    places = iter(row[num_outputs:])
    local = {
        name: cut(a, next(places), rank) if isinstance(a, torch.Tensor) else a
        for name, a in zip(names, args, strict=True)
    }
    offset, whole = ("offset", "global_shape") if "offset" in local else ("rng_offset", "rng_shape")
    if offset in local and isinstance(row[0], Shard):
        dim, shape = row[0].dim, local[whole]
        chunk = -(-shape[dim] // RANKS)  # uneven shards follow torch.chunk
        local[offset] = [rank * chunk if d == dim else 0 for d in range(len(shape))]
        if "local_shape" in local:
            size = min(chunk, shape[dim] - rank * chunk)
            local["local_shape"] = [size if d == dim else n for d, n in enumerate(shape)]
    assert next(places, None) is None, "a placement for every tensor operand and no more"
    return list(local.values())


def together(parts, place):
    if isinstance(place, Shard):
        return torch.cat(parts, place.dim)
    if isinstance(place, Partial):
        return sum(parts)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


CASES = list(cases())


@pytest.mark.parametrize("op,args", CASES, ids=[f"{op.name()}-{i}" for i, (op, _) in enumerate(CASES)])
def test_every_row_of_the_table_gives_the_whole_result(op, args):
    want = op(*args)
    want = want if isinstance(want, tuple) else (want,)
    rows = SHARDING_RULES[op](args, {}, want)
    assert len(rows) == len(set(rows)) > 1
    assert all(place is None or place.is_replicate() for place in rows[0])
    for row in rows:
        shards = []
        for rank in range(RANKS):
            got = op(*local_args(op, args, row, len(want), rank))
            shards.append(got if isinstance(got, tuple) else (got,))
        for place, w, *parts in zip(row, want, *shards, strict=False):
            assert (w is None) == (place is None)
            if w is not None:
                torch.testing.assert_close(together(parts, place), w, rtol=1e-12, atol=1e-12)


def test_causal_rows_are_not_split_and_grouped_heads_split_evenly():
    def splits(heads, kv_heads, causal):
        q, k = (2, heads, 6, 8), (2, kv_heads, 6, 8)
        rows = SHARDING_RULES[kernels.attention](
            (q, k, k, None, None, 1.0, causal, 0, 0.0, 0, None, None), {}, (q, q[:3])
        )
        return {row[0].dim: row.even for row in rows if isinstance(row[0], Shard)}

    assert splits(6, 6, True) == {0: False, 1: False}
    assert splits(6, 3, True) == {0: False, 1: True}
    assert splits(6, 1, False) == {0: False, 1: False, 2: False}


def test_every_operator_of_the_folder_has_a_rule():
    ours = {op for op in vars(kernels).values() if isinstance(op, torch._ops.OpOverload)}
    assert ours == set(SHARDING_RULES)


def test_shapes_come_from_nodes_tensors_and_tuples():
    node = torch.fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(2, 3)
    assert shape_of(node) == shape_of(torch.empty(2, 3)) == shape_of((2, 3)) == (2, 3)
