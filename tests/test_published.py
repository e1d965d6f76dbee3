"""The same numbers as the published networks, for weights that a rule makes from their names.

`published_shapes.json` holds names and shapes of published checkpoints at reduced depth. The i-th name in sorted order
gets RandomState(i) normal numbers, scaled by the kind of tensor; the input is a sum of two waves. `published.npz` holds
what the authors' networks put out then, thinned: images every second pixel (AdaIR every eighth, its frequency module
every 32nd and every fourth channel), features every second pixel (AdaIR eighth) and fourth channel.
"""

import contextlib
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from sipl_min import SIPL, InputError, from_published, train
from sipl_min.published import published_name

HERE = Path(__file__).parent
SHAPES = json.loads((HERE / "published_shapes.json").read_text())
FIGURES = np.load(HERE / "published.npz")


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
        elif re.search("prompt_param|privileged_dictionary|(beta|gamma|para1|para2)$", name):
            z = 0.5 * z
        else:
            z = 1.2 * z / np.sqrt(np.prod(shape[1:]))
        result[name] = torch.from_numpy(z.astype(np.float32))
    return result


def waves(h, w, phase=0.0):
    c, y, x = np.meshgrid(range(3), range(h), range(w), indexing="ij")
    image = 0.5 + 0.25 * np.sin(0.11 * x + 0.07 * y + 1.7 * c + phase) + 0.25 * np.sin(0.9 * x - 0.6 * y + c + phase)
    return torch.from_numpy(image.astype(np.float32))[None]


def distance(ours, name, stride=2):
    theirs = torch.from_numpy(FIGURES[name])
    ours = ours[:, ::4] if "feature" in name else ours
    return float((ours[..., ::stride, ::stride] - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", ["promptir", "restormer", "nafnet"])
@torch.no_grad()
def test_plain_backbones_agree(family):
    model = from_published(weights(family))
    assert not model.settings.fusion and model.settings.backbone == family
    assert distance(model(waves(64, 96)), f"{family}/out") < 1e-5
    if family == "nafnet":
        assert distance(model(waves(60, 90)), "nafnet/padded") < 1e-5


@pytest.mark.parametrize("family, h, w, stride", [("sipl_promptir", 64, 96, 2), ("sipl_adair", 256, 272, 8)])
@torch.no_grad()
def test_sipl_agrees(family, h, w, stride):
    model = from_published(weights(family))
    x, privileged = waves(h, w), model.privileged(waves(h, w, 0.5))
    found = {f"feature{i}": p for i, p in enumerate(privileged)}
    found |= dict(first=model(x), guided=model(x, privileged), loop2=model.refine(x, 2, feedback="chain"))
    if family == "sipl_promptir":
        found["padded"] = model.refine(waves(60, 90), 2, feedback="chain")
    distances = {name: distance(value, f"{family}/{name}", stride) for name, value in found.items()}
    assert len(distances) == 6 + ("padded" in found) and max(distances.values()) < 1e-5, distances


@pytest.mark.parametrize("h, w", [(544, 526), (392, 526)])
@torch.no_grad()
def test_the_frequency_module_agrees_where_its_box_is_not_empty(h, w):
    module = from_published(weights("sipl_adair")).decoder.frequency[0]
    y = torch.cat([waves(h, w, float(k)) for k in range(32)], 1)
    assert module.box(module.embed(waves(h, w))).any()
    assert distance(module(y, waves(h, w))[:, ::4], f"adair_frequency/{h}x{w}", stride=32) < 1e-5


def test_wrappers_and_files(tmp_path):
    plain = weights("promptir")
    x = waves(16, 16)
    expected = from_published(plain)(x)
    forms = {
        "lightning.ckpt": {
            "state_dict": {f"net.{n}": t for n, t in plain.items()},
            "epoch": 3,
            "loops": {},
            "optimizer_states": [{"state": {0: {"step": 4}}}],
            "callbacks": {"a": {"best": None}},
            "hyper_parameters": Namespace(lr=1e-4),
        },
        "basicsr.pth": {"params_ema": plain, "params": {n: t * 0 for n, t in plain.items()}},
        "parallel.pt": {f"module.{n}": t for n, t in plain.items()},
        "compiled.pt": {"model": {f"module._orig_mod.{n}": t for n, t in plain.items()}, "epoch": 3},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(from_published(tmp_path / name)(x), expected), name


def test_other_depths_and_widths_follow_from_the_shapes():
    shapes = SHAPES["restormer"]
    deeper = {n.replace("latent.0.", "latent.1."): s for n, s in shapes.items() if n.startswith("latent.0.")}
    model = from_published(weights("", shapes | deeper))
    assert model.settings.blocks == (1, 1, 1, 2) and model.settings.expansion == 2.66
    own = SIPL("nano", fusion=False, backbone="restormer")  # another width
    again = from_published({published_name(n): t for n, t in own.state_dict().items()})
    x = waves(16, 24)
    assert again.settings.dim == own.settings.dim == 16 and torch.equal(again(x), own(x))
    shapes = SHAPES["nafnet"]
    longer = {n.replace("encoders.3.0.", "encoders.3.1."): s for n, s in shapes.items() if "encoders.3.0." in n}
    assert from_published(weights("", shapes | longer)).settings.blocks == (1, 1, 1, 2)
    adair = {n: t for n, t in weights("sipl_adair").items() if "cross_p" not in n and not n.startswith("p")}
    adair["patch_embed.proj.weight"] = weights("sipl_adair")["patch_embed.proj.weight"]
    settings = from_published(adair).settings
    assert settings.backbone == "adair" and not settings.fusion


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("output.weight"), "look like weights of PromptIR, but 1 tensor is missing: output.weight"),
        (lambda w: w.update(extra=torch.zeros(3)), "1 tensor is unexpected: extra"),
        (lambda w: w.update({"output.weight": torch.zeros(3, 9, 3, 3)}), "is of another shape: output.weight"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("latent")], "is missing"),
        (
            lambda w: w.pop("patch_embed.proj.weight"),
            "look like weights of PromptIR, but patch_embed.proj.weight is missing",
        ),
        (lambda w: [w.pop(n) for n in list(w) if n[0] != "d"], "of no known family .names begin decoder_level1"),
        (lambda w: w.clear(), "there is no tensor"),
        (lambda w: w.update({"latent.9.norm1.body.weight": torch.ones(384)}), "latent.1 is missing"),
        (
            lambda w: w.update(end=w.pop("output.weight")),
            "1 tensor is missing: output.weight; 1 tensor is unexpected: end",
        ),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(())}), "their shapes do not fit together"),
        (lambda w: [w.pop(n) for n in list(w) if "prompt1." in n], "of PromptIR, but prompt1.prompt_param is missing"),
    ],
)
def test_wrong_weights_get_one_sentence(change, message):
    changed = weights("promptir")
    change(changed)
    with pytest.raises(InputError, match=message):
        from_published(changed)


def test_the_family_does_not_hang_on_one_tensor():
    changed = weights("sipl_promptir")
    del changed["privileged_dictionary1"]
    with pytest.raises(InputError, match=r"SIPL \+ PromptIR, but privileged_dictionary1 is missing"):
        from_published(changed)
    unused = weights("restormer") | {"chnl_reduce1.weight": torch.ones(3)}
    with pytest.raises(InputError, match="1 tensor is unexpected: chnl_reduce1.weight"):
        from_published(unused)


def test_anything_but_weights_gets_one_sentence(tmp_path):
    for content in (torch.zeros(3), [1, 2], None, 5, "text"):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(InputError, match="there is no tensor in these weights"):
            from_published(tmp_path / "odd.pth")
    for source in (None, 3, [torch.zeros(3)]):
        with pytest.raises(InputError, match="must be a state dict or the path of a file"):
            from_published(source)
    with pytest.raises(InputError, match="no weights at"):
        from_published(tmp_path)


def test_damaged_checkpoints_get_one_sentence(tmp_path):
    """Bit flips raise KeyError, AssertionError and more inside torch.load; a flip in the numbers goes unseen there."""
    torch.save({"state_dict": {f"net.{n}": t[:1] for n, t in weights("nafnet").items()}}, tmp_path / "good.ckpt")
    good = (tmp_path / "good.ckpt").read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):
        bad = bytearray(good if rng.random() < 0.5 else good[: rng.integers(len(good))])
        for place in rng.integers(len(bad), size=5) if len(bad) else ():
            bad[place] ^= 1 << rng.integers(8)
        (tmp_path / "bad.ckpt").write_bytes(bad)
        with contextlib.suppress(InputError):
            from_published(tmp_path / "bad.ckpt")
            continue
        refused += 1
    assert refused == 100  # the shapes of these weights are cut, so even what can be read is refused


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


def test_damaged_files_and_code_are_refused(tmp_path, capsys):
    torch.save({"state_dict": Trap()}, tmp_path / "trap.ckpt")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "trap.ckpt").read_bytes()[:99])
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("trap.ckpt", "cut.pth", "text.safetensors"):
        with pytest.raises(InputError, match="holds no plain weights") as e:
            from_published(tmp_path / name)
        assert "weights_only" not in str(e.value), "no advice to run code"
    with pytest.raises(InputError, match="it wants to call print, which is not done here"):
        from_published(tmp_path / "trap.ckpt")
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(InputError, match="no weights at"):
        from_published(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("family", ["promptir", "restormer", "nafnet"])
@torch.no_grad()
def test_from_backbone_starts_as_the_backbone_where_asked(family):
    plain = from_published(weights(family))
    x = waves(24, 40)
    small = dict(dictionary_size=(8, 4, 2), read_heads=(1, 1, 1), write_heads=(1, 1, 1))
    same, changed = (SIPL.from_backbone(weights(family), start, **small).eval() for start in (True, False))
    assert same.settings.backbone == family and same.settings.dictionary_size == (8, 4, 2)
    expected = plain(x)
    assert torch.allclose(same(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert not torch.allclose(changed(x), expected, rtol=1e-2)
    again = SIPL.from_backbone(plain, identity_start=True)
    assert torch.equal(again.eval()(x), same(x)) and again.settings.dictionary_size == (64, 32, 16)
    with torch.no_grad():
        next(again.encoder.parameters()).zero_()
    assert torch.equal(plain(x), expected), "copied, not shared"
    for part, full in ((same.encoder, plain.encoder), (same.decoder, plain.decoder)):
        assert all(torch.equal(t, full.state_dict()[n]) for n, t in part.state_dict().items())


def test_from_backbone_is_ready_to_fine_tune():
    """With identity_start the loss reaches write at the first step and, through it, everything at the second."""
    model = SIPL.from_backbone(weights("restormer"), identity_start=True, dictionary_size=(4, 4, 4))
    x, y = waves(16, 16), waves(16, 16, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        (train.authors(model, x, y) - y).abs().mean().backward()
        optimizer.step()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent, silent
    with pytest.raises(InputError, match="setting 'dim' is not one of Proxy Fusion"):
        SIPL.from_backbone(model, dim=8)


def test_own_files_are_told_apart(tmp_path):
    SIPL("nano").save(tmp_path / "own.safetensors")
    with pytest.raises(InputError, match="read their file with SIPL.load"):
        from_published(tmp_path / "own.safetensors")
