"""The degradations: range, seed, formula, order; the suites and their columns."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from sipl_min import InputError, degrade
from sipl_min.data import dead_leaves
from sipl_min.degrade import CDD11, COLUMNS, SHARES, SUITES, generator
from sipl_min.files import asset
from sipl_min.photos import read, to_tensor

FUNCTIONS = [degrade.noise, degrade.camera_noise, degrade.jpeg, degrade.rain, degrade.snow, degrade.haze]
FUNCTIONS += [degrade.blur, degrade.low_light, degrade.dim_light, degrade.lens_drops]


def clean(batch=3, size=64, seed=0):
    return dead_leaves(batch, size, seed, leaves=60).float() / 255


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_range_shape_seed_and_input_untouched(function):
    x = clean()
    before = x.clone()
    y = function(x, generator(1))
    assert y.shape == x.shape and y.dtype == x.dtype and y.min() >= 0 and y.max() <= 1 and y.isfinite().all()
    assert torch.equal(x, before)
    assert torch.equal(y, function(x, generator(1))) and not torch.equal(y, function(x, generator(2)))
    assert not torch.allclose(y, x, atol=0.01), "it must degrade"
    both = function(x[:1].expand(2, -1, -1, -1), generator(1))
    assert not torch.equal(both[0], both[1]), "each image draws its own"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 40)])
def test_tiny_images(function, shape):
    y = function(torch.full((2, 3, *shape), 0.5), generator(0))
    assert y.shape == (2, 3, *shape) and y.isfinite().all()


def test_noise_is_the_published_protocol():
    x = torch.full((1, 3, 256, 256), 0.5)
    y = degrade.noise(x, generator(0), sigma=25.0)
    assert torch.allclose(255 * y, (255 * y).round(), atol=1e-4), "whole numbers"
    error = 255 * (y - x)
    assert abs(error.std() - 25) < 0.2 and abs(error.mean() + 0.5) < 0.2  # truncation takes half a step
    expected = 20 * math.log10(255 / math.hypot(25, 0.5))
    assert abs(peak_signal_noise_ratio(x.numpy(), y.numpy(), data_range=1) - expected) < 0.1


def test_camera_noise_has_the_variance_of_its_formula():
    x = torch.cat([torch.full((400, 3, 16, 16), v) for v in (0.3, 0.6)])
    y = degrade.camera_noise(x, generator(0), log_shot=-7.0)
    error, light = y**2.2 - x**2.2, x[:, :1, :1, :1] ** 2.2
    read = math.exp(2.18 * -7 + 1.2)
    expected = (math.exp(-7) * light + read).sqrt().flatten()
    ratio = (error.std((1, 2, 3)) / expected).reshape(2, 400)  # smoothed noise has less, never much more
    assert ratio.min() > 0.7 and ratio.max() < 1.3
    white = ratio > 0.93
    assert ((white.float().mean(1) > 0.45) & (white.float().mean(1) < 0.75)).all(), "half of the images, a little more"
    assert torch.allclose(ratio[white].median(), torch.tensor(1.0), atol=0.03)
    dark = torch.full((100, 3, 64, 64), 0.12)  # where read counts as much as shot; only what is below is clipped
    error = degrade.camera_noise(dark, generator(0), log_shot=-5.0) ** 2.2 - 0.12**2.2
    expected = (math.exp(-5) * 0.12**2.2 + math.exp(2.18 * -5 + 1.2)) ** 0.5
    ratio = error.flatten(1).quantile(0.8413, dim=1) / expected  # a Gaussian is one deviation above its mean there
    assert 1.05 < float(ratio.quantile(0.95)) < 1.2, "read differs from image to image"


def test_jpeg_is_pillows_of_the_quality_asked_for(tmp_path):
    x = clean(2)
    y = degrade.jpeg(x, generator(0), quality=40)
    for a, b in zip(x, y):
        Image.fromarray((a.permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "a.jpg", quality=40)
        assert torch.equal((b * 255).round(), (to_tensor(read(tmp_path / "a.jpg"))[0] * 255).round())
    error = [(degrade.jpeg(x, generator(0), quality=q) - x).square().mean() for q in (20, 50, 95)]
    assert error[0] > error[1] > error[2] > 0


def test_haze_is_the_formula():
    x, depth = clean(2), torch.rand(2, 1, 64, 64)
    y = degrade.haze(x, generator(0), beta=1.5, airlight=0.8, depth=depth)
    t = torch.exp(-1.5 * depth.clamp(max=0.7))
    assert torch.allclose(y, x * t + 0.8 * (1 - t), atol=1e-6)
    unknown = depth.clone()
    unknown[:, :, :32] = torch.nan
    y = degrade.haze(x, generator(0), beta=1.5, airlight=0.8, depth=unknown)
    assert y.isfinite().all() and torch.allclose(y[:, :, 32:], (x * t + 0.8 * (1 - t))[:, :, 32:], atol=1e-6)


def test_rain_adds_gray_light_and_snow_blends_towards_white():
    x = clean(1)
    rain, s = (f(torch.zeros(1, 3, 64, 64), generator(0)) for f in (degrade.rain, degrade.snow))  # on black: the masks
    assert torch.equal(rain[:, 0], rain[:, 1]) and torch.equal(rain[:, 0], rain[:, 2])
    assert torch.allclose(degrade.rain(x, generator(0)), (x + rain).clamp(max=1), atol=1e-6)
    assert torch.allclose(degrade.snow(x, generator(0)), x * (1 - s) + s, atol=1e-6)


def test_low_light_darkens_by_the_power_of_the_illumination():
    x = torch.full((1, 3, 32, 32), 0.4)  # on a flat image the illumination is the image: y = 0.4^gamma
    y = degrade.low_light(x, generator(0), gamma=2.5, sigma=0.0)
    assert torch.allclose(y, torch.full_like(y, 0.4**2.5), atol=1e-4)


def test_dim_light_is_the_formula_in_8_bits():
    x = clean(2)
    y = degrade.dim_light(x, generator(0), alpha=0.95, beta=0.7, gamma=3.0, sigma=0.0)
    assert torch.equal((255 * y).round(), (255 * 0.7 * (0.95 * x) ** 3).round())
    noisy = degrade.dim_light(torch.full_like(x, 0.9), generator(0), alpha=1.0, beta=1.0, gamma=1.0, sigma=0.02)
    assert abs(float(noisy.std()) - 0.02) < 0.001
    assert torch.equal(degrade.dim_light(x, generator(0), 1.0, 1.0, 1.0, sigma=-1.0), (x * 255).round() / 255)


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


def test_mirror_agrees_with_numpy_also_beyond_the_image():
    x = torch.rand(1, 2, 4, 3)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 0), (7, 5)), mode="reflect")
    assert np.array_equal(degrade.mirror(x, -1, 7, 5).numpy(), expected)


def test_guided_filter_keeps_a_step_and_flattens_noise():
    step = (torch.arange(40) >= 20).float().expand(1, 1, 40, 40)
    assert torch.allclose(degrade.guided(step, step, 3, 1e-6), step, atol=1e-3)
    noisy = torch.full_like(step, 0.5) + 0.1 * torch.randn(1, 1, 40, 40, generator=generator(0))
    assert degrade.guided(noisy, noisy, 3, 1.0).std() < 0.2 * noisy.std()


def test_columns_are_the_published_ones_in_their_order():
    tables = json.loads(asset("published.json").read_text(encoding="utf-8"))
    for suite in ("three_task", "five_task", "cdd11"):
        assert list(COLUMNS[suite]) == tables[suite]["columns"][:-1]
    assert len(COLUMNS["cdd11"]) == 11 and len(COLUMNS["deweather"]) == 4
    assert {*COLUMNS["mixed"]} == {*COLUMNS["three_task"], *COLUMNS["five_task"], *CDD11}


@pytest.mark.parametrize("suite", SUITES)
def test_every_column_works_and_differs(suite):
    names = list(COLUMNS[suite])
    assert {*SHARES[suite]} == {*names}
    assert {step for steps in COLUMNS[suite].values() for step in steps} == {*SUITES[suite]}
    x = clean(1).expand(len(names), -1, -1, -1)
    y = degrade.degrade(x, generator(0), suite, names)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    flat = y.flatten(1)
    assert torch.cdist(flat, flat).fill_diagonal_(1e9).min() > 0.5
    same = [name for name, a, b in zip(names, x, y) if torch.equal(a, b)]
    assert same == [name for name in names if not COLUMNS[suite][name]] == ["clean"] * (suite == "everyday")


def test_a_combination_is_its_steps_in_the_published_order():
    x = clean(2)
    for suite in ("cdd11", "everyday"):
        together = degrade.degrade(x, generator(3), suite, ["low_haze_snow"] * 2)
        g, y = generator(3), x
        for name in ("low", "snow", "haze"):
            function, parameters = SUITES[suite][name]
            y = function(y, g, **parameters)
        assert torch.equal(together, y)


def test_strengths_are_those_of_the_published_inputs():
    """On real test photos each synthetic CDD-11 column is as strong as the published one, to 2 dB."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "CBSD68"
    if not folder.is_dir():
        pytest.skip("needs the 68 photos of CBSD68, which are not in this repository")
    x = torch.cat([to_tensor(read(p))[..., :320, :320] for p in sorted(folder.glob("*.png"))[:12]])
    tables = json.loads(asset("published.json").read_text(encoding="utf-8"))
    published = next(r for r in tables["cdd11"]["rows"] if r["method"] == "input")["psnr"]
    for column in COLUMNS["cdd11"]:
        y = degrade.degrade(x, generator(0), "cdd11", [column] * len(x))
        measured = float(-10 * ((x - y) ** 2).mean((1, 2, 3)).log10().mean())
        assert abs(measured - published[column]) < 2, (column, measured, published[column])


def test_unknown_names_are_errors():
    for suite, message in (
        ("rainy", "unknown suite 'rainy': choose one of three"),
        ("cdd11", "unknown column 'fog' in"),
    ):
        with pytest.raises(InputError, match=message):
            degrade.degrade(clean(1), generator(0), suite, ["fog"])
    with pytest.raises(InputError, match="1 columns for 2 images"):
        degrade.degrade(clean(2), generator(0), "cdd11", ["haze"])


def test_a_suite_from_outside_needs_columns_and_shares(monkeypatch):
    monkeypatch.setitem(SUITES, "mine", SUITES["three_task"])
    with pytest.raises(InputError, match="suite 'mine' is in degrade.SUITES alone: enter it in degrade.COLUMNS"):
        degrade.check_suite("mine")
    monkeypatch.setitem(COLUMNS, "mine", COLUMNS["three_task"])
    monkeypatch.setitem(SHARES, "mine", SHARES["three_task"])
    degrade.check_suite("mine")


@pytest.mark.parametrize("suite", ["three_task", "five_task", "deweather", "cdd11", "everyday", "mixed"])
def test_an_entry_in_any_suite_becomes_a_column(suite):
    """As README says how to add a degradation."""
    source = Path(degrade.__file__).read_text(encoding="utf-8")
    begin, end = "# suite -> its columns", "def check_suite"
    made = {name: dict(steps) for name, steps in SUITES.items()} | {
        suite: SUITES[suite] | {"mine": (degrade.noise, {})}
    }
    names = dict(SUITES=made, CDD11=CDD11)
    exec(source[source.index(begin) : source.index(end)], names)
    assert names["COLUMNS"][suite]["mine"] == ["mine"] and names["SHARES"][suite]["mine"] == 1
