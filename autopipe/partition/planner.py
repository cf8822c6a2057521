"""`partition`: from a profile to the plan with the shortest step, or the least largest load, into a number of
stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np

from autopipe.cost import CostGraph, IntArray, StageDevices, build_cost_graph
from autopipe.errors import PartitionError
from autopipe.partition import arguments
from autopipe.partition.assemble import Certificate, RunConfig, assemble
from autopipe.partition.baselines import equal_nodes, equal_parameters, equal_time, pipedream
from autopipe.partition.bounds import load_bound_us, step_bound_us
from autopipe.partition.constraints import Constraints, impossible
from autopipe.partition.effort import Effort
from autopipe.partition.infeasible import check_fits
from autopipe.partition.memory.model import run_costs
from autopipe.partition.memory.recompute import with_recompute
from autopipe.partition.problem import Problem, Solution
from autopipe.partition.search.bottleneck import first_splits
from autopipe.partition.search.least_load import least_load, reduce_problem
from autopipe.partition.search.shortest_step import StepTimeCache, shortest_step
from autopipe.partition.timing import simulated_step_us
from autopipe.plan import RECOMPUTE, Plan
from autopipe.schedule.kinds import DEFAULT
from profiler.records import LinkProfile, Profile

PROOF_TOLERANCE = 1e-4
"""A plan is called optimal where the bound is this close, relatively."""
STEP_SHARE = 0.6
"""Extra budget of the search for the shortest step over that for the least load, as a share of the budget. The latter
is given all of it for either objective, so that no plan is slower than the one with the least largest load."""
UNCONSTRAINED = "without the constraints"


def partition(
    profile: Profile,
    *,
    num_stages: int | None = None,
    num_microbatches: int | None = None,
    link: LinkProfile | None = None,
    overlap: float | None = None,
    memory_limit: float | None = None,
    optimizer: str | float = "adam",
    zero_stage: int = 0,
    data_parallel: int = 1,
    schedule: str = DEFAULT,
    objective: str = "step",
    recompute: str = "auto",
    split_points: Sequence[str] | None = None,
    constraints: Constraints | None = None,
    time_budget_s: float = 2.0,
    seed: int = 0,
) -> Plan:
    """Cuts a profiled graph into stages.

    Args:
        profile: the costs of the graph's nodes for one micro-batch.
        num_stages: K, the number of stages, each of at least one node; with `split_points` it may be left out.
        num_microbatches: M, micro-batches of a step; 4 K where it is left out.
        link: between two stages; the profile's where it is left out, else a default that is labelled as not measured.
        overlap: the share of a transfer that compute hides, from 0 to 1; the link's where it is left out.
        memory_limit: bytes of each device; None plans without a limit.
        optimizer: `adam`, `adamw`, `momentum`, `sgd`, `none`, or bytes of state for each byte of trained parameter.
        zero_stage: 1 divides the optimizer state by the replicas.
        data_parallel: replicas of the pipeline.
        schedule: `1f1b` or `gpipe`.
        objective: `step` makes the simulated step short, `bottleneck` the largest load of a stage.
        recompute: `auto` computes activations again as far as the memory limit demands, the cheapest first; `none`
            never does, `full` does for every stage as a whole.
        split_points: FQNs of submodules at which a new stage begins; nothing is searched then.
        constraints: modules that stay together, or stand alone, first or last; what each costs is in the plan's
            baselines.
        time_budget_s: seconds of search for the least largest load, counted in work done, so that a plan does not
            depend on how busy the machine is; the objective `step` adds up to 60 %.
        seed: of the random orders; the same seed gives the same plan.

    Returns:
        The plan, with simulated step, bounds, and the splits that a user would otherwise make.

    Raises:
        PartitionError: an argument is wrong, or no split satisfies what was asked for.
    """
    if num_stages is None:
        if not split_points:
            raise PartitionError(
                "neither num_stages nor split_points",
                expected="a number of stages",
                where="num_stages",
                remedy="give num_stages, for example the number of devices",
            )
        num_stages = len(split_points) + 1
    K = arguments.checked_count(num_stages, "num_stages")
    M = arguments.checked_count(
        arguments.MICROBATCHES_PER_STAGE * K if num_microbatches is None else num_microbatches, "num_microbatches"
    )
    memory = arguments.checked_memory(
        num_microbatches=M,
        schedule=schedule,
        optimizer=optimizer,
        zero_stage=zero_stage,
        data_parallel=arguments.checked_count(data_parallel, "data_parallel"),
        memory_limit=memory_limit,
    )
    run = RunConfig(
        num_stages=K,
        num_microbatches=M,
        schedule=schedule,
        data_parallel=data_parallel,
        zero_stage=zero_stage,
        objective=arguments.checked_choice(objective, arguments.OBJECTIVES, "objective"),
        memory=memory,
    )
    asked = PlanRequest(
        profile=profile,
        link=arguments.checked_link(profile, link, overlap),
        recompute=arguments.checked_choice(recompute, RECOMPUTE, "recompute"),
        run=run,
        seed=seed,
    )
    return planned(asked, constraints or Constraints(), split_points, time_budget_s)


def planned(
    asked: PlanRequest, constraints: Constraints, split_points: Sequence[str] | None, time_budget_s: float
) -> Plan:
    """The plan for checked arguments."""
    profile, run, seed = asked.profile, asked.run, asked.seed
    problem = asked.problem(constraints)
    told = _as_told(profile, problem, split_points) if split_points else None
    stage_of, *bounds = _searched(problem, run, Effort(time_budget_s), seed)
    if told is not None:
        stage_of, free = told, stage_of
        others = {UNCONSTRAINED: (problem.graph, free)}
    else:
        others = asked.prices(constraints, problem, stage_of, time_budget_s)
    certificate = _certificate(problem, run, stage_of, *bounds)
    return assemble(profile, problem.graph, run, stage_of, certificate, others)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The checked arguments of a call, from which the problem under any constraints follows."""

    profile: Profile
    link: LinkProfile
    recompute: str
    run: RunConfig
    seed: int
    devices: StageDevices | None = None

    def problem(self, constraints: Constraints) -> Problem:
        """The problem under these constraints."""
        K, memory = self.run.num_stages, self.run.memory
        graph = build_cost_graph(self.profile, self.link, constraints.groups(self.profile))
        graph = dataclasses.replace(graph, devices=self.devices)
        allowed = None
        if self.recompute == "full" or (
            self.recompute == "auto" and np.isfinite(min(memory.limits, default=memory.limit_bytes))
        ):
            graph = with_recompute(graph, self.profile, self.recompute)
        elif self.recompute == "none":
            allowed = partial(with_recompute, graph, self.profile, "auto")
        arguments.check_stages_fit_nodes(graph, K)
        rules = constraints.rules(self.profile, graph, K)
        return Problem(graph=graph, num_stages=K, memory=memory, rules=rules, with_recompute=allowed)

    def prices(
        self, constraints: Constraints, problem: Problem, stage_of: IntArray, budget_s: float
    ) -> dict[str, tuple[CostGraph, IntArray]]:
        """For each constraint, and for all of them, the split without it, from a search of its own."""
        without = {f"without {words}": rest for words, rest in constraints.one_at_a_time()}
        if len(without) > 1:
            without[UNCONSTRAINED] = Constraints()
        found = {}
        of_profile_node = stage_of[problem.graph.node_of()]
        for name, rest in without.items():
            other = self.problem(rest)
            mine = of_profile_node[[members[0] for members in other.graph.members]]
            better, *_ = _searched(other, self.run, Effort(budget_s / len(without)), self.seed)
            found[name] = other.graph, min((mine, better), key=lambda s: self._objective_us(other, s))
        return found

    def _objective_us(self, problem: Problem, stage_of: IntArray) -> float:
        costs = run_costs(problem.graph, problem.memory, stage_of, problem.num_stages)
        if self.run.objective == "bottleneck":
            return float(costs.load_us.max())
        return simulated_step_us(costs, self.run.num_microbatches, self.run.schedule)


def _searched(problem: Problem, run: RunConfig, effort: Effort, seed: int) -> tuple[IntArray, float, float]:
    """The best assignment that the search finds, and bounds on the largest load and on the step."""
    if problem.num_stages == 1:
        stage_of = np.zeros(problem.graph.num_nodes, np.int64)
        if problem.rules.broken(stage_of, 1):
            raise impossible(problem.rules, 1)
        check_fits(problem, stage_of)
        return stage_of, load_bound_us(problem.graph, 1), 0.0
    random = Random(seed)
    small = reduce_problem(problem)
    bottleneck = run.objective == "bottleneck"
    further = effort.share(STEP_SHARE)
    starts, best = least_load(small, random, effort)
    if bottleneck:
        return best.solution.stage_of[small.index], best.bound_us, 0.0
    slower: list[Solution] = []
    for other in _with_dearer_transfers(small.problem):
        if not further.spent:
            slower += first_splits(other, further)[:2]
    found, least = shortest_step(
        small.problem, [best.solution, *starts, *slower, *_usual(small.problem)], random, further
    )
    if not small.merged:
        return found, best.bound_us, least
    # A reduced graph cannot give a stage to nodes without work, and a pipeline that is one stage shorter may be faster.
    clock = StepTimeCache(problem, further)
    whole = [found[small.index], *(start.stage_of for start in _usual(problem))]
    return min(whole, key=clock.step_us), best.bound_us, 0.0


def _with_dearer_transfers(problem: Problem) -> list[Problem]:
    """The same problem with less of a transfer hidden: hidden transfers delay a step too, but are not in any stage's
    load."""
    link = problem.graph.link
    overlaps = [o for o in (0.0, 0.5 * link.overlap) if o < link.overlap]
    return [
        dataclasses.replace(
            problem, graph=dataclasses.replace(problem.graph, link=dataclasses.replace(link, overlap=o))
        )
        for o in overlaps
    ]


def _usual(problem: Problem) -> list[Solution]:
    """The baselines as starts, so that no plan is slower than what a user would do by hand."""
    order = np.arange(problem.graph.num_nodes)
    splits = (
        method(problem.graph, problem.num_stages) for method in (equal_nodes, equal_parameters, equal_time, pipedream)
    )
    return [Solution(load_us=np.inf, stage_of=stage_of, order=order) for stage_of in splits]


def _as_told(profile: Profile, problem: Problem, split_points: Sequence[str]) -> IntArray:
    """The stages of the caller's own split points."""
    if len(split_points) + 1 != problem.num_stages:
        raise PartitionError(
            f"{len(split_points)} split points for num_stages={problem.num_stages}",
            expected=f"{problem.num_stages - 1} split points",
            where="split_points",
            remedy=f"leave num_stages out, or give {len(split_points) + 1}",
        )
    stage_of = arguments.stages_from_split_points(profile, problem.graph, split_points)
    if problem.rules.broken(stage_of, problem.num_stages):
        raise PartitionError(
            f"split points {', '.join(split_points)}, which break the constraints",
            expected="split points that keep them",
            where="split_points and constraints",
            remedy="leave one of the two out",
        )
    check_fits(problem, stage_of)
    return stage_of


def _certificate(
    problem: Problem, run: RunConfig, stage_of: IntArray, load_bound: float, step_bound: float
) -> Certificate:
    step_bound = max(step_bound, step_bound_us(problem.graph, problem.num_stages, run.num_microbatches, load_bound))
    costs = run_costs(problem.graph, problem.memory, stage_of, problem.num_stages)
    if run.objective == "bottleneck":
        proved = float(costs.load_us.max()) <= load_bound * (1 + PROOF_TOLERANCE)
    else:
        step = simulated_step_us(costs, run.num_microbatches, run.schedule)
        proved = step <= step_bound * (1 + PROOF_TOLERANCE)
    return Certificate(step_bound_us=step_bound, load_bound_us=load_bound, proved=proved)
