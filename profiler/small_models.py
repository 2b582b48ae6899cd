"""Small models in plain torch: an MLP and a U-Net. They need no package beyond torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .inputs import BatchField


@dataclass(frozen=True)
class SmallModel:
    """build(**options) -> module; fields(options, dtype) -> its batch; loss(output, batch) -> scalar."""

    build: Callable[..., nn.Module]
    fields: Callable[[Mapping[str, Any], torch.dtype], tuple[BatchField, ...]]
    loss: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor] | None
    options: Mapping[str, Any]


def build_mlp(in_features: int, hidden_size: int, num_layers: int, num_classes: int) -> nn.Sequential:
    """num_layers hidden layers with GELU between, then a classifier. Takes `input` [batch, in_features]."""
    sizes = [in_features, *[hidden_size] * num_layers]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden_size, num_classes))


def cross_entropy_loss(output: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(output, batch["target"])


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm and ReLU. [batch, in, h, w] -> [batch, out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """The U-Net of Ronneberger et al. 2015: each level halves the image; each skip joins the level of its size again.

    image [batch, in_channels, size, size] -> class scores [batch, num_classes, size, size]
    """

    def __init__(self, in_channels: int, channels: int, num_levels: int, num_classes: int) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(num_levels)]
        self.down = nn.ModuleList(
            ConvBlock(before, after) for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.middle = ConvBlock(widths[-1], 2 * widths[-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(2 * width, width, 2, stride=2) for width in reversed(widths))
        self.up = nn.ModuleList(ConvBlock(2 * width, width) for width in reversed(widths))
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        skips = []
        x = image
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([skips.pop(), grow(x)], dim=1))
        return self.head(x)


def _mlp_fields(options: Mapping[str, Any], dtype: torch.dtype) -> tuple[BatchField, ...]:
    return (
        BatchField("input", (options["in_features"],), dtype, "normal"),
        BatchField("target", (), torch.int64, "classes", high=options["num_classes"]),
    )


def _unet_fields(options: Mapping[str, Any], dtype: torch.dtype) -> tuple[BatchField, ...]:
    size = options["image_size"]
    return (
        BatchField("image", (options["in_channels"], size, size), dtype, "normal"),
        BatchField("target", (size, size), torch.int64, "classes", high=options["num_classes"]),
    )


def _build_unet(image_size: int, **options: Any) -> UNet:
    return UNet(**options)


SMALL_MODELS: dict[str, SmallModel] = {
    "mlp": SmallModel(
        build_mlp, _mlp_fields, cross_entropy_loss, dict(in_features=16, hidden_size=32, num_layers=3, num_classes=8)
    ),
    "tiny-unet": SmallModel(
        _build_unet,
        _unet_fields,
        cross_entropy_loss,
        dict(in_channels=3, channels=8, num_levels=2, num_classes=4, image_size=16),
    ),
}
