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
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F

from .backbones import BiasFreeNorm
from .files import InputError, Name, asset, atomic_write
from .sipl import BACKBONES, SIPL, LayerNorm2d, Settings
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


@torch.no_grad()
def refiner(model: SIPL, photo: torch.Tensor, steps: int, feedback: str, return_all: bool = False) -> Callable:
    """`model.refine` with these options, for a photo (B, 3, H, W) or its windows.

    For weights of the recipe "overview" the guided pass, P made of the photo shrunk to the size of their windows.
    Raises InputError if these are to refine: they were not trained for it."""
    side = getattr(model, "about", {}).get("window")
    if not side:
        return partial(model.refine, steps=steps, feedback=feedback, return_all=return_all)
    if steps or feedback != "privilege":
        wrong = f"steps={steps}, feedback={feedback!r}"
        raise InputError(f"{wrong}: weights of the recipe 'overview' make one guided pass, pass steps=0 (--steps 0)")
    overview = F.interpolate(photo, (side, side), mode="area").to(next(model.parameters()))
    privileged = model.privileged(overview)

    @torch.no_grad()
    def guided(x):
        y = model(x, privileged)
        return y[None] if return_all else y

    return guided


def save(model: SIPL, path: Name) -> None:
    """Write weights, settings and `model.about` to one safetensors file, whole or not at all.

    A name without an ending is a folder, which gets model.safetensors, and config.json for people to read.
    Raises InputError where the place cannot be written."""
    path = Path(path)
    header = json.dumps({"settings": asdict(model.settings), "about": getattr(model, "about", {})})
    if not path.suffix:
        with atomic_write(path / "config.json") as temporary:
            temporary.write_text(header, encoding="utf-8")
        path = path / "model.safetensors"
    tensors = {n: t.cpu().clone(memory_format=torch.contiguous_format) for n, t in model.state_dict().items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, {"sipl_min": header}))


# -------------------------------------------------------------------------------------------------------- loading
def load(source: Name | dict[str, Any] = "nano", device: Any = None, net: torch.nn.Module | None = None) -> SIPL:
    """A model with trained weights, in float32 and in evaluation mode; a backbone alone where the weights are that.

    Args:
        source: one of INCLUDED; a file of `save`, or its folder; a training's `checkpoint.pt`; a state dict, ours or a
            published one, or a file of it, also in the wrappers of Lightning, BasicSR, DataParallel or torch.compile.
        net: the network around which a file of `SIPL.wrap` was saved; it gets its weights back, in its own dtype.
    Where no settings come with the weights they follow from the shapes.
    Raises InputError where weights are missing, damaged, or of a kind not known here."""
    name = "the state dict" if isinstance(source, dict) else repr(os.fspath(source))
    path = None if isinstance(source, dict) else find(source)
    advice = "pass whole weights of SIPL, or of PromptIR, Restormer, AdaIR or NAFNet (RGB, four levels)"
    try:
        content, header = read(path) if path else (source, {})
        tensors, header = unwrap(content, header)
        if "encoder" in header.get("settings", {}):
            advice = "pass the network that it was saved around, SIPL.load(..., net=the_network)"
            if net is None:
                raise ValueError("it holds a network wrapped by SIPL.wrap")
        elif net is not None:
            advice = "leave out net"
            raise ValueError("it holds no network wrapped by SIPL.wrap")
        else:
            tensors = modernize(tensors, name)
        settings = header["settings"] if header else infer(tensors, name)
        with torch.device("meta"):  # there it takes no memory, whatever a file asks for
            model = build(settings, tensors, net)
        if not header:
            names = {published_name(n, model.settings.backbone): n for n in model.state_dict()}
            tensors = {names.get(n, n): t for n, t in tensors.items()}
        # raises where names or shapes differ, before `net` is touched or memory is taken
        copy.deepcopy(model).to("meta").load_state_dict({n: t.to("meta") for n, t in tensors.items()})
        about = dict(header.get("about", {}))
    except Exception as e:  # a strange file can raise anything
        reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())[:200].rstrip(". ")
        raise InputError(f"{name}: {reason}: {advice}") from e
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # anew: a backbone may hold what no file has
        model = build(settings, tensors, net)
    if net is not None:
        model.fusion.to(next(net.parameters(), torch.empty(0)).device)
    model.load_state_dict(tensors)
    model.about = about
    return model.to(device).eval()


def find(source):
    """The path of what `load` was given by name."""
    path = asset(f"{source}.safetensors") if source in INCLUDED else Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{str(path)!r}: no such file: check the path, or use one of {', '.join(INCLUDED)}")
    return path


def read(path):
    """What a file holds, and its header if `save` wrote it; no code in it is run."""
    try:
        with open(path, "rb") as f, torch.serialization.safe_globals([Namespace]):  # as training scripts keep options
            if f.read(9)[8:] != b"{":  # safetensors begin with eight bytes for the length of a JSON header
                f.seek(0)
                return torch.load(f, map_location="cpu", weights_only=True), {}
        with safetensors.safe_open(path, framework="pt") as f:
            header = (f.metadata() or {}).get("sipl_min", "{}")
        return safetensors.torch.load_file(path), dict(json.loads(header))
    except Exception as e:  # damaged files raise anything, and PyTorch would advise to run the code in them
        code = re.search(r"GLOBAL ([\w.]+)", str(e))
        reason = f"it wants to call {code[1]}, which is not done here" if code else f"not readable ({type(e).__name__})"
        raise ValueError(reason) from e


def unwrap(content, header):
    """Take off what training frameworks put around a state dict; a checkpoint of our own training has a header."""
    content = content if isinstance(content, dict) else {}
    run = content.get("run")
    if isinstance(run, dict) and "settings" in run:
        about = {key: run[key] for key in ("recipe", "suite", "num_steps") if key in run}
        header = {"settings": run["settings"], "about": content.get("about", about)}
        content = content.get("average") or content["model"]  # the average is what was validated
        content = {n.removeprefix("module."): t for n, t in content.items() if n != "n_averaged"}
    for key in ("state_dict", "model_state_dict", "model", "params_ema", "params"):
        content = content[key] if isinstance(content.get(key), dict) else content
    tensors = {str(n).replace("_orig_mod.", ""): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise ValueError("it holds no tensor")
    if header:
        return tensors, header
    first = r"(.*\.|)(encoder\.embed|patch_embed\.proj|intro)\.weight"  # what stands before it is a wrapper's
    prefix = min((m[1] for n in tensors if (m := re.fullmatch(first, n))), key=len, default="")
    if prefix and any(n.startswith("fusion.") for n in tensors):
        raise ValueError("it holds a network wrapped by SIPL.wrap without its settings, which model.save writes")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, {}


def modernize(tensors, name):
    """Own names of earlier versions, and published tensors that are not as here -> those of today."""
    if any(n.startswith("aligned.") for n in tensors):
        text = "are no longer part of the network and left out: the first pass stays, refinements move a little"
        warnings.warn(f"{name}: the tensors aligned.* {text}", stacklevel=3)
    renamed = {}
    for n, t in tensors.items():
        n = n.replace(".where.", ".spatial_gate.").replace(".which.", ".channel_gate.")  # of AdaIR
        if not re.match(UNUSED, n):
            renamed[n] = t[0] if t.ndim == 5 and len(t) == 1 else t  # prompt maps (1, 5, C, S, S)
    return renamed


def build(settings, tensors, net):
    """The model of these settings, untrained."""
    settings = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items() if n != "aligned"}
    if net is not None:
        return Wrapped(net, Taps(**settings))
    s = Settings(**settings)
    if s.backbone not in BACKBONES:
        raise ValueError(f"its backbone {s.backbone!r} is not known here: enter it into sipl.BACKBONES first")
    ours = s.backbone in FAMILIES
    if ours and sum(s.blocks) + s.refinement + s.middle + sum(s.decoder_blocks) > len(tensors):
        raise ValueError("its settings ask for more blocks than it has tensors")
    model = SIPL("paper", **settings)
    if ours and not any(re.match(r"encoder.*\.norm\d\.(body\.)?bias$", n) for n in tensors):  # Restormer's BiasFree
        for module in [*model.encoder.modules(), *model.decoder.modules()]:
            if isinstance(module, LayerNorm2d):
                module.__class__, module.bias = BiasFreeNorm, None
    return model


def from_backbone(source: Any, identity_start: bool = False, **overrides: Any) -> SIPL:
    """A trained backbone with new Proxy Fusion around it, ready to fine-tune.

    Args:
        source: what `load` takes, or a `SIPL`. Its encoder and decoder are copied.
        identity_start: True makes the untrained first pass equal the backbone's output, to rounding.
        overrides: other settings of Proxy Fusion: dictionary_size, dictionary_std, read_heads, write_heads.
    Raises InputError for other settings and for a wrapped network, as `load` for its source."""
    plain = source if isinstance(source, SIPL) else load(source)
    if isinstance(plain, Wrapped):
        raise InputError("this model is wrapped around a network already: use SIPL.wrap(net, ..., identity_start=True)")
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
    (r"^decoder\.down", "down.3"),
    (r"^(encoder|decoder)\.", ""),
    (r"\.inner\.(\d)", ".conv{l}"),
]
NAFNET_WORDS = dict(embed="intro", down="downs", middle="middle_blks", up="ups", output="ending")
NAFNET_WORDS |= dict(out="conv3", channels="sca.1", ffn_inner="conv4", ffn_out="conv5")
WORDS = dict(attention="attn", out="project_out")
WORDS |= dict(norm_query="norm11.body", norm_context="norm12.body", norm_ffn="norm2.body")  # of Proxy Fusion
WORDS |= dict(maps="prompt_param", choose="linear_layer", conv="conv3x3")  # of PromptIR; the others are of AdaIR
WORDS |= dict(embed="conv1", rate="rate_conv", mix="frequency_refine.proj", weight_new="para1", weight_old="para2")
WORDS |= dict(spatial_gate="frequency_refine.SpatialGate.spatial", channel_gate="frequency_refine.ChannelGate.mlp")
WORDS |= dict(high="channel_cross_l", low="channel_cross_h", merge="channel_cross_agg")  # crossed in the original

FAMILIES = dict(nafnet="intro.", adair="fre1.", promptir="prompt1.", restormer="patch_embed.")  # the first that fits
UNUSED = r"(aligned|chnl_reduce\d|reduce_noise_channel_\d|fre\d\.(conv|score_gen))\."  # connected to nothing


def published_name(name, backbone):
    """Our name of a tensor -> the name under which it was published; a published name stays."""
    rules, words = (NAFNET, NAFNET_WORDS) if backbone == "nafnet" else (RESTORMER, WORDS)
    for pattern, replacement in FUSION + rules:
        if found := re.search(pattern, name):
            i = int(found[found.lastindex]) if "{" in replacement else 0
            name = re.sub(pattern, replacement.format(l=i + 1, m=i + 2, k=3 - i), name)
    return ".".join(words.get(word, word) for word in name.split("."))


def infer(tensors, name):
    """The settings that names, ours or published, and shapes imply. Raises KeyError for a name that is missing."""
    naf = any(n.startswith(("intro.", "decoder.middle.")) for n in tensors)
    shapes = {published_name(n, "nafnet" if naf else None): t.shape for n, t in tensors.items()}
    family = next((f for f, first in FAMILIES.items() if any(n.startswith(first) for n in shapes)), None)
    if family is None:
        own = "weights of a network of your own are kept by model.save"
        raise ValueError(f"of no known family (names begin {', '.join(sorted(tensors)[:3])}); {own}")
    fusion = "privileged_dictionary1" in shapes
    if fusion and "encoder.embed.weight" in tensors:
        text = "cannot be told from a state dict, and is taken as False: keep models with model.save"
        warnings.warn(f"{name}: the setting identity_start {text}", stacklevel=3)

    def count(part):  # blocks part.0, part.1, ...
        blocks = {m[0] for n in shapes if (m := re.match(rf"{part}\.\d+\.", n))}
        if not blocks:
            raise KeyError(part)
        return len(blocks)

    def each(name, dim, parts=(1, 2, 3)):
        return tuple(shapes[name.format(part)][dim] for part in parts)

    found: dict[str, Any] = dict(backbone=family, fusion=fusion)
    if fusion:
        found["dictionary_size"] = each("privileged_dictionary{}", -1)
        found["read_heads"] = each("p{}_cross.attn.temperature", 0)
        found["write_heads"] = each("cross_p{}.attn.temperature", 0)
    if family == "promptir":  # maps (5, C, S, S)
        found["prompt_channels"] = each("prompt{}.prompt_param", 1)
        found["prompt_size"] = each("prompt{}.prompt_param", 3)
    if family == "nafnet":
        found["blocks"] = tuple(count(f"encoders.{i}") for i in range(4))
        found["decoder_blocks"] = tuple(count(f"decoders.{i}") for i in range(4))
        return found | dict(middle=count("middle_blks"), dim=shapes["intro.weight"][0])
    levels = ["encoder_level1", "encoder_level2", "encoder_level3", "latent"]
    found |= dict(dim=shapes["patch_embed.proj.weight"][0], heads=each("{}.0.attn.temperature", 0, levels))
    found |= dict(blocks=tuple(map(count, levels)), refinement=count("refinement"))
    # the shortest number e with int(e * dim) == hidden everywhere: 2.66 in all published networks
    ffns = [s for n, s in shapes.items() if n.endswith("ffn.project_in.weight") and "cross" not in n]  # (2 hidden, dim)
    low, high = max(s[0] // 2 / s[1] for s in ffns), min((s[0] // 2 + 1) / s[1] for s in ffns)
    rounded = (round((low + high) / 2, digits) for digits in range(1, 17))
    return found | dict(expansion=next((e for e in rounded if low <= e < high), low))
