"""SIPL around a network that somebody else wrote: its modules are found by name and reached by hooks."""

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn as nn

from .files import InputError
from .sipl import SIPL, ProxyFusion
from .tiles import pad


@dataclass(frozen=True)
class Taps:
    """What a wrapped network is made of, besides the network: one item per scale in each tuple."""

    encoder: tuple  # names of the modules whose outputs are the privileged features
    decoder: tuple  # names of the modules behind which Proxy Fusion is put
    encoder_channels: tuple
    decoder_channels: tuple
    dictionary_size: tuple
    read_heads: tuple
    write_heads: tuple
    dictionary_std: float = 0.02
    identity_start: bool = False
    multiple: int = 8  # images are mirrored up to multiples of this
    fusion: bool = True


class Reached(BaseException):
    """All privileged features are there: the rest of the network need not run. No `except Exception` catches it."""


LOCK = threading.RLock()  # hooks sit on modules that threads may share, so wrapped passes take turns


class Wrapped(SIPL):
    """A `SIPL` whose backbone is `net`; made by `SIPL.wrap`. Between calls, `net` carries no hook."""

    def __init__(self, net, taps):
        nn.Module.__init__(self)
        self.settings, self.net = taps, net
        args = zip(taps.decoder_channels, taps.dictionary_size, [taps.dictionary_std] * len(taps.encoder),
                   taps.read_heads, taps.write_heads, taps.encoder_channels)  # fmt: skip
        self.fusion = nn.ModuleList(ProxyFusion(*a, identity=taps.identity_start) for a in args)
        first = next(net.parameters(), torch.empty(0))
        self.fusion.to(first.device, first.dtype)

    def pad(self, x, multiple=8):
        return pad(x, math.lcm(multiple, self.settings.multiple) if multiple > 8 else self.settings.multiple)

    def encode(self, x):
        return None  # the network is one piece: its encoder runs again in every pass

    def tap(self, image):
        found = {}

        def keep(name, output):
            found[name] = output.clone()  # a later in-place activation must not change it
            if len(found) == len(self.settings.encoder):
                raise Reached

        with hooks(self.net, self.settings.encoder, keep), contextlib.suppress(Reached):
            self.net(image)
        self.check_ran(list(found), self.settings.encoder)
        return [found[name] for name in self.settings.encoder]

    def decode(self, x, features, proxies=None):
        number, ran, gradients = {name: i for i, name in enumerate(self.settings.decoder)}, [], torch.is_grad_enabled()

        def write(name, h):
            ran.append(name)
            if gradients and not torch.is_grad_enabled():  # it would run again, without Proxy Fusion, in backward
                raise InputError(f"module {name!r} runs under activation checkpointing, where its gradients would be "
                                 "wrong: turn that off, or name modules outside it")  # fmt: skip
            return self.fusion[number[name]].write(h, proxies[number[name]])

        with hooks(self.net, self.settings.decoder, write):
            y = self.net(x)
        self.check_ran(ran, self.settings.decoder)
        if y.shape != x.shape:
            raise InputError(f"the network maps {tuple(x.shape)} to {tuple(y.shape)}: wrap it with the multiple= that "
                             "its sides need")  # fmt: skip
        return y

    @staticmethod
    def check_ran(ran, names):
        for name in names:
            if ran.count(name) != 1:
                raise InputError(f"module {name!r} ran {ran.count(name)} times in this pass, once in the dry run: name "
                                 "one that runs once whatever the image and the mode")  # fmt: skip


@contextlib.contextmanager
def hooks(net, names, function: Callable):
    """While inside, `function(name, output)` sees the output of each named module, and replaces it if not None."""
    modules, thread, handles = dict(net.named_modules(remove_duplicate=False)), threading.get_ident(), []

    def hook(name):
        return lambda module, inputs, output: function(name, output) if threading.get_ident() == thread else None

    with LOCK:
        try:
            for name in names:
                handles.append(modules[name].register_forward_hook(hook(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def wrap(net: nn.Module, encoder: list[str], decoder: list[str], example: torch.Tensor, *, dictionary_size=None,
         read_heads=None, write_heads=None, dictionary_std=0.02, identity_start=False, multiple=8):  # fmt: skip
    """SIPL around any network: features are tapped, and fused, behind modules found by their names.

    Args:
        net: maps (B, 3, H, W) to the same shape. It is used, not copied, and stays usable by itself; training the model
            trains it, and where it keeps running statistics (batch norm), every pass in training mode feeds them.
        encoder: names (as in `net.named_modules()`) of the modules whose outputs are the privileged features.
        decoder: as many names: behind each, Proxy Fusion writes. Pairs are made by resolution where possible.
        example: an image tensor for one dry run, which tells channels and resolutions.
        dictionary_size, read_heads, write_heads: one number per scale. dictionary_std: of its random start.
        identity_start: for a trained `net`: write starts by adding nothing, so the first pass is the network's own.
        multiple: sides are mirrored up to multiples of this.
    The network runs whole in every pass but the tap, which ends it by an exception once all features are there.
    Raises InputError for names that do not exist, outputs that are no features, an order that cannot work.
    """
    if not isinstance(net, nn.Module) or isinstance(net, torch.jit.ScriptModule):
        raise InputError(f"net must be a torch.nn.Module, and not a scripted one, not {type(net).__name__}")
    for argument, given in (("encoder", encoder), ("decoder", decoder)):
        if not isinstance(given, (list, tuple)):
            raise InputError(f"{argument} must be a list of module names, not {given!r}")
    if type(multiple) is not int or multiple < 1:
        raise InputError(f"multiple={multiple!r} must be a positive whole number")
    if type(dictionary_std) not in (int, float) or not 0 <= dictionary_std < math.inf:
        raise InputError(f"dictionary_std={dictionary_std!r} must be a number >= 0")
    if type(identity_start) is not bool:
        raise InputError(f"identity_start={identity_start!r} must be True or False")
    encoder, decoder = list(encoder), list(decoder)
    names = [name for name, _ in net.named_modules(remove_duplicate=False) if name]
    for name in (*encoder, *decoder):
        if name not in names:
            near = get_close_matches(str(name), names, 3, 0.4)
            raise InputError(f"the network has no module {name!r}: " + (f"did you mean {' or '.join(map(repr, near))}?"
                             if near else f"its modules are {', '.join(names[:9])}, ..."))  # fmt: skip
    if not encoder or len(encoder) != len(decoder) or len({*encoder}) + len({*decoder}) != 2 * len(encoder):
        raise InputError(f"encoder and decoder must name equally many different modules, one pair for each scale, "
                         f"not {encoder} and {decoder}")  # fmt: skip
    width, shapes = dry_run(net, encoder, decoder, example, multiple)
    # Pairs share a resolution where they can, in whatever order they were named; else they are as given.
    sizes = {name: shapes[name][-2:] for name in shapes}
    if sorted(sizes[n] for n in encoder) == sorted(sizes[n] for n in decoder) and len(
        {sizes[n] for n in encoder}) == len(encoder):  # fmt: skip
        decoder = [next(d for d in decoder if sizes[d] == sizes[e]) for e in encoder]
    # As many entries for a scale as the preset nano has there: 16 x 16 at half the resolution, 8 x 8 at a quarter, ...
    shrink = [width / sizes[e][-1] for e in encoder]
    dictionary_size = dictionary_size or [max(2, min(32, round(32 / s))) for s in shrink]
    ones = [1] * len(encoder)
    given = dict(dictionary_size=dictionary_size, read_heads=read_heads or ones, write_heads=write_heads or ones)
    channels = [shapes[n][1] for n in encoder], [shapes[n][1] for n in decoder]
    for name, values in given.items():
        whole = isinstance(values, (list, tuple)) and all(type(v) is int and v > 0 for v in values)
        if not whole or len(values) != len(encoder):
            raise InputError(f"{name}={values!r} must be {len(encoder)} positive whole numbers, one for each scale")
        if "heads" in name and any(c % v for c, v in zip(channels[1], values)):
            raise InputError(f"{name}={values!r} does not divide the channels {channels[1]} of the decoder modules")
    taps = Taps(tuple(encoder), tuple(decoder), *map(tuple, channels), **{n: tuple(v) for n, v in given.items()},
                dictionary_std=dictionary_std, identity_start=identity_start, multiple=multiple)  # fmt: skip
    return Wrapped(net, taps)


def rebuild(net, settings, name):
    """The model of a file that a wrapped network wrote, with `net` as it is now."""
    if not isinstance(net, nn.Module):
        raise InputError(f"{name} holds a network wrapped by SIPL.wrap: pass it, SIPL.load(..., net=the_network)")
    taps = Taps(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    names = dict(net.named_modules(remove_duplicate=False))
    for module in (*taps.encoder, *taps.decoder):
        if module not in names:
            raise InputError(f"{name} was saved around a network with a module {module!r}, which this net has not")
    return Wrapped(net, taps)


@torch.no_grad()
def dry_run(net, encoder, decoder, example, multiple):
    """Width of the padded `example`, and shapes of what the named modules put out for it, if they can be used."""
    if not isinstance(example, torch.Tensor) or example.ndim != 4 or example.shape[1] != 3:
        raise InputError("example must be a tensor (B, 3, H, W) such as the network takes")
    seen, order = {}, []
    x = pad(example.to(next(net.parameters(), example)), multiple)

    def look(name, output):
        order.append(name)
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise InputError(f"module {name!r} puts out {what}, not a 4-D tensor (B, C, H, W): name another one")
        (h, w), (height, width) = output.shape[-2:], x.shape[-2:]
        if abs(h * width - w * height) > max(height, width):  # more than rounding
            raise InputError(f"module {name!r} puts out {tuple(output.shape)} for an image of {height} x {width}, "
                             "which is not (B, C, H, W) at a lower resolution: name another one")  # fmt: skip
        seen[name] = tuple(output.shape)

    modes = [(m, m.training) for m in net.modules()]
    net.eval()  # no running statistic may change
    try:
        with hooks(net, dict.fromkeys([*encoder, *decoder]), look):
            y = net(x)
    finally:
        for module, mode in modes:
            module.training = mode
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        what = tuple(y.shape) if isinstance(y, torch.Tensor) else f"a {type(y).__name__}"
        raise InputError(f"the network must map {tuple(x.shape)} to the same shape, not to {what}")
    for name in (*encoder, *decoder):
        if order.count(name) != 1:
            raise InputError(f"module {name!r} runs {order.count(name)} times in one pass: name one that runs once")
    last = max(encoder, key=order.index)
    for name in decoder:
        if order.index(name) < order.index(last):
            raise InputError(f"decoder module {name!r} runs before encoder module {last!r}, so the privileged features "
                             "would depend on what Proxy Fusion writes: name decoder modules that run after all "
                             "encoder modules (the last of those may be among them)")  # fmt: skip
    return x.shape[-1], seen
