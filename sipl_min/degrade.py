"""Synthetic degradations, batched, with explicit random generators; and suites of them, named as in published tables.

Every degradation takes clean images x (B, 3, H, W) in [0, 1] and a `torch.Generator` of their device, and returns the
same shape in [0, 1]. Each image draws its own parameters, uniformly where a pair (low, high) is given. Same seed, same
device: same result. Lengths are in pixels, angles in degrees, intensities on the 0..1 scale unless said otherwise."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .files import InputError


def generator(seed, device="cpu"):
    """A random generator on a device: `generator(0)`."""
    return torch.Generator(device).manual_seed(seed)


def uniform(x, g, spec):
    """One value per image, (B, 1, 1, 1), drawn from a pair (low, high), or the number given."""
    low, high = spec if isinstance(spec, tuple | list) else (spec, spec)
    return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=g, device=x.device)


def normal(x, g):
    return torch.randn(x.shape, generator=g, device=x.device)


# ------------------------------------------------------------------------------------------------- tools
def mirror(x, axis, before, after):
    """Reflect-pad one axis, as often as a tiny image needs (`F.pad` cannot pad by more than the image's own size)."""
    n = x.shape[axis]
    i = torch.arange(-before, n + after, device=x.device) % max(2 * n - 2, 1)
    return x.index_select(axis, torch.minimum(i, (2 * n - 2 - i).abs())) if before or after else x


def convolve(x, kernel):
    """Convolve (B, C, H, W) with a kernel per image (B, 1 or C, K, K), K odd, by FFT, edges mirrored."""
    h, w, r = *x.shape[-2:], kernel.shape[-1] // 2
    x = mirror(mirror(x, -2, r, r), -1, r, r)
    size = x.shape[-2:]
    y = torch.fft.irfft2(torch.fft.rfft2(x) * torch.fft.rfft2(kernel, size), size)
    return y[..., 2 * r : 2 * r + h, 2 * r : 2 * r + w]


def box(x, r):
    """Mean over a (2r + 1) x (2r + 1) window, edges mirrored; first down, then across: 4r additions, not 4r²."""
    x = mirror(mirror(x, -2, r, r), -1, r, r)
    return F.avg_pool2d(F.avg_pool2d(x, (2 * r + 1, 1), 1), (1, 2 * r + 1), 1)


def guided(guide, x, r, eps):
    """Guided filter (He, Sun & Tang 2010): x smoothed, but with the edges of `guide`; both (B, 1, H, W)."""
    m, mx = box(guide, r), box(x, r)
    a = (box(guide * x, r) - m * mx) / (box(guide * guide, r) - m * m + eps)
    return box(a, r) * guide + box(mx - a * m, r)


def scatter(x, g, density, length, angle, width):
    """Particles on black, (B, 1, H, W): `density` soft lines per pixel, of random brightness; angle from vertical."""
    density, length, angle, width = (uniform(x, g, s) for s in (density, length, angle, width))
    points = torch.rand(len(x), 1, *x.shape[-2:], generator=g, device=x.device) < density
    points = points * torch.rand(points.shape, generator=g, device=x.device)  # brightness
    k = 2 * int(float((length / 2 + 2 * width).max()) + 1) + 1  # the edge, two widths out, is square: e^-2 is left
    r = torch.arange(k, device=x.device) - k // 2
    sin, cos = torch.deg2rad(angle).sin(), torch.deg2rad(angle).cos()
    along, across = r[:, None] * cos + r * sin, r * cos - r[:, None] * sin  # (B, 1, k, k)
    beyond = (along.abs() - length / 2).clamp(min=0)  # distance past the line's end
    return convolve(points, torch.exp(-(across**2 + beyond**2) / (2 * width**2))).clamp(min=0)


# ------------------------------------------------------------------------------------------ degradations
def noise(x, g, sigma=25.0):
    """Gaussian noise, sigma on the 0..255 scale; truncated to whole numbers as by AirNet (Li et al. 2022)."""
    n = normal(x, g)
    return (255 * x + uniform(x, g, sigma) * n).clamp(0, 255).floor() / 255


def camera_noise(x, g, log_shot=(-9.2, -4.4)):
    """A sensor's noise, of variance shot * light + read on linear light x^2.2 (Brooks et al. 2019, CVPR)."""
    log_shot = uniform(x, g, log_shot)
    log_read = 2.18 * log_shot + 1.2 + 0.26 * normal(log_shot, g)
    n = normal(x, g)
    smooth = uniform(x, g, (0.0, 1.0)) * (uniform(x, g, (0.0, 1.0)) < 0.5)  # in half of the images, as by demosaicing
    n = (1 - smooth) * n + smooth * 3 * box(n, 1)  # a mean of 3 x 3 has a third of the deviation
    light = x**2.2
    return (light + (log_shot.exp() * light + log_read.exp()).sqrt() * n).clamp(0, 1) ** (1 / 2.2)


def jpeg(x, g, quality=(30, 95)):
    """JPEG compression, with Pillow's tables and its 4:2:0 subsampling; quality 1 to 95. It runs on the CPU."""
    y, qualities = torch.empty_like(x), uniform(x, g, quality).flatten().tolist()
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    for i, q in enumerate(qualities):
        file = io.BytesIO()
        Image.fromarray(pixels[i]).save(file, "JPEG", quality=round(q))
        y[i] = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).to(x) / 255
    return y


def rain(x, g, density=(0.01, 0.03), length=(15, 40), angle=(-15, 15), width=(0.5, 0.8), strength=(0.15, 0.4)):
    """Rain streaks: x + strength * M, M two layers of lines (CDD-11, Guo et al. 2024; Rain100L, Yang et al. 2017)."""
    fall, mask = uniform(x, g, angle), 0
    for near in (0.6, 1.0):
        tilt = fall + uniform(x, g, (-3.0, 3.0))  # much the same direction
        few, long, wide = np.multiply(density, 0.5 / near), np.multiply(length, near), np.multiply(width, near)
        mask = mask + scatter(x, g, few.tolist(), long.tolist(), tilt, wide.tolist())
    return (x + uniform(x, g, strength) * mask).clamp(0, 1)


# Layers of snow: flakes per pixel, length, width, light. Many small ones far away, a few big ones out of focus.
FLAKES = (
    (0.006, (1, 4), (0.6, 1.0), 0.8),
    (0.0012, (1, 5), (1.2, 2.0), 1.4),
    (0.00006, (1, 4), (4.0, 7.0), 0.7),
)


def snow(x, g, density=(0.3, 2.0), angle=(-45, 45), strength=(0.7, 1.0)):
    """Snow: x (1 - S) + S, S a mask of flakes (CDD-11 step 3; Snow100K, Liu et al. 2018); density 1 for `FLAKES`."""
    fall, amount, flakes = uniform(x, g, angle), uniform(x, g, density), 0
    for count, length, width, light in FLAKES:
        tilt = fall + uniform(x, g, (-15.0, 15.0))
        flakes = flakes + light * scatter(x, g, count * amount, length, tilt, width)
    s = uniform(x, g, strength) * flakes.clamp(0, 1)
    return x * (1 - s) + s


def haze(x, g, beta=(1.0, 2.0), airlight=(0.6, 0.9), depth=None):
    """Haze: x t + A (1 - t) with t = exp(-beta d); A gray (CDD-11 step 4; the model of Koschmieder 1924).

    depth: relative distance d (B, 1, H, W), 1 far; NaN or None take a random one. As in CDD-11, d is at most 0.7."""
    random = depth_field(x, g)
    d = random if depth is None else torch.where(depth.isnan(), random, depth)
    t = torch.exp(-uniform(x, g, beta) * d.clamp(max=0.7))
    return (x * t + uniform(x, g, airlight) * (1 - t)).clamp(0, 1)


def depth_field(x, g):
    """A made-up distance (B, 1, H, W) in [0, 1]: far at the top, smooth relief, bright regions farther than dark."""
    up = torch.linspace(1, 0, x.shape[-2], device=x.device)[:, None]
    d = uniform(x, g, (0.0, 0.2)) + uniform(x, g, (0.2, 0.7)) * up
    grid = torch.rand(len(x), 1, 4, 4, generator=g, device=x.device)
    relief = F.interpolate(grid, x.shape[-2:], mode="bicubic", align_corners=True).clamp(0, 1)
    d = d + 0.3 * (relief - 0.4)
    gray = x.mean(1, keepdim=True)
    regions = guided(gray, gray, 8, 0.02)  # an edge-keeping blur
    return (d + uniform(x, g, (0.0, 0.4)) * (regions - 0.3)).clamp(0, 1)


def blur(x, g, length=(8, 24), size=31):
    """Camera shake: light x^2.2 convolved with a smooth random walk of `length` pixels (GoPro, Nah et al. 2017)."""
    turn = torch.randn(len(x), 64, generator=g, device=x.device).cumsum(1) * 0.15
    heading = 2 * torch.pi * uniform(x, g, (0.0, 1.0))[:, :, 0, 0] + turn
    path = torch.stack([heading.sin(), heading.cos()], -1).cumsum(1) * uniform(x, g, length)[:, :, :, 0] / 64
    path = path - path.mean(1, keepdim=True)  # (B, 64, 2)
    r = torch.arange(size, device=x.device) - size // 2
    squared = (r[:, None] - path[..., 0, None, None]) ** 2 + (r - path[..., 1, None, None]) ** 2  # (B, 64, K, K)
    kernel = torch.exp(-squared / (2 * 0.5**2)).sum(1, keepdim=True)
    return convolve(x**2.2, kernel / kernel.sum((-2, -1), keepdim=True)).clamp(0, 1) ** (1 / 2.2)


def low_light(x, g, gamma=(2.0, 3.0), sigma=(0.03, 0.08)):
    """Low light: x L^gamma / L + N(0, sigma), L the illumination (CDD-11 step 1, after LIME, Guo et al. 2017)."""
    brightest = box(x.amax(1, keepdim=True), 7)
    light = guided(x.mean(1, keepdim=True), brightest, 7, 0.01).clamp(1e-3, 1)
    n = uniform(x, g, sigma) * normal(x, g)
    return (x * light ** (uniform(x, g, gamma) - 1) + n).clamp(0, 1)


def dim_light(x, g, alpha=(0.9, 1.0), beta=(0.5, 1.0), gamma=(1.5, 5.0), sigma=(-0.004, 0.03)):
    """An underexposed photo: beta (alpha x)^gamma (Lv, Li & Lu 2021, IJCV), and noise where sigma > 0, in 8 bits."""
    y = uniform(x, g, beta) * (uniform(x, g, alpha) * x) ** uniform(x, g, gamma)
    y = y + uniform(x, g, sigma).clamp(min=0) * normal(x, g)
    return (255 * y).clamp(0, 255).round() / 255


def lens_drops(x, g, density=(0.0004, 0.0015), radius=(4.0, 9.0)):
    """Drops on the lens, which show the scene displaced and out of focus (RainDrop, Qian et al. 2018)."""
    height = scatter(x, g, density, (0.0, 3.0), (-20.0, 20.0), radius).clamp(max=1)  # (B, 1, H, W), smooth bumps
    inside = ((height - 0.3) * 10).clamp(0, 1)
    rows, columns = x.shape[-2:]
    slope = [(torch.roll(height, 1, a) - torch.roll(height, -1, a)).squeeze(1) for a in (-2, -1)]  # (B, H, W)
    down, right = (torch.linspace(-1, 1, n, device=x.device) for n in (rows, columns))
    place = torch.stack([right + 400 * slope[1] / columns, down[:, None] + 400 * slope[0] / rows], -1)
    seen = F.grid_sample(box(x, 4), place, padding_mode="reflection", align_corners=True)
    return x * (1 - inside) + inside * (0.85 * seen + 0.15 * height).clamp(0, 1)


# ------------------------------------------------------------------------------------------------ suites
STREAKS = dict(density=(0.0005, 0.0018), length=(20, 50), angle=(-25, 25), width=(0.6, 1.1), strength=(0.3, 0.6))
OUTDOOR = {"SOTS": (haze, dict(beta=(0.4, 2.0), airlight=(0.8, 1.0))), "Rain100L": (rain, STREAKS)}
NOISE = {f"CBSD68_{sigma}": (noise, dict(sigma=float(sigma))) for sigma in (15, 25, 50)}
LOL = (low_light, dict(gamma=(2.5, 4.0), sigma=(0.01, 0.03)))
FINE = dict(density=(0.04, 0.08), length=(12, 30), width=(0.5, 0.7), strength=(0.06, 0.12))
CDD = {"low": (low_light, {}), "rain": (rain, FINE), "snow": (snow, {}), "haze": (haze, {})}
CDD11 = ["low", "haze", "rain", "snow", "low_haze", "low_rain", "low_snow", "haze_rain", "haze_snow"]
CDD11 += ["low_haze_rain", "low_haze_snow"]
EVERYDAY = {  # for one network that is to mend all and spoil nothing: from sound photos to bad ones
    "noise": (noise, dict(sigma=(0.0, 55.0))),
    "grain": (noise, dict(sigma=(0.0, 12.0))),
    "camera": (camera_noise, {}),
    "hazy": (haze, dict(beta=(0.0, 2.2), airlight=(0.7, 1.0))),
    "streaks": (rain, STREAKS | dict(strength=(0.1, 0.6))),
    "shake": (blur, dict(length=(2, 26))),
    "dim": (dim_light, {}),
    **CDD,
    "low": (low_light, dict(gamma=(2.0, 4.0), sigma=(0.0, 0.08))),
    "jpeg": (jpeg, {}),
}

# suite -> its steps in the order they happen: name -> (degradation, parameters)
SUITES = {
    "three_task": OUTDOOR | NOISE,
    "five_task": OUTDOOR | {"CBSD68_25": NOISE["CBSD68_25"], "GoPro": (blur, {}), "LOLv1": LOL},
    "deweather": {
        "Snow100K-S": (snow, dict(density=(0.3, 1.0))),
        "Snow100K-L": (snow, dict(density=(1.5, 4.0))),
        "Outdoor-Rain": (rain, dict(density=(0.02, 0.06), strength=(0.12, 0.3))),
        "veil": OUTDOOR["SOTS"],  # heavy rain far away is a haze
        "RainDrop": (lens_drops, {}),
    },
    "cdd11": CDD,  # all its combinations
    "doubles": CDD,  # at most two at a time
    "singles": CDD,  # one at a time
    "everyday": EVERYDAY,
    "hard": {name: EVERYDAY[name] for name in ("streaks", "shake", "rain", "snow")},
}
SUITES["mixed"] = SUITES["three_task"] | SUITES["five_task"] | CDD  # all published tables at once

# suite -> its columns: name -> the steps in it
COLUMNS = {suite: {name: [name] for name in steps} for suite, steps in SUITES.items()}
COLUMNS["cdd11"] = {name: name.split("_") for name in CDD11} | COLUMNS["cdd11"]  # the right one: for what you add
COLUMNS["doubles"] = {name: steps for name, steps in COLUMNS["cdd11"].items() if len(steps) < 3} | COLUMNS["doubles"]
COLUMNS["deweather"]["Outdoor-Rain"] += COLUMNS["deweather"].pop("veil")
COLUMNS["everyday"] = {"clean": []} | COLUMNS["everyday"] | COLUMNS["cdd11"]
COLUMNS["mixed"] = COLUMNS["three_task"] | COLUMNS["five_task"] | COLUMNS["cdd11"] | COLUMNS["mixed"]

# suite -> how often training meets each column, in whole numbers. Haze and darkness change every pixel, and drown what
# changes few, as rain does, and what is small, as noise is, until that has been learned: train some hundred steps on
# "hard", and with more noise (shares=dict(noise=300)), then on "everyday" as it is.
SHARES = {suite: dict.fromkeys(columns, 1) for suite, columns in COLUMNS.items()}
SHARES["everyday"] |= dict.fromkeys(CDD11, 6) | dict(low=44, haze=8, rain=12, snow=20, clean=30, jpeg=130, noise=100)
SHARES["everyday"] |= dict(grain=30, camera=14, hazy=56, streaks=44, shake=12, dim=48)


def check_suite(suite, shares=()):
    """Raises InputError where there is no such suite, or shares are none of its columns', or no whole numbers."""
    if suite not in SUITES:
        raise InputError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    if suite not in COLUMNS or suite not in SHARES:
        wanted = "in degrade.COLUMNS, column -> its steps, and in degrade.SHARES, column -> 1"
        raise InputError(f"suite {suite!r} is in degrade.SUITES alone: enter it {wanted}")
    if strange := sorted({*shares} - {*COLUMNS[suite]}):
        raise InputError(f"shares of {', '.join(map(repr, strange))}: suite {suite!r} has {', '.join(COLUMNS[suite])}")
    shares = SHARES[suite] | dict(shares)
    if bad := [f"{name}={n!r}" for name, n in shares.items() if not (isinstance(n, int) and n >= 0)]:
        raise InputError(f"shares must be whole numbers from 0 on, not {', '.join(bad)}")
    if not any(shares.values()):
        raise InputError(f"the shares of all columns of suite {suite!r} are 0: nothing is left to train on")


def degrade(x, g, suite, columns, depth=None):
    """Degrade each image of a batch by its own column of a suite, all images of one step together.

    x: clean (B, 3, H, W) in [0, 1]; g: generator on its device; columns: B names, e.g. ["low_haze", "rain"]; depth: as
    in `haze`. Returns (B, 3, H, W). Raises InputError for an unknown suite or column."""
    check_suite(suite)
    if len(columns) != len(x):
        raise InputError(f"{len(columns)} columns for {len(x)} images: name one for each")
    if unknown := sorted({*columns} - {*COLUMNS[suite]}):
        raise InputError(f"unknown column {unknown[0]!r} in {suite}: choose one of {', '.join(COLUMNS[suite])}")
    x = x.clone()
    for step, (function, parameters) in SUITES[suite].items():
        index = [i for i, name in enumerate(columns) if step in COLUMNS[suite][name]]
        if index:
            extra = dict(depth=depth[index]) if function is haze and depth is not None else {}
            x[index] = function(x[index], g, **parameters, **extra)
    return x
