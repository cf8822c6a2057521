"""The tensors that cross each cut of a plan, with sizes if there is a profile, and times."""

from __future__ import annotations

import html

from autopipe.plan import Plan, Transfer
from autopipe.units import MIB
from profiler.records import Profile

SHOWN = 6


def transfer_section(plan: Plan, profile: Profile | None) -> str:
    """A table with a row for each pair of stages."""
    sizes = {} if profile is None else {node.name: node.output_bytes for node in profile.nodes}
    rows = "\n".join(_row(plan, transfer, sizes) for transfer in plan.transfers)
    heads = "".join(
        f"<th>{head}</th>"
        for head in ("from → to", "tensors", "activations MiB", "gradients MiB", "time on the link ms")
    )
    legend = "For one micro-batch. A transfer that skips stages goes straight from its producer to its reader."
    return (
        f'<p class="legend">{legend}</p>\n<div class="table"><table class="transfers"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(plan: Plan, transfer: Transfer, sizes: dict[str, int]) -> str:
    def tensor(name: str) -> str:
        size = f" <small>{sizes[name] / MIB:,.3f} MiB</small>" if name in sizes else ""
        return f"<code>{html.escape(name)}</code>{size}"

    named = [tensor(name) for name in transfer.nodes]
    cell = ", ".join(named[:SHOWN])
    if len(named) > SHOWN:
        cell += f"<details><summary>{len(named) - SHOWN} more</summary>{', '.join(named[SHOWN:])}</details>"
    back = plan.link.transfer_us(transfer.backward_bytes) if transfer.backward_bytes else 0.0
    there = plan.link.transfer_us(transfer.forward_bytes)
    return (
        f'<tr><td><b class="chip s{transfer.source}">{transfer.source}</b> → '
        f'<b class="chip s{transfer.target}">{transfer.target}</b></td><td class="tensors">{cell}</td>'
        f"<td>{transfer.forward_bytes / MIB:,.3f}</td><td>{transfer.backward_bytes / MIB:,.3f}</td>"
        f"<td>{(there + back) / 1e3:,.3f}</td></tr>"
    )
