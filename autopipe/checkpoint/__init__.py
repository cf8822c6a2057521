"""Checkpoints and weights on disk: tensors by the model's names, all else as JSON; nothing that is read can run
code."""

from autopipe.checkpoint.convert import MAX_SHARD_BYTES, TARGETS, convert
from autopipe.checkpoint.folders import META, SCHEMA, newest, published, read_meta
from autopipe.checkpoint.tensors import MODEL, OPTIMIZER, RNG, Reader, expect_one_process
from autopipe.checkpoint.weights import Weights, open_weights
from autopipe.checkpoint.writing import ALONE, Ranks, plain, write

__all__ = [
    "ALONE",
    "MAX_SHARD_BYTES",
    "META",
    "MODEL",
    "OPTIMIZER",
    "RNG",
    "SCHEMA",
    "TARGETS",
    "Ranks",
    "Reader",
    "Weights",
    "convert",
    "expect_one_process",
    "newest",
    "open_weights",
    "plain",
    "published",
    "read_meta",
    "write",
]
