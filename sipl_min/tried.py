"""What was tried besides the recipes and did not pay: models and training steps that `study` compares by name."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from .sipl import SIPL


class Correcting(SIPL):
    """The guided pass corrects the estimate before it, y_t = y_{t-1} + its damage, instead of x."""

    def estimates(self, x, steps=1, feedback="privilege"):
        features = self.encode(x)
        yield (y := self.guided(x, features))
        for _ in range(steps):
            yield (y := self.guided(x, features, self.tap(y)) - x + y)


class Recurrent(SIPL):
    """For a bound: no dictionary; the encoder itself sees x and y_{t-1}, all there is, in every pixel."""

    def __init__(self, preset="nano", **overrides):
        super().__init__(preset, **overrides)
        del self.fusion
        d = self.settings.dim
        self.embed = nn.Conv2d(3, d, 3, padding=1, bias=False)
        nn.init.zeros_(self.embed.weight)

    def proxies(self, privileged=None):
        return None

    def estimates(self, x, steps=1, feedback="privilege"):
        yield (y := self.decode(x, self.encode(x)))
        for _ in range(steps):
            seen = self.embed(y - x)
            hook = self.encoder.embed.register_forward_hook(lambda module, inputs, out, seen=seen: out + seen)
            features = self.encode(x)
            hook.remove()
            yield (y := self.decode(x, features))


class Sharp(SIPL):
    """Attention that chooses: temperatures start at 10 instead of 1, dictionaries as N(0, 1)."""

    def __init__(self, preset="nano", **overrides):
        super().__init__(preset, dictionary_std=1.0, **overrides)
        for cross in (part for f in self.fusion for part in (f.read, f.write)):
            nn.init.constant_(cross.temperature, 10.0)


class Placed(Sharp):
    """`Sharp`, and positions in all tokens, so that an entry can stand for a part of the image."""

    def proxies(self, privileged=None):
        dictionaries = [placed(f.dictionary) for f in self.fusion]
        if privileged is None:
            return dictionaries
        return [f.read(d, placed(p)) for f, d, p in zip(self.fusion, dictionaries, privileged)]

    def decode(self, x, features, proxies=None):
        return self.decoder(x, features, lambda i, h: h + self.fusion[i].write(placed(h), proxies[i]) - placed(h))


def placed(feature):
    """A feature (B, C, H, W) plus its pixels' positions: waves of 1/2, 1, 2, 4 periods across the image, both ways."""
    h, w = feature.shape[2:]
    periods = torch.pi * 2 ** torch.arange(4, device=feature.device)[:, None]
    down, right = (periods * (torch.arange(n, device=feature.device) + 0.5) / n for n in (h, w))  # (4, H), (4, W)
    down, right = (torch.cat([phase.sin(), phase.cos()]) for phase in (down, right))
    waves = torch.cat([down[:, :, None].expand(8, h, w), right[:, None].expand(8, h, w)])  # (16, H, W)
    return feature + F.pad(waves, (0, 0, 0, 0, 0, feature.shape[1] - 16))


def late(model, x, y):
    """`unroll` with a tenth of the gradient on y0, so that the second pass has more left to do."""
    first, second = model.estimates(x, steps=1)
    return [first.detach() + 0.1 * (first - first.detach()), second]


def half(model, x, y):
    """P from the clean image for half of the batch and from y0 for the other half; a loss on both passes."""
    features = model.encode(x)
    first = model.guided(x, features)
    clean = (torch.arange(len(x), device=x.device) % 2 == 0)[:, None, None, None]
    return [first, model.guided(x, features, model.tap(torch.where(clean, y, first)))]


def thirds(model, x, y):
    """P from the clean image, from its restoration (as `authors`) and from y0, for a third of the batch each."""
    features = model.encode(x)
    first = model.guided(x, features)
    with torch.no_grad():
        restored = model(y)
    sources = torch.stack([first, y, restored])
    return [first, model.guided(x, features, model.tap(sources[torch.arange(len(x)) % 3, torch.arange(len(x))]))]
