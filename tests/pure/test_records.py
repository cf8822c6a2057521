"""Profiles as files: what is written is read again, and what is not a profile is refused by the name of its field."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.errors import ProfileError
from profiler.records import PROFILE_SCHEMA, LinkProfile, NodeProfile, ParameterProfile, Profile, SegmentProfile

SEGMENT = {
    "first": "a", "last": "c", "forward_us": 1.0, "backward_us": 1.0, "nodes_forward_us": 1.0, "nodes_backward_us": 1.0,
}  # fmt: skip


def node(name="a", inputs=(), **changes):
    return NodeProfile(
        **{"name": name, "inputs": inputs, "forward_us": 1.0, "backward_us": 2.0, "output_bytes": 4, **changes}
    )


def profile(**changes):
    return Profile(**{"nodes": (node(), node("b", ("a",)), node("c", ("a", "b"))), **changes})


def as_json(**changes):
    return {**json.loads(json.dumps(profile().to_json())), **changes}


TIMES = st.floats(0, 1e12, allow_nan=False)
SIZES = st.integers(0, 2**50)


@st.composite
def profiles(draw):
    nodes = []
    for i in range(draw(st.integers(1, 6))):
        inputs = draw(st.lists(st.sampled_from([n.name for n in nodes]), unique=True)) if nodes else []
        nodes.append(
            NodeProfile(
                name=f"n{i}",
                inputs=tuple(inputs),
                forward_us=draw(TIMES),
                backward_us=draw(TIMES),
                output_bytes=draw(SIZES),
                saved_bytes=draw(SIZES),
                params=tuple(draw(st.lists(st.text(max_size=5), max_size=2))),
                group=draw(st.none() | st.text(max_size=3)),
                measured=draw(st.booleans()),
                differentiable=draw(st.booleans()),
            )
        )
    link = st.builds(LinkProfile, latency_us=TIMES, bytes_per_us=st.floats(1e-3, 1e9), overlap=st.floats(0, 1))
    return Profile(
        nodes=tuple(nodes),
        microbatch_size=draw(st.integers(1, 99)),
        residual=draw(st.floats(0.01, 100)),
        link=draw(st.none() | link),
        segments=(
            SegmentProfile(
                first="n0",
                last="n0",
                forward_us=draw(TIMES),
                backward_us=draw(TIMES),
                nodes_forward_us=1.0,
                nodes_backward_us=0.0,
            ),
        )
        if draw(st.booleans())
        else (),
        parameters=draw(st.dictionaries(st.text(max_size=4), st.builds(ParameterProfile, bytes=SIZES), max_size=3)),
    )


@given(profiles())
def test_what_is_written_is_read_again(original):
    assert Profile.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_a_file(tmp_path):
    profile().save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile()


def test_only_five_fields_are_required():
    row = {"name": "a", "inputs": [], "forward_us": 1, "backward_us": 0.5, "output_bytes": 8.0, "comment": "ignored"}
    (read,) = Profile.from_json({"schema": PROFILE_SCHEMA, "nodes": [row]}).nodes
    assert read.saved_bytes == read.output_bytes == 8 and read.measured and read.differentiable


def changed(index, **changes):
    data = as_json()
    data["nodes"][index] = {**data["nodes"][index], **changes}
    return data


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ([], "JSON object"),
        (as_json(schema="autopipe.profile/9"), "schema"),
        (as_json(nodes={}), "nodes"),
        (as_json(nodes=[]), "nodes"),
        (changed(0, name="b"), r"nodes\[1\].name"),
        (changed(1, inputs=["z"]), r"nodes\[1\].inputs\[0\]"),
        (changed(0, inputs=["c"]), r"nodes\[0\].inputs\[0\] \(a\)"),
        (changed(1, inputs=["b"]), "itself"),
        (changed(1, inputs="a"), r"nodes\[1\].inputs"),
        (changed(2, forward_us=-1.0), r"nodes\[2\].forward_us"),
        (changed(2, backward_us=math.nan), r"nodes\[2\].backward_us"),
        (changed(2, forward_us=math.inf), r"nodes\[2\].forward_us"),
        (changed(2, forward_us="1"), r"nodes\[2\].forward_us"),
        (changed(2, output_bytes=True), r"nodes\[2\].output_bytes"),
        (changed(2, output_bytes=1.5), r"nodes\[2\].output_bytes"),
        (changed(2, group=3), r"nodes\[2\].group"),
        (as_json(residual=0), "residual"),
        (as_json(segments=[{"first": "a", "last": "c"}]), r"segments\[0\]"),
        (as_json(segments=[SEGMENT | {"last": "z"}]), r"segments\[0\]"),
        (as_json(segments=[SEGMENT | {"forward_us": -1.0}]), r"segments\[0\]"),
        (as_json(segments={}), "segments"),
        (as_json(microbatch_size=0), "microbatch_size"),
        (as_json(device=3), "device"),
        (as_json(parameters={"w": {"bytes": -1}}), r"parameters\[w\]"),
        (as_json(link={"latency_us": 1, "bytes_per_us": 0}), "link"),
        (as_json(link={"latency_us": 1, "bytes_per_us": 1, "overlap": 2}), "link"),
    ],
)
def test_what_is_no_profile_is_refused(data, field):
    with pytest.raises(ProfileError, match=field):
        Profile.from_json(data)


def test_missing_values_are_named():
    for required in ("name", "inputs", "forward_us", "backward_us", "output_bytes"):
        data = as_json()
        del data["nodes"][1][required]
        with pytest.raises(ProfileError, match=rf"no '{required}'.*nodes\[1\]"):
            Profile.from_json(data)


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000])
def test_files_that_cannot_be_read(tmp_path, text):
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ProfileError, match="remedy"):
        Profile.load(path)


def test_a_link():
    assert LinkProfile(latency_us=5.0, bytes_per_us=100.0).transfer_us(1000) == 15.0
