"""How good a network is: pairs of images in, rows of PSNR and SSIM out, and tables.

Three makers of pairs: `embedded` (held-out photos, synthetic degradations), `real` (public data sets, the published
protocol) and `keep` (photos that are hardly damaged or not at all, which a network should leave alone).
Images are tensors (1, 3, H, W) in [0, 1]; estimates are clamped to that range before they are measured."""

import csv
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from . import datasets
from .backbones import NAFBlock
from .data import hash_seed, held_out, installed, load
from .degrade import COLUMNS, check_suite, degrade, generator, jpeg, noise
from .fast import accelerated
from .files import InputError, asset
from .photos import MARGIN, mirrored, read, to_tensor
from .weights import default_feedback, default_steps, refiner


def psnr(y: torch.Tensor, clean: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB; at most 100, which stands for equal images."""
    with np.errstate(divide="ignore"):  # equal images: infinite
        return min(float(peak_signal_noise_ratio(array(clean), array(y), data_range=1)), 100.0)


def ssim(y: torch.Tensor, clean: torch.Tensor) -> float:
    """Structural similarity: uniform 7 x 7 window, mean over the three colors, as in the published protocol."""
    return float(structural_similarity(array(clean), array(y), data_range=1, channel_axis=2))


def array(image):  # (1, 3, H, W), any dtype and device -> float32 (H, W, 3) in [0, 1]
    return image[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()


# ---------------------------------------------------------------------------------------------- makers of pairs
@dataclass
class Cases:
    """`count` test cases, made one by one and anew for each loop: (where it comes from, degraded x, clean y).

    The first is a dict: source ("embedded" or "real"), suite, column, photo and draw, the seed of the degradation.
    notes: sentences on what a full benchmark has, and these cases have not."""

    count: int
    make: Callable[[], Iterator[tuple[dict, torch.Tensor, torch.Tensor]]]
    notes: list = ()

    def __len__(self):
        return self.count

    def __iter__(self):
        return self.make()


def center(photo, size=None):
    """The middle of a photo (H, W, C): sides cut to multiples of 16 as published, and to at most `size` pixels."""
    h, w = (min(n // 16 * 16, size or n) for n in photo.shape[:2])
    if not h or not w:
        raise InputError(f"a test photo needs 16 pixels a side, not {photo.shape[:2]}: leave it out")
    top, left = (photo.shape[0] - h) // 2, (photo.shape[1] - w) // 2
    return photo[top : top + h, left : left + w]


def pair(photo, suite, column, seed=0, device="cpu"):
    """A photo (H, W, 3) -> degraded x and clean y, (1, 3, H, W): the same for every model and device.

    Strength, place and noise of the degradation follow from seed, column and the photo's own content."""
    y = to_tensor(photo)
    g = generator(hash_seed(seed, list(COLUMNS[suite]).index(column), zlib.crc32(photo.tobytes())))
    return degrade(y, g, suite, [column]).to(device), y.to(device)


def embedded(suite, size=256, seed=0, draws=1, photos=None):
    """Synthetic degradations of photos that scikit-image and Matplotlib bring along, and that are never trained on.

    size: of their middle, in pixels. draws: how often each is degraded, with the seeds seed, seed + 1, ...
    photos: others instead, name -> array (H, W, 3)."""
    check_suite(suite)
    photos = held_out() if photos is None else photos
    photos = {name: center(photo, size) for name, photo in photos.items()}
    cases = list(product(COLUMNS[suite], photos.items(), range(seed, seed + draws)))

    def make():
        for column, (name, photo), draw in cases:
            about = dict(source="embedded", suite=suite, column=column, photo=name, draw=draw)
            yield about, *pair(photo, suite, column, draw)

    return Cases(len(cases), make)


def real(suite, root):
    """The test sets of a suite that `datasets.find` finds below the folder `root`, by the published protocol."""
    check_suite(suite)
    tests = [found for found in datasets.find(root) if found.what.role == "test"]
    files, notes = {}, []
    for column in COLUMNS[suite]:
        found = next((f for f in tests if column in f.what.columns), None)
        if found is None:
            notes.append(f"{column}: no data set for it below {str(root)!r}; python -m sipl_min data says what fits")
            continue
        files[column] = found.of(column)
        parts = len(found.what.columns) if column in found.pairs else 1  # CDD-11 has as many images of each column
        count, right = len(files[column]), found.what.count // parts
        if count != right:
            notes.append(f"{column}: {count} images instead of {right}, so not the published test set")

    def make():
        for column, paths in files.items():
            stream = np.random.RandomState(0)  # one for the noise of all photos of a column, in their order
            for x, y in paths:
                name = (x or y).relative_to(root).as_posix()
                about = dict(source="real", suite=suite, column=column, photo=name, draw=0)
                yield about, *published_pair(x, y, column, stream)

    return Cases(sum(map(len, files.values())), make, notes)


def published_pair(x, y, column, stream):
    """Files -> degraded and clean, cut to multiples of 16. Without a file x, noise is added and truncated to uint8."""
    clean = load(y)
    degraded = load(x) if x else clean
    if degraded.shape != clean.shape:
        raise InputError(f"{str(x)!r} and {str(y)!r} differ in size: copy them anew, or move them away")
    if min(clean.shape[1:]) < 16:
        raise InputError(f"{str(y)!r} has less than 16 pixels a side: copy it anew, or move it away")
    degraded, clean = (center(t.permute(1, 2, 0)).permute(2, 0, 1)[None] for t in (degraded, clean))
    if x is None:
        pixels = (array(clean) * 255).round()
        pixels = pixels + int(column.split("_")[1]) * stream.standard_normal(pixels.shape)
        degraded = to_tensor(pixels.clip(0, 255).astype(np.uint8))
    return degraded, clean


SLIGHT = dict(noise5=partial(noise, sigma=5.0), jpeg60=partial(jpeg, quality=60), jpeg90=partial(jpeg, quality=90))
KEEP = ("clean", "dark", *SLIGHT, "flat")  # columns; those of SLIGHT are degraded
GOOD = ("ihc.png", "retina.jpg", "moon.png", "page.png")  # of scikit-image; nothing is trained on them
DARK = ("hubble_deep_field.jpg", "rocket.jpg")  # dark by nature; not trained on either
FLAT = {f"gray {v}": (v, v, v) for v in (0, 64, 128, 192, 255)} | {"orange": (210, 120, 40)}


def keep(photos=None, size=256):
    """Photos that a network should leave alone: good and nearly good ones, dark scenes, constant images.

    photos: instead of the embedded good ones, name -> array (H, W, C). size: of their middle, in pixels."""
    if photos is None:
        photos = held_out() | {Path(name).stem: read(installed(name)) for name in GOOD}
    dark = {Path(name).stem: read(installed(name)) for name in DARK}
    side = max(size // 2, 16)
    flat = {name: np.full((side, side, 3), color, np.uint8) for name, color in FLAT.items()}
    groups = dict.fromkeys(KEEP, photos) | dict(dark=dark, flat=flat)
    cases = [(column, *item) for column, group in groups.items() for item in group.items()]

    def make():
        for column, name, photo in cases:
            about = dict(source="embedded", suite="keep", column=column, photo=name, draw=0)
            y = to_tensor(center(np.atleast_3d(photo), size))
            x = SLIGHT[column](y, generator(0)) if column in SLIGHT else y
            yield about, x, y

    return Cases(len(cases), make)


# --------------------------------------------------------------------------------------------------- measuring
TEXT = dict(encoding="utf-8", errors="surrogateescape")  # names of files may hold anything


class Rows:
    """Rows in memory and in a CSV file that only grows: what is in it need not be measured again.

        rows = Rows("a.csv", keys=["photo"], values=["psnr"], steps=1)
        row = rows.find(photo="chelsea") or rows.add(photo="chelsea", psnr=31.2)

    path: of the file, or None for memory alone. keys, values: its columns, numbers or text; the keys tell rows apart.
    about: what all rows must have in common, kept in a column "run". A line that was cut short counts as none.
    Raises InputError where the file holds something else or another run, and where it cannot be written."""

    def __init__(self, path, keys, values, **about):
        self.path, self.keys, self.columns = path and Path(path), keys, [*keys, *values, "run"]
        self.run = " ".join(f"{name}={value}" for name, value in about.items())
        self.done = {}  # keys -> row
        if path:
            self.resume()

    def resume(self):
        if self.path.suffix != ".csv":
            raise InputError(f"cannot write a table to {str(self.path)!r}: pass the name of a file that ends in .csv")
        self.write()  # fail early
        if self.path.stat().st_size == 0:
            return self.write(self.columns)
        text = self.path.read_bytes().decode(**TEXT)
        whole = text[: text.rfind("\n") + 1]
        if not whole.startswith(",".join(f'"{name}"' for name in self.columns) + "\n"):
            raise InputError(f"{str(self.path)!r} is a table of another kind: delete it or pass another file")
        for row in csv.DictReader(io.StringIO(whole, newline=""), quoting=csv.QUOTE_NONNUMERIC):
            run = row.pop("run")
            if run != self.run:
                raise InputError(f"{str(self.path)!r} was begun with {run}, not {self.run}: pass another file")
            self.done[self.key(row)] = {name: value for name, value in row.items() if value != ""}
        os.truncate(self.path, len(whole.encode(**TEXT)))

    def find(self, **row):
        return self.done.get(self.key(row))

    def add(self, **row):
        """Keep a row, without values that are None, unless one with its keys is there; return what is kept."""
        if self.key(row) not in self.done:
            self.done[self.key(row)] = {name: value for name, value in row.items() if value is not None}
            if self.path:
                self.write([row.get(name) for name in self.columns[:-1]] + [self.run])
        return self.done[self.key(row)]

    def key(self, row):
        return tuple(row[name] for name in self.keys)

    def write(self, *lines):  # to the end of the file
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", newline="", **TEXT) as f:
                csv.writer(f, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n").writerows(lines)
        except OSError as e:
            raise InputError(f"cannot write {str(self.path)!r}: {e.strerror or e}") from e


KEYS = ["source", "suite", "column", "photo", "draw", "checksum", "estimate"]
VALUES = ["psnr", "ssim", "step"]


def measure(model, cases, steps=None, against=None, output=None, progress=True):
    """Measure "input", "y0", ..., "yT", and the first pass of a second model `against`, named "backbone".

    cases: from a maker above; or pairs of your own, (degraded, clean), float tensors (1, 3, H, W), also with a dict
        before them that names the photo. steps: T; None takes what suits the weights.
    output: a CSV file, to which each row is added once it is measured; the same call skips what is there.
    Returns a dict for each case and estimate, with KEYS, psnr, ssim, and of constant images `step`: the largest
        distance of a value from its color's median, in levels of 255."""
    steps = default_steps(model) if steps is None else steps
    others, measured = [] if against is None else [against], []
    weights = "+".join(f"{checksum(*m.state_dict().values()):08x}" for m in (model, *others))
    dtype = next(model.parameters()).dtype  # what is usual is not named, as in files of earlier versions
    unusual = dict(dtype=dtype) if dtype.itemsize < 4 else {}
    unusual |= dict(feedback=default_feedback(model)) if default_feedback(model) != "privilege" else {}
    unusual |= {"window": m.window for m in model.modules() if isinstance(m, NAFBlock) and m.window}
    rows = Rows(output, KEYS, VALUES, steps=steps, weights=weights, **unusual)
    names = ["input"] + ["backbone"] * len(others) + [f"y{t}" for t in range(steps + 1)]
    with accelerated(model, *others):
        for number, case in enumerate(tqdm(cases, unit="pair", disable=not progress)):
            about, x, y = checked(case, number)
            about["checksum"] = checksum(x, y)
            found = [rows.find(**about, estimate=name) for name in names]
            if None in found:
                estimates, margin = [x], MARGIN if about["suite"] == "keep" else 0  # as `restore` treats sound photos
                for network, T in [(other, 0) for other in others] + [(model, steps)]:
                    see = refiner(network, x, T, default_feedback(network), return_all=True)
                    estimates += mirrored(see, x.to(next(network.parameters())), margin)
                found = [rows.add(**about, estimate=n, **scores(e, y, about)) for n, e in zip(names, estimates)]
            measured += found
    return measured


def checked(case, number):
    """A case, or somebody's pair (x, y), as a case. Raises InputError where it cannot be measured."""
    *about, x, y = case
    about = dict(source="own", suite="own", column="all", photo=str(number), draw=0) | (about[0] if about else {})
    x, y = (t[None] if torch.is_tensor(t) and t.ndim == 3 else t for t in (x, y))
    fit = all(torch.is_tensor(t) and t.is_floating_point() and t.shape[:2] == (1, 3) for t in (x, y))
    if not fit or x.shape != y.shape or min(x.shape[2:]) < 7:
        wanted = "two float tensors (1, 3, H, W) of one size, 7 pixels a side or more, degraded and clean"
        raise InputError(f"pair {about['photo']!r} must be {wanted}")
    if not (0 <= y.min() <= y.max() <= 1 and x.abs().max() <= 10):  # false for NaN, too
        raise InputError(f"pair {about['photo']!r} must have values in [0, 1]: divide 0..255 by 255")
    return about, x, y


def scores(estimate, clean, about):
    numbers = dict(psnr=psnr(estimate, clean), ssim=ssim(estimate, clean))
    if about["column"] == "flat":
        colors = array(estimate).reshape(-1, 3)
        numbers["step"] = float(np.abs(colors - np.median(colors, 0)).max() * 255)
    return numbers


def checksum(*tensors):
    return zlib.crc32(b"".join(t.detach().float().cpu().numpy().tobytes() for t in tensors))


# ------------------------------------------------------------------------------------------------------ tables
def average(rows, value="psnr"):
    """Rows of `measure` -> {estimate: {column: mean over its rows, ..., "average": mean over columns}}."""
    result, columns = {}, dict.fromkeys(row["column"] for row in rows)
    for estimate in dict.fromkeys(row["estimate"] for row in rows):
        mine = [row for row in rows if row["estimate"] == estimate]
        means = {c: float(np.mean([row[value] for row in mine if row["column"] == c])) for c in columns}
        result[estimate] = means | {"average": float(np.mean([*means.values()]))}
    return result


def published(suite, value="psnr"):
    """Published figures, {method: {column: number or None}}; empty where there is no table of the suite."""
    tables = json.loads(asset("published.json").read_text(encoding="utf-8"))
    return {row["method"]: row[value] for row in tables.get(suite, {}).get("rows", [])}


def table(rows, suite, value="psnr", methods=("PromptIR", "AdaIR"), by_method=False):
    """A table of `psnr` (dB) or `ssim`, a line for each column of the suite: Markdown that reads well as it stands.

    Published figures, of `methods` or with None of all, stand to the right, marked with *. An average of some columns
    only is called so, and none is published. by_method: a line for each estimate and method, as papers have it."""
    means, theirs = average(rows, value), published(suite, value)
    columns = list(means["input"])
    complete = {*columns} == {*COLUMNS.get(suite, KEEP), "average"}
    if "backbone" in means:
        last = [name for name in means if name[0] == "y"][-1]
        means[f"{last} - backbone"] = {c: means[last][c] - means["backbone"][c] for c in columns}
    for method in theirs if methods is None else methods:
        if any(theirs.get(method, {}).values()):
            means[f"{method}*"] = theirs[method] | ({} if complete else {"average": None})
    lines, digits = [[value.upper(), *means]], 2 if value == "psnr" else 3
    for column in columns:
        name = column if complete or column != "average" else f"average of {len(columns) - 1}"
        numbers = [figures.get(column) for figures in means.values()]
        lines.append([name] + ["-" if number is None else f"{number:.{digits}f}" for number in numbers])
    lines = [*zip(*lines)] if by_method else lines
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join("| " + " | ".join(map(str.rjust, line, widths)) + " |" for line in lines)


def markdown(rows, suite):
    """Both tables of a suite, and what must be said about them."""
    text = [table(rows, suite), table(rows, suite, "ssim")]
    if "*" in text[0]:
        other = "" if rows[0]["source"] == "real" else ", other images"
        text.append(f"Columns with a star are published, on the real data sets{other}, and no results of this run.")
    if any(row["psnr"] == 100 for row in rows):
        text.append("100 dB stands for equal images.")
    if flat := [row for row in rows if "step" in row]:
        steps = {e: max(row["step"] for row in flat if row["estimate"] == e) for e in average(flat)}
        worst = ", ".join(f"{estimate} {step:.1f}" for estimate, step in steps.items())
        text.append(f"flat: largest step from the median of an image, in levels of 255: {worst}.")
    return "\n\n".join(text)
