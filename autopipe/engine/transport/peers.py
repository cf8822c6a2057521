"""The other ranks, as this one sees them."""

from __future__ import annotations

from dataclasses import dataclass

from autopipe.engine.ranks.context import Context
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.transport.p2p import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """This rank among the others, once it is known which rank runs which stages.

    Attributes:
        context: this process, and the collective questions outside of a step.
        mesh: which rank runs which stages of which replica.
        transport: moves tensors between two ranks.
    """

    context: Context
    mesh: ProcessMesh
    transport: Transport
