"""Without sequence parallelism tensor ranks hold whole what lies between the products that they cut.

The oracle is Korthikanti et al. (arXiv:2205.05198, section 4): of a layer's s b h values, those that are kept for the
backward are the sum of a part that is whole on every tensor rank and a part that is divided by their number; with
sequence parallelism all of it is divided.
"""

from __future__ import annotations

import pytest
import torch
import transformers

from shardwright import api
from shardwright.costmodel.model import CostModel
from shardwright.errors import ShardwrightError
from shardwright.jobs import job_of
from shardwright.planner.sharding.sharder import Sharder
from shardwright.planner.space.forcing import parse_forced
from shardwright.plans.axes import MeshShape
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.workload import Precision, Workload

BATCH, WIDTH, LAYERS = 4, 512, 2
LENGTHS = (96, WIDTH, 4 * WIDTH)  # two of them are also a number of features


def gpt(length: int) -> Workload:
    """Its projections of queries, keys and values are three parameters."""
    sizes = dict(hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH, num_hidden_layers=LAYERS)
    others = dict(num_attention_heads=8, vocab_size=1024, max_position_embeddings=length, use_cache=False)
    quiet = dict(dropout=0.0, attention_dropout=0.0, layerdrop=0.0, activation_function="gelu")
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, **others, **quiet)).to(torch.bfloat16)
    batch = {name: torch.empty(BATCH, length, dtype=torch.int64, device="meta") for name in ("input_ids", "labels")}
    return Workload(model, batch, BATCH, precision=Precision(torch.bfloat16, torch.float32, torch.float32))


@pytest.fixture(scope="module", params=LENGTHS)
def kept_bytes(request):
    """(ranks of the tensor axis, what is forced) -> bytes that a layer keeps on each rank, over s b h."""
    length = request.param
    workload, cost_model = gpt(length), CostModel(parse_hardware("8xA100-80GB"))
    captured = api.captured_for(workload, cost_model)

    def found(ranks: int, **force: str) -> float:
        job = job_of(workload, BATCH, force)
        solution = Sharder(captured.graph, cost_model, job=job).solve(MeshShape.of({"tp": ranks}), BATCH)
        layer = next(i.segment for i in captured.graph.instances if i.module_path == "model.decoder.layers.0")
        return solution.costs[layer].saved_bytes / (BATCH * length * WIDTH)

    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_layer_keeps_what_the_paper_says(kept_bytes, ranks):
    """10 + 24 / t and 34 / t bytes, less two for masks of dropout, which is made again from its counter here."""
    without = kept_bytes(ranks, prefer="state", sequence_parallel="off")
    assert without == pytest.approx(8 + 24 / ranks, abs=0.1)  # statistics of norms and of attention beside
    assert kept_bytes(ranks, prefer="memory") == pytest.approx(32 / ranks, abs=0.1)


def test_what_is_forced_of_tensor_ranks_has_two_values():
    with pytest.raises(ShardwrightError, match="sequence_parallel=on: sequence_parallel takes auto, off"):
        parse_forced({"sequence_parallel": "on"})
    with pytest.raises(ShardwrightError, match="prefer takes time, state, memory"):
        parse_forced({"prefer": "speed"})
