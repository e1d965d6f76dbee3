"""Everything that shapes the network: one dataclass, and the three presets."""

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches

from .files import InputError


@dataclass(frozen=True)
class Settings:
    """Everything that shapes the network. The defaults are the preset `paper`: SIPL + PromptIR, 40.03 M parameters."""

    backbone: str = "promptir"  # or one of "restormer", "adair", "nafnet"
    dim: int = 48  # d, the width at full resolution; 2d, 4d, 8d below
    blocks: tuple = (4, 6, 6, 8)  # transformer blocks at full, 1/2, 1/4, 1/8 resolution
    refinement: int = 4  # blocks after the last decoder level
    heads: tuple = (1, 2, 4, 8)  # heads of channel attention per level
    expansion: float = 2.66  # feed-forward width / block width
    prompt_channels: tuple = (64, 128, 320)  # PromptIR, at 1/2, 1/4, 1/8
    prompt_size: tuple = (64, 32, 16)
    middle: int = 1  # NAFNet: blocks at 1/16 resolution; its blocks have no heads, expansion or refinement
    decoder_blocks: tuple = (1, 1, 1, 1)  # NAFNet: at 1/8, 1/4, 1/2, full resolution
    fusion: bool = True  # False leaves the plain backbone: no dictionary, no Proxy Fusion
    dictionary_size: tuple = (64, 32, 16)  # S_l: the dictionary of scale l has S_l x S_l entries
    dictionary_std: float = 0.02  # random start; 0 is the released code's, and costs its first step (tests show it)
    read_heads: tuple = (1, 2, 1)
    write_heads: tuple = (1, 2, 4)
    identity_start: bool = False  # True: write adds to the feature itself, at first nothing; else as released
    aligned: bool = False  # True: features of the estimate are also added to those of x, pixel by pixel; not released

    def __post_init__(self):
        for f in fields(self):
            value, many = getattr(self, f.name), isinstance(f.default, tuple)
            if many and isinstance(value, list):  # JSON knows no tuples
                object.__setattr__(self, f.name, value := tuple(value))
            kind = int if many else type(f.default)
            items = value if many and isinstance(value, tuple) else (value,)
            good = len(items) == (len(f.default) if many else 1)
            for v in items:
                number = kind is float and type(v) is int or type(v) is kind
                if kind in (int, float):
                    number = number and (v >= 1 if kind is int else 0 <= v < math.inf)
                good = good and number
            if f.name == "backbone" and value not in BACKBONES:
                raise InputError(f"unknown backbone {value!r}: choose one of {', '.join(BACKBONES)}")
            if not good:
                raise InputError(f"setting {f.name}={value!r} cannot work: it must be like {f.default!r}")
        prompted = self.backbone == "promptir"
        widths = [self.dim * 2**i for i in range(4)]
        blocks = [w + c for w, c in zip(widths[1:], self.prompt_channels)]  # prompts have blocks of four heads
        for name, width, heads in (("heads", widths, self.heads), ("read_heads", widths[1:], self.read_heads),
                                   ("write_heads", widths[1:], self.write_heads),
                                   ("prompt_channels", blocks if prompted else [], (4, 4, 4))):  # fmt: skip
            if any(w % h for w, h in zip(width, heads)):
                raise InputError(
                    f"setting {name} does not fit dim={self.dim}: {list(heads)} heads over {width} channels"
                )


BACKBONES = ("promptir", "restormer", "adair", "nafnet")
PRESETS = {
    "nano": dict(dim=16, blocks=(1, 1, 1, 1), refinement=1, heads=(1, 2, 2, 4), expansion=2.0,
                 prompt_channels=(8, 16, 16), prompt_size=(16, 8, 4), dictionary_size=(16, 8, 4)),  # 1.3 M
    "small": dict(dim=24, blocks=(2, 2, 2, 4), refinement=2, prompt_channels=(16, 32, 64),  # 5.4 M
                  prompt_size=(32, 16, 8), dictionary_size=(32, 16, 8)),
    "paper": dict(),
}  # fmt: skip


def choose(preset, **overrides):
    """The settings of a preset with some fields replaced. Raises InputError for a name that does not exist."""
    if preset not in PRESETS:
        raise InputError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    known = [f.name for f in fields(Settings)]
    for name in set(overrides) - set(known):
        near = get_close_matches(name, known, 1)
        raise InputError(f"unknown setting {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"not in {known}"))
    return Settings(**{**PRESETS[preset], **overrides})
