"""Module tree of a plan, every module in the colours of its stages, with times if there is a profile."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from autopipe.plan import Plan
from autopipe.report.plans import WHOLE_MODEL
from autopipe.units import MIB
from profiler.records import Profile

MAX_ROWS = 400


@dataclass(slots=True)
class Module:
    """A module by its full name with what lies in it: compute time and parameters of each stage; submodules in the
    order in which they first appear."""

    name: str
    us: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    params: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    children: dict[str, Module] = field(default_factory=dict)

    @property
    def stages(self) -> list[int]:
        """The stages on which something of it lies."""
        return sorted(self.us.keys() | self.params.keys())

    def child(self, name: str) -> Module:
        """The submodule of this name, made if it is not there."""
        return self.children.setdefault(name, Module(name))


def module_tree(plan: Plan, profile: Profile | None) -> Module:
    """The tree: by the nodes of the profile; without one, by the names of the parameters."""
    root = Module(WHOLE_MODEL)
    known = {} if profile is None else {node.name: node for node in profile.nodes}
    for stage in plan.stages:
        for name in stage.nodes:
            if name in known:
                node = known[name]
                _add(root, node.module, stage.index, node.forward_us + node.backward_us, set(node.params))
        if not known:
            for name in stage.params:
                _add(root, name.rpartition(".")[0], stage.index, 0.0, {name})
    return root


def _add(root: Module, path: str, stage: int, us: float, params: set[str]) -> None:
    module = root
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        module = module.child(".".join(parts[:depth])) if depth else root
        module.us[stage] += us
        module.params[stage] |= params


def tree_section(plan: Plan, profile: Profile | None) -> str:
    """The tree as nested lists. A module that lies whole on one stage is not opened further."""
    root = module_tree(plan, profile)
    total = sum(root.us.values())
    rows = list(_rows(root, total, profile, 0))
    left = len(rows) - MAX_ROWS
    more = f'<p class="note">{left:,} modules more are not shown.</p>' if left > 0 else ""
    what = "Each module with its share of the compute time" if profile else "The modules that have parameters"
    legend = f"{what}, in the colour of its stage. Only modules that a cut divides are opened."
    return f'<p class="legend">{legend}</p>\n<ul class="tree">\n{"".join(rows[:MAX_ROWS])}</ul>\n{more}'


def _rows(module: Module, total: float, profile: Profile | None, depth: int) -> Iterator[str]:
    stages = module.stages
    chips = "".join(f'<b class="chip s{k}">{k}</b>' for k in stages)
    us = sum(module.us.values())
    names = set().union(*module.params.values()) if module.params else set()
    words = [f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}", f"{len(names)} parameters"]
    share = ""
    if profile is not None:
        share = f'<span class="share">{us / total:.1%}</span>' if total else ""
        size = sum(profile.parameters[n].bytes for n in names if n in profile.parameters)
        words += [f"{size / MIB:,.2f} MiB", f"{us / 1e3:,.3f} ms"]
        if len(stages) > 1:
            words += [f"stage {k}: {module.us[k] / 1e3:,.3f} ms" for k in stages]
    hover = html.escape(f"{module.name}: {', '.join(words)}")
    parent, dot, last = module.name.rpartition(".")
    name = f"<small>{html.escape(parent + dot)}</small>{html.escape(last)}"
    yield f'<li style="--depth:{depth}" data-t="{hover}">{chips}<span>{name}</span>{share}</li>\n'
    if len(stages) > 1:
        for child in module.children.values():
            yield from _rows(child, total, profile, depth + 1)
