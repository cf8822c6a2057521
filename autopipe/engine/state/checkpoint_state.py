"""The parts of a run that a checkpoint holds, by the model's own names, for any layout of stages and replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autopipe.checkpoint import META, MODEL, OPTIMIZER, RNG, Reader
from autopipe.engine.state.optimizer import ShardedOptimizer
from autopipe.engine.state.parameters import StageParameters
from autopipe.engine.transport.peers import Peers
from autopipe.errors import CheckpointError
from autopipe.plan import Plan


def collect(
    parameters: StageParameters,
    optimizing: ShardedOptimizer,
    plan: Plan,
    peers: Peers,
    *,
    seed: int,
    client_state: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors that this rank saves, by key, and the rest of the run as plain values. Collective."""
    tensors: dict[str, Tensor] = {
        MODEL + n: optimizing.saved_value(n, t)
        for n, t in parameters.held()
        if parameters.is_first_holder(n) and optimizing.saving_replica(n, t) == peers.mesh.replica
    }
    if peers.context.rank == 0:
        tensors[RNG] = torch.get_rng_state()
    options = {}
    for name, (state, group) in optimizing.state_by_name().items():
        if parameters.is_first_holder(name) and (optimizing.owner[name] >= 0 or peers.mesh.replica == 0):
            options[name] = group
            for key, value in state.items():
                tensors[f"{OPTIMIZER}{name}.{key}"] = (
                    value.detach() if isinstance(value, Tensor) else torch.tensor(value)
                )
    scheduler = optimizing.lr_scheduler.state_dict() if optimizing.lr_scheduler is not None else None
    gathered = peers.context.gather((options, scheduler))
    meta = {
        "plan": plan.to_json(),
        "names": parameters.state_names(),
        "options": {n: o for part, _ in gathered for n, o in part.items()},
        "lr_scheduler": next((s for _, s in gathered if s is not None), None),
        "loss_scale": [optimizing.scale.scale, optimizing.scale.good_steps],
        "seed": seed,
        "client_state": client_state,
    }
    return tensors, meta


def load(reader: Reader, parameters: StageParameters, optimizing: ShardedOptimizer) -> None:
    """Load this rank's share of a checkpoint, whatever layout wrote it."""
    meta = reader.meta
    named = {n: reader.key_of(parameters.aliases(n)) for n, _ in parameters.held()}
    wanted: dict[str, Tensor] = {named[n]: optimizing.saved_value(n, t) for n, t in parameters.held()}
    states: dict[str, dict[str, Tensor]] = {}
    for name, parameter in optimizing.mine().items() if optimizing.optimizer is not None else ():
        prefix = f"{OPTIMIZER}{name}."
        for key, (shape, dtype) in reader.stored.items():
            if key.startswith(prefix) and "." not in key[len(prefix) :]:
                device = parameter.device if shape else torch.device("cpu")
                states.setdefault(name, {})[key[len(prefix) :]] = torch.empty(shape, dtype=dtype, device=device)
    wanted |= {f"{OPTIMIZER}{n}.{k}": t for n, state in states.items() for k, t in state.items()}
    if RNG in reader.stored:
        shape, dtype = reader.stored[RNG]
        wanted[RNG] = torch.empty(shape, dtype=dtype)
    reader.read_into(wanted)
    optimizing.masters.round_back(optimizing.mine())
    try:
        if RNG in wanted:
            torch.set_rng_state(wanted[RNG])
        optimizing.set_state_by_name(states, meta["options"], meta["lr_scheduler"])
        if meta["loss_scale"] is not None:
            scale, good_steps = meta["loss_scale"]
            optimizing.scale.scale, optimizing.scale.good_steps = float(scale), int(good_steps)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as cause:
        raise CheckpointError(
            f"{type(cause).__name__}: {cause}",
            where=str(Path(reader.checkpoint) / META),
            remedy="load a checkpoint that autopipe wrote",
        ) from cause
