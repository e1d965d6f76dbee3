"""The method: shapes, the loop against its equations, gradients, padding, what PyTorch's own tools make of it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rand, tiny
from torch.utils.flop_counter import FlopCounterMode

from sipl_min import SIPL, sipl
from sipl_min.sipl import CrossAttention, FeedForward

BACKBONES = ["promptir", "restormer", "adair", "nafnet"]


def size(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------- architecture
def test_presets_have_the_stated_sizes():
    model = SIPL("paper")
    assert round(size(model) / 1e6, 2) == 40.03 and round(size(model.fusion) / 1e6, 2) == 4.65  # as published
    assert round(size(SIPL("nano")) / 1e6, 1) == 1.3 and round(size(SIPL("small")) / 1e6, 1) == 5.4


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_size_and_batch_comes_back(backbone):
    model = tiny(backbone=backbone)
    for h, w in ((1, 1), (7, 5), (8, 8), (2, 33), (40, 56)):
        x = rand(2, 3, h, w)
        guided = model(x, model.privileged(x))
        assert model(x).shape == guided.shape == model.refine(x).shape == model.refine(x, 1, "chain").shape == x.shape
        assert guided.isfinite().all() and not torch.allclose(guided, model(x))
    alone = torch.cat([model.refine(image[None]) for image in x])
    assert torch.allclose(model.refine(x), alone, atol=1e-5), "images of a batch do not see each other"


def test_privileged_features_and_proxies_have_the_stated_shapes(model):
    d, S = model.settings.dim, model.settings.dictionary_size
    features = model.privileged(rand(2, 3, 30, 41))
    assert [tuple(f.shape) for f in features] == [(2, 2 * d, 16, 24), (2, 4 * d, 8, 12), (2, 8 * d, 4, 6)]
    shapes = [(2, 2 * d, S[0], S[0]), (2, 4 * d, S[1], S[1]), (2, 8 * d, S[2], S[2])]
    assert [tuple(p.shape) for p in model.proxies(features)] == shapes
    assert all(p is f.dictionary for p, f in zip(model.proxies(), model.fusion))


@pytest.mark.parametrize("h, w", [(5, 7), (16, 24), (27, 34)])
def test_padding_is_numpys_reflect(model, h, w):
    x = rand(1, 3, h, w)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, -h % 8), (0, -w % 8)), "reflect")
    assert np.array_equal(model.pad(x).numpy(), padded)
    assert tiny(backbone="nafnet").pad(x).shape[-2:] == (-(-h // 16) * 16, -(-w // 16) * 16)
    assert tiny(backbone="nafnet").pad(x)[..., h:, :].abs().sum() == 0, "NAFNet pads with zeros"


def test_prompts_and_fusion_can_be_left_out():
    x = rand(1, 3, 16, 16)
    for overrides in (dict(backbone="restormer"), dict(fusion=False), dict(backbone="restormer", fusion=False)):
        model = tiny(**overrides)
        assert model.refine(x, int(model.settings.fusion)).shape == x.shape
        assert len(model.fusion) == (3 if overrides.get("fusion", True) else 0)


def test_an_untrained_write_with_identity_start_changes_nothing():
    torch.manual_seed(0)
    model = SIPL("nano", identity_start=True)
    x = rand(1, 3, 16, 24)
    assert torch.allclose(model(x), model.decode(x, model.encoder(x), None), atol=1e-6)


# ---------------------------------------------------------------------------------- the loop against its equations
def cross_attention(c, query, context):
    """Read and Write as the paper has them, with the attention matrix; c: a CrossAttention, for its layers."""
    (B, C, H, W), h = query.shape, c.heads
    q, (k, v) = c.q(c.norm_query(query)), c.kv(c.norm_context(context)).chunk(2, 1)
    q, k, v = (t.reshape(t.shape[0], h, C // h, -1).mT for t in (q, k, v))  # (B, heads, pixels, C/heads)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    A = torch.softmax(q @ k.mT * c.temperature, -1)
    z = c.out((A @ v).mT.reshape(B, C, H, W)) + (query if c.identity_start else c.norm_query(query))
    a, b = c.ffn.inner(c.norm_ffn(z)).chunk(2, 1)
    return z + c.ffn.out(F.gelu(a) * b + F.gelu(b) * a)


def reference(model, x, steps, feedback):
    """y_0 .. y_T by the equations, for sides that need no padding."""

    def f(x, P=None):
        D = [p.dictionary.expand(len(x), -1, -1, -1) for p in model.fusion]
        proxies = D if P is None else [cross_attention(m.read, d, p) for m, d, p in zip(model.fusion, D, P)]
        return model.decoder(x, model.encoder(x), lambda i, h: cross_attention(model.fusion[i].write, h, proxies[i]))

    y = [f(x)]
    for t in range(steps):
        if feedback == "chain" and t > 0:
            x = y[-1]
        first = y[-1] if feedback == "privilege" or t == 0 else f(x)
        y.append(f(x, model.encoder(first)[1:4]))
    return y


@pytest.mark.parametrize("feedback", ["privilege", "chain"])
@pytest.mark.parametrize("overrides", [{}, dict(identity_start=True)])
def test_the_loop_is_the_papers(feedback, overrides):
    model, x = tiny(**overrides), rand(2, 3, 32, 48)
    ours = model.refine(x, steps=3, feedback=feedback, return_all=True)
    with torch.no_grad():
        theirs = reference(model, x, 3, feedback)
    assert len(ours) == len(theirs) == 4 and torch.equal(model.refine(x, np.int64(3), feedback), ours[-1])
    for a, b in zip(ours, theirs):
        assert (a - b).abs().max() <= 3e-6 * b.abs().max()
    assert (ours[1] - ours[0]).abs().max() > 1e-3, "refinement must do something for this test to mean anything"


@torch.no_grad()
@pytest.mark.parametrize("fusion", [True, False])
def test_again_applies_the_network_to_its_own_estimate(fusion):
    model, x = tiny(fusion=fusion), rand(2, 3, 20, 28)
    y0, y1, y2 = model.refine(x, 2, "again", return_all=True)
    assert torch.equal(y0, model(x)) and (y2 - y1).abs().max() > 1e-4
    x = rand(2, 3, 16, 24)  # sides that need no padding, which is done once
    first = model(x)
    for t, y in enumerate((first, model(first), model(model(first)))):
        assert torch.allclose(model.refine(x, t, "again"), y, atol=1e-6)


@pytest.mark.parametrize("feedback, encoders", [("privilege", 1 + 3), ("chain", 2 * 3)])
def test_the_encoder_runs_once_per_distinct_image(model, feedback, encoders):
    calls = {"encoder": 0, "decoder": 0}
    model.encoder.register_forward_hook(lambda *_: calls.update(encoder=calls["encoder"] + 1))
    model.decoder.register_forward_hook(lambda *_: calls.update(decoder=calls["decoder"] + 1))
    model.refine(rand(1, 3, 16, 16), steps=3, feedback=feedback)
    assert calls == {"encoder": encoders, "decoder": encoders}


def test_same_input_same_output_and_no_steps_is_the_first_pass(model):
    x = rand(1, 3, 24, 24)
    assert torch.equal(model.refine(x, 2), model.refine(x, 2))
    assert torch.equal(model.refine(x, steps=0), model(x))


# ------------------------------------------------------------------------------------------------------ gradients
def gradients(model, x, y):
    """Of the guided pass, the privileged features being constants, as in the authors' training."""
    model.zero_grad()
    F.l1_loss(model(x, [p.detach() for p in model.privileged(model(y))]), y).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_learns(backbone):
    model = tiny(backbone=backbone)
    grads = gradients(model, rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1))
    silent = [n for n, _ in model.named_parameters() if n not in grads or not grads[n].abs().sum() > 0]
    # AdaIR cuts its rates to whole numbers; below 256 pixels a side its box of low frequencies is empty
    assert all(re.search(r"frequency.*\.(rate|low|channel_gate)\.", n) for n in silent), silent


def test_gradient_of_read_and_write_agrees_with_finite_differences():
    torch.manual_seed(0)
    attention = CrossAttention(4, 2).double()
    query, context = torch.rand(1, 4, 2, 3).double(), torch.rand(1, 4, 3, 2).double()
    inputs = [query.requires_grad_(), context.requires_grad_(), attention.temperature]
    assert torch.autograd.gradcheck(lambda q, c, _: attention(q, c), inputs)


def test_a_zero_dictionary_explodes_once_and_a_random_one_does_not():
    """With D = 0 the query is LN(0) = 0, and the gradient of normalizing it is divided by 1e-12."""
    x, y = rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1)

    def norm(std):
        torch.manual_seed(0)
        grads = gradients(SIPL("nano", dictionary_std=std), x, y)
        return torch.stack([g.norm() for g in grads.values()]).norm()

    assert norm(0.0) > 1e6
    assert norm(0.02) < 1e3


def test_the_dual_gate_is_symmetric_in_its_halves():
    ffn, x = FeedForward(4, 2, dual_gate=True), rand(1, 4, 5, 5)
    before = ffn(x)
    with torch.no_grad():
        for conv in ffn.inner:
            conv.weight.copy_(conv.weight.roll(len(conv.weight) // 2, 0))
    assert torch.allclose(before, ffn(x), atol=1e-6)


# ------------------------------------------------------------------------------------------------- PyTorch's tools
def test_what_attention_gets_suits_the_fused_kernels_of_a_gpu(model, monkeypatch):
    """They need the channels of a token side by side in memory, or the matrix is made after all."""
    seen, attention = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: seen.extend(a) or attention(*a, **k))
    model.refine(rand(2, 3, 16, 16), 1)
    assert len(seen) == 3 * 9 and all(t.stride(-1) == 1 for t in seen)


class Guided(torch.nn.Module):
    """A guided pass as a module, for export; x plays its own clean image, so that it costs one pass less."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, self.model.privileged(x))


def test_export_with_dynamic_sides(model):
    step, x = Guided(model), rand(1, 3, 32, 48)
    H, W = 8 * torch.export.Dim("h", min=2, max=64), 8 * torch.export.Dim("w", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(step, (x,), dynamic_shapes=({2: H, 3: W},)).module()
        for image in (x, rand(1, 3, 64, 24)):
            assert torch.allclose(program(image), step(image), atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_agrees(model, tmp_path):
    """Much as notebook 05 does it; where onnx, onnxscript and onnxruntime are installed."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    step, x = Guided(model).eval(), rand(1, 3, 32, 48)
    H, W = (8 * torch.export.Dim(side, min=2, max=64) for side in "hw")
    with torch.no_grad():
        torch.onnx.export(step, (x,), dynamo=True, dynamic_shapes=({2: H, 3: W},)).save(tmp_path / "step.onnx")
        session = runtime.InferenceSession(tmp_path / "step.onnx")
        for image in (x, rand(1, 3, 64, 24)):
            (y,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
            assert abs(y - step(image).numpy()).max() < 1e-4


@pytest.mark.slow
def test_export_with_fixed_sides_and_compile_in_one_graph(model):
    x = rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5)
        for function in (model, model.refine):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert torch.allclose(compiled(x), function(x), atol=1e-5)


def test_channels_last_and_counting_operations(model):
    x = rand(1, 3, 32, 48)
    expected = model.refine(x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 1e6
    assert torch.allclose(model.to(memory_format=torch.channels_last).refine(x), expected, atol=1e-5)


def test_the_file_alone_builds_restores_and_refines(tmp_path):
    (tmp_path / "theirs").mkdir()
    for place, line in (("", "import sipl"), ("theirs", "from theirs import sipl")):  # or in another package
        shutil.copy(sipl.__file__, tmp_path / place / "sipl.py")
        code = (
            f"import sys, torch; {line}; m = sipl.SIPL('nano'); x = torch.rand(1, 3, 20, 24)\n"
            "assert m(x).shape == m.refine(x, 2).shape == x.shape\n"
            "assert not [n for n in sys.modules if n.startswith('sipl_min')]\n"
            "m.restore('photo.png')"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1].startswith("ImportError: this needs the package sipl_min"), done.stderr
    top = Path(sipl.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) (\.|numpy|sipl)", top, re.M)
    assert len(top.splitlines()) <= 360


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(preset="papr"), "unknown preset 'papr': did you mean 'paper'"),
        (dict(preset="huge"), r"unknown preset 'huge': use \['nano', 'small', 'paper'\]"),
        (dict(hedas=(1, 2, 4, 8)), "unknown setting 'hedas': did you mean 'heads'"),
        (dict(backbone="nafnett"), "did you mean 'nafnet'"),
        (dict(dim=10.5), "setting dim=10.5"),
        (dict(blocks=(1, 2)), r"setting blocks=\(1, 2\) cannot work: it must have the form of \(4, 6, 6, 8\)"),
        (dict(dictionary_size=(0, 4, 2)), r"setting dictionary_size=\(0, 4, 2\) cannot work: it must have the form of"),
        (dict(fusion="yes"), "setting fusion='yes'"),
        (dict(heads=(3, 2, 4, 8)), r"16 channels must be even, and divisible by the heads \[3, 2, 2\]"),
        (dict(read_heads=(1, 5, 1)), "64 channels must be even, and divisible by the heads"),
        (dict(dim=7), "7 channels must be even"),
        (dict(dim=0), "0 channels must be even"),
        (dict(prompt_channels=(10, 16, 16)), "prompt_channels=.* pass multiples of 4"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SIPL(**arguments)


def test_bad_loops_are_named(model):
    x = rand(1, 3, 8, 8)
    for steps in (-1, 1.5):
        with pytest.raises(ValueError, match=f"steps={steps}: pass 0, 1, 2"):
            model.refine(x, steps)
    with pytest.raises(ValueError, match="unknown feedback 'chian': did you mean 'chain'"):
        model.refine(x, 1, "chian")
    with pytest.raises(ValueError, match="without Proxy Fusion 0"):
        tiny(fusion=False).refine(x, 1)
    with pytest.raises(ValueError, match="zip"):
        tiny(fusion=False)(x, model.privileged(x))
