"""The HTML page of a plan: self-contained and small; in Chromium without errors, with hover, not clipped, and quick for
5,000 nodes."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from autopipe.errors import ConfigError
from autopipe.plan import Baseline, Plan, StagePlan, Transfer
from autopipe.report import chrome_trace, load_measured, measured_report, plan_page, read_trace
from autopipe.report.comparison import MeasuredStage
from autopipe.report.page.events import MAX_EVENTS, compact
from autopipe.report.page.tree import module_tree
from autopipe.simulate import simulate
from profiler.records import LinkProfile, NodeProfile, ParameterProfile, Profile
from scenarios.chromium import PROGRAM, Browser

MIB = 2**20
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")


def big_profile(num_nodes: int) -> Profile:
    """A chain of nodes, ten in each layer; the layers have two submodules."""
    nodes = tuple(
        NodeProfile(
            name=f"layers_{i // 10}_part_{i}",
            inputs=(f"layers_{(i - 1) // 10}_part_{i - 1}",) if i else (),
            forward_us=50.0 + i % 7,
            backward_us=100.0 + i % 5,
            output_bytes=MIB,
            module=f"model.layers.{i // 10}.{'attention' if i % 10 < 4 else 'mlp'}",
            params=(f"model.layers.{i // 10}.p{i}",),
            param_bytes=MIB,
        )
        for i in range(num_nodes)
    )
    return Profile(nodes=nodes, parameters={n.params[0]: ParameterProfile(bytes=MIB) for n in nodes})


def big_plan(profile: Profile, num_stages: int, num_microbatches: int = 32) -> Plan:
    """Equal cuts that fall inside of layers, a skip over stages, ties, a limit and other splits."""
    bounds = [len(profile.nodes) * k // num_stages for k in range(num_stages + 1)]
    stages = []
    for k in range(num_stages):
        nodes = profile.nodes[bounds[k] : bounds[k + 1]]
        size = len(nodes) * MIB
        stages.append(
            StagePlan(
                index=k,
                nodes=tuple(n.name for n in nodes),
                params=tuple(n.params[0] for n in nodes),
                first_module=nodes[0].module,
                last_module=nodes[-1].module,
                forward_us=sum(n.forward_us for n in nodes),
                backward_us=sum(n.backward_us for n in nodes),
                send_bytes=MIB,
                peak_bytes=size * 7,
                param_bytes=size,
                gradient_bytes=size,
                optimizer_bytes=2 * size,
                activation_bytes=size * 2,
            )
        )
    ends = [profile.nodes[b - 1].name for b in bounds[1:]]
    hops = [(k, k + 1, (ends[k],)) for k in range(num_stages - 1)]
    if num_stages > 2:
        hops.append((0, num_stages - 1, tuple(stages[0].nodes[:9])))
    transfers = tuple(Transfer(source=s, target=t, nodes=n, forward_bytes=MIB, backward_bytes=MIB) for s, t, n in hops)
    made = Plan(
        graph_hash="g",
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        stages=tuple(stages),
        transfers=transfers,
        microbatch_size=4,
        link=LinkProfile(latency_us=10.0, bytes_per_us=1e4, overlap=0.5),
        memory_limit_bytes=max(s.peak_bytes for s in stages) * 5 // 4,
        lower_bound_us=1000.0,
        baselines=(Baseline(name="equal nodes", step_us=9e6, imbalance=0.1, bubble=0.2, peak_bytes=MIB),),
    )
    played = simulate(made)
    return dataclasses.replace(made, step_us=played.makespan_us, bubble=played.mean_bubble)


def small_plan() -> Plan:
    return big_plan(big_profile(60), 3, 6)


def measured() -> list[MeasuredStage]:
    return [
        MeasuredStage(index=k, num_steps=3, forward_us=1e3, backward_us=2e3, waiting_us=5e3, step_us=3e4, peak_bytes=0)
        for k in range(3)
    ]


def test_page_of_5000_nodes_is_small_and_loads_nothing() -> None:
    profile = big_profile(5000)
    page = plan_page(big_plan(profile, 16), profile=profile)
    assert len(page.encode()) < 1_000_000
    for word in ("http:", "https:", "<link", "src=", "@import", "url("):
        assert word not in page


def test_a_measured_run_is_set_beside_the_plan(tmp_path: Path) -> None:
    plan = small_plan()
    (tmp_path / "run.json").write_text(measured_report(plan, measured(), "json"))
    (tmp_path / "trace.json").write_text(json.dumps(chrome_trace(simulate(plan))))
    assert load_measured(tmp_path / "run.json") == (plan, measured())
    timeline = read_trace(tmp_path / "trace.json")
    assert timeline.makespan_us == pytest.approx(simulate(plan).makespan_us)
    assert timeline.bubble == pytest.approx(simulate(plan).bubble)
    page = measured_report(plan, measured(), "html", timeline=timeline)
    assert "Predicted and measured" in page and "Timeline, measured" in page
    for bad in ("[]", '{"plan": {}, "measured": [{}]}', '{"traceEvents": []}'):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(ValueError, match="remedy"):
            load_measured(tmp_path / "bad.json")
        with pytest.raises(ConfigError, match="trace"):
            read_trace(tmp_path / "bad.json")


def test_tree_opens_what_a_cut_divides() -> None:
    profile = big_profile(60)
    root = module_tree(big_plan(profile, 3, 6), profile)
    assert root.stages == [0, 1, 2]
    layers = root.children["model"].children["model.layers"].children
    assert {n: m.stages for n, m in layers.items()} == {f"model.layers.{i}": [i // 2] for i in range(6)}
    assert sum(root.us.values()) == pytest.approx(sum(n.forward_us + n.backward_us for n in profile.nodes))
    without = module_tree(big_plan(profile, 3, 6), None)
    assert without.children["model"].children["model.layers"].children["model.layers.5"].stages == [2]


def test_too_many_events_are_cut_and_the_page_says_so() -> None:
    made = compact(simulate(big_plan(big_profile(64), 16, 512)))
    assert len(made["e"]) == 7 * MAX_EVENTS
    assert "the first" in made["note"]


def test_notebooks_show_plans_timelines_and_the_report_of_a_run() -> None:
    plan = small_plan()
    report = measured_report(plan, measured())
    assert "Predicted and measured" in report and "<table" not in report
    assert "<table" in pickle.loads(pickle.dumps(report))._repr_html_()
    assert "<table" in plan._repr_html_()  # type: ignore[attr-defined]
    assert "<svg" in simulate(plan)._repr_html_()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as made:
        yield made


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_page_in_chromium(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    profile = big_profile(5000)
    plan = big_plan(profile, 16)
    (tmp_path / "plan.html").write_text(plan_page(plan, profile=profile, timeline=simulate(plan)))
    browser.errors.clear()
    browser.requests.clear()
    browser.open(tmp_path / "plan.html", width, dark=dark)
    took = browser.value("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert took < 2000
    assert browser.requests == [(tmp_path / "plan.html").resolve().as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width, (
        "nothing makes the page wider than the window"
    )
    clipped = """[...document.querySelectorAll('h1,h2,p,dd,dt,li,.name,.value,svg text')].filter(e => {
        const r = e.getBoundingClientRect();
        return r.right > innerWidth + 1 || r.left < -1 || e.scrollWidth > e.clientWidth + 1 && e.clientWidth;
    }).map(e => e.textContent)"""
    assert browser.value(clipped) == []
    assert browser.value("document.querySelectorAll('.timeline svg rect[data-i]').length") > 2000
    _hover(browser)
    assert browser.errors == []


def _hover(browser: Browser) -> None:
    """The pointer on a forward, on a bar and on a module each brings its detail; beside them it goes away."""
    for part, words in (
        (".timeline svg rect.F", "forward, stage 0, micro-batch 0, rank 0: 0.000 to"),
        (".bars .forward", "stage 0, forward:"),
        (".bars .m3", "activations"),
        (".tree li", "stages 0, 1, 2"),
    ):
        find = f"const e = document.querySelector({part!r}); e.scrollIntoView({{block: 'center'}}); "
        find += "const r = e.getBoundingClientRect();"
        x, y = browser.value(f"(() => {{ {find} return [r.left + r.width / 2, r.top + r.height / 2]; }})()")
        browser.move_to(x, y)
        assert words in browser.value("document.getElementById('tip').textContent"), part
        assert browser.value("document.getElementById('tip').hidden") is False
    browser.value("document.querySelector('h1').scrollIntoView()")
    browser.move_to(2, 2)
    assert browser.value("document.getElementById('tip').hidden") is True


@needs_chromium
def test_page_in_print(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "plan.html").write_text(plan_page(small_plan(), profile=big_profile(60)))
    browser.open(tmp_path / "plan.html", 1280)
    assert len(browser.call("Page.printToPDF", printBackground=True)["data"]) > 10_000
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.value("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.value("getComputedStyle(document.getElementById('tip')).display") == "none"
    browser.call("Emulation.setDeviceMetricsOverride", width=720, height=900, deviceScaleFactor=1, mobile=False)
    assert browser.value("document.documentElement.scrollWidth") <= 720, "A4 at 96 dots an inch holds the page"
