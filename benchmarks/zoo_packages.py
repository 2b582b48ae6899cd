"""Small models of packages that the project does not depend on: timm, torchtune, litgpt.

Each factory returns (module, batch); the module computes its own loss. Where a package is not installed, its models are
reported as not running. The figures were taken with timm 1.0.31, torchtune 0.6.1 and litgpt 0.5.13 beside torchvision
0.28.0, each installed without its dependencies into a folder on PYTHONPATH.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

BATCH, CLASSES, VOCABULARY = 4, 5, 60
Made = tuple[nn.Module, dict[str, torch.Tensor]]


class Classified(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.network(image), labels)


class NextToken(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.network(tokens)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Regressed(nn.Module):
    """Of a network that gives features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, target: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        found = self.network(**inputs)
        return F.mse_loss(found[0] if isinstance(found, tuple) else found, target)


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _images(size: int) -> dict[str, torch.Tensor]:
    draw = _draw()
    return {
        "image": torch.randn(BATCH, 3, size, size, generator=draw),
        "labels": torch.randint(0, CLASSES, (BATCH,), generator=draw),
    }


def _tokens(length: int = 12) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(0, VOCABULARY, (BATCH, length), generator=_draw())}


def _import_torchvision() -> None:
    """timm and litgpt import it. Its wheels for CUDA have ops that a torch for CPUs cannot load; no model here runs
    them, but their schemas must be known."""
    try:
        import torchvision
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        import torchvision  # noqa: F401


_kept: list[Any] = []


def _timm(name: str, size: int, **settings: Any) -> Made:
    _import_torchvision()
    import timm

    torch.manual_seed(0)
    return Classified(timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings)), _images(size)


def timm_vit() -> Made:
    return _timm("vit_tiny_patch16_224", 8, img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2,
                 drop_path_rate=0.2)  # fmt: skip


def timm_swin() -> Made:
    return _timm("swin_tiny_patch4_window7_224", 16, img_size=16, patch_size=2, window_size=2, embed_dim=8,
                 depths=(1, 2), num_heads=(2, 2), drop_path_rate=0.2)  # fmt: skip


def timm_convnext() -> Made:
    return _timm("convnext_tiny", 32, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), drop_path_rate=0.2)


def timm_mixer() -> Made:
    _import_torchvision()
    from timm.models.mlp_mixer import MlpMixer

    torch.manual_seed(0)
    network = MlpMixer(CLASSES, img_size=8, patch_size=4, embed_dim=16, num_blocks=2, drop_path_rate=0.2)
    return Classified(network), _images(8)


def timm_resnet() -> Made:
    _import_torchvision()
    from timm.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    network = ResNet(BasicBlock, (1, 1, 1, 1), CLASSES, stem_width=8, channels=(8, 8, 16, 16))
    return Classified(network), _images(
        64
    )  # of two pixels a batch norm makes 1 and -1, and ReLU's kink is at their sum


def timm_cait() -> Made:
    return _timm("cait_xxs24_224", 8, img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.2)


def torchtune_llama3() -> Made:
    from torchtune.models.llama3 import llama3

    torch.manual_seed(0)
    return NextToken(llama3(VOCABULARY, 2, 2, 1, 16, max_seq_len=16, intermediate_dim=24)), _tokens()


def torchtune_gemma() -> Made:
    from torchtune.models.gemma import gemma

    torch.manual_seed(0)
    return NextToken(gemma(VOCABULARY, 2, 2, 8, 1, 16, 24, max_seq_len=16)), _tokens()


def torchtune_clip() -> Made:
    from torchtune.models.clip import clip_vision_encoder

    torch.manual_seed(0)
    network = clip_vision_encoder(8, 4, 16, 2, 2, in_channels=3)
    draw = _draw()
    images = torch.randn(BATCH, 1, 1, 3, 8, 8, generator=draw)
    ratio = torch.ones(BATCH, 1, 2, dtype=torch.int64)
    target = torch.randn(BATCH, 1, 1, 5, 16, generator=draw)
    return Regressed(network), {"images": images, "aspect_ratio": ratio, "target": target}


def torchtune_t5() -> Made:
    from torchtune.models.t5 import t5_encoder

    torch.manual_seed(0)
    network = t5_encoder(16, 24, 2, 8, 2, 8, 16, VOCABULARY, 1e-6, 12)
    return Regressed(network), {**_tokens(), "target": torch.randn(BATCH, 12, 16, generator=_draw())}


def litgpt_gpt() -> Made:
    _import_torchvision()
    from litgpt import GPT, Config

    torch.manual_seed(0)
    config = Config(name="small", block_size=16, vocab_size=VOCABULARY, padded_vocab_size=VOCABULARY, n_layer=2,
                    n_head=2, n_embd=16, intermediate_size=24)  # fmt: skip
    return NextToken(GPT(config)), _tokens()


NAMES = (
    "timm_vit", "timm_swin", "timm_convnext", "timm_mixer", "timm_resnet", "timm_cait", "torchtune_llama3",
    "torchtune_gemma", "torchtune_clip", "torchtune_t5", "litgpt_gpt",
)  # fmt: skip
