"""From the gradients of a step to new parameters: unscale, clip, step the optimizer (each replica its shard under ZeRO-1), step the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from autopipe.config import PipelineConfig
from autopipe.engine.parameters import StageParameters
from autopipe.engine.replicas import Replicas
from autopipe.engine.scaling import LossScale
from autopipe.engine.transport import Transport


class Optimizing:
    """The optimizer of this rank, over the parameters of its stages that it owns.

    Attributes:
        optimizer, lr_scheduler: made by the user's callables; None where none was given, or where nothing here is trained.
        owner: for each trainable parameter of this rank, the replica whose optimizer steps it; -1: every replica's.
        grad_norm: the norm over all stages before clipping, in the last step.
        skipped: steps that were skipped because of an overflow.
    """

    def __init__(
        self,
        config: PipelineConfig,
        parameters: StageParameters,
        replicas: Replicas,
        transport: Transport,
        scale: LossScale,
    ) -> None:
        self._config, self._parameters, self._replicas, self._transport, self.scale = (
            config,
            parameters,
            replicas,
            transport,
            scale,
        )
        self.owner = replicas.shard(parameters.trainable())
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: Any = None
        self.grad_norm: float | None = None
        self.skipped = 0
        mine = self.mine()
        if config.optimizer is not None and mine:
            self.optimizer = config.optimizer(list(mine.values()))
            if config.lr_scheduler is not None:
                self.lr_scheduler = config.lr_scheduler(self.optimizer)

    def mine(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that this rank's optimizer steps."""
        return {n: p for n, p in self._parameters.trainable().items() if self._replicas.owns(self.owner[n])}

    def zero_grad(self) -> None:
        """Clears the gradients of this rank, where there is an optimizer."""
        if self._config.optimizer is not None:
            for parameter in self._parameters.trainable().values():
                parameter.grad = None

    def step(self) -> None:
        """One step of the optimizer and the scheduler. Collective."""
        finite = self.scale.unscale(list(self._parameters.trainable().values()), self._transport)
        if self._config.max_grad_norm is not None and finite:
            self.grad_norm = self._parameters.clip(self._config.max_grad_norm)
        self.scale.update(finite)
        if not finite:
            self.skipped += 1
            return
        if self.optimizer is not None:
            self.optimizer.step()
        if self._config.optimizer is not None:
            self._replicas.share_parameters(self._parameters.trainable(), self.owner)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_by_name(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """For each parameter that this rank's optimizer steps: its state, and the options of its group."""
        if self.optimizer is None:
            return {}
        options = {id(p): _options(g) for g in self.optimizer.param_groups for p in g["params"]}
        return {
            n: (dict(self.optimizer.state.get(p, {})), options[id(p)])
            for n, p in self.mine().items()
            if id(p) in options
        }

    def set_state_by_name(
        self, states: Mapping[str, Mapping[str, Any]], options: Mapping[str, Mapping[str, Any]], scheduler: Any
    ) -> None:
        """Puts back what `state_by_name` gave, on any layout."""
        if self.optimizer is None:
            return
        named = self.mine()
        for name, state in states.items():
            self.optimizer.state[named[name]] = dict(state)
        for group in self.optimizer.param_groups:
            first = next((n for n, p in named.items() if any(p is q for q in group["params"]) and n in options), None)
            if first is not None:
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in options[first].items()})
        if self.lr_scheduler is not None and scheduler is not None:
            self.lr_scheduler.load_state_dict(scheduler)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v.item() if isinstance(v, torch.Tensor) else v
        for k, v in group.items()
        if k not in ("params", "param_names")
    }
