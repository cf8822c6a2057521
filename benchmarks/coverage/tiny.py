"""A transformers model type goes in; the ways to make a tiny configuration of it come out, most shrunk first."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

VOCAB = 128
_HEADS, _HEAD_DIM = 4, 16
_WIDTH = _HEADS * _HEAD_DIM

# The first rule whose pattern matches the whole name of an integer gives its value; None leaves it.
_TABLE: list[tuple[str, int | None]] = [
    (r"vocab_size|.*_vocab_size", VOCAB),
    (r"type_vocab_size|.*_token_id|.*_token_index|num_channels|in_channels|conv_kernel|kernel_size|num_labels", None),
    (r"qk_rope_head_dim|index_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim|.*head_dim|d_kv|dim_head", _HEAD_DIM),
    (r"qk_head_dim", 24),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 32),
    (r"num_key_value_heads|swa_num_key_value_heads|linear_num_key_heads", 2),
    (r"num_attention_heads|.*attention_heads|n_heads?|num_heads|index_n_heads|linear_num_value_heads", _HEADS),
    (r"(num_)?(encoder_|decoder_|hidden_|text_|vision_|prediction_)?(layers|blocks|depth|hidden_layers)", 2),
    (r"n_layers?|num_(encoder|decoder)_layers|depth|num_layers", 2),
    (r"(moe_|shared_expert_|expert_)?(intermediate_size|ffn_dim|ffn_hidden_size)|.*_intermediate_size|.*ffn_dim|d_ff|mlp_dim|n_inner", 96),
    (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|embedding_size|dim|.*_hidden_size|out_hidden_size|projection_dim|.*_embed_dim|.*hidden_dim|embedding_dim|.*_width|d_embed|d_proj", _WIDTH),
    (r"max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len|context_length|max_(target|source)_positions", 128),
    (r"n_routed_experts|num_(local_)?experts|moe_num_experts|n_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token", 2),
    (r"n_group|topk_group|n_groups", 1),
    (r"first_k_dense_replace|n_shared_experts|num_nextn_predict_layers", 1),
    (r"image_size|.*_image_size|pretrain_image_size", 64),
    (r"patch_size", 16),
    (r"sliding_window|.*window_size|attention_window", 8),
    (r"num_mel_bins", 16),
    (r"num_queries|num_query_tokens", 8),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 2),
    (r"max_2d_position_embeddings", 1024),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in _TABLE]
_WIDTHS = re.compile(r".*(hidden|dim|size|d_model|ffn|embd|width|channels|d_ff|rank).*")
_NOT_WIDTHS = re.compile(
    r".*(vocab|patch|image|kernel|window|position|type|chunk|in_channels|num_channels|codebook|input).*"
)
_DEPTHS = re.compile(r"n_layers?|num_.*layers|.*_layers|.*depth|num_.*blocks")


def _by_table(name: str, value: int) -> int:
    for pattern, wanted in _COMPILED:
        if pattern.fullmatch(name):
            return value if wanted is None else min(wanted, value) if value > 0 else value
    return value


def _scaled(factor: int) -> Callable[[str, int], int]:
    def rule(name: str, value: int) -> int:
        if _DEPTHS.fullmatch(name):
            return min(value, 2)
        if name == "vocab_size":
            return VOCAB
        if _WIDTHS.fullmatch(name) and not _NOT_WIDTHS.fullmatch(name) and value >= 8 * factor and value % factor == 0:
            return value // factor
        return value

    return rule


def _only_layers(name: str, value: int) -> int:
    if name == "vocab_size":
        return min(value, 512)
    return min(value, 2) if _DEPTHS.fullmatch(name) else value


def _lists(name: str, value: list[Any]) -> list[Any]:
    """Depths of stages become 1; widths of stages are divided by 4 where they all can be."""
    if name in ("depths", "layer_depths", "num_blocks", "num_layers"):
        return [1] * len(value)
    if re.fullmatch(r"hidden_sizes|embed_dims|embedding_size|neck_hidden_sizes|dims|conv_dim", name) and all(
        v % 32 == 0 for v in value
    ):
        return [v // 4 for v in value]
    return value


def shrunk(config: Any, rule: Callable[[str, int], int], lists: bool) -> dict[str, Any]:
    """The constructor's arguments for a smaller twin of a configuration."""
    found: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        own = getattr(config, name, value)
        if name.startswith("_") or name in (
            "transformers_version",
            "architectures",
            "model_type",
            "id2label",
            "label2id",
            "dtype",
        ):
            continue
        if hasattr(own, "to_dict"):
            found[name] = {"model_type": own.model_type, **shrunk(own, rule, lists)}
        elif isinstance(own, bool) or own is None:
            continue
        elif isinstance(own, int):
            new = rule(name, own)
            if new != own:
                found[name] = new
        elif lists and isinstance(own, (list, tuple)) and own and all(isinstance(v, int) for v in own):
            new_list = _lists(name, list(own))
            if new_list != list(own):
                found[name] = type(own)(new_list)
    for name, value in (("vocab_size", VOCAB), ("prediction_length", 8)):
        if getattr(config, name, 0) is None:
            found[name] = value
    depth = found.get("num_hidden_layers")
    for name in ("layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "block_types"):
        kinds = getattr(config, name, None)
        if depth and isinstance(kinds, (list, tuple)) and kinds:
            found[name] = _keep_kinds(list(kinds), depth)
    return found


def _keep_kinds(kinds: list[Any], depth: int) -> list[Any]:
    """`depth` layers, of as many kinds as there are."""
    distinct = list(dict.fromkeys(map(str, kinds)))
    chosen = [next(k for k in kinds if str(k) == d) for d in distinct[-depth:]]
    return (chosen * depth)[:depth]


def _tokens_inside(config: Any) -> Any:
    """Token ids that lie outside the vocabulary get ids of their own at its end."""
    taken = 0
    for one in (config, *(v for v in config.__dict__.values() if hasattr(v, "to_dict"))):
        for name, value in list(one.__dict__.items()):
            if re.fullmatch(r".*_token_(id|index)", name) and isinstance(value, int) and value >= VOCAB:
                taken += 1
                setattr(one, name, VOCAB - 1 - taken % 60)
            elif name == "eos_token_id" and isinstance(value, list):
                setattr(one, name, [1])
    return config


def candidates(config_class: Any) -> Iterator[tuple[str, Any]]:
    """(how, configuration), smallest first. Those whose constructor refuses the values are left out."""
    try:
        default = config_class()
    except Exception:  # noqa: BLE001 (a configuration without defaults cannot be built here)
        return
    ways: list[tuple[str, Callable[[str, int], int], bool]] = [
        ("table", _by_table, True), ("table, lists as they are", _by_table, False), ("scaled by 8", _scaled(8), True),
        ("scaled by 4", _scaled(4), False), ("fewer layers", _only_layers, True), ("fewest changes", _only_layers, False),
        ("as configured", lambda name, value: value, False),
    ]  # fmt: skip
    for how, rule, lists in ways:
        try:
            config = config_class(**shrunk(copy.deepcopy(default), rule, lists))
        except Exception:  # noqa: BLE001 (the next way is tried)
            continue
        yield how, _tokens_inside(config)
