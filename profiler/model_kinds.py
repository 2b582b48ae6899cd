"""The kinds of transformers models that can be trained from a configuration alone, and how it tells its kind.

A kind decides the class that is built, what a batch holds (hf_batches.py) and, where the class computes no loss of its
own, the loss (losses.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ExitCode, ShardwrightError
from .near import near_matches

Sequence = Literal["tokens", "frames", "none"]


@dataclass(frozen=True)
class ModelKind:
    """One way of training.

    tables: of transformers.models.auto.modeling_auto, model_type -> class. more: further classes that no table has.
    endings: of class names, for classes that this version of transformers lacks or renamed.
    sequence: what --seq-len counts: tokens of text, frames of the encoder (raw audio is as long as gives so many), or
    nothing, where the configuration fixes every shape.
    """

    name: str
    tables: tuple[str, ...]
    endings: tuple[str, ...] = ()
    sequence: Sequence = "tokens"
    more: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _forecasters() -> dict[str, tuple[str, ...]]:
    return {"patchtst": ("PatchTSTForPrediction",), "patchtsmixer": ("PatchTSMixerForPrediction",)}


# In the order in which they are asked for a class that several tables have.
_KINDS = (
    ModelKind("image-text-to-text", ("IMAGE_TEXT_TO_TEXT",)),
    ModelKind("causal-lm", ("CAUSAL_LM",), ("ForCausalLM",)),
    ModelKind("masked-lm", ("MASKED_LM",), ("ForMaskedLM",)),
    ModelKind("speech-to-text", ("SPEECH_SEQ_2_SEQ",)),
    ModelKind("seq2seq", ("SEQ_TO_SEQ_CAUSAL_LM",), ("ForConditionalGeneration",)),
    ModelKind("image-classification", ("IMAGE_CLASSIFICATION",), ("ForImageClassification",), "none"),
    ModelKind("text-classification", ("SEQUENCE_CLASSIFICATION",), ("ForSequenceClassification",)),
    ModelKind("token-classification", ("TOKEN_CLASSIFICATION",), ("ForTokenClassification",)),
    ModelKind("question-answering", ("QUESTION_ANSWERING",), ("ForQuestionAnswering",)),
    ModelKind("multiple-choice", ("MULTIPLE_CHOICE",), ("ForMultipleChoice",)),
    ModelKind("ctc", ("CTC",), ("ForCTC",), "frames"),
    ModelKind("audio-classification", ("AUDIO_CLASSIFICATION",), ("ForAudioClassification",), "frames"),
    ModelKind("frame-classification", ("AUDIO_FRAME_CLASSIFICATION",), ("ForAudioFrameClassification",), "frames"),
    ModelKind("speaker-verification", ("AUDIO_XVECTOR",), ("ForXVector",), "frames"),
    ModelKind("image-text-pairs", ("ZERO_SHOT_IMAGE_CLASSIFICATION",)),
    ModelKind("object-detection", ("OBJECT_DETECTION",), ("ForObjectDetection",), "none"),
    ModelKind("semantic-segmentation", ("SEMANTIC_SEGMENTATION",), ("ForSemanticSegmentation",), "none"),
    ModelKind("depth-estimation", ("DEPTH_ESTIMATION",), ("ForDepthEstimation",), "none"),
    ModelKind("masked-image-modeling", ("MASKED_IMAGE_MODELING",), ("ForMaskedImageModeling",), "none"),
    ModelKind("super-resolution", ("IMAGE_TO_IMAGE",), ("ForImageSuperResolution",), "none"),
    ModelKind("video-classification", ("VIDEO_CLASSIFICATION",), ("ForVideoClassification",), "none"),
    ModelKind("forecasting", ("TIME_SERIES_PREDICTION",), (), "none", _forecasters()),
    ModelKind("series-classification", ("TIME_SERIES_CLASSIFICATION",), ("ForTimeSeriesClassification",), "none"),
    ModelKind("series-regression", ("TIME_SERIES_REGRESSION",), ("ForRegression",), "none"),
)
KINDS: dict[str, ModelKind] = {kind.name: kind for kind in _KINDS}
# Without architectures: a base model is trained as a language model where it can be one.
_UNNAMED = ("masked-lm", "causal-lm", "seq2seq", "speech-to-text")
# Heads that a checkpoint of a base model carries; they say nothing of how it is to be trained.
_BASE_SUFFIXES = ("Model", "ForPreTraining", "PreTrainedModel", "LMHeadModel", "EncoderModel")


def classes_of(model_type: str, modeling_auto: Any) -> dict[str, tuple[str, ...]]:
    """Kind -> the names of the classes of this model type for it, in the order of KINDS."""
    found: dict[str, tuple[str, ...]] = {}
    for name, kind in KINDS.items():
        classes: list[str] = list(kind.more.get(model_type, ()))
        for table in kind.tables:
            entry = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {}).get(model_type)
            classes += (entry,) if isinstance(entry, str) else (entry or ())
        if classes:
            found[name] = tuple(classes)
    return found


def named_architectures(config: Any) -> list[str]:
    return [name for name in getattr(config, "architectures", None) or [] if isinstance(name, str)]


def choose_kind(config: Any, classes: Mapping[str, tuple[str, ...]], asked: str | None) -> str:
    """The kind asked for, else the one that the configuration's architectures name, else that of its model_type.

    Raises ShardwrightError where there is none.
    """
    if asked is not None:
        return _checked(config, classes, asked)
    architectures = named_architectures(config)
    for architecture in architectures:
        for kind, names in classes.items():
            if architecture in names:
                return kind
    foreign = [name for name in architectures if not name.endswith(_BASE_SUFFIXES)]
    for architecture in foreign:
        for name in classes:
            if KINDS[name].endings and architecture.endswith(KINDS[name].endings):
                return name
    if not classes or foreign:
        raise _no_kind(config, classes)
    is_pair = getattr(config, "is_encoder_decoder", False) or "causal-lm" not in classes
    if "seq2seq" in classes and is_pair:
        return "seq2seq"
    if "masked-lm" in classes and not getattr(config, "is_decoder", False):
        return "masked-lm"
    return next((kind for kind in _UNNAMED if kind in classes), next(iter(classes)))


def class_name(config: Any, classes: Mapping[str, tuple[str, ...]], kind: str) -> str:
    """The class to build: the one that the configuration names, if it is of this kind, else the kind's first."""
    named = [name for name in named_architectures(config) if name in classes[kind]]
    return named[0] if named else classes[kind][0]


def _checked(config: Any, classes: Mapping[str, tuple[str, ...]], asked: str) -> str:
    if asked in classes:
        return asked
    near = near_matches(asked, list(classes)) or list(classes)
    known = asked in KINDS
    raise ShardwrightError(
        f"kind {asked!r}: " + (f"transformers has no such head for {config.model_type}" if known else "unknown"),
        means=f"{config.model_type} can be trained as: {', '.join(classes) or 'nothing from a configuration alone'}",
        change=f"--kind {asked}",
        works=f"--kind {near[0]}" if near else "package.module:factory, with a loss of your own",
        exit_code=ExitCode.USAGE,
    )


def _no_kind(config: Any, classes: Mapping[str, tuple[str, ...]]) -> ShardwrightError:
    named = ", ".join(named_architectures(config)) or "no architectures named"
    first = next(iter(classes), "")
    return ShardwrightError(
        f"{config.model_type} ({named}) is none of: {', '.join(KINDS)}",
        means="there is no training loss that could be chosen for it",
        change="--kind, or 'architectures' in the configuration, or MODEL",
        works=f"--kind {first} (architectures: [{classes[first][0]!r}])" if first else "package.module:factory",
        exit_code=ExitCode.USAGE,
    )
