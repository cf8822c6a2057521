"""Training and evaluation over the batches of an iterator, and the log line every few steps."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from autopipe.engine.data_feed import no_data
from autopipe.engine.introspection import last_step
from autopipe.engine.ranks.context import Context
from autopipe.engine.setup.prepared import Prepared
from autopipe.engine.step.microbatch import Batch
from autopipe.engine.step.step_stats import Measurements
from profiler import accelerator


def train_over(
    batches: Iterable[Batch], train: Callable[[Batch], float], *, steps: int | None, show_bar: bool | None
) -> list[float]:
    """Train on each batch.

    Args:
        train: one training step; returns its loss.
        steps: how many there will be, if that is known.
        show_bar: show a progress bar; None: if stderr is a terminal.

    Returns:
        The loss of each step.
    """
    losses: list[float] = []
    with tqdm(total=steps, unit="step", disable=None if show_bar is None else not show_bar) as bar:
        for batch in batches:
            losses.append(train(batch))
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
            bar.update()
    return losses


def evaluate_over(batches: Iterable[Batch], evaluate: Callable[[Batch], tuple[Tensor, float]]) -> float:
    """The mean loss over all batches.

    Args:
        evaluate: returns the mean loss of a batch, and the batch's weight.

    Raises:
        ConfigError: there is no batch.
    """
    total = weight = 0.0
    for batch in batches:
        loss, counted = evaluate(batch)
        total, weight = total + float(loss) * counted, weight + counted
    if not weight:
        raise no_data()
    return total / weight


@dataclass(slots=True)
class StepLog:
    """The log line every few steps. Every rank keeps one, since the parts of the line lie on different ranks.

    Attributes:
        write: takes the lines, on the first rank.
        every: steps between two lines; 0: none.
        samples, num_losses, loss_sum, started: of the steps since the last line, and when they began.
    """

    context: Context
    write: Callable[[str], None]
    every: int
    samples: int = 0
    num_losses: int = 0
    loss_sum: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, loss: float, samples: int, *, timed: bool) -> None:
        """Count a step.

        Args:
            timed: false for a step that also captured and planned the model, which later ones do not.
        """
        self.loss_sum, self.num_losses, self.samples = self.loss_sum + loss, self.num_losses + 1, self.samples + samples
        if not timed:
            self.samples, self.started = 0, time.perf_counter()

    def write_if_due(self, step: int, prepared: Prepared, measured: Measurements) -> None:
        """One line on the first rank, from all ranks, if it is due. Collective."""
        if not self.every or step % self.every:
            return
        config, replicas = prepared.config, prepared.peers.mesh.shape.replicas
        optimizer, clipped = prepared.optimizer, config.max_grad_norm is not None
        norm = optimizer.grad_norm if clipped else prepared.parameters.norm()
        timeline = last_step(self.context, measured)
        rate = None if optimizer.optimizer is None else float(optimizer.optimizer.param_groups[0]["lr"])
        ranks = self.context.gather((rate, self.samples, _peak_bytes(self.context.device)))
        seconds = time.perf_counter() - self.started
        rate = next((r for r, _, _ in ranks if r is not None), None)
        own_batches = [0] if config.shard_batch else [stages[0] for stages in replicas]
        parts = [f"step {step}: loss {self.loss_sum / max(1, self.num_losses):.4f}"]
        parts += [] if rate is None else [f"lr {rate:.3g}"]
        parts += [] if norm is None else [f"gradient norm {norm:.3g}"]
        if optimizer.scale.growth_interval:
            parts += [f"loss scale {optimizer.scale.scale:g}", f"skipped {optimizer.skipped}"]
        parts += [f"{sum(ranks[r][1] for r in own_batches) / seconds:.1f} samples/s"]
        parts += [f"peak {max(p for _, _, p in ranks) / 2**30:.2f} GiB"]
        parts += [f"bubble {timeline.mean_bubble:.1%}"] if timeline.events else []
        if self.context.rank == 0:
            self.write(", ".join(parts))
        self.samples, self.num_losses, self.loss_sum, self.started = 0, 0, 0.0, time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    """The most memory that was allocated on the device; on a CPU, the process's peak."""
    if accelerator.is_accelerator(device):
        return accelerator.peak_bytes(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
