"""Weights on disk: the project's own files, and PromptIR, Restormer, AdaIR, NAFNet and SIPL as they were published.

What a file holds is told by its content, not by its name. Nothing in it is run, and nothing is downloaded."""

import copy
import json
import os
import re
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F

from .backbones import BiasFreeNorm
from .files import InputError, Name, asset, atomic_write
from .sipl import SIPL, LayerNorm2d
from .wrap import Taps, Wrapped

INCLUDED = ("nano", "nano-authors", "nano-backbone")  # trained weights in data/


def default_steps(model: SIPL) -> int:
    """Refinement steps T that suit a model: what its file says, else 1 where it was made for a loop."""
    about = getattr(model, "about", {})
    looped = model.fusion and "window" not in about or default_feedback(model) == "again"
    return about.get("steps", 1 if looped else 0)


def default_feedback(model: SIPL) -> str:
    """The kind of feedback that suits a model: "again" if it was trained with that, else "privilege"."""
    return "again" if getattr(model, "about", {}).get("recipe") == "again" else "privilege"


def refiner(model: SIPL, photo: torch.Tensor, steps: int, feedback: str, return_all: bool = False) -> Callable:
    """`model.refine` with these options, for a photo (B, 3, H, W) or its windows.

    For weights of the recipe "overview" the guided pass, P made of the photo shrunk to the size of their windows.
    Raises InputError if these are to refine: they were not trained for it."""
    side = getattr(model, "about", {}).get("window")
    if not side:
        return lambda x: model.refine(x, steps, feedback, return_all)
    if steps or feedback != "privilege":
        wrong = f"steps={steps}, feedback={feedback!r}"
        raise InputError(f"{wrong}: weights of the recipe 'overview' make one guided pass, pass steps=0 (--steps 0)")
    with torch.no_grad():
        overview = F.interpolate(photo, (side, side), mode="area").to(next(model.parameters()))
        privileged = model.privileged(overview)

    @torch.no_grad()
    def guided(x):
        y = model(x, privileged)
        return y[None] if return_all else y

    return guided


def save(model: SIPL, path: Name) -> None:
    """Write weights, settings and `model.about` to one safetensors file, whole or not at all.

    A name without an ending is a folder, which gets model.safetensors. Raises InputError where it cannot be written."""
    path = Path(path) if Path(path).suffix else Path(path) / "model.safetensors"
    header = json.dumps({"settings": asdict(model.settings), "about": getattr(model, "about", {})})
    tensors = {n: t.cpu().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"sipl_min": header}))


# -------------------------------------------------------------------------------------------------------- loading
def load(source: Name | dict[str, Any] = "nano", device: Any = None, net: torch.nn.Module | None = None) -> SIPL:
    """A model with trained weights, in float32 and in evaluation mode; a backbone alone where the weights are that.

    Args:
        source: one of INCLUDED; a file of `save`, or its folder; a published file or state dict, also as Lightning,
            BasicSR or DataParallel keep it. The settings of a published network follow from its shapes.
        net: the network around which a file of `SIPL.wrap` was saved; it gets its weights back, in its own dtype.
    Raises InputError where weights are missing, damaged, or of a kind not known here."""
    name = "the state dict" if isinstance(source, dict) else repr(os.fspath(source))
    content, header = (source, {}) if isinstance(source, dict) else read(source)
    try:
        wrapped = "encoder" in header.get("settings", {})
        if wrapped != (net is not None):
            raise ValueError(f"it holds {'a' if wrapped else 'no'} network wrapped by SIPL.wrap")
        tensors = content if wrapped else modernize(content if header else unwrap(content), name)
        settings = header["settings"] if header else infer(tensors)
        settings = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if n != "aligned"}
        with torch.random.fork_rng(devices=[]):  # to load draws no random number
            model = Wrapped(net, Taps(**settings)) if wrapped else SIPL("paper", **settings)
        if not header:
            names = {published_name(n, model.settings.backbone): n for n in model.state_dict()}
            tensors = {names.get(n, n): t for n, t in tensors.items()}
        if settings.get("backbone") == "restormer" and "encoder.levels.0.0.norm1.bias" not in tensors:  # BiasFree
            for module in [*model.encoder.modules(), *model.decoder.modules()]:
                if isinstance(module, LayerNorm2d):
                    module.__class__, module.bias = BiasFreeNorm, None
        copy.deepcopy(model).load_state_dict(tensors)  # raises before `net` is touched, if something does not fit
        model.load_state_dict(tensors)
        model.about = dict(header.get("about", {}))
    except Exception as e:  # a strange file can raise anything
        reason = f"{e} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())[:200]
        published = "whole weights of PromptIR, Restormer, AdaIR or NAFNet (RGB, four levels)"
        advice = f"pass a file of model.save (with net=the_network for one of SIPL.wrap), or {published}"
        raise InputError(f"{name}: {reason}: {advice}") from e
    return model.to(device).eval()


def read(source):
    """What a file holds, and its header if `save` wrote it. No code in it is run."""
    path = asset(f"{source}.safetensors") if source in INCLUDED else Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{str(path)!r}: no such file: check the path, or use one of {', '.join(INCLUDED)}")
    try:
        with open(path, "rb") as f, torch.serialization.safe_globals([Namespace]):  # as training scripts keep options
            if f.read(9)[8:] != b"{":  # safetensors begin with eight bytes for the length of a JSON header
                f.seek(0)
                return torch.load(f, map_location="cpu", weights_only=True), {}
        with safetensors.safe_open(path, framework="pt") as f:
            header = (f.metadata() or {}).get("sipl_min", "{}")
        return safetensors.torch.load_file(path), dict(json.loads(header))
    except Exception as e:  # damaged files raise anything, and PyTorch would advise to run the code in them
        why = f"it is damaged, no weight file, or holds code, which is not run ({type(e).__name__})"
        raise InputError(f"{str(path)!r}: {why}: get it again, or pass its state dict") from e


def unwrap(content):
    """The state dict of a network in what training frameworks put around it: a key, other tensors, longer names."""
    for key in ("state_dict", "model", "params_ema", "params"):
        content = content.get(key, content)
    first = r"(.*?)(patch_embed\.proj|intro)\.weight"  # what stands before it is a wrapper's
    prefix = min((m[1] for n in content if (m := re.fullmatch(first, n))), key=len, default="")
    if prefix and any(n.startswith("fusion.") for n in content):
        raise ValueError("it is of a network wrapped by SIPL.wrap, without its settings")
    return {n.removeprefix(prefix): t for n, t in content.items() if n.startswith(prefix)}


def modernize(tensors, name):
    """Own names of earlier versions, and published tensors that are not as here -> those of today."""
    if any(n.startswith("aligned.") for n in tensors):
        warnings.warn(f"{name}: aligned.* are no longer part of the network: refinements move a little", stacklevel=3)
    renamed = {}
    for n, t in tensors.items():
        n = n.replace(".where.", ".spatial_gate.").replace(".which.", ".channel_gate.")  # of AdaIR
        if not re.match(UNUSED, n):
            renamed[n] = t.squeeze(0) if t.ndim == 5 else t  # prompt maps (1, 5, C, S, S)
    return renamed


def from_backbone(source: Any, identity_start: bool = False, **overrides: Any) -> SIPL:
    """A trained backbone with new Proxy Fusion around it, ready to fine-tune.

    Args:
        source: what `load` takes, or a `SIPL`. Its encoder and decoder are copied.
        identity_start: True makes the untrained first pass equal the backbone's output, to rounding.
        overrides: other settings of Proxy Fusion: dictionary_size, dictionary_std, read_heads, write_heads.
    Raises InputError for other settings, and as `load` for its source."""
    plain = source if isinstance(source, SIPL) else load(source)
    for name in overrides.keys() - {"dictionary_size", "dictionary_std", "read_heads", "write_heads"}:
        raise InputError(f"setting {name!r} is not one of Proxy Fusion, and the backbone is given: leave it out")
    settings = asdict(plain.settings) | dict(fusion=True, identity_start=identity_start) | overrides
    model = SIPL("paper", **settings).to(next(plain.parameters()))
    model.encoder, model.decoder = copy.deepcopy(plain.encoder), copy.deepcopy(plain.decoder)
    return model.train().requires_grad_()


# ------------------------------------------------------------------------------------------------ published names
# Our name -> the published one, by these rules in this order, then word by word. In a replacement, {l} is the last
# number found plus one, since our lists count from 0; {m} is {l} + 1, and {k} counts the other way round, from 3.
FUSION = [
    (r"^fusion\.(\d)\.dictionary", "privileged_dictionary{l}"),
    (r"^fusion\.(\d)\.read\.", "p{l}_cross."),
    (r"^fusion\.(\d)\.write\.", "cross_p{l}."),
    (r"^(p\d_cross|cross_p\d)\.(temperature|q|kv|out)\b", r"\1.attn.\2"),
]
RESTORMER = [  # and what was made of it: PromptIR, AdaIR
    (r"^encoder\.embed", "patch_embed.proj"),
    (r"^encoder\.levels\.3", "latent"),
    (r"^(encoder|decoder)\.levels\.(\d)", r"\1_level{l}"),
    (r"^encoder\.down\.(\d)", "down{l}_{m}.body"),
    (r"^decoder\.up\.(\d)", "up{m}_{l}.body"),
    (r"^decoder\.merge\.(\d)", "reduce_chan_level{l}"),
    (r"^decoder\.prompts\.(\d)\.reduce", "reduce_noise_level{l}"),
    (r"^decoder\.prompts\.(\d)\.block", "noise_level{l}"),
    (r"^decoder\.prompts\.(\d)", "prompt{l}"),
    (r"^decoder\.frequency\.(\d)", "fre{k}"),
    (r"^decoder\.", ""),
    (r"\.(norm\d)\.(weight|bias)$", r".\1.body.\2"),
    (r"\.(q|kv|qkv)\.0\.", r".\1."),
    (r"\.(q|kv|qkv)\.1\.", r".\1_dwconv."),
    (r"\.inner\.0\.", ".project_in."),
    (r"\.inner\.1\.", ".dwconv."),
]
NAFNET = [
    (r"^(encoder|decoder)\.levels", r"\1s"),
    (r"^decoder\.down", "downs.3"),
    (r"^(encoder|decoder)\.", ""),
    (r"\.inner\.(\d)", ".conv{l}"),
]
NAFNET_WORDS = dict(embed="intro", down="downs", middle="middle_blks", up="ups", output="ending")
NAFNET_WORDS |= dict(channels="sca.1", out="conv3", ffn_inner="conv4", ffn_out="conv5")
WORDS = dict(attention="attn", out="project_out")
WORDS |= dict(norm_query="norm11.body", norm_context="norm12.body", norm_ffn="norm2.body")  # of Proxy Fusion
WORDS |= dict(maps="prompt_param", choose="linear_layer", conv="conv3x3")  # of PromptIR; the others are of AdaIR
WORDS |= dict(embed="conv1", rate="rate_conv", mix="frequency_refine.proj", weight_new="para1", weight_old="para2")
WORDS |= dict(spatial_gate="frequency_refine.SpatialGate.spatial", channel_gate="frequency_refine.ChannelGate.mlp")
WORDS |= dict(high="channel_cross_l", low="channel_cross_h", merge="channel_cross_agg")  # crossed in the original

PER_SCALE = dict(read_heads=("p{}_cross.attn.temperature", 0), write_heads=("cross_p{}.attn.temperature", 0))
PER_SCALE |= dict(dictionary_size=("privileged_dictionary{}", -1))  # setting -> a published name, and its dimension
PER_SCALE |= dict(prompt_channels=("prompt{}.prompt_param", 1), prompt_size=("prompt{}.prompt_param", 3))
UNUSED = r"(aligned|chnl_reduce\d|reduce_noise_channel_\d|fre\d\.(conv|score_gen))\."  # connected to nothing


def published_name(name, backbone):
    """Our name of a tensor -> the name under which it was published."""
    rules, words = (NAFNET, NAFNET_WORDS) if backbone == "nafnet" else (RESTORMER, WORDS)
    for pattern, replacement in FUSION + rules:
        if found := re.search(pattern, name):
            i = int(found[found.lastindex]) if "{" in replacement else 0
            name = re.sub(pattern, replacement.format(l=i + 1, m=i + 2, k=3 - i), name)
    return ".".join(words.get(word, word) for word in name.split("."))


def infer(tensors):
    """The settings that published names and shapes imply. Raises KeyError for a name that is missing."""
    shapes = {n: t.shape for n, t in tensors.items()}

    def count(part):  # blocks part.0, part.1, ...; at least one, so that `load` tells what is missing
        return max(1, len({m[0] for n in shapes if (m := re.match(rf"{part}\.\d+\.", n))}))

    found = {"fusion": "privileged_dictionary1" in shapes}
    for setting, (name, dim) in PER_SCALE.items():
        if name.format(1) in shapes:
            found[setting] = tuple(shapes[name.format(i)][dim] for i in (1, 2, 3))
    if "intro.weight" in shapes:
        blocks, decoder_blocks = (tuple(count(f"{part}.{i}") for i in range(4)) for part in ("encoders", "decoders"))
        found |= dict(backbone="nafnet", dim=shapes["intro.weight"][0], middle=count("middle_blks"))
        return found | dict(blocks=blocks, decoder_blocks=decoder_blocks)
    family = "adair" if "fre1.para1" in shapes else "promptir" if "prompt_size" in found else "restormer"
    dim, levels = shapes["patch_embed.proj.weight"][0], ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    found |= dict(backbone=family, dim=dim, blocks=tuple(map(count, levels)), refinement=count("refinement"))
    found["heads"] = tuple(shapes[f"{level}.0.attn.temperature"][0] for level in levels)
    hidden = shapes["encoder_level1.0.ffn.project_out.weight"][1]
    return found | dict(expansion=2.66 if hidden == int(2.66 * dim) else hidden / dim)  # 2.66 in all that is published
