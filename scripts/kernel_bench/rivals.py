"""Other implementations of the same attention, on the same numbers.

Each makes one launch a copy of a case, or raises: ImportError if it isn't installed, anything else
if it can't do the case.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from scripts.kernel_bench.cases import Tensors
from scripts.kernel_bench.clocks import Launch

_WORKSPACE_BYTES = 2**28


def sdpa(backend: SDPBackend, tensors: Tensors) -> list[Launch]:
    """PyTorch's attention over keys and values gathered beforehand, which it gets for free."""
    case = tensors.case
    size = (case.batch, case.num_queries, *tensors.query.shape[1:])
    query = tensors.query.view(size).transpose(1, 2)  # [batch, Hq, n, D]
    is_prompt = case.num_queries == case.context_len
    mask: Any = None
    if not case.is_decode and not is_prompt:
        mask = causal_lower_right(case.num_queries, case.context_len)

    def launch(keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                is_causal=is_prompt and not case.is_decode,
                scale=tensors.scale,
                enable_gqa=True,
            )

    return [partial(launch, *tensors.gathered(copy)) for copy in range(case.num_copies)]


def flashinfer(tensors: Tensors) -> list[Launch]:
    """FlashInfer's batch wrappers over the same pages."""
    module = importlib.import_module("flashinfer")
    case, shape, device = tensors.case, tensors.case.shape, tensors.query.device
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    blocks_each = tensors.block_tables.shape[2]
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
    last = case.context_len - (blocks_each - 1) * shape.block_size
    last_lens = torch.full((case.batch,), last, dtype=torch.int32, device=device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size)
    types = {"q_data_type": tensors.query.dtype, "kv_data_type": tensors.key_cache.dtype}
    caches = (tensors.key_cache, tensors.value_cache)
    launches: list[Launch] = []
    for copy in range(case.num_copies):
        pages = (starts * blocks_each, tensors.block_tables[copy].flatten(), last_lens)
        if case.is_decode:
            wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_tensor_cores=True
            )
            wrapper.plan(*pages, *heads, **types)
        else:
            wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            queries = starts * case.num_queries
            wrapper.plan(queries, *pages, *heads, causal=True, **types)
        launches.append(partial(wrapper.run, tensors.query, caches))
    return launches


def cudnn_frontend(tensors: Tensors) -> list[Launch]:
    """cuDNN's paged attention, through its front end."""
    cudnn = importlib.import_module("cudnn")
    case, device = tensors.case, tensors.query.device
    if not case.is_decode:
        raise NotImplementedError("decode only")
    size = (case.batch, 1, *tensors.query.shape[1:])
    query = tensors.query.view(size).transpose(1, 2)  # [batch, Hq, 1, D]
    out = torch.empty_like(query)
    lens = tensors.context_lens.view(-1, 1, 1, 1)
    ones = torch.ones_like(lens)
    table = tensors.block_tables[0].view(case.batch, 1, -1, 1)
    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
    )
    inputs = (query, tensors.key_cache, tensors.value_cache, ones, lens, table, table.clone())
    nodes = [graph.tensor_like(tensor) for tensor in inputs]
    result, _ = graph.sdpa(
        name="decode",
        q=nodes[0],
        k=nodes[1],
        v=nodes[2],
        is_inference=True,
        attn_scale=tensors.scale,
        use_padding_mask=True,
        seq_len_q=nodes[3],
        seq_len_kv=nodes[4],
        paged_attention_k_table=nodes[5],
        paged_attention_v_table=nodes[6],
        paged_attention_max_seq_len_kv=case.context_len,
    )
    result.set_output(True).set_dim(out.size()).set_stride(out.stride())
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    handle = cudnn.create_handle()

    def launch(copy: int) -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        table = tensors.block_tables[copy].view(case.batch, 1, -1, 1)
        given = dict(zip(nodes, (*inputs[:5], table, table), strict=True))
        graph.execute({**given, result: out}, workspace, handle=handle)

    return [partial(launch, copy) for copy in range(case.num_copies)]


RIVALS: dict[str, Callable[[Tensors], list[Launch]]] = {
    "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "FlashInfer": flashinfer,
    "cuDNN front end": cudnn_frontend,
}
