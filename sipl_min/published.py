"""Weights that were published under other names: PromptIR, Restormer, and SIPL + PromptIR, at any depth and width."""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .files import InputError
from .sipl import SIPL

# Published name -> ours, applied in this order. l = 1, 2, 3 is the scale 1/2, 1/4, 1/8; our lists count from 0.
RENAME = [
    (r"^privileged_dictionary(\d)$", lambda m: f"fusion.{int(m[1]) - 1}.dictionary"),
    (r"^p(\d)_cross\.", lambda m: f"fusion.{int(m[1]) - 1}.read."),
    (r"^cross_p(\d)\.", lambda m: f"fusion.{int(m[1]) - 1}.write."),
    (r"^(fusion.*)\.norm11\.body", r"\1.norm_query"),
    (r"^(fusion.*)\.norm12\.body", r"\1.norm_context"),
    (r"^(fusion.*)\.norm2\.body", r"\1.norm_ffn"),
    (r"^(fusion.*)\.attn\.", r"\1."),
    (r"^patch_embed\.proj", "embed"),
    (r"^(encoder|decoder)_level(\d)", lambda m: f"{m[1]}.{int(m[2]) - 1}"),
    (r"^latent", "encoder.3"),
    (r"^(down)(\d)_\d\.body", lambda m: f"down.{int(m[2]) - 1}"),
    (r"^up(\d)_\d\.body", lambda m: f"up.{int(m[1]) - 2}"),
    (r"^reduce_chan_level(\d)", lambda m: f"merge.{int(m[1]) - 1}"),
    (r"^prompt(\d)\.prompt_param", lambda m: f"prompts.{int(m[1]) - 1}.maps"),
    (r"^prompt(\d)\.linear_layer", lambda m: f"prompts.{int(m[1]) - 1}.choose"),
    (r"^prompt(\d)\.conv3x3", lambda m: f"prompts.{int(m[1]) - 1}.conv"),
    (r"^reduce_noise_level(\d)", lambda m: f"prompts.{int(m[1]) - 1}.reduce"),
    (r"^noise_level(\d)", lambda m: f"prompts.{int(m[1]) - 1}.block"),
    (r"\.(norm\d)\.body", r".\1"),
    (r"\.attn\.", ".attention."),
    (r"\.(q|kv|qkv)_dwconv\.", r".\1.1."),
    (r"\.(q|kv|qkv)\.weight$", r".\1.0.weight"),
    (r"\.project_in\.", ".inner.0."),
    (r"\.ffn\.dwconv\.", ".ffn.inner.1."),
    (r"\.project_out\.", ".out."),
]
UNUSED = re.compile(r"^(chnl_reduce|reduce_noise_channel_)\d\.")  # in PromptIR's release, connected to nothing


def from_published(source):
    """A `SIPL` with published weights; a plain backbone (fusion=False) where the weights are a plain backbone's.

    Args:
        source: a state dict, or the path of a .safetensors or PyTorch checkpoint. Wrappers are taken off: Lightning's
            (`state_dict`, `net.`), BasicSR's (`params_ema`, `params`) and DataParallel's (`module.`).
    Depth, width, heads, prompts and dictionaries follow from the shapes. No code in a file is ever run.
    Raises InputError where the file is damaged, the family unknown, or names are missing or left over.
    """
    weights = unwrap(source if isinstance(source, dict) else read(source))
    weights = {name: t for name, t in weights.items() if not UNUSED.match(name)}
    if "patch_embed.proj.weight" not in weights:
        raise InputError(f"these weights are of no known family (names begin {', '.join(sorted(weights)[:3])}): "
                         "PromptIR, Restormer and SIPL + PromptIR can be read")  # fmt: skip
    family = "SIPL + " * ("privileged_dictionary1" in weights)
    family += "PromptIR" if "prompt1.prompt_param" in weights else "Restormer"
    try:
        model = SIPL("paper", **infer(weights))
    except (KeyError, IndexError) as e:
        raise InputError(f"these look like weights of {family}, but {e.args[0]} is missing") from e
    renamed = {rename(name): (name, t) for name, t in weights.items()}
    own = model.state_dict()
    missing, extra = sorted(set(own) - set(renamed)), sorted(renamed[n][0] for n in set(renamed) - set(own))
    wrong = sorted(renamed[n][0] for n in set(renamed) & set(own) if renamed[n][1].shape != own[n].shape)
    for what, names in (("are missing", missing), ("are unexpected", extra), ("have another shape", wrong)):
        if names:
            raise InputError(f"these look like weights of {family}, but {len(names)} tensors {what}: "
                             f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")  # fmt: skip
    model.load_state_dict({name: t for name, (_, t) in renamed.items()})
    return model.eval()


def read(path):
    """A checkpoint file as it is, without running code that may be in it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weights at {str(path)!r}: check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as e:
        reason = str(e).split("\n")[0]
        raise InputError(f"{str(path)!r} holds no plain weights ({reason}): damaged, or a file that runs code?") from e


def unwrap(weights):
    """Take off what training frameworks put around a state dict."""
    for key in ("state_dict", "params_ema", "params"):
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    weights = {str(name): t for name, t in weights.items() if isinstance(t, torch.Tensor)}
    for prefix in ("module.", "net.", "module."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: t for name, t in weights.items()}
    if not weights:
        raise InputError("there is no tensor in these weights: pass a state dict or a checkpoint of one")
    return weights


def rename(name):
    for pattern, replacement in RENAME:
        name = re.sub(pattern, replacement, name)
    return name


def infer(weights):
    """The settings that the shapes of published names imply."""

    def count(part):
        return 1 + max(int(m[1]) for n in weights if (m := re.match(rf"{part}\.(\d+)\.", n)))

    def heads(part):
        return weights[f"{part}.temperature"].shape[0]

    try:
        levels = ["encoder_level1", "encoder_level2", "encoder_level3", "latent"]
        found = dict(blocks=tuple(map(count, levels)), refinement=count("refinement"))
    except ValueError as e:  # max() of nothing
        raise KeyError("a level of encoder, latent or refinement") from e
    found |= dict(dim=weights["patch_embed.proj.weight"].shape[0], prompts="prompt1.prompt_param" in weights)
    found["heads"] = tuple(heads(f"{level}.0.attn") for level in levels)
    found["expansion"] = expansion([(t.shape[1], t.shape[0] // 2) for n, t in weights.items()
                                    if n.endswith("ffn.project_in.weight") and "cross" not in n])  # fmt: skip
    scales = (1, 2, 3)
    if found["prompts"]:
        shapes = [weights[f"prompt{i}.prompt_param"].shape for i in scales]
        found |= dict(prompt_channels=tuple(s[2] for s in shapes), prompt_size=tuple(s[3] for s in shapes))
    found["fusion"] = "privileged_dictionary1" in weights
    if found["fusion"]:
        found["dictionary_size"] = tuple(weights[f"privileged_dictionary{i}"].shape[-1] for i in scales)
        found["read_heads"] = tuple(heads(f"p{i}_cross.attn") for i in scales)
        found["write_heads"] = tuple(heads(f"cross_p{i}.attn") for i in scales)
    return found


def expansion(widths):
    """The shortest number e with int(dim * e) == hidden for all (dim, hidden): 2.66 in all published networks."""
    low, high = max(hidden / dim for dim, hidden in widths), min((hidden + 1) / dim for dim, hidden in widths)
    for digits in range(1, 12):
        e = round((low + high) / 2, digits)
        if all(int(dim * e) == hidden for dim, hidden in widths):
            return e
    raise InputError("the feed-forward layers of these weights have no common expansion")
