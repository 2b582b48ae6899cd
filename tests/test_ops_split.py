"""torch's common training ops, each in a small module: captured, differentiated and split, they equal eager PyTorch.

Loss and gradients in float64. A family of ops is one module, whose loss is the sum of what each makes of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from split_modules import assert_equal_when_split
from torch import nn
from torch.nn import functional as F

TP = [{"tp": 2}]
ALSO_SPLIT = ("margin losses", "scans and order")  # of the others, each op's rule is proven by itself elsewhere
Function = Callable[[torch.Tensor], torch.Tensor]
generator = torch.Generator().manual_seed(0)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class Each(nn.Module):
    """Every function of one linear layer's result, in the shape that the family wants."""

    def __init__(self, functions: list[Function], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.functions, self.shape = nn.Linear(shape[-1], shape[-1]), functions, shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        return torch.stack([f(h).square().mean() for f in self.functions]).sum()


SOFT, SIGNS, LABELS = torch.rand(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 8).sign(), torch.randint(8, (4, 8))
ROWS, CELLS = torch.tensor([2, 0]), torch.zeros(4, 6, 8, dtype=torch.long)
EYE = torch.eye(6, dtype=torch.float64)
TOKENS: dict[str, list[Function]] = {
    "regression losses": [
        *(lambda h, f=f, r=r: f(h, SOFT, reduction=r)
          for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss) for r in ("mean", "sum", "none")),
    ],
    "classification losses": [
        lambda h: F.binary_cross_entropy(h.sigmoid(), SOFT, weight=SOFT),
        lambda h: F.binary_cross_entropy_with_logits(h, SOFT, pos_weight=SOFT[0, 0]),
        lambda h: F.kl_div(h.log_softmax(-1), SOFT, reduction="batchmean"),
        lambda h: F.cross_entropy(h[:, 0], SOFT[:, 0]),
        lambda h: F.cross_entropy(h.transpose(1, 2), LABELS[:, :6], label_smoothing=0.1),
        lambda h: F.cross_entropy(h.transpose(1, 2), LABELS[:, :6], weight=SOFT[0, 0]),
        lambda h: F.nll_loss(h[:, 0].log_softmax(-1), LABELS[:, 0], reduction="none"),
    ],
    "margin losses": [
        lambda h: F.margin_ranking_loss(h[:, 0], h[:, 1], SIGNS[:, 0]),
        lambda h: F.hinge_embedding_loss(h, SIGNS),
        lambda h: F.soft_margin_loss(h, SIGNS.double()),
        lambda h: F.multi_margin_loss(h[:, 0], LABELS[:, 0]),
        lambda h: F.multilabel_margin_loss(h[:, 0], LABELS),
        lambda h: F.multilabel_soft_margin_loss(h[:, 0], SOFT[:, 0]),
        lambda h: F.triplet_margin_loss(h[:, 0], h[:, 1], SOFT[:, 0]),
        lambda h: F.cosine_embedding_loss(h[:, 0], h[:, 1], SIGNS[:, 0, 0]),
    ],
    "activations": [
        F.glu, F.mish, F.celu, F.selu, F.hardswish, F.hardsigmoid, F.softshrink, F.hardshrink, F.logsigmoid,
        lambda h: F.prelu(h, SOFT[0, :, 0]), F.softmin, F.normalize, F.tanhshrink, F.softsign,
    ],
    "scans and order": [
        lambda h: h.cumsum(1), lambda h: h.cumprod(1), lambda h: h.logcumsumexp(1), lambda h: h.cummax(1)[0],
        lambda h: h.sort(1)[0], lambda h: h.topk(2, 1)[0], lambda h: h.median(1)[0], lambda h: h.quantile(0.3, dim=1),
        lambda h: h.aminmax(dim=1).max, lambda h: h.norm(p=1, dim=1), lambda h: h.renorm(2, 1, 1.0),
    ],
    "rows and cells": [
        lambda h: h.index_add(1, ROWS, h[:, :2]), lambda h: h.index_copy(1, ROWS, h[:, :2]),
        lambda h: h.index_fill(1, ROWS, 1.0), lambda h: h.index_put((ROWS, ROWS), h[0, :2]),
        lambda h: h.scatter_reduce(1, CELLS, h * 2, "sum"), lambda h: h.scatter_reduce(1, CELLS, h * 2, "amax"),
        lambda h: h.scatter_add(1, CELLS, h), lambda h: h.gather(1, CELLS[:, :2]),
        lambda h: h.masked_scatter(h > 0, h * 2), lambda h: h.take(ROWS), lambda h: h.unfold(1, 3, 2),
        lambda h: h.repeat_interleave(2, 1), lambda h: torch.diag_embed(h), lambda h: h.rot90(1, (1, 2)),
    ],
    "products": [
        lambda h: torch.einsum("bik,bjk,k->bij", h, h.tanh(), h[0, 0]),
        lambda h: torch.einsum("bik,bil->bkl", h, h),
        lambda h: torch.tensordot(h, h.tanh(), dims=([1, 2], [1, 2])),
        lambda h: torch.kron(h[0], h[1]), lambda h: h[0] @ h[1, 0], lambda h: torch.addr(h[0, :, :6], *h[1, :2, :6]),
        lambda h: F.bilinear(h, h.tanh(), SOFT[:3].new_ones(3, 8, 8)), lambda h: torch.cdist(h, h * 2),
    ],
    "matrices": [
        lambda h: torch.linalg.inv(h @ h.mT + EYE), lambda h: torch.linalg.slogdet(h @ h.mT + EYE)[1],
        lambda h: torch.linalg.cholesky(h @ h.mT + EYE), lambda h: torch.linalg.solve(h @ h.mT + EYE, h),
        lambda h: torch.linalg.det(h[:, :4, :4]), lambda h: torch.linalg.slogdet(h[..., 1:7])[1],
        lambda h: torch.linalg.solve(h[..., :6] + 3 * EYE, h), lambda h: torch.linalg.solve((h @ h.mT).mT + EYE, h),
        lambda h: torch.linalg.svdvals(h), lambda h: torch.linalg.eigvalsh(h @ h.mT),
        lambda h: torch.linalg.solve_triangular(h[..., :6].tril() + 3 * EYE, h, upper=False),
    ],
}  # fmt: skip
IMAGES: dict[str, list[Function]] = {
    "resizing": [
        *(lambda h, m=m: F.interpolate(h, size=(9, 9), mode=m)
          for m in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")),
        *(lambda h, m=m: F.interpolate(h, size=(3, 3), mode=m, antialias=True) for m in ("bilinear", "bicubic")),
        *(lambda h, m=m: F.interpolate(h[:, :, 0], size=11, mode=m) for m in ("nearest", "linear", "nearest-exact")),
        *(lambda h, m=m: F.interpolate(h[:, None], size=(5, 7, 9), mode=m)
          for m in ("nearest", "trilinear", "nearest-exact")),
    ],
    "pooling": [
        lambda h: F.max_pool1d(h[:, :, 0], 2), lambda h: F.max_pool2d(h, 2), lambda h: F.max_pool3d(h[:, None], 2),
        lambda h: F.avg_pool2d(h, 2, padding=1, count_include_pad=False), lambda h: F.avg_pool3d(h[:, None], 2),
        lambda h: F.adaptive_avg_pool2d(h, (3, 2)), lambda h: F.adaptive_max_pool2d(h, 3),
        lambda h: F.adaptive_avg_pool3d(h[:, None], 2), lambda h: F.adaptive_max_pool3d(h[:, None], 2),
        lambda h: F.lp_pool2d(h, 2, 2),
    ],
    "padding and columns": [
        *(lambda h, m=m: F.pad(h, (1, 1, 1, 1), m) for m in ("reflect", "replicate", "circular")),
        *(lambda h, m=m: F.pad(h[:, :, 0], (1, 1), m) for m in ("reflect", "replicate")),
        lambda h: F.fold(F.unfold(h, 2), (6, 8), 2), lambda h: F.pixel_shuffle(h, 2), lambda h: F.channel_shuffle(h, 2),
        lambda h: F.grid_sample(h, F.affine_grid(h[:, 0, :2, :3], (4, 4, 3, 3), False), align_corners=False),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", TOKENS)
def test_ops_on_tokens_equal_eager(family: str) -> None:
    torch.manual_seed(0)
    assert_equal_when_split(Each(TOKENS[family], (4, 6, 8)), TP if family in ALSO_SPLIT else (), x=randn(4, 6, 8))


@pytest.mark.parametrize("family", IMAGES)
def test_ops_on_images_equal_eager(family: str) -> None:
    torch.manual_seed(0)
    assert_equal_when_split(Each(IMAGES[family], (4, 4, 6, 8)), (), x=randn(4, 4, 6, 8))


class Bags(nn.Module):
    """Tables of a recommendation model: bags as long as each other, bags by offsets, weighted ones, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.top = nn.EmbeddingBag(10, 4, mode="mean", padding_idx=2), nn.EmbeddingBag(10, 4, mode="max")
        self.total = nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True)

    def forward(self, index: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat, long = index.flatten(), self.mean(index) + self.top(index)
        short = self.total(flat, offsets, weights.flatten()) + self.mean(flat, offsets[:-1])
        return (long * short).square().sum() + self.total(index, per_sample_weights=weights).square().sum()


def test_bags_of_embeddings_equal_eager_and_their_tables_split() -> None:
    torch.manual_seed(0)
    offsets = torch.tensor([0, 2, 2, 7, 12])
    index = torch.randint(10, (4, 3), generator=generator)
    graph = assert_equal_when_split(Bags(), TP, index=index, offsets=offsets, weights=randn(4, 3))
    lookups = [n for s in graph.segments.values() for n in s.joint.graph.nodes if "embedding" in str(n.target)]
    assert lookups and not any("bag" in str(n.target) for n in lookups)


class Normed(nn.Module):
    """Weights in other coordinates: length and direction, largest singular value one (its vectors are buffers)."""

    def __init__(self, normed: Callable[[nn.Linear], nn.Linear]) -> None:
        super().__init__()
        self.first, self.second = normed(nn.Linear(6, 8)), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))).square().mean()


NORMS = {
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "older weight_norm": torch.nn.utils.weight_norm,
    "older spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NORMS)
def test_weights_in_other_coordinates_equal_eager(name: str) -> None:
    torch.manual_seed(0)
    assert_equal_when_split(Normed(NORMS[name]), TP if name == "spectral_norm" else (), x=randn(4, 6))
