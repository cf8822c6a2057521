"""python benchmarks/prediction.py [-o FILE] [--only gpt,llama] [--show]: predicted against measured, on two gloo
processes.

Each model of `benchmarks/families.py` is captured and profiled once, as the engine does it, and its step time and
memory are predicted for several splits and numbers of micro-batches. The predictions are written to FILE before the
first run. Then each of them is trained, twice in turn, so that what the machine itself varies by stands beside the
error. Steps during which other processes took more than a twentieth of the machine are repeated. Models that FILE holds
already are left out; `--show` only prints what it holds.

On a machine that others use, `--cpu-time` takes the processor time of each forward and backward in the run, in place of
the time on the wall, and the step that is simulated with these: it shows how well the costs of stages are predicted,
and nothing about links.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

import autopipe
from autopipe.config import PipelineConfig
from autopipe.cost import CostGraph, build_cost_graph
from autopipe.engine.ranks.context import make_context
from autopipe.engine.setup.planning import measured_link, profiled
from autopipe.engine.step.clock import StepClock
from autopipe.engine.step.microbatch import MicroBatch, split
from autopipe.engine.step.programs import capture_program
from autopipe.partition.arguments import checked_memory
from autopipe.partition.assemble import Certificate, RunConfig, assemble
from autopipe.plan import Plan
from autopipe.verify.processes import run_processes
from benchmarks.families import CASES, Case, make
from profiler import Profile
from profiler.memory import peak_memory

SHARES = (0.2, 0.4, 0.5, 0.6, 0.8)
"""Where the model is cut: this share of its time lies on the first stage."""
COUNTS = (2, 6)
"""Micro-batches of a step."""
NUM_STEPS, NUM_ROUNDS = 3, 2
MOST_FOREIGN, MOST_TRIES = 0.05, 5
"""A step counts where other processes took at most this share of the machine; tried so often at most."""
Key = tuple[float, int]


def plan_of(profile: Profile, graph: CostGraph, share: float, num_microbatches: int) -> Plan:
    """The plan that puts about this share of the time on the first of two stages, the graph's own order kept."""
    done = np.cumsum(graph.work_us) - graph.work_us / 2
    stage_of = (done > share * graph.work_us.sum()).astype(np.int64)
    stage_of[0], stage_of[-1] = 0, 1
    memory = checked_memory(
        num_microbatches=num_microbatches,
        schedule="1f1b",
        optimizer="adamw",
        zero_stage=0,
        data_parallel=1,
        memory_limit=None,
    )
    run = RunConfig(
        num_stages=2,
        num_microbatches=num_microbatches,
        schedule="1f1b",
        data_parallel=1,
        zero_stage=0,
        objective="step",
        memory=memory,
    )
    none = Certificate(step_bound_us=0.0, load_bound_us=0.0, proved=False)
    return assemble(profile, graph, run, stage_of, none, {})


def predicted(name: str, path: Path) -> list[tuple[Key, Plan]]:
    """The plans of a model, written to the file by rank 0. Collective."""
    context = make_context("cpu")
    case = make(name, 1)
    microbatch = microbatches(case, 1)[0]
    captured = capture_program(
        case.model, microbatch, "train", case.loss_fn, check=False, modes=lambda: torch.enable_grad()
    )
    start = time.perf_counter()
    profile = profiled(captured, microbatch.tensors(case.loss_fn is not None), context, PipelineConfig())
    profile_s = time.perf_counter() - start
    graph = build_cost_graph(profile, measured_link(context))
    plans = [((share, count), plan_of(profile, graph, share, count)) for count in COUNTS for share in SHARES]
    if dist.get_rank() == 0:
        cases = [
            {"share": share, "num_microbatches": count, "predicted": figures(plan)} for (share, count), plan in plans
        ]
        link = dataclasses.asdict(graph.link)
        write(path, name, {"profile_s": profile_s, "residual": profile.residual, "link": link, "cases": cases})
    return plans


def figures(plan: Plan) -> dict[str, Any]:
    """What a plan says of its step."""
    return {
        "step_us": plan.step_us,
        "forward_us": [s.forward_us for s in plan.stages],
        "backward_us": [s.backward_us for s in plan.stages],
        "peak_bytes": [s.expected_peak_bytes for s in plan.stages],
        "bytes": [dataclasses.asdict(s) | {"nodes": len(s.nodes), "params": len(s.params)} for s in plan.stages],
        "transfer_bytes": sum(t.forward_bytes + t.backward_bytes for t in plan.transfers),
    }


def microbatches(case: Case, count: int) -> list[MicroBatch]:
    return split(case.args, case.kwargs, case.target, count)


def trained(name: str, key: Key, plan: Plan, num_tries: int, cpu_time: bool) -> dict[str, Any]:
    """What a few steps of a plan take on this rank: time of a step, of a whole call, and the most bytes held in one."""
    case = make(name, key[1])
    if cpu_time:
        StepClock.now = lambda self: time.thread_time_ns()  # type: ignore[method-assign]
    engine = autopipe.pipeline(
        case.model,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-4),
        loss_fn=case.loss_fn,
        plan=plan,
        device="cpu",
        self_check=False,
        seed=1,
    )

    def step() -> None:
        engine.train_batch(*case.args, target=case.target, **case.kwargs)

    step()
    held = held_bytes(engine)
    with peak_memory(torch.device("cpu")) as peak:
        step()
        for parameter in engine.parameters():
            parameter.grad = None
    tries: list[tuple[float, float, dict[str, float]]] = []
    for _ in range(num_tries):
        dist.barrier()
        machine = Machine()
        start = time.perf_counter()
        step()
        wall_us = (time.perf_counter() - start) * 1e6
        tries.append((machine.foreign_share(), wall_us, times(engine._measured.last_step()[1])))
        if sum(share <= MOST_FOREIGN for share, _, _ in tries) == NUM_STEPS:
            break
    engine.close()
    best = sorted(tries, key=lambda t: max(t[0], MOST_FOREIGN))[:NUM_STEPS]
    return {
        "wall_us": [wall_us for _, wall_us, _ in best],
        "steps": [figures for _, _, figures in best],
        "foreign": best[-1][0],
        "num_tries": len(tries),
        "peak_bytes": held + peak.num_bytes,
    }


def times(spans: Sequence[Any]) -> dict[str, float]:
    """One step of one rank."""
    of = {k: [s.end_us - s.start_us for s in spans if s.action.kind == k and not s.waiting] for k in "FB"}
    return {
        "step_us": max(s.end_us for s in spans),
        "forward_us": statistics.median(of["F"]),
        "backward_us": statistics.median(of["B"]),
        "waiting_us": sum(s.end_us - s.start_us for s in spans if s.waiting),
    }


class Machine:
    """What the machine does beside the ranks, from now on; both ranks make one at the same time."""

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.monotonic(), self._busy_s(), time.process_time()

    @staticmethod
    def _busy_s() -> float:
        fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    def foreign_share(self) -> float:
        """The share of all cores that others took, the hypervisor included. Collective."""
        mine = [self._busy_s() - self._busy, time.monotonic() - self._start, time.process_time() - self._own]
        both: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(both, mine)
        busy_s, wall_s, _ = both[0]
        own_s = sum(own for _, _, own in both)
        return float(max(0.0, busy_s - own_s) / (wall_s * (os.cpu_count() or 1)))


def held_bytes(engine: autopipe.Engine) -> int:
    """Parameters, buffers and optimizer state of this rank: what is there when a step has dropped the gradients of the
    last."""
    held = [*engine.parameters(), *engine._state.parameters.buffers()]
    state = engine.optimizer.state if engine.optimizer is not None else {}
    held += [v for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return sum(t.untyped_storage().nbytes() for t in held)


def rank_main(name: str, path: Path, num_tries: int, cpu_time: bool, rank: int) -> None:
    """One model on this rank: predictions, then the runs in turn."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    plans = predicted(name, path)
    rounds = []
    num_rounds = 1 if num_tries == 1 else NUM_ROUNDS
    for _ in range(num_rounds):
        rounds.append([trained(name, key, plan, num_tries, cpu_time) for key, plan in plans])
    ranks: list[Any] = [None, None]
    dist.all_gather_object(ranks, rounds)
    if rank == 0:
        found = read(path)["models"][name]
        for i, case in enumerate(found["cases"]):
            plan = plans[i][1] if cpu_time else None
            case["runs"] = [measured([ranks[r][n][i] for r in (0, 1)], plan) for n in range(num_rounds)]
        write(path, name, found)
    dist.destroy_process_group()


def measured(ranks: Sequence[dict[str, Any]], plan: Plan | None) -> dict[str, Any]:
    """Medians over the steps that count, of both ranks; the step is the slower rank's, with a plan the simulated
    one."""
    figures = {
        name: [statistics.median(step[name] for step in r["steps"]) for r in ranks]
        for name in ("forward_us", "backward_us", "waiting_us")
    }
    steps = [max(step["step_us"] for step in both) for both in zip(*(r["steps"] for r in ranks), strict=True)]
    if plan is not None:
        pairs = zip(plan.stages, figures["forward_us"], figures["backward_us"], strict=True)
        stages = tuple(dataclasses.replace(s, forward_us=f, backward_us=b) for s, f, b in pairs)
        steps = [autopipe.simulate(dataclasses.replace(plan, stages=stages)).makespan_us]
    return {
        **figures,
        "step_us": statistics.median(steps),
        "steps_us": steps,
        "wall_us": statistics.median(max(both) for both in zip(*(r["wall_us"] for r in ranks), strict=True)),
        "peak_bytes": [r["peak_bytes"] for r in ranks],
        "foreign": ranks[0]["foreign"],
        "num_tries": ranks[0]["num_tries"],
    }


def read(path: Path) -> dict[str, Any]:
    if path.exists():
        return dict(json.loads(path.read_text()))
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    return {"machine": machine, "models": {}}


def write(path: Path, name: str, found: dict[str, Any]) -> None:
    data = read(path)
    data["models"][name] = found
    path.write_text(json.dumps(data, indent=1))


def ranks_of(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(np.array(values))).astype(float)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's coefficient, of values without ties."""
    return float(np.corrcoef(ranks_of(a), ranks_of(b))[0, 1])


def summary(errors: Sequence[float]) -> tuple[float, float, float]:
    """Median and 95th percentile of the absolute errors, and the median error, all in percent."""
    sizes = np.abs(np.array(errors))
    return 100 * float(np.median(sizes)), 100 * float(np.percentile(sizes, 95)), 100 * float(np.median(errors))


def rows(models: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each model whose runs are done."""
    for name, found in models.items():
        cases = [c for c in found["cases"] if "runs" in c]
        if not cases:
            continue
        predicted = [c["predicted"]["step_us"] for c in cases]
        took = [statistics.mean(r["step_us"] for r in c["runs"]) for c in cases]
        noise = [c["runs"][-1]["step_us"] / c["runs"][0]["step_us"] - 1 for c in cases]
        memory = [p / m - 1 for c in cases for p, m in zip(c["predicted"]["peak_bytes"], peak_of(c), strict=True)]
        compute = [
            p / statistics.mean(r[kind][k] for r in c["runs"]) - 1
            for c in cases
            for kind in ("forward_us", "backward_us")
            for k, p in enumerate(c["predicted"][kind])
        ]
        groups = [[i for i, c in enumerate(cases) if c["num_microbatches"] == count] for count in COUNTS]
        correlations = [rank_correlation([predicted[i] for i in g], [took[i] for i in g]) for g in groups]
        errors = [p / t - 1 for p, t in zip(predicted, took, strict=True)]
        yield {
            "model": name,
            "errors": errors,
            "noise": noise,
            "memory": memory,
            "compute": compute,
            "correlation": statistics.mean(correlations),
            "residual": found["residual"],
            "profile_s": found["profile_s"],
        }


def peak_of(case: dict[str, Any]) -> list[int]:
    return [max(r["peak_bytes"][k] for r in case["runs"]) for k in (0, 1)]


def show(data: dict[str, Any]) -> None:
    found = list(rows(data["models"]))
    everything = [*found]
    if found:
        total = {k: [e for r in found for e in r[k]] for k in ("errors", "noise", "memory", "compute")}
        total |= {"model": "all", "correlation": statistics.mean(r["correlation"] for r in found), "residual": None}
        total["profile_s"] = statistics.mean(r["profile_s"] for r in found)
        everything.append(total)
    table = [
        {
            "model": r["model"],
            "step error % median": summary(r["errors"])[0],
            "p95": summary(r["errors"])[1],
            "signed": summary(r["errors"])[2],
            "noise % median": summary(r["noise"])[0],
            "noise p95": summary(r["noise"])[1],
            "rank corr.": r["correlation"],
            "F, B error %": summary(r["compute"])[0],
            "peak error % median": summary(r["memory"])[0],
            "least": 100 * min(r["memory"]),
            "most": 100 * max(r["memory"]),
            "residual": r["residual"],
            "profile s": r["profile_s"],
        }
        for r in everything
    ]
    formats = [".2f" if name in ("rank corr.", "residual") else ".1f" for name in table[0]] if table else ".1f"
    print(tabulate(table, headers="keys", floatfmt=formats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("prediction.json"))
    parser.add_argument("--only", help="names of models, separated by commas")
    parser.add_argument("--tries", type=int, default=MOST_TRIES, help="steps of a case at most; 1 for memory alone")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of computes, in place of wall time")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    for name in [] if options.show else (options.only.split(",") if options.only else CASES):
        found = read(options.output)["models"].get(name, {"cases": [{}]})
        if not all("runs" in case for case in found["cases"]):
            run_processes(
                functools.partial(rank_main, name, options.output, options.tries, options.cpu_time), 2, timeout_s=280.0
            )
    show(read(options.output))


if __name__ == "__main__":
    main()
