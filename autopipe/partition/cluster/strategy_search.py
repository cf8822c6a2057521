"""The search over everything: stages x replicas x micro-batches x schedule x recompute x ZeRO for a number of devices.

Best first: every way to use the devices has a lower bound on its step, from the bound on its pipeline and from the work
and the sums of gradients that its ranks share. The ways are planned in the order of their bounds, each by the DP with
little effort, until the next bound is not below the best step found; what is left cannot be faster. Then several stages
on each rank are tried for the most promising ways, and the fastest few are planned again with all the effort.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from autopipe.cluster import Cluster
from autopipe.cost import CostGraph, StageDevices, build_cost_graph
from autopipe.errors import PartitionError
from autopipe.partition import arguments
from autopipe.partition.assemble import RunConfig
from autopipe.partition.bounds import load_bound_us, step_bound_us
from autopipe.partition.cluster.device_layouts import DeviceLayout, layouts, memory_limits, nominal_link, stage_devices
from autopipe.partition.constraints import Constraints
from autopipe.partition.planner import PlanRequest, planned
from autopipe.plan import Candidate, Plan
from autopipe.schedule.kinds import DEFAULT, KINDS, TRIED, undivided
from autopipe.simulate import plan_costs, rank_peak_bytes, rescheduled, schedules_for, step_time_us
from autopipe.simulate.reschedule import within_memory
from profiler.records import Profile
from profiler.sizes import at_size, scaling_rule

KEPT = 10
"""Candidates that the plan records."""
QUICK_S = 0.02
"""Effort of the first plan of a way."""
AGAIN, NEAR = 4, 1.15
"""Ways that are planned again with all the effort, and how much slower than the best they may be before."""
ROUNDS, SEVERAL = (2, 4), 4
"""Stages on each rank that interleaving is tried with, and for how many ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """The settings that are given, and those that are left open (None, or several).

    Attributes:
        global_batch: samples of a step, over all replicas.
        num_stages, data_parallel, num_microbatches, zero_stage: fixed where they are not None; micro-batches are of one
            replica.
        schedules: those that may be used.
        optimizer, recompute, constraints: as for `partition`.
    """

    global_batch: int
    num_stages: int | None = None
    data_parallel: int | None = None
    num_microbatches: int | None = None
    zero_stage: int | None = None
    schedules: Sequence[str] = TRIED
    optimizer: str | float = "adam"
    recompute: str = "auto"
    constraints: Constraints = field(default_factory=Constraints)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelStrategy:
    """A way to use the devices: a layout, the stages on each rank, and the micro-batches of a replica."""

    layout: DeviceLayout
    rounds: int
    num_microbatches: int
    microbatch_size: int

    @property
    def num_stages(self) -> int:
        """K = rounds x P."""
        return self.rounds * self.layout.num_ranks


def search(
    profiles: Sequence[Profile], cluster: Cluster, wanted: SearchSpace, *, time_budget_s: float = 8.0, seed: int = 0
) -> Plan:
    """The plan with the shortest simulated step that uses all devices of a cluster, of those that fit into their
    memory.

    Args:
        profiles: of one graph, as `profiler.sizes.check_sizes` gives them; with two sizes, times of others are on a
            line through them, with one they are in proportion, and sizes below it are left out unless nothing else
            divides the batch.
        cluster: all of its devices are used.
        time_budget_s: seconds of search, counted in work done.

    Returns:
        The plan; `candidates` are the fastest ways that were planned, `search_bound_us` what none can go below.

    Raises:
        PartitionError: the batch cannot be divided so, or nothing fits.
    """
    return _Search(profiles, cluster, wanted, time_budget_s, seed).run()


class _Search:
    def __init__(
        self, profiles: Sequence[Profile], cluster: Cluster, wanted: SearchSpace, time_budget_s: float, seed: int
    ) -> None:
        self.profiles, self.cluster, self.wanted = profiles, cluster, wanted
        self.budget_s, self.seed = time_budget_s, seed
        self.found: dict[tuple[ParallelStrategy, str, int], Plan] = {}
        self.failures: list[PartitionError] = []
        self._graphs: dict[int, CostGraph] = {}

    def run(self) -> Plan:
        ways = list(self.ways())
        if not ways:
            raise self._cannot_divide()
        for way in sorted(ways, key=self.own_bound_us):
            if self.own_bound_us(way) >= self.best_us:
                break
            self.plan(way, QUICK_S)
        self._with_several_stages()
        if not self.found:
            raise self._nothing_fits()
        again = sorted(self.found, key=lambda key: self.found[key].step_us)[:AGAIN]
        again = [key for key in again if self.found[key].step_us <= NEAR * self.best_us]
        for way in dict.fromkeys(way for way, _, _ in again):
            self.plan(way, self.budget_s / len(again))
        best = min(self.found.values(), key=lambda p: (p.step_us, p.num_stages, p.num_microbatches))
        bound = min(self.bound_us(way) for way in ways)
        return dataclasses.replace(best, candidates=tuple(self._candidates()), search_bound_us=min(bound, best.step_us))

    @property
    def best_us(self) -> float:
        return min((plan.step_us for plan in self.found.values()), default=math.inf)

    # -- what there is to choose from ---------------------------------------------------------------------------------

    def ways(self) -> Iterator[ParallelStrategy]:
        """All ways with one stage on each rank; with more where that is asked for, by the numbers or by the
        schedule."""
        wanted, num_devices = self.wanted, len(self.cluster.devices)
        for D in _divisors(num_devices):
            P = num_devices // D
            rounds = 1 if wanted.num_stages is None else wanted.num_stages // P
            several = wanted.data_parallel is not None or all(
                KINDS[name].several_stages_a_rank for name in wanted.schedules
            )
            fits = wanted.num_stages is None or (wanted.num_stages % P == 0 and (rounds == 1 or several))
            if not fits or (wanted.data_parallel not in (None, D)) or wanted.global_batch % D:
                continue
            if rounds * P > self.graph(self.profiles[0].microbatch_size).num_nodes or not schedules_for(rounds * P, P):
                continue
            sizes = self._sizes(wanted.global_batch // D)
            for layout in layouts(self.cluster, D):
                for M in sizes:
                    size = wanted.global_batch // D // M
                    yield ParallelStrategy(layout=layout, rounds=rounds, num_microbatches=M, microbatch_size=size)

    def _sizes(self, samples: int) -> list[int]:
        """Numbers of micro-batches of a replica's share of the batch.

        One profile says nothing of what a smaller micro-batch costs; in proportion it would seem as good as it can be.
        """
        if self.wanted.num_microbatches is not None:
            return [M for M in [self.wanted.num_microbatches] if samples % M == 0]
        counts = _divisors(samples)
        known = [M for M in counts if samples // M >= self.profiles[0].microbatch_size]
        return known or counts if len(self.profiles) == 1 else counts

    def _with_several_stages(self) -> None:
        """Interleaving, for the ways with the fastest plans, while more stages on each rank make them faster."""
        if (
            not any(KINDS[name].several_stages_a_rank for name in self.wanted.schedules)
            or self.wanted.num_stages is not None
        ):
            return
        fastest = sorted(self.found, key=lambda key: self.found[key].step_us)
        for key in [key for key in fastest if key[0].layout.num_ranks > 1][:SEVERAL]:
            before = self.found[key].step_us
            for rounds in ROUNDS:
                more = dataclasses.replace(key[0], rounds=rounds)
                if more.num_stages > self.graph(more.microbatch_size).num_nodes or self.bound_us(more) >= self.best_us:
                    break
                self.plan(more, QUICK_S)
                steps = [plan.step_us for (way, _, _), plan in self.found.items() if way == more]
                if min(steps, default=math.inf) >= before:
                    break
                before = min(steps)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def graph(self, size: int) -> CostGraph:
        """The graph at a micro-batch size."""
        if size not in self._graphs:
            self._graphs[size] = build_cost_graph(at_size(self.profiles, size), self.cluster.within)
        return self._graphs[size]

    def bound_us(self, way: ParallelStrategy) -> float:
        """Lower bound of every split under this strategy, however many stages each rank has and whatever the
        schedule."""
        graph, P = self.graph(way.microbatch_size), way.layout.num_ranks
        devices = stage_devices(self.cluster, way.layout, P)
        load = load_bound_us(dataclasses.replace(graph, devices=devices), P)
        alone = P == 1 and way.rounds == 1
        return way.num_microbatches * load + (self._sums_us(way, devices) if alone else 0.0)

    def own_bound_us(self, way: ParallelStrategy) -> float:
        """The same with as many stages on each rank as the way has.

        A rank with one stage sums its gradients when it has nothing more to compute; with several it can do both at
        once.
        """
        bound, P, M = self.bound_us(way), way.layout.num_ranks, way.num_microbatches
        if way.rounds > 1:
            return bound
        devices = stage_devices(self.cluster, way.layout, P)
        graph = dataclasses.replace(self.graph(way.microbatch_size), devices=devices)
        speed, work = devices.speed, M * float(graph.work_us.sum())
        shared = (work + self._sums_us(way, devices) * float(speed.min())) / float(speed.sum())
        divided = any(KINDS[name].divides_backward for name in self.wanted.schedules)
        return max(bound, shared, step_bound_us(graph, P, M, load_bound_us(graph, P), divided=divided))

    def _sums_us(self, way: ParallelStrategy, devices: StageDevices) -> float:
        """Time of summing all gradients over the replicas, at the pace of the fastest ring."""
        graph = self.graph(way.microbatch_size)
        return float(devices.reduce_us_per_byte.min()) * float((graph.param_bytes * graph.trainable).sum())

    # -- plans --------------------------------------------------------------------------------------------------------

    def plan(self, way: ParallelStrategy, effort_s: float) -> None:
        """Plans a way, unless it does not fit into memory; under ZeRO-1 only where memory is short without it: it costs
        time and shortens no step."""
        zero = self.wanted.zero_stage
        stages = (0, 1) if zero is None else (zero,)
        for zero_stage in stages if way.layout.data_parallel > 1 else stages[:1]:
            try:
                plan = self._planned(way, zero_stage, effort_s)
            except PartitionError as failure:
                self.failures.append(failure)
                continue
            if not within_memory(plan):
                continue
            key = (way, plan.schedule, zero_stage)
            if key not in self.found or plan.step_us < self.found[key].step_us:
                self.found[key] = plan
            if not any(stage.recompute for stage in plan.stages):
                return

    def _planned(self, way: ParallelStrategy, zero_stage: int, effort_s: float) -> Plan:
        wanted, layout, K, M = self.wanted, way.layout, way.num_stages, way.num_microbatches
        limits = memory_limits(self.cluster, layout, K)
        memory = arguments.checked_memory(
            num_microbatches=M,
            schedule=DEFAULT,
            optimizer=wanted.optimizer,
            zero_stage=zero_stage,
            data_parallel=layout.data_parallel,
            memory_limit=None,
        )
        if way.rounds == 1:  # what a rank with several stages holds is known only once they are all there
            memory = dataclasses.replace(
                memory, limit_bytes=min(limits), limits=() if len(set(limits)) == 1 else limits
            )
        run = RunConfig(
            num_stages=K,
            num_microbatches=M,
            schedule=DEFAULT,
            data_parallel=layout.data_parallel,
            zero_stage=zero_stage,
            objective="step",
            memory=memory,
        )
        asked = PlanRequest(
            profile=at_size(self.profiles, way.microbatch_size),
            link=nominal_link(self.cluster, layout),
            recompute=wanted.recompute,
            run=run,
            seed=self.seed,
            devices=stage_devices(self.cluster, layout, K),
        )
        plan = self._with_devices(planned(asked, wanted.constraints, None, effort_s), way)
        plan = self._fastest(plan, way)
        in_order = layout.ranks == tuple(range(len(layout.ranks)))
        return plan if in_order else dataclasses.replace(plan, ranks=layout.ranks)

    def _with_devices(self, plan: Plan, way: ParallelStrategy) -> Plan:
        """The plan with the memory of its devices, and how its figures were scaled."""
        layout = way.layout
        each = memory_limits(self.cluster, layout, layout.num_ranks)
        limits = [int(limit) if math.isfinite(limit) else 0 for limit in each]
        even = len(set(limits)) == 1
        stages = [
            dataclasses.replace(s, memory_limit_bytes=0 if even else limits[s.index % len(limits)]) for s in plan.stages
        ]
        return dataclasses.replace(
            plan,
            stages=tuple(stages),
            memory_limit_bytes=limits[0] if even else 0,
            scaling=scaling_rule(self.profiles, way.microbatch_size),
        )

    def _fastest(self, plan: Plan, way: ParallelStrategy) -> Plan:
        """The plan under the fastest schedule that is allowed and fits, as `fastest_schedule` constrains; the slower
        are not played."""
        ranks = way.layout.num_ranks
        names = list(schedules_for(way.num_stages, ranks, self.wanted.schedules))
        if any(stage.recompute for stage in plan.stages):
            names = list(undivided(tuple(names)))  # what is computed again cannot be divided
        if not names:
            raise PartitionError(
                f"{way.num_stages} stages on {ranks} ranks under {', '.join(self.wanted.schedules)}",
                expected="a schedule that can run them",
                where="schedule",
                remedy="leave the schedule open, or ask for other numbers",
            )
        costs = plan_costs(plan, num_ranks=ranks)

        def step_us(name: str) -> float:
            return step_time_us(
                costs.forward_us,
                costs.backward_us,
                costs.links,
                way.num_microbatches,
                name,
                num_ranks=ranks,
                split_us=costs.split_us,
                reduce_us=costs.reduce_us,
            )

        for name in sorted(names, key=step_us):
            found = rescheduled(plan, name, num_ranks=ranks)
            if within_memory(found):
                return found
        return found

    # -- what is told -------------------------------------------------------------------------------------------------

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(
                num_stages=plan.num_stages,
                num_ranks=way.layout.num_ranks,
                data_parallel=plan.data_parallel,
                num_microbatches=plan.num_microbatches,
                microbatch_size=plan.microbatch_size,
                schedule=plan.schedule,
                zero_stage=plan.zero_stage,
                placement=way.layout.placement,
                step_us=plan.step_us,
                lower_bound_us=self.own_bound_us(way),
                peak_bytes=max(rank_peak_bytes(plan)),
                recomputed=any(s.recompute for s in plan.stages),
            )
            for (way, _, _), plan in sorted(self.found.items(), key=lambda f: f[1].step_us)[:KEPT]
        ]

    def _cannot_divide(self) -> PartitionError:
        wanted, num_devices = self.wanted, len(self.cluster.devices)
        return PartitionError(
            f"a batch of {wanted.global_batch} samples on {num_devices} devices with num_stages={wanted.num_stages}, "
            f"data_parallel={wanted.data_parallel}, num_microbatches={wanted.num_microbatches}",
            expected="replicas that divide the devices and the batch, and micro-batches that divide a replica's share",
            where="the search",
            remedy="leave one of them open, or give a batch that the number of devices divides",
        )

    def _nothing_fits(self) -> PartitionError:
        if not self.failures:
            return self._cannot_divide()
        last = self.failures[-1]
        return PartitionError(
            f"no way to use the {len(self.cluster.devices)} devices that fits; the last one tried: {last.got}",
            expected=last.expected or "stages within the memory of their devices",
            where=last.where or "memory_limit",
            remedy=last.remedy,
        )


def _divisors(number: int) -> list[int]:
    return [int(d) for d in np.flatnonzero(number % np.arange(1, number + 1) == 0) + 1]
