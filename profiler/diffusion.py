"""diffusers configurations become models on the meta device, with batches and a denoising loss. Nothing is fetched.

Each class takes its noisy sample, its time and its condition under names and in shapes of its own; _CLASSES says which.
A class that takes a condition inside a dictionary gets a forward that takes the dictionary's entries as arguments.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError
from .hf import offline, own_folders_hidden
from .inputs import BatchField
from .near import near_matches
from .recorded import Recorder, remember

KIND = "denoising"
INTEGER = torch.int64
TRAINING_STEPS = 1000  # of the noise schedule
# Sizes that these configurations leave to the caller, as overrides: of the latent image, after the autoencoder.
LATENT_SIZES = ("latent_height", "latent_width", "latent_frames")
# What a big model is shrunk to for a check; keys that a class lacks are left out.
SMALL: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8,
    "joint_attention_dim": 16, "pooled_projection_dim": 8, "caption_projection_dim": 16, "caption_channels": 8,
    "cross_attention_dim": 16, "text_dim": 16, "freq_dim": 8, "ffn_dim": 24, "axes_dims_rope": [2, 2, 4],
    "norm_num_groups": 4, "layers_per_block": 1, "pos_embed_max_size": 8, "in_channels": 4, "out_channels": 4,
    "dual_attention_layers": [], "num_embeds_ada_norm": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """seq_len: tokens of the text that conditions; sizes: those of LATENT_SIZES that were given."""

    config: Mapping[str, Any]
    seq_len: int
    dtype: torch.dtype
    sizes: Mapping[str, int]

    def get(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        return default if value is None else value

    def square(self, default: int) -> tuple[int, int]:
        """Height and width of the sample: given, or the configuration's."""
        size = self.get("sample_size", default)
        height, width = (size, size) if isinstance(size, int) else size
        return self.sizes.get("latent_height", height), self.sizes.get("latent_width", width)

    def normal(self, name: str, *shape: int) -> BatchField:
        return BatchField(name, shape, self.dtype, "normal")

    def text(self, width_key: str, default: int) -> BatchField:
        return self.normal("encoder_hidden_states", self.seq_len, self.get(width_key, default))

    def time(self) -> BatchField:
        return BatchField("timestep", (), INTEGER, "classes", high=TRAINING_STEPS)

    def noisy(self, name: str, *sizes: int) -> tuple[BatchField, BatchField]:
        """The sample and what is to be found in it, channels first."""
        channels_in = self.get("in_channels", 4)
        channels_out = min(channels_in, self.get("out_channels", channels_in))
        return self.normal(name, channels_in, *sizes), self.normal("target", channels_out, *sizes)


Fields = Callable[[Request], tuple[BatchField, ...]]


@dataclass(frozen=True)
class _Class:
    """text_tokens: how many by default; 0 where no text conditions. forward: of a subclass with flat arguments."""

    fields: Fields
    text_tokens: int = 0
    forward: Callable[[Mapping[str, Any]], Callable[..., Any] | None] | None = None


def _unet(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("sample", *request.square(32))
    return (sample, request.time(), *_unet_classes(request), target)


def _unet_classes(request: Request) -> tuple[BatchField, ...]:
    classes = request.config.get("num_class_embeds")
    return (BatchField("class_labels", (), INTEGER, "classes", high=classes),) if classes else ()


def _unet_condition(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("sample", *request.square(64))
    added: tuple[BatchField, ...] = ()
    kind = request.config.get("addition_embed_type")
    if kind == "text_time":
        width = request.get("addition_time_embed_dim", 256)
        pooled = request.get("projection_class_embeddings_input_dim", 2816) - 6 * width
        added = (
            request.normal("text_embeds", pooled),
            BatchField("time_ids", (6,), request.dtype, "uniform", low=0, high=1024),
        )
    elif kind is not None:
        raise _unsupported(f"UNet2DConditionModel with addition_embed_type {kind!r}", "addition_embed_type: null")
    width = request.get("cross_attention_dim", 1280)
    text = request.normal("encoder_hidden_states", request.seq_len, width if isinstance(width, int) else width[0])
    return (sample, request.time(), text, *added, *_unet_classes(request), target)


def _sdxl_forward(config: Mapping[str, Any]) -> Callable[..., Any] | None:
    if config.get("addition_embed_type") != "text_time":
        return None

    def forward(
        self: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any
    ) -> Any:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return super(type(self), self).forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=added)

    return forward


def _autoencoder(request: Request) -> tuple[BatchField, ...]:
    """The image is its own target; the loss has no term for the latent distribution."""
    channels, (height, width) = request.get("in_channels", 3), request.square(32)
    return (
        request.normal("sample", channels, height, width),
        BatchField("target", (channels, height, width), request.dtype, "same", of="sample"),
    )


def _dit(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("hidden_states", *request.square(32))
    classes = BatchField("class_labels", (), INTEGER, "classes", high=request.get("num_embeds_ada_norm", 1000))
    return (sample, request.time(), classes, target)


def _pixart(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("hidden_states", *request.square(128))
    added: tuple[BatchField, ...] = ()
    if _pixart_sizes(request.config):
        added = (
            BatchField("resolution", (2,), request.dtype, "uniform", low=256, high=1024),
            BatchField("aspect_ratio", (1,), request.dtype, "uniform", low=0.5, high=2),
        )
    return (sample, request.text("caption_channels", 4096), request.time(), *added, target)


def _pixart_sizes(config: Mapping[str, Any]) -> bool:
    asked = config.get("use_additional_conditions")
    return config.get("sample_size") == 128 if asked is None else bool(asked)


def _pixart_forward(config: Mapping[str, Any]) -> Callable[..., Any]:
    if not _pixart_sizes(config):

        def plain(self: Any, hidden_states: Any, encoder_hidden_states: Any, timestep: Any) -> Any:
            added = {"resolution": None, "aspect_ratio": None}
            base = super(type(self), self).forward
            return base(hidden_states, encoder_hidden_states, timestep=timestep, added_cond_kwargs=added)

        return plain

    def forward(
        self: Any, hidden_states: Any, encoder_hidden_states: Any, timestep: Any, resolution: Any, aspect_ratio: Any
    ) -> Any:
        added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        base = super(type(self), self).forward
        return base(hidden_states, encoder_hidden_states, timestep=timestep, added_cond_kwargs=added)

    return forward


def _flux(request: Request) -> tuple[BatchField, ...]:
    """Patches of two by two latent pixels in a row, each with its place; time and guidance lie between 0 and 1."""
    height, width = (request.sizes.get(name, 64) for name in LATENT_SIZES[:2])
    channels = request.get("in_channels", 64)
    places = [number for row in range(height) for column in range(width) for number in (0, row, column)]
    fields = [
        request.normal("hidden_states", height * width, channels),
        request.text("joint_attention_dim", 4096),
        request.normal("pooled_projections", request.get("pooled_projection_dim", 768)),
        BatchField("timestep", (), request.dtype, "uniform", low=0, high=1),
        _shared("img_ids", (height * width, 3), request.dtype, tuple(places)),
        _shared("txt_ids", (request.seq_len, 3), request.dtype, (0.0,) * (3 * request.seq_len)),
    ]
    if request.config.get("guidance_embeds"):
        fields.append(BatchField("guidance", (), request.dtype, "uniform", low=1, high=5))
    return (*fields, request.normal("target", height * width, request.get("out_channels", channels)))


def _shared(name: str, shape: tuple[int, ...], dtype: torch.dtype, values: tuple[float, ...]) -> BatchField:
    return BatchField(name, shape, dtype, "constant", values=values, shared=True)


def _sd3(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("hidden_states", *request.square(128))
    pooled = request.normal("pooled_projections", request.get("pooled_projection_dim", 2048))
    return (sample, request.text("joint_attention_dim", 4096), pooled, request.time(), target)


def _auraflow(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("hidden_states", *request.square(64))
    time = BatchField("timestep", (), request.dtype, "uniform", low=0, high=1)
    return (sample, request.text("joint_attention_dim", 2048), time, target)


def _sana(request: Request) -> tuple[BatchField, ...]:
    sample, target = request.noisy("hidden_states", *request.square(32))
    return (sample, request.text("caption_channels", 2304), request.time(), target)


def _wan(request: Request) -> tuple[BatchField, ...]:
    """A video: frames before height and width. The default is 81 frames of 832 by 480 pixels."""
    frames, height, width = (
        request.sizes.get(name, size)
        for name, size in (("latent_frames", 21), ("latent_height", 60), ("latent_width", 104))
    )
    if request.config.get("image_dim"):
        raise _unsupported("WanTransformer3DModel with image_dim, which starts from an image", "image_dim: null")
    sample, target = request.noisy("hidden_states", frames, height, width)
    return (sample, request.time(), request.text("text_dim", 4096), target)


_CLASSES: dict[str, _Class] = {
    "UNet2DModel": _Class(_unet),
    "UNet2DConditionModel": _Class(_unet_condition, 77, _sdxl_forward),
    "AutoencoderKL": _Class(_autoencoder),
    "DiTTransformer2DModel": _Class(_dit),
    "PixArtTransformer2DModel": _Class(_pixart, 120, _pixart_forward),
    "FluxTransformer2DModel": _Class(_flux, 512),
    "SD3Transformer2DModel": _Class(_sd3, 333),
    "AuraFlowTransformer2DModel": _Class(_auraflow, 256),
    "SanaTransformer2DModel": _Class(_sana, 300),
    "WanTransformer3DModel": _Class(_wan, 512),
}


def require_diffusers() -> Any:
    """The diffusers module, or the error that says how to install it."""
    try:
        with offline(), own_folders_hidden():
            import diffusers
    except ImportError:
        raise ShardwrightError(
            "the package diffusers is not installed",
            means="it builds diffusers: models",
            change="install the extra",
            works="pip install 'shardwright[diffusers]'",
        ) from None
    return diffusers


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration as JSON, from a config.json or the folder that holds it."""
    path = Path(path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    works = "diffusers:path/to/transformer/config.json"
    if not file.exists():
        raise ShardwrightError(
            f"{file} does not exist",
            means="diffusers: takes a path to one model's configuration on this machine; nothing is ever downloaded",
            change="MODEL",
            works=works,
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ShardwrightError(
            f"cannot read {file}: {error}", means="it is not a diffusers configuration", change="MODEL", works=works
        ) from None
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str):
        raise ShardwrightError(
            f"{file} has no '_class_name'",
            means="it is not the configuration of a diffusers model",
            change="MODEL",
            works="a config.json as save_pretrained writes it, in a folder such as unet, transformer or vae",
        )
    if name not in _CLASSES:
        raise _unsupported(name, "")
    return config


def _unsupported(what: str, near: str) -> ShardwrightError:
    return ShardwrightError(
        f"{what}: its inputs are not known",
        means=f"known are: {', '.join(_CLASSES)}",
        change="MODEL, or the configuration",
        works=near or "package.module:factory, which returns the model, a batch and a loss of yours",
        exit_code=ExitCode.USAGE,
    )


def build_model(config: Mapping[str, Any], overrides: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model on the meta device, in training mode."""
    name = config["_class_name"]
    model_class = getattr(require_diffusers(), name)
    settings = _settings(model_class, config, overrides)
    try:
        with offline(), own_folders_hidden(), _quiet(), torch.device("meta"), Recorder() as recorder:
            model = model_class(**settings).to(dtype)
    except Exception as error:  # layers check their settings with many kinds of exceptions
        raise ShardwrightError(
            f"diffusers cannot build {name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
            means="a value of the configuration is wrong, or two contradict each other",
            change="the configuration" + (f" or the overrides {dict(overrides)}" if overrides else ""),
            works="the file as save_pretrained wrote it",
        ) from error
    remember(model, recorder)
    flat = _CLASSES[name].forward
    forward = flat(model.config) if flat is not None else None
    if forward is not None:
        model.__class__ = type(name, (model_class,), {"forward": forward, "__module__": model_class.__module__})
    return model.train()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Advice on what from_pretrained would do is of no use here."""
    logging = require_diffusers().utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _settings(model_class: Any, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    known = [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]
    for key, value in overrides.items():
        if key not in known and key not in LATENT_SIZES:
            near = near_matches(key, [*known, *LATENT_SIZES])
            raise ShardwrightError(
                f"{model_class.__name__} has no setting {key!r}",
                means="near matches: " + (", ".join(near) or "none"),
                change=f"the override {key}={value}",
                works=f"{near[0]}={value}" if near else "a key of the configuration",
            )
    given = {**config, **overrides}
    # JSON has no tuples, which some classes ask for
    return {
        name: tuple(value) if isinstance(value, list) and value and not isinstance(value[0], list) else value
        for name, value in given.items()
        if name in known
    }


def default_seq_len(config: Mapping[str, Any]) -> int | None:
    """Tokens of the text; None for a class without."""
    return _CLASSES[config["_class_name"]].text_tokens or None


def fields_for(
    class_name: str,
    config: Mapping[str, Any],
    seq_len: int | None,
    dtype: torch.dtype,
    overrides: Mapping[str, Any],
) -> tuple[BatchField, ...]:
    sizes = {name: int(overrides[name]) for name in LATENT_SIZES if name in overrides}
    return _CLASSES[class_name].fields(Request(config, seq_len or 0, dtype, sizes))


def small_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that make a model of this configuration small enough to be checked on a few processes."""
    small = {key: value for key, value in SMALL.items() if config.get(key) is not None}
    if "block_out_channels" in config:
        small["block_out_channels"] = [8] * len(config["block_out_channels"])
        small["attention_head_dim"] = 4
        levels = 2 ** (len(config["block_out_channels"]) - 1)
        small["sample_size"] = max(8, 2 * levels)
        small.pop("in_channels", None)
        small.pop("out_channels", None)
    if "axes_dims_rope" in small or "text_dim" in small:
        small |= {"latent_height": 4, "latent_width": 4, "latent_frames": 2}
    return small
