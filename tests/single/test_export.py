"""Exports of a plan to other frameworks as text, and what each refuses in words."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

from autopipe.cli import main
from autopipe.errors import ConfigError, PlanError
from autopipe.export import TARGETS, export
from autopipe.plan import Plan, StagePlan, Transfer


def plan(*stages: tuple[str, ...], **changes: object) -> Plan:
    """A chain of stages with these parameters."""
    values: dict[str, object] = {
        "graph_hash": "g",
        "num_stages": len(stages),
        "num_microbatches": 4,
        "stages": tuple(StagePlan(index=k, nodes=(f"n{k}", f"m{k}"), params=p) for k, p in enumerate(stages)),
        "transfers": tuple(
            Transfer(source=k, target=k + 1, nodes=(f"m{k}",), forward_bytes=4, backward_bytes=4)
            for k in range(len(stages) - 1)
        ),
        "microbatch_size": 2,
    }
    return Plan(**{**values, **changes})  # type: ignore[arg-type]


GPT = plan(
    ("model.wte.weight", "model.h.0.a.weight", "model.h.0.b.weight", "model.h.1.a.weight"),
    ("model.h.2.a.weight", "model.h.3.a.weight", "model.h.10.a.weight", "model.norm.weight", "head.weight"),
)
UNITS = [["model.wte", "model.h.0", "model.h.1"], ["model.h.2", "model.h.3", "model.h.10", "model.norm", "head"]]


def test_torchtitan_names_the_modules_of_each_stage() -> None:
    config = tomllib.loads(export(GPT, "torchtitan"))["parallelism"]
    assert config["module_fqns_per_model_part"] == UNITS
    assert config["pipeline_parallel_degree"] == 2
    assert config["pipeline_parallel_microbatch_size"] == 2
    many = plan(*[(f"h.{k}.w",) for k in range(4)], schedule="interleaved", num_ranks=2)
    config = tomllib.loads(export(many, "torchtitan"))["parallelism"]
    assert config["pipeline_parallel_degree"] == 2
    assert config["pipeline_parallel_schedule"] == "Interleaved1F1B"
    assert export(many, "megatron").splitlines()[0] == "--pipeline-model-parallel-size 2"


def test_deepspeed_lists_layers_with_boundaries() -> None:
    text = export(GPT, "deepspeed").replace("from deepspeed.pipe import PipelineModule", "PipelineModule = object")
    found: dict[str, object] = {}
    exec(compile(text, "layers.py", "exec"), found)
    assert found["LAYERS"] == UNITS[0] + UNITS[1]
    assert found["PARTS"] == [0, 3, 8]


def test_megatron_layout_counts_layers() -> None:
    assert export(GPT, "megatron").splitlines() == [
        "--pipeline-model-parallel-size 2",
        '--pipeline-model-parallel-layout "Ett|tttL"',
    ]
    alone = plan(("emb.weight",), ("h.0.w", "h.1.w"), ("norm.w",))
    assert '"E|tt|L"' in export(alone, "megatron")
    tied = dataclasses.replace(GPT, ties={"model.wte.weight": (0, 1)})
    assert '"Ett|tttL"' in export(tied, "megatron")


@pytest.mark.parametrize(
    ("made", "target", "words"),
    [
        (plan(("h.0.a.w", "h.1.a.w"), ("h.1.b.w", "h.2.a.w")), "torchtitan", "module 'h.1' is cut"),
        (plan(("h.0.a.w", "h.1.a.w"), ("h.1.b.w", "h.2.a.w")), "megatron", "--split-points"),
        (dataclasses.replace(GPT, ties={"model.wte.weight": (0, 1)}), "torchtitan", "shared by stages 0, 1"),
        (dataclasses.replace(GPT, ties={"model.wte.weight": (0, 1)}), "deepspeed", "shared by stages 0, 1"),
        (dataclasses.replace(GPT, schedule="gpipe"), "deepspeed", "schedule 'gpipe'"),
        (plan(("scale", "a.w"), ("b.w",)), "torchtitan", "belongs to the model itself"),
        (plan(("a.w",), ("b.w",)), "megatron", "no list of layers"),
        (plan(("enc.0.w",), ("dec.0.w",)), "megatron", "2 lists of layers"),
        (plan(("h.0.w",), ("mid.w",), ("h.1.w",)), "megatron", "among the layers"),
        (
            plan(
                ("h.0.w",),
                ("h.1.w",),
                ("h.2.w",),
                transfers=(Transfer(source=0, target=2, nodes=("m0",), forward_bytes=1, backward_bytes=1),),
            ),
            "torchtitan",
            "m0 skips from stage 0 to stage 2",
        ),
        (
            plan(
                ("h.0.w",),
                ("h.1.w",),
                transfers=(Transfer(source=0, target=1, nodes=("n0", "m0"), forward_bytes=1, backward_bytes=1),),
            ),
            "deepspeed",
            "2 tensors cross",
        ),
        (dataclasses.replace(GPT, data_parallel=2), "torch", "2 replicas"),
    ],
)
def test_refuses_in_words(made: Plan, target: str, words: str) -> None:
    with pytest.raises(PlanError) as error:
        export(made, target, "model.py:build")
    assert words in str(error.value)
    assert error.value.remedy


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT.save(tmp_path / "plan.json")
    for target in TARGETS:
        model = ["--model", "model.py:build"] if target == "torch" else []
        assert main(["export", str(tmp_path / "plan.json"), "--to", target, *model]) == 0
        assert capsys.readouterr().out
    assert main(["export", str(tmp_path / "plan.json"), "--to", "torch"]) == 2
    assert "--model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="torchtitan, deepspeed"):
        export(GPT, "jax")


def test_torch_program_holds_its_plan() -> None:
    text = export(GPT, "torch", "model.py:build")
    compile(text, "stages.py", "exec")
    assert json.loads(text.split('r"""')[1].split('"""')[0]) == json.loads(json.dumps(GPT.to_json()))
