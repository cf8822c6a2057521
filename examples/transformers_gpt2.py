# torchrun --nproc-per-node 2 examples/transformers_gpt2.py
"""A model of transformers, from its configuration to a training pipeline in five lines. Needs `pip install
'torch-autopipe[hf]'`."""

from functools import partial

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import autopipe

model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=256, bos_token_id=0, eos_token_id=0))
engine = autopipe.pipeline(model, data_parallel=1, optimizer=partial(torch.optim.AdamW, lr=1e-2))
for step in range(20):
    ids = torch.randint(16, (16, 64), generator=torch.Generator().manual_seed(step)).to(engine.device)
    loss = engine.train_batch(input_ids=ids, labels=ids)
    if engine.is_first_rank and step % 5 == 4:
        print(f"step {step + 1:3d}  loss {loss:.3f}", flush=True)
engine.close()
