"""SIPL in a network that somebody else wrote: its modules are found by name, and reached by hooks."""

import copy
import math
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from .files import InputError
from .sipl import SIPL, ProxyFusion, known


@dataclass(frozen=True)
class Taps:
    """The settings of a wrapped network. A tuple has one item per scale."""

    encoder: tuple  # names of modules
    decoder: tuple
    encoder_channels: tuple
    decoder_channels: tuple
    dictionary_size: tuple
    read_heads: tuple
    write_heads: tuple
    dictionary_std: float = 0.02
    identity_start: bool = False
    multiple: int = 8  # images are padded to multiples of this
    fusion: bool = True


class Wrapped(SIPL):
    """A `SIPL` whose backbone is `net`; made by `SIPL.wrap`. Between calls, `net` carries no hook."""

    def __init__(self, net, taps):
        nn.Module.__init__(self)
        self.settings, self.net = taps, net
        self.fusion = nn.ModuleList()
        each = (taps.decoder_channels, taps.dictionary_size, taps.read_heads, taps.write_heads, taps.encoder_channels)
        for dim, size, read, write, context in zip(*each, strict=True):
            if dim % read or dim % write:
                raise InputError(f"read_heads, write_heads: {dim} channels need heads that divide them")
            self.fusion.append(ProxyFusion(dim, size, taps.dictionary_std, read, write, taps.identity_start, context))
        self.fusion.to(next(net.parameters(), torch.empty(0)).dtype)

    def pad(self, x, multiple=1):
        return super().pad(x, math.lcm(multiple, self.settings.multiple))

    def encoder(self, x):
        return None  # the network is one piece: the decoder runs all of it

    encoder.multiple, encoder.padding = 1, "reflect"

    def privileged(self, image):
        found = {}

        def keep(name, output):
            found[name] = output.clone()  # an in-place activation behind the module must not change it
            if len(found) == len(self.settings.encoder):
                raise Reached

        run(self.net, self.pad(image), self.settings.encoder, keep)
        return [found[name] for name in self.settings.encoder]

    def decoder(self, x, features, fuse):
        gradients = torch.is_grad_enabled()

        def write(name, h):
            if gradients and not torch.is_grad_enabled():  # it would run again in backward, without Proxy Fusion
                raise InputError(f"module {name!r} runs under activation checkpointing: turn that off, or name another")
            return fuse(self.settings.decoder.index(name), h)

        return run(self.net, x, self.settings.decoder, write)


class Reached(BaseException):
    """All privileged features are there: the rest of the network need not run. No `except Exception` catches it."""


LOCK = threading.RLock()  # threads may share a network, and hooks with it: wrapped passes take turns


def run(net, x, names, see):
    """net(x), where see(name, output) sees the output of each named module, and replaces it if it returns another."""
    thread, ran, y, modules = threading.get_ident(), [], None, dict(net.named_modules())

    def hook(name, module, inputs, output):
        if threading.get_ident() == thread:
            ran.append(name)
            return see(name, output)

    with LOCK, ExitStack() as stack, suppress(Reached):
        for name in names:
            module = modules[known("module", name, modules)]
            stack.enter_context(module.register_forward_hook(partial(hook, name)))
        y = net(x)
    for name in names:
        if (times := ran.count(name)) != 1:
            raise InputError(f"module {name!r} ran {times} times in one pass: name one that always runs once")
    if not isinstance(y, torch.Tensor | None):
        raise InputError(f"the network returns a {type(y).__name__}: wrap a module that returns the image alone")
    if y is not None and y.shape != x.shape:
        raise InputError(f"the network maps {tuple(x.shape)} to {tuple(y.shape)}: does it need another multiple=?")
    return y


def wrap(net: nn.Module, encoder: list[str], decoder: list[str], example: torch.Tensor, **options: Any) -> Wrapped:
    """SIPL around any network: features are read, and fused, behind modules found by their names.

    Args:
        net: maps (B, 3, H, W) to the same shape. It is used, not copied, so training the model trains it.
        encoder: names, as in `net.named_modules()`, of the modules whose outputs are the privileged features.
        decoder: as many names: behind each, Proxy Fusion writes. Pairs are made by resolution where possible.
        example: an image (B, 3, H, W) for one dry run, which tells channels and resolutions.
        options: fields of `Taps`: multiple, dictionary_size, read_heads, write_heads, dictionary_std; identity_start
            (True: the first pass is the network's own).
    Raises InputError for modules whose outputs are no features, which do not run just once, or in a wrong order."""
    if isinstance(encoder, str) or isinstance(decoder, str) or not 0 < len(encoder) == len(decoder):
        raise InputError(f"encoder={encoder!r} and decoder={decoder!r} must be lists of as many names, one or more")
    if len({*encoder}) < len(encoder) or len({*decoder}) < len(decoder):
        raise InputError(f"encoder={encoder!r} and decoder={decoder!r} must name each module once")
    for name in options:
        known("option", name, Taps.__annotations__)
    if not options.get("fusion", True):
        way = "train it by recipe=lambda model, x, y: model.net(x)"
        raise InputError(f"without Proxy Fusion a wrapped network is the network itself: {way}")
    if not isinstance(example, torch.Tensor) or example.ndim != 4:
        raise InputError("example must be an image of the network, a tensor (B, 3, H, W)")
    try:
        shapes = dry_run(net, encoder, decoder, example)
    except RuntimeError as e:
        raise InputError(f"the network fails on the example, {tuple(example.shape)}: {str(e).splitlines()[0]}") from e
    sizes = [shapes[name][-2:] for name in encoder]
    if len({*sizes}) == len(sizes) and {*sizes} == {shapes[name][-2:] for name in decoder}:
        decoder = sorted(decoder, key=lambda name: sizes.index(shapes[name][-2:]))
    found = dict(encoder=encoder, decoder=decoder, read_heads=[1] * len(sizes), write_heads=[1] * len(sizes))
    found["encoder_channels"] = [shapes[name][1] for name in encoder]
    found["decoder_channels"] = [shapes[name][1] for name in decoder]
    # as many entries as the preset nano has at a resolution: 16 x 16 at 1/2, 8 x 8 at 1/4, ...
    found["dictionary_size"] = [max(2, min(32, round(32 * width / example.shape[-1]))) for _, width in sizes]
    taps = Taps(**{name: tuple(v) if isinstance(v, list) else v for name, v in (found | options).items()})
    with next(net.parameters(), example).device:  # new tensors are made there
        return Wrapped(net, taps)


@torch.no_grad()
def dry_run(net, encoder, decoder, example):
    """Shapes of what the named modules put out for `example`, if they can be used."""
    shapes, (H, W) = {}, example.shape[-2:]

    def look(name, output):
        shape = tuple(getattr(output, "shape", ()))
        if len(shape) != 4 or abs(shape[2] * W - shape[3] * H) > max(H, W):  # more than rounding
            text = f"puts out {shape or type(output).__name__} for an image of {H} x {W}"
            raise InputError(f"module {name!r} {text}, which is no feature (B, C, h, w) of it: name another one")
        shapes[name] = shape

    net = copy.deepcopy(net).eval()  # no running statistic may change
    run(net, example.to(next(net.parameters(), example)), list(dict.fromkeys([*encoder, *decoder])), look)
    order = list(shapes)
    first, last = min(decoder, key=order.index), max(encoder, key=order.index)
    if order.index(first) < order.index(last):  # privileged features would depend on what Proxy Fusion writes
        raise InputError(f"decoder module {first!r} runs before encoder module {last!r}: name one that runs later")
    return shapes
