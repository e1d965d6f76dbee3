"""Does refinement pay? Recipes trained equally long, with several seeds, and compared image by image."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import benchmark, show, train
from .data import Images, held_out
from .degrade import COLUMNS
from .files import InputError, find_photos, read, whole
from .settings import choose
from .sipl import SIPL
from .speed import Operations
from .tried import Correcting, Placed, Recurrent, Sharp, half, late, thirds

# arm -> (recipe, in what the plain backbone is widened to equal `unroll` at T = 1, settings other than the recipe's)
ARMS = {
    "backbone": ("backbone", None, {}),
    "same parameters": ("backbone", "parameters", {}),
    "same compute": ("backbone", "operations", {}),
    "privilege": ("privilege", None, {}),
    "authors": ("authors", None, {}),
    "unroll": ("unroll", None, {}),
    "unroll, not aligned": ("unroll", None, dict(aligned=False)),
    "unroll, released write": ("unroll", None, dict(aligned=False, identity_start=False)),
    "unroll, loss late": (late, None, {}),
    "unroll, P half clean": (half, None, {}),
    "unroll, P of three kinds": (thirds, None, {}),
    "unroll, sharp": ("unroll", None, dict(aligned=False)),
    "unroll, sharp and placed": ("unroll", None, dict(aligned=False)),
    "correcting, loss late": (late, None, {}),
    "recurrent, loss late": (late, None, dict(aligned=False)),
}
CLASSES = {"correcting, loss late": Correcting, "recurrent, loss late": Recurrent, "unroll, sharp": Sharp,
           "unroll, sharp and placed": Placed}  # the others are SIPL  # fmt: skip
MAIN = list(ARMS)[:6]  # what is compared unless somebody asks for the others


def build(arm, preset="nano"):
    """The untrained model of an arm."""
    recipe, equal, other = ARMS[arm]
    width = {"dim": widened(preset, equal)} if equal else {}
    design = train.DESIGN[recipe if isinstance(recipe, str) else "unroll"]
    return CLASSES.get(arm, SIPL)(preset, **design | other | width)


@functools.cache
def widened(preset, equal):
    """The `dim` at which the plain backbone is nearest to `unroll` with T = 1, in parameters or operations."""
    target, sizes = cost(build("unroll", preset))[equal], {}
    start = SIPL(preset, fusion=False).settings.dim
    for dim in range(start, 3 * start):
        try:
            sizes[dim] = cost(SIPL(preset, fusion=False, dim=dim))[equal]
        except InputError:  # heads do not divide it
            continue
        if sizes[dim] > target:
            break
    return min(sizes, key=lambda dim: abs(sizes[dim] / target - 1))


@torch.no_grad()
def cost(model, size=64):
    """Parameters, and operations (additions and multiplications per pixel) of one restoration, T = 1 where it can."""
    with Operations() as counted:
        model.eval().refine(torch.rand(1, 3, size, size), int(model.settings.fusion))
    return dict(parameters=sum(p.numel() for p in model.parameters()), operations=round(counted.total / size**2))


@torch.no_grad()
def measure(model, setting, photos, steps, size):
    """PSNR and SSIM on every column and photo: y0..y_T, and "oracle", the pass guided by the clean image."""
    rows, device = [], next(model.parameters()).device
    for column in COLUMNS[setting]:
        for name, photo in photos.items():
            x, y = benchmark.pair(benchmark.centre(photo, size), setting, column, device=device)
            found = benchmark.estimates(model, x, steps if model.settings.fusion else 0)
            if model.settings.fusion and not isinstance(model, (Correcting, Recurrent)):  # no P alone
                found["oracle"] = model(x, model.privileged(y))
            rows += [dict(setting=setting, column=column, photo=name) | row for row in benchmark.scores(found, y)]
    return rows


def run(folder, images=None, test=None, settings=("cdd11", "five_task"), arms=tuple(MAIN), seeds=3, preset="nano",
        steps=400, T=4, size=128, photos=12, device=None, progress=True):  # fmt: skip
    """Train and measure every arm with every seed and setting; finished ones are kept, an interrupted one continues.

    Equal for all arms: steps, batches (the same, by seed), schedule, test images. Not equal: the time of a step.

    Args:
        folder: gets a folder and a CSV file for each training.
        images: as in `Images`. test: a folder of test photos, of which evenly `photos` are used; default the embedded
            held-out ones. size: their middle pixels. T: refinement steps measured. Others as in `train.fit`.
    Returns all rows. Raises InputError for names that do not exist, and for a folder that holds another study.
    """
    folder, rows = Path(folder), []
    for name, given, known in (("arm", arms, ARMS), ("setting", settings, COLUMNS)):
        for value in given:
            if value not in known:
                raise InputError(f"unknown {name} {value!r}: choose of {', '.join(known)}")
    for name, value in (("seeds", seeds), ("photos", photos), ("T", T)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name}={value!r} must be a positive whole number")
    if type(size) is not int or size < 16:
        raise InputError(f"size={size!r} must be a whole number, 16 pixels or more")
    paths = find_photos(test) if test else []
    chosen = {p.stem: read(p) for p in paths[:: max(1, len(paths) // photos)][:photos]} if paths else held_out()
    for photo in chosen.values():
        benchmark.centre(photo, size)  # says now, not after hours, what is too small
    images = Images(images)
    same = json.dumps([preset, steps, T, size, images.names(), [[n, p.shape] for n, p in chosen.items()]])
    same = str(zlib.crc32(same.encode()))  # what must agree between the rows of one table
    schedule = train.SCHEDULES[choose(preset) and preset] | dict(steps=steps)
    jobs = [(setting, seed, arm) for setting in settings for seed in range(seeds) for arm in arms]
    for setting, seed, arm in tqdm(jobs, unit="training", disable=not progress):
        place = folder / f"{setting}-{arm.replace(',', '').replace(' ', '_')}-{seed}"
        done = place.with_suffix(".csv")
        if not done.exists():
            torch.manual_seed(seed)
            model = build(arm, preset)
            about = dict(study=same, arm=arm, seed=seed, preset=preset, steps=steps) | cost(model)
            train.fit(model, images, setting=setting, recipe=ARMS[arm][0], seed=seed, folder=place, device=device,
                      progress=progress, **schedule)  # fmt: skip
            benchmark.write_csv([about | row for row in measure(model, setting, chosen, T, size)], done)
        found = benchmark.read_csv(done)
        if found[0].get("study") != same:
            was = f"{found[0]['steps']} steps of {found[0]['preset']}"
            raise InputError(f"{str(done)!r} is of another study ({was}): repeat its arguments, or pass another folder")
        rows += found
    return rows


# ------------------------------------------------------------------------------------------------------ tables


def values(rows, setting, arm, estimate, value="psnr"):
    """An array (seeds, images), the images in one order for all arms; empty where there are none."""
    mine = [r for r in rows if (r["setting"], r["arm"], r["estimate"]) == (setting, arm, estimate)]
    return np.array([[r[value] for r in mine if r["seed"] == seed] for seed in sorted({r["seed"] for r in mine})])


def spread(samples, sign=""):
    """'20.31 ± 0.12': mean and standard deviation over seeds."""
    mean = f"{np.mean(samples):{sign}.2f}"
    return f"{mean} ± {np.std(samples, ddof=1):.2f}" if len(samples) > 1 else mean


def report(rows):
    """The tables as Markdown: PSNR of each arm and estimate, then what refinement gains, paired image by image."""
    text = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        mine = [r for r in rows if r["setting"] == setting]
        arms = list(dict.fromkeys(r["arm"] for r in mine))
        estimates = sorted({r["estimate"] for r in mine} - {"input", "oracle"}) + ["oracle"]
        start = values(mine, setting, arms[0], "input")
        text += [f"## {setting}", "",
                 f"PSNR (dB), mean and standard deviation over {len(start)} seeds, {start.shape[1]} test images, "
                 f"{mine[0]['steps']} steps of {mine[0]['preset']}; input {start.mean():.2f}.", "",
                 "| arm | parameters | operations per pixel | " + " | ".join(estimates) + " |",
                 "|---" * (3 + len(estimates)) + "|"]  # fmt: skip
        for arm in arms:
            found = [values(mine, setting, arm, e) for e in estimates]
            about = next(r for r in mine if r["arm"] == arm)
            numbers = [spread(f.mean(1)) if len(f) else "-" for f in found]
            text.append(f"| {arm} | {int(about['parameters']) / 1e6:.2f} M | {int(about['operations']) / 1e3:.0f} k | "
                        + " | ".join(numbers) + " |")  # fmt: skip
        text += ["", *gains(mine, setting, arms), ""]
    return "\n".join(text)


def gains(rows, setting, arms):
    """Lines of the second table: what each arm ends with, less y0 and less the plain backbones, paired."""
    lines = [
        "| estimate | less | dB, mean over images, ± over seeds | images where it is better |",
        "|---|---|---|---|",
    ]
    for arm in (a for a in arms if ARMS[a][0] != "backbone"):
        last = "y0" if ARMS[arm][0] == "privilege" else "y1"  # classic privilege learning does not refine
        for other in (arm, *(b for b in arms if ARMS[b][0] == "backbone")):
            if (other, last) == (arm, "y0"):
                continue
            found, base = values(rows, setting, arm, last), values(rows, setting, other, "y0")
            both = min(len(found), len(base))
            less = found[:both] - base[:both]
            share = f"{(less > 0).mean():.0%}"
            lines.append(
                f"| {arm}, {last} | {'its y0' if other == arm else other} | {spread(less.mean(1), '+')} | {share} |"
            )
    return lines


def draw(rows):
    """PSNR against T, a line for each arm, its band the spread over seeds; plain backbones have no T."""
    from matplotlib import pyplot as plt

    settings = list(dict.fromkeys(r["setting"] for r in rows))
    figure, axes = plt.subplots(1, len(settings), figsize=(5.2 * len(settings), 4), squeeze=False, layout="constrained")
    steps = sorted({int(r["estimate"][1:]) for r in rows if r["estimate"][0] == "y"})
    for ax, setting in zip(axes.flat, settings):
        for k, arm in enumerate(dict.fromkeys(r["arm"] for r in rows)):
            plain = ARMS[arm][0] == "backbone"
            found = [values(rows, setting, arm, "y0" if plain else f"y{t}").mean(1) for t in steps]
            mean, deviation = np.mean(found, 1), np.std(found, 1)
            ax.plot(steps, mean, "--" if plain else "o-", color=f"C{k}", label=arm)
            ax.fill_between(steps, mean - deviation, mean + deviation, color=f"C{k}", alpha=0.15)
        ax.set(xlabel="refinement steps T", ylabel="PSNR (dB)", title=setting, xticks=steps)
    axes[0, 0].legend(fontsize=8)
    return figure


def save(rows, folder):
    """Write study.csv, study.md and study.png, each whole."""
    folder = Path(folder)
    shorter = [r | {v: f"{r[v]:.4f}" for v in ("psnr", "ssim")} for r in rows]
    benchmark.write_csv(shorter, folder / "study.csv")
    with whole(folder / "study.md") as temporary:
        temporary.write_text(report(rows))
    show.save(draw(rows), folder / "study.png")


# ----------------------------------------------------------------------------------------- without ground truth


def excess(y):
    """How far an estimate (B, 3, H, W) leaves [0, 1], mean over its values: (B,).

    The best of the signals tried for whether a further step helps: it did if the excess fell. Notebook 04 measures how
    often that is right, which is not often enough to rely on.
    """
    return (y - y.clamp(0, 1)).abs().mean((1, 2, 3))
