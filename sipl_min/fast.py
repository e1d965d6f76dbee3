"""The same numbers with less time and memory: other `forward`s for three modules, while no gradient is recorded.

`accelerate(model)` gives modules a subclass that differs in `forward` only: parameters, state dict and output (to
rounding) stay. In training autograd keeps every intermediate anyway, and the plain forwards run. Three ideas:

1. Tiles. A layer works on a tile of the image at a time, so that its wide hidden tensors never exist for the whole
   image, and on a CPU stay in the cache. Norms are inside the tile too.
2. Channel attention is summed tile by tile: q.k of unit vectors is a sum over pixels, divided by two lengths.
   And W (A v) = (W A) v: attention A and the 1x1 convolution W behind it are one small matrix per image.
3. Channels last, the memory layout that layer norm, 1x1 convolutions and attention prefer.
"""

import math
import threading
from contextlib import contextmanager

import torch
import torch.nn as nn

from .backbones import ChannelCrossAttention
from .sipl import SIPL, Block, CrossAttention, unit

TILE = {"cpu": 2**20, "cuda": 2**26}  # elements of the widest tensor that a layer makes; 2**20 floats fit a CPU's cache


def tiles(x, width, halo):
    """Cut x (B, C, H, W) for a layer that makes `width` channels and sees `halo` pixels around each pixel.

    Yields (place, tile, inner): where in x the tile belongs, the tile with its halo, its slices without the halo."""
    H, W = x.shape[-2:]
    pixels = TILE.get(x.device.type, TILE["cuda"]) // (len(x) * width)
    side = max(H, W) if pixels >= H * W else max(32, math.isqrt(pixels))
    rows, columns = (math.ceil(n / math.ceil(n / side)) for n in (H, W))  # tiles of about equal size
    for top in range(0, H, rows):
        for left in range(0, W, columns):
            y0, x0 = max(top - halo, 0), max(left - halo, 0)
            place = (..., slice(top, top + rows), slice(left, left + columns))
            inner = (..., slice(top - y0, top - y0 + rows), slice(left - x0, left - x0 + columns))
            yield place, x[..., y0 : top + rows + halo, x0 : left + columns + halo], inner


def tiled(layer, x, width, halo, out=None):
    """layer(x), one tile at a time. `out=x` writes over x, and needs a layer that keeps the number of channels."""
    waiting = []
    for place, tile, inner in tiles(x, width, halo):
        y = layer(tile)
        if tile.shape == x.shape:  # a small image is one tile
            return y
        if out is None:
            size = (len(y), y.shape[1], *x.shape[-2:])
            out = torch.empty(size, dtype=y.dtype, device=x.device, memory_format=torch.channels_last)
        waiting.append((place, y[inner]))
        # in place, a result waits until the next row of tiles has seen the pixels that it replaces
        while waiting and (out is not x or waiting[0][0][1].stop < place[1].start):
            earlier, y = waiting.pop(0)
            out[earlier] = y
    for earlier, y in waiting:
        out[earlier] = y
    return out


class FastBlock(Block):
    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        C, parts = x.shape[1], []
        v = torch.empty_like(x, memory_format=torch.channels_last)
        for place, tile, inner in tiles(x, 3 * C, halo=1):
            q, k, v[place] = self.attention.qkv(self.norm1(tile))[inner].chunk(3, dim=1)
            parts.append(sums(q, k, self.attention.heads))
        matrix = matrix_of(self.attention, parts)
        for place, tile, _ in tiles(x, 3 * C, halo=0):
            v[place] = tile + mix(matrix, v[place])  # v becomes x + attention(norm1(x))
        width = self.ffn.inner[0].out_channels
        return tiled(lambda tile: tile + self.ffn(self.norm2(tile)), v, width, halo=1, out=v)


def sums(q, k, heads):
    """Sums over the pixels of a tile, q and k (B, C, h, w), from which channel attention follows."""
    q, k = (t.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (heads, -1)) for t in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))  # float16 sums overflow
        products = q.permute(0, 2, 3, 1) @ k.transpose(1, 2)  # (B, heads, C/heads, C/heads)
    return products, q.square().sum(1), k.square().sum(1)  # the last two (B, heads, C/heads)


def matrix_of(attention, parts):
    """W A for each image, (B, C, C), of the `sums` of all tiles: attention A, then the 1x1 convolution W."""
    products, q, k = map(sum, zip(*parts))
    q, k = (t.sqrt().clamp(min=1e-12) for t in (q, k))
    A = (products / (q[..., :, None] * k[..., None, :]) * attention.temperature).softmax(-1)
    W = attention.out.weight.to(A.dtype).flatten(1).unflatten(1, (attention.heads, -1)).transpose(0, 1)
    return (W @ A).transpose(1, 2).flatten(2)  # (B, C, heads, C/heads) -> (B, C, C)


def mix(matrix, v):  # (B, C, C), (B, C, h, w)
    y = v.permute(0, 2, 3, 1).flatten(1, 2) @ matrix.to(v.dtype).mT
    return y.unflatten(1, v.shape[-2:]).permute(0, 3, 1, 2)


class FastChannelCrossAttention(ChannelCrossAttention):
    def forward(self, query, context):
        if torch.is_grad_enabled():
            return super().forward(query, context)
        C, parts, v = query.shape[1], [], torch.empty_like(query)
        for (place, tile, inner), (_, other, _) in zip(tiles(query, 3 * C, halo=1), tiles(context, 3 * C, halo=1)):
            k, v[place] = self.kv(other)[inner].chunk(2, dim=1)
            parts.append(sums(self.q(tile)[inner], k, self.heads))
        return mix(matrix_of(self, parts), v)


class FastCrossAttention(CrossAttention):
    def keys_values(self, context):
        if torch.is_grad_enabled():
            return super().keys_values(context)
        width = 2 * self.kv[0].out_channels
        kv = tiled(lambda tile: self.kv(self.norm_context(tile)), context, width, halo=1)
        k, v = map(self.tokens, kv.chunk(2, dim=1))
        return unit(k), v

    def attend(self, query, k, v):
        if torch.is_grad_enabled():
            return super().attend(query, k, v)
        width = self.ffn.inner[0].out_channels
        plain = super().attend
        return tiled(lambda tile: plain(tile, k, v), query, width, halo=2)


FAST = {Block: FastBlock, ChannelCrossAttention: FastChannelCrossAttention, CrossAttention: FastCrossAttention}


@torch.inference_mode(False)  # else weights in a new layout could never be trained again
def accelerate(model: SIPL, fast: bool = True) -> SIPL:
    """Make a model fast, in place (`fast=False`: plain again), and return it. In a wrapped one: its Proxy Fusion."""
    swap = FAST if fast else {new: old for old, new in FAST.items()}
    theirs = set(model.net.modules()) if hasattr(model, "net") else set()
    for module in set(model.modules()) - theirs:
        module.__class__ = swap.get(type(module), type(module))
        if isinstance(module, nn.Conv2d):  # a convolution puts out the layout of its weights
            module.to(memory_format=torch.channels_last if fast else torch.contiguous_format)
    return model


LOCK = threading.RLock()  # threads may share a model, whose modules change their class: they take turns


@contextmanager
def accelerated(*models):
    """Inside, the models are fast and in evaluation mode; behind, each is as it was."""
    with LOCK:
        plain = [model for model in models if not any(type(module) in FAST.values() for module in model.modules())]
        training = [module for model in models for module in model.modules() if module.training]
        for model in models:
            accelerate(model).eval()
        try:
            yield
        finally:
            for model in plain:
                accelerate(model, False)
            for module in training:
                module.training = True
