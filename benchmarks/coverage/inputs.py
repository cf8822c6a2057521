"""A transformers model goes in; keyword arguments that its forward takes come out, found by the names of its
parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH = 2, 16


def _attribute(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that the configuration, or one of those inside it, has."""
    inner = [v for v in config.__dict__.values() if hasattr(v, "to_dict")]
    for one in (config, *inner):
        for name in names:
            value = getattr(one, name, None)
            if value is not None:
                return value
    return default


def _ids(config: Any, length: int = LENGTH) -> Tensor:
    vocab = _attribute(config, "vocab_size", "encoder_vocab_size", default=100)
    return torch.randint(3, max(min(int(vocab), 128) - 64, 10), (BATCH, length))


def _pixels(config: Any, size: int | None) -> Tensor:
    image = size or _attribute(config, "image_size", "pretrain_image_size", default=64)
    height, width = image if isinstance(image, (tuple, list)) else (image, image)
    return torch.randn(
        BATCH, int(_attribute(config, "num_channels", "in_channels", default=3)), int(height), int(width)
    )


def _labels(config: Any, model_name: str, filled: dict[str, Any]) -> Any:
    classes = int(getattr(config, "num_labels", 2) or 2)
    if re.search(r"ImageClassification|SequenceClassification|VideoClassification|AudioClassification", model_name):
        return torch.randint(0, classes, (BATCH,))
    if "CTC" in model_name:
        return torch.randint(1, 20, (BATCH, 3))
    if "SemanticSegmentation" in model_name and "pixel_values" in filled:
        return torch.randint(0, classes, (BATCH, *filled["pixel_values"].shape[-2:]))
    if "TokenClassification" in model_name:
        return torch.randint(0, classes, (BATCH, LENGTH))
    if re.search(r"LM|ConditionalGeneration|Speech", model_name) and "input_ids" in filled:
        return filled["input_ids"].clone()
    if re.search(r"ConditionalGeneration|Speech|VisionEncoderDecoder", model_name):
        return _ids(config)
    return None


def _speech(config: Any, form: str) -> Tensor:
    mel = int(
        _attribute(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim", "n_mels", default=80)
    )
    frames = int(_attribute(config, "max_source_positions", default=64)) * 2 if "whisper" in form else 64
    return torch.randn(BATCH, mel, frames) if "mel first" in form else torch.randn(BATCH, frames, mel)


def variants(model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, keyword arguments): the fullest call first, then plainer ones."""
    config, name = model.config, type(model).__name__
    parameters = inspect.signature(model.forward).parameters
    for size in (None, 64, 224, 256, 384, 32):
        if size is not None and "pixel_values" not in parameters:
            break
        for speech in ("mel first", "frames first", "mel first whisper"):
            if speech != "mel first" and "input_features" not in parameters:
                break
            for labelled in (True, False):
                filled = _fill(config, parameters, size, speech)
                labels = _labels(config, name, filled) if labelled and "labels" in parameters else None
                if labelled and labels is None:
                    continue
                if labels is not None:
                    filled["labels"] = labels
                if "decoder_input_ids" in parameters and labels is None:
                    filled["decoder_input_ids"] = _ids(config)
                yield f"image {size or 'as configured'}, {'labels' if labelled else 'no labels'}", filled
    if "input_ids" in parameters and ("pixel_values" in parameters or "input_features" in parameters):
        yield "text only", {"input_ids": _ids(config), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def _fill(config: Any, parameters: Any, size: int | None, speech: str) -> dict[str, Any]:
    """Values for the parameters that are known by name."""
    filled: dict[str, Any] = {}
    if "input_ids" in parameters:
        filled["input_ids"] = _ids(config)
        if "attention_mask" in parameters:
            mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
            mask[1, LENGTH - 3 :] = 0
            filled["attention_mask"] = mask
    if "pixel_values" in parameters:
        pixels = _pixels(config, size)
        if (
            "Video" in str(getattr(config, "architectures", ""))
            or hasattr(config, "num_frames")
            or hasattr(config, "tubelet_size")
        ):
            frames = int(getattr(config, "num_frames", 0) or 8)
            pixels = pixels.unsqueeze(1).repeat(1, frames, 1, 1, 1)
        filled["pixel_values"] = pixels
    if "pixel_values_videos" in parameters and "input_ids" not in parameters:
        frames = int(getattr(config, "frames_per_clip", 0) or 4)
        filled["pixel_values_videos"] = _pixels(config, size).unsqueeze(1).repeat(1, frames, 1, 1, 1)
    if "input_features" in parameters:
        filled["input_features"] = _speech(config, speech)
    if "input_values" in parameters:
        codec = "audio_codes" in parameters or "padding_mask" in parameters or "n_quantizers" in parameters
        spectrogram = (
            hasattr(config, "num_mel_bins") and hasattr(config, "max_length") and "input_ids" not in parameters
        )
        wave = torch.randn(BATCH, 1, 4800) if codec else torch.randn(BATCH, 4000)
        filled["input_values"] = (
            torch.randn(BATCH, int(config.max_length), int(config.num_mel_bins)) if spectrogram else wave
        )
    if "bbox" in parameters:
        corner = torch.randint(0, 50, (BATCH, LENGTH, 2))
        filled["bbox"] = torch.cat([corner, corner + 20], -1)
    if "past_values" in parameters:
        filled |= _time_series(config, parameters)
    return filled


def _time_series(config: Any, parameters: Any) -> dict[str, Tensor]:
    context, ahead = int(getattr(config, "context_length", 32)), int(getattr(config, "prediction_length", 8) or 8)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = int(getattr(config, "num_input_channels", getattr(config, "input_size", 1)) or 1)
    many = "past_time_features" not in parameters or channels > 1
    shape = lambda n: (BATCH, n, channels) if many else (BATCH, n)  # noqa: E731
    values = {"past_values": torch.randn(shape(context + lags)), "future_values": torch.randn(shape(ahead))}
    if "past_time_features" in parameters:
        features = int(getattr(config, "num_time_features", 0)) + int(getattr(config, "num_dynamic_real_features", 0))
        values |= {
            "past_time_features": torch.randn(BATCH, context + lags, features),
            "future_time_features": torch.randn(BATCH, ahead, features),
            "past_observed_mask": torch.ones(shape(context + lags)),
        }
    return {k: v for k, v in values.items() if k in parameters}


def with_image_tokens(config: Any, filled: dict[str, Any], message: str) -> dict[str, Any] | None:
    """Where a model says that its text has too few image tokens, a text with as many as it asks for; else None."""
    token = _attribute(config, "image_token_id", "image_token_index", "audio_token_id", "audio_token_index")
    numbers = [int(n) for n in re.findall(r"\d+", message)]
    if token is None or "input_ids" not in filled or not numbers or "token" not in message.lower():
        return None
    count = max(numbers)
    count = -(-count // BATCH) if count % BATCH == 0 else count
    if count > 4096:
        return None
    ids = torch.cat([torch.full((BATCH, count), int(token)), _ids(config, 8)], 1)
    changed = {**filled, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "labels" in filled:
        changed["labels"] = ids.clone()
    return changed
