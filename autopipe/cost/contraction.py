"""Merges nodes of a profile that may not be cut apart: its groups, those that the caller adds, and the cycles that
merging them makes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from profiler.records import Profile


def contract(
    profile: Profile, edges: Sequence[tuple[int, int]], together: Iterable[Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """Groups and the cycles between them, as sets of the profile's nodes, in topological order."""
    parent = list(range(len(profile.nodes)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    groups: dict[str, list[int]] = {}
    for i, node in enumerate(profile.nodes):
        if node.group is not None:
            groups.setdefault(node.group, []).append(i)
    for group in [*groups.values(), *together]:
        for i in group[1:]:
            parent[find(i)] = find(group[0])
    root = [find(i) for i in range(len(profile.nodes))]
    component = _components(root, [(root[u], root[v]) for u, v in edges])
    return _numbered(component, edges)


def _components(root: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    """The strongly connected component of each node, by Tarjan's algorithm without recursion (SIAM J. Comput. 1972)."""
    successors: dict[int, set[int]] = {r: set() for r in root}
    for u, v in edges:
        if u != v:
            successors[u].add(v)
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    component: dict[int, int] = {}
    stack: list[int] = []
    for start in successors:
        if start in index:
            continue
        work = [(start, iter(sorted(successors[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            v, rest = work[-1]
            for x in rest:
                if x not in index:
                    index[x] = low[x] = len(index)
                    stack.append(x)
                    work.append((x, iter(sorted(successors[x]))))
                    break
                if x not in component:
                    low[v] = min(low[v], index[x])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[v])
                while low[v] == index[v] and v not in component:
                    component[stack.pop()] = v
    return [component[r] for r in root]


def _numbered(component: Sequence[int], edges: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Members of each component; the components in topological order, those that come first in the profile first."""
    members: dict[int, list[int]] = {}
    for i, c in enumerate(component):
        members.setdefault(c, []).append(i)
    after: dict[int, set[int]] = {c: set() for c in members}
    for u, v in edges:
        if component[u] != component[v]:
            after[component[u]].add(component[v])
    waiting = dict.fromkeys(members, 0)
    for successors in after.values():
        for c in successors:
            waiting[c] += 1
    ready = [(group[0], c) for c, group in members.items() if not waiting[c]]
    heapq.heapify(ready)
    ordered: list[tuple[int, ...]] = []
    while ready:
        _, c = heapq.heappop(ready)
        ordered.append(tuple(members[c]))
        for x in after[c]:
            waiting[x] -= 1
            if not waiting[x]:
                heapq.heappush(ready, (members[x][0], x))
    return tuple(ordered)


def indivisible(profile: Profile) -> tuple[tuple[int, ...], ...]:
    """The sets of the profile's nodes that may not be cut apart, the caller's wishes left out."""
    index = {node.name: i for i, node in enumerate(profile.nodes)}
    return contract(profile, [(index[name], i) for i, node in enumerate(profile.nodes) for name in node.inputs], ())
