"""Two more backbones, which enter themselves into `sipl.BACKBONES`: AdaIR (ICLR 2025) and NAFNet (ECCV 2022).

A backbone is a pair (encoder, decoder). `encoder(x)` returns features, of which the second to the fourth are privileged
(1/2, 1/4, 1/8 resolution); its `multiple` and `padding` say how images are padded. `decoder(x, features, fuse)` calls
h = fuse(i, h) once at each of these scales (i = 0, 1, 2) and returns the image."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .sipl import BACKBONES, Decoder, Encoder, LayerNorm2d, conv1x1, conv3x3, pointwise_depthwise, unit


# ---------------------------------------------------------------------------------- AdaIR (Cui et al., ICLR 2025)
class ChannelCrossAttention(nn.Module):
    """Restormer's channel attention with queries from one feature, keys and values from another."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.q, self.kv, self.out = pointwise_depthwise(dim, dim), pointwise_depthwise(dim, 2 * dim), conv1x1(dim, dim)

    def forward(self, query, context):  # both (B, C, H, W)
        B, C, H, W = query.shape
        k, v = self.kv(context).chunk(2, dim=1)
        q, k, v = (t.reshape(B, self.heads, C // self.heads, H * W) for t in (self.q(query), k, v))
        attention = (unit(q) @ unit(k).mT * self.temperature).softmax(-1)
        return self.out((attention @ v).reshape(B, C, H, W))


class Frequency(nn.Module):
    """AdaIR's frequency module: splits the input image into low and high frequencies, and lets the feature ask both."""

    def __init__(self, dim, heads):
        super().__init__()
        self.embed = conv3x3(3, dim)
        self.rate = nn.Sequential(conv1x1(dim, dim // 8), nn.GELU(), conv1x1(dim // 8, 2))
        self.high, self.low, self.merge = (ChannelCrossAttention(dim, heads) for _ in range(3))
        self.spatial_gate = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.channel_gate = nn.Sequential(conv1x1(dim, dim // 16), nn.ReLU(), conv1x1(dim // 16, dim))
        self.mix = nn.Conv2d(dim, dim, 1)
        self.weight_new, self.weight_old = nn.Parameter(torch.zeros(dim, 1, 1)), nn.Parameter(torch.ones(dim, 1, 1))

    def box(self, u):
        """Low frequencies of each image, in the order of `fft2`: True inside of a box around zero, (B, 1, H, W).
        It is empty below 256 pixels a side."""
        rate = self.rate(u.mean((-2, -1), keepdim=True)).sigmoid()  # (B, 2, 1, 1)
        rows, columns = (torch.fft.ifftshift(torch.arange(n, device=u.device) - n // 2) for n in u.shape[-2:])
        # AdaIR calls the size of the box learned, but it is cut to whole numbers, so `rate` gets no gradient
        a, b = ((size // 128 * r).int() for size, r in zip(u.shape[-2:], rate.split(1, dim=1)))
        return ((rows >= -a) & (rows < a)).mT & (columns >= -b) & (columns < b)

    def split(self, image, size):
        """Input image -> low and high frequencies (B, C, *size) of its embedding."""
        u = self.embed(F.interpolate(image, size, mode="bilinear"))
        box, kind = self.box(u), u.dtype
        u = torch.fft.fft2(u.to(torch.promote_types(kind, torch.float32)), norm="forward")
        return [torch.fft.ifft2(p, norm="forward").abs().to(kind) for p in (u * box, u * ~box)]

    def forward(self, y, image):  # feature (B, C, h, w), input image (B, 3, H, W)
        low, high = self.split(image, y.shape[-2:])
        high, low = self.high(high, y), self.low(low, y)
        spatial = self.spatial_gate(torch.cat([high.amax(1, keepdim=True), high.mean(1, keepdim=True)], 1)).sigmoid()
        mean, largest = low.mean((-2, -1), keepdim=True), low.amax((-2, -1), keepdim=True)
        channel = (self.channel_gate(mean) + self.channel_gate(largest)).sigmoid()
        mixed = self.mix(low * spatial + high * channel)
        return self.merge(y, mixed) * self.weight_new + y * self.weight_old


class AdaIRDecoder(Decoder):
    """Restormer's decoder with a frequency module behind each Proxy Fusion."""

    def __init__(self, s):
        super().__init__(s)
        self.frequency = nn.ModuleList(Frequency(d, s.heads[2]) for d in s.dims[1:])

    def adapt(self, i, h, x):
        return self.frequency[i](h, x)


# ---------------------------------------------------------------------------------- NAFNet (Chen et al., ECCV 2022)
class NAFBlock(nn.Module):
    """No attention, no activation: gates, which multiply one half of the channels with the other."""

    window = None

    def __init__(self, dim):
        super().__init__()
        wide = 2 * dim
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-6), LayerNorm2d(dim, eps=1e-6)
        self.inner = nn.Sequential(nn.Conv2d(dim, wide, 1), nn.Conv2d(wide, wide, 3, padding=1, groups=wide))
        self.channels, self.out = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.ffn_inner, self.ffn_out = nn.Conv2d(dim, wide, 1), nn.Conv2d(dim, dim, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x):
        a, b = self.inner(self.norm1(x)).chunk(2, dim=1)
        gated = a * b
        x = x + self.beta * self.out(gated * self.channels(self.pool(gated)))
        a, b = self.ffn_inner(self.norm2(x)).chunk(2, dim=1)
        return x + self.gamma * self.ffn_out(a * b)

    def pool(self, x):  # (B, C, H, W) -> the mean over the image, or over a window around each pixel inside of it
        if self.window is None:
            return x.mean((-2, -1), keepdim=True)
        y = x.to(torch.promote_types(x.dtype, torch.float32))  # float16 sums overflow
        for _ in range(2):  # along the rows, then, transposed, along the columns
            n = min(self.window, y.shape[-1])
            total, left = F.pad(y, (1, 0)).cumsum(-1), (n - 1) // 2
            means = (total[..., n:] - total[..., :-n]) / n
            y = F.pad(means, (left, n - 1 - left, 0, 0), "replicate").mT
        return y.to(x.dtype)


def naf_level(dim, count):
    return nn.Sequential(*(NAFBlock(dim) for _ in range(count)))


class NAFEncoder(nn.Module):
    """Features at full, 1/2, 1/4 and 1/8 resolution."""

    multiple, padding = 16, "constant"  # zeros; the decoder halves the resolution a fourth time

    def __init__(self, s):
        super().__init__()
        self.embed = nn.Conv2d(3, s.dim, 3, padding=1)
        self.levels = nn.ModuleList(naf_level(d, n) for d, n in zip(s.dims, s.blocks))
        self.down = nn.ModuleList(nn.Conv2d(d, 2 * d, 2, stride=2) for d in s.dims[:3])

    forward = Encoder.forward


class NAFDecoder(nn.Module):
    """The middle at 1/16 resolution, then up again; skips are added, not concatenated."""

    def __init__(self, s):
        super().__init__()
        dims = s.dims[::-1]
        self.down, self.middle = nn.Conv2d(dims[0], 2 * dims[0], 2, stride=2), naf_level(2 * dims[0], s.middle)
        self.up = nn.ModuleList(nn.Sequential(conv1x1(2 * d, 4 * d), nn.PixelShuffle(2)) for d in dims)
        self.levels = nn.ModuleList(naf_level(d, n) for d, n in zip(dims, s.decoder_blocks))
        self.output = nn.Conv2d(s.dim, 3, 3, padding=1)

    def forward(self, x, features, fuse):
        h = self.middle(self.down(features[3]))
        for i in (3, 2, 1, 0):
            h = self.levels[3 - i](self.up[3 - i](h) + features[i])
            h = fuse(i - 1, h) if i else h
        return self.output(h) + x


def nafnet_local(model, training_size=256):
    """Make NAFNetLocal of a NAFNet, in place, and return it: the same weights, as used for NAFNet's published figures
    on GoPro and REDS (TLC, Chu et al., ECCV 2022). Means are over windows of 1.5 times the training size.
    Files do not keep this: a loaded NAFNet is the plain one."""
    levels = [*model.encoder.levels, model.decoder.middle, *model.decoder.levels]
    for blocks, scale in zip(levels, (1, 2, 4, 8, 16, 8, 4, 2, 1)):
        for block in blocks:
            block.window = int(1.5 * training_size) // scale
    return model


class BiasFreeNorm(LayerNorm2d):
    """In 9 of Restormer's 13 released files: x / sqrt(variance + eps) * weight. The mean stays in x."""

    def forward(self, x):  # (B, C, H, W)
        variance = x.to(torch.promote_types(x.dtype, torch.float32)).var(1, correction=0, keepdim=True)
        return (x * (variance + self.eps).rsqrt()).to(x.dtype) * self.weight[:, None, None]


BACKBONES.update(adair=(Encoder, AdaIRDecoder), nafnet=(NAFEncoder, NAFDecoder))
