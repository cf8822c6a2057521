# autopipe plan examples/dry_run_7b.py:build --device h100 --num-stages 8 --num-microbatches 32
"""What a 7-billion-parameter Llama would need on eight H100s, found on a laptop: nothing is allocated, no device is
there.

The model lies on the meta device. `autopipe profile examples/dry_run_7b.py:build --device h100` prints the time of each
of its modules. Every figure is estimated from operations and bytes, and labelled so. Needs `pip install
'torch-autopipe[hf]'`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SEQUENCE, MICROBATCH, MICROBATCHES = 4096, 1, 32


def build() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    """The model in bfloat16 and a batch, both without storage."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=SEQUENCE, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.empty(MICROBATCH * MICROBATCHES, SEQUENCE, dtype=torch.long)
    return model, (), {"input_ids": ids, "labels": ids}
