"""`.metadata` of a checkpoint is a pickle; it is read with an allow-list of plain records, so that nothing in it can
run code."""

from __future__ import annotations

import pickle
from typing import Any

import torch

_ALLOWED = {
    "torch": {"Size", "device", "layout", "memory_format"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_rebuild_memory_format"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
_ALLOWED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


class SafeUnpickler(pickle._Unpickler):
    """Makes nothing but what `torch.distributed.checkpoint` writes about its tensors.

    It is the unpickler written in Python: the other allocates what a damaged file asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        """The class of this name, where it is allowed."""
        if name in _ALLOWED.get(module, ()) or module in _ALLOWED_MODULES:
            found = super().find_class(module, name)
            if module not in _ALLOWED_MODULES or (isinstance(found, type) and found.__module__ == module):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
