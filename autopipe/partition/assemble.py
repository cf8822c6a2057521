"""An assignment of nodes to stages becomes a `Plan`: every figure of it from the cost model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopipe.cost import CostGraph, FloatArray, IntArray, StageCosts
from autopipe.partition import baselines
from autopipe.partition.memory.expected_peak import expected_peak_bytes
from autopipe.partition.memory.model import MemoryModel, StageMemory, received_bytes, run_costs, stage_memory
from autopipe.partition.timing import simulated_step_us
from autopipe.plan import Baseline, Plan, StagePlan, Transfer
from profiler.records import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings of a run that a plan records with its cuts."""

    num_stages: int
    num_microbatches: int
    schedule: str
    data_parallel: int
    zero_stage: int
    objective: str
    memory: MemoryModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Knowledge about the best possible split: bounds on the step and on the largest load, and whether it was
    met."""

    step_bound_us: float
    load_bound_us: float
    proved: bool


def assemble(
    profile: Profile,
    graph: CostGraph,
    run: RunConfig,
    stage_of: IntArray,
    certificate: Certificate,
    alternatives: dict[str, tuple[CostGraph, IntArray]],
) -> Plan:
    """The plan of an assignment `stage_of` (n); `alternatives` are further assignments, of any graphs of the profile,
    to compare it with, by name."""
    K = run.num_stages
    costs = run_costs(graph, run.memory, stage_of, K)
    memory = stage_memory(graph, run.memory, stage_of, K)
    figures = _figures("", graph, stage_of, run)
    usual = {name: (graph, other) for name, other in _usual(graph, K).items()}
    others = {**usual, **alternatives}
    return Plan(
        graph_hash=profile.graph_hash,
        num_stages=K,
        num_microbatches=run.num_microbatches,
        stages=_stages(
            profile,
            graph,
            stage_of,
            costs,
            memory,
            expected_peak_bytes(profile, graph, run.memory, memory, costs, stage_of),
        ),
        transfers=_transfers(graph, stage_of),
        data_parallel=run.data_parallel,
        schedule=run.schedule,
        zero_stage=run.zero_stage,
        ties=_ties(graph, stage_of),
        step_us=figures.step_us,
        lower_bound_us=min(certificate.step_bound_us, figures.step_us),
        objective=run.objective,
        bottleneck_us=float(costs.load_us.max()),
        bottleneck_bound_us=min(certificate.load_bound_us, float(costs.load_us.max())),
        proved=certificate.proved,
        bubble=figures.bubble,
        imbalance=figures.imbalance,
        microbatch_size=profile.microbatch_size,
        link=graph.link,
        memory_limit_bytes=int(run.memory.limit_bytes) if math.isfinite(run.memory.limit_bytes) else 0,
        device=profile.device,
        estimated=not all(node.measured for node in profile.nodes),
        baselines=tuple(_figures(name, *other, run) for name, other in others.items()),
    )


def _usual(graph: CostGraph, num_stages: int) -> dict[str, IntArray]:
    return {
        baselines.EQUAL_NODES: baselines.equal_nodes(graph, num_stages),
        baselines.EQUAL_PARAMETERS: baselines.equal_parameters(graph, num_stages),
        baselines.EQUAL_TIME: baselines.equal_time(graph, num_stages),
        baselines.PIPEDREAM: baselines.pipedream(graph, num_stages),
    }


def _figures(name: str, graph: CostGraph, stage_of: IntArray, run: RunConfig) -> Baseline:
    costs = run_costs(graph, run.memory, stage_of, run.num_stages)
    compute = costs.forward_us + costs.backward_us
    step = simulated_step_us(costs, run.num_microbatches, run.schedule)
    busy = run.num_microbatches * float(compute.sum())
    mean = float(compute.mean())
    return Baseline(
        name=name,
        step_us=step,
        imbalance=max(float(compute.max()) / mean - 1, 0.0) if mean > 0 else 0.0,
        bubble=min(max(1 - busy / (run.num_stages * step), 0.0), 1.0) if step > 0 else 0.0,
        peak_bytes=math.ceil(stage_memory(graph, run.memory, stage_of, run.num_stages).peak_bytes.max()),
    )


def _stages(
    profile: Profile,
    graph: CostGraph,
    stage_of: IntArray,
    costs: StageCosts,
    memory: StageMemory,
    expected: FloatArray,
) -> tuple[StagePlan, ...]:
    of_profile_node = stage_of[graph.node_of()]
    received = received_bytes(graph, stage_of, len(costs.forward_us))
    sent = costs.edge_bytes.sum(axis=1)
    plans = []
    for k in range(len(costs.forward_us)):
        nodes = [profile.nodes[i] for i in np.flatnonzero(of_profile_node == k)]
        plans.append(
            StagePlan(
                index=k,
                nodes=tuple(node.name for node in nodes),
                params=tuple(dict.fromkeys(name for node in nodes for name in node.params)),
                first_module=nodes[0].module,
                last_module=nodes[-1].module,
                forward_us=float(costs.forward_us[k]),
                backward_us=float(costs.backward_us[k]),
                send_bytes=round(sent[k]),
                recv_bytes=round(received[k]),
                peak_bytes=math.ceil(memory.peak_bytes[k]),
                expected_peak_bytes=math.ceil(expected[k]),
                param_bytes=math.ceil(memory.param_bytes[k]),
                gradient_bytes=math.ceil(memory.gradient_bytes[k]),
                optimizer_bytes=math.ceil(memory.optimizer_bytes[k]),
                activation_bytes=math.ceil(memory.activation_bytes[k]),
                reduce_us=0.0 if costs.reduce_us is None else float(costs.reduce_us[k]),
                recompute=_regions(graph, of_profile_node == k, int(memory.recompute[k])),
            )
        )
    return tuple(plans)


def _regions(graph: CostGraph, mine: NDArray[np.bool_], number: int) -> tuple[tuple[str, ...], ...]:
    """The names of the stage's nodes in each region of its class of recompute."""
    found: dict[int, list[str]] = {}
    region = graph.classes[number].region
    for i in np.flatnonzero(mine & (region >= 0)).tolist():
        found.setdefault(int(region[i]), []).append(graph.profile_names[i])
    return tuple(map(tuple, found.values()))


def _transfers(graph: CostGraph, stage_of: IntArray) -> tuple[Transfer, ...]:
    """Transfers, one entry for each pair of stages, the tensors in the order of the profile."""
    carried: dict[tuple[int, int], set[int]] = {}
    for tensor, reader in zip(graph.tensor_readers.owner.tolist(), graph.tensor_readers.node.tolist(), strict=True):
        edge = (int(stage_of[graph.producer[tensor]]), int(stage_of[reader]))
        if edge[0] != edge[1]:
            carried.setdefault(edge, set()).add(tensor)
    return tuple(
        Transfer(
            source=source,
            target=target,
            nodes=tuple(graph.profile_names[i] for i in sorted(i for t in tensors for i in graph.tensor_names[t])),
            forward_bytes=round(sum(graph.tensor_bytes[t] for t in tensors)),
            backward_bytes=round(sum(graph.gradient_bytes[t] for t in tensors)),
            link=None if graph.devices is None else graph.devices.link(source, target),
        )
        for (source, target), tensors in sorted(carried.items())
    )


def _ties(graph: CostGraph, stage_of: IntArray) -> dict[str, tuple[int, ...]]:
    """Parameters and buffers that several stages read, and these stages."""
    held: dict[int, set[int]] = {}
    for param, reader in zip(graph.param_readers.owner.tolist(), graph.param_readers.node.tolist(), strict=True):
        held.setdefault(param, set()).add(int(stage_of[reader]))
    return {graph.param_names[p]: tuple(sorted(stages)) for p, stages in held.items() if len(stages) > 1}
