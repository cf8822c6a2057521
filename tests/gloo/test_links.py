"""The link between two ranks: measured on two gloo processes, fitted, cached, and refused where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from profiler import LinkProfile, ProfileError
from profiler.links import SIZES, fit_line, measure_link, measure_sizes
from tests.gloo.launch import run_ranks


def measured(folder):
    import torch.distributed as dist

    os.environ["AUTOPIPE_CACHE_DIR"] = folder
    dist.init_process_group("gloo")
    try:
        sizes = measure_sizes()
        first, second = measure_link(), measure_link()
        (entry,) = Path(folder).rglob("*.json") if dist.get_rank() == 0 else (None,)
        dist.barrier()
        if entry is not None:
            entry.write_text(entry.read_text().replace('"overlap": ', '"overlap": 1'))
        third = measure_link()
        return sizes, first, second, third
    finally:
        dist.destroy_process_group()


def test_two_ranks_agree_and_measure_once(tmp_path):
    (sizes, *links), (_, *others) = run_ranks(measured, 2, str(tmp_path), timeout_s=100, measured=True)
    assert links == others and all(isinstance(link, LinkProfile) and link.measured for link in links)
    assert links[0] == links[1] and links[2] != links[1]
    for link in links:
        assert 0 < link.latency_us < 1e5 and 10 < link.bytes_per_us < 1e6 and 0 <= link.overlap <= 1
    assert len(sizes.idle_us) == len(SIZES) and sizes.idle_us[-1] > sizes.idle_us[0] > 0


def third_rank(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        return measure_link(cache=False)
    finally:
        dist.destroy_process_group()


def test_other_ranks_of_the_group_are_told(tmp_path):
    first, *others = run_ranks(third_rank, 3, str(tmp_path), timeout_s=100, measured=True)
    assert all(other == first for other in others)


def test_a_line_is_found_again():
    latency_us, bytes_per_us = fit_line(SIZES, [20 + s / 500 for s in SIZES])
    assert latency_us == pytest.approx(20) and bytes_per_us == pytest.approx(500)
    latency_us, bytes_per_us = fit_line(SIZES, [50.0] * len(SIZES))
    assert latency_us >= 0 and bytes_per_us > 0


def test_without_a_group():
    with pytest.raises(ProfileError, match=r"no process group.*init_process_group"):
        measure_link()
