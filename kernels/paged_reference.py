"""Attention over a paged cache in plain torch and float64: what the kernels are judged by.

Called by `paged_decode_reference` and `paged_prefill_reference`, which tests and `bench/device_check.py` call. Slow on
purpose: one request and one KV head at a time, everything written out, inputs never written to.
"""

from __future__ import annotations

import math

import torch


def gather_tokens(cache: torch.Tensor, page_row: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first `num_tokens` tokens of one request: [num_kv_heads, num_tokens, head_dim], float64.

    cache: [num_pages, num_kv_heads, page_size, head_dim]; page_row: [max_pages], int32.
    """
    num_kv_heads, page_size, head_dim = cache.shape[1:]
    num_pages = -(-num_tokens // page_size)
    pages = cache[page_row[:num_pages].long()]
    return pages.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :num_tokens].double()


def attend_reference(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one request's last queries: ([n, num_heads, head_dim], lse [n, num_heads]), float64.

    q: [n, num_heads, head_dim], the last n positions; keys, values: [num_kv_heads, num_tokens, head_dim], float64.
    """
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_tokens, _ = keys.shape
    out = torch.zeros(num_queries, num_heads, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((num_queries, num_heads), -math.inf, dtype=torch.float64, device=q.device)
    query_position = torch.arange(num_tokens - num_queries, num_tokens, device=q.device)[:, None]
    key_position = torch.arange(num_tokens, device=q.device)[None, :]
    is_seen = key_position <= query_position
    if window is not None:
        is_seen &= key_position > query_position - window
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        logits = q[:, head].double() @ keys[kv_head].T * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~is_seen, -math.inf)
        lse[:, head] = torch.logsumexp(logits, dim=1)
        out[:, head] = torch.softmax(logits, dim=1) @ values[kv_head]
    return out, lse
