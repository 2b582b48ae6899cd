"""What a batch of a transformers model holds, from its configuration alone, for every kind of model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError
from .image_text import image_text_fields
from .inputs import BatchField, target_length
from .model_kinds import KINDS

AUDIO_FRAMES = 499  # wav2vec 2.0's for ten seconds at 16 kHz
INTEGER = torch.int64


@dataclass(frozen=True)
class Request:
    """seq_len counts what the kind's `sequence` says; None where it counts nothing. dtype: of real-valued entries."""

    model: Any
    config: Any
    seq_len: int | None
    dtype: torch.dtype

    @property
    def length(self) -> int:
        assert self.seq_len is not None
        return self.seq_len

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.model.forward).parameters


def fields_for(kind: str, model: nn.Module, seq_len: int | None, dtype: torch.dtype) -> tuple[BatchField, ...]:
    """The batch of a transformers model of this kind."""
    request = Request(model, model.config, seq_len, dtype)
    return _FIELDS[kind](request)


def default_seq_len(kind: str, config: Any, own: int | None) -> int | None:
    """own: the longest that the configuration names, in tokens."""
    if KINDS[kind].sequence == "none":
        return None
    if KINDS[kind].sequence == "frames":
        return AUDIO_FRAMES
    return min(own or 2048, 4096)


def _text(config: Any) -> Any:
    return config.get_text_config()


def _tokens(config: Any, seq_len: int, name: str = "input_ids") -> BatchField:
    vocab = config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < vocab else 0
    return BatchField(name, (seq_len,), INTEGER, "tokens", high=vocab, pad=pad)


def _mask(seq_len: int) -> BatchField:
    return BatchField("attention_mask", (seq_len,), INTEGER, "padding")


def _classes(config: Any, shape: tuple[int, ...] = (), name: str = "labels") -> BatchField:
    return BatchField(name, shape, INTEGER, "classes", high=config.num_labels)


def _causal(request: Request) -> tuple[BatchField, ...]:
    tokens = _tokens(_text(request.config), request.length)
    return (tokens, BatchField("labels", tokens.shape, INTEGER, "same", of="input_ids"))


def _masked(request: Request) -> tuple[BatchField, ...]:
    tokens = _tokens(_text(request.config), request.length)
    return (tokens, _mask(request.length), BatchField("labels", tokens.shape, INTEGER, "masked", of="input_ids"))


def _target(config: Any, length: int) -> BatchField:
    return BatchField("labels", (length,), INTEGER, "classes", high=config.vocab_size)


def _seq2seq(request: Request) -> tuple[BatchField, ...]:
    text = _text(request.config)
    return (
        _tokens(text, request.length),
        _mask(request.length),
        _target(text, target_length(request.length)),
    )


def _text_labels(request: Request) -> BatchField:
    """As transformers reads problem_type: one number, several independent classes, or one class a sample."""
    config = request.config
    if config.num_labels == 1 or config.problem_type == "regression":
        shape = () if config.num_labels == 1 else (config.num_labels,)
        return BatchField("labels", shape, request.dtype, "normal")
    if config.problem_type == "multi_label_classification":
        return BatchField("labels", (config.num_labels,), request.dtype, "chosen")
    return _classes(config)


def _text_classification(request: Request) -> tuple[BatchField, ...]:
    return (_tokens(_text(request.config), request.length), _mask(request.length), _text_labels(request))


def _token_classification(request: Request) -> tuple[BatchField, ...]:
    labels = _classes(request.config, (request.length,))
    return (_tokens(_text(request.config), request.length), _mask(request.length), labels)


def _question_answering(request: Request) -> tuple[BatchField, ...]:
    places = [
        BatchField(name, (), INTEGER, "classes", high=request.length) for name in ("start_positions", "end_positions")
    ]
    return (_tokens(_text(request.config), request.length), _mask(request.length), *places)


def _multiple_choice(request: Request) -> tuple[BatchField, ...]:
    choices = 4
    tokens = BatchField(
        "input_ids", (choices, request.length), INTEGER, "tokens", high=_text(request.config).vocab_size
    )
    return (tokens, BatchField("labels", (), INTEGER, "classes", high=choices))


def _image_shape(config: Any) -> tuple[int, int, int]:
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(config, "num_channels", 3), height, width


def pixels(config: Any, dtype: torch.dtype, *before: int) -> BatchField:
    """before: dimensions between the batch's and the channels', such as the frames of a video."""
    return BatchField("pixel_values", (*before, *_image_shape(config)), dtype, "normal")


def _image_classification(request: Request) -> tuple[BatchField, ...]:
    return (pixels(request.config, request.dtype), _classes(request.config))


def _segmentation(request: Request) -> tuple[BatchField, ...]:
    _, height, width = _image_shape(_vision_part(request.config))
    return (pixels(_vision_part(request.config), request.dtype), _classes(request.config, (height, width)))


def _vision_part(config: Any) -> Any:
    """Where a model names its image's size: itself, or its backbone."""
    backbone = getattr(config, "backbone_config", None)
    return backbone if getattr(config, "image_size", None) is None and backbone is not None else config


def _depth(request: Request) -> tuple[BatchField, ...]:
    _, height, width = _image_shape(_vision_part(request.config))
    depth = BatchField("depth", (height, width), request.dtype, "uniform", low=0.5, high=10)
    return (pixels(_vision_part(request.config), request.dtype), depth)


def _super_resolution(request: Request) -> tuple[BatchField, ...]:
    channels, height, width = _image_shape(request.config)
    scale = getattr(request.config, "upscale", 1)
    sharp = BatchField("sharp", (channels, height * scale, width * scale), request.dtype, "normal")
    return (pixels(request.config, request.dtype), sharp)


def _masked_image(request: Request) -> tuple[BatchField, ...]:
    config = request.config
    _, height, width = _image_shape(config)
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[-1]
    patches = (height // patch) * (width // patch)
    return (
        pixels(config, request.dtype),
        BatchField("bool_masked_pos", (patches,), torch.bool, "chosen"),
    )


def _video(request: Request) -> tuple[BatchField, ...]:
    frames: int = getattr(request.config, "num_frames", None) or getattr(request.config, "frames_per_clip", 16) or 16
    field = pixels(request.config, request.dtype, frames)
    if request.takes("pixel_values_videos"):
        field = BatchField("pixel_values_videos", field.shape, field.dtype, "normal")
    return (field, _classes(request.config))


def _detection(request: Request) -> tuple[BatchField, ...]:
    """A target for each query: which query an object goes to (the matching) is decided where data are prepared."""
    config = _vision_part(request.config)
    queries: int = (
        getattr(request.config, "num_queries", 0) or getattr(request.config, "num_detection_tokens", 0) or 100
    )
    return (
        pixels(config, request.dtype),
        BatchField("class_labels", (queries,), INTEGER, "classes", high=request.config.num_labels + 1),
        BatchField("boxes", (queries, 4), request.dtype, "uniform", low=0.25, high=0.5),
    )


def _pairs(request: Request) -> tuple[BatchField, ...]:
    config = request.config
    limit = getattr(config.text_config, "max_position_embeddings", request.length)
    length = min(request.length, limit)
    tokens = _tokens(config.text_config, length)
    end = getattr(config.text_config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < tokens.high:
        tokens = BatchField(tokens.name, tokens.shape, INTEGER, "tokens", high=tokens.high, head=(end,), avoid=(end,))
    return (tokens, pixels(config.vision_config, request.dtype))


def _audio(request: Request) -> BatchField:
    """Raw audio as long as gives seq_len frames, or features, of which the encoder takes seq_len."""
    config, name = request.config, request.model.main_input_name
    if isinstance(getattr(config, "conv_kernel", None), (list, tuple)):
        samples = request.length
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            samples = (samples - 1) * stride + kernel
        return BatchField(name, (samples,), request.dtype, "normal")
    if config.model_type == "audio-spectrogram-transformer":
        return BatchField(name, (config.max_length, config.num_mel_bins), request.dtype, "normal")
    if config.model_type in ("whisper", "moonshine"):
        return _speech(request)
    width = next(
        (
            getattr(part, key)
            for part in (config, getattr(config, "encoder_config", None))
            for key in ("feature_projection_input_dim", "num_mel_bins")
            if hasattr(part, key)
        ),
        None,
    )
    if width is None:
        raise _unknown_audio(config)
    return BatchField(name, (_subsampled(config) * request.length, width), request.dtype, "normal")


def _subsampled(config: Any) -> int:
    return int(getattr(getattr(config, "encoder_config", config), "subsampling_factor", 1) or 1)


def _unknown_audio(config: Any) -> ShardwrightError:
    return ShardwrightError(
        f"{config.model_type}: what its audio looks like does not follow from its configuration",
        means="raw audio of convolutional encoders (wav2vec 2.0, HuBERT, WavLM, ...), spectrograms of Whisper, "
        "Speech2Text, wav2vec2-bert, Parakeet and AST are known",
        change="MODEL",
        works="package.module:factory, which returns the model and a batch of yours",
        exit_code=ExitCode.USAGE,
    )


def _ctc(request: Request) -> tuple[BatchField, ...]:
    config = request.config
    blank = config.pad_token_id if isinstance(config.pad_token_id, int) else 0
    # a target needs a frame for each token and a blank between equal ones
    length = max(1, request.length // 4)
    return (
        _audio(request),
        BatchField("labels", (length,), INTEGER, "classes", high=config.vocab_size, avoid=(blank,)),
    )


def _audio_classification(request: Request) -> tuple[BatchField, ...]:
    return (_audio(request), _classes(request.config))


def _audio_frames(request: Request) -> tuple[BatchField, ...]:
    """transformers takes the largest entry of each frame's labels as its class."""
    return (_audio(request), BatchField("labels", (request.length, request.config.num_labels), request.dtype, "normal"))


def _speech(request: Request) -> BatchField:
    config, name = request.config, request.model.main_input_name
    if config.model_type == "whisper":  # the encoder halves the frames, and takes no other number
        return BatchField(name, (config.num_mel_bins, 2 * config.max_source_positions), request.dtype, "normal")
    if config.model_type == "speech_to_text":
        width = config.input_feat_per_channel * config.input_channels
        shrinking = 2**config.num_conv_layers
        return BatchField(name, (shrinking * request.length, width), request.dtype, "normal")
    if config.model_type == "moonshine":  # three convolutions: 127 by 64, 7 by 3, 3 by 2
        samples = (((request.length - 1) * 2 + 3 - 1) * 3 + 7 - 1) * 64 + 127
        return BatchField(name, (samples,), request.dtype, "normal")
    raise ShardwrightError(
        f"{config.model_type}: what its audio looks like does not follow from its configuration",
        means="of speech-to-text models whisper, speech_to_text and moonshine are known",
        change="MODEL",
        works="package.module:factory, which returns the model and a batch of yours",
        exit_code=ExitCode.USAGE,
    )


def _speech_to_text(request: Request) -> tuple[BatchField, ...]:
    text = request.config
    limit = getattr(text, "max_target_positions", None) or request.length
    return (_speech(request), _target(text, min(request.length, limit)))


def _series(request: Request) -> BatchField:
    config = request.config
    return BatchField("past_values", (config.context_length, config.num_input_channels), request.dtype, "normal")


def _forecasting(request: Request) -> tuple[BatchField, ...]:
    config = request.config
    if config.model_type.startswith("timesfm"):
        return (
            BatchField("past_values", (config.context_length,), request.dtype, "normal"),
            BatchField("future_values", (config.horizon_length,), request.dtype, "normal"),
        )
    future = (config.prediction_length, config.num_input_channels)
    return (_series(request), BatchField("future_values", future, request.dtype, "normal"))


def _series_classification(request: Request) -> tuple[BatchField, ...]:
    return (_series(request), _classes(request.config, name="target_values"))


def _series_regression(request: Request) -> tuple[BatchField, ...]:
    shape = (request.config.num_targets,)
    return (_series(request), BatchField("target_values", shape, request.dtype, "normal"))


def _image_text(request: Request) -> tuple[BatchField, ...]:
    return image_text_fields(request.config, request.length, request.dtype)


_FIELDS: dict[str, Callable[[Request], tuple[BatchField, ...]]] = {
    "image-text-to-text": _image_text,
    "causal-lm": _causal,
    "masked-lm": _masked,
    "speech-to-text": _speech_to_text,
    "seq2seq": _seq2seq,
    "image-classification": _image_classification,
    "text-classification": _text_classification,
    "token-classification": _token_classification,
    "question-answering": _question_answering,
    "multiple-choice": _multiple_choice,
    "ctc": _ctc,
    "audio-classification": _audio_classification,
    "frame-classification": _audio_frames,
    "speaker-verification": _audio_classification,
    "image-text-pairs": _pairs,
    "object-detection": _detection,
    "semantic-segmentation": _segmentation,
    "depth-estimation": _depth,
    "masked-image-modeling": _masked_image,
    "super-resolution": _super_resolution,
    "video-classification": _video,
    "forecasting": _forecasting,
    "series-classification": _series_classification,
    "series-regression": _series_regression,
}
assert _FIELDS.keys() == KINDS.keys()
