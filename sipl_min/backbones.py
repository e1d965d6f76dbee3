"""The other backbones, each as a pair (encoder, decoder): Restormer, AdaIR (ICLR 2025) and NAFNet (ECCV 2022).

PromptIR, and with it Restormer, is in `sipl.py`. What SIPL asks of a pair: `encoder(x)` returns features, of which the
second to the fourth are privileged (1/2, 1/4, 1/8 resolution); `decoder(x, features, fuse)` calls `h = fuse(i, h)` once
at each of these scales (i = 0, 1, 2) and returns the image.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .sipl import ChannelNorm, Decoder, Encoder, conv1, conv3, project

# ---------------------------------------------------------------------------------- AdaIR (Cui et al., ICLR 2025)


class ChannelCross(nn.Module):
    """Restormer's channel attention with queries from one feature, keys and values from another."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.q, self.kv, self.out = project(dim, dim), project(dim, 2 * dim), conv1(dim, dim)

    def forward(self, query, context):  # both (B, C, H, W)
        b, c, h, w = query.shape
        k, v = self.kv(context).chunk(2, dim=1)
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in (self.q(query), k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.out((attention @ v).reshape(b, c, h, w))


class Frequency(nn.Module):
    """AdaIR's frequency module: splits the input image into low and high frequencies, and lets the feature ask both."""

    def __init__(self, dim, heads):
        super().__init__()
        self.embed = conv3(3, dim)
        self.rate = nn.Sequential(conv1(dim, dim // 8), nn.GELU(), conv1(dim // 8, 2))
        self.high, self.low, self.merge = (ChannelCross(dim, heads) for _ in range(3))
        self.where = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.which = nn.Sequential(conv1(dim, dim // 16), nn.ReLU(), conv1(dim // 16, dim))
        self.mix = nn.Conv2d(dim, dim, 1)
        self.weight_new, self.weight_old = nn.Parameter(torch.zeros(dim, 1, 1)), nn.Parameter(torch.ones(dim, 1, 1))

    def box(self, u):
        """The low frequencies of each image: a centred box, True inside, (B, 1, H, W); its size is learned in AdaIR's
        words, but cut to whole numbers, so `rate` gets no gradient. Empty below 128 pixels a side."""
        h, w = u.shape[-2:]
        rate = self.rate(u.mean((-2, -1), keepdim=True)).sigmoid()  # (B, 2, 1, 1)
        rows, columns = torch.arange(h, device=u.device) - h // 2, torch.arange(w, device=u.device) - w // 2
        a, b = ((size // 128 * r).int() for size, r in zip((h, w), rate.split(1, dim=1)))
        return ((rows >= -a) & (rows < a)).transpose(-2, -1) & (columns >= -b) & (columns < b)

    def split(self, image, size):
        """Input image -> low and high frequencies (B, C, *size) of its embedding."""
        u = self.embed(F.interpolate(image, size, mode="bilinear"))
        box, kind, shift = self.box(u), u.dtype, (size[0] // 2, size[1] // 2)
        u = torch.fft.fft2(u.to(torch.promote_types(kind, torch.float32)), norm="forward").roll(shift, (-2, -1))
        parts = (torch.where(box, u, 0), torch.where(box, 0, u))
        back = (-shift[0], -shift[1])
        return [torch.fft.ifft2(p.roll(back, (-2, -1)), norm="forward").abs().to(kind) for p in parts]

    def forward(self, y, image):  # feature (B, C, h, w), input image (B, 3, H, W)
        low, high = self.split(image, y.shape[-2:])
        high, low = self.high(high, y), self.low(low, y)
        where = self.where(torch.cat([high.amax(1, keepdim=True), high.mean(1, keepdim=True)], 1)).sigmoid()
        pooled = low.mean((-2, -1), keepdim=True), low.amax((-2, -1), keepdim=True)
        which = (self.which(pooled[0]) + self.which(pooled[1])).sigmoid()
        return self.merge(y, self.mix(low * where + high * which)) * self.weight_new + y * self.weight_old


class AdaIRDecoder(Decoder):
    """Restormer's decoder with a frequency module behind each Proxy Fusion."""

    def __init__(self, s):
        super().__init__(s)
        self.frequency = nn.ModuleList(Frequency(s.dim * 2**i, s.heads[2]) for i in (1, 2, 3))

    def adapt(self, i, h, x):
        return self.frequency[i](h, x)


# ---------------------------------------------------------------------------------- NAFNet (Chen et al., ECCV 2022)


class NAFBlock(nn.Module):
    """No attention, no activation: gates, which multiply one half of the channels with the other."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(dim, eps=1e-6), ChannelNorm(dim, eps=1e-6)
        self.inner = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)
        )
        self.channels, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.ffn_inner, self.ffn_out = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x):
        a, b = self.inner(self.norm1(x)).chunk(2, dim=1)
        gated = a * b
        x = x + self.beta * self.out(gated * self.channels(gated.mean((-2, -1), keepdim=True)))
        a, b = self.ffn_inner(self.norm2(x)).chunk(2, dim=1)
        return x + self.gamma * self.ffn_out(a * b)


def naf_level(dim, count):
    return nn.Sequential(*(NAFBlock(dim) for _ in range(count)))


class NAFEncoder(nn.Module):
    """Features at full, 1/2, 1/4 and 1/8 resolution."""

    @staticmethod
    def pad(x, multiple):
        """NAFNet's own padding: zeros at right and bottom, to multiples of 16."""
        return F.pad(x, (0, -x.shape[-1] % 16, 0, -x.shape[-2] % 16))

    def __init__(self, s):
        super().__init__()
        widths = [s.dim * 2**i for i in range(4)]
        self.embed = nn.Conv2d(3, s.dim, 3, padding=1)
        self.levels = nn.ModuleList(naf_level(d, n) for d, n in zip(widths, s.blocks))
        self.down = nn.ModuleList(nn.Conv2d(d, 2 * d, 2, stride=2) for d in widths[:3])

    forward = Encoder.forward


class NAFDecoder(nn.Module):
    """The middle at 1/16 resolution, then up again; skips are added, not concatenated."""

    def __init__(self, s):
        super().__init__()
        widths = [s.dim * 2**i for i in (3, 2, 1, 0)]
        self.down, self.middle = nn.Conv2d(widths[0], 2 * widths[0], 2, stride=2), naf_level(2 * widths[0], s.middle)
        self.up = nn.ModuleList(nn.Sequential(conv1(2 * d, 4 * d), nn.PixelShuffle(2)) for d in widths)
        self.levels = nn.ModuleList(naf_level(d, n) for d, n in zip(widths, s.decoder_blocks))
        self.output = nn.Conv2d(s.dim, 3, 3, padding=1)

    def forward(self, x, features, fuse):
        h = self.middle(self.down(features[3]))
        for i in (3, 2, 1, 0):
            h = self.levels[3 - i](self.up[3 - i](h) + features[i])
            h = fuse(i - 1, h) if i else h
        return self.output(h) + x


BACKBONES = {"promptir": (Encoder, Decoder), "restormer": (Encoder, Decoder), "adair": (Encoder, AdaIRDecoder),
             "nafnet": (NAFEncoder, NAFDecoder)}  # fmt: skip
