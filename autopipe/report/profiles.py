"""Report of a profile: the module tree with totals and shares, and the nodes, slowest first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from autopipe.report.plans import WHOLE_MODEL
from autopipe.report.tables import Cell, Column, Document, Table, render
from autopipe.units import MIB
from profiler.records import NodeProfile, Profile

SHOWN_NODES = 30
SHOWN_MODULES = 60
"""Rows that a person is shown; CSV and JSON have all of them."""

NODE_COLUMNS = (
    Column(name="node"),
    Column(name="module"),
    Column(name="forward ms", decimals=3),
    Column(name="backward ms", decimals=3),
    Column(name="share %", decimals=1),
    Column(name="output MiB", decimals=2),
    Column(name="saved MiB", decimals=2),
    Column(name="parameter MiB", decimals=2),
    Column(name="figures"),
)
MODULE_COLUMNS = (
    Column(name="module"),
    Column(name="nodes"),
    Column(name="forward ms", decimals=2),
    Column(name="backward ms", decimals=2),
    Column(name="share %", decimals=1),
    Column(name="saved MiB", decimals=1),
    Column(name="parameter MiB", decimals=1),
    Column(name="figures"),
)


@dataclass(slots=True)
class ModuleTotals:
    """Totals of the nodes of a module and of its submodules; a shared parameter counts once."""

    name: str
    num_nodes: int = 0
    forward_us: float = 0.0
    backward_us: float = 0.0
    saved_bytes: int = 0
    params: dict[str, float] = field(default_factory=dict)
    measured: int = 0

    def add(self, node: NodeProfile, params: dict[str, float]) -> None:
        """Add a node."""
        self.num_nodes += 1
        self.forward_us += node.forward_us
        self.backward_us += node.backward_us
        self.saved_bytes += node.saved_bytes
        self.params.update(params)
        self.measured += node.measured

    @property
    def param_bytes(self) -> float:
        """Size of its parameters and buffers."""
        return sum(self.params.values())


def profile_report(profile: Profile, format: str = "table", *, nodes: bool = False) -> str:
    """The report of a profile as `table`, `json`, `csv` (the nodes), `md` or `html`; with `nodes`, every node and no
    module tree.

    JSON is the profile's own form, raw bytes and microseconds, with the totals of the modules added: it can be read as
    a profile.

    Raises:
        ConfigError: an unknown format.
    """
    tree = module_tree(profile)
    if format == "json":
        return json.dumps({**profile.to_json(), "modules": [_plain(m) for m in tree]}, indent=1) + "\n"
    everything = format == "csv" or nodes
    table = _nodes(profile, len(profile.nodes) if everything else SHOWN_NODES)
    if everything:
        return render(Document(title="" if format == "csv" else _title(profile), parts=(table,)), format)
    modules = _modules(profile, tree)
    parts: list[Table | str] = [modules]
    if len(tree) > len(modules.rows):
        parts.append(f"{len(tree) - len(modules.rows)} modules further down are in --format json.")
    parts.append(table)
    if len(profile.nodes) > len(table.rows):
        parts.append(f"{len(profile.nodes) - len(table.rows)} faster nodes are shown by --nodes.")
    return render(Document(title=_title(profile), parts=tuple(parts)), format)


def module_tree(profile: Profile) -> list[ModuleTotals]:
    """Totals of every module, each before its submodules, in the order in which they first run; the whole model has no
    name."""
    totals: dict[str, ModuleTotals] = {}
    for node in profile.nodes:
        params = _param_bytes(profile, node)
        for name in _ancestors(node.module):
            totals.setdefault(name, ModuleTotals(name)).add(node, params)
    children: dict[str, list[str]] = {}
    for name in totals:
        if name:
            children.setdefault(name.rpartition(".")[0], []).append(name)

    def walk(name: str) -> Iterator[ModuleTotals]:
        yield totals[name]
        for child in children.get(name, ()):
            yield from walk(child)

    return list(walk(""))


def _ancestors(module: str) -> Iterator[str]:
    yield ""
    parts = module.split(".") if module else []
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])


def _param_bytes(profile: Profile, node: NodeProfile) -> dict[str, float]:
    """Size of each parameter that a node reads; its bytes in equal parts if the profile does not list them."""
    even = node.param_bytes / len(node.params) if node.params else 0.0
    return {n: profile.parameters[n].bytes if n in profile.parameters else even for n in node.params}


def _plain(module: ModuleTotals) -> dict[str, object]:
    return {
        "module": module.name,
        "num_nodes": module.num_nodes,
        "forward_us": module.forward_us,
        "backward_us": module.backward_us,
        "saved_bytes": module.saved_bytes,
        "param_bytes": round(module.param_bytes),
        "measured": module.measured == module.num_nodes,
    }


def _title(profile: Profile) -> str:
    total = sum(node.forward_us + node.backward_us for node in profile.nodes)
    estimated = sum(not node.measured for node in profile.nodes)
    label = f", {estimated} of them estimated" if estimated else ""
    return (
        f"Profile: {len(profile.nodes)} nodes{label}, a micro-batch of {profile.microbatch_size} samples, "
        f"{profile.dtype}, "
        f"on {profile.device}: {total / 1e3:,.2f} ms forward and backward"
    )


def _total_us(profile: Profile) -> float:
    return sum(node.forward_us + node.backward_us for node in profile.nodes) or 1.0


def _figures(measured: int, count: int) -> str:
    return "measured" if measured == count else "estimated" if not measured else "partly estimated"


def _nodes(profile: Profile, limit: int) -> Table:
    total = _total_us(profile)
    slowest = sorted(profile.nodes, key=lambda n: -(n.forward_us + n.backward_us))[:limit]
    rows: list[tuple[Cell, ...]] = [
        (
            node.name,
            node.module or WHOLE_MODEL,
            node.forward_us / 1e3,
            node.backward_us / 1e3,
            100 * (node.forward_us + node.backward_us) / total,
            node.output_bytes / MIB,
            node.saved_bytes / MIB,
            node.param_bytes / MIB,
            _figures(node.measured, 1),
        )
        for node in slowest
    ]
    return Table(title="By node, slowest first", columns=NODE_COLUMNS, rows=tuple(rows))


def _modules(profile: Profile, tree: list[ModuleTotals]) -> Table:
    total = _total_us(profile)
    deepest = max(depth for depth in range(1, 99) if depth == 1 or _count(tree, depth) <= SHOWN_MODULES)
    rows: list[tuple[Cell, ...]] = []
    for module in tree:
        depth = module.name.count(".") + 1 if module.name else 0
        if depth > deepest:
            continue
        name = "· " * depth + (module.name.rpartition(".")[2] if module.name else WHOLE_MODEL)
        rows.append(
            (
                name,
                module.num_nodes,
                module.forward_us / 1e3,
                module.backward_us / 1e3,
                100 * (module.forward_us + module.backward_us) / total,
                module.saved_bytes / MIB,
                module.param_bytes / MIB,
                _figures(module.measured, module.num_nodes),
            )
        )
    return Table(title="By module", columns=MODULE_COLUMNS, rows=tuple(rows))


def _count(tree: list[ModuleTotals], depth: int) -> int:
    """Modules down to a depth."""
    return sum(not module.name or module.name.count(".") < depth for module in tree)
