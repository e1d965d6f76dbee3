"""What the loop is worth: python -m sipl_min.study QUESTION FOLDER. Small trainings, seeds, paired comparisons.

`who`       Who is in the loop? The proxy is made from the estimate, from noise, from another image, ...
`capacity`  Backbone, a backbone of the operations of T = 1, SIPL with T = 0..4: what pays per operation?
`combinations`  Trained on single degradations, on pairs too, on all: which loop mends two and three at once?
`windows`   Photos in windows of 64 x 64: guided by an overview of the photo, or by nothing, and the photo at once.
`cost`      Operations of T = 0..4, by the paper's loop, by the released code's, and with nothing reused.

With --weights these are measured, and nothing is trained. Else all arms of a seed see the same crops (in the same
damage, where they have the same suite; in `windows` two see parts of larger ones) and test images. Trainings and
tables lie in FOLDER; an interrupted command goes on where it was. What was found stands in data/README.md."""

import argparse
import copy
import sys
import zlib
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .data import Images, held_out
from .degrade import COLUMNS, degrade, generator, haze, jpeg, noise
from .evaluate import Rows, center, checksum, pair, psnr
from .fast import accelerate, accelerated
from .files import InputError, atomic_write, exit_code
from .photos import find, read, windows
from .sipl import SIPL
from .speed import as_released
from .train import RECIPE_SETTINGS, fit

# ------------------------------------------------------------------------------------------- who is in the loop


def constant_proxies(model, images):
    """One proxy for all images: the mean of Read(D, E(y_0)) over degraded images, each (1, 3, H, W)."""
    with torch.no_grad():
        proxies = [model.proxies(model.privileged(model(x))) for x in images]
    return [torch.stack(scale).mean(0) for scale in zip(*proxies)]


def proxies_from(model, x, y, other, constant, g):
    """name -> proxies, made of anything that could play the privileged image, and of changed dictionaries.

    x, y: degraded and clean image, (1, 3, H, W). other: another image with another degradation. g: for the noise.
    constant: from `constant_proxies`. "mean color" is a flat image of the clean image's."""
    D = model.proxies()
    mean = [d.mean((-2, -1), keepdim=True) for d in D]
    images = {
        "estimate": model(x),
        "noise": torch.rand(x.shape, generator=g).to(x),
        "other image": model(other),
        "input": x,
        "clean": y,
        "mean color": y.mean((-2, -1), keepdim=True).expand_as(y),
    }
    return {name: model.proxies(model.privileged(image)) for name, image in images.items()} | {
        "constant": constant,
        "D": D,
        "D - mean": [d - m for d, m in zip(D, mean)],
        "zero": [torch.zeros_like(d) for d in D],
    }


def restore_with(model, x, found):
    """name -> f(x; proxies), from name -> proxies, for an image x (1, 3, H, W); E(x) is computed once."""
    (H, W), x = x.shape[-2:], model.pad(x)
    features = model.encoder(x)
    return {name: model.decode(x, features, proxies)[..., :H, :W] for name, proxies in found.items()}


def share_between_images(model, images):
    """Which share of the proxies' variance lies between images, 0 (a constant) to 1, at each scale."""
    with torch.no_grad():
        proxies = [model.proxies(model.privileged(model(x))) for x in images]
    scales = [torch.cat(scale) for scale in zip(*proxies)]
    total = [(p - p.mean((0, 2, 3), keepdim=True)).square().mean(0).sum() for p in scales]
    return [float(p.var(0, correction=0).sum() / t) for p, t in zip(scales, total)]


UNLIKE = {  # stronger than in training: column -> further degradation of the clean image x
    "denser haze": partial(haze, beta=(2.5, 3.5)),
    "stronger noise": partial(noise, sigma=75.0),
    "snow, then JPEG": lambda x, g: jpeg(degrade(x, g, "cdd11", ["snow"]), g, quality=(20, 30)),
}


def who(model, photos):
    """Yield (column, photo, name of what the proxy is made of, PSNR) for inputs like training's and unlike them."""
    cases = [(c, n, *pair(p, "cdd11", c)) for c in COLUMNS["cdd11"] for n, p in photos.items()]
    constant = constant_proxies(model, [x for _, _, x, _ in cases[:: max(1, len(cases) // 32)]])
    for number, (_, name, _, y) in enumerate(cases[: len(photos)]):
        for column, function in UNLIKE.items():
            cases.append((column, name, function(y, generator(number)), y))
    for number, (column, name, x, y) in enumerate(cases):
        other = cases[(number + len(photos) + 1) % len(cases)][2]  # the next photo, in the next column
        other = torch.nn.functional.interpolate(other, x.shape[-2:])
        found = proxies_from(model, x, y, other, constant, generator(number))
        for source, estimate in restore_with(model, x, found).items():
            yield column, name, source, psnr(estimate, y)


# ----------------------------------------------------------------------------------------------------- capacity


def operations(model, T=0, feedback="privilege", size=64):
    """Multiplications and additions per pixel of 0, 1, ..., T refinements, a list.

    PyTorch's counter does not see fused attention, so that is off here. On the device "meta" no value is computed."""
    x = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    model = copy.deepcopy(model).eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return [counter.get_total_flops() / size**2 for _ in model.estimates(x, T, feedback)]


def wider(dim, suite=""):
    """Width of the backbone that costs in one pass what SIPL of width `dim` does at T = 1; or, with a suite as of
    `combinations`, what two passes of the backbone do."""
    fusion = not suite
    target = operations(SIPL("nano", dim=dim, fusion=fusion), 1, "privilege" if fusion else "again")[1]
    widths = range(dim, 2 * dim + 1, 2)  # even ones; twice the width is nearly four times the operations
    return min(widths, key=lambda d: abs(operations(SIPL("nano", dim=d, fusion=False))[0] / target - 1))


def loops(model, photos):
    """Yield (column, photo, loop and estimate, PSNR) for T = 0..4: of a backbone by the feedback "again"."""
    for column in COLUMNS["cdd11"]:
        for name, photo in photos.items():
            x, y = pair(photo, "cdd11", column)
            for loop in ("privilege", "chain") if model.fusion else ("again",):
                for t, estimate in enumerate(model.refine(x, 4, loop, return_all=True)):
                    yield column, name, f"{loop} y{t}", psnr(estimate, y)


# ------------------------------------------------------------------------------------------------------ windows
def in_windows(model, photos):
    """Yield (column, photo, guide, PSNR): photos in windows, 64 x 64 or as in training, by what all windows read."""
    side = getattr(model, "about", {}).get("window", 64)
    for column in COLUMNS["cdd11"]:
        for name, photo in photos.items():
            x, y = pair(photo, "cdd11", column)
            guides = {"no guide": None}
            if model.fusion:
                small = torch.nn.functional.interpolate(x, (side, side), mode="area")
                guides["degraded overview"] = model.privileged(small)
                guides["restored overview"] = model.privileged(model(small))
            for guide, P in guides.items():
                yield column, name, guide, psnr(windows(lambda part: model(part, P), x, side, overlap=0), y)
            yield column, name, "whole, no guide", psnr(model(x), y)
            if model.fusion:
                yield column, name, "whole, degraded overview", psnr(model(x, guides["degraded overview"]), y)


# --------------------------------------------------------------------------------------------------------- cost
def cost(presets=("nano", "small", "paper"), counted=256, timed=128):
    """Two Markdown tables: the first pass in operations, and in seconds on this CPU; T refinements as multiples of it.

    Images have counted x counted and timed x timed pixels. Seconds are those of `fast.py`, and where nothing is reused
    of the code as released."""
    head = "| preset | loop | {}, T = 0 | T = 1 | T = 2 | T = 3 | T = 4 |\n" + "|---" * 7 + "|"
    threads = f"seconds ({timed} × {timed} pixels, threads: {torch.get_num_threads()})"
    tables = [head.format("operations per pixel")], [head.format(threads)]
    for preset, loop in product(presets, ("privilege", "chain", "nothing reused")):
        make = as_released if loop == "nothing reused" else accelerate
        with torch.device("meta"):
            model = SIPL(preset) if make is accelerate else make(SIPL(preset))
        number = operations(model, 4, loop, counted)
        took = seconds(make(SIPL(preset).eval()), loop, timed)
        firsts = f"{number[0] / 1e3:,.0f} thousand", f"{took[0]:.3f}"
        for table, first, values in zip(tables, firsts, (number, took)):
            times = " | ".join(f"{value / values[0]:.2f} ×" for value in values[1:])
            table.append(f"| {preset} | {loop} | {first} | {times} |")
    return "\n\n".join(map("\n".join, tables)) + "\n"


@torch.no_grad()
def seconds(model, loop, size, runs=3):
    """Seconds until y_0, ..., y_4 are there, medians of some runs."""
    x, found = torch.rand(1, 3, size, size).to(next(model.parameters())), []
    for _ in range(runs + 1):  # the first warms up
        start, times = perf_counter(), []
        for y in model.estimates(x, 4, loop):
            y[0, 0, 0, 0].item()  # waits for a GPU
            times.append(perf_counter() - start)
        found.append(times)
    return np.median(found[1:], axis=0)


# -------------------------------------------------------------------------------------------------------- study
GUIDED = ["authors", "privilege", "unroll"]
STEPWISE = ["singles: backbone", "singles: equal compute", "singles: again", "singles: authors"]
STEPWISE += ["doubles: backbone", "backbone"]
WINDOWED = ["windowed", "overview"]  # learn from windows of crops that were damaged whole, without a guide and with
QUESTIONS = {  # what is measured, and the arms: a suite to train on if it is not cdd11, and a recipe
    "who": (who, GUIDED),
    "capacity": (loops, ["backbone", "equal compute", *GUIDED]),
    "combinations": (loops, STEPWISE),
    "windows": (in_windows, ["backbone", *WINDOWED]),
}


def build(arm, dim, seed=0):
    """The untrained model of an arm, its recipe, and the suite that it is trained on."""
    torch.manual_seed(seed)
    suite, _, arm = arm.rpartition(": ")
    dim = wider(dim, suite) if arm == "equal compute" else dim
    recipe = "backbone" if arm in ("equal compute", "windowed") else arm
    return SIPL("nano", dim=dim, **RECIPE_SETTINGS[recipe]), recipe, suite or "cdd11"


def run(question, folder, images=None, test=None, weights=(), seeds=3, num_steps=5000, dim=8, size=192, photos=16):
    """Train each arm with each seed, measure, and return all rows; what lies in `folder` is not trained again.

    weights: names or files to measure instead."""
    if min(seeds, photos, size) < 1:
        raise InputError(f"seeds={seeds}, photos={photos} and size={size} must be 1 or more")
    folder, (measure, arms) = Path(folder), QUESTIONS[question]
    paths = find(test)[:photos] if test else []
    tests = {p.relative_to(test).as_posix(): read(p) for p in paths} or dict([*held_out().items()][:photos])
    tests = {name: center(photo, size) for name, photo in tests.items()}
    about = dict(size=size, photos=len(tests), test=zlib.crc32(b"".join(photo.tobytes() for photo in tests.values())))
    if weights:
        about["weights"] = [checksum(*SIPL.load(name).state_dict().values()) for name in weights]
        arms, seeds = weights, 1
    else:
        about = dict(num_steps=num_steps, dim=dim) | about
    rows = Rows(folder / f"{question}.csv", ["arm", "seed", "column", "photo", "name"], ["psnr"], **about)
    images = None if weights else Images(images)
    for seed in range(seeds):
        for arm in tqdm(arms, desc=f"seed {seed}"):
            if weights:
                model = SIPL.load(arm)
                if question != "windows" and "window" in model.about:
                    raise InputError(f"{arm} has the recipe 'overview', which has no loop: ask about windows")
                if question == "who" and not model.fusion:
                    raise InputError(f"{arm} has no Proxy Fusion, so that nothing is in its loop: pass other weights")
            else:
                model, recipe, suite = build(arm, dim, seed)
                to = dict(folder=folder / f"{arm}-{seed}".replace(": ", "-"), seed=seed)
                options = dict(suite=suite, num_steps=num_steps, crop_size=64, lr=1e-3, warmup=100)
                options |= dict(crop_size=192, window=64) if arm in WINDOWED else {}
                fit(model, images, recipe=recipe, **options, **to)
                model.cpu()  # where the test images are
            with accelerated(model), torch.no_grad():
                for column, photo, name, value in measure(model, tests):
                    rows.add(arm=arm, seed=seed, column=column, photo=photo, name=name, psnr=value)
    return [*rows.done.values()]


def report(rows, by_number=False):
    """Markdown tables: a line for each arm, PSNR (dB), mean over images and columns ± deviation over seeds.

    by_number: a table for each number of degradations, instead of one for inputs like training's and one unlike."""

    def group(column):
        if by_number:
            return f"{column.count('_') + 1} at once"
        return "unlike training" if column in UNLIKE else "like training"

    text = []
    for title in dict.fromkeys(group(row["column"]) for row in rows):
        mine = [row for row in rows if group(row["column"]) == title]
        names = list(dict.fromkeys(row["name"] for row in mine))
        text += [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for arm in dict.fromkeys(row["arm"] for row in mine):
            text.append(f"| {arm} | " + " | ".join(spread(mine, arm, name) for name in names) + " |")
        text.append("")
    return "\n".join(text)


def spread(rows, arm, name):
    """'20.31 ± 0.12': mean, and standard deviation over seeds."""
    mine = [r for r in rows if (r["arm"], r["name"]) == (arm, name)]
    means = [np.mean([r["psnr"] for r in mine if r["seed"] == seed]) for seed in sorted({r["seed"] for r in mine})]
    if len(means) < 2:
        return f"{means[0]:.2f}" if means else "-"
    return f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m sipl_min.study", description=__doc__.partition("\n")[0])
    parser.add_argument("question", choices=[*QUESTIONS, "cost"])
    parser.add_argument("folder", help="where trainings and tables go")
    parser.add_argument("--images", help="a folder of clean photos to train on (default: the embedded images)")
    parser.add_argument("--test", help="a folder of photos to test on (default: the embedded held-out photos)")
    parser.add_argument("--weights", nargs="+", default=(), help="names or files to measure instead of training")
    for name, value in (("seeds", 3), ("num-steps", 5000), ("dim", 8), ("size", 192), ("photos", 16)):
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    options = vars(parser.parse_args(arguments))

    def answer():
        question = options["question"]
        if question == "cost" and options["weights"]:
            raise InputError("cost counts the presets, untrained: leave out --weights")
        text = cost() if question == "cost" else report(run(**options), question == "combinations")
        with atomic_write(Path(options["folder"]) / f"{question}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(text)

    return exit_code(answer)


if __name__ == "__main__":
    sys.exit(main())
