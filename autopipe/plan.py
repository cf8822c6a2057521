"""A plan: which nodes run on which stage, what that costs, and its JSON form (`autopipe.plan/1`)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from autopipe.errors import PlanError
from autopipe.schedule.kinds import DEFAULT, KINDS, TRAINING, dealt_over_ranks
from profiler.records import LinkProfile, read_json

MAX_NUMBER = 2**63
"""Limit of every time, size and count in a file."""
PLAN_SCHEMA = "autopipe.plan/1"
RECOMPUTE = ("auto", "none", "full")
"""Recompute in the backward: as much as the memory limit demands, nothing, or every stage as a whole."""
FREE_LINK = LinkProfile(latency_us=0.0, bytes_per_us=math.inf, measured=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of a plan. Times are for one micro-batch, sizes in bytes.

    Attributes:
        index: its position in the pipeline, from 0.
        nodes: names of the nodes that it runs, in the order of the graph.
        params: names of the parameters and buffers that it reads; a tied parameter appears in every stage that reads
            it.
        first_module, last_module: FQN of the submodules in which its first and last node stand.
        forward_us, backward_us: compute time of one micro-batch, recompute included.
        send_bytes, recv_bytes: forward activations that leave and enter it, once for each stage that reads them.
        peak_bytes: the memory that it needs: parameters, gradients, optimizer state, activations in flight, workspace;
            what a memory limit is compared with.
        expected_peak_bytes: the most that it holds at one time, going through its actions one by one: what a run is
            compared with; 0 if it is not known.
        param_bytes, gradient_bytes, optimizer_bytes, activation_bytes: the parts of `peak_bytes`, workspace apart.
        recompute: regions, each the names of consecutive nodes of the stage: what they keep is dropped, and computed
            again in the backward up to the last tensor that is kept.
        reduce_us: time of summing its gradients over the replicas, after its last backward.
        memory_limit_bytes: memory of its device if devices differ; 0: the plan's.
    """

    index: int
    nodes: tuple[str, ...]
    params: tuple[str, ...] = ()
    first_module: str = ""
    last_module: str = ""
    forward_us: float = 0.0
    backward_us: float = 0.0
    send_bytes: int = 0
    recv_bytes: int = 0
    peak_bytes: int = 0
    expected_peak_bytes: int = 0
    param_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    recompute: tuple[tuple[str, ...], ...] = ()
    reduce_us: float = 0.0
    memory_limit_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The tensors `nodes` that cross from one stage to another, for one micro-batch, producer to reader directly.

    `forward_bytes` go from `source` to `target`; `backward_bytes`, the gradients, go back. `link` is what they go over,
    if it is not the plan's.
    """

    source: int
    target: int
    nodes: tuple[str, ...]
    forward_bytes: int
    backward_bytes: int
    link: LinkProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way to use the devices that the search has planned: the figures of its best split.

    Attributes:
        num_stages, num_ranks, data_parallel, num_microbatches, schedule, zero_stage, microbatch_size: as in `Plan`.
        placement: which ranks are neighbours: `stages` of a replica, `replicas` of a stage, or how uneven devices are
            ordered.
        step_us: simulated step, with the sum of the gradients over the replicas.
        lower_bound_us: no split under this layout can be faster under the cost model.
        peak_bytes: the most memory that a rank holds.
        recomputed: whether activations are computed again.
    """

    num_stages: int
    num_ranks: int
    data_parallel: int
    num_microbatches: int
    microbatch_size: int
    schedule: str
    zero_stage: int
    placement: str
    step_us: float
    lower_bound_us: float
    peak_bytes: int
    recomputed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The figures of a split that a user would otherwise make, under the same cost model."""

    name: str
    step_us: float
    imbalance: float
    bubble: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A partition of a graph into stages, and what a step costs under it.

    Attributes:
        graph_hash: identifies the graph that was cut.
        num_stages, data_parallel, num_microbatches, schedule, zero_stage: how it is run.
        num_ranks: ranks of one replica; 0: one for each stage. Stage s runs on rank s modulo their number.
        ranks: the rank that runs each pipeline rank of each replica, replica by replica; empty: in this order.
        stages: one record for each stage.
        transfers: the tensors that cross between stages.
        ties: for each parameter that several stages read, its name and these stages.
        microbatch_size: samples in a micro-batch.
        step_us: simulated time of a training step (all micro-batches, forward and backward), optimizer apart.
        bottleneck_us: the largest load: compute of one micro-batch on a stage, and its transfers that are not hidden.
        bubble: the share of the devices' time in a step in which they wait, from 0 to 1.
        imbalance: compute time of the slowest stage over the mean of all stages, minus 1.
        link: latency, bandwidth and overlap that were assumed between stages.
        memory_limit_bytes: memory of each device, 0 if none was given.
        device: device of the profile.
        estimated: some costs were estimated, not measured.
        scaling: how times follow the micro-batch size if the plan's is not the profile's: `affine`, from profiles of
            two sizes, or `proportional`, an assumption; empty: as measured.
        objective: what was made small: `step`, the simulated step, or `bottleneck`, the largest load of a stage.
        proved: the plan is optimal under its objective and the cost model.
        lower_bound_us: no split into this many stages can be faster under the cost model.
        bottleneck_bound_us: no split into this many stages has a smaller largest load.
        search_bound_us: no layout, schedule or split that the search allowed can be faster under the cost model; 0: not
            known.
        baselines: the splits that a user would otherwise make.
        candidates: the ways to use the devices that were compared, the fastest first; empty: there was no choice.
    """

    # The decision: what runs where.
    graph_hash: str
    num_stages: int
    num_microbatches: int
    stages: tuple[StagePlan, ...]
    transfers: tuple[Transfer, ...] = ()
    data_parallel: int = 1
    schedule: str = DEFAULT
    zero_stage: int = 0
    num_ranks: int = 0
    ranks: tuple[int, ...] = ()
    ties: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    microbatch_size: int = 1

    # The prediction: figures of a step, and the assumptions behind them.
    step_us: float = 0.0
    bottleneck_us: float = 0.0
    bubble: float = 0.0
    imbalance: float = 0.0
    link: LinkProfile = FREE_LINK
    memory_limit_bytes: int = 0
    device: str = "unknown"
    estimated: bool = False
    scaling: str = ""

    # The proof: how good the decision is, against bounds and other ways.
    objective: str = "step"
    proved: bool = False
    lower_bound_us: float = 0.0
    bottleneck_bound_us: float = 0.0
    search_bound_us: float = 0.0
    baselines: tuple[Baseline, ...] = ()
    candidates: tuple[Candidate, ...] = ()

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def plan_hash(self) -> str:
        """Hash of what all ranks of a run must agree on: the graph, its cuts and the schedule; costs are left out."""
        parts = [
            self.graph_hash,
            self.num_stages,
            self.num_microbatches,
            self.schedule,
            self.data_parallel,
            self.zero_stage,
            self.num_ranks,
        ]
        parts += [[s.nodes, s.recompute] for s in self.stages]
        parts += [self.ranks] if self.ranks else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def stage_of(self) -> dict[str, int]:
        """The stage of every node, by name."""
        return {name: stage.index for stage in self.stages for name in stage.nodes}

    def diff(self, other: Plan) -> dict[str, tuple[int, int]]:
        """The nodes that the two plans put on different stages: name to (stage here, stage there); -1 if a plan has
        no such node."""
        mine, theirs = self.stage_of, other.stage_of
        names = [*mine, *(n for n in theirs if n not in mine)]
        return {n: (mine.get(n, -1), theirs.get(n, -1)) for n in names if mine.get(n, -1) != theirs.get(n, -1)}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, ready for `json.dumps`; bytes and microseconds are raw numbers."""
        data = {"schema": PLAN_SCHEMA, **dataclasses.asdict(self), "plan_hash": self.plan_hash}
        if math.isinf(self.link.bytes_per_us):
            data["link"]["bytes_per_us"] = None
        return data

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Read a plan.

        Raises:
            PlanError: an unknown schema, a missing or misspelt value, a negative number, a node on two stages.
        """
        data = _object(data, "the plan")
        if data.get("schema") != PLAN_SCHEMA:
            raise _bad(f"schema {data.get('schema')!r}", repr(PLAN_SCHEMA), "schema")
        values = {k: v for k, v in data.items() if k in _fields(cls)}
        for key, record in (
            ("stages", StagePlan),
            ("transfers", Transfer),
            ("baselines", Baseline),
            ("candidates", Candidate),
        ):
            if key in values:
                if not isinstance(values[key], list):
                    raise _bad(f"{values[key]!r}", "a list", key)
                values[key] = tuple(_record(record, v, f"{key}[{i}]") for i, v in enumerate(values[key]))
        values["ties"] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in _object(values.get("ties", {}), "ties").items()
        }
        if "link" in values:
            link = dict(_object(values["link"], "link"))
            link["bytes_per_us"] = math.inf if link.get("bytes_per_us") is None else link["bytes_per_us"]
            values["link"] = _record(LinkProfile, link, "link")
        plan: Self = _record(cls, values, "the plan")
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a plan from a JSON file.

        Raises:
            PlanError: the file is not there, is not JSON, or is not a valid plan.
        """
        return cls.from_json(read_json(path, PlanError, "write one with `autopipe plan MODEL -o FILE`"))


def _bad(got: str, expected: str, where: str) -> PlanError:
    return PlanError(
        got, expected=expected, where=where, remedy="correct the file, or plan the model again with `autopipe plan`"
    )


def _object(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _bad(f"a {type(data).__name__}", "a JSON object", where)
    return data


def _fields(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(cls)}


def _record(cls: type[Any], data: Any, where: str) -> Any:
    """One record from a JSON object: required fields are there, numbers are numbers, lists of names are lists of
    names."""
    values: dict[str, Any] = {}
    for name, spec in _fields(cls).items():
        if name not in _object(data, where):
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise _bad(f"no {name!r}", "a value", where)
            continue
        value, kind = data[name], str(spec.type)
        if kind == "tuple[str, ...]":
            if not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise _bad(f"{value!r}", "a list of names", f"{where}.{name}")
            value = tuple(value)
        elif kind == "tuple[int, ...]":
            if not (isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)):
                raise _bad(f"{value!r}", "a list of whole numbers", f"{where}.{name}")
            value = tuple(value)
        elif kind == "LinkProfile | None":
            value = None if value is None else _record(LinkProfile, value, f"{where}.{name}")
        elif kind == "tuple[tuple[str, ...], ...]":
            value = _regions(value, f"{where}.{name}")
        elif kind in ("int", "float"):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            finite = number and 0 <= value < MAX_NUMBER
            if not finite and not (number and kind == "float" and value == math.inf):
                raise _bad(f"{value!r:.60}", f"{kind}, not negative", f"{where}.{name}")
            if kind == "int" and value != int(value):
                raise _bad(f"{value!r}", f"{kind}, not negative", f"{where}.{name}")
            value = int(value) if kind == "int" else value
        elif kind in ("str", "bool") and type(value).__name__ != kind:
            raise _bad(f"{value!r}", kind, f"{where}.{name}")
        values[name] = value
    return cls(**values)


def _regions(value: Any, where: str) -> tuple[tuple[str, ...], ...]:
    if not (isinstance(value, list) and all(isinstance(part, list) and part for part in value)):
        raise _bad(f"{value!r}", "a list of lists of names", where)
    if not all(isinstance(name, str) for part in value for name in part):
        raise _bad(f"{value!r}", "a list of lists of names", where)
    return tuple(map(tuple, value))


def _validate(plan: Plan) -> None:
    if plan.num_stages != len(plan.stages) or not plan.stages:
        raise _bad(f"{len(plan.stages)} stages", f"num_stages = {plan.num_stages} of them, at least 1", "stages")
    for name in ("num_microbatches", "data_parallel", "microbatch_size"):
        if getattr(plan, name) < 1:
            raise _bad(f"{getattr(plan, name)}", "at least 1", name)
    if plan.schedule not in TRAINING:
        raise _bad(f"{plan.schedule!r}", f"one of {', '.join(TRAINING)}", "schedule")
    if plan.num_ranks and (
        plan.num_ranks > plan.num_stages
        or (not KINDS[plan.schedule].several_stages_a_rank and plan.num_ranks != plan.num_stages)
    ):
        raise _bad(
            f"{plan.num_ranks} ranks for {plan.num_stages} stages",
            f"one for each stage, or fewer under `{dealt_over_ranks()}`",
            "num_ranks",
        )
    size = (plan.num_ranks or plan.num_stages) * plan.data_parallel
    if plan.ranks and sorted(plan.ranks) != list(range(size)):
        raise _bad(f"{list(plan.ranks)}", f"each rank from 0 to {size - 1} once", "ranks")
    seen: dict[str, int] = {}
    for i, stage in enumerate(plan.stages):
        if stage.index != i:
            raise _bad(f"index {stage.index}", f"{i}", f"stages[{i}].index")
        if not stage.nodes:
            raise _bad("no nodes", "at least one", f"stages[{i}].nodes")
        for name in stage.nodes:
            if name in seen:
                raise _bad(
                    f"node {name!r} on stages {seen[name]} and {i}", "every node on one stage", f"stages[{i}].nodes"
                )
            seen[name] = i
        again = [name for region in stage.recompute for name in region]
        strangers = set(again) - set(stage.nodes)
        if strangers or len(set(again)) < len(again):
            name = min(strangers) if strangers else max(again, key=again.count)
            raise _bad(f"{name!r}", "nodes of the stage, each in one region", f"stages[{i}].recompute")
    for i, transfer in enumerate(plan.transfers):
        if not (0 <= transfer.source < transfer.target < plan.num_stages):
            raise _bad(
                f"a transfer from {transfer.source} to {transfer.target}",
                "an earlier and a later stage",
                f"transfers[{i}]",
            )
        for name in transfer.nodes:
            if seen.get(name) != transfer.source:
                raise _bad(f"{name!r}", f"a node of stage {transfer.source}", f"transfers[{i}].nodes")
    for name, stages in plan.ties.items():
        if not (isinstance(stages, tuple) and all(isinstance(s, int) and 0 <= s < plan.num_stages for s in stages)):
            raise _bad(f"{stages!r}", "stages of this plan", f"ties[{name}]")
