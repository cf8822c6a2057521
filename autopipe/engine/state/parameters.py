"""This rank's parameters under the model's names, ties with other stages, and the whole model's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from autopipe.engine.transport.peers import Peers
from autopipe.errors import EngineError


class StageParameters:
    """The parameters and buffers that this rank holds, and the process groups of tied ones. Made on all ranks together.

    Args:
        model: the user's model, whose own `Parameter` objects are trained; those of this rank have their values
            (`place_parameters.place`).
        names: every name of a parameter or buffer to its first name.
        owned: the stages that hold each parameter and buffer, by first name.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, str],
        owned: Mapping[str, tuple[int, ...]],
        peers: Peers,
    ) -> None:
        self._names, self._owned = names, owned
        self._context, self._mesh, self._transport = peers.context, peers.mesh, peers.transport
        everything = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self._persistent = list(model.state_dict(keep_vars=True))
        self._in_state = {names[n] for n in self._persistent if n in names}
        # In the model's order, so that all replicas sum gradients in one order, and optimizers see the plain model's.
        self._mine: dict[str, Tensor] = {
            n: t for n, t in everything.items() if set(owned.get(n, ())) & set(self._mesh.stages)
        }
        trained = [n for n, t in everything.items() if n in owned and isinstance(t, nn.Parameter)]
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in trained:
            if len(owned[name]) > 1:
                groups.setdefault(owned[name], []).append(name)
        self._parameters = {n: t for n, t in self._mine.items() if isinstance(t, nn.Parameter)}
        self.tie_groups = tuple(sorted(groups))
        self._tied = [groups[stages] for stages in self.tie_groups]
        self._tie_process_groups = [self._process_group(stages) for stages in self.tie_groups]

    def _process_group(self, stages: Sequence[int]) -> Any:
        """The process group of this replica's ranks that run these stages; None if that is one rank. Collective."""
        own = None
        for replica in range(self._mesh.data_parallel):
            ranks = sorted({self._mesh.rank_of(s, replica) for s in stages})
            group = self._transport.new_group(ranks) if len(ranks) > 1 else None
            own = group if replica == self._mesh.replica else own
        return own

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """This rank's parameters, frozen ones too, under the model's names."""
        return self._parameters.items()

    def trainable(self) -> dict[str, nn.Parameter]:
        """This rank's parameters that require a gradient."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def of_stage(self, stage: int, *, tied: bool) -> list[nn.Parameter]:
        """The trainable parameters of one of this rank's stages: those that other stages read too, or the rest."""
        shared = {n for names in self._tied for n in names}
        return [p for n, p in self.trainable().items() if stage in self._owned[n] and (n in shared) == tied]

    def tied_here(self) -> list[nn.Parameter]:
        """The trainable parameters of this rank that several stages read, each once."""
        shared = {n for names in self._tied for n in names}
        return [p for n, p in self.trainable().items() if n in shared]

    def held(self) -> list[tuple[str, Tensor]]:
        """This rank's entries of the model's state dict, by first name."""
        return [(n, t) for n, t in self._mine.items() if n in self._in_state]

    def state_names(self) -> dict[str, str]:
        """Every name of the model's state dict, in its order, to the first name of its tensor."""
        return {n: self._names[n] for n in self._persistent if n in self._names}

    def aliases(self, first: str) -> list[str]:
        """Every name of a tensor in the model's state dict."""
        return [n for n, f in self.state_names().items() if f == first]

    def buffers(self) -> list[Tensor]:
        """This rank's buffers."""
        return [t for t in self._mine.values() if not isinstance(t, nn.Parameter)]

    def is_first_holder(self, name: str) -> bool:
        """Return whether this rank holds a parameter for the first of its stages, and so counts and saves it."""
        return self._mesh.is_mine(self._owned[name][0])

    # -- gradients ----------------------------------------------------------------------------------------------------

    def set_aside(self) -> dict[str, Tensor]:
        """Take away the gradients of earlier calls, so that only this call's are reduced."""
        earlier = {n: p.grad for n, p in self.named_parameters() if p.grad is not None}
        for _, parameter in self.named_parameters():
            parameter.grad = None
        return earlier

    def put_back(self, earlier: Mapping[str, Tensor]) -> None:
        """Add the gradients of earlier calls: two calls without `zero_grad` give the sum of both."""
        for name, parameter in self.named_parameters():
            if name in earlier:
                parameter.grad = earlier[name] if parameter.grad is None else earlier[name].add_(parameter.grad)

    def reduce_tied(self, group: int) -> None:
        """Sum the gradients of one group of tied parameters over the stages that hold them."""
        for name in self._tied[group]:
            parameter = self._mine[name]
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = zero_gradient(parameter)
            if self._tie_process_groups[group] is not None:
                dist.all_reduce(parameter.grad, group=self._tie_process_groups[group])

    def norm(self) -> float:
        """The norm of all gradients over all stages; a tied parameter counts once, on its first stage. Collective."""
        counted = [p.grad for n, p in self.named_parameters() if p.grad is not None and self.is_first_holder(n)]
        square = get_total_norm(counted).double().cpu() ** 2 if counted else torch.zeros((), dtype=torch.float64)
        self._transport.all_reduce(square)  # over all ranks; every replica contributes the same
        return float((square / self._mesh.data_parallel).sqrt())

    def clip(self, max_norm: float) -> float:
        """Scale all gradients to a norm of at most `max_norm` over all stages; return the norm before. Collective."""
        norm = self.norm()
        mine = [p for _, p in self.named_parameters()]
        clip_grads_with_norm_(mine, max_norm, torch.tensor(norm, dtype=torch.float32, device=self._context.device))
        return norm

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole model's state on the CPU, under all of the model's names; the same on every rank. Collective.

        Args:
            masters: the fp32 copies that this rank has, which are returned for their parameters.
        """
        mine = (self._mine if self._mesh.replica == 0 else {}) | dict(masters)
        first = {n: t.detach().to("cpu", copy=True) for n, t in mine.items() if self.is_first_holder(n)}
        merged: dict[str, Tensor] = {}
        for part in self._context.gather(first):
            merged |= part
        return {name: merged[self._names[name]] for name in self._persistent if name in self._names}

    def load_state_dict(self, state: Mapping[str, Tensor], masters: Mapping[str, Tensor]) -> None:
        """Copy this rank's share of a whole model's state into parameters and their fp32 copies.

        Raises:
            EngineError: a name is missing or unknown, or a shape differs.
        """
        missing = [n for n in self._persistent if n in self._names and n not in state]
        unknown = [n for n in state if n not in self._names]
        if missing or unknown:
            got = f"a state without {missing[0]!r}" if missing else f"a state with {unknown[0]!r}"
            raise EngineError(
                got,
                expected="the keys of the model's state_dict()",
                where="load_state_dict",
                remedy="load the state of the same model",
            )
        with torch.no_grad():
            for name, value in state.items():
                mine = self._mine.get(self._names[name])
                if mine is None:
                    continue
                if mine.shape != value.shape:
                    raise EngineError(
                        f"shape {tuple(value.shape)}",
                        expected=f"{tuple(mine.shape)}",
                        where=name,
                        remedy="load the state of the same model",
                    )
                mine.copy_(value)
                if self._names[name] in masters:
                    masters[self._names[name]].copy_(value)


def zero_gradient(parameter: Tensor) -> Tensor:
    """Zeros in the dtype that the parameter's gradient has."""
    return torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
