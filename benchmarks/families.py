"""Small models of the usual families, each made from a fixed seed with a batch: what benchmarks train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a batch of whole samples, and its loss; `loss_fn` is None where the model gives the loss itself."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Tensor | None = None
    loss_fn: Callable[[Any, Tensor], Tensor] | None = None


class UNet(nn.Module):
    """Three levels of convolutions, joined across by skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(self._block(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.middle = self._block(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            self._block(a + b, b) for a, b in zip([*widths[:0:-1], widths[1]], widths[::-1], strict=False)
        )
        self.head = nn.Conv2d(width, 1, 1)

    @staticmethod
    def _block(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.GroupNorm(4, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.GroupNorm(4, outside),
            nn.SiLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1)[:, : block[0].in_channels])
        return self.head(x)


class Tagger(nn.Module):
    """An LSTM of two layers over embedded tokens, with a head for each token."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.first, self.second = (nn.LSTM(width, width, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.first(self.embed(ids))
        y, _ = self.second(F.dropout(x, 0.1, self.training))
        return self.head(self.norm(x + y))


class Lopsided(nn.Module):
    """A perceptron whose layers differ in width by up to sixteen times, the widest in the middle."""

    def __init__(self) -> None:
        super().__init__()
        widths = [128, 256, 512, 2048, 512, 2048, 256, 128, 512, 128, 10]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


def _token_loss(output: Any, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def _class_loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output if isinstance(output, Tensor) else output.logits, target)


def _tokens(model: nn.Module, batch: int, length: int) -> Case:
    ids = torch.randint(0, VOCABULARY, (batch, length))
    return Case(model=model, args=(ids,), target=ids.roll(-1, 1), loss_fn=_token_loss)


def _images(model: nn.Module, batch: int, size: int) -> Case:
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    return Case(model=model, args=(images,), target=labels, loss_fn=_class_loss)


def gpt2(batch: int) -> Case:
    """GPT-2 with its dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=4, n_positions=64, use_cache=False)
    return _tokens(GPT2LMHeadModel(config), batch, 64)


def llama(batch: int) -> Case:
    """Llama: rotary embedding, grouped queries, gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _tokens(LlamaForCausalLM(config), batch, 64)


def bert(batch: int) -> Case:
    """BERT with a head for each token."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=64,
    )
    return _tokens(BertForMaskedLM(config), batch, 64)


def t5(batch: int) -> Case:
    """T5, encoder and decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        use_cache=False,
    )
    ids = torch.randint(0, VOCABULARY, (batch, 48))
    kwargs = {"input_ids": ids, "decoder_input_ids": ids.roll(1, 1)}
    return Case(model=T5ForConditionalGeneration(config), args=(), kwargs=kwargs, target=ids, loss_fn=_token_loss)


def mixtral(batch: int) -> Case:
    """Mixtral: a mixture of four experts, two for each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return _tokens(MixtralForCausalLM(config), batch, 48)


def vit(batch: int) -> Case:
    """A vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        image_size=64,
        patch_size=8,
        num_labels=10,
    )
    return _images(ViTForImageClassification(config), batch, 64)


def swin(batch: int) -> Case:
    """A Swin transformer: shifted windows, three levels, drop path."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=64, patch_size=2, embed_dim=48, depths=[2, 2, 2], num_heads=[3, 6, 12], window_size=4, num_labels=10
    )
    return _images(SwinForImageClassification(config), batch, 64)


def resnet(batch: int) -> Case:
    """A residual network of bottleneck blocks, with batch norm and in-place activations."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], num_labels=10)
    return _images(ResNetForImageClassification(config), batch, 64)


def convnext(batch: int) -> Case:
    """ConvNeXt."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[48, 96, 192, 384], depths=[2, 2, 4, 2], num_labels=10)
    return _images(ConvNextForImageClassification(config), batch, 96)


def unet(batch: int) -> Case:
    """A U-Net."""
    return Case(
        model=UNet(),
        args=(torch.randn(batch, 3, 48, 48),),
        target=torch.rand(batch, 1, 48, 48),
        loss_fn=F.binary_cross_entropy_with_logits,
    )


def lstm(batch: int) -> Case:
    """A recurrent tagger."""
    return _tokens(Tagger(), batch, 32)


def lopsided(batch: int) -> Case:
    """A perceptron of very different layers; eight rows of samples stand for one, so that it computes as long as the
    others."""
    rows = torch.randn(batch, 48, 128)
    labels = torch.randint(0, 10, (batch, 48))
    return Case(model=Lopsided(), args=(rows,), target=labels, loss_fn=_token_loss)


class PlainGpt(nn.Module):
    """A GPT without dropout, in plain PyTorch, its head tied to its embedding."""

    def __init__(self, width: int = 256, layers: int = 4, length: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def gpt(batch: int) -> Case:
    """A GPT without dropout."""
    return _tokens(PlainGpt(), batch, 64)


CASES: dict[str, tuple[Callable[[int], Case], int]] = {
    "gpt": (gpt, 4),
    "gpt2": (gpt2, 4),
    "llama": (llama, 4),
    "bert": (bert, 4),
    "t5": (t5, 4),
    "mixtral": (mixtral, 4),
    "vit": (vit, 4),
    "swin": (swin, 4),
    "resnet": (resnet, 8),
    "convnext": (convnext, 4),
    "unet": (unet, 4),
    "lstm": (lstm, 16),
    "lopsided": (lopsided, 4),
}
"""Each model, with the samples of a micro-batch that it is trained on."""


def make(name: str, num_microbatches: int) -> Case:
    """A model and a batch of that many micro-batches; the same values for the same arguments."""
    factory, size = CASES[name]
    torch.manual_seed(1)
    return factory(size * num_microbatches)
