"""Files as saved, files of earlier versions, and the numbers of the published networks.

`published_shapes.json` holds names and shapes of published checkpoints at reduced depth. The i-th name in sorted order
gets RandomState(i) normal numbers, scaled by the kind of tensor; the input is a sum of two waves. `published.npz` holds
what the authors' networks put out then, thinned: images every second pixel (AdaIR every eighth, its frequency module
every 32nd and every fourth channel, NAFNetLocal every fourth), features every second pixel (AdaIR eighth) and fourth
channel.
"""

import contextlib
import copy
import functools
import json
import os
import re
import sys
import types
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rand, tiny
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sipl_min import SIPL, InputError, weights
from sipl_min.backbones import BiasFreeNorm, nafnet_local
from sipl_min.fast import accelerate
from sipl_min.weights import load

HERE = Path(__file__).parent
SHAPES = json.loads((HERE / "published_shapes.json").read_text(encoding="utf-8"))
FIGURES = np.load(HERE / "published.npz")
SHAPES["restormer_biasfree"] = {n: s for n, s in SHAPES["restormer"].items() if not n.endswith("bias")}
GRAY = {"patch_embed.proj.weight": [48, 1, 3, 3], "output.weight": [1, 96, 3, 3]}
SHAPES["restormer_gray"] = SHAPES["restormer_biasfree"] | GRAY
SHAPES["nafnet_local"] = SHAPES["nafnet"]


def made(shapes):
    """Weights by rule, for a family or for names with shapes."""
    if isinstance(shapes, str):
        return dict(family_weights(shapes))
    result = {}
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


@functools.cache
def family_weights(family):
    return made(SHAPES[family])


def waves(h, w, phase=0.0):
    c, y, x = np.meshgrid(range(3), range(h), range(w), indexing="ij")
    image = 0.5 + 0.25 * np.sin(0.11 * x + 0.07 * y + 1.7 * c + phase) + 0.25 * np.sin(0.9 * x - 0.6 * y + c + phase)
    return torch.from_numpy(image.astype(np.float32))[None]


def distance(ours, name, stride=2):
    theirs = torch.from_numpy(FIGURES[name])
    ours = ours[:, ::4] if "feature" in name else ours
    return float((ours[..., ::stride, ::stride] - theirs).abs().max() / theirs.abs().max())


def plain_and_fast(model):
    return model, accelerate(copy.deepcopy(model))


def sentence(error):
    text = str(error.value)
    assert text and "\n" not in text and len(text) < 400, text
    return text


# ----------------------------------------------------------------------------- the published networks' numbers


@pytest.mark.parametrize("family", ["promptir", "restormer", "restormer_biasfree", "nafnet"])
@torch.no_grad()
def test_backbones_agree(family):
    for model in plain_and_fast(load(made(family))):
        assert not model.settings.fusion and model.settings.backbone == family.split("_")[0]
        assert distance(model(waves(64, 96)), f"{family}/out") < 1e-5
        if family == "nafnet":
            assert distance(model(waves(60, 90)), "nafnet/padded") < 1e-5


@torch.no_grad()
def test_a_gray_restormer_agrees_on_three_equal_channels():
    with pytest.warns(UserWarning, match="is for gray photos"):
        model = load(made("restormer_gray"))
    y = model(waves(64, 96)[:, :1].expand(-1, 3, -1, -1))
    assert distance(y[:, :1], "restormer_gray/out") < 1e-5 and torch.equal(y[:, 0], y[:, 2])


@torch.no_grad()
def test_nafnet_local_agrees_and_its_file_remembers(tmp_path):
    model = nafnet_local(load(made("nafnet")), 64)
    x = waves(160, 144)
    expected = model(x)
    assert distance(expected, "nafnet_local/out", 4) < 1e-5
    model.save(tmp_path / "local.safetensors")
    assert torch.equal(load(tmp_path / "local.safetensors")(x), expected)
    assert distance(accelerate(copy.deepcopy(model))(x), "nafnet_local/out", 4) < 1e-5
    small = SIPL.from_backbone(model, identity_start=True, dictionary_size=(4, 4, 4))(waves(96, 144))
    assert torch.allclose(small, model(waves(96, 144)), rtol=0, atol=1e-5 * float(small.abs().max()))


@pytest.mark.parametrize("family, h, w, stride", [("sipl_promptir", 64, 96, 2), ("sipl_adair", 256, 272, 8)])
@torch.no_grad()
def test_sipl_agrees(family, h, w, stride):
    """AdaIR's loop of eight passes on a large image is a test of its own, since it takes long."""
    plain, fast = plain_and_fast(load(made(family)))
    x, privileged = waves(h, w), plain.privileged(waves(h, w, 0.5))
    found = {f"feature{i}": p for i, p in enumerate(privileged)}
    found |= dict(first=plain(x), guided=fast(x, privileged))
    if family == "sipl_promptir":
        found |= dict(loop2=plain.refine(x, 2, "chain"), padded=fast.refine(waves(60, 90), 2, "chain"))
    distances = {name: distance(value, f"{family}/{name}", stride) for name, value in found.items()}
    assert len(distances) == (7 if family == "sipl_promptir" else 5) and max(distances.values()) < 1e-5, distances


@pytest.mark.slow
@pytest.mark.parametrize("fast", [False, True])
@torch.no_grad()
def test_the_loop_of_sipl_adair_agrees(fast):
    model = accelerate(load(made("sipl_adair")), fast)
    assert distance(model.refine(waves(256, 272), 2, "chain"), "sipl_adair/loop2", 8) < 1e-5


@pytest.mark.parametrize("h, w, fast", [(392, 526, True), pytest.param(544, 526, False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_frequency_module_agrees_where_its_box_is_not_empty(h, w, fast):
    module = accelerate(load(made("sipl_adair")), fast).decoder.frequency[0]
    y = torch.cat([waves(h, w, float(k)) for k in range(32)], 1)
    assert module.box(module.embed(waves(h, w))).any()
    assert distance(module(y, waves(h, w))[:, ::4], f"adair_frequency/{h}x{w}", stride=32) < 1e-5


# --------------------------------------------------------------------------------------- published files, as they come


def test_wrappers_and_files(tmp_path):
    plain = made("restormer")
    x = waves(16, 16)
    expected = load(plain)(x)
    extra = {"psnr.total": torch.zeros(1), "loss.vgg.intro.bias": torch.zeros(3), "net_ema.n": torch.zeros(1)}
    forms = {
        "lightning.ckpt": {
            "state_dict": {f"net.{n}": t for n, t in plain.items()} | extra,
            "epoch": 3,
            "loops": {},
            "optimizer_states": [{"state": {0: {"step": 4}}}],
            "callbacks": {"a": {"best": None}},
            "hyper_parameters": Namespace(lr=1e-4),
        },
        "basicsr.PTH": {"params_ema": plain, "params": {n: t * 0 for n, t in plain.items()}},
        "parallel.pth.tar": {f"module.{n}": t for n, t in plain.items()},
        "compiled.bin": {"model": {f"module._orig_mod.{n}": t for n, t in plain.items()}, "epoch": 3},
        "half.safetensors": {n: t.double() for n, t in plain.items()},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(load(tmp_path / name)(x), expected), name
    save_file(plain, tmp_path / "really.pth")
    model = load(str(tmp_path / "really.pth"), device="cpu")
    assert torch.equal(model(x), expected) and not model.training and default_dtype(model)


def default_dtype(model):
    return {p.dtype for p in model.parameters()} == {torch.float32}


def test_other_depths_and_widths_follow_from_the_shapes():
    shapes = SHAPES["restormer"]
    deeper = {n.replace("latent.0.", "latent.1."): s for n, s in shapes.items() if n.startswith("latent.0.")}
    settings = load(made(shapes | deeper)).settings
    assert settings.blocks == (1, 1, 1, 2) and settings.expansion == 2.66 and settings.dim == 48
    shapes = SHAPES["nafnet"]
    longer = {n.replace("encoders.3.0.", "encoders.3.1."): s for n, s in shapes.items() if "encoders.3.0." in n}
    assert load(made(shapes | longer)).settings.blocks == (1, 1, 1, 2)
    adair = {n: t for n, t in made("sipl_adair").items() if not re.match(r"privileged|p\d_cross|cross_p", n)}
    settings = load(adair).settings
    assert settings.backbone == "adair" and not settings.fusion


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop("output.weight"),
            "looks like weights of PromptIR, but of its tensors 1 missing .output.weight",
        ),
        (lambda w: w.update(extra=torch.zeros(3)), r"1 unexpected \(extra\)"),
        (lambda w: w.update({"output.weight": torch.zeros(3, 9, 3, 3)}), r"1 of another shape \(output.weight\)"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("latent")], "but latent.0 is missing"),
        (lambda w: w.pop("patch_embed.proj.weight"), "PromptIR, but patch_embed.proj.weight is missing"),
        (lambda w: [w.pop(n) for n in list(w) if n[0] != "d"], "of no known family .names begin decoder_level1"),
        (lambda w: w.clear(), "holds no tensor"),
        (lambda w: w.update({"latent.9.norm1.body.weight": torch.ones(384)}), "latent.1 is missing"),
        (lambda w: w.update({"patch_embed.proj.weight": torch.ones(())}), "looks like weights of PromptIR, but"),
        (lambda w: [w.pop(n) for n in list(w) if "prompt1." in n], "of PromptIR, but prompt1.prompt_param is missing"),
        (lambda w: w.pop("encoder_level1.0.norm1.body.bias"), r"1 missing \(encoder_level1.0.norm1.body.bias\)"),
    ],
)
def test_wrong_weights_get_one_sentence(change, message):
    changed = dict(made("promptir"))
    change(changed)
    with pytest.raises(InputError, match=message) as error:
        load(changed)
    sentence(error)


def test_variants_are_named():
    dual = {n: s for n, s in SHAPES["restormer"].items()} | {"patch_embed.proj.weight": [48, 6, 3, 3]}
    with pytest.raises(InputError, match=r"Restormer, but of a variant with 6 input channels \(dual-pixel\)"):
        load(made(dual | {"skip_conv.weight": [96, 48, 1, 1]}))
    fewer = {n: s for n, s in SHAPES["nafnet"].items() if not n.startswith("ups.3.")}
    with pytest.raises(InputError, match="NAFNet, but of a variant with more or less than four levels"):
        load(made(fewer))
    incomplete = dict(made("sipl_promptir"))
    del incomplete["privileged_dictionary1"]
    with pytest.raises(InputError, match=r"SIPL \+ PromptIR, but privileged_dictionary1 is missing"):
        load(incomplete)
    with pytest.raises(InputError, match=r"Restormer, but of its tensors 1 unexpected \(chnl_reduce1.weight\)"):
        load(made("restormer") | {"chnl_reduce1.weight": torch.ones(3)})


def test_a_published_file_without_a_tensor_is_named(counted):
    full = made("promptir")
    used = sorted(name for name in full if "chnl_reduce" not in name and "reduce_noise_channel" not in name)
    names = np.random.default_rng(0).choice(used, 40, replace=False)
    for name in names:
        with pytest.raises(InputError) as error:
            load({k: v for k, v in full.items() if k != name})
        sentence(error)
    counted("published files with a missing tensor: refused in one sentence", len(names))


# ----------------------------------------------------------------------------------------------------- own files


def test_save_and_load_give_the_same_model(tmp_path):
    x = rand(1, 3, 16, 16)
    for backbone in ("promptir", "restormer", "adair", "nafnet"):
        model = tiny(backbone=backbone, identity_start=True)
        model.about = {"recipe": "unroll", "steps": 2}
        model.save(tmp_path / "m.safetensors")
        again = SIPL.load(tmp_path / "m.safetensors")
        assert again.settings == model.settings and again.about == model.about and not again.training
        assert weights.default_steps(again) == 2
        assert torch.equal(again.refine(x), model.refine(x))
        accelerate(model).save(tmp_path / "m.pth")  # channels last in memory
        assert torch.equal(load(tmp_path / "m.pth").refine(x), again.refine(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pth", "m.safetensors"]


def test_default_steps():
    assert weights.default_steps(tiny()) == 1 and weights.default_steps(tiny(fusion=False)) == 0


def test_half_the_size(tmp_path):
    model, path = tiny(), tmp_path / "half.safetensors"
    weights.save(model, path, torch.float16)
    again = load(path)
    assert default_dtype(again) and {t.dtype for t in load_file(path).values()} == {torch.float16}
    x = rand(1, 3, 16, 16)
    assert 0 < (again(x) - model(x)).abs().max() < 0.02 * model(x).abs().max()


def test_folders_and_the_hub(tmp_path, monkeypatch):
    model, x = tiny(), rand(1, 3, 16, 16)
    weights.save(model, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["dim"] == 8 and config["about"] == {}
    assert torch.equal(SIPL.from_pretrained(tmp_path / "folder").refine(x), model.refine(x))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="`pip install huggingface_hub` and `hf download org/name`"):
        load("org/name")

    def cached(repository, name, local_files_only=False):
        assert repository == "org/name" and name == "model.safetensors" and local_files_only, "no download"
        return str(tmp_path / "folder" / name)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=cached))
    assert torch.equal(load("org/name").refine(x), model.refine(x))
    with pytest.raises(InputError, match="hf download org/other"):
        load("org/other")
    for nowhere in ("nowhere.pth", tmp_path, "nanoo"):
        with pytest.raises(InputError, match="no weights at .*: check the path, or use one of nano, nano-authors"):
            load(nowhere)


def test_plain_state_dicts_of_our_own(tmp_path):
    x = rand(1, 3, 16, 16)
    for backbone in ("promptir", "restormer", "adair", "nafnet"):
        for fusion in (True, False):
            model = tiny(backbone=backbone, fusion=fusion)
            path = tmp_path / "state.pth"
            torch.save({f"module.{n}": t for n, t in model.state_dict().items()}, path)
            told = pytest.warns(UserWarning, match="identity_start cannot be told from a state dict")
            with told if fusion else contextlib.nullcontext():
                again = load(path)
            assert torch.equal(again(x), model(x)), backbone
    source = model.state_dict()
    again = load(source)
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert source["encoder.embed.weight"].abs().sum() > 0, "copied, not shared"


def test_training_checkpoints_load(tmp_path):
    model, x = tiny(identity_start=True), rand(1, 3, 16, 16)
    average = torch.optim.swa_utils.AveragedModel(tiny(dim=8, identity_start=True))
    run = dict(settings=json.loads(json.dumps(vars(model.settings))), recipe="unroll", steps=2000)
    state = dict(run=run, step=7, model=model.state_dict(), optimizer={"state": {}})
    torch.save(state, tmp_path / "checkpoint.pt")
    again = load(tmp_path / "checkpoint.pt")
    assert torch.equal(again(x), model(x)) and again.about == {"recipe": "unroll"}
    with torch.no_grad():
        average.module.decoder.output.weight.zero_()
    torch.save(state | dict(average=average.state_dict()), tmp_path / "checkpoint.pt")
    assert torch.allclose(load(tmp_path / "checkpoint.pt")(x), x), "the average is preferred"


def test_files_of_earlier_versions(tmp_path):
    """The included weights, while they are of the format before; and AdaIR, whose frequency modules had other names."""
    for name in ("nano", "nano-authors"):
        state = load_file(weights.included(name))
        aligned = any(n.startswith("aligned") for n in state)
        told = pytest.warns(UserWarning, match=r"aligned.\* are no longer part of the network")
        with told if aligned else contextlib.nullcontext():
            model = load(name)
        for n, t in model.state_dict().items():
            assert torch.equal(t, state[n].reshape(t.shape)), n
    with pytest.raises(InputError, match="use one of nano, nano-authors, nano-backbone"):
        weights.included("mini")
    model = tiny(backbone="adair")
    old = {
        n.replace("spatial_gate", "where").replace("channel_gate", "which"): t for n, t in model.state_dict().items()
    }
    old |= {"aligned.0.weight": torch.zeros(16, 16, 1, 1)}
    header = {"version": 1, "settings": vars(model.settings) | dict(aligned=True), "crc32": 5}
    save_file(old, tmp_path / "old.safetensors", {"sipl_min": json.dumps(header)})
    with pytest.warns(UserWarning, match="aligned"):
        again = load(tmp_path / "old.safetensors")
    x = rand(1, 3, 16, 16)
    assert torch.equal(again.refine(x), model.refine(x))


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    tiny().save(path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise weights.SafetensorError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        tiny().save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def forge(path, model, **changes):
    save_file(model.state_dict(), path, {"sipl_min": json.dumps({"settings": vars(model.settings) | changes})})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dim=1600), "is not what its header says: of its tensors .* of another shape"),
        (dict(blocks=(10**9, 1, 1, 1)), "more blocks than it has tensors"),
        (dict(prompt_size=(10**6, 10**6, 10**6)), "of another shape"),
        (dict(depth=3), "unexpected keyword argument 'depth'"),
        (dict(heads=("a", 1, 1, 1)), "is not what its header says"),
        (dict(dim=0), "is not what its header says"),
        (dict(backbone="mamba"), "unknown backbone 'mamba'"),
        (dict(fusion=False), r"unexpected \(fusion"),
    ],
)
def test_forged_settings_take_no_memory(changes, message, tmp_path):
    forge(tmp_path / "forged.safetensors", tiny(), **changes)
    with pytest.raises(InputError, match=message) as error, Largest() as largest:
        load(tmp_path / "forged.safetensors")
    sentence(error)
    assert largest.elements < 1e5


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made that is not on the meta device."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.elements = max(self.elements, out.numel())
        return out


def damaged(content, rng, tries):
    """A file cut somewhere, with one bit turned in its beginning or anywhere; tries times."""
    for i in range(tries):
        bad = bytearray(content[: rng.integers(len(content))] if i % 3 == 0 else content)
        if i % 3:
            place = rng.integers(8 * (3000 if i % 3 == 1 else len(bad)))
            bad[place // 8] ^= 1 << (place % 8)
        yield bytes(bad)


@pytest.mark.filterwarnings("ignore:.*identity_start")
def test_damaged_files_load_or_get_one_sentence(tmp_path, counted):
    path, rng, refused, model = tmp_path / "w", np.random.default_rng(0), 0, tiny()
    model.save(path)
    own = path.read_bytes()
    torch.save({"state_dict": {f"net.{n}": t[:1] for n, t in made("nafnet").items()}}, path)
    files = [*damaged(own, rng, 150), *damaged(path.read_bytes(), rng, 50), b"", own[:8], own[:9], b"a text\n", b"PK"]
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
    for content in ({"state_dict": Trap()}, Trap(), {"run": {"settings": Trap()}, "model": {}}):
        torch.save(content, "trap.ckpt")
        with pytest.raises(InputError, match=r"it wants to call \w+.system, which is not done here") as error:
            load("trap.ckpt")
        assert "weights_only" not in sentence(error), "no advice to run code"
    assert not Path("evil").exists()
    for content in (torch.zeros(3), [1, 2], None, 5, "text", {"run": {}, "model": {}}, {"state_dict": {"a": 1}}):
        torch.save(content, "odd.pth")
        with pytest.raises(InputError, match="holds no tensor"):
            load("odd.pth")
    save_file({"a": torch.ones(1)}, "odd.safetensors", {"sipl_min": "{"})
    with pytest.raises(InputError, match="holds no plain weights"):
        load("odd.safetensors")


# --------------------------------------------------------------------------------------------- from a backbone


@pytest.mark.parametrize("family", ["promptir", "restormer", "restormer_biasfree", "nafnet"])
@torch.no_grad()
def test_from_backbone_starts_as_the_backbone_where_asked(family, tmp_path):
    plain = load(made(family))
    x = waves(24, 40)
    small = dict(dictionary_size=(8, 4, 2), read_heads=(1, 1, 1), write_heads=(1, 1, 1))
    same, changed = (SIPL.from_backbone(made(family), start, **small).eval() for start in (True, False))
    assert same.settings.backbone == family.split("_")[0] and same.settings.dictionary_size == (8, 4, 2)
    expected = plain(x)
    assert torch.allclose(same(x), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert not torch.allclose(changed(x), expected, rtol=1e-2)
    same.save(tmp_path / "same.safetensors")
    assert torch.equal(load(tmp_path / "same.safetensors").refine(x), same.refine(x))
    again = SIPL.from_backbone(plain, identity_start=True)
    assert torch.equal(again.eval()(x), same(x)) and again.settings.dictionary_size == (64, 32, 16)
    next(again.encoder.parameters()).zero_()
    assert torch.equal(plain(x), expected), "copied, not shared"


def test_from_backbone_is_ready_to_fine_tune():
    """With identity_start the loss reaches write at the first step and, through it, everything at the second."""
    model = SIPL.from_backbone(made("restormer"), identity_start=True, dictionary_size=(4, 4, 4))
    x, y = waves(16, 16), waves(16, 16, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            privileged = model.privileged(model(y))
        F.l1_loss(model(x, privileged), y).backward()
        optimizer.step()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent and model.training, silent
    with pytest.raises(InputError, match="setting 'dim' is not one of Proxy Fusion"):
        SIPL.from_backbone(model, dim=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_norms_and_local_means_in_other_precisions(dtype):
    norm, x = BiasFreeNorm(8), (1e4 * rand(1, 8, 6, 7) + 3e4).to(dtype)
    torch.testing.assert_close(norm.to(dtype)(x).float(), norm.float()(x.float()), rtol=1e-2, atol=0)
    block = nafnet_local(tiny(backbone="nafnet", fusion=False), 16).encoder.levels[0][0]
    x = (6e4 * rand(1, 8, 60, 70)).to(dtype)
    torch.testing.assert_close(block.pool(x).float(), block.pool(x.float()), rtol=1e-2, atol=0)
