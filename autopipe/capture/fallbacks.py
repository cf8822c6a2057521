"""The ways in which a model can be turned into a graph, tried one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from autopipe.capture.captured import Captured
from autopipe.capture.exported import export_trace
from autopipe.capture.places import is_internal, source_of
from autopipe.capture.reading import SizeRead, Untraceable
from autopipe.capture.trace import Call, CaptureMode, TraceFailure, trace
from autopipe.errors import AutopipeError, CaptureError

_MAX_OPAQUE = 64
_LARGE = 0.5  # share of the parameters above which a module is kept whole only where nothing else does


def recordings(model: nn.Module, call: Call, on_meta: bool) -> Iterator[Captured]:
    """The graphs of the ways that work, in order:

    1. a recording on fake tensors;
    2. the same with torch's compiling flag set, by which model code picks traceable branches;
    3. with those modules kept whole whose Python reads values of tensors, as long as they hold a part of the model
    only; 4. `torch.export`; 5. on the real tensors, with those modules, and methods of large ones, kept whole whose
    Python reads values; 6. 3 and 5 again, with modules of any size kept whole; 7. on the real tensors, with a guard on
    every value that is read outside of what 5 kept whole, and then on every value.

    Raises:
        CaptureError: none is left, and none worked. The message names module, file and line.
    """
    found = False
    try:
        yield trace(model, call)
        first, found = None, True
    except TraceFailure as failure:
        first = failure
        if isinstance(first.cause, AutopipeError):
            raise first.cause from None
    for captured in _others(model, call, first, on_meta):
        if captured is not None:
            found = True
            yield captured
    if not found:
        assert first is not None
        raise _error(model, first) from first.cause


def _others(model: nn.Module, call: Call, first: TraceFailure | None, on_meta: bool) -> Iterator[Captured | None]:
    """The ways after the first; None for one that does not work."""
    yield _attempt(model, call, CaptureMode(compiling=True))
    if first is not None:
        yield _with_places_kept(model, call, CaptureMode(), first, _LARGE)[0]
        if not isinstance(first.cause, Untraceable):
            yield export_trace(model, call)
    if not on_meta:
        yield _with_places_kept(model, call, CaptureMode(real=True), None, _LARGE)[0]
    if first is not None:
        yield _with_places_kept(model, call, CaptureMode(), first)[0]
    if not on_meta:
        captured, kept = _with_places_kept(model, call, CaptureMode(real=True), None)
        yield captured
        if captured is None and kept:
            yield _attempt(model, call, CaptureMode(guarded=True, opaque=frozenset(kept)))
        yield _attempt(model, call, CaptureMode(guarded=True))


def _attempt(model: nn.Module, call: Call, way: CaptureMode) -> Captured | None:
    try:
        return trace(model, call, way)
    except TraceFailure:  # the first failure is the one that is told
        return None


def _with_places_kept(
    model: nn.Module, call: Call, way: CaptureMode, last: TraceFailure | None, limit: float = 1.0
) -> tuple[Captured | None, dict[str, str]]:
    """Keeps the innermost places whole whose Python reads values; what the model's own code reads is guarded where it
    may be.

    A module with more than `limit` of the parameters is not kept whole: of what it reads, yes-no answers alone are
    guarded. Returns the graph, None where there is none, and the places kept with the reason.
    """
    kept, guard_in, all_parameters = dict[str, str](), set[str](), _size(model)
    for _ in range(_MAX_OPAQUE):
        if last is not None:
            place = _to_keep(model, last, kept, way.real, limit * all_parameters)
            if place and ":" not in place and _size(model.get_submodule(place)) > limit * all_parameters:
                if place in way.answers_in:
                    break
                way = replace(way, answers_in=way.answers_in | {place})
                kept = {p: why for p, why in kept.items() if not _holds(p, place)}
            elif place:
                kept = {p: why for p, why in kept.items() if not p.startswith((f"{place}.", f"{place}:"))}
                kept[place] = _reason(last)
            elif (
                inner := last.method if way.real and last.method else last.module
            ) is not None and inner not in guard_in:
                guard_in.add(inner)
                kept = {p: why for p, why in kept.items() if not _holds(p, inner)}
            elif isinstance(last.cause, SizeRead) and not way.fixed:
                way = replace(way, fixed=True)
            else:
                break
        try:
            captured = trace(model, call, replace(way, opaque=frozenset(kept), guard_in=frozenset(guard_in)))
        except TraceFailure as failure:
            last = failure
            continue
        seen = {n.target for n in captured.nodes if n.op == "call_module"}
        kept = {p: why for p, why in kept.items() if p in seen or ":" in p}
        return replace(captured, opaque=kept), kept
    return None, kept


def _holds(place: str, inner: str) -> bool:
    """Whether a place contains another, or is it."""
    return inner == place or inner.startswith((f"{place}.", f"{place}:"))


def _to_keep(model: nn.Module, failure: TraceFailure, kept: Mapping[str, str], real: bool, limit: float) -> str | None:
    """The innermost place around a failure that is not kept whole yet; None where that is the model itself."""
    name = failure.module
    method = failure.method if real and name is not None and failure.method not in kept else None
    if method and _size(model.get_submodule(str(name))) > limit:
        return method
    while name and (name in kept or isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict))):
        name = name.rpartition(".")[0]
    return name


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _reason(failure: TraceFailure) -> str:
    return f"{type(failure.cause).__name__}: {str(failure.cause).splitlines()[0] if str(failure.cause) else ''}"[:200]


def _error(model: nn.Module, failure: TraceFailure) -> CaptureError:
    return CaptureError(
        f"{_module(model, failure.module)} could not be captured: {_reason(failure)}",
        expected="tensor code that can be run on tensors without data",
        where=_place(failure.cause) or source_of(model, failure.module or ""),
        remedy="move the code that reads tensor values into a submodule of its own, which is then kept whole, or "
        "write it as tensor code",
    )


def _module(model: nn.Module, name: str | None) -> str:
    return "the model" if name is None else f"module {name!r} ({type(model.get_submodule(name)).__name__})"


def _place(cause: BaseException) -> str:
    """File and line of the innermost frame of the user's code."""
    seen: BaseException | None = cause
    while seen is not None:
        for frame in reversed(traceback.extract_tb(seen.__traceback__)):
            if not is_internal(frame.filename):
                return f"{frame.filename}:{frame.lineno}"
        seen = seen.__cause__
    return ""
