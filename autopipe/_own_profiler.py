"""Checks on import that `profiler` is the package that comes with autopipe, and not a file of the user's with that
name."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys


def _check() -> None:
    """Raise an ImportError that names the other file. A script's own folder comes first on Python's path."""
    loaded = sys.modules.get("profiler")
    spec = importlib.util.find_spec("profiler") if loaded is None else getattr(loaded, "__spec__", None)
    origin = str(getattr(loaded, "__file__", None) or (spec and spec.origin) or "an unknown place")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if any(importlib.machinery.PathFinder.find_spec("profiler.accelerator", [folder]) for folder in folders):
        return
    raise ImportError(
        f"`import profiler` finds {origin}, which is not the package `profiler` that comes with autopipe. "
        "Rename that file or folder, or take its folder off sys.path (a script's own folder is on it).",
        name="profiler",
        path=origin,
    )


_check()
