"""An engine's state once its model is planned and placed: everything that a call needs, made once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autopipe.checkpoint import Reader
from autopipe.config import PipelineConfig
from autopipe.engine.ranks.mesh import ProcessMesh
from autopipe.engine.state.checkpoint_state import collect, load
from autopipe.engine.state.gradients import GradientSync
from autopipe.engine.state.optimizer import ShardedOptimizer
from autopipe.engine.state.parameters import StageParameters
from autopipe.engine.step.batch_shard import BatchShard, shard_batch_of
from autopipe.engine.step.microbatch import Batch, MicroBatch, check_device, split
from autopipe.engine.step.outputs import gather_outputs
from autopipe.engine.step.program_cache import ProgramCache
from autopipe.engine.step.runner import Runner
from autopipe.engine.transport.peers import Peers
from autopipe.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Use of the processes of the launch.

    Attributes:
        mesh: which rank runs which stages of which replica.
        num_microbatches: micro-batches of a replica, in a batch that has samples enough.
    """

    mesh: ProcessMesh
    num_microbatches: int

    def split(self, batch: Batch, config: PipelineConfig) -> list[MicroBatch]:
        """The micro-batches of a batch: of all replicas if they share it.

        Raises:
            ConfigError: the batch is empty.
        """
        return split(*batch, self.num_microbatches * (self.mesh.data_parallel if config.shard_batch else 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A planned and placed model.

    Attributes:
        config: the settings.
        launch: how the processes are used.
        peers: the other ranks.
        plan: the plan that is run.
        parameters: those of this rank's stages.
        gradients: sums their gradients over ranks.
        optimizer: steps them.
        programs, runner: what calls run, and what runs it.
    """

    config: PipelineConfig
    launch: Launch
    peers: Peers
    plan: Plan
    parameters: StageParameters
    gradients: GradientSync
    optimizer: ShardedOptimizer
    programs: ProgramCache
    runner: Runner

    def split(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of a batch.

        Raises:
            ConfigError: the batch is empty, or lies on another kind of device.
        """
        microbatches = self.launch.split(batch, self.config)
        check_device(microbatches[0], self.peers.context.device)
        return microbatches

    def shard(self, microbatches: list[MicroBatch], *, weighted: bool = True) -> BatchShard:
        """This replica's share of a batch's micro-batches. Collective if every replica has a batch of its own.

        Args:
            weighted: false if no loss is made, so that `loss_weight` has nothing to count.
        """
        self.peers.context.monitor.enter("weighing the micro-batches")
        most = self.launch.num_microbatches
        return shard_batch_of(microbatches, self.config, self.peers, most=most, weighted=weighted)

    def evaluate(self, batch: Batch, number: int) -> tuple[Tensor, float]:
        """The mean loss of a batch, and the batch's weight. Collective.

        Args:
            number: of the training step that comes next.
        """
        shard = self.shard(self.split(batch))
        step, _ = self.runner.run("eval", False, shard, number)
        return self.runner.share_loss(step), shard.total

    def predict(self, batch: Batch, number: int) -> Any:
        """The model's output for a batch, on the ranks that `predict_on` names; None elsewhere. Collective."""
        context, mesh = self.peers.context, self.peers.mesh
        microbatches = self.split(batch)
        shard = self.shard(microbatches, weighted=False)
        step, runs = self.runner.run("predict", False, shard, number)
        with context.monitor.waiting("sharing the output"):
            outputs = gather_outputs(runs, shard.microbatches, mesh, everywhere=self.config.predict_on == "all")
        if outputs is None:
            return None
        return self.runner.predicted(step, microbatches).unflatten([o.to(context.device) for o in outputs])

    def collect(self, client_state: Any) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The tensors that this rank saves in a checkpoint, by key, and all else of the run. Collective."""
        return collect(
            self.parameters, self.optimizer, self.plan, self.peers, seed=self.runner.seed, client_state=client_state
        )

    def load(self, reader: Reader) -> None:
        """Take this rank's share out of a checkpoint. Collective.

        Raises:
            CheckpointError: it does not fit this model; on every rank.
        """
        self.peers.context.agree(lambda: load(reader, self.parameters, self.optimizer))
        if reader.seed is not None:
            self.runner.seed = reader.seed

    def held_bytes(self) -> int:
        """Bytes of the parameters, buffers and optimizer state of this rank."""
        held = [*(p for _, p in self.parameters.named_parameters()), *self.parameters.buffers()]
        optimizer = self.optimizer.optimizer
        if optimizer is not None:
            held += [p for group in optimizer.param_groups for p in group["params"]]
            held += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
