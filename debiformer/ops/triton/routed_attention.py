"""Routed attention in Triton: the routed regions are read as one sequence of keys, and never gathered.

Key j of a query region is token j % T' of region routes[j // T']. The backward pass reads the routes the other way round: for each key
region, the query regions that are routed to it, in order. No two programs write to one place, and gradients are the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..autocast import autocast
from .launch import LOG2E, Tile, block, dot_dtype, float32_precision, heads_last, load_rows, readable, store_rows, width_block


@triton.jit
def _virtual_rows(regions, first, length, tokens, region_stride, token_stride, BLOCK: tl.constexpr):
    """Rows `first` and on of the listed regions' tokens, joined: region, token, offset in memory, and whether the row is there."""
    row = first + tl.arange(0, BLOCK)
    there = row < length
    region = tl.load(regions + row // tokens, mask=there, other=0).to(tl.int64)
    token = row % tokens
    return region, token, region * region_stride + token * token_stride, there


@triton.jit
def _place(tile_count, heads, regions):
    """Image, region, tile of the region, and head of this program. Heads come first: they read neighbouring memory."""
    program = tl.program_id(0)
    tile = program // heads % tile_count
    place = (program // heads // tile_count).to(tl.int64)
    return place // regions, place % regions, tile, program % heads


@triton.jit
def _forward_kernel(
    q, k, v, routes, out, lse, q_strides, k_strides, v_strides, out_strides, heads, regions, tokens, key_tokens, topk, scale,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_TILE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, region, tile, head = _place(tl.cdiv(tokens, QUERIES), heads, regions)
    token = tile * QUERIES + tl.arange(0, QUERIES)
    token_there = token < tokens
    q_rows = q + image * q_strides[0] + head * q_strides[1] + region * q_strides[2]
    queries = load_rows(q_rows, token * q_strides[3], token_there, WIDTH, WIDTH_BLOCK, DOT)
    k += image * k_strides[0] + head * k_strides[1]
    v += image * v_strides[0] + head * v_strides[1]
    routes += (image * regions + region) * topk
    length = topk * key_tokens

    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, WIDTH_BLOCK], tl.float32)
    for first in range(0, KEYS if ONE_TILE else length, KEYS):
        key_region, key_token, k_offsets, there = _virtual_rows(routes, first, length, key_tokens, k_strides[2], k_strides[3], KEYS)
        keys = load_rows(k, k_offsets, there, WIDTH, WIDTH_BLOCK, DOT)
        values = load_rows(v, key_region * v_strides[2] + key_token * v_strides[3], there, WIDTH, WIDTH_BLOCK, DOT)
        logits = tl.where(there[None, :], tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E), float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        weights = tl.exp2(logits - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(DOT), values, result * shrink[:, None], input_precision=PRECISION)
        maximum = new_maximum
    out += image * out_strides[0] + head * out_strides[1] + region * out_strides[2]
    store_rows(out, token * out_strides[3], token_there, result / total[:, None], WIDTH, WIDTH_BLOCK)
    tl.store(lse + ((image * heads + head) * regions + region) * tokens + token, maximum + tl.log2(total), mask=token_there)


@triton.jit
def _query_gradient_kernel(
    q, k, v, routes, out, lse, d_out, delta, d_q, q_strides, k_strides, v_strides, out_strides, d_out_strides, d_q_strides,
    heads, regions, tokens, key_tokens, topk, scale,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ONE_TILE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, region, tile, head = _place(tl.cdiv(tokens, QUERIES), heads, regions)
    token = tile * QUERIES + tl.arange(0, QUERIES)
    token_there = token < tokens
    q_rows = q + image * q_strides[0] + head * q_strides[1] + region * q_strides[2]
    out_rows = out + image * out_strides[0] + head * out_strides[1] + region * out_strides[2]
    d_out_rows = d_out + image * d_out_strides[0] + head * d_out_strides[1] + region * d_out_strides[2]
    queries = load_rows(q_rows, token * q_strides[3], token_there, WIDTH, WIDTH_BLOCK, DOT)
    d_outputs = load_rows(d_out_rows, token * d_out_strides[3], token_there, WIDTH, WIDTH_BLOCK, DOT)
    row = ((image * heads + head) * regions + region) * tokens + token
    row_lse = tl.load(lse + row, mask=token_there, other=float("inf"))  # rows that are not there get weights of zero
    row_delta = tl.zeros([QUERIES], tl.float32)
    if not ONE_TILE:
        outputs = load_rows(out_rows, token * out_strides[3], token_there, WIDTH, WIDTH_BLOCK, tl.float32)
        row_delta = tl.sum(outputs * d_outputs.to(tl.float32), 1)
    k += image * k_strides[0] + head * k_strides[1]
    v += image * v_strides[0] + head * v_strides[1]
    routes += (image * regions + region) * topk
    length = topk * key_tokens

    result = tl.zeros([QUERIES, WIDTH_BLOCK], tl.float32)
    for first in range(0, KEYS if ONE_TILE else length, KEYS):
        key_region, key_token, k_offsets, there = _virtual_rows(routes, first, length, key_tokens, k_strides[2], k_strides[3], KEYS)
        keys = load_rows(k, k_offsets, there, WIDTH, WIDTH_BLOCK, DOT)
        values = load_rows(v, key_region * v_strides[2] + key_token * v_strides[3], there, WIDTH, WIDTH_BLOCK, DOT)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.where(there[None, :], tl.exp2(logits - row_lse[:, None]), 0.0)
        d_weights = tl.dot(d_outputs, tl.trans(values), input_precision=PRECISION)
        if ONE_TILE:  # all weights are at hand, more exact than the rounded output
            row_delta = tl.sum(weights * d_weights, 1)
        d_logits = weights * (d_weights - row_delta[:, None])
        result = tl.dot(d_logits.to(DOT), keys, result, input_precision=PRECISION)
    tl.store(delta + row, row_delta, mask=token_there)
    d_q += image * d_q_strides[0] + head * d_q_strides[1] + region * d_q_strides[2]
    store_rows(d_q, token * d_q_strides[3], token_there, result * scale, WIDTH, WIDTH_BLOCK)


@triton.jit
def _key_gradient_kernel(
    q, k, v, starts, sources, lse, d_out, delta, d_k, d_v, q_strides, k_strides, v_strides, d_out_strides, d_k_strides, d_v_strides,
    heads, regions, tokens, key_regions, key_tokens, topk, scale,
    WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one region, over the queries of all regions that are routed to it."""
    image, region, tile, head = _place(tl.cdiv(key_tokens, KEYS), heads, key_regions)
    token = tile * KEYS + tl.arange(0, KEYS)
    token_there = token < key_tokens
    k_rows = k + image * k_strides[0] + head * k_strides[1] + region * k_strides[2]
    v_rows = v + image * v_strides[0] + head * v_strides[1] + region * v_strides[2]
    keys = load_rows(k_rows, token * k_strides[3], token_there, WIDTH, WIDTH_BLOCK, DOT)
    values = load_rows(v_rows, token * v_strides[3], token_there, WIDTH, WIDTH_BLOCK, DOT)
    starts += image * (key_regions + 1) + region
    start = tl.load(starts)
    length = (tl.load(starts + 1) - start) * tokens
    sources += image * regions * topk + start
    q += image * q_strides[0] + head * q_strides[1]
    d_out += image * d_out_strides[0] + head * d_out_strides[1]
    statistics = (image * heads + head) * regions

    key_result = tl.zeros([KEYS, WIDTH_BLOCK], tl.float32)
    value_result = tl.zeros([KEYS, WIDTH_BLOCK], tl.float32)
    for first in range(0, length, QUERIES):
        query_region, query_token, q_offsets, there = _virtual_rows(sources, first, length, tokens, q_strides[2], q_strides[3], QUERIES)
        queries = load_rows(q, q_offsets, there, WIDTH, WIDTH_BLOCK, DOT)
        d_out_offsets = query_region * d_out_strides[2] + query_token * d_out_strides[3]
        d_outputs = load_rows(d_out, d_out_offsets, there, WIDTH, WIDTH_BLOCK, DOT)
        row = (statistics + query_region) * tokens + query_token
        row_lse = tl.load(lse + row, mask=there, other=float("inf"))
        row_delta = tl.load(delta + row, mask=there, other=0.0)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
        weights = tl.exp2(logits - row_lse[None, :])
        value_result = tl.dot(weights.to(DOT), d_outputs, value_result, input_precision=PRECISION)
        d_weights = tl.dot(values, tl.trans(d_outputs), input_precision=PRECISION)
        d_logits = weights * (d_weights - row_delta[None, :])
        key_result = tl.dot(d_logits.to(DOT), queries, key_result, input_precision=PRECISION)
    d_k += image * d_k_strides[0] + head * d_k_strides[1] + region * d_k_strides[2]
    d_v += image * d_v_strides[0] + head * d_v_strides[1] + region * d_v_strides[2]
    store_rows(d_k, token * d_k_strides[3], token_there, key_result * scale, WIDTH, WIDTH_BLOCK)
    store_rows(d_v, token * d_v_strides[3], token_there, value_result, WIDTH, WIDTH_BLOCK)


def _tile(queries: int, keys: int, dtype: torch.dtype, width: int, results: int = 1) -> Tile:
    """A tile that holds what there is and fits the registers, `results` sums included: compiled without spills, not yet timed."""
    single = dtype == torch.float32
    largest = 32 if single or width > 64 else 64
    queries, keys = block(queries, 16, largest), block(keys, 16, largest)
    share = (256 if single or width > 64 else 1024) // results  # logits of a warp
    return Tile(queries, keys, num_warps=block(queries * keys // share, 1, 4), num_stages=1 if single else 2)


def forward(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Attention, and the base-2 logarithm of each query's sum of weights (B, H, R, T), float32; `tile` is for tuning."""
    q, k, v, routes = readable(q), readable(k), readable(v), routes.contiguous()
    (batch, heads, regions, tokens, width), key_tokens, topk = q.shape, k.shape[3], routes.shape[2]
    out, lse = heads_last(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    tile = tile or _tile(tokens, topk * key_tokens, q.dtype, width)
    with torch.cuda.device_of(q):
        _forward_kernel[(batch * regions * triton.cdiv(tokens, tile.queries) * heads,)](
            q, k, v, routes, out, lse, q.stride(), k.stride(), v.stride(), out.stride(),
            heads, regions, tokens, key_tokens, topk, scale,
            width, width_block(width), tile.queries, tile.keys, topk * key_tokens <= tile.keys, dot_dtype(q.dtype), float32_precision(),
            **tile.options,
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float,
    query_tile: Tile | None = None, key_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, always the same bits; the tiles are for tuning."""
    q, k, v, d_out, routes = readable(q), readable(k), readable(v), readable(d_out), routes.contiguous()
    (batch, heads, regions, tokens, width), (key_regions, key_tokens), topk = q.shape, k.shape[2:4], routes.shape[2]
    d_q, d_k, d_v, delta = heads_last(q), heads_last(k), heads_last(v), torch.empty_like(lse)
    query_tile = query_tile or _tile(tokens, topk * key_tokens, q.dtype, width)
    key_tile = key_tile or _tile(topk * tokens, key_tokens, q.dtype, width, results=2)
    types = dot_dtype(q.dtype), float32_precision()
    starts, sources = invert(routes, key_regions)
    with torch.cuda.device_of(q):
        _query_gradient_kernel[(batch * regions * triton.cdiv(tokens, query_tile.queries) * heads,)](
            q, k, v, routes, out, lse, d_out, delta, d_q, q.stride(), k.stride(), v.stride(), out.stride(), d_out.stride(), d_q.stride(),
            heads, regions, tokens, key_tokens, topk, scale,
            width, width_block(width), query_tile.queries, query_tile.keys, topk * key_tokens <= query_tile.keys, *types,
            **query_tile.options,
        )  # fmt: skip
        _key_gradient_kernel[(batch * key_regions * triton.cdiv(key_tokens, key_tile.keys) * heads,)](
            q, k, v, starts, sources, lse, d_out, delta, d_k, d_v,
            q.stride(), k.stride(), v.stride(), d_out.stride(), d_k.stride(), d_v.stride(),
            heads, regions, tokens, key_regions, key_tokens, topk, scale,
            width, width_block(width), key_tile.queries, key_tile.keys, *types,
            **key_tile.options,
        )  # fmt: skip
    return d_q, d_k, d_v


def invert(routes: Tensor, key_regions: int) -> tuple[Tensor, Tensor]:
    """The query regions (B, R * K) routed to each key region, in order of both, and where each key region's begin (B, R' + 1)."""
    keys, slots = routes.flatten(1).sort(dim=1, stable=True)
    starts = torch.searchsorted(keys, torch.arange(key_regions + 1, device=routes.device).expand(len(keys), -1).contiguous())
    return starts, slots // routes.shape[2]


@torch.library.custom_op("debiformer::routed_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, routes, scale)


@_attention.register_fake
def _(q, k, v, routes, scale):
    return heads_last(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("debiformer::routed_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, routes: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(q, k, v, routes, out, lse, d_out, scale)


@_attention_backward.register_fake
def _(q, k, v, routes, out, lse, d_out, scale):
    return heads_last(q), heads_last(k), heads_last(v)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, d_out, d_lse):
    return *_attention_backward(*ctx.saved_tensors, d_out, ctx.scale), None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _pairs(q, k, routes):
    """Multiply-adds of one product of all queries with their keys."""
    (batch, heads, regions, tokens, width), key_tokens = q, k[3]
    return batch * heads * regions * tokens * routes[2] * key_tokens * width


@register_flop_formula(torch.ops.debiformer.routed_attention)
def _(q, k, v, routes, *_, **__) -> int:
    return 2 * 2 * _pairs(q, k, routes)


@register_flop_formula(torch.ops.debiformer.routed_attention_backward)
def _(q, k, v, routes, *_, **__) -> int:
    return 2 * 5 * _pairs(q, k, routes)


def routed_attention(q: Tensor, k: Tensor, v: Tensor, routes: Tensor, scale: float) -> Tensor:
    """The public operation, on arguments that it has checked."""
    return _attention(*autocast(q, k, v), routes, scale)[0]
