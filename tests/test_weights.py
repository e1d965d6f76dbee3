"""Files as saved, files of earlier versions, and the numbers of the published networks.

`published_shapes.json` holds names and shapes of published checkpoints at reduced depth. The i-th name in sorted order
gets RandomState(i) normal numbers, scaled by the kind of tensor; the input is a sum of two waves. `published.npz` holds
what the authors' networks put out then, thinned: images every second pixel (AdaIR every eighth, its frequency module
every 32nd and every fourth channel, NAFNetLocal every fourth), features every second pixel (AdaIR eighth) and fourth
channel."""

import contextlib
import copy
import functools
import json
import os
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import rand, tiny
from safetensors.torch import load_file, save_file

from sipl_min import SIPL, InputError, sipl, weights
from sipl_min.backbones import BiasFreeNorm, nafnet_local
from sipl_min.fast import accelerate
from sipl_min.files import asset
from sipl_min.sipl import LayerNorm2d
from sipl_min.weights import load

HERE = Path(__file__).parent
SHAPES = json.loads((HERE / "published_shapes.json").read_text(encoding="utf-8"))
FIGURES = np.load(HERE / "published.npz")
SHAPES["restormer_biasfree"] = {n: s for n, s in SHAPES["restormer"].items() if not n.endswith("bias")}
BACKBONES = ("promptir", "restormer", "adair", "nafnet")


@functools.cache
def weights_of(family):
    result = {}
    for i, (name, shape) in enumerate(sorted(SHAPES[family].items())):
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


def made(family):
    """Weights by rule, in a dict of one's own."""
    return dict(weights_of(family))


def waves(h, w, phase=0.0):
    c, y, x = np.meshgrid(range(3), range(h), range(w), indexing="ij")
    image = 0.5 + 0.25 * np.sin(0.11 * x + 0.07 * y + 1.7 * c + phase) + 0.25 * np.sin(0.9 * x - 0.6 * y + c + phase)
    return torch.from_numpy(image.astype(np.float32))[None]


def distance(ours, name, stride=2):
    theirs = torch.from_numpy(FIGURES[name])
    ours = ours[:, ::4] if "feature" in name else ours
    return float((ours[..., ::stride, ::stride] - theirs).abs().max() / theirs.abs().max())


# ----------------------------------------------------------------------------------- the published networks' numbers
@pytest.mark.parametrize("family", ["promptir", "restormer", "restormer_biasfree", "nafnet"])
@torch.no_grad()
def test_backbones_agree_and_start_proxy_fusion(family, tmp_path):
    plain, x = load(made(family)), waves(64, 96)
    for model in (plain, accelerate(copy.deepcopy(plain))):
        assert not model.settings.fusion and model.settings.backbone == family.split("_")[0]
        assert distance(model(x), f"{family}/out") < 1e-5
        if family == "nafnet":
            assert distance(model(waves(60, 90)), "nafnet/padded") < 1e-5
    same, changed = (SIPL.from_backbone(plain, start, dictionary_size=(8, 4, 2)).eval() for start in (True, False))
    x = waves(24, 40)
    expected = plain(x)
    assert torch.allclose(same(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert not torch.allclose(changed(x), expected, rtol=1e-2)
    same.save(tmp_path / "same.safetensors")
    assert torch.equal(load(tmp_path / "same.safetensors").refine(x), same.refine(x))
    next(same.encoder.parameters()).zero_()
    assert torch.equal(plain(x), expected), "copied, not shared"


@torch.no_grad()
def test_nafnet_local_agrees():
    model = nafnet_local(load(made("nafnet")), 64)
    assert distance(model(waves(160, 144)), "nafnet_local/out", 4) < 1e-5
    same = SIPL.from_backbone(model, identity_start=True, dictionary_size=(4, 4, 4))
    expected = model(waves(96, 144))
    assert torch.allclose(same(waves(96, 144)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_sipl_promptir_agrees():
    plain, x, small = load(made("sipl_promptir")), waves(64, 96), waves(60, 90)
    fast, privileged = accelerate(copy.deepcopy(plain)), plain.privileged(waves(64, 96, 0.5))
    found = {f"feature{i}": p for i, p in enumerate(privileged)} | dict(first=plain(x), guided=fast(x, privileged))
    found |= dict(loop2=plain.refine(x, 2, "chain"), padded=fast.refine(small, 2, "chain"))
    distances = {name: distance(value, f"sipl_promptir/{name}") for name, value in found.items()}
    assert max(distances.values()) < 1e-5, distances


@torch.no_grad()
def test_sipl_adair_agrees():
    model = load(made("sipl_adair"))
    privileged = model.privileged(waves(256, 272, 0.5))
    assert max(distance(p, f"sipl_adair/feature{i}", 8) for i, p in enumerate(privileged)) < 1e-5
    assert distance(model(waves(256, 272), privileged), "sipl_adair/guided", 8) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_the_loop_of_sipl_adair_agrees(fast):
    model, x = accelerate(load(made("sipl_adair")), fast), waves(256, 272)
    assert distance(model(x), "sipl_adair/first", 8) < 1e-5
    assert distance(model.refine(x, 2, "chain"), "sipl_adair/loop2", 8) < 1e-5


@pytest.mark.parametrize("h, w, fast", [(392, 526, True), pytest.param(544, 526, False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_frequency_module_agrees_where_its_box_is_not_empty(h, w, fast):
    module = accelerate(load(made("sipl_adair")), fast).decoder.frequency[0]
    y = torch.cat([waves(h, w, float(k)) for k in range(32)], 1)
    assert module.box(module.embed(waves(h, w))).any()
    assert distance(module(y, waves(h, w))[:, ::4], f"adair_frequency/{h}x{w}", stride=32) < 1e-5


# --------------------------------------------------------------------------------------- published files, as they come
def test_wrappers_and_files(tmp_path):
    plain, x = made("restormer"), waves(16, 16)
    expected = load(plain)(x)
    lightning = {f"net.{n}": t for n, t in plain.items()} | {"psnr.total": torch.zeros(1), "loss.vgg.intro.bias": x}
    forms = {
        "lightning.ckpt": {"state_dict": lightning, "epoch": 3, "hyper_parameters": Namespace(lr=1e-4)},
        "basicsr.PTH": {"params_ema": plain, "params": {n: t * 0 for n, t in plain.items()}},
        "parallel.pth.tar": {f"module.{n}": t for n, t in plain.items()},
        "compiled.bin": {"model": {f"module._orig_mod.{n}": t for n, t in plain.items()}, "epoch": 3},
        "double.safetensors": {n: t.double() for n, t in plain.items()},
    }
    save_file(plain, tmp_path / "really.pth")
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    for path in tmp_path.iterdir():
        model = load(str(path), device="cpu")
        assert torch.equal(model(x), expected) and not model.training, path
        assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family, part", [("restormer", "latent"), ("nafnet", "encoders.3")])
def test_depths_and_widths_follow_from_the_shapes(family, part):
    deeper = made(family)
    deeper |= {n.replace(f"{part}.0.", f"{part}.1."): t for n, t in deeper.items() if n.startswith(f"{part}.0.")}
    settings = load(deeper).settings
    assert settings.blocks == (1, 1, 1, 2) and settings.dim == (48 if family == "restormer" else 32)
    assert settings.expansion == 2.66


def drop(prefix):
    return lambda w: [w.pop(n) for n in list(w) if n.startswith(prefix)]


def put(name, *shape):
    return lambda w: w.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("promptir", drop("output"), "Missing .*output.weight"),
        ("promptir", drop("encoder_level1.0.norm1.body.bias"), "Missing .*encoder.levels.0.0.norm1.bias"),
        ("promptir", put("extra", 3), 'Unexpected .*"extra"'),
        ("promptir", drop("latent"), "latent.0.attn.temperature is missing"),
        ("promptir", drop(("patch", "enc", "lat", "pro", "noi")), "of no known family .names begin decoder_level1"),
        ("promptir", put("latent.9.norm1.body.weight", 384), "Missing .*encoder.levels.3.1"),
        ("promptir", put("patch_embed.proj.weight"), "out of range"),
        ("promptir", drop(""), "holds no tensor"),
        ("restormer", put("patch_embed.proj.weight", 48, 6, 3, 3), "size mismatch .*RGB"),
        ("nafnet", drop(("encoders.3", "ups.3", "decoders.3")), "encoders.3 is missing: .* four levels"),
        ("sipl_promptir", drop("privileged_dictionary1"), "Unexpected .*cross_p1"),
    ],
)
def test_wrong_weights_get_one_sentence(family, change, message):
    changed = made(family)
    change(changed)
    with pytest.raises(InputError, match=f"^the state dict: .*{message}") as error:
        load(changed)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_published_file_without_a_tensor_is_refused():
    full = made("promptir")
    used = sorted(name for name in full if not re.match(weights.UNUSED, name))
    for name in np.random.default_rng(0).choice(used, 20, replace=False):
        with pytest.raises(InputError):
            load({k: v for k, v in full.items() if k != name})


# ------------------------------------------------------------------------------------------------------- own files
@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_and_load_give_the_same_model(backbone, tmp_path):
    model, x, path = tiny(backbone=backbone, identity_start=True), rand(1, 3, 16, 16), tmp_path / "m.safetensors"
    model.about = {"recipe": "unroll", "steps": 2}
    model.save(path)
    again = SIPL.load(path)
    assert again.settings == model.settings and again.about == model.about and not again.training
    assert torch.equal(again.refine(x), model.refine(x)) and weights.default_steps(again) == 2
    accelerate(copy.deepcopy(model)).half().save(path)  # channels last in memory, half the size
    again = load(path)
    assert 0 < (again(x) - model(x)).abs().max() < 0.02 * model(x).abs().max()
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    for fusion in (True, False):  # a plain state dict
        model = tiny(backbone=backbone, fusion=fusion)
        assert weights.default_steps(model) == fusion
        told = pytest.warns(UserWarning, match="identity_start cannot be told from a state dict")
        with told if fusion else contextlib.nullcontext():
            again = load({f"module.{n}": t for n, t in model.state_dict().items()})
        assert torch.equal(again(x), model(x))
        torch.nn.init.zeros_(again.encoder.embed.weight)
        assert model.encoder.embed.weight.abs().sum() > 0, "copied, not shared"


class Own(nn.Module):
    """The encoder of a backbone of one's own: a buffer that no file has, a norm of its own name, no blocks."""

    multiple, padding = 8, "reflect"

    def __init__(self, s):
        super().__init__()
        self.steps = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in zip([3, *s.dims[1:]], s.dims[1:]))
        self.norm = LayerNorm2d(s.dims[1])
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5), persistent=False)

    def forward(self, x):
        features = [x]
        for i, step in enumerate(self.steps):
            features.append(step(features[-1] - (0 if i else self.mean)))
        return [x, self.norm(features[1]), *features[2:]]


class OwnDecoder(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.out = nn.Conv2d(s.dims[1], 3, 1)

    def forward(self, x, features, fuse):
        h = [fuse(i, features[i + 1]) for i in (2, 1, 0)]
        return x + F.interpolate(self.out(h[-1]), x.shape[-2:])


def test_a_backbone_of_ones_own_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(sipl.BACKBONES, "own", (Own, OwnDecoder))
    model, x = SIPL("paper", backbone="own", dim=8, fusion=False), rand(1, 3, 16, 24)
    model.save(tmp_path / "own.safetensors")
    state = torch.get_rng_state()
    assert torch.equal(load(tmp_path / "own.safetensors")(x), model(x))
    assert torch.equal(torch.get_rng_state(), state), "loading draws no random number"
    with pytest.raises(InputError, match="own.safetensors': it holds no network wrapped by SIPL.wrap: leave out net"):
        load(tmp_path / "own.safetensors", net=nn.Identity())


def test_folders_and_names(tmp_path):
    model, x = tiny(), rand(1, 3, 16, 16)
    model.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["dim"] == 8 and config["about"] == {}
    assert torch.equal(SIPL.from_pretrained(tmp_path / "folder").refine(x), model.refine(x))
    for nowhere in ("nowhere.pth", tmp_path, "nanoo", "org/name"):
        with pytest.raises(InputError, match="no such file: check the path, or use one of nano, nano-authors"):
            load(nowhere)


def test_training_checkpoints_load(tmp_path):
    model, x, path = tiny(identity_start=True), rand(1, 3, 16, 16), tmp_path / "checkpoint.pt"
    run = dict(settings=json.loads(json.dumps(vars(model.settings))), recipe="unroll", steps=2000)
    state = dict(run=run, step=7, model=model.state_dict(), optimizer={"state": {}})
    average = torch.optim.swa_utils.AveragedModel(model).state_dict()
    average["module.decoder.output.weight"] = torch.zeros_like(average["module.decoder.output.weight"])
    old = {n.removeprefix("module."): t for n, t in average.items()}  # of version 0.1
    for content, expected in ((state, model(x)), (state | dict(average=average), x), (state | dict(average=old), x)):
        torch.save(content, path)
        again = load(path)
        assert torch.allclose(again(x), expected, rtol=0, atol=1e-6) and again.about == {"recipe": "unroll"}


def test_files_of_earlier_versions(tmp_path):
    model, x = tiny(backbone="adair"), rand(1, 3, 16, 16)
    old = {"aligned.0.weight": torch.zeros(16, 16, 1, 1)}
    for n, t in model.state_dict().items():
        old[n.replace("spatial_gate", "where").replace("channel_gate", "which")] = t
    header = {"version": 1, "settings": vars(model.settings) | dict(aligned=True), "crc32": 5}
    save_file(old, tmp_path / "old.safetensors", {"sipl_min": json.dumps(header)})
    with pytest.warns(UserWarning, match=r"aligned.\* are no longer part of the network"):
        assert torch.equal(load(tmp_path / "old.safetensors").refine(x), model.refine(x))
    for n, t in load("nano").state_dict().items():
        assert torch.equal(t, load_file(asset("nano.safetensors"))[n]), n


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    tiny().save(path)
    before = path.read_bytes()

    def full(name, content):
        with name.open("wb") as f:
            f.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        tiny().save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(blocks=(10**9, 1, 1, 1)), "more blocks than it has tensors"),
        (dict(prompt_size=(10**6, 10**6, 10**6)), "size mismatch"),
        (dict(depth=3), "unexpected keyword argument 'depth'"),
        (dict(heads=("a", 1, 1, 1)), "pass whole weights"),
        (dict(backbone="mamba"), "its backbone .mamba. is not known here: enter it into sipl.BACKBONES"),
        (dict(fusion=False), "Unexpected .*fusion"),
    ],
)
def test_forged_settings_take_no_memory(changes, message, tmp_path):
    """Terabytes of prompts, or a billion blocks, would end in another error, or never."""
    model, path = tiny(), tmp_path / "forged.safetensors"
    save_file(model.state_dict(), path, {"sipl_min": json.dumps({"settings": vars(model.settings) | changes})})
    with pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.filterwarnings("ignore:.*identity_start")
def test_damaged_files_load_or_get_one_sentence(tmp_path, counted):
    path, rng, refused, model = tmp_path / "w.pth", np.random.default_rng(0), 0, tiny()
    model.save(path)
    own = path.read_bytes()
    files = [b"", own[:8], own[:9], b"a text\n", b"PK"] + [own[: rng.integers(len(own))] for _ in range(30)]
    for place in rng.integers(8 * 3000, size=60):
        bad = bytearray(own)
        bad[place // 8] ^= 1 << (place % 8)  # in the header
        files.append(bytes(bad))
    for content in files:
        path.write_bytes(content)
        try:
            loaded = load(path)
        except InputError as e:
            assert str(e) and "\n" not in str(e) and len(str(e)) < 500, str(e)
            refused += 1
        else:
            assert loaded.state_dict().keys() == model.state_dict().keys()
    assert refused > 0.6 * len(files)
    counted("faults in weight files (cut, one bit turned): refused, or a whole model", len(files))


class Trap:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_no_file_runs_code_and_anything_but_weights_gets_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = r"it wants to call \w+.system, which is not done here"
    cases = [(c, trap) for c in ({"state_dict": Trap()}, Trap(), {"run": {"settings": Trap()}, "model": {}})]
    odd = (torch.zeros(3), [1, 2], None, "text", {"state_dict": {"a": 1}}, {"run": {}, "model": {}})
    for content, message in [*cases, *((c, "holds no tensor") for c in odd)]:
        torch.save(content, "odd.ckpt")
        with pytest.raises(InputError, match=message) as error:
            load("odd.ckpt")
        assert "weights_only" not in str(error.value), "no advice to run code"
    assert not Path("evil").exists()
    save_file({"a": torch.ones(1)}, "odd.safetensors", {"sipl_min": "{"})
    with pytest.raises(InputError, match="not readable"):
        load("odd.safetensors")


def test_from_backbone_is_ready_to_fine_tune():
    model = SIPL.from_backbone(tiny(fusion=False).requires_grad_(False))
    assert model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(InputError, match="setting 'dim' is not one of Proxy Fusion"):
        SIPL.from_backbone(model, dim=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_and_local_means_in_other_precisions(dtype):
    norm, x = BiasFreeNorm(8), (1e4 * rand(1, 8, 6, 7) + 3e4).to(dtype)
    torch.testing.assert_close(norm.to(dtype)(x).float(), norm.float()(x.float()), rtol=1e-2, atol=0)
    block = nafnet_local(tiny(backbone="nafnet", fusion=False), 16).encoder.levels[0][0]
    x = (6e4 * rand(1, 8, 60, 70)).to(dtype)
    torch.testing.assert_close(block.pool(x).float(), block.pool(x.float()), rtol=1e-2, atol=0)
