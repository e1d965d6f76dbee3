"""fast.py computes what the plain module computes: numbers, gradients, half precision; with less memory."""

import copy
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import rand, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from sipl_min import SIPL, fast
from sipl_min.fast import accelerate

BACKBONES = ["promptir", "restormer", "adair", "nafnet"]


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("tile", [2**13, 2**21])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_plain_equals_fast(backbone, tile, monkeypatch):
    monkeypatch.setitem(fast.TILE, "cpu", tile)
    plain = tiny(backbone=backbone)
    quick = accelerate(copy.deepcopy(plain))
    for shape in ((2, 3, 72, 104), (1, 3, 61, 45), (1, 3, 3, 5)):
        for feedback in ("privilege", "chain"):
            a, b = (m.refine(rand(*shape), 2, feedback) for m in (quick, plain))
            assert relative(a, b) < 1e-5


@pytest.mark.parametrize("preset, overrides", [("small", {}), ("paper", dict(blocks=(1, 1, 1, 1), refinement=1))])
def test_plain_equals_fast_at_other_presets(preset, overrides, monkeypatch):
    monkeypatch.setitem(fast.TILE, "cpu", 2**17)
    torch.manual_seed(0)
    plain = SIPL(preset, **overrides).eval()
    x = rand(1, 3, 48, 72)
    expected = plain.refine(x)
    assert relative(accelerate(plain).refine(x), expected) < 1e-5


def test_gradients_and_state_stay_and_it_can_be_undone():
    plain = tiny()
    quick = accelerate(copy.deepcopy(plain))
    x, y = rand(2, 3, 24, 32), rand(2, 3, 24, 32, seed=1)
    for model in (plain, quick):
        F.l1_loss(model(x, model.privileged(y)), y).backward()
    for (name, p), (other, q) in zip(plain.named_parameters(), quick.named_parameters()):
        assert name == other and torch.equal(p, q) and relative(q.grad, p.grad) < 1e-4, name
    again = accelerate(quick, False)
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(again.refine(x), plain.refine(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_stays_finite(backbone, dtype, monkeypatch):
    def convolve(layer, x, weight, bias, forward=torch.nn.Conv2d._conv_forward):  # rounded; a CPU's own is slow
        return forward(layer, x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", convolve)
    plain = tiny(backbone=backbone).to(dtype)
    x = rand(1, 3, 512, 512).to(dtype)
    with torch.no_grad():
        first = plain(x)
        quick = accelerate(plain)
        second, black = quick(x), quick(torch.zeros_like(x[..., :64, :64]))
    assert second.dtype == dtype and second.isfinite().all() and black.isfinite().all()
    assert first.isfinite().all() and relative(second.float(), first.float()) < 0.1


def test_half_precision_as_the_processor_has_it(model):
    for dtype in (torch.float16, torch.bfloat16):
        quick = accelerate(model.to(dtype))
        assert quick(rand(1, 3, 96, 96).to(dtype)).isfinite().all()


def test_autocast_stays_near_float32_and_keeps_its_residuals(model):
    x = rand(1, 3, 64, 96)
    expected = model.refine(x)
    for m in (model, accelerate(model)):
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(m.refine(x).float(), expected) < 0.05
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert model.encoder.levels[0](model.encoder.embed(x).float()).dtype == torch.float32


class Largest(TorchDispatchMode):
    """Remember the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return result


def test_wide_tensors_never_exist_for_the_whole_image(model, monkeypatch):
    x = rand(1, 3, 128, 128)
    with Largest() as plain:
        model.refine(x)
    monkeypatch.setitem(fast.TILE, "cpu", 2**15)
    with Largest() as quick:
        accelerate(model).refine(x)
    whole = 128 * 128 * 2 * model.settings.dim  # the widest feature that has to exist, at full resolution
    assert plain.elements >= 2 * whole  # the check can see it
    assert quick.elements <= 1.01 * whole


def test_the_attention_matrix_never_exists(model):
    query, context = rand(1, 16, 64, 64), rand(1, 16, 32, 32)
    write = model.fusion[0].write
    with torch.no_grad(), Largest() as seen:
        write(query, context)
    assert seen.elements <= 64 * 64 * 32 * 32 // 10


def test_what_restored_in_inference_mode_can_be_trained():
    model = tiny()
    with torch.inference_mode():
        model.restore(rand(3, 16, 16), 1)
    model(rand(1, 3, 16, 16)).mean().backward()


def test_threads_may_restore_with_one_plain_model(model):
    photo, failed, before = rand(3, 24, 32), [], sys.getswitchinterval()
    right = model.restore(photo, 1)

    def work():
        try:
            failed.extend(1 for _ in range(12) if not torch.equal(model.restore(photo, 1), right))
        except Exception as e:
            failed.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
