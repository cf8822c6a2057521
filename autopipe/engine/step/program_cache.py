"""The programs that calls run, each captured when its kind of call and signature are first seen."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from autopipe.capture import Captured
from autopipe.capture.seeding import RandomSource
from autopipe.config import PipelineConfig
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.step.microbatch import MicroBatch
from autopipe.engine.step.precision import precision_context
from autopipe.engine.step.programs import Kind, Program, capture_program, make_program, mode_of
from autopipe.engine.transport.peers import Peers
from autopipe.placement import follow
from autopipe.plan import Plan
from autopipe.schedule import Edge
from autopipe.stages import regions_of

MAX_PROGRAMS = 64
"""Programs that are kept; the one used longest ago is dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """A model whose parameters lie on their stages.

    Attributes:
        module: the user's model.
        training_flags: the training flag that the user gave each module.
        owned: the stages that hold each parameter and buffer; later graphs follow them.
        planned: the stage of each node of the graph that was planned.
    """

    module: nn.Module
    training_flags: Mapping[nn.Module, bool]
    owned: Mapping[str, tuple[int, ...]]
    planned: Mapping[str, int]


class ProgramCache:
    """Captures and keeps programs. Every rank asks for the same ones in the same order.

    Attributes:
        model: what is captured.
        random: draws the random numbers of all programs.
    """

    def __init__(self, model: PlacedModel, peers: Peers, config: PipelineConfig, plan: Plan) -> None:
        self.model = model
        self.random = RandomSource()
        self._peers, self._config, self._plan = peers, config, plan
        self._modes = precision_context(config, peers.context.device)
        self._parameters = list(model.module.parameters())
        self._programs: dict[str, Program] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def add(self, kind: Kind, training: bool, microbatch: MicroBatch, captured: Captured) -> None:
        """Keep the program of the graph that was planned. Collective."""
        self._keep(kind, self.key(kind, training, microbatch), captured, self.model.planned)

    def key(self, kind: Kind, training: bool, microbatch: MicroBatch) -> str:
        """The key of the program that runs a micro-batch."""
        return self.keys(kind, training, [microbatch])[0]

    def keys(self, kind: Kind, training: bool, microbatches: Sequence[MicroBatch]) -> list[str]:
        """The keys of the programs that run these micro-batches."""
        frozen = zlib.crc32(bytes(p.requires_grad for p in self._parameters))
        return [f"{kind}|{training}|{frozen}|{m.signature}" for m in microbatches]

    def has_all(self, keys: Sequence[str]) -> bool:
        """Return whether no program has to be captured."""
        return all(key in self._programs for key in keys)

    def get(self, key: str) -> Program:
        """The program of a key, which is now the one used last."""
        self._programs[key] = self._programs.pop(key)
        return self._programs[key]

    def ensure(self, kind: Kind, training: bool, wanted: Mapping[str, MicroBatch]) -> None:
        """Capture what is needed and not there yet, in the same order on every rank. Collective."""
        new = {key: m for key, m in wanted.items() if key not in self._programs}
        if self._peers.mesh.data_parallel > 1:  # replicas may have different shapes: each makes the programs of all
            anything = torch.tensor(int(bool(new)))
            self._peers.transport.all_reduce(anything, dist.ReduceOp.MAX)
            if not anything:
                return
            parts = self._peers.context.gather({key: m.template() for key, m in new.items()})
            new = {key: m for part in parts for key, m in part.items() if key not in self._programs}
        for key, microbatch in new.items():
            self._build(key, kind, training, microbatch)

    def _build(self, key: str, kind: Kind, training: bool, microbatch: MicroBatch) -> None:
        model = self.model

        def captured_here() -> tuple[Captured, Mapping[str, int]]:
            with mode_of(model.module, training, model.training_flags):
                captured = capture_program(
                    model.module, microbatch, kind, self._config.loss_fn, check=False, modes=self._modes
                )
            same_nodes = model.planned.keys() == {n.name for n in captured.nodes}
            return captured, model.planned if same_nodes else follow(captured, model.owned)

        captured, stage_of = self._peers.context.agree(captured_here)
        self._peers.context.require_equal(captured.graph_hash, "graph", "pass batches of the same shapes on all ranks")
        self._keep(kind, key, captured, stage_of)

    def _keep(self, kind: Kind, key: str, captured: Captured, stage_of: Mapping[str, int]) -> None:
        program = make_program(
            kind,
            captured,
            stage_of,
            self._peers.mesh,
            self.random,
            compiled=self._config.compile,
            recompute=regions_of(self._plan),
        )
        self._peers.transport.open(_flows(program.edges, self._peers.mesh))
        self._programs[key] = program
        if len(self._programs) > MAX_PROGRAMS:
            del self._programs[next(iter(self._programs))]


def _flows(edges: Sequence[Edge], mesh: ProcessMesh) -> list[tuple[int, int]]:
    """The flows of a stage graph in every replica, both directions, without those within a rank."""
    flows = []
    for replica in range(mesh.data_parallel):
        for e in edges:
            a, b = mesh.rank_of(e.source, replica), mesh.rank_of(e.target, replica)
            flows += [(a, b), (b, a)] if e.backward else [(a, b)]
    return [f for f in flows if f[0] != f[1]]
