"""Profiles of random graphs."""

from __future__ import annotations

import random

from profiler.records import NodeProfile, ParameterProfile, Profile


def random_profile(
    seed: int, num_nodes: int, *, groups: bool = False, params: bool = True, chain: bool = False
) -> Profile:
    """A random graph in topological order, with skips, ties, frozen parameters and outputs without gradients."""
    rng = random.Random(seed)
    names = [f"n{i}" for i in range(num_nodes)]
    owned = [f"w{i}" for i in range(max(num_nodes * 2 // 3, 1))]
    nodes = []
    for i in range(num_nodes):
        near = [i - 1] if i and (chain or rng.random() < 0.7) else []
        skips = [] if chain else rng.sample(range(i), min(i, rng.choice([0, 0, 1, 1, 2])))
        saved = rng.randint(0, 500)
        nodes.append(
            NodeProfile(
                name=names[i],
                inputs=tuple(names[j] for j in sorted({*near, *skips})),
                forward_us=rng.choice([0.0, rng.uniform(0.5, 4)]),
                backward_us=rng.uniform(0, 6),
                output_bytes=rng.choice([0, rng.randint(1, 300), rng.randint(1, 3000)]),
                module=f"layer{i // 3}.part{i % 3}",
                saved_bytes=saved,
                params=tuple(rng.sample(owned, min(len(owned), rng.choice([0, 1, 1, 2])))) if params else (),
                workspace_bytes=rng.randint(0, 200),
                differentiable=rng.random() < 0.8,
                group=f"g{rng.randint(0, num_nodes // 3)}" if groups and rng.random() < 0.4 else None,
            )
        )
    table = {w: ParameterProfile(bytes=rng.randint(1, 400), trainable=rng.random() < 0.8) for w in owned}
    return Profile(nodes=tuple(nodes), parameters=table if params else {}, graph_hash=f"random{seed}")
