"""The lists of models: names go out, and for a name a model with a call that runs."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage import inputs, tiny

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
LIMIT = 60_000_000  # parameters of a model that is made tiny
PATIENCE_S = 25  # for finding a configuration and a call
WHOLE_LIMIT = 330_000_000  # parameters of a model that is taken as it is


class CannotBuild(Exception):
    """No model of this name can be built, or run, here."""


# Which head is built where a model type has several: the first of these lists that names it.
_HEADS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "OBJECT_DETECTION",
    "DEPTH_ESTIMATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "TIME_SERIES_PREDICTION", "TEXT_TO_WAVEFORM", "PRETRAINING",
)  # fmt: skip


def transformers_names() -> list[str]:
    """Every model type that some auto class can build, without the parts of others."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    heads = _heads()
    types = [
        t
        for t in {**heads, **MODEL_MAPPING_NAMES}
        if not t.endswith(
            ("_text", "_text_model", "_vision_model", "_vision", "_vision_text_model", "_audio", "_encoder")
        )
    ]
    return [f"{t}:{attention}" for t in sorted(types) for attention in ("eager", "sdpa")]


def _heads() -> dict[str, str]:
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for head in _HEADS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES", {})
        for model_type, class_name in mapping.items():
            found.setdefault(model_type, class_name[0] if isinstance(class_name, (list, tuple)) else class_name)
    return found


def transformers_model(name: str) -> Built:
    """A tiny model of `type:attention` with a call."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    transformers.logging.set_verbosity_error()
    model_type, _, attention = name.partition(":")
    base = MODEL_MAPPING_NAMES.get(model_type)
    base = base[0] if isinstance(base, (list, tuple)) else base
    reasons = list[str]()
    for class_name in dict.fromkeys(n for n in (_heads().get(model_type), base) if n):
        model_class = getattr(transformers, str(class_name))
        if attention == "sdpa" and not model_class._supports_sdpa:
            raise CannotBuild(f"{class_name} has no sdpa attention")
        for built in _of_class(model_class, CONFIG_MAPPING[model_type], attention):
            if not isinstance(built, str):
                return built
            reasons.append(built)
    raise CannotBuild("; ".join(dict.fromkeys(reasons[:1] + reasons[-1:])) or "no configuration could be made")


def _of_class(model_class: Any, config_class: Any, attention: str) -> Iterator[Built | str]:
    """For each way to make it small, a model of the class with a call, or why there is none."""
    begun = time.process_time()
    for how, config in tiny.candidates(config_class):
        if time.process_time() - begun > PATIENCE_S:
            return
        try:
            config._attn_implementation = attention
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > LIMIT:
                yield f"{how}: {size / 1e6:.0f} million parameters"
                continue
            torch.manual_seed(0)
            model = model_class(config).float()
        except Exception as cause:  # noqa: BLE001 (the next configuration is tried, and the last reason reported)
            yield f"{how}: {type(cause).__name__}: {' '.join(str(cause).split())[:160]}"
            continue
        found = _call_that_runs(model, model.config)
        yield (model, (), found) if isinstance(found, dict) else f"{how}: {found}"


def _call_that_runs(model: nn.Module, config: Any) -> dict[str, Any] | str:
    reason = "no call is known"
    try:
        calls = list(inputs.variants(model))
    except Exception as cause:  # noqa: BLE001 (inputs could not be made from this configuration)
        return f"inputs: {type(cause).__name__}: {str(cause)[:120]}"
    begun = time.process_time()
    for what, filled in calls:
        if time.process_time() - begun > PATIENCE_S:
            break
        tried: dict[str, Any] | None = filled
        for _ in range(2):
            try:
                _runs(model, (), tried or {})
            except Exception as cause:  # noqa: BLE001 (the next call is tried)
                if "text only" not in what or reason == "no call is known":
                    reason = f"{what}: {type(cause).__name__}: {' '.join(str(cause).split())[:160]}"
                tried = inputs.with_image_tokens(config, filled, str(cause))
                if tried is None:
                    break
            else:
                return tried or {}
    return reason


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        with torch.no_grad():
            model(*args, **kwargs)


def torchvision_names() -> list[str]:
    """All registered models; one of each module first, so that a run that is cut short has seen every family."""
    from torchvision import models

    names = [
        f"{kind}/{n}"
        for kind in ("classification", "segmentation", "detection", "video", "optical_flow")
        for n in _torchvision_of(models, kind)
    ]
    families: dict[str, str] = {}
    for name in names:
        families.setdefault(models.get_model_builder(name.rpartition("/")[2]).__module__, name)
    firsts = set(families.values())
    return sorted(names, key=lambda n: (n not in firsts, names.index(n)))


def _torchvision_of(models: Any, kind: str) -> list[str]:
    module = {"classification": models}.get(kind) or getattr(models, kind)
    return [n for n in models.list_models(module=module) if kind != "classification" or "/" not in n]


def torchvision_model(name: str) -> Built:
    """A model by its registered name, on small images."""
    from torchvision import models

    kind, _, registered = name.partition("/")
    torch.manual_seed(0)
    extra: dict[str, Any] = {"weights": None} | (
        {"weights_backbone": None} if kind in ("segmentation", "detection") else {}
    )
    if "inception" in registered or "googlenet" in registered:
        extra["init_weights"] = False
    if registered.startswith("vit_"):
        extra["image_size"] = 64 if registered != "vit_h_14" else 56
    if kind == "detection" and not registered.startswith("ssd"):
        extra |= {"min_size": 96, "max_size": 160}
    size = 0
    with contextlib.suppress(NotImplementedError), torch.device("meta"):  # some compute their widths with tensors
        size = sum(p.numel() for p in models.get_model(registered, **extra).parameters())
    if size > WHOLE_LIMIT:
        raise CannotBuild(f"{size / 1e6:.0f} million parameters, too many for this machine")
    model = models.get_model(registered, **extra)
    if kind == "detection":
        images = [torch.rand(3, 96, 96), torch.rand(3, 96, 128)]
        return model, (images, [_detection_target(96, 96), _detection_target(96, 128)]), {}
    if kind == "video":
        large = "mvit" in registered or "s3d" in registered
        return model, (torch.randn(1, 3, 16, 224, 224) if large else torch.randn(2, 3, 8, 64, 64),), {}
    if kind == "optical_flow":
        return model, (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128)), {}
    sizes = (64, 96, 224, 299) if "inception" not in registered else (128, 299)
    return model, (_first_that_runs(model, [(torch.randn(2, 3, s, s),) for s in sizes])), {}


def _detection_target(height: int, width: int) -> dict[str, Tensor]:
    masks = torch.zeros(1, height, width, dtype=torch.uint8)
    masks[:, 10:60, 10:50] = 1
    keypoints = torch.cat([torch.rand(1, 17, 2) * 50 + 8, torch.ones(1, 17, 1)], -1)
    return {
        "boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]),
        "labels": torch.tensor([1]),
        "masks": masks,
        "keypoints": keypoints,
    }


def _first_that_runs(model: nn.Module, calls: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    reason: Exception | None = None
    for args in calls:
        try:
            _runs(model, args, {})
            return args
        except Exception as cause:  # noqa: BLE001 (the next size is tried)
            reason = cause
    raise CannotBuild(f"{type(reason).__name__}: {str(reason)[:160]}")


def timm_names() -> list[str]:
    """The smallest-named model of every module of timm: one a family."""
    import timm

    names = sorted(_timm_families(timm))
    firsts = set({n.partition("/")[0]: n for n in reversed(names)}.values())
    return sorted(names, key=lambda n: (n not in firsts, n))


def _timm_families(timm: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            family = f"{module}/{name.split('_')[0].rstrip('0123456789')}"
            found.setdefault(family, []).append(name)
    return found


def timm_model(name: str) -> Built:
    """The smallest model of a family."""
    import timm

    torch.manual_seed(0)
    sized = []
    for candidate in _timm_families(timm)[name][:60]:
        for fewer in ({}, {"depth": 2}, {"depths": (1, 1, 1, 1)}):
            try:
                with torch.device("meta"):
                    size = sum(p.numel() for p in timm.create_model(candidate, **fewer).parameters())
            except Exception:  # noqa: BLE001 (some models cannot be made on meta, or take no depth)
                continue
            sized.append((size, candidate, fewer))
            if size < LIMIT / 3:
                break
    sized.sort(key=lambda s: s[0])
    if sized and sized[0][0] > WHOLE_LIMIT:
        raise CannotBuild(f"{sized[0][0] / 1e6:.0f} million parameters, too many for this machine")
    _, chosen, fewer = sized[0] if sized else (0, _timm_families(timm)[name][0], {})
    model = timm.create_model(chosen, **fewer)
    native = model.default_cfg.get("input_size", (3, 224, 224))
    sizes = dict.fromkeys([(native[0], 64, 64), (native[0], 128, 128), tuple(native)])
    return model, _first_that_runs(model, [(torch.randn(2, *s),) for s in sizes]), {}


def hard_names() -> list[str]:
    from scenarios.hard_cases import CASES

    return sorted(CASES)


def hard_model(name: str) -> Built:
    from scenarios.hard_cases import CASES

    torch.manual_seed(0)
    return CASES[name]()


LISTS: dict[str, tuple[Callable[[], list[str]], Callable[[str], Built]]] = {
    "transformers": (transformers_names, transformers_model),
    "torchvision": (torchvision_names, torchvision_model),
    "timm": (timm_names, timm_model),
    "hard": (hard_names, hard_model),
}
