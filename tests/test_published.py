"""The same numbers as the published networks, for weights that a rule makes from their names.

`published_shapes.json` holds names and shapes of published checkpoints at reduced depth. The i-th name in sorted order
gets RandomState(i) normal numbers, scaled by the kind of tensor; the input is a sum of two waves. `published.npz` holds
what the authors' networks put out then, every second pixel (and every fourth channel of features).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sipl_min import SIPL, InputError, from_published
from sipl_min.published import rename

HERE = Path(__file__).parent
SHAPES = json.loads((HERE / "published_shapes.json").read_text())
FIGURES = np.load(HERE / "published.npz")
FAMILIES = ["sipl_promptir", "promptir", "restormer"]


def weights(family, shapes=None):
    result = {}
    shapes = shapes or SHAPES[family]
    for i, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        z = np.random.RandomState(i).standard_normal(shape)
        if name.endswith("temperature"):
            z = 1 + 0.2 * z
        elif "norm" in name and name.endswith("weight"):
            z = 1 + 0.1 * z
        elif len(shape) == 1:
            z = 0.05 * z
        elif "prompt_param" in name or "privileged_dictionary" in name:
            z = 0.5 * z
        else:
            z = 1.2 * z / np.sqrt(np.prod(shape[1:]))
        result[name] = torch.from_numpy(z.astype(np.float32))
    return result


def waves(h, w, phase=0.0):
    c, y, x = np.meshgrid(range(3), range(h), range(w), indexing="ij")
    image = 0.5 + 0.25 * np.sin(0.11 * x + 0.07 * y + 1.7 * c + phase) + 0.25 * np.sin(0.9 * x - 0.6 * y + c + phase)
    return torch.from_numpy(image.astype(np.float32))[None]


def distance(ours, name):
    theirs = torch.from_numpy(FIGURES[name])
    ours = ours[:, ::4] if "feature" in name else ours
    return float((ours[..., ::2, ::2] - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", ["promptir", "restormer"])
@torch.no_grad()
def test_plain_backbones_agree(family):
    model = from_published(weights(family))
    assert not model.settings.fusion and model.settings.prompts == (family == "promptir")
    assert distance(model(waves(64, 96)), f"{family}/out") < 1e-5


@torch.no_grad()
def test_sipl_promptir_agrees():
    model = from_published(weights("sipl_promptir"))
    x, privileged = waves(64, 96), model.privileged(waves(64, 96, 0.5))
    found = {f"feature{i}": p for i, p in enumerate(privileged)}
    found |= dict(first=model(x), guided=model(x, privileged), loop2=model.refine(x, 2, feedback="chain"))
    found["padded"] = model.refine(waves(60, 90), 2, feedback="chain")
    distances = {name: distance(value, f"sipl_promptir/{name}") for name, value in found.items()}
    assert len(distances) == 7 and max(distances.values()) < 1e-5, distances


def test_wrappers_and_files(tmp_path):
    plain = weights("promptir")
    x = waves(16, 16)
    expected = from_published(plain)(x)
    forms = {
        "lightning.ckpt": {"state_dict": {f"net.{n}": t for n, t in plain.items()}, "epoch": 3},
        "basicsr.pth": {"params_ema": plain, "params": {n: t * 0 for n, t in plain.items()}},
        "parallel.pt": {f"module.{n}": t for n, t in plain.items()},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(from_published(tmp_path / name)(x), expected), name


def test_other_depths_and_widths_follow_from_the_shapes():
    shapes = SHAPES["restormer"]
    deeper = {n.replace("latent.0.", "latent.1."): s for n, s in shapes.items() if n.startswith("latent.0.")}
    model = from_published(weights("", shapes | deeper))
    assert model.settings.blocks == (1, 1, 1, 2) and model.settings.expansion == 2.66
    own = SIPL("nano", fusion=False, prompts=False)  # another width: under published names by inverting the renaming
    names = {rename(n): n for n in shapes}
    again = from_published({names[n]: t for n, t in own.state_dict().items()})
    x = waves(16, 24)
    assert again.settings.dim == own.settings.dim == 16 and torch.equal(again(x), own(x))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("output.weight"), "look like weights of PromptIR, but 1 tensors are missing: output.weight"),
        (lambda w: w.update(extra=torch.zeros(3)), "1 tensors are unexpected: extra"),
        (lambda w: w.update({"output.weight": torch.zeros(3, 9, 3, 3)}), "have another shape: output.weight"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("latent")], "is missing"),
        (lambda w: w.pop("patch_embed.proj.weight"), "of no known family"),
        (lambda w: w.clear(), "there is no tensor"),
    ],
)
def test_wrong_weights_get_one_sentence(change, message):
    changed = weights("promptir")
    change(changed)
    with pytest.raises(InputError, match=message):
        from_published(changed)


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


def test_damaged_files_and_code_are_refused(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "trap.ckpt")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "trap.ckpt").read_bytes()[:99])
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("trap.ckpt", "cut.pth", "text.safetensors"):
        with pytest.raises(InputError, match="holds no plain weights"):
            from_published(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(InputError, match="no weights at"):
        from_published(tmp_path / "nowhere.pth")
