"""The optimizer's step: unscale, clip, step (under ZeRO-1 each replica its shard), and step the scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from autopipe.config import PipelineConfig
from autopipe.engine.state.loss_scale import LossScale
from autopipe.engine.state.master_weights import MasterCopies, Originals
from autopipe.engine.state.parameters import StageParameters
from autopipe.engine.state.replicas import Replicas
from autopipe.engine.transport.p2p import Transport
from autopipe.errors import ConfigError, EngineError


class ShardedOptimizer:
    """The optimizer of this rank, over the parameters of its stages that it owns.

    Attributes:
        optimizer, lr_scheduler: made by the user's callables; None if none was given, or if nothing here is trained.
        owner: replica that steps each parameter that has been trainable; -1: all of them.
        masters: the fp32 copies that are stepped in the place of bf16 parameters, if the precision says so.
        grad_norm: the norm over all stages before clipping, in the last step.
        skipped: steps that were skipped because of an overflow.
        accumulated: batches whose gradients wait for a step.
    """

    def __init__(
        self,
        config: PipelineConfig,
        parameters: StageParameters,
        replicas: Replicas,
        transport: Transport,
        scale: LossScale,
        originals: Originals,
    ) -> None:
        self._config, self._parameters, self._replicas, self._transport, self.scale = (
            config,
            parameters,
            replicas,
            transport,
            scale,
        )
        self.owner: dict[str, int] = {}
        self.masters = MasterCopies()
        self.optimizer: Optimizer | None = None
        self.lr_scheduler: Any = None
        self.grad_norm: float | None = None
        self.skipped = 0
        self.accumulated = 0
        self._make(originals)

    def mine(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank's optimizer steps."""
        named = self._parameters.named_parameters()
        return {n: p for n, p in named if n in self.owner and self._replicas.owns(self.owner[n])}

    def _make(self, originals: Originals) -> None:
        """Make optimizer and scheduler over all that is trainable now."""
        trainable = self._parameters.trainable()
        self.owner |= self._replicas.shard({n: p for n, p in trainable.items() if n not in self.owner})
        mine = self.mine()
        if self._config.precision == "bf16-params":
            self.masters.add(mine, originals)
        if self._config.optimizer is None or not mine:
            return
        self.optimizer = _made(self._config.optimizer, self.masters.stepped(mine))
        if self._config.lr_scheduler is not None:
            self.lr_scheduler = _checked(self._config.lr_scheduler(self.optimizer))

    def _follow_thawed(self) -> None:
        """Add parameters that have become trainable: the optimizer is made again, with the state that it had."""
        if self._parameters.trainable().keys() <= self.owner.keys():
            return
        before = self.state_by_name()
        scheduler = self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None
        self._make({})
        self.set_state_by_name(
            {n: s for n, (s, _) in before.items()}, {n: o for n, (_, o) in before.items()}, scheduler
        )

    def zero_grad(self) -> None:
        """Clear the gradients of this rank, if there is an optimizer and none of them waits for a step."""
        if self._config.optimizer is not None and not self.accumulated:
            for _, parameter in self._parameters.named_parameters():
                parameter.grad = None

    @property
    def loss_factor(self) -> float:
        """Factor of a loss before its backward: the loss scale, divided by the batches of a step."""
        return self.scale.scale / self._config.accumulate_batches

    def step(self) -> None:
        """Step the optimizer and the scheduler, once gradients of enough batches are there. Collective."""
        self._follow_thawed()
        self.accumulated = (self.accumulated + 1) % self._config.accumulate_batches
        if self.accumulated:
            return
        finite = self.scale.unscale(list(self._parameters.trainable().values()), self._transport)
        if self._config.max_grad_norm is not None and finite:
            self.grad_norm = self._parameters.clip(self._config.max_grad_norm)
        self.scale.update(finite)
        if not finite:
            self.skipped += 1
            return
        if self.optimizer is not None:
            with self.masters.stepping(self.mine()):
                self.optimizer.step()
        if self._config.optimizer is not None:
            with self._transport.waiting():
                self._replicas.share_parameters(self._parameters.trainable(), self.owner)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()

    def require_stepped(self, what: str) -> None:
        """Raise if gradients wait for a step: a checkpoint does not hold them."""
        if self.accumulated:
            raise EngineError(
                f"{what} with the gradients of {self.accumulated} of {self._config.accumulate_batches} batches",
                expected="a call after a step of the optimizer",
                where="accumulate_batches",
                remedy="call it after a multiple of accumulate_batches batches",
            )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def saved_value(self, name: str, tensor: Tensor) -> Tensor:
        """The value that is saved for a parameter or buffer: its master copy if this rank has one."""
        return self.masters.of.get(name, tensor).detach()

    def saving_replica(self, name: str, tensor: Tensor) -> int:
        """The replica that saves a parameter or buffer: the one with its master copy, otherwise the first."""
        sharded = self._config.precision == "bf16-params" and tensor.dtype == torch.bfloat16
        return max(0, self.owner.get(name, 0)) if sharded else 0

    def state_by_name(self) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
        """For each parameter that this rank's optimizer steps: its state, and the options of its group."""
        if self.optimizer is None:
            return {}
        options = {id(p): _options(g) for g in self.optimizer.param_groups for p in g["params"]}
        return {
            n: (dict(self.optimizer.state.get(p, {})), options[id(p)])
            for n, p in self.masters.stepped(self.mine()).items()
            if id(p) in options
        }

    def set_state_by_name(
        self, states: Mapping[str, Mapping[str, Any]], options: Mapping[str, Mapping[str, Any]], scheduler: Any
    ) -> None:
        """Puts back what `state_by_name` gave, on any mesh."""
        if self.optimizer is None:
            return
        named = self.masters.stepped(self.mine())
        for name, state in states.items():
            self.optimizer.state[named[name]] = dict(state)
        for group in self.optimizer.param_groups:
            first = next((n for n, p in named.items() if any(p is q for q in group["params"]) and n in options), None)
            if first is not None:
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in options[first].items()})
        if self.lr_scheduler is not None and scheduler is not None:
            self.lr_scheduler.load_state_dict(scheduler)


def _made(make: Callable[[Any], Optimizer], parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """Call the user's callable; one whose first argument is called `named_parameters` gets names too."""
    first = next(iter(inspect.signature(make).parameters), "")
    optimizer = make(list(parameters.items()) if first == "named_parameters" else list(parameters.values()))
    if isinstance(optimizer, Optimizer):
        return optimizer
    several = isinstance(optimizer, (list, tuple, dict))
    raise ConfigError(
        f"a callable that returned a {type(optimizer).__name__}",
        expected="one torch.optim.Optimizer",
        where="optimizer",
        remedy="put what the optimizers differ in into parameter groups of one (a callable of `named_parameters`)"
        if several
        else "return the optimizer",
    )


def _checked(scheduler: Any) -> Any:
    if not isinstance(scheduler, ReduceLROnPlateau):
        return scheduler
    raise ConfigError(
        "ReduceLROnPlateau, which steps by a metric",
        expected="a scheduler that steps by itself",
        where="lr_scheduler",
        remedy="make it over engine.optimizer, and step it yourself with what eval_batch() gives",
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k not in ("params", "param_names")}
