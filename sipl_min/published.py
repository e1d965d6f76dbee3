"""Weights published under other names: PromptIR, Restormer, AdaIR and NAFNet, and SIPL on PromptIR and on AdaIR."""

import os
import re
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from .files import InputError, Name
from .settings import Settings
from .sipl import SIPL

# Our name -> the published one: rules applied in this order; in a replacement, {1} is the number found plus one.
# l = 1, 2, 3 is the scale 1/2, 1/4, 1/8; our lists count from 0.
RULES = [
    (r"^fusion\.(\d)\.dictionary", "privileged_dictionary{1}"),
    (r"^fusion\.(\d)\.read\.", "p{1}_cross."),
    (r"^fusion\.(\d)\.write\.", "cross_p{1}."),
    (r"(cross.*)\.norm_query\.", r"\1.norm11.body."),
    (r"(cross.*)\.norm_context\.", r"\1.norm12.body."),
    (r"(cross.*)\.norm_ffn\.", r"\1.norm2.body."),
    (r"(cross[^.]*)\.(temperature|q|kv|out)\b", r"\1.attn.\2"),
    (r"^encoder\.embed", "patch_embed.proj"),
    (r"^encoder\.levels\.3", "latent"),
    (r"^(encoder|decoder)\.levels\.(\d)", r"\1_level{2}"),
    (r"^encoder\.down\.0", "down1_2.body"),
    (r"^encoder\.down\.1", "down2_3.body"),
    (r"^encoder\.down\.2", "down3_4.body"),
    (r"^decoder\.up\.0", "up2_1.body"),
    (r"^decoder\.up\.1", "up3_2.body"),
    (r"^decoder\.up\.2", "up4_3.body"),
    (r"^decoder\.merge\.(\d)", "reduce_chan_level{1}"),
    (r"^decoder\.prompts\.(\d)\.maps", "prompt{1}.prompt_param"),
    (r"^decoder\.prompts\.(\d)\.choose", "prompt{1}.linear_layer"),
    (r"^decoder\.prompts\.(\d)\.conv", "prompt{1}.conv3x3"),
    (r"^decoder\.prompts\.(\d)\.reduce", "reduce_noise_level{1}"),
    (r"^decoder\.prompts\.(\d)\.block", "noise_level{1}"),
    # AdaIR: fre1 sits at the latent; what it calls channel_cross_l works on the high frequencies
    (r"^decoder\.frequency\.0", "fre3"),
    (r"^decoder\.frequency\.1", "fre2"),
    (r"^decoder\.frequency\.2", "fre1"),
    (r"^(fre\d)\.embed", r"\1.conv1"),
    (r"^(fre\d)\.rate", r"\1.rate_conv"),
    (r"^(fre\d)\.high", r"\1.channel_cross_l"),
    (r"^(fre\d)\.low", r"\1.channel_cross_h"),
    (r"^(fre\d)\.merge", r"\1.channel_cross_agg"),
    (r"^(fre\d)\.where", r"\1.frequency_refine.SpatialGate.spatial"),
    (r"^(fre\d)\.which", r"\1.frequency_refine.ChannelGate.mlp"),
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
RULES_NAFNET = [
    (r"^encoder\.embed\.", "intro."),
    (r"^encoder\.levels\.", "encoders."),
    (r"^encoder\.down\.", "downs."),
    (r"^decoder\.down\.", "downs.3."),
    (r"^decoder\.middle\.", "middle_blks."),
    (r"^decoder\.up\.", "ups."),
    (r"^decoder\.levels\.", "decoders."),
    (r"^decoder\.output\.", "ending."),
    (r"\.inner\.(\d)\.", ".conv{1}."),
    (r"\.out\.", ".conv3."),
    (r"\.channels\.", ".sca.1."),
    (r"\.ffn_inner\.", ".conv4."),
    (r"\.ffn_out\.", ".conv5."),
]
# In the releases of these families, connected to nothing.
UNUSED = {
    "PromptIR": r"^(chnl_reduce|reduce_noise_channel_)\d\.",
    "AdaIR": r"^(chnl_reduce\d|fre\d\.(conv|score_gen))\.",
}
# Names that only one family has; the first that fits tells.
MARKS = {
    "NAFNet": r"^(intro|ending|encoders|middle_blks)\.",
    "AdaIR": r"^fre\d\.",
    "PromptIR": r"^(prompt|noise_level)\d\.",
    "Restormer": r"^(patch_embed|encoder_level\d|latent)\.",
}


def from_published(source: Name | dict[str, torch.Tensor]) -> SIPL:
    """A `SIPL` with published weights; a plain backbone (fusion=False) where the weights are a plain backbone's.

    Args:
        source: a state dict, or the path of a .safetensors or PyTorch checkpoint. Wrappers are taken off: Lightning's
            (`state_dict`, `net.`), BasicSR's (`params_ema`, `params`), DataParallel's (`module.`) and torch.compile's.
    Depth, width, heads, prompts and dictionaries follow from the shapes. No code in a file is ever run.
    Raises InputError where the file is damaged, the family unknown, or names are missing or left over.
    """
    weights = unwrap(source if isinstance(source, dict) else read(source))
    family, sipl = recognise(weights)
    backbone, looks = family.lower(), f"these look like weights of {'SIPL + ' * sipl}{family}, but"
    if family in UNUSED:
        weights = {name: t for name, t in weights.items() if not re.match(UNUSED[family], name)}
    try:
        model = SIPL("paper", **(infer_nafnet(weights) if family == "NAFNet" else infer(weights, family, sipl)))
    except KeyError as e:
        raise InputError(f"{looks} {e.args[0]} is missing") from e
    except InputError as e:
        raise InputError(f"{looks} {e}") from e
    except (IndexError, ZeroDivisionError, ValueError) as e:
        raise InputError(f"{looks} their shapes do not fit together: is the file damaged, or changed?") from e
    own = model.state_dict()
    names = {published_name(name, backbone): name for name in own}
    shapes = {name: own[names[name]].shape for name in names}
    wrong = {"missing": {*names} - {*weights}, "unexpected": {*weights} - {*names},
             "of another shape": {n for n in {*names} & {*weights} if weights[n].shape != shapes[n]}}  # fmt: skip
    wrong = [f"{len(found)} tensor{'s are' if len(found) > 1 else ' is'} {what}: {', '.join(sorted(found)[:3])}"
             + ", ..." * (len(found) > 3) for what, found in wrong.items() if found]  # fmt: skip
    if wrong:
        raise InputError(f"{looks} {'; '.join(wrong)}")
    model.load_state_dict({ours: weights[name] for name, ours in names.items()})
    return model.eval()


def from_backbone(source: Name | dict[str, torch.Tensor] | SIPL, identity_start: bool = False,
                  **overrides: object) -> SIPL:  # fmt: skip
    """Weights of a plain backbone with new Proxy Fusion around them, ready to fine-tune.

    Args:
        source: what `from_published` takes, or a `SIPL`, of which encoder and decoder are copied.
        identity_start: True makes the untrained first pass equal the backbone's output, to rounding.
        overrides: other settings of Proxy Fusion: dictionary_size, dictionary_std, read_heads, write_heads, aligned.
    """
    plain = source if isinstance(source, SIPL) else from_published(source)
    if not isinstance(plain.settings, Settings):
        raise InputError("this model is wrapped around a network already: load its file with SIPL.load(..., net=...)")
    for name in set(overrides) - {"dictionary_size", "dictionary_std", "read_heads", "write_heads", "aligned"}:
        raise InputError(f"setting {name!r} is not one of Proxy Fusion, and the backbone is given: leave it out")
    settings = asdict(plain.settings) | dict(fusion=True, identity_start=identity_start) | overrides
    model = SIPL("paper", **settings).to(next(plain.parameters()))
    model.encoder.load_state_dict(plain.encoder.state_dict())
    model.decoder.load_state_dict(plain.decoder.state_dict())
    return model


def recognise(weights):
    """The family of a backbone, told by names that only this family has, and whether Proxy Fusion is around it."""
    if any(name.startswith(("encoder.embed.", "fusion.")) for name in weights):
        raise InputError("these weights are this project's own, not published ones: read their file with SIPL.load")
    for family, mark in MARKS.items():
        if any(re.match(mark, name) for name in weights):
            return family, any(re.match(r"privileged_dictionary|p\d_cross|cross_p\d", name) for name in weights)
    raise InputError(f"these weights are of no known family (names begin {', '.join(sorted(weights)[:3])}): "
                     "PromptIR, Restormer, AdaIR, NAFNet, SIPL + PromptIR and SIPL + AdaIR can be read")  # fmt: skip


def read(path):
    """A checkpoint file as it is, without running code that may be in it."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"weights must be a state dict or the path of a file, not {type(path).__name__}")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weights at {str(path)!r}: check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):  # arguments, as training scripts like to keep them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged pickles raise anything
        blocked = re.search(r"GLOBAL ([\w.]+)", str(e))
        raise InputError(f"{str(path)!r} holds no plain weights (" + (
            f"it wants to call {blocked[1]}, which is not done here): save its state dict alone" if blocked
            else f"{type(e).__name__}): is it damaged, or of another kind?")) from e  # fmt: skip


PREFIXES = ("module.", "net.", "model.", "_orig_mod.")  # DataParallel, Lightning, Lightning, torch.compile


def unwrap(weights):
    """Take off what training frameworks put around a state dict."""
    for key in ("state_dict", "model_state_dict", "model", "params_ema", "params"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    weights = weights if isinstance(weights, dict) else {}
    weights = {str(name): t for name, t in weights.items() if isinstance(t, torch.Tensor)}
    while weights and (prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in weights)), None)):
        weights = {name.removeprefix(prefix): t for name, t in weights.items()}
    if not weights:
        raise InputError("there is no tensor in these weights: pass a state dict or a checkpoint of one")
    return weights


def published_name(name, backbone="promptir"):
    """Our name of a tensor -> the name under which it was published."""
    for pattern, replacement in RULES_NAFNET if backbone == "nafnet" else RULES:
        plus = re.search(r"\{(\d)\}", replacement)
        if plus and (found := re.search(pattern, name)):
            replacement = replacement.replace(plus[0], str(int(found[int(plus[1])]) + 1))
        name = re.sub(pattern, replacement, name)
    return name


def count(weights, part):
    """How many blocks `part.0`, `part.1`, ... there are."""
    numbers = {int(m[1]) for n in weights if (m := re.match(rf"{re.escape(part)}\.(\d+)\.", n))}
    for i in range(len(numbers) or 1):
        if i not in numbers:
            raise KeyError(f"{part}.{i}")
    return len(numbers)


def infer(weights, family, sipl):
    """The settings that the shapes of published names imply, for Restormer and what was made of it."""

    def heads(part):
        return weights[f"{part}.temperature"].shape[0]

    levels = ["encoder_level1", "encoder_level2", "encoder_level3", "latent"]
    found = dict(backbone=family.lower(), fusion=sipl, refinement=count(weights, "refinement"))
    found["blocks"] = tuple(count(weights, part) for part in levels)
    found["dim"] = weights["patch_embed.proj.weight"].shape[0]
    found["heads"] = tuple(heads(f"{part}.0.attn") for part in levels)
    found["expansion"] = expansion([(t.shape[1], t.shape[0] // 2) for n, t in weights.items()
                                    if n.endswith("ffn.project_in.weight") and "cross" not in n])  # fmt: skip
    scales = (1, 2, 3)
    if family == "PromptIR":
        shapes = [weights[f"prompt{i}.prompt_param"].shape for i in scales]
        found |= dict(prompt_channels=tuple(s[2] for s in shapes), prompt_size=tuple(s[3] for s in shapes))
    if sipl:
        found["dictionary_size"] = tuple(weights[f"privileged_dictionary{i}"].shape[-1] for i in scales)
        found["read_heads"] = tuple(heads(f"p{i}_cross.attn") for i in scales)
        found["write_heads"] = tuple(heads(f"cross_p{i}.attn") for i in scales)
    return found


def infer_nafnet(weights):
    if "ups.4.0.weight" in weights or "ups.3.0.weight" not in weights:
        raise InputError("not with the four levels that it was published with: only those can be read")
    return dict(backbone="nafnet", fusion=False, dim=weights["intro.weight"].shape[0],
                middle=count(weights, "middle_blks"),
                blocks=tuple(count(weights, f"encoders.{i}") for i in range(4)),
                decoder_blocks=tuple(count(weights, f"decoders.{i}") for i in range(4)))  # fmt: skip


def expansion(widths):
    """The shortest number e with int(dim * e) == hidden for all (dim, hidden): 2.66 in all published networks."""
    low, high = max(hidden / dim for dim, hidden in widths), min((hidden + 1) / dim for dim, hidden in widths)
    for digits in range(1, 12):
        e = round((low + high) / 2, digits)
        if all(int(dim * e) == hidden for dim, hidden in widths):
            return e
    raise InputError("their feed-forward layers have no common expansion: is the file changed?")
