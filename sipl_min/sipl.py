"""Self-Improved Privilege Learning (SIPL) for image restoration: the whole method, in the order of the data.

Backbone blocks, then the Privileged Dictionary with its Proxy Fusion (read and write), then the network that holds
both, then the test-time loop. Backbone: PromptIR (Potlapalli et al. 2023), which is Restormer (Zamir et al. 2022)
with prompts in the decoder. Method: Wu, Jiang, Jiang & Liu 2025, arXiv 2505.24207.

Shapes in the comments: B images, C channels, H x W pixels, d = `Settings.dim`.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import weights
from .files import Name, check_batch, check_fusion, check_loop, check_privileged, check_range
from .restore import restore
from .settings import choose
from .tiles import add, local, pad, tiles

# ---------------------------------------------------------------------------------------------- backbone blocks


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel (biased variance, weight and bias)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):  # (B, C, H, W)
        x = x.permute(0, 2, 3, 1)  # layer_norm wants the channels last
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def conv1(dim, out):
    return nn.Conv2d(dim, out, 1, bias=False)


def conv3(dim, out):
    return nn.Conv2d(dim, out, 3, padding=1, bias=False)


def project(dim, out):
    """1x1 convolution, then a 3x3 convolution of each channel by itself: mix channels, then look around."""
    return nn.Sequential(conv1(dim, out), nn.Conv2d(out, out, 3, padding=1, groups=out, bias=False))


class ChannelAttention(nn.Module):
    """Restormer's MDTA: a head attends between its C/h channels, so the cost is linear in the number of pixels.

    q.k of unit vectors over the pixels is a sum over pixels divided by two lengths, so it can be gathered tile by tile;
    and W (A v) = (W A) v, so that attention and the 1x1 behind it are one small matrix for each image.
    """

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.out = project(dim, 3 * dim), conv1(dim, dim)

    def forward(self, x, norm):  # (B, C, H, W) -> x + attention(norm(x))
        b, c = x.shape[:2]
        dots, squares, values = 0, 0, []
        for place, tile, inner in tiles(x, 3 * c):
            qk, v = self.qkv(norm(tile))[inner].permute(0, 2, 3, 1).split((2 * c, c), -1)  # (B, h, w, 2C), (B, h, w, C)
            qk = qk.reshape(b, -1, 2, self.heads, c // self.heads)
            q, k = qk.transpose(1, 3).unbind(2)  # (B, heads, h*w, C/heads)
            dots = dots + q.mT @ k  # (B, heads, C/heads, C/heads)
            squares = squares + qk.square().sum(1)  # (B, 2, heads, C/heads)
            values.append((place, v if tile.shape == x.shape else v.clone()))  # a clone lets go of q and k
        q, k = squares.sqrt().clamp(min=1e-12).unbind(1)  # the lengths
        attention = (dots / (q[..., :, None] * k[..., None, :]) * self.temperature).softmax(-1)
        weight = self.out.weight.view(c, self.heads, c // self.heads).transpose(0, 1)  # (heads, C, C/heads)
        mix = (weight @ attention).transpose(1, 2).reshape(b, c, c)

        def mixed():
            while values:
                place, v = values.pop()
                yield place, (v.flatten(1, 2) @ mix.mT).view(v.shape).permute(0, 3, 1, 2)  # (B, C, h, w)

        return add(x, mixed())


class FeedForward(nn.Module):
    """Restormer's GDFN: one half of the channels gates the other. `dual` gates both ways (in Proxy Fusion)."""

    def __init__(self, dim, expansion, dual=False):
        super().__init__()
        hidden = int(dim * expansion)
        self.dual, self.wide = dual, 2 * hidden
        self.inner, self.out = project(dim, 2 * hidden), conv1(hidden, dim)

    def forward(self, x, norm):  # (B, C, H, W) -> x + feed-forward(norm(x))
        a, b = self.inner(norm(x)).chunk(2, dim=1)  # (B, hidden, H, W) each, much wider than x
        return x + self.out(F.gelu(a) * b + F.gelu(b) * a if self.dual else F.gelu(a) * b)


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, dim, heads, expansion):
        super().__init__()
        self.norm1, self.attention = ChannelNorm(dim), ChannelAttention(dim, heads)
        self.norm2, self.ffn = ChannelNorm(dim), FeedForward(dim, expansion)

    def forward(self, x):
        x = self.attention(x, self.norm1)
        return local(lambda tile: self.ffn(tile, self.norm2), x, self.ffn.wide, own=True)


class Prompt(nn.Module):
    """PromptIR's prompt: a learned blend of five learned feature maps, concatenated to the feature and mixed in."""

    def __init__(self, dim, out, channels, size, expansion):
        super().__init__()
        self.maps = nn.Parameter(torch.rand(1, 5, channels, size, size))
        self.choose, self.conv = nn.Linear(dim, 5), conv3(channels, channels)
        self.block, self.reduce = Block(dim + channels, 4, expansion), conv1(dim + channels, out)

    def forward(self, x):  # (B, C, H, W)
        weights = self.choose(x.mean((-2, -1))).softmax(-1)  # (B, 5): which prompts suit this image
        prompt = (weights[:, :, None, None, None] * self.maps).sum(1)  # (B, channels, size, size)
        prompt = self.conv(F.interpolate(prompt, x.shape[-2:], mode="bilinear"))
        return self.reduce(self.block(torch.cat([x, prompt], 1)))


# ------------------------------------------------------------------- Privileged Dictionary and Proxy Fusion


class CrossAttention(nn.Module):
    """Attention from every pixel of `query` to every pixel of `context`: one class serves read and write.

    Logits are q.k * temperature with unit q and k: in [-1, 1] at the start, so attention begins as an average.
    The residual starts from the *normalised* query, as released; `identity` starts it from the query itself and all
    that is added at zero, so that a new write changes nothing. `source` is the width of `context`, if another.
    """

    def __init__(self, dim, heads, source=None, identity=False):
        super().__init__()
        source, self.identity = source or dim, identity
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.norm_query, self.norm_context = ChannelNorm(dim), ChannelNorm(source)
        self.q, self.kv, self.out = project(dim, dim), project(source, 2 * dim), conv1(dim, dim)
        self.norm_ffn, self.ffn = ChannelNorm(dim), FeedForward(dim, 2, dual=True)
        if identity:
            nn.init.zeros_(self.out.weight), nn.init.zeros_(self.ffn.out.weight)

    def tokens(self, x):  # (B or 1, C, H, W) -> (B or 1, heads, H*W, C/heads), last side by side
        return x.permute(0, 2, 3, 1).contiguous().view(len(x), -1, self.heads, x.shape[1] // self.heads).transpose(1, 2)

    def queries(self, query):
        """Unit vectors times temperature, (B, heads, H*W, C/heads), from the normalised query (B, C, H, W)."""
        return F.normalize(self.tokens(self.q(query)), dim=-1) * self.temperature

    def keys(self, context):
        """Unit keys, and values, (B, heads, h*w, C/heads) each, from the context (B, source, h, w)."""
        kv = local(lambda tile: self.kv(self.norm_context(tile)), context, 2 * context.shape[1] + self.ffn.wide)
        k, v = map(self.tokens, kv.chunk(2, dim=1))
        return F.normalize(k, dim=-1), v

    def forward(self, query, context):  # (B, C, H, W) and (B, source, h, w) -> (B, C, H, W)
        k, v = self.keys(context)
        batch = max(len(query), len(context))  # the dictionary has no batch: it is the same for every image
        query, k, v = (t.expand(batch, -1, -1, -1) for t in (query, k, v))

        def answer(tile):  # each pixel asks for itself, but for two 3x3 convolutions, one behind the other
            normed = self.norm_query(tile)
            # softmax(q k^T) v without the (H*W) x (h*w) matrix ever existing; no 1/sqrt(C), so scale=1
            z = F.scaled_dot_product_attention(self.queries(normed), k, v, scale=1.0).transpose(1, 2)
            z = self.out(z.reshape(batch, *tile.shape[2:], -1).permute(0, 3, 1, 2))
            z = (tile if self.identity else normed) + z
            return self.ffn(z, self.norm_ffn)

        return local(answer, query, self.ffn.wide, halo=2)


class ProxyFusion(nn.Module):
    """The Privileged Dictionary of one scale, and the two attentions that use it (SIPL, Proxy Fusion)."""

    def __init__(self, dim, size, std, read_heads, write_heads, source=None, identity=False):
        super().__init__()
        self.dictionary = nn.Parameter(std * torch.randn(1, dim, size, size))  # D_l
        self.read = CrossAttention(dim, read_heads, source)  # source: channels of P_l, where not those of h_l
        self.write = CrossAttention(dim, write_heads, identity=identity)

    def proxy(self, privileged=None):
        """The dictionary dressed with what this image needs: Read(D, P); without a privileged feature, D itself."""
        return self.dictionary if privileged is None else self.read(self.dictionary, privileged)


# ------------------------------------------------------------------------------------------------ the network


def level(dim, heads, count, expansion):
    return nn.Sequential(*(Block(dim, heads, expansion) for _ in range(count)))


class Encoder(nn.Module):
    """Restormer's encoder: each level halves the resolution and doubles the channels."""

    pad = staticmethod(pad)

    def __init__(self, s):
        super().__init__()
        widths = [s.dim * 2**i for i in range(4)]
        self.embed = conv3(3, s.dim)
        self.levels = nn.ModuleList(level(*args, s.expansion) for args in zip(widths, s.heads, s.blocks))
        self.down = nn.ModuleList(nn.Sequential(conv3(d, d // 2), nn.PixelUnshuffle(2)) for d in widths[:3])

    def forward(self, x):
        """(B, 3, H, W) -> features at full, 1/2, 1/4, 1/8 resolution, (B, d, H, W) to (B, 8d, H/8, W/8)."""
        x = x.contiguous(memory_format=torch.channels_last)  # what norms, 1x1 convolutions and attention like best
        features = [self.levels[0](self.embed(x))]
        for down, blocks in zip(self.down, self.levels[1:]):
            features.append(blocks(down(features[-1])))
        return features


class Decoder(nn.Module):
    """Restormer's decoder, with PromptIR's prompts if the settings say so. Index 0, 1, 2 is the scale 1/2, 1/4, 1/8."""

    def __init__(self, s):
        super().__init__()
        d2, d3, d4 = widths = [s.dim * 2**i for i in (1, 2, 3)]
        reduced = (d2, d3, d3 if s.backbone == "promptir" else d4)  # after the prompt, whose 1x1 halves the latent
        self.prompts = None
        if s.backbone == "promptir":
            args = zip(widths, reduced, s.prompt_channels, s.prompt_size)
            self.prompts = nn.ModuleList(Prompt(*a, s.expansion) for a in args)
        self.up = nn.ModuleList(nn.Sequential(conv3(d, 2 * d), nn.PixelShuffle(2)) for d in reduced)
        self.merge = nn.ModuleList([nn.Identity(), conv1(2 * d2, d2), conv1(reduced[2] // 2 + d3, d3)])
        args = zip((d2, d2, d3), s.heads, s.blocks)
        self.levels = nn.ModuleList(level(*a, s.expansion) for a in args)
        self.refinement, self.output = level(d2, s.heads[0], s.refinement, s.expansion), conv3(d2, 3)

    def adapt(self, i, h, x):  # PromptIR adapts each level to the degradation; Restormer does not
        return h if self.prompts is None else self.prompts[i](h)

    def forward(self, x, features, fuse):
        """Image, its four features, and `fuse(i, h)`, which is Proxy Fusion at scale i -> image, not clamped."""
        *skips, h = features
        for i in (2, 1, 0):
            h = self.adapt(i, fuse(i, h), x)
            h = torch.cat([self.up[i](h), skips[i]], 1)  # twice the size, half the channels, and the skip
            h = self.merge[i](h)
            for block in (*self.levels[i], *(self.refinement if i == 0 else ())):  # one by one: each frees its input
                h = block(h)
        return self.output(h) + x  # the network predicts the damage


class SIPL(nn.Module):
    """An all-in-one restoration network with a Privileged Dictionary, and the loop that lets it refine itself.

    Args:
        preset: "nano" (a laptop), "small", or "paper" (SIPL + PromptIR as published, 40.03 M parameters).
        overrides: any field of `Settings`, e.g. `fusion=False` for the plain backbone, `backbone="nafnet"`.
    Raises InputError for an unknown preset or setting, or a value that cannot work.
    """

    def __init__(self, preset: str = "nano", **overrides: object) -> None:
        super().__init__()
        from .backbones import BACKBONES  # not above: that file is made of the blocks of this one

        self.settings = s = choose(preset, **overrides)
        encoder, decoder = BACKBONES[s.backbone]
        self.encoder = encoder(s)
        if s.fusion:
            widths = [s.dim * 2**i for i in (1, 2, 3)]
            args = zip(widths, s.dictionary_size, [s.dictionary_std] * 3, s.read_heads, s.write_heads)
            self.fusion = nn.ModuleList(ProxyFusion(*a, identity=s.identity_start) for a in args)
            if s.aligned:
                self.aligned = nn.ModuleList(conv1(d, d) for d in widths)
                [nn.init.zeros_(c.weight) for c in self.aligned]  # at first, nothing is added
        self.decoder = decoder(s)

    # ---- what the method asks of a backbone, on padded images; `wrap.py` answers it for any other network

    def pad(self, x, multiple=8):
        return self.encoder.pad(x, multiple)

    def encode(self, x):
        """All that the decoder needs of x, computed once."""
        return self.encoder(x)

    def tap(self, image):
        """E(image): the privileged features, at 1/2, 1/4 and 1/8 resolution."""
        return self.encoder(image)[1:4]

    def decode(self, x, features, proxies=None):
        """x, its features and the proxies -> restored image (B, 3, H, W), not clamped."""

        def fuse(i, h):  # Proxy Fusion at scale i, which a plain backbone has not
            return h if proxies is None else self.fusion[i].write(h, proxies[i])

        return self.decoder(x, features, fuse)

    def proxies(self, privileged=None):
        """Three proxies D^_l, one per scale; None for a plain backbone."""
        if not self.settings.fusion:
            return None
        return [f.proxy(p) for f, p in zip(self.fusion, privileged or [None] * len(self.fusion))]

    def guided(self, x, features, privileged=None):
        """f(x; Read(D, P)), or f(x; D) without P, on a padded image and its features."""
        if privileged is not None and getattr(self.settings, "aligned", False):  # both show the same pixel: add them
            added = [f + a(p) for f, a, p in zip(features[1:4], self.aligned, privileged)]
            features = [features[0], *added, *features[4:]]
        return self.decode(x, features, self.proxies(privileged))

    def estimates(self, x, steps=1, feedback="privilege"):
        """The loop, on a padded image: yields y0, ..., y_T, one by one. Gradients pass through all of it."""
        features = self.encode(x)  # E(x), once
        yield (y := self.guided(x, features))
        for t in range(steps):
            if feedback == "chain" and t > 0:
                x, features = y, self.encode(y)
                y = self.guided(x, features)
            yield (y := self.guided(x, features, self.tap(y)))  # P = E(estimate)

    # ---- what people call

    def forward(self, x: torch.Tensor, privileged: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Restore once: y0 = f(x; D), or with `privileged` the guided pass f(x; Read(D, P)).

        Args:
            x: (B, 3, H, W), floating point, values in [0, 1]; any H and W (reflect-padded to multiples of 8 inside).
            privileged: None, or three features as `model.privileged(image)` returns them.
        Returns (B, 3, H, W), not clamped. Raises InputError for another shape or dtype.
        """
        check_batch(x, self)
        if privileged is not None:
            check_fusion(self, "a guided pass")
            check_privileged(privileged, x, [f.read.norm_context.weight.shape[0] for f in self.fusion])
        h, w = x.shape[-2:]
        x = self.pad(x)
        return self.guided(x, self.encode(x), privileged)[..., :h, :w]

    def privileged(self, image: torch.Tensor) -> list[torch.Tensor]:
        """E(image): encoder features at 1/2, 1/4, 1/8, a list of (B, 2d, H/2, W/2), (B, 4d, ...), (B, 8d, ...)."""
        check_batch(image, self, "image")
        return self.tap(self.pad(image))

    @torch.no_grad()
    def refine(self, x: torch.Tensor, steps: int = 1, feedback: str = "privilege", return_all: bool = False,
               stop: str | None = None, tolerance: float = 0.5 / 255) -> Any:  # fmt: skip
        """The test-time loop: the model's own estimate plays the clean image (SIPL, self-refinement).

        y0 = f(x; D), then `steps` times
          feedback="privilege" (the paper's equations): P = E(y_{t-1}); y_t = f(x; Read(D, P))
          feedback="chain" (the released code): the refined image becomes the next input, and each round starts anew
            with its own first pass: a = f(y_{t-1}; D); y_t = f(y_{t-1}; Read(D, E(a))), where round one starts at x.
        E(x) is shared: T steps cost 1 + T encoders and decoders (chain: 2T of each). Pads once before, crops once
        after: to multiples of 8, and for "chain" of 16 as the released loop does. With stop="converged" it ends earlier
        once a step changes every image by less than `tolerance` (root mean square).

        Returns y_T (B, 3, H, W), not clamped, or with `return_all` the list [y0, ..., y_T].
        Raises InputError for values far outside [0, 1], NaN, steps < 0, or a model without Proxy Fusion.
        """
        check_batch(x, self)
        check_range(x)
        check_loop(self, steps, feedback, stop, tolerance)
        (h, w), found = x.shape[-2:], []
        for y in self.estimates(self.pad(x, 16 if feedback == "chain" else 8), steps, feedback):
            before, y = found[-1:], y[..., :h, :w]
            found = [*found, y] if return_all else [y]
            if stop and before and (y - before[0]).square().mean((1, 2, 3)).sqrt().max() < tolerance:
                break
        return found if return_all else found[-1]

    def restore(self, image: Any, steps: int | None = None, feedback: str = "privilege", tile: int | None = None,
                overlap: int = 64, progress: bool = False) -> Any:  # fmt: skip
        """A photo in, the same kind of photo out: any size; dtype, channels and alpha are kept.

        Args:
            image: array or tensor H x W, or H x W x C with C = 1 (gray), 2 (gray + alpha), 3 (RGB), 4 (RGB + alpha);
                uint8, uint16, or floating point in [0, 1]. Or a list of photos of one H x W, restored as one batch.
            steps: refinement steps T (default 1; 0 for a plain backbone, which cannot refine).
            tile: pixels a side of the windows in which a large photo is restored; 0 never cuts; default: as large as
                half of the free memory allows, 4 GB of it at most on a CPU. Attention, prompts and dictionary see a
                window, not the photo, so smaller ones change the result. overlap: pixels, blended. progress: a bar.
        Returns an array of the same shape and dtype, or their list. Raises InputError for anything else, or NaN.
        """
        return restore(self, image, steps, feedback, tile, overlap, progress)

    def save(self, path: Name) -> None:
        """Write weights and settings to one safetensors file (to a temporary name first, then renamed)."""
        weights.save(self, path)

    @classmethod
    def load(cls, path: Name, device: Any = None, net: nn.Module | None = None) -> "SIPL":
        """Read what `save` wrote (around a wrapped network: into that `net`). Raises InputError; runs no code."""
        model = weights.load(path, net).eval()
        return model if device is None else model.to(device)

    @classmethod
    def from_pretrained(cls, name: str = "nano", device: Any = None) -> "SIPL":
        """The trained weights that come with the project (data/README.md: how they were made, what they can do)."""
        return cls.load(weights.included(name), device)
