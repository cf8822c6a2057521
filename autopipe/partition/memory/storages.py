"""Makers, keepers and readers of each storage, as arrays over a profile's nodes and pairs of them."""

from __future__ import annotations

import numpy as np

from profiler.records import Profile


class Storages:
    """The memory that the nodes of a profile make, each node one storage and what it keeps besides.

    Attributes:
        saved, inner: (N) `saved_bytes` of each node, and the part of it that is no output.
        output: (N) bytes of each node's output; 0 where it looks into another's.
        size: (N) bytes of the storage that each node makes: what is kept of it, or its output where nothing is.
        owners: the nodes into whose storage each node's output looks; none where that is a parameter's.
        made, reader: pairs of a node and one that reads its storage.
        kept, keeper: pairs of a node and one whose backward keeps its storage.
    """

    def __init__(self, profile: Profile) -> None:
        nodes = profile.nodes
        index = {node.name: i for i, node in enumerate(nodes)}
        self.saved = np.array([node.saved_bytes for node in nodes], float)
        self.inner = np.array([min(node.inner_bytes, node.saved_bytes) for node in nodes], float)
        self.output = np.array([0 if node.views else node.output_bytes for node in nodes], float)
        self.owners = [
            [index[name] for name in node.views if name in index] if node.views else [i] for i, node in enumerate(nodes)
        ]
        reads = {(m, i) for i, node in enumerate(nodes) for name in node.inputs for m in self.owners[index[name]]}
        keeps = {(index[name], i) for i, node in enumerate(nodes) for name in node.keeps}
        if not keeps:  # not known: what is kept, every reader and the maker may keep
            keeps = reads | {(i, i) for i in range(len(nodes))}
        self.made, self.reader = np.array(sorted(reads), np.int64).reshape(-1, 2).T
        self.kept, self.keeper = np.array(sorted(keeps), np.int64).reshape(-1, 2).T
        self.size = np.where(self.saved > self.inner, self.saved - self.inner, self.output)
