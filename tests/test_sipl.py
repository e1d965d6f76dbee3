"""The method: shapes, the loop against its naive form, gradients, padding, files."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import Largest, tiny
from safetensors.torch import load_file, save_file

from sipl_min import SIPL, InputError, speed, train
from sipl_min.sipl import CrossAttention, FeedForward
from sipl_min.tiles import pad


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def size(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------- architecture


def test_paper_has_the_published_size():
    model = SIPL("paper")
    assert round(size(model) / 1e6, 2) == 40.03
    assert round(size(model.fusion) / 1e6, 2) == 4.65


def test_presets_lie_in_their_ranges():
    assert size(SIPL("nano")) < 1.5e6
    assert 3e6 <= size(SIPL("small")) <= 6e6


@pytest.mark.parametrize("h, w", [(1, 1), (7, 5), (8, 8), (2, 33), (40, 56)])
def test_any_size_comes_back(model, h, w):
    x = rand(2, 3, h, w)
    guided = model(x, privileged=model.privileged(x))
    assert model(x).shape == guided.shape == model.refine(x).shape == x.shape
    assert guided.isfinite().all() and not torch.allclose(guided, model(x))


def test_privileged_features_have_the_stated_shapes(model):
    d = model.settings.dim
    features = model.privileged(rand(2, 3, 30, 41))
    assert [tuple(f.shape) for f in features] == [(2, 2 * d, 16, 24), (2, 4 * d, 8, 12), (2, 8 * d, 4, 6)]


@pytest.mark.parametrize("h, w", [(1, 1), (1, 9), (7, 5), (3, 20), (16, 24)])
def test_padding_is_numpys_reflect(h, w):
    x = rand(1, 3, h, w)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -h % 8), (0, -w % 8)), "reflect")
    assert np.array_equal(pad(x).numpy(), padded)


def test_no_padding_where_none_is_needed():
    x = rand(1, 3, 16, 24)
    assert pad(x) is x


def test_prompts_and_fusion_can_be_left_out():
    x = rand(1, 3, 16, 16)
    for overrides in (dict(backbone="restormer"), dict(fusion=False), dict(backbone="restormer", fusion=False)):
        model = tiny(**overrides)
        assert model(x).shape == x.shape
        assert hasattr(model, "fusion") == overrides.get("fusion", True)


def test_images_of_a_batch_do_not_see_each_other(model):
    x, clean = rand(3, 3, 16, 24), rand(3, 3, 16, 24, seed=1)
    together = model(x, model.privileged(clean))
    alone = torch.cat([model(a[None], model.privileged(b[None])) for a, b in zip(x, clean)])
    assert torch.allclose(together, alone, atol=1e-5)


# ------------------------------------------------------------------------- the loop against its naive form


@pytest.mark.parametrize("feedback", ["privilege", "chain"])
def test_loop_equals_the_naive_loop(model, feedback):
    x = rand(2, 3, 27, 34)
    ours = model.refine(x, steps=3, feedback=feedback, return_all=True)
    assert torch.equal(model.refine(x, 3, feedback), ours[-1])
    theirs = speed.refine_naive(model, x, 3, feedback)
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()
    assert (ours[1] - ours[0]).abs().max() > 1e-3, "refinement must do something for this test to mean anything"


@pytest.mark.parametrize("feedback, encoders", [("privilege", 1 + 3), ("chain", 2 * 3)])
def test_encoder_runs_once_per_distinct_image(model, feedback, encoders):
    calls = {"encoder": 0, "decoder": 0}
    model.encoder.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1))
    model.decoder.register_forward_hook(lambda *_: calls.update(decoder=calls["decoder"] + 1))
    model.refine(rand(1, 3, 16, 16), steps=3, feedback=feedback)
    assert calls == {"encoder": encoders, "decoder": encoders}


def test_what_attention_gets_suits_the_fused_kernels_of_a_gpu(model, monkeypatch):
    """They need the channels of a token side by side in memory, or the matrix is made after all."""
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.extend(a) or attention(*a, **k))
    model.refine(rand(2, 3, 16, 16), 1)
    assert len(seen) == 3 * 9 and all(t.stride(-1) == 1 for t in seen)


@pytest.mark.parametrize("backbone", ["restormer", "adair", "nafnet"])
def test_every_backbone_does_what_promptir_does(backbone, tmp_path):
    model = tiny(backbone=backbone)
    for h, w in ((1, 1), (7, 5), (24, 40)):
        x = rand(2, 3, h, w)
        assert model(x).shape == model.refine(x, 1, "chain").shape == x.shape
    x = rand(1, 3, 27, 34)
    if backbone == "nafnet":  # zeros to the next multiples of 16, as NAFNet has it
        x = F.pad(x, (0, 14, 0, 5))
    for ours, theirs in zip(model.refine(x, 2, return_all=True), speed.refine_naive(model, x, 2)):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()
    grads = gradients(model, rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1), train.authors)
    silent = [n for n, _ in model.named_parameters() if n not in grads or not grads[n].abs().sum() > 0]
    # AdaIR cuts its rates to whole numbers; below 128 pixels a side its box of low frequencies is empty
    assert all(re.search(r"frequency.*\.(rate|low|which)\.", n) for n in silent), silent
    model.save(tmp_path / "m.safetensors")
    assert torch.equal(SIPL.load(tmp_path / "m.safetensors").refine(x), model.refine(x))


def test_the_attention_matrix_never_exists():
    attention = CrossAttention(8, 1)
    query, context = rand(1, 8, 64, 64), rand(1, 8, 32, 32)
    matrix = 64 * 64 * 32 * 32
    with torch.no_grad(), Largest() as ours:
        attention(query, context)
    with torch.no_grad(), speed.naive(), Largest() as released:
        attention(query, context)
    assert released.elements >= matrix  # the check can see it
    assert ours.elements <= matrix // 20


def test_refine_with_no_steps_is_the_first_pass(model):
    x = rand(1, 3, 16, 24)
    assert torch.equal(model.refine(x, steps=0), model(x))


def test_same_input_same_output(model):
    x = rand(1, 3, 24, 24)
    assert torch.equal(model.refine(x, 2), model.refine(x, 2))


# ------------------------------------------------------------------------------------------------ gradients


def gradients(model, x, y, step):
    model.zero_grad()
    F.l1_loss(step(model, x, y), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_no_gradient_reaches_the_privileged_branch(model):
    x, y = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)

    def detached(model, x, y):  # written out: the features are constants
        return model(x, [p.detach() for p in model.privileged(model(y).detach())])

    def attached(model, x, y):
        return model(x, model.privileged(model(y)))

    ours, constant, through = (gradients(model, x, y, s) for s in (train.authors, detached, attached))
    assert ours.keys() == constant.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(ours[n], constant[n]) for n in ours)
    assert any(not torch.allclose(ours[n], through[n], rtol=1e-3) for n in ours)


def test_gradient_of_read_and_write_agrees_with_finite_differences():
    torch.manual_seed(0)
    attention = CrossAttention(4, 2).double()
    query, context = torch.rand(1, 4, 2, 3).double(), torch.rand(1, 4, 3, 2).double()
    inputs = [query.requires_grad_(), context.requires_grad_(), attention.temperature]
    assert torch.autograd.gradcheck(lambda q, c, _: attention(q, c), inputs)


def test_zero_dictionary_explodes_once_and_a_random_one_does_not():
    """SPEC's Trap 1: with D = 0 the query is LN(0) = 0, and normalising it divides by 1e-12."""
    x, y = rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1)

    def norm(std):
        torch.manual_seed(0)
        grads = gradients(SIPL("nano", dictionary_std=std), x, y, train.authors)
        return torch.stack([g.norm() for g in grads.values()]).norm()

    assert norm(0.0) > 1e6
    assert norm(0.02) < 1e3


def test_dual_gate_is_symmetric_in_its_halves():
    ffn = FeedForward(4, 2, dual=True)
    x = rand(1, 4, 5, 5)
    before = ffn(x, nn.Identity())
    with torch.no_grad():
        for conv in ffn.inner:
            conv.weight.copy_(conv.weight.roll(len(conv.weight) // 2, 0))
    assert torch.allclose(before, ffn(x, nn.Identity()), atol=1e-6)


# --------------------------------------------------------------------------------------------------- photos


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_restore_keeps_the_kind_of_photo(model, dtype, channels):
    shape = (11, 9) if channels is None else (11, 9, channels)
    image = np.random.default_rng(0).random(shape)
    image = (image * np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else image).astype(dtype)
    before = image.copy()
    out = model.restore(image, steps=1)
    assert out.shape == image.shape and out.dtype == image.dtype
    assert np.array_equal(image, before)
    if channels in (2, 4):
        assert np.array_equal(out[..., -1], image[..., -1]), "alpha must pass untouched"


def test_restore_rounds_what_refine_gives(model, photo):
    x = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    expected = model.refine(x, 1)[0].double().clamp(0, 1).permute(1, 2, 0).numpy() * 255
    assert np.abs(model.restore(photo, steps=1) - expected).max() <= 0.5 + 1e-9


def test_restore_of_an_identity_network_changes_nothing(photo):
    model = tiny()
    torch.nn.init.zeros_(model.decoder.output.weight)
    deep = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15
    assert np.array_equal(model.restore(photo), photo)
    assert np.array_equal(model.restore(deep), deep)


# ---------------------------------------------------------------------------------------------------- files


def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    again = SIPL.load(tmp_path / "m.safetensors")
    x = rand(1, 3, 16, 16)
    assert again.settings == model.settings
    assert torch.equal(again.refine(x), model.refine(x))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    model.save(path)
    before = path.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sipl_min.weights.save_file", full)
    with pytest.raises(InputError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_bad_weights_get_one_sentence(model, tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    model.save(good)
    whole = good.read_bytes()
    tensors = load_file(good)

    def write_changed(settings=None, drop=None, version=1):
        kept = {n: t for n, t in tensors.items() if n != drop}
        header = {"version": version, "settings": settings or vars(model.settings)}
        save_file(kept, bad, {"sipl_min": json.dumps(header)})

    cases = [(lambda n=n: bad.write_bytes(whole[:n]), "not a whole safetensors") for n in (0, 4, 500, len(whole) - 1)]
    cases += [(lambda: bad.write_text("hello, I am no model at all"), "not a whole safetensors")]
    cases += [(lambda: save_file(tensors, bad), "not written by model.save")]
    cases += [(lambda: write_changed(version=2), "has file version 2")]
    cases += [(lambda: write_changed(drop="encoder.embed.weight"), "does not match .* encoder.embed.weight")]
    cases += [(lambda: write_changed({**vars(model.settings), "dim": 16}), "does not match")]
    cases += [(lambda: write_changed({**vars(model.settings), "depth": 3}), "unknown setting 'depth'")]
    cases += [(lambda: save_file(tensors, bad, {"sipl_min": "{"}), "damaged header")]
    for damage, message in cases:
        damage()
        with pytest.raises(InputError, match=message):
            SIPL.load(bad)
    with pytest.raises(InputError, match="no weights at"):
        SIPL.load(tmp_path / "nowhere.safetensors")


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(preset="huge"), "unknown preset 'huge': choose one of nano, small, paper"),
        (dict(hedas=(1, 2, 4, 8)), "unknown setting 'hedas': did you mean 'heads'"),
        (dict(dim=-4), "setting dim=-4"),
        (dict(dim=10.5), "setting dim=10.5"),
        (dict(blocks=(1, 2)), "setting blocks="),
        (dict(fusion="yes"), "setting fusion='yes'"),
        (dict(expansion=float("nan")), "setting expansion=nan"),
        (dict(heads=(3, 2, 4, 8)), "setting heads does not fit"),
        (dict(prompt_channels=(1, 2, 3)), "setting prompt_channels does not fit"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        SIPL(**arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(rand(3, 16, 16)), r"x must be a tensor \(B, 3, H, W\), not \(3, 16, 16\)"),
        (lambda m: m(rand(1, 4, 16, 16)), "x must be a tensor"),
        (lambda m: m(rand(1, 3, 0, 16)), "x must be a tensor"),
        (lambda m: m(np.zeros((1, 3, 8, 8))), "not ndarray"),
        (lambda m: m(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "x is torch.uint8"),
        (lambda m: m(rand(1, 3, 8, 8).double()), "x is torch.float64"),
        (lambda m: m(rand(1, 3, 8, 8) * torch.nan), "x holds NaN"),
        (lambda m: m(rand(1, 3, 8, 8), m.privileged(rand(1, 3, 8, 8))[:2]), "privileged must be 3 features"),
        (lambda m: m(rand(1, 3, 8, 8), 5), "privileged must be 3 features"),
        (lambda m: m(rand(2, 3, 8, 8), m.privileged(rand(3, 3, 8, 8))), r"C = \[16, 32, 64\], B = 2 as in x or 1"),
        (lambda m: m.privileged(rand(1, 1, 8, 8)), "image must be a tensor"),
        (lambda m: m.refine(rand(1, 3, 8, 8) * 255), r"x must hold values in \[0, 1\]"),
        (lambda m: m.refine(rand(1, 3, 8, 8) * torch.nan), "NaN"),
        (lambda m: m.refine(rand(1, 3, 8, 8), steps=-1), "steps must be"),
        (lambda m: m.refine(rand(1, 3, 8, 8), steps=1.5), "steps must be"),
        (lambda m: m.refine(rand(1, 3, 8, 8), feedback="loop"), "unknown feedback 'loop'"),
        (lambda m: m.restore(np.zeros((4, 4, 5), np.uint8)), "C = 1, 2, 3 or 4"),
        (lambda m: m.restore(np.zeros((0, 4, 3), np.uint8)), "a photo must be"),
        (lambda m: m.restore(np.zeros((4, 4, 3), np.int32)), "not int32"),
        (lambda m: m.restore(np.full((4, 4, 3), 1.5)), r"in \[0, 1\], found 1.5 to 1.5"),
        (lambda m: m.restore(np.full((4, 4, 3), np.nan)), "found nan"),
    ],
)
def test_bad_input_gets_one_sentence(model, call, message):
    with pytest.raises(InputError, match=message) as e:
        call(model)
    assert "\n" not in str(e.value)


def test_a_plain_backbone_says_that_it_cannot_refine():
    model, x = tiny(fusion=False), rand(1, 3, 8, 8)
    assert model.refine(x, 0).shape == x.shape
    assert model.restore(np.zeros((5, 5), np.uint8)).shape == (5, 5)
    for call in (lambda: model.refine(x, 1), lambda: model(x, model.privileged(x))):
        with pytest.raises(InputError, match="needs Proxy Fusion"):
            call()


def test_loop_stops_when_a_step_changes_little():
    torch.manual_seed(0)
    model, x = SIPL("nano").eval(), torch.rand(1, 3, 24, 24)
    found = model.refine(x, 6, return_all=True)
    changes = [float((b - a).square().mean().sqrt()) for a, b in zip(found, found[1:])]
    assert changes[0] > 2 * changes[-1] > 0
    between = changes[2] * 1.001
    stopped = model.refine(x, 6, return_all=True, stop="converged", tolerance=between)
    assert len(stopped) == 1 + 1 + next(t for t, c in enumerate(changes) if c < between)
    assert torch.equal(model.refine(x, 6, stop="converged", tolerance=between), stopped[-1])
    assert len(model.refine(x, 6, return_all=True, stop="converged", tolerance=0.0)) == 7
    with pytest.raises(InputError, match="unknown stop 'now'"):
        model.refine(x, 1, stop="now")
    for tolerance in (-1, float("nan"), "small"):
        with pytest.raises(InputError, match="must be a number >= 0"):
            model.refine(x, 1, stop="converged", tolerance=tolerance)


def test_aligned_features_start_at_nothing_and_then_count():
    torch.manual_seed(0)
    model = SIPL("nano", aligned=True).eval()
    plain = SIPL("nano").eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("aligned")})
    x = torch.rand(1, 3, 20, 28)
    assert torch.equal(model.refine(x, 1), plain.refine(x, 1))
    torch.nn.init.normal_(model.aligned[1].weight)
    assert torch.equal(model(x), plain(x)) and not torch.allclose(model.refine(x, 1), plain.refine(x, 1), atol=1e-3)


def test_pretrained_weights_by_name():
    model = SIPL.from_pretrained()
    assert not model.training and model.settings.dim == 16
    with pytest.raises(InputError, match="no weights 'huge' come with the project: choose one of nano, nano-authors"):
        SIPL.from_pretrained("huge")
