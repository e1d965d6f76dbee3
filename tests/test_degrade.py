"""The degradations: range, seed, formula, order; and the embedded data."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from sipl_min import InputError, data, degrade
from sipl_min.degrade import COLUMNS, SETTINGS, generator
from sipl_min.files import asset, to_tensor

FUNCTIONS = [degrade.noise, degrade.rain, degrade.snow, degrade.haze, degrade.blur, degrade.low, degrade.drops]


def clean(batch=3, size=64, seed=0):
    leaves = data.dead_leaves(batch, size, seed, leaves=60)
    return leaves.float() / 255


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_range_shape_seed_and_input_untouched(function):
    x = clean()
    before = x.clone()
    y = function(x, generator(1))
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.min() >= 0 and y.max() <= 1 and y.isfinite().all()
    assert torch.equal(x, before)
    assert torch.equal(y, function(x, generator(1)))
    assert not torch.equal(y, function(x, generator(2)))
    assert not torch.allclose(y, x, atol=0.01), "it must degrade"
    assert not torch.equal(function(x[:1].expand(2, -1, -1, -1), generator(1))[0], function(x[:1], generator(2))[0])


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 40)])
def test_tiny_images(function, shape):
    y = function(torch.full((2, 3, *shape), 0.5), generator(0))
    assert y.shape == (2, 3, *shape) and y.isfinite().all()


def test_noise_is_the_published_protocol():
    x = torch.full((1, 3, 256, 256), 0.5)
    y = degrade.noise(x, generator(0), sigma=25.0)
    assert torch.equal((255 * y).round(), (255 * y).round().clamp(0, 255)), "whole numbers"
    assert torch.allclose(255 * y, (255 * y).round(), atol=1e-4)
    error = 255 * (y - x)
    assert abs(error.std() - 25) < 0.2 and abs(error.mean() + 0.5) < 0.2  # truncation takes half a step
    expected = 20 * math.log10(255 / math.hypot(25, 0.5))
    assert abs(peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1) - expected) < 0.1


def test_haze_is_the_formula():
    x, depth = clean(2), torch.rand(2, 1, 64, 64)
    y = degrade.haze(x, generator(0), beta=1.5, airlight=0.8, depth=depth)
    t = torch.exp(-1.5 * depth.clamp(max=0.7))
    assert torch.allclose(y, x * t + 0.8 * (1 - t), atol=1e-6)
    unknown = depth.clone()
    unknown[:, :, :32] = torch.nan
    y = degrade.haze(x, generator(0), beta=1.5, airlight=0.8, depth=unknown)
    assert y.isfinite().all() and torch.allclose(y[:, :, 32:], (x * t + 0.8 * (1 - t))[:, :, 32:], atol=1e-6)


def test_rain_adds_light_and_is_grey():
    x = torch.zeros(1, 3, 96, 96)
    y = degrade.rain(x, generator(0))
    assert torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2])
    assert (degrade.rain(clean(), generator(0)) >= clean() - 1e-6).all()


def test_snow_is_a_blend_towards_white():
    s = degrade.snow(torch.zeros(1, 3, 64, 64), generator(0))  # on black the image is the mask itself
    x = clean(1)
    assert torch.allclose(degrade.snow(x, generator(0)), x * (1 - s) + s, atol=1e-6)


def test_low_light_darkens_by_the_power_of_the_illumination():
    x = torch.full((1, 3, 32, 32), 0.4)  # on a flat image the illumination is the image: y = 0.4^gamma
    y = degrade.low(x, generator(0), gamma=2.5, sigma=0.0)
    assert torch.allclose(y, torch.full_like(y, 0.4**2.5), atol=1e-4)


def test_blur_keeps_flat_light_and_spreads_a_point():
    flat = torch.full((1, 3, 40, 40), 0.3)
    assert torch.allclose(degrade.blur(flat, generator(0)), flat, atol=1e-3)
    point = torch.zeros(1, 3, 65, 65)
    point[:, :, 32, 32] = 1
    y = degrade.blur(point, generator(0)) ** 2.2  # light adds up
    assert abs(y[0, 0].sum() - 1) < 0.02 and (y[0, 0] > 1e-3).sum() > 8


def test_convolution_agrees_with_the_direct_one():
    x, kernel = torch.rand(2, 1, 20, 17), torch.rand(2, 1, 5, 5)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    direct = torch.cat([torch.nn.functional.conv2d(p[None], k[None].flip(-2, -1)) for p, k in zip(padded, kernel)])
    assert torch.allclose(degrade.convolve(x, kernel), direct, atol=1e-4)


def test_guided_filter_keeps_a_step_and_flattens_noise():
    step = (torch.arange(40) >= 20).float().expand(1, 1, 40, 40)
    assert torch.allclose(degrade.guided(step, step, 3, 1e-6), step, atol=1e-3)
    noisy = torch.full_like(step, 0.5) + 0.1 * torch.randn(1, 1, 40, 40, generator=generator(0))
    assert degrade.guided(noisy, noisy, 3, 1.0).std() < 0.2 * noisy.std()


# ------------------------------------------------------------------------------------------------ settings


def test_columns_are_the_published_ones_in_their_order():
    tables = json.loads(asset("published.json").read_text())
    for setting in ("three_task", "five_task", "cdd11"):
        assert list(COLUMNS[setting]) == tables[setting]["columns"][:-1]
    assert len(COLUMNS["cdd11"]) == 11 and len(COLUMNS["deweather"]) == 4


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_column_works_and_differs(setting):
    names = list(COLUMNS[setting])
    x = clean(1).expand(len(names), -1, -1, -1)
    y = degrade.degrade(x, generator(0), setting, names)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    flat = y.flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 0.5


def test_a_combination_is_its_steps_in_the_published_order():
    x = clean(2)
    together = degrade.degrade(x, generator(3), "cdd11", ["low_haze_snow"] * 2)
    g, y = generator(3), x
    for function in (degrade.low, degrade.snow, degrade.haze):
        y = function(y, g)
    assert torch.equal(together, y)


def test_strengths_are_those_of_the_published_inputs():
    """On real test photos each synthetic CDD-11 column is as strong as the published one, to 2 dB."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "CBSD68"
    if not folder.is_dir():
        pytest.skip("needs the 68 photos of CBSD68, which are not in this repository")
    x = torch.cat([to_tensor(data.read(p))[..., :320, :320] for p in sorted(folder.glob("*.png"))[:24]])
    tables = json.loads(asset("published.json").read_text())
    published = next(r for r in tables["cdd11"]["rows"] if r["method"] == "input")["psnr"]
    for column in COLUMNS["cdd11"]:
        y = degrade.degrade(x, generator(0), "cdd11", [column] * len(x))
        measured = float(-10 * ((x - y) ** 2).mean((1, 2, 3)).log10().mean())
        assert abs(measured - published[column]) < 2, (column, measured, published[column])


def test_unknown_names_are_errors():
    with pytest.raises(InputError, match="unknown setting 'rainy': choose one of three_task"):
        degrade.degrade(clean(1), generator(0), "rainy", ["rain"])
    with pytest.raises(InputError, match="unknown column 'fog' in cdd11"):
        degrade.degrade(clean(1), generator(0), "cdd11", ["fog"])


# ---------------------------------------------------------------------------------------------------- data


def test_held_out_photos_are_never_trained_on():
    held = data.held_out()
    assert len(held) >= 3 and "chelsea" in held
    assert all(p.ndim == 3 and p.shape[2] == 3 and p.dtype == np.uint8 for p in held.values())
    assert not set(data.HELD_OUT.values()) & set(data.TRAINING)
    training = [data.to_tensor(data.read(data.installed(n))) for n in data.TRAINING]
    for photo in held.values():
        for other in training:
            if other.shape[-2:] == photo.shape[:2]:
                assert (to_tensor(photo) - other).abs().mean() > 0.05


def test_motorcycle_has_real_depth():
    d = data.motorcycle_distance()
    known = d[~d.isnan()]
    assert d.shape == (1, 500, 741) and known.min() >= 0 and known.max() <= 1 and known.std() > 0.1
    assert len(known) > 0.9 * d.numel()


def test_dead_leaves_cover_everything_and_have_all_scales():
    images = data.dead_leaves(4, 96, seed=0)
    assert images.shape == (4, 3, 96, 96) and images.dtype == torch.uint8
    assert torch.equal(images, data.dead_leaves(4, 96, seed=0))
    assert not torch.equal(images, data.dead_leaves(4, 96, seed=1))
    # a natural image's power falls like 1 / f^2: compare two octaves of the spectrum
    power = torch.fft.fft2(images.float().mean(1) - 128).abs().square().mean(0)
    f = torch.fft.fftfreq(96) * 96
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    octave = [power[(radius >= r) & (radius < 2 * r)].mean() for r in (3, 6, 12, 24)]
    slopes = [math.log2(a / b) for a, b in zip(octave, octave[1:])]
    assert 1.2 < np.mean(slopes) < 3.2, slopes


def test_batches_are_a_function_of_seed_and_step():
    images = data.Images(leaves=2)
    a = data.batch(images, 7, size=32, count=4, seed=1)
    b = data.batch(data.Images(leaves=2), 7, size=32, count=4, seed=1)
    c = data.batch(images, 8, size=32, count=4, seed=1)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    assert not torch.equal(a[1], c[1])
    assert a[0].shape == a[1].shape == (4, 3, 32, 32)


def test_mild_crops_are_the_same_degradation_in_part():
    x, y, columns = data.batch(images := data.Images(leaves=2), 3, size=32, count=16, setting="five_task")
    weak, same, again = data.batch(images, 3, size=32, count=16, setting="five_task", mild=0.5)
    assert torch.equal(y, same) and columns == again
    full = (x - y).abs().mean((1, 2, 3))
    share = ((weak - y) * (x - y)).sum((1, 2, 3)) / (x - y).square().sum((1, 2, 3))  # s, per crop
    assert torch.allclose(weak, y + share[:, None, None, None] * (x - y), atol=1e-5) and (full > 0).all()
    assert 2 < (share < 0.999).sum() < 14 and ((share >= 0) & (share < 1.001)).all()
    assert torch.equal(data.batch(images, 3, size=32, count=16, setting="five_task", mild=0.0)[0], x)


def test_a_crop_and_its_depth_turn_together():
    images = data.Images([np.zeros((40, 50, 3), np.uint8)], leaves=0)
    ramp = torch.arange(40 * 50).reshape(1, 40, 50) % 251
    images.sources, images.depths = [ramp.expand(3, -1, -1).byte()], {0: ramp.float()}
    g = generator(0)
    for _ in range(20):
        image, depth = images.crop(24, g)
        assert torch.equal(image[0].float(), depth[0])


def test_small_images_are_mirrored_up_to_the_crop():
    images = data.Images([np.random.default_rng(0).integers(0, 255, (5, 9), np.uint8)])
    assert data.batch(images, 0, size=32, count=2)[1].shape == (2, 3, 32, 32)
