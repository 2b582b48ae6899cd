"""Small models written out here, of fields that transformers and diffusers do not cover.

Each factory returns (module, batch); the module computes its own loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BATCH = 4
Made = tuple[nn.Module, dict[str, torch.Tensor]]


class RecommendationModel(nn.Module):
    """DLRM (Naumov et al. 2019): tables for categories, an MLP for numbers, dot products between all of them."""

    def __init__(self, rows: int = 40, tables: int = 3, dense: int = 4, width: int = 8) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(dense, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = nn.Sequential(nn.Linear(width + pairs, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense: torch.Tensor, categories: torch.Tensor, clicked: torch.Tensor) -> torch.Tensor:
        numbers = self.bottom(dense)
        vectors = [table(categories[:, index]) for index, table in enumerate(self.tables)]
        stacked = torch.stack([numbers, *vectors], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        row, column = torch.tril_indices(stacked.shape[1], stacked.shape[1], offset=-1)
        score = self.top(torch.cat([numbers, products[:, row, column]], dim=1)).squeeze(1)
        return F.binary_cross_entropy_with_logits(score, clicked)


class TwoTowers(nn.Module):
    """Users and items in one space; the other items of the batch are the wrong answers."""

    def __init__(self, users: int = 40, items: int = 60, width: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_tower = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.item_tower = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        ours = F.normalize(self.user_tower(self.user(users)), dim=-1)
        theirs = F.normalize(self.item_tower(self.item(items)), dim=-1)
        scores = ours @ theirs.t() / 0.1
        own = torch.arange(scores.shape[0], device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2


class FactorizationMachine(nn.Module):
    """DeepFM (Guo et al. 2017): pairwise interactions by the square of sums, and an MLP, over shared embeddings."""

    def __init__(self, rows: int = 50, fields: int = 5, width: int = 8) -> None:
        super().__init__()
        self.linear, self.vectors = nn.Embedding(rows, 1), nn.Embedding(rows, width)
        self.deep = nn.Sequential(nn.Linear(fields * width, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, features: torch.Tensor, rating: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(features)
        pairs = 0.5 * (vectors.sum(1).square() - vectors.square().sum(1)).sum(-1, keepdim=True)
        score = self.linear(features).sum(1) + pairs + self.deep(vectors.flatten(1))
        return F.mse_loss(score.squeeze(1), rating)


class GraphConvolution(nn.Module):
    """GCN (Kipf and Welling 2017) over dense normalized adjacency matrices, one graph a sample."""

    def __init__(self, features: int = 6, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(features, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, classes)

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        own = adjacency + torch.eye(adjacency.shape[-1], device=nodes.device, dtype=nodes.dtype)
        scale = own.sum(-1).rsqrt()
        normal = scale[..., :, None] * own * scale[..., None, :]
        for layer in self.layers:
            nodes = F.relu(normal @ layer(nodes))
        return F.cross_entropy(self.head(nodes).flatten(0, 1), labels.flatten())


class GraphAttention(nn.Module):
    """GAT (Velickovic et al. 2018) over dense adjacency matrices."""

    def __init__(self, features: int = 6, width: int = 8, heads: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(features, heads * width, bias=False)
        self.source, self.target = nn.Parameter(torch.randn(heads, width)), nn.Parameter(torch.randn(heads, width))
        self.head = nn.Linear(heads * width, classes)

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        projected = self.project(nodes).unflatten(-1, (self.heads, -1))
        source, target = (projected * self.source).sum(-1), (projected * self.target).sum(-1)
        scores = F.leaky_relu(source[:, :, None] + target[:, None, :], 0.2)
        weights = scores.masked_fill(adjacency[..., None] == 0, -1e9).softmax(2)
        mixed = torch.einsum("bijh,bjhw->bihw", weights, projected).flatten(2)
        return F.cross_entropy(self.head(F.elu(mixed)).flatten(0, 1), labels.flatten())


class EdgeMessages(nn.Module):
    """Messages along a list of edges, summed at their ends by index_add: one graph in the whole batch's nodes."""

    def __init__(self, features: int = 6, width: int = 8) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * features, width), nn.ReLU())
        self.update = nn.Linear(features + width, 1)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        batch, count, _ = nodes.shape
        first = torch.arange(batch, device=nodes.device)[:, None] * count
        source, end = (edges[:, 0] + first).flatten(), (edges[:, 1] + first).flatten()
        flat = nodes.flatten(0, 1)
        messages = self.message(torch.cat([flat[source], flat[end]], dim=-1))
        sums = torch.zeros(batch * count, messages.shape[-1], dtype=nodes.dtype, device=nodes.device)
        sums = sums.index_add(0, end, messages)
        found = self.update(torch.cat([flat, sums], dim=-1)).view(batch, count)
        return F.smooth_l1_loss(found, target)


class FourierOperator(nn.Module):
    """FNO (Li et al. 2021) in one dimension: the lowest modes are mixed in Fourier space, real and imaginary apart."""

    def __init__(self, width: int = 8, modes: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.modes = modes
        self.lift, self.project = nn.Linear(2, width), nn.Linear(width, 1)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(width, width, modes, 2) / width) for _ in range(layers)
        )
        self.local = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))

    def forward(self, field: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.lift(field).transpose(1, 2)
        for weight, local in zip(self.weights, self.local, strict=True):
            spectrum = torch.fft.rfft(hidden)
            mixed = torch.einsum("biw,iow->bow", spectrum[..., : self.modes], torch.view_as_complex(weight))
            padded = F.pad(mixed, (0, spectrum.shape[-1] - self.modes))
            hidden = F.gelu(torch.fft.irfft(padded, n=hidden.shape[-1]) + local(hidden))
        return F.mse_loss(self.project(hidden.transpose(1, 2)).squeeze(-1), target)


class PointNet(nn.Module):
    """PointNet (Qi et al. 2017): one MLP for every point, the largest of each feature, a classifier."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 2 * width, 1)
        )
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(self.points(points.transpose(1, 2)).amax(-1)), labels)


class WaveNet(nn.Module):
    """WaveNet (van den Oord et al. 2016): gated dilated causal convolutions with a skip from each."""

    def __init__(self, levels: int = 16, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(levels, width)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.head = nn.Conv1d(width, levels, 1)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(samples).transpose(1, 2)
        total = torch.zeros_like(hidden)
        for index, (gate, skip) in enumerate(zip(self.gates, self.skips, strict=True)):
            value, opened = gate(F.pad(hidden, (2**index, 0))).chunk(2, dim=1)
            out = skip(torch.tanh(value) * torch.sigmoid(opened))
            hidden, total = hidden + out, total + out
        scores = self.head(F.relu(total))[..., :-1]
        return F.cross_entropy(scores, samples[:, 1:])


class VariationalAutoencoder(nn.Module):
    """Variational autoencoder (Kingma and Welling 2014) whose noise is an entry of the batch."""

    def __init__(self, features: int = 12, latent: int = 4) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(features, 16), nn.SiLU(), nn.Linear(16, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent, 16), nn.SiLU(), nn.Linear(16, features))

    def forward(self, values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, log_variance = self.encode(values).chunk(2, dim=-1)
        found = self.decode(mean + noise * (0.5 * log_variance).exp())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        return F.huber_loss(found, values) + 1e-2 * divergence.mean()


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021): MLPs over patches, then over channels."""

    def __init__(self, patches: int = 4, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_patches = nn.Sequential(nn.Linear(patches, 8), nn.GELU(), nn.Linear(8, patches))
        self.over_channels = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        tokens = self.patch(image).flatten(2).transpose(1, 2)
        tokens = tokens + self.over_patches(self.norms[0](tokens).transpose(1, 2)).transpose(1, 2)
        tokens = tokens + self.over_channels(self.norms[1](tokens))
        return F.cross_entropy(self.head(tokens.mean(1)), labels)


class EvoformerBlock(nn.Module):
    """AlphaFold's block (Jumper et al. 2021, algorithm 6): rows and columns of an alignment, and pairs of residues."""

    def __init__(self, width: int = 8, pair: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.bias = nn.Linear(pair, heads, bias=False)
        self.row, self.column = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.row_out, self.column_out = nn.Linear(width, width), nn.Linear(width, width)
        self.outer = nn.Linear(width, 2 * pair)
        self.outer_out = nn.Linear(pair * pair, pair)
        self.edges = nn.ModuleList(nn.Linear(pair, 5 * pair) for _ in range(2))
        self.edges_out = nn.ModuleList(nn.Linear(pair, pair) for _ in range(2))
        self.triangle, self.triangle_out = nn.Linear(pair, 4 * pair), nn.Linear(pair, pair)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.pair_norms = nn.ModuleList(nn.LayerNorm(pair) for _ in range(6))
        self.transition = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.pair_transition = nn.Sequential(nn.Linear(pair, 2 * pair), nn.ReLU(), nn.Linear(2 * pair, pair))

    def attend(self, projected: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Gated attention along the last dimension but one."""
        query, key, value, gate = projected.unflatten(-1, (self.heads, -1)).transpose(-3, -2).chunk(4, dim=-1)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return (torch.sigmoid(gate) * (weights @ value)).transpose(-3, -2).flatten(-2)

    def forward(self, msa: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bias = self.bias(self.pair_norms[0](pair)).permute(0, 3, 1, 2)[:, None]
        msa = msa + self.row_out(self.attend(self.row(self.norms[0](msa)), bias))
        columns = self.norms[1](msa).transpose(1, 2)
        msa = msa + self.column_out(self.attend(self.column(columns), None)).transpose(1, 2)
        msa = msa + self.transition(self.norms[2](msa))
        left, right = self.outer(self.norms[3](msa)).chunk(2, dim=-1)
        pair = pair + self.outer_out(torch.einsum("bsiu,bsjv->bijuv", left, right).flatten(-2) / msa.shape[1])
        for index, equation in enumerate(("bikc,bjkc->bijc", "bkic,bkjc->bijc")):
            a, b, open_a, open_b, gate = self.edges[index](self.pair_norms[index + 1](pair)).chunk(5, dim=-1)
            mixed = torch.einsum(equation, torch.sigmoid(open_a) * a, torch.sigmoid(open_b) * b)
            pair = pair + torch.sigmoid(gate) * self.edges_out[index](mixed)
        pair = pair + self.triangle_out(self.attend(self.triangle(self.pair_norms[3](pair)), None))
        return msa, pair + self.pair_transition(self.pair_norms[4](pair))


class Folding(nn.Module):
    """Two blocks, which predict a distance class for each pair of residues."""

    def __init__(self, letters: int = 6, width: int = 8, pair: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.embed, self.left, self.right = (nn.Embedding(letters, size) for size in (width, pair, pair))
        self.blocks = nn.ModuleList(EvoformerBlock(width, pair) for _ in range(2))
        self.head = nn.Linear(pair, classes)

    def forward(self, alignment: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        msa, first = self.embed(alignment), alignment[:, 0]
        pair = self.left(first)[:, :, None] + self.right(first)[:, None, :]
        for block in self.blocks:
            msa, pair = block(msa, pair)
        return F.cross_entropy(self.head(pair).flatten(0, 2), distances.flatten())


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _graph() -> dict[str, torch.Tensor]:
    draw = _draw()
    links = (torch.rand(BATCH, 6, 6, generator=draw) < 0.5).float()
    links = torch.maximum(links, links.transpose(1, 2)).clamp(min=0)
    links = torch.maximum(links, torch.eye(6))
    return {
        "nodes": torch.randn(BATCH, 6, 6, generator=draw),
        "adjacency": links,
        "labels": torch.randint(0, 3, (BATCH, 6), generator=draw),
    }


def dlrm() -> Made:
    draw = _draw()
    return RecommendationModel(), {
        "dense": torch.randn(BATCH, 4, generator=draw),
        "categories": torch.randint(0, 40, (BATCH, 3, 5), generator=draw),
        "clicked": torch.randint(0, 2, (BATCH,), generator=draw).float(),
    }


def two_towers() -> Made:
    draw = _draw()
    users, items = torch.randint(0, 40, (BATCH,), generator=draw), torch.randint(0, 60, (BATCH,), generator=draw)
    return TwoTowers(), {"users": users, "items": items}


def deep_fm() -> Made:
    draw = _draw()
    features = torch.randint(0, 50, (BATCH, 5), generator=draw)
    return FactorizationMachine(), {"features": features, "rating": torch.rand(BATCH, generator=draw)}


def gcn() -> Made:
    return GraphConvolution(), _graph()


def gat() -> Made:
    return GraphAttention(), _graph()


def edge_messages() -> Made:
    draw = _draw()
    return EdgeMessages(), {
        "nodes": torch.randn(BATCH, 6, 6, generator=draw),
        "edges": torch.randint(0, 6, (BATCH, 2, 9), generator=draw),
        "target": torch.randn(BATCH, 6, generator=draw),
    }


def fno() -> Made:
    draw = _draw()
    return FourierOperator(), {
        "field": torch.randn(BATCH, 16, 2, generator=draw),
        "target": torch.randn(BATCH, 16, generator=draw),
    }


def pointnet() -> Made:
    draw = _draw()
    points, labels = torch.randn(BATCH, 12, 3, generator=draw), torch.randint(0, 4, (BATCH,), generator=draw)
    return PointNet(), {"points": points, "labels": labels}


def wavenet() -> Made:
    return WaveNet(), {"samples": torch.randint(0, 16, (BATCH, 24), generator=_draw())}


def variational() -> Made:
    draw = _draw()
    values, noise = torch.randn(BATCH, 12, generator=draw), torch.randn(BATCH, 4, generator=draw)
    return VariationalAutoencoder(), {"values": values, "noise": noise}


def mixer() -> Made:
    draw = _draw()
    image, labels = torch.randn(BATCH, 3, 8, 8, generator=draw), torch.randint(0, 5, (BATCH,), generator=draw)
    return Mixer(), {"image": image, "labels": labels}


def evoformer() -> Made:
    draw = _draw()
    return Folding(), {
        "alignment": torch.randint(0, 6, (BATCH, 3, 6), generator=draw),
        "distances": torch.randint(0, 3, (BATCH, 6, 6), generator=draw),
    }


NAMES = (
    "dlrm", "two_towers", "deep_fm", "gcn", "gat", "edge_messages", "fno", "pointnet", "wavenet", "variational",
    "mixer", "evoformer",
)  # fmt: skip
