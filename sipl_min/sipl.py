"""Self-Improved Privilege Learning (SIPL) for image restoration: network and loop in one file, in plain PyTorch.

Method:   Wu, Jiang, Jiang & Liu 2025, arXiv 2505.24207.
Backbone: PromptIR (Potlapalli et al., NeurIPS 2023), which is Restormer (Zamir et al., CVPR 2022) with prompts.

P, the privileged features, is what the encoder E makes of a better image than the input x. Read: a learned Privileged
Dictionary D attends to P, which gives the proxy Read(D, P). Write: the decoder attends to the proxy, or without P to D.
f(x; proxy) and f(x; D) are the whole network. In training the better image is the clean one, or made from it (recipes:
train.py); at test time it is the network's own estimate: y_0 = f(x; D), y_t = f(x; Read(D, E(y_{t-1}))), t = 1..T."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from os import PathLike
from typing import Any, TypeVar, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Photo = TypeVar("Photo")  # a tensor, or a NumPy array


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the network. The defaults are SIPL + PromptIR as published, 40.03 M parameters.
    Tuples of four: one value per level (full, 1/2, 1/4, 1/8 resolution). Of three: one per scale (1/2, 1/4, 1/8)."""

    backbone: str = "promptir"  # a name in BACKBONES
    dim: int = 48  # d: channels at full resolution, doubled by each level
    blocks: tuple = (4, 6, 6, 8)  # transformer blocks of the encoder; the decoder has the first three too
    refinement: int = 4  # transformer blocks after the last decoder level
    heads: tuple = (1, 2, 4, 8)  # of channel attention
    expansion: float = 2.66  # hidden / input channels of a feed-forward network; in Proxy Fusion 2
    prompt_channels: tuple = (64, 128, 320)  # PromptIR only; multiples of its four heads
    prompt_size: tuple = (64, 32, 16)  # PromptIR only
    middle: int = 1  # NAFNet only: blocks at 1/16 resolution
    decoder_blocks: tuple = (1, 1, 1, 1)  # NAFNet only: blocks from 1/8 up to full resolution
    fusion: bool = True  # False: the backbone alone, without dictionary and Proxy Fusion
    dictionary_size: tuple = (64, 32, 16)  # a dictionary is a map of size x size entries
    dictionary_std: float = 0.02  # of its random start; 0, as released, gives gradients of 1e9 in the first guided pass
    read_heads: tuple = (1, 2, 1)  # as released, not rising
    write_heads: tuple = (1, 2, 4)
    identity_start: bool = False  # True: a new Write leaves h as it is. Released: Write adds to LayerNorm(h), not to h
    dims = property(lambda self: [self.dim * 2**i for i in range(4)])  # channels of each level

    def __post_init__(self):
        for f in fields(self):
            value, like = getattr(self, f.name), f.default
            good = isinstance(value, (float, int) if isinstance(like, float) else type(like))
            if not good or (isinstance(like, tuple) and (len(value) != len(like) or min(value) < 1)):
                raise ValueError(f"setting {f.name}={value!r} cannot work: it must have the form of {like!r}")
        for d, *heads in zip(self.dims, self.heads, (2, *self.read_heads), (2, *self.write_heads)):
            if d < 1 or any(d % h for h in heads):  # the 2: no Proxy Fusion there, but the encoder halves channels
                raise ValueError(f"settings dim, *heads: {d} channels must be even, and divisible by the heads {heads}")
        if any(c % 4 for c in self.prompt_channels):
            raise ValueError(f"setting prompt_channels={self.prompt_channels} cannot work: pass multiples of 4")


PRESETS = {  # what differs from Settings
    "nano": dict(dim=16, blocks=(1, 1, 1, 1), refinement=1, heads=(1, 2, 2, 4), expansion=2.0)  # 1.3 M parameters
    | dict(prompt_channels=(8, 16, 16), prompt_size=(16, 8, 4), dictionary_size=(16, 8, 4)),
    "small": dict(dim=24, blocks=(2, 2, 2, 4), refinement=2)  # 5.4 M
    | dict(prompt_channels=(16, 32, 64), prompt_size=(32, 16, 8), dictionary_size=(32, 16, 8)),
    "paper": {},  # 40 M
}


def known(kind, name, names):  # -> name
    if name not in names:
        near = get_close_matches(str(name), names, 1)
        raise ValueError(f"unknown {kind} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"use {[*names]}"))
    return name


# --------------------------------------------------------------------------------- Restormer's transformer block
class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each pixel."""

    def forward(self, x):  # (B, C, H, W); nn.LayerNorm normalizes the last dimension
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


def pointwise_depthwise(dim, out):  # a 1x1 convolution mixes channels, then a depthwise 3x3 mixes neighbors
    return nn.Sequential(conv1x1(dim, out), conv3x3(out, out, groups=out))


def unit(x):  # vectors of length 1, along the last dimension
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))  # 1e-12 is 0 in float16


class ChannelAttention(nn.Module):
    """Restormer's MDTA: attention between channels, so its cost is linear in the number of pixels."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.out = pointwise_depthwise(dim, 3 * dim), conv1x1(dim, dim)

    def forward(self, x):  # (B, C, H, W)
        B, C, H, W = x.shape
        q, k, v = self.qkv(x).reshape(B, 3, self.heads, C // self.heads, H * W).unbind(1)
        attention = (unit(q) @ unit(k).mT * self.temperature).softmax(-1)  # (B, heads, C/heads, C/heads)
        return self.out((attention @ v).reshape(B, C, H, W))


class FeedForward(nn.Module):
    """Restormer's GDFN: one half of the inner channels gates the other. Proxy Fusion gates both ways."""

    def __init__(self, dim, expansion, dual_gate=False):
        super().__init__()
        hidden, self.dual_gate = int(dim * expansion), dual_gate
        self.inner, self.out = pointwise_depthwise(dim, 2 * hidden), conv1x1(hidden, dim)

    def forward(self, x):  # (B, C, H, W)
        a, b = self.inner(x).chunk(2, dim=1)  # (B, hidden, H, W) each
        return self.out(F.gelu(a) * b + F.gelu(b) * a if self.dual_gate else F.gelu(a) * b)


class Block(nn.Module):
    """Restormer's transformer block."""

    def __init__(self, dim, heads, expansion):
        super().__init__()
        self.norm1, self.attention = LayerNorm2d(dim), ChannelAttention(dim, heads)
        self.norm2, self.ffn = LayerNorm2d(dim), FeedForward(dim, expansion)

    def forward(self, x):  # (B, C, H, W)
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def level(dim, heads, depth, expansion):
    return nn.Sequential(*(Block(dim, heads, expansion) for _ in range(depth)))


# ----------------------------------------------------------------------- Privileged Dictionary and Proxy Fusion
class CrossAttention(nn.Module):
    """Every pixel of `query` attends to every pixel of `context`: Read and Write are both this block."""

    def __init__(self, dim, heads, context_dim=None, identity_start=False):
        super().__init__()
        self.heads, self.identity_start, self.temperature = heads, identity_start, nn.Parameter(torch.ones(heads, 1, 1))
        self.norm_query, self.norm_context = LayerNorm2d(dim), LayerNorm2d(context_dim or dim)
        self.q, self.kv = pointwise_depthwise(dim, dim), pointwise_depthwise(context_dim or dim, 2 * dim)
        self.out = conv1x1(dim, dim)
        self.norm_ffn, self.ffn = LayerNorm2d(dim), FeedForward(dim, 2, dual_gate=True)
        for layer in (self.out, self.ffn.out) if identity_start else ():  # a new Write changes nothing
            nn.init.zeros_(layer.weight)

    def tokens(self, x):  # (B, C, H, W) -> (B, heads, H*W, C/heads): one token per pixel
        x = x.permute(0, 2, 3, 1).contiguous()  # fused attention wants the channels of a token side by side in memory
        return x.view(len(x), -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def keys_values(self, context):  # (B, context_dim, h, w) -> two of (B, heads, h*w, C/heads)
        k, v = map(self.tokens, self.kv(self.norm_context(context)).chunk(2, dim=1))
        return unit(k), v

    def attend(self, query, k, v):  # (B, C, H, W)
        normed = self.norm_query(query)
        q = unit(self.tokens(self.q(normed)))
        B = max(len(q), len(k))  # D has a batch of 1, as the query of Read and as the context of Write
        q, k, v = (t.expand(B, -1, -1, -1) for t in (q * self.temperature, k, v))
        # softmax(temperature q k^T) v; fused attention never stores the (H*W) x (h*w) matrix
        z = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        z = self.out(z.mT.reshape(B, *query.shape[1:]))
        z = z + (query if self.identity_start else normed)  # the released code adds to the normalized query
        return z + self.ffn(self.norm_ffn(z))

    def forward(self, query, context):  # (B, C, H, W), (B, context_dim, h, w) -> (B, C, H, W)
        return self.attend(query, *self.keys_values(context))


class ProxyFusion(nn.Module):
    """The Privileged Dictionary D of one scale, with Read and Write: h <- Write(h, Read(D, P)), h a decoder feature."""

    def __init__(self, dim, size, std, read_heads, write_heads, identity_start=False, context_dim=None):
        super().__init__()
        self.dictionary = nn.Parameter(std * torch.randn(1, dim, size, size))
        self.read = CrossAttention(dim, read_heads, context_dim)
        self.write = CrossAttention(dim, write_heads, identity_start=identity_start)


# ------------------------------------------------------------------------------------------ encoder and decoder
class Encoder(nn.Module):
    """Restormer's encoder E. Each level has half the resolution and twice the channels of the one before."""

    multiple, padding = 8, "reflect"  # images are padded to multiples of 8, since the resolution is halved three times

    def __init__(self, s):
        super().__init__()
        self.embed = conv3x3(3, s.dim)
        self.levels = nn.ModuleList(level(*args, s.expansion) for args in zip(s.dims, s.heads, s.blocks))
        self.down = nn.ModuleList(nn.Sequential(conv3x3(d, d // 2), nn.PixelUnshuffle(2)) for d in s.dims[:3])

    def forward(self, x):  # (B, 3, H, W) -> [(B, d, H, W), (B, 2d, H/2, W/2), (B, 4d, H/4, W/4), (B, 8d, H/8, W/8)]
        features = [self.levels[0](self.embed(x))]
        for down, blocks in zip(self.down, self.levels[1:]):
            features.append(blocks(down(features[-1])))
        return features


class Prompt(nn.Module):
    """PromptIR's prompt: a sum of five learned maps, weighted to suit the image, concatenated to the feature."""

    def __init__(self, dim, out, channels, size, expansion):
        super().__init__()
        self.maps = nn.Parameter(torch.rand(5, channels, size, size))
        self.choose, self.conv = nn.Linear(dim, 5), conv3x3(channels, channels)
        self.block, self.reduce = Block(dim + channels, 4, expansion), conv1x1(dim + channels, out)

    def forward(self, x):  # (B, C, H, W)
        weights = self.choose(x.mean((-2, -1))).softmax(-1)  # (B, 5)
        prompt = torch.einsum("bn,nchw->bchw", weights, self.maps)  # (B, channels, size, size)
        prompt = self.conv(F.interpolate(prompt, x.shape[-2:], mode="bilinear"))
        return self.reduce(self.block(torch.cat([x, prompt], 1)))


class Decoder(nn.Module):
    """Restormer's decoder, for "promptir" with prompts. From 1/8 up; at full resolution it has 2d channels."""

    def __init__(self, s):
        super().__init__()
        _, d2, d3, d4 = s.dims
        reduced = (d2, d3, d3 if s.backbone == "promptir" else d4)  # PromptIR's prompt at 1/8 halves the channels
        args = zip(s.dims[1:], reduced, s.prompt_channels, s.prompt_size)
        self.prompts = nn.ModuleList(Prompt(*a, s.expansion) for a in args) if s.backbone == "promptir" else None
        self.up = nn.ModuleList(nn.Sequential(conv3x3(d, 2 * d), nn.PixelShuffle(2)) for d in reduced)
        self.merge = nn.ModuleList([nn.Identity(), conv1x1(2 * d2, d2), conv1x1(reduced[2] // 2 + d3, d3)])
        self.levels = nn.ModuleList(level(*args, s.expansion) for args in zip((d2, d2, d3), s.heads, s.blocks))
        self.refinement, self.output = level(d2, s.heads[0], s.refinement, s.expansion), conv3x3(d2, 3)

    def adapt(self, i, h, x):  # what the backbone itself does at each scale; x is for AdaIR
        return h if self.prompts is None else self.prompts[i](h)

    def forward(self, x, features, fuse):
        """Padded image, its four features, fuse(i, h): Proxy Fusion at scale i (0: 1/2, 2: 1/8) -> restored image."""
        h = features[3]
        for i in (2, 1, 0):  # fuse at scale i, 1/8 first; go up to level i; merge with the encoder's feature of it
            h = self.adapt(i, fuse(i, h), x)
            h = torch.cat([self.up[i](h), features[i]], 1)
            h = self.levels[i](self.merge[i](h))
        return self.output(self.refinement(h)) + x  # the network predicts the residual


BACKBONES = {"promptir": (Encoder, Decoder), "restormer": (Encoder, Decoder)}  # `backbones.py` adds AdaIR, NAFNet


# --------------------------------------------------------------------------------------------------- the method
class SIPL(nn.Module):
    """A restoration network with a Privileged Dictionary: SIPL("nano"), or SIPL("paper", backbone="restormer").

    `overrides` replace settings of a preset; ValueError for a wrong name, type or heads. Images are (B, 3, H, W) of any
    size, with values in [0, 1] (only `restore` checks them). Estimates have the same shape and are not clamped."""

    def __init__(self, preset: str = "nano", **overrides: Any) -> None:
        super().__init__()
        for name in overrides:
            known("setting", name, Settings.__annotations__)
        self.settings = s = Settings(**PRESETS[known("preset", preset, PRESETS)] | overrides)
        encoder, decoder = BACKBONES[known("backbone", s.backbone, BACKBONES)]
        self.encoder = encoder(s)
        args = zip(s.dims[1:], s.dictionary_size, 3 * [s.dictionary_std], s.read_heads, s.write_heads)
        self.fusion = nn.ModuleList(ProxyFusion(*a, s.identity_start) for a in args if s.fusion)
        self.decoder = decoder(s)

    def pad(self, x, multiple=1):
        """Pad right and bottom, to multiples of the backbone's number or of `multiple`, whichever is larger."""
        multiple, mode = max(multiple, self.encoder.multiple), self.encoder.padding
        bottom, right = (-n % multiple for n in x.shape[-2:])
        tiny = bottom >= x.shape[-2] or right >= x.shape[-1]  # F.pad reflects only what is there
        return F.pad(x, (0, right, 0, bottom), "replicate" if tiny and mode == "reflect" else mode)

    def privileged(self, image: Tensor) -> list[Tensor]:
        """P = E(padded image): (B, 2d, H/2, W/2), (B, 4d, H/4, W/4), (B, 8d, H/8, W/8), with d = dim."""
        return self.encoder(self.pad(image))[1:4]

    def proxies(self, privileged: list[Tensor] | None = None) -> list[Tensor]:
        """Read(D, P) at each scale, (B, 2d or 4d or 8d, S, S) with S of dictionary_size; without P, D of batch 1."""
        if privileged is None:
            return [scale.dictionary for scale in self.fusion]
        return [scale.read(scale.dictionary, p) for scale, p in zip(self.fusion, privileged, strict=True)]

    def decode(self, x, features, proxies):
        """f(x; proxies), for a padded image x and its features E(x)."""
        return self.decoder(x, features, lambda i, h: self.fusion[i].write(h, proxies[i]) if proxies else h)

    def forward(self, x: Tensor, privileged: list[Tensor] | None = None) -> Tensor:
        """Restore once: the first pass f(x; D); or the guided f(x; Read(D, P)), P = privileged(a better image)."""
        (H, W), x = x.shape[-2:], self.pad(x)
        return self.decode(x, self.encoder(x), self.proxies(privileged))[..., :H, :W]

    def estimates(self, x: Tensor, steps: int = 1, feedback: str = "privilege") -> Iterator[Tensor]:
        """Yield y_0 = f(x; D), then y_1, ..., y_T, T = `steps`, with gradients; cut to size, padded inside the loop.
        feedback="privilege", the paper's equations: y_t = f(x; Read(D, E(y_{t-1}))), where E(x) is computed once.
        feedback="chain", the released code: the same for t = 1; then z = y_{t-1}, y_t = f(z; Read(D, E(f(z; D)))).
        feedback="again", also for a backbone alone: y_t = f(y_{t-1}; D). At y_0, ValueError for other steps."""
        guided = known("feedback", feedback, ("privilege", "chain", "again")) != "again"
        if steps < 0 or steps != int(steps) or steps and guided and not self.fusion:
            raise ValueError(f"steps={steps}: pass 0, 1, 2, ...; without Proxy Fusion 0, or feedback='again'")
        (H, W), x = x.shape[-2:], self.pad(x, 16 if feedback == "chain" else 1)  # 16 as in the released loop
        features = self.encoder(x)
        y = self.decode(x, features, self.proxies())
        yield y[..., :H, :W]
        for t in range(1, int(steps) + 1):
            if feedback == "again" or feedback == "chain" and t > 1:
                x, features = y, self.encoder(y)
                y = self.decode(x, features, self.proxies())
            if guided:
                y = self.decode(x, features, self.proxies(self.privileged(y)))  # P = E(y)
            yield y[..., :H, :W]

    @torch.no_grad()
    def refine(self, x: Tensor, steps: int = 1, feedback: str = "privilege", return_all: bool = False) -> Tensor:
        """Self-refinement at test time, like `estimates`: y_T, or with `return_all` y_0 to y_T, (T + 1, B, 3, H, W)."""
        estimates = list(self.estimates(x, steps, feedback))
        return torch.stack(estimates) if return_all else estimates[-1]

    # What follows lives in other files of the package, imported when called, so that this file works alone, too.
    @overload
    def restore(self, photo: str | PathLike, steps: int | None = None, **options: Any) -> Any: ...
    @overload
    def restore(self, photo: Photo, steps: int | None = None, **options: Any) -> Photo: ...
    def restore(self, photo, steps=None, **options):
        """A photo in, the same kind of photo out, of any size; for a path, an array: see photos.restore."""
        return package("photos").restore(self, photo, steps, **options)

    def save(self, path: str | PathLike) -> None:
        """Write weights and settings to a safetensors file, or with a config.json to a folder: see weights.save."""
        package("weights").save(self, path)

    @classmethod
    def load(cls, source: Any = "nano", device: Any = None, net: nn.Module | None = None) -> "SIPL":
        """A trained model: included weights by name, a file from `save`, or a published one: see weights.load."""
        return package("weights").load(source, device, net)

    from_pretrained, from_published, save_pretrained = load, load, save  # aliases

    @classmethod
    def from_backbone(cls, source: Any, identity_start: bool = False, **overrides: Any) -> "SIPL":
        """A trained backbone with Proxy Fusion in it; identity_start keeps its output: see weights.from_backbone."""
        return package("weights").from_backbone(source, identity_start, **overrides)

    @classmethod
    def wrap(cls, net: nn.Module, *names: Any, **options: Any) -> "SIPL":
        """SIPL in a network of your own, by the names of its modules: see wrap.wrap."""
        return package("wrap").wrap(net, *names, **options)


def package(file):
    if not __package__ or importlib.util.find_spec(f"{__package__}.{file}") is None:
        raise ImportError("this needs the package sipl_min, not only its file sipl.py")
    return importlib.import_module(f"{__package__}.{file}")
