"""Weights on disk: the project's own files, and PromptIR, Restormer, AdaIR, NAFNet and SIPL as they were published.

What a file holds is told by its content, not by its name. Nothing in it is run, and nothing is downloaded."""

import contextlib
import copy
import json
import os
import re
import warnings
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .backbones import BiasFreeNorm, nafnet_local
from .files import InputError, Name, asset, atomic_write
from .sipl import SIPL, LayerNorm2d, Settings
from .wrap import Taps, Wrapped

INCLUDED = ("nano", "nano-authors", "nano-backbone")  # trained weights in data/


def included(name: str) -> Path:
    """Path of weights that come with the project. Raises InputError for a name that is not in INCLUDED."""
    if name not in INCLUDED:
        raise InputError(f"no weights {name!r} come with the project: use one of {', '.join(INCLUDED)}")
    return asset(f"{name}.safetensors")


def default_steps(model: SIPL) -> int:
    """Refinement steps T that suit a model: what its file says, else 1 with Proxy Fusion and 0 without."""
    return getattr(model, "about", {}).get("steps", 1 if model.fusion else 0)


# --------------------------------------------------------------------------------------------------------- saving
def save(model: SIPL, path: Name, dtype: torch.dtype | None = None) -> None:
    """Write weights, settings and `model.about` to one safetensors file, whole or not at all.

    A name without an ending is a folder, which gets model.safetensors, and config.json for people to read.
    With dtype=torch.float16 the file has half the size; `load` makes float32 of it.
    Raises InputError where the place cannot be written."""
    if not Path(path).suffix:
        with atomic_write(Path(path) / "config.json") as temporary:
            temporary.write_text(json.dumps(describe(model), indent=1), encoding="utf-8")
        path = Path(path) / "model.safetensors"
    tensors = {}
    for name, t in model.state_dict().items():
        t = t.to(dtype) if dtype and t.is_floating_point() else t
        tensors[name] = t.detach().cpu().clone(memory_format=torch.contiguous_format)
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, {"sipl_min": json.dumps(describe(model))})
        except SafetensorError as e:  # how safetensors says that the disk is full
            raise OSError(str(e)) from e


def describe(model):
    found = {"settings": asdict(model.settings), "about": getattr(model, "about", {})}
    local = getattr(model.encoder, "training_size", None)  # of NAFNetLocal
    return found | {"training_size": local} if local else found


# -------------------------------------------------------------------------------------------------------- loading
def load(source: Name | dict[str, Any] = "nano", device: Any = None, net: torch.nn.Module | None = None) -> SIPL:
    """A model with trained weights, in float32 and in evaluation mode; a backbone alone where the weights are that.

    Args:
        source: one of INCLUDED; a file of `save` or the folder of `save_pretrained`; a training's `checkpoint.pt`;
            a state dict of ours or a published one, or a file of it with any name, in the wrappers of Lightning,
            BasicSR, DataParallel or torch.compile; or "org/name", of the Hugging Face hub, if it is in its cache.
        net: the network around which a file of `SIPL.wrap` was saved; it gets its weights back, in its own dtype.
    Where no settings come with the weights they follow from the shapes. NAFNetLocal has the weights of NAFNet: see
    `backbones.nafnet_local`. Raises InputError where weights are missing, damaged, or of a kind not known here."""
    name = "the state dict" if isinstance(source, dict) else repr(os.fspath(source))
    tensors, header = (source, {}) if isinstance(source, dict) else read(find(source), name)
    tensors, header = unwrap(tensors, header, name)
    published, claim = str, f"{name} is not what its header says:"
    wrapped = isinstance(header.get("settings"), dict) and "encoder" in header["settings"]
    if wrapped:
        claim = f"{name}: 'net=' must be the network that it was saved around:"
        if net is None:
            raise InputError(f"{name} holds a network wrapped by SIPL.wrap: pass it, SIPL.load(..., net=the_network)")
    else:
        tensors = modernize(tensors, name)
    if not header:
        header, tensors, published, claim = recognize(tensors, name)
    with refusing(claim):
        model = build(header, tensors, net)
        model.about = dict(header.get("about", {}))
        if "training_size" in header:
            nafnet_local(model, header["training_size"])
    compare(tensors, {published(n): t.shape for n, t in model.state_dict().items()}, claim)
    place = next(net.parameters(), torch.empty(0)).device if wrapped else "cpu"
    (model.fusion if wrapped else model).to_empty(device=place)
    model.load_state_dict({n: tensors[published(n)] for n in model.state_dict()})
    return model.to(device).eval()


def find(source):
    """The path of what `load` was given by name."""
    if source in INCLUDED:
        return included(source)
    path = Path(source)
    path = path / "model.safetensors" if path.is_dir() else path
    if path.is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        with contextlib.suppress(Exception):
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(str(source), "model.safetensors", local_files_only=True))
        hub = f"of the Hugging Face hub, `pip install huggingface_hub` and `hf download {source}`"
        raise InputError(f"no weights at {str(path)!r}: check the path or, if this is a model {hub} first")
    raise InputError(f"no weights at {str(path)!r}: check the path, or use one of {', '.join(INCLUDED)}")


def read(path, name):
    """What a file holds, and its header if `save` wrote it; no code in it is run."""
    try:
        arguments = torch.serialization.safe_globals([Namespace])  # as training scripts like to keep them
        with open(path, "rb") as f, arguments:
            if f.read(9)[8:] != b"{":  # no safetensors: these begin with eight bytes for the length of a JSON header
                f.seek(0)
                return torch.load(f, map_location="cpu", weights_only=True), {}
        with safe_open(path, framework="pt") as f:
            tensors, metadata = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}  # noqa: SIM118
        return tensors, dict(json.loads(metadata.get("sipl_min", "{}")))
    except Exception as e:  # damaged files raise anything
        blocked = re.search(r"GLOBAL ([\w.]+)", str(e))
        reason = f"it wants to call {blocked[1]}, which is not done here" if blocked else type(e).__name__
        advice = "save its state dict alone" if blocked else "is it damaged, or of another kind?"
        raise InputError(f"{name} holds no plain weights ({reason}): {advice}") from e


def unwrap(content, header, name):
    """Take off what training frameworks put around a state dict; a checkpoint of our own training has a header."""
    content = content if isinstance(content, dict) else {}
    run = content.get("run")
    if isinstance(run, dict) and isinstance(content.get("model"), dict):
        about = {key: run[key] for key in ("recipe", "suite", "num_steps") if key in run}
        header, average = {"settings": run.get("settings", {}), "about": about}, content.get("average")
        content = average if isinstance(average, dict) else content["model"]  # the average is what was validated
        content = {str(n).removeprefix("module."): t for n, t in content.items() if n != "n_averaged"}
    for key in ("state_dict", "model_state_dict", "model", "params_ema", "params"):
        content = content[key] if isinstance(content.get(key), dict) else content
    tensors = {str(n): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise InputError(f"{name} holds no tensor: pass a state dict, or a checkpoint of one")
    if header:
        return tensors, header
    tensors = {n.replace("_orig_mod.", ""): t for n, t in tensors.items()}
    first = r"((?:.*\.)?)(encoder\.embed|patch_embed\.proj|intro)\.weight"  # what stands before it is a wrapper's
    prefix = min((m[1] for n in tensors if (m := re.fullmatch(first, n))), key=len, default="")
    if prefix and any(n.startswith("fusion.") for n in tensors):
        raise InputError(f"{name} holds a network wrapped by SIPL.wrap without its settings: write it with model.save")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, {}


def modernize(tensors, name):
    """Own names and shapes of earlier versions, and the published shape of prompt maps -> those of today."""
    if any(n.startswith("aligned.") for n in tensors):
        text = "are no longer part of the network and left out; in the included weights they are worth 0.002 dB"
        warnings.warn(f"{name}: the tensors aligned.* {text}", stacklevel=3)
    renamed = {}
    for n, t in tensors.items():
        n = n.replace(".where.", ".spatial_gate.").replace(".which.", ".channel_gate.")  # of AdaIR
        if not n.startswith("aligned."):
            renamed[n] = t[0] if t.ndim == 5 and len(t) == 1 else t  # prompt maps (1, 5, C, S, S)
    return renamed


@contextlib.contextmanager
def refusing(claim):
    """Whatever a strange file raises inside becomes one sentence."""
    try:
        yield
    except Exception as e:
        reason = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e).partition("\n")[0][:200]
        raise InputError(f"{claim} {reason}") from e


def build(header, tensors, net):
    """The model of a header, still on the meta device: there it takes no memory, whatever a file asks for."""
    settings = {n: tuple(v) if isinstance(v, list) else v for n, v in header["settings"].items() if n != "aligned"}
    with torch.device("meta"):
        if "encoder" in settings:
            return Wrapped(net, Taps(**settings))
        s = Settings(**settings)
        if sum(s.blocks) + s.refinement + s.middle + sum(s.decoder_blocks) > len(tensors):
            raise InputError("its settings ask for more blocks than it has tensors")
        model = SIPL("paper", **settings)
    if not any(re.match(r"encoder.*\.norm\d\.(body\.)?bias$", n) for n in tensors):  # Restormer's BiasFree
        for module in [*model.encoder.modules(), *model.decoder.modules()]:
            if isinstance(module, LayerNorm2d):
                module.__class__, module.bias = BiasFreeNorm, None
    return model


def compare(tensors, shapes, claim):
    """Raise InputError unless `tensors` has the names and shapes of `shapes`."""
    wrong = {
        "missing": shapes.keys() - tensors.keys(),
        "unexpected": tensors.keys() - shapes.keys(),
        "of another shape": {n for n in shapes.keys() & tensors.keys() if shapes[n] != tensors[n].shape},
    }
    told = [f"{len(names)} {what} ({', '.join(sorted(names)[:3])})" for what, names in wrong.items() if names]
    if told:
        raise InputError(f"{claim} of its tensors {', '.join(told)}")


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
# Our name -> the published one, by these rules in this order. In a replacement, {l} is the last number found plus one,
# since our lists count from 0 and theirs from 1; {m} is {l} + 1, and {k} counts the other way round, from 3.
FUSION = [
    (r"^fusion\.(\d)\.dictionary", "privileged_dictionary{l}"),
    (r"^fusion\.(\d)\.read\.", "p{l}_cross."),
    (r"^fusion\.(\d)\.write\.", "cross_p{l}."),
    (r"(cross.*)\.norm_query\.", r"\1.norm11.body."),
    (r"(cross.*)\.norm_context\.", r"\1.norm12.body."),
    (r"(cross.*)\.norm_ffn\.", r"\1.norm2.body."),
    (r"(cross[^.]*)\.(temperature|q|kv|out)\b", r"\1.attn.\2"),
]
RESTORMER = [  # and what was made of it: PromptIR, AdaIR
    (r"^encoder\.embed", "patch_embed.proj"),
    (r"^encoder\.levels\.3", "latent"),
    (r"^(encoder|decoder)\.levels\.(\d)", r"\1_level{l}"),
    (r"^encoder\.down\.(\d)", "down{l}_{m}.body"),
    (r"^decoder\.up\.(\d)", "up{m}_{l}.body"),
    (r"^decoder\.merge\.(\d)", "reduce_chan_level{l}"),
    (r"^decoder\.prompts\.(\d)\.maps", "prompt{l}.prompt_param"),
    (r"^decoder\.prompts\.(\d)\.choose", "prompt{l}.linear_layer"),
    (r"^decoder\.prompts\.(\d)\.conv", "prompt{l}.conv3x3"),
    (r"^decoder\.prompts\.(\d)\.reduce", "reduce_noise_level{l}"),
    (r"^decoder\.prompts\.(\d)\.block", "noise_level{l}"),
    (r"^decoder\.frequency\.(\d)", "fre{k}"),
    (r"^(fre\d)\.embed", r"\1.conv1"),
    (r"^(fre\d)\.rate", r"\1.rate_conv"),
    (r"^(fre\d)\.high", r"\1.channel_cross_l"),  # crossed in the original
    (r"^(fre\d)\.low", r"\1.channel_cross_h"),
    (r"^(fre\d)\.merge", r"\1.channel_cross_agg"),
    (r"^(fre\d)\.spatial_gate", r"\1.frequency_refine.SpatialGate.spatial"),
    (r"^(fre\d)\.channel_gate", r"\1.frequency_refine.ChannelGate.mlp"),
    (r"^(fre\d)\.mix", r"\1.frequency_refine.proj"),
    (r"^(fre\d)\.weight_new", r"\1.para1"),
    (r"^(fre\d)\.weight_old", r"\1.para2"),
    (r"^decoder\.", ""),
    (r"\.(norm\d)\.(weight|bias)$", r".\1.body.\2"),
    (r"\.attention\.", ".attn."),
    (r"\.(q|kv|qkv)\.0\.", r".\1."),
    (r"\.(q|kv|qkv)\.1\.", r".\1_dwconv."),
    (r"\.ffn\.inner\.0\.", ".ffn.project_in."),
    (r"\.ffn\.inner\.1\.", ".ffn.dwconv."),
    (r"\.out\.", ".project_out."),
]
NAFNET = [
    (r"^encoder\.embed\.", "intro."),
    (r"^encoder\.levels\.", "encoders."),
    (r"^encoder\.down\.", "downs."),
    (r"^decoder\.down\.", "downs.3."),
    (r"^decoder\.middle\.", "middle_blks."),
    (r"^decoder\.up\.", "ups."),
    (r"^decoder\.levels\.", "decoders."),
    (r"^decoder\.output\.", "ending."),
    (r"\.inner\.(\d)\.", ".conv{l}."),
    (r"\.out\.", ".conv3."),
    (r"\.channels\.", ".sca.1."),
    (r"\.ffn_inner\.", ".conv4."),
    (r"\.ffn_out\.", ".conv5."),
]
MARKS = {  # names that only one family has; the first that fits tells
    "NAFNet": r"(intro|ending|encoders|middle_blks)\.",
    "AdaIR": r"fre\d\.",
    "PromptIR": r"(prompt|noise_level)\d\.",
    "Restormer": r"(patch_embed|encoder_level\d|latent)\.",
}
UNUSED = {  # in the releases, connected to nothing
    "PromptIR": r"(chnl_reduce|reduce_noise_channel_)\d\.",
    "AdaIR": r"(chnl_reduce\d|fre\d\.(conv|score_gen))\.",
}


def published_name(name, nafnet=False):
    """Our name of a tensor -> the name under which it was published."""
    for pattern, replacement in FUSION + (NAFNET if nafnet else RESTORMER):
        if found := re.search(pattern, name):
            i = int(found[found.lastindex]) if "{" in replacement else 0
            name = re.sub(pattern, replacement.format(l=i + 1, m=i + 2, k=3 - i), name)
    return name


def recognize(tensors, name):
    """Tensors without a header -> header, tensors, the function from our names to theirs, and what they seem to be."""
    own = any(n.startswith("encoder.embed.") for n in tensors)
    published = partial(published_name, nafnet=any(n.startswith(("intro.", "decoder.middle.")) for n in tensors))
    shapes = {published(n) if own else n: t.shape for n, t in tensors.items()}
    family = next((f for f, mark in MARKS.items() if any(re.match(mark, n) for n in shapes)), None)
    if family is None:
        known = f"those of {', '.join(MARKS)} can be read, and of SIPL on them"
        raise InputError(f"{name} is of no known family (names begin {', '.join(sorted(shapes)[:3])}): {known}")
    fusion = any(re.match(r"privileged_dictionary|p\d_cross|cross_p\d", n) for n in shapes)
    claim = f"{name} looks like weights of {'SIPL + ' * fusion}{family}, but"
    tensors = {n: t for n, t in tensors.items() if not re.match(UNUSED.get(family, "$"), n)}
    with refusing(claim):
        settings = infer(shapes, family, fusion)
    if own and fusion:
        text = "cannot be told from a state dict, and is taken as False: keep models with model.save"
        warnings.warn(f"{name}: the setting identity_start {text}", stacklevel=3)
    first, last = "patch_embed.proj.weight", "output.weight"
    if not own and family == "Restormer" and shapes[first][1] == 1 and last in tensors:
        warnings.warn(f"{name} is for gray photos: give it three equal channels", stacklevel=3)
        tensors |= {first: tensors[first].repeat(1, 3, 1, 1) / 3, last: tensors[last].repeat(3, 1, 1, 1)}
    return {"settings": settings}, tensors, str if own else published, claim


def infer(shapes, family, fusion):
    """The settings that published names and their shapes imply. Raises KeyError for a name that is missing."""

    def count(part):  # blocks part.0, part.1, ...
        numbers = {int(m[1]) for n in shapes if (m := re.match(rf"{re.escape(part)}\.(\d+)\.", n))}
        if lost := [i for i in range(len(numbers) or 1) if i not in numbers]:
            raise KeyError(f"{part}.{lost[0]}")
        return len(numbers)

    def heads(parts):
        return tuple(shapes[f"{part}.temperature"][0] for part in parts)

    dim, channels, *_ = shapes["intro.weight" if family == "NAFNet" else "patch_embed.proj.weight"]
    if channels != 3 and (family, channels) != ("Restormer", 1):
        variant = " (dual-pixel)" if (family, channels) == ("Restormer", 6) else ""
        raise InputError(f"of a variant with {channels} input channels{variant}: those with 3 can be read")
    found: dict[str, Any] = dict(backbone=family.lower(), fusion=fusion, dim=dim)
    scales = (1, 2, 3)
    if fusion:
        found["dictionary_size"] = tuple(shapes[f"privileged_dictionary{i}"][-1] for i in scales)
        found["read_heads"] = heads(f"p{i}_cross.attn" for i in scales)
        found["write_heads"] = heads(f"cross_p{i}.attn" for i in scales)
    if family == "NAFNet":
        if "ups.4.0.weight" in shapes or "ups.3.0.weight" not in shapes:
            raise InputError("of a variant with more or less than four levels: those with four can be read")
        found["blocks"] = tuple(count(f"encoders.{i}") for i in range(4))
        found["decoder_blocks"] = tuple(count(f"decoders.{i}") for i in range(4))
        return found | dict(middle=count("middle_blks"))
    levels = ["encoder_level1", "encoder_level2", "encoder_level3", "latent"]
    found |= dict(blocks=tuple(map(count, levels)), refinement=count("refinement"))
    found["heads"] = heads(f"{part}.0.attn" for part in levels)
    if family == "PromptIR":
        maps = [shapes[f"prompt{i}.prompt_param"] for i in scales]  # (5, C, S, S)
        found |= dict(prompt_channels=tuple(s[1] for s in maps), prompt_size=tuple(s[3] for s in maps))
    # the shortest number e with int(e * dim) == hidden everywhere: 2.66 in all published networks
    ffns = [s for n, s in shapes.items() if n.endswith("ffn.project_in.weight") and "cross" not in n]  # (2 hidden, dim)
    low, high = max(s[0] // 2 / s[1] for s in ffns), min((s[0] // 2 + 1) / s[1] for s in ffns)
    rounded = (round((low + high) / 2, digits) for digits in range(1, 17))
    return found | dict(expansion=next((e for e in rounded if low <= e < high), low))
