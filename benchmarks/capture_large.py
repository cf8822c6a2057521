"""Capture of a Llama configuration of 7 billion parameters on the meta device: seconds, and how much the process grows.

python benchmarks/capture_large.py
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import autopipe


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--tries", type=int, default=3)
    options = parser.parse_args()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    ids = torch.zeros(1, options.length, dtype=torch.long)
    before = _peak_mib()
    for i in range(options.tries):
        begun = time.perf_counter()
        captured = autopipe.capture(model, (), {"input_ids": ids, "labels": ids})
        print(
            f"try {i + 1}: {time.perf_counter() - begun:.2f} s, {len(captured.nodes)} nodes, "
            f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters, peak grew by "
            f"{_peak_mib() - before:.0f} MiB"
        )


if __name__ == "__main__":
    main()
