"""What the loop is worth: python -m sipl_min.study QUESTION FOLDER. Small trainings, seeds, paired comparisons.

`who`       Who is in the loop? The proxy is made from the estimate, from noise, from another image, ...
`capacity`  Backbone, a backbone of the operations of T = 1, SIPL with T = 0..4: what pays per operation?
`combinations`  Trained on single degradations, on pairs too, on all: which loop mends two and three at once?
`windows`   Photos in windows of 64 x 64: guided by an overview of the photo, or by nothing, and the photo at once.
`cost`      Operations and seconds of T = 0..4, by the paper's loop, by the released code's, and with nothing reused.

With --weights these are measured, and nothing is trained. Else all arms of a seed see the same crops (in the same
damage, where they have the same suite; in `windows` two see parts of larger ones) and test images. Trainings and
tables lie in FOLDER; an interrupted command goes on where it was. What was found stands in data/README.md."""

import argparse
import copy
import sys
import zlib
from collections import defaultdict
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as F
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
@torch.no_grad()
def constant_proxies(model, images):
    """One proxy for all images: the mean of Read(D, E(y_0)) over degraded images, each (1, 3, H, W)."""
    proxies = [model.proxies(model.privileged(model(x))) for x in images]
    return [torch.cat(scale).mean(0, keepdim=True) for scale in zip(*proxies)]


@torch.no_grad()
def share_between_images(model, images):
    """Which share of the proxies' variance lies between images, 0 (a constant) to 1, at each scale."""
    proxies = [model.proxies(model.privileged(model(x))) for x in images]
    scales = [torch.cat(scale) for scale in zip(*proxies)]
    total = [(p - p.mean((0, 2, 3), keepdim=True)).square().mean(0).sum() for p in scales]
    return [float(p.var(0, correction=0).sum() / t) for p, t in zip(scales, total)]


def proxies_from(model, x, y, other, constant, g):
    """name -> proxies, made of anything that could play the privileged image, and of changed dictionaries.

    x, y: degraded and clean image, (1, 3, H, W). other: another image with another degradation. g: for the noise.
    constant: from `constant_proxies`. "mean color" is a flat image of the clean image's."""
    images = {"estimate": model(x), "noise": torch.rand(x.shape, generator=g).to(x), "other image": model(other)}
    images |= {"input": x, "clean": y, "mean color": y.mean((-2, -1), keepdim=True).expand_as(y)}
    found = {name: model.proxies(model.privileged(image)) for name, image in images.items()}
    D = model.proxies()
    centered = [d - d.mean((-2, -1), keepdim=True) for d in D]
    return found | {"constant": constant, "D": D, "D - mean": centered, "zero": [torch.zeros_like(d) for d in D]}


def restore_with(model, x, found):
    """name -> f(x; proxies), from name -> proxies, for an image x (1, 3, H, W); E(x) is computed once."""
    (H, W), x = x.shape[-2:], model.pad(x)
    features = model.encoder(x)
    return {name: model.decode(x, features, proxies)[..., :H, :W] for name, proxies in found.items()}


UNLIKE = {  # stronger than in training: column -> further degradation of the clean image x
    "denser haze": partial(haze, beta=(2.5, 3.5)),
    "stronger noise": partial(noise, sigma=75.0),
    "snow, then JPEG": lambda x, g: jpeg(degrade(x, g, "cdd11", ["snow"]), g, quality=(20, 30)),
}


# Each of these three asks a model about cases (column, photo, degraded x, clean y), all photos of a column after each
# other, and yields (case, name -> estimate of y).
def who(model, cases):
    """By what the proxy is made of, for inputs like training's and unlike them."""
    photos = len({name for _, name, _, _ in cases})
    constant = constant_proxies(model, [x for _, _, x, _ in cases[:: max(1, len(cases) // 32)]])
    cases = [*cases]
    for number, (_, name, _, y) in enumerate(cases[:photos]):
        cases += [(column, name, damage(y, generator(number)), y) for column, damage in UNLIKE.items()]
    for number, case in enumerate(cases):
        _, _, x, y = case
        other = cases[(number + photos + 1) % len(cases)][2]  # the next photo, in the next column
        other = F.interpolate(other, x.shape[-2:])
        yield case, restore_with(model, x, proxies_from(model, x, y, other, constant, generator(number)))


def loops(model, cases):
    """By loop and step, T = 0..4: of a backbone by the feedback "again"."""
    feedback = ("privilege", "chain") if model.fusion else ("again",)
    for case in cases:
        found = {loop: model.refine(case[2], 4, loop, return_all=True) for loop in feedback}
        yield case, {f"{loop} y{t}": y for loop, estimates in found.items() for t, y in enumerate(estimates)}


def in_windows(model, cases):
    """By what all windows read, of 64 x 64 pixels or as in training; and of the photo as a whole."""
    side = model.about.get("window", 64)
    for case in cases:
        x, guides = case[2], {"no guide": None}
        if model.fusion:
            small = F.interpolate(x, (side, side), mode="area")
            guides["degraded overview"] = model.privileged(small)
            guides["restored overview"] = model.privileged(model(small))
        found = {guide: windows(lambda part: model(part, P), x, side, overlap=0) for guide, P in guides.items()}
        for guide in [*guides][:2]:
            found[f"whole, {guide}"] = model(x, guides[guide])
        yield case, found


# --------------------------------------------------------------------------------------------------------- cost
def operations(model, T=0, feedback="privilege", size=64):
    """Multiplications and additions per pixel of 0, 1, ..., T refinements, a list. No value is computed.

    PyTorch's counter does not see fused attention, so that is off here; tiles of `fast.py` would count their halos."""
    model = accelerate(copy.deepcopy(model), False).to("meta").eval()
    x = torch.zeros(1, 3, size, size, device="meta")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        return [counter.get_total_flops() / size**2 for _ in model.estimates(x, T, feedback)]


@torch.no_grad()
def seconds(model, loop, size, runs=3):
    """Seconds until y_0, ..., y_4 of an image of size x size are there, medians of some runs."""
    x, found = torch.rand(1, 3, size, size).to(next(model.parameters())), []
    for _ in range(runs + 1):  # the first warms up
        start, times = perf_counter(), []
        for y in model.estimates(x, 4, loop):
            y[0, 0, 0, 0].item()  # waits for a GPU
            times.append(perf_counter() - start)
        found.append(times)
    return np.median(found[1:], axis=0)


def cost(presets=("nano", "small", "paper"), counted=256, timed=128):
    """Two Markdown tables: the first pass in operations, and in seconds on this CPU; T refinements as multiples of it.

    Images have counted x counted and timed x timed pixels. Seconds are those of `fast.py`, and where nothing is reused
    of the code as released."""
    titles = "operations per pixel", f"seconds ({timed} × {timed} pixels, threads: {torch.get_num_threads()})"
    tables = [[f"| preset | loop | {t}, T = 0 | T = 1 | T = 2 | T = 3 | T = 4 |", "|---" * 7 + "|"] for t in titles]
    loops = {"privilege": accelerate, "chain": accelerate, "nothing reused": as_released}
    for preset, (loop, form) in product(presets, loops.items()):
        model = form(SIPL(preset).eval())
        number, took = operations(model, 4, loop, counted), seconds(model, loop, timed)
        firsts = f"{number[0] / 1e3:,.0f} thousand", f"{took[0]:.3f}"
        for table, first, values in zip(tables, firsts, (number, took)):
            times = " | ".join(f"{value / values[0]:.2f} ×" for value in values[1:])
            table.append(f"| {preset} | {loop} | {first} | {times} |")
    return "\n\n".join(map("\n".join, tables)) + "\n"


# -------------------------------------------------------------------------------------------------------- study
STEPWISE = ["singles: backbone", "singles: equal compute", "singles: again", "singles: authors", "doubles: backbone"]
QUESTIONS = {  # what is measured, and the arms: a suite to train on if it is not cdd11, and a recipe
    "who": (who, ["authors", "privilege", "unroll"]),
    "capacity": (loops, ["backbone", "equal compute", "authors", "privilege", "unroll"]),
    "combinations": (loops, [*STEPWISE, "backbone"]),
    "windows": (in_windows, ["backbone", "windowed", "overview"]),
}


def wider(dim, suite=""):
    """Width of the backbone that costs in one pass what SIPL of width `dim` does at T = 1; or, with a suite as of
    `combinations`, what two passes of the backbone do."""
    target = operations(SIPL("nano", dim=dim, fusion=not suite), 1, "again" if suite else "privilege")[1]
    widths = range(dim, 2 * dim + 1, 2)  # even ones; twice the width is nearly four times the operations
    return min(widths, key=lambda d: abs(operations(SIPL("nano", dim=d, fusion=False))[0] / target - 1))


def build(arm, dim, seed=0):
    """The untrained model of an arm, its recipe, and the suite that it is trained on."""
    torch.manual_seed(seed)
    suite, _, arm = arm.rpartition(": ")
    dim = wider(dim, suite) if arm == "equal compute" else dim
    recipe = "backbone" if arm in ("equal compute", "windowed") else arm
    return SIPL("nano", dim=dim, **RECIPE_SETTINGS[recipe]), recipe, suite or "cdd11"


def run(question, folder, images=None, test=None, weights=(), seeds=3, num_steps=5000, dim=8, size=192, photos=16):
    """Train each arm with each seed, measure, and return all rows; what lies in `folder` is not trained again.

    images, test: folders of photos; None takes the embedded ones. weights: names or files to measure instead.
    Raises InputError for weights without the loop that is asked about, and for a folder of another run."""
    if min(seeds, photos, size) < 1:
        raise InputError(f"seeds={seeds}, photos={photos} and size={size} must be 1 or more")
    folder, (measure, arms) = Path(folder), QUESTIONS[question]
    tests = {p.relative_to(test).as_posix(): read(p) for p in find(test)[:photos]} if test else held_out()
    tests = {name: center(photo, size) for name, photo in [*tests.items()][:photos]}
    cases = [(c, name, *pair(photo, "cdd11", c)) for c in COLUMNS["cdd11"] for name, photo in tests.items()]
    about = dict(size=size, photos=len(tests), test=zlib.crc32(b"".join(photo.tobytes() for photo in tests.values())))
    loaded = {name: SIPL.load(name) for name in weights}
    if loaded:
        about["weights"] = [checksum(*model.state_dict().values()) for model in loaded.values()]
    else:
        about, images = dict(num_steps=num_steps, dim=dim) | about, Images(images)
    rows = Rows(folder / f"{question}.csv", ["arm", "seed", "column", "photo", "name"], ["psnr"], **about)
    for seed, arm in tqdm([*product(range(1 if loaded else seeds), loaded or arms)], unit="arm"):
        if loaded:
            model = loaded[arm]
            if question != "windows" and "window" in model.about:
                raise InputError(f"{arm} has the recipe 'overview', which has no loop: ask about windows")
            if question == "who" and not model.fusion:
                raise InputError(f"{arm} has no Proxy Fusion, so that nothing is in its loop: pass other weights")
        else:
            model, recipe, suite = build(arm, dim, seed)
            options = dict(suite=suite, num_steps=num_steps, lr=1e-3, warmup=100, seed=seed, crop_size=64)
            if arm in ("windowed", "overview"):  # learn from windows of crops that were damaged whole
                options |= dict(crop_size=192, window=64)
            fit(model, images, recipe=recipe, folder=folder / f"{arm}-{seed}".replace(": ", "-"), **options)
            model.cpu()  # where the test images are
        with accelerated(model), torch.no_grad():
            for (column, photo, _, y), estimates in measure(model, cases):
                for name, y_t in estimates.items():
                    rows.add(arm=arm, seed=seed, column=column, photo=photo, name=name, psnr=psnr(y_t, y))
    return [*rows.done.values()]


def report(rows, by_number=False):
    """Markdown tables: a line for each arm, PSNR (dB), mean over images and columns ± deviation over seeds.

    by_number: a table for each number of degradations, instead of one for inputs like training's and one unlike."""
    tables = defaultdict(lambda: defaultdict(list))  # title -> (arm, name, seed) -> PSNR
    for row in rows:
        title = "unlike training" if row["column"] in UNLIKE else "like training"
        title = f"{row['column'].count('_') + 1} at once" if by_number else title
        tables[title][row["arm"], row["name"], row["seed"]].append(row["psnr"])
    lines = []
    for title, found in tables.items():
        arms, names, _ = (dict.fromkeys(part) for part in zip(*found))
        lines += [" | ".join([f"| {title}", *names]) + " |", "|---" * (len(names) + 1) + "|"]
        for arm in arms:
            cells = [spread([np.mean(v) for key, v in found.items() if key[:2] == (arm, name)]) for name in names]
            lines.append(" | ".join([f"| {arm}", *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def spread(values):
    """'20.31 ± 0.12': mean and standard deviation, where there are several."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


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
