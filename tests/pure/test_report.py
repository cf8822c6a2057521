"""Reports of plans and profiles in every format, and the explanation."""

import csv
import dataclasses
import io
import json
from html.parser import HTMLParser

import pytest

from autopipe.errors import ConfigError
from autopipe.plan import Baseline, Plan, StagePlan, Transfer
from autopipe.report import FORMATS, explain, plan_report, profile_report
from autopipe.report.profiles import module_tree
from autopipe.simulate import simulate
from profiler.records import LinkProfile, NodeProfile, ParameterProfile, Profile

MIB = 2**20


def plan(forward_us: tuple[float, ...] = (1000.0, 1000.0, 1000.0), **changes: object) -> Plan:
    stages = tuple(
        StagePlan(
            index=k,
            nodes=(f"n{k}", f"m{k}"),
            params=(f"layers.{k}.weight",),
            first_module=f"layers.{k}",
            last_module=f"layers.{k}" if k else "layers.0.proj|x",
            forward_us=f,
            backward_us=2 * f,
            send_bytes=MIB if k < 2 else 0,
            recv_bytes=MIB if k else 0,
            peak_bytes=80 * MIB,
            param_bytes=10 * MIB,
            gradient_bytes=10 * MIB,
            optimizer_bytes=20 * MIB,
            activation_bytes=30 * MIB,
        )
        for k, f in enumerate(forward_us)
    )
    transfers = tuple(
        Transfer(source=k, target=k + 1, nodes=(f"m{k}",), forward_bytes=MIB, backward_bytes=MIB)
        for k in range(len(stages) - 1)
    )
    values: dict[str, object] = {
        "graph_hash": "g",
        "num_stages": len(stages),
        "num_microbatches": 4,
        "stages": stages,
        "transfers": transfers,
        "microbatch_size": 8,
        "link": LinkProfile(latency_us=0.0, bytes_per_us=1e6),
        "lower_bound_us": 9_000.0,
        "baselines": (Baseline(name="equal nodes", step_us=20_000.0, imbalance=0.5, bubble=0.6, peak_bytes=99 * MIB),),
    }
    made = Plan(**{**values, **changes})  # type: ignore[arg-type]
    return dataclasses.replace(made, step_us=simulate(made).makespan_us, bubble=simulate(made).mean_bubble)


def profile() -> Profile:
    node = lambda name, inputs, module, us, **kw: NodeProfile(
        name=name, inputs=inputs, forward_us=us, backward_us=us, output_bytes=4 * MIB, module=module, **kw
    )
    return Profile(
        nodes=(
            node("embed", (), "emb", 100.0, params=("emb.weight",), param_bytes=2 * MIB),
            node("attn", ("embed",), "blocks.0.attn", 300.0, measured=False),
            node("mlp", ("attn",), "blocks.0.mlp", 500.0),
            node("head", ("mlp",), "head", 100.0, params=("emb.weight",), param_bytes=2 * MIB),
            node("add", ("head",), "", 0.0),
        ),
        parameters={"emb.weight": ParameterProfile(bytes=2 * MIB)},
    )


def test_table_has_the_figures_of_the_design() -> None:
    text = plan_report(plan(memory_limit_bytes=100 * MIB))
    for words in (
        "layers.0 … layers.0.proj|x",
        "imbalance 0.0%",
        "bubble",
        "step time",
        "samples/s",
        "lower bound 9.00 ms, gap",
    ):
        assert words in text
    row = next(line for line in text.splitlines() if "layers.1" in line).split()
    assert row == [
        "1",
        "layers.1",
        "2",
        "1",
        *["10.0", "10.0", "20.0", "30.0", "80.0", "80.0", "1.00", "2.00", "1.00", "100"],
    ]
    assert "equal nodes" in text and "+11" in text


def test_json_is_the_plan_with_figures() -> None:
    data = json.loads(plan_report(plan(), "json"))
    assert Plan.from_json(data) == plan()
    assert sorted(n for stage in data["stages"] for n in stage["nodes"]) == ["m0", "m1", "m2", "n0", "n1", "n2"]
    assert data["report"]["load"] == [1.0, 1.0, 1.0]
    assert data["report"]["samples_per_s"] == pytest.approx(32 / plan().step_us * 1e6)


def test_csv_has_a_row_a_stage() -> None:
    rows = list(csv.DictReader(io.StringIO(plan_report(plan(), "csv"))))
    assert [row["stage"] for row in rows] == ["0", "1", "2"]
    assert float(rows[0]["forward ms"]) == 1.0
    assert "% of limit" not in rows[0], "without a limit there is no such column"


def test_markdown_and_html_are_well_formed() -> None:
    lines = [line for line in plan_report(plan(), "md").splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines[:5]}) == 1
    page = plan_report(plan(), "html")
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag != "meta":
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Parser().feed(page)
    assert not opened
    assert "http" not in page


@pytest.mark.parametrize("report", [lambda f: plan_report(plan(), f), lambda f: profile_report(profile(), f)])
def test_every_format_and_no_other(report: object) -> None:
    for format in FORMATS:
        assert report(format).strip()  # type: ignore[operator]
    with pytest.raises(ConfigError, match="yaml"):
        report("yaml")  # type: ignore[operator]


def test_estimates_and_assumptions_are_labelled() -> None:
    assert "estimated" in plan_report(plan(estimated=True)).splitlines()[0]
    assumed = LinkProfile(latency_us=1.0, bytes_per_us=1e6, measured=False)
    assert "assumed, not measured" in plan_report(plan(link=assumed))
    rows = {line.split()[0]: line.split()[-1] for line in profile_report(profile()).splitlines() if line}
    assert rows["attn"] == "estimated"
    assert rows["embed"] == "measured"


def test_explains_what_holds_the_step_back() -> None:
    assert "8 micro-batches of the same size in place of 4" in explain(plan())
    uneven = explain(plan(forward_us=(1000.0, 1500.0, 1000.0), num_microbatches=64))
    assert uneven.startswith("Stage 1 computes 29% longer than the mean stage.")
    slow = LinkProfile(latency_us=10_000.0, bytes_per_us=1e6)
    assert explain(plan(link=slow, num_microbatches=64)).startswith("Transfers hold the step back")
    assert explain(plan(num_microbatches=512)).startswith("Nothing simple")
    assert explain(plan(forward_us=(1.0,))).startswith("One stage")
    assert "more than the limit of 50 MiB" in explain(plan(memory_limit_bytes=50 * MIB))


def test_free_plan_does_not_divide_by_zero() -> None:
    free = plan(forward_us=(0.0, 0.0), lower_bound_us=0.0, link=LinkProfile(latency_us=0.0, bytes_per_us=1e30))
    free = dataclasses.replace(free, transfers=(), step_us=0.0)
    assert plan_report(free)
    assert json.loads(plan_report(free, "json"))["report"]["samples_per_s"] is None


def test_module_tree_adds_up_and_counts_shared_parameters_once() -> None:
    tree = {m.name: m for m in module_tree(profile())}
    assert list(tree) == ["", "emb", "blocks", "blocks.0", "blocks.0.attn", "blocks.0.mlp", "head"]
    assert tree[""].param_bytes == 2 * MIB
    assert tree["blocks"].forward_us == 800.0
    assert tree[""].num_nodes == 5


def test_nodes_come_slowest_first_and_all_are_in_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(profile_report(profile(), "csv"))))
    assert [row["node"] for row in rows] == ["mlp", "attn", "embed", "head", "add"]
    many = Profile(
        nodes=tuple(
            NodeProfile(name=f"n{i}", inputs=(), forward_us=1.0, backward_us=1.0, output_bytes=0, module=f"a.{i}.b")
            for i in range(200)
        )
    )
    text = profile_report(many)
    assert "170 faster nodes" in text and "modules further down" in text
    assert len(list(csv.DictReader(io.StringIO(profile_report(many, "csv"))))) == 200


def test_profile_json_can_be_read_as_a_profile() -> None:
    data = json.loads(profile_report(profile(), "json"))
    assert Profile.from_json(data) == profile()
    assert data["modules"][0]["forward_us"] == 1000.0
