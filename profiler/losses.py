"""Losses of models that leave theirs to the user: loss(output, batch) -> scalar, each over the whole global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

Batch = Mapping[str, torch.Tensor]
Loss = Callable[[Any, Batch], torch.Tensor]


def contrastive(output: Any, batch: Batch) -> torch.Tensor:
    """Each text is to find its own image among the batch's, and each image its text (Radford et al. 2021, figure 3)."""
    scores = output.logits_per_text
    own = torch.arange(scores.shape[0], device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2


def pairwise_sigmoid(output: Any, batch: Batch) -> torch.Tensor:
    """Each pair of a text and an image is a yes-or-no question of its own (Zhai et al. 2023, algorithm 1)."""
    scores = output.logits_per_text
    sign = 2 * torch.eye(scores.shape[0], device=scores.device, dtype=scores.dtype) - 1
    return -F.logsigmoid(sign * scores).sum(dim=-1).mean()


def _corners(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper left and lower right of boxes given as center, width and height."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return center - size / 2, center + size / 2


def generalized_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of boxes [..., 4], pair by pair (Rezatofighi et al. 2019, algorithm 1)."""
    (low_a, high_a), (low_b, high_b) = _corners(boxes), _corners(others)
    shared = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = boxes[..., 2:].prod(-1) + others[..., 2:].prod(-1) - shared
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    return shared / union - (hull - union) / hull


def assigned_detection(output: Any, batch: Batch) -> torch.Tensor:
    """DETR's loss for given targets of each query: class, L1, generalized IoU, weighted 1, 5, 2 (Carion et al. 2020).

    The matching of objects to queries depends on data, runs on the host in every implementation, and has no gradient;
    here the batch holds its result. Of all queries, those whose class is the last (no object) have no box.
    """
    scores = output.logits
    classes = batch["class_labels"] % scores.shape[-1]
    named = F.cross_entropy(scores.flatten(0, 1), classes.flatten())
    there = (classes != scores.shape[-1] - 1).to(scores.dtype)
    boxes = (output.pred_boxes - batch["boxes"]).abs().sum(-1)
    overlap = 1 - generalized_iou(output.pred_boxes, batch["boxes"])
    return named + ((5 * boxes + 2 * overlap) * there).mean()


def depth(output: Any, batch: Batch) -> torch.Tensor:
    """Absolute error of the predicted depth, brought to the image's size."""
    target = batch["depth"]
    predicted = output.predicted_depth
    if predicted.shape[-2:] != target.shape[-2:]:
        predicted = F.interpolate(predicted[:, None], size=target.shape[-2:], mode="bilinear")[:, 0]
    return (predicted - target).abs().mean()


def super_resolution(output: Any, batch: Batch) -> torch.Tensor:
    return (output.reconstruction - batch["sharp"]).abs().mean()


def denoising(output: Any, batch: Batch) -> torch.Tensor:
    """Squared error against the noise, velocity or image that is to be found (Ho et al. 2020, equation 14)."""
    found = output.sample if hasattr(output, "sample") else output[0]
    target = batch["target"]
    # models that also predict a variance give it in further channels, which this loss leaves out
    return (found[:, : target.shape[1]] - target).square().mean()


def loss_of(kind: str, model_type: str) -> Loss | None:
    """The loss of transformers models of this kind; None where the model computes its own."""
    if kind == "image-text-pairs":
        return pairwise_sigmoid if model_type.startswith("siglip") else contrastive
    table = {"object-detection": assigned_detection, "depth-estimation": depth, "super-resolution": super_resolution}
    return table.get(kind)
