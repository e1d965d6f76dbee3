"""The project's own weight files: one safetensors file with the settings inside, written whole, read without code."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import InputError, asset, whole

INCLUDED = ("nano", "nano-authors")  # trained weights in data/: ours, and those of the released recipe


def included(name):
    """Path of weights that come with the project. Raises InputError for an unknown name."""
    if name not in INCLUDED:
        raise InputError(f"no weights {name!r} come with the project: choose one of {', '.join(INCLUDED)}")
    return asset(f"{name.replace('-', '_')}.safetensors")


def save(model, path):
    """Write weights and settings of a `SIPL` to one file (to a temporary name first, then renamed)."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    header = {"version": 1, "settings": asdict(model.settings), "crc32": checksum(tensors)}
    with whole(path) as temporary:
        save_file(tensors, temporary, {"sipl_min": json.dumps(header)})


def checksum(tensors):
    """One number for all weights, so that a bit that fell over on some disk is noticed."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return crc


def load(path, net=None):
    """The model of a file that `save` wrote. Raises InputError where it is missing, damaged or not ours."""
    from .sipl import SIPL  # not above: that file uses this one
    from .wrap import rebuild

    name = repr(str(path))
    if not Path(path).is_file():
        raise InputError(f"no weights at {name}: check the path")
    try:
        with safe_open(path, framework="pt") as f:
            header, tensors = f.metadata() or {}, {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(f"{name} is not a whole safetensors file ({str(e)[:120]}): copy or save it again") from e
    if "sipl_min" not in header:
        raise InputError(f"{name} was not written by model.save: pass a file that was, or try from_published")
    try:
        header = json.loads(header["sipl_min"])
        if header["version"] != 1:
            raise InputError(f"{name} has file version {header['version']}, this sipl_min reads 1: update sipl_min")
        if header.get("crc32", crc := checksum(tensors)) != crc:
            raise InputError(f"{name} is damaged, its weights are not those that were saved: copy or save it again")
        wrapped = "encoder" in header["settings"]
        model = rebuild(net, header["settings"], name) if wrapped else SIPL("paper", **header["settings"])
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as e:
        raise InputError(f"{name} has a damaged header ({e}): copy or save it again") from e
    own = {key: t.shape for key, t in model.state_dict().items()}
    wrong = sorted(k for k in {*own, *tensors} if k not in tensors or own.get(k) != tensors[k].shape)
    if wrong:
        raise InputError(f"{name} does not match its own settings at {', '.join(wrong[:3])} ({len(wrong)} in all): "
                         + ("pass the network that it was saved around" if wrapped else "save it again"))  # fmt: skip
    model.load_state_dict(tensors)
    return model
