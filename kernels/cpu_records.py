"""What compiled code is told of a model and a step: records of addresses and sizes.

`kernels.cpu_forward` computes with them; whoever fills them in keeps the tensors behind the
addresses for as long.

Shapes: T tokens of the step, S wanted tokens, R rows (sequences), H hidden size, D head size, V
vocabulary.
"""

from __future__ import annotations

import numpy as np

from kernels.cpu_weights import MATRIX

LAYER = np.dtype(
    [
        ("input_norm", np.int64),
        ("post_attention_norm", np.int64),
        ("query_norm", np.int64),
        ("key_norm", np.int64),
        ("key_cache", np.int64),
        ("value_cache", np.int64),
        ("qkv", MATRIX),
        ("output", MATRIX),
        ("gate", MATRIX),
        ("up", MATRIX),
        ("down", MATRIX),
    ],
    align=True,
)
"""Addresses of a layer's parts; 0 for norms that the model lacks. Norms are [H] or [D]."""

STEP = np.dtype(
    [
        # The model.
        ("layers", np.int64),
        ("num_layers", np.int64),
        ("embedding", np.int64),
        ("embedding_steps", np.int64),
        ("vocab_size", np.int64),
        ("final_norm", np.int64),
        ("cos_sin", np.int64),
        ("num_positions", np.int64),
        ("hidden_size", np.int64),
        ("num_heads", np.int64),
        ("num_kv_heads", np.int64),
        ("head_size", np.int64),
        ("block_size", np.int64),
        ("eps", np.float32),
        ("scale", np.float32),
        # The step.
        ("num_tokens", np.int64),
        ("block_rows", np.int64),
        ("token_ids", np.int64),
        ("positions", np.int64),
        ("slot_mapping", np.int64),
        ("block_tables", np.int64),
        ("tables_stride", np.int64),
        ("tiles", np.int64),
        ("num_tiles", np.int64),
        ("wanted_tokens", np.int64),
        ("num_wanted", np.int64),
        ("states", np.int64),
        # Room to work in.
        ("residual", np.int64),
        ("qkv", np.int64),
        ("hidden", np.int64),
        ("attended", np.int64),
        ("activated", np.int64),
        ("scratch", np.int64),
        ("scratch_bytes", np.int64),
    ],
    align=True,
)
"""A step: addresses and sizes.

embedding: [V, H], with 0 as embedding_steps; or the packed weight of a linear layer from H to V,
which has so many steps (`kernels.cpu_weights`).

token_ids, positions, slot_mapping [T] int64; block_tables [R, tables_stride] int32; tiles
[num_tiles, 4] int64 of `kernels.cpu_attention.cut_tiles`; wanted_tokens [S] int64; states [S, H];
residual [T, H] and qkv [T, (Hq + 2 Hkv) D] float32; hidden, attended and activated: packed rows of
H, Hq D and the feed-forward block's size; scratch: `scratch_bytes` for each member.
"""

LOGITS = np.dtype(
    [
        ("lm_head", MATRIX),
        ("states", np.int64),
        ("hidden_size", np.int64),
        ("num_rows", np.int64),
        ("block_rows", np.int64),
        ("hidden", np.int64),
        ("logits", np.int64),
        ("scratch", np.int64),
        ("scratch_bytes", np.int64),
    ],
    align=True,
)
"""states [S, H] -> logits [S, V] float32; hidden: packed rows of H."""
