"""PSNR and SSIM of a model on every column of a setting, and the published tables to read beside them."""

import csv
import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tqdm import tqdm

from .data import hash_seed, held_out
from .degrade import COLUMNS, check_setting, degrade, generator
from .files import InputError, asset, to_tensor, whole

# What the published tables were measured on: column -> (data set, test images, paper that publishes it).
REAL = {
    "SOTS": ("SOTS-outdoor", "500 hazy images of 492 clear ones", "RESIDE, Li et al. 2019"),
    "Rain100L": ("Rain100L, old version", "100 pairs", "JORDER, Yang et al. 2017"),
    "CBSD68_15": ("CBSD68", "68 photos, noise added at sigma = 15", "BSD, Martin et al. 2001"),
    "CBSD68_25": ("CBSD68", "68 photos, noise added at sigma = 25", "BSD, Martin et al. 2001"),
    "CBSD68_50": ("CBSD68", "68 photos, noise added at sigma = 50", "BSD, Martin et al. 2001"),
    "GoPro": ("GoPro", "1,111 pairs", "DeepDeblur, Nah et al. 2017"),
    "LOLv1": ("LOL-v1", "15 pairs", "RetinexNet, Wei et al. 2018"),
    **{c: ("CDD-11", f"200 pairs of folder {c}", "OneRestore, Guo et al. 2024") for c in COLUMNS["cdd11"]},
}


def psnr(y, clean):
    """Peak signal-to-noise ratio in dB of two tensors (1, 3, H, W) in [0, 1], as scikit-image computes it."""
    with np.errstate(divide="ignore"):  # infinite for equal images
        return float(peak_signal_noise_ratio(*pictures(clean, y), data_range=1))


def ssim(y, clean):
    """Structural similarity: 7 x 7 uniform window, channel axis last, data range 1, as in the published protocol."""
    a, b = pictures(clean, y)
    if min(a.shape[:2]) < 7:
        raise InputError(f"SSIM needs at least 7 x 7 pixels, not {a.shape[0]} x {a.shape[1]}")
    return float(structural_similarity(a, b, data_range=1, channel_axis=2))


def pictures(*tensors):
    return [t[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy() for t in tensors]


def centre(photo, size=None, multiple=16):
    """The middle of a photo (H, W, 3): sides cut to multiples of 16 as published, and to at most `size`."""
    h, w = (min(n // multiple * multiple, size or n) for n in photo.shape[:2])
    if not h or not w:
        raise InputError(f"a test photo must be at least {multiple} pixels a side, not {photo.shape[:2]}")
    top, left = (photo.shape[0] - h) // 2, (photo.shape[1] - w) // 2
    return photo[top : top + h, left : left + w]


def pair(photo, setting, column, seed=0, device="cpu"):
    """A photo (H, W, 3) -> degraded x and clean y, (1, 3, H, W): the same for every model and every machine's CPU.

    Strength, place and noise of the degradation are drawn from seed, column and the photo's own content.
    """
    y = to_tensor(photo)
    number = list(COLUMNS[setting]).index(column)
    g = generator(hash_seed(seed, number, zlib.crc32(np.ascontiguousarray(photo).tobytes())))
    x = degrade(y, g, setting, [column])
    return x.to(device), y.to(device)


def estimates(model, x, steps, against=None):
    """What is measured for one image: its name -> (1, 3, H, W)."""
    on = x.to(next(model.parameters()))
    found = {"input": x}
    if against is not None:
        found["backbone"] = against.refine(on.to(next(against.parameters())), 0)
    return found | {f"y{t}": e for t, e in enumerate(model.refine(on, steps, return_all=True))}


def scores(found, clean):
    """name -> estimate, and the clean image -> one dict for each, with psnr (dB), ssim and, if installed, lpips."""
    rows, perceptual = [], lpips_network()
    for estimate, e in found.items():
        row = dict(estimate=estimate, psnr=psnr(e, clean), ssim=ssim(e, clean))
        if perceptual:
            with torch.no_grad():
                a, b = (t.detach().float().cpu().clamp(0, 1) * 2 - 1 for t in (e, clean))
                row["lpips"] = float(perceptual(a, b))
        rows.append(row)
    return rows


@functools.cache
def lpips_network():
    """LPIPS (Zhang et al. 2018, AlexNet), where the user has installed it with its weights; else None."""
    try:
        import lpips

        return lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception:  # not there, or its weights are not
        return None


def evaluate(model, setting, steps=1, photos=None, size=256, seed=0, draws=1, progress=True, against=None):
    """Measure input, y0, ..., y_T on every column of a setting.

    Args:
        model: a `SIPL`; steps: T, how often to refine (0 for a plain backbone).
        against: a second model, measured once (T = 0) under the name "backbone", to see what refinement gains.
        photos: name -> (H, W, 3) array; default the embedded held-out photos, their middle `size` pixels.
        draws: how often each photo is degraded anew, with the seeds seed, seed + 1, ...
    Returns one dict per column, photo, draw and estimate, with its psnr (dB) and ssim; clamped to [0, 1] first.
    """
    check_setting(setting)
    for name, value, least in (("draws", draws, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r} must be a whole number >= {least}")
    photos, rows = held_out() if photos is None else photos, []
    device = next(model.parameters()).device
    for column in tqdm(COLUMNS[setting], disable=not progress, unit="column"):
        for name, photo in photos.items():
            for draw in range(seed, seed + draws):
                x, y = pair(centre(photo, size), setting, column, draw, device)
                about = dict(setting=setting, column=column, photo=name, seed=draw)
                rows += [about | row for row in scores(estimates(model, x, steps, against), y)]
    return rows


def average(rows, value="psnr"):
    """Rows of `evaluate` -> {estimate: {column: mean over photos, ..., "average": mean over columns}}."""
    result = {}
    for estimate in dict.fromkeys(r["estimate"] for r in rows):
        cells = {}
        for column in dict.fromkeys(r["column"] for r in rows):
            cells[column] = np.mean([r[value] for r in rows if (r["estimate"], r["column"]) == (estimate, column)])
        result[estimate] = {k: float(v) for k, v in cells.items()} | {"average": float(np.mean([*cells.values()]))}
    return result


def published(setting, value="psnr"):
    """Published figures, {method: {column: number or None}}; empty where no table is at hand (deweather)."""
    tables = json.loads(asset("published.json").read_text())
    return {row["method"]: row[value] for row in tables.get(setting, {}).get("rows", [])}


def cells(rows, setting, value="psnr", methods=("input", "PromptIR", "AdaIR", "SIPL+PromptIR (claim)")):
    """A table as lists of strings, head first, and the number of its columns that are measured, not published.

    The average stands for a whole setting only: where columns are missing its line says of how many it is, and the
    published averages, which are of all, are left out.
    """
    digits = 2 if value == "psnr" else 3
    measured, theirs = average(rows, value), published(setting, value)
    if "backbone" in measured:
        last = list(measured)[-1]
        measured[f"{last} - backbone"] = {c: n - measured["backbone"][c] for c, n in measured[last].items()}
    theirs = {f"{m}*": theirs[m] for m in methods if any(theirs.get(m, {}).values())}
    columns = list(next(iter(measured.values())))
    lines = [[value.upper(), *measured, *theirs]]
    for column in columns:
        of_some = column == "average" and {*columns} - {"average"} != {*COLUMNS[setting]}
        numbers = [m[column] for m in measured.values()] + [None if of_some else t.get(column) for t in theirs.values()]
        title = f"average of {len(columns) - 1}" if of_some else column
        lines.append([title] + ["-" if n is None else f"{n:.{digits}f}" for n in numbers])
    return lines, len(measured)


PUBLISHED = "* published, on the real data sets{}: never to be read as results of this run"


def table(rows, setting, value="psnr", real=False):
    """Text: measured columns, then, behind a bar and marked, published ones of the real data sets."""
    lines, count = cells(rows, setting, value)
    text = []
    for line in lines:
        parts = [f"{cell:>{max(len(head), 6) + 2}s}" for cell, head in zip(line[1:], lines[0][1:])]
        text.append(
            f"{line[0]:15s}" + "".join(parts[:count]) + ("| " + "".join(parts[count:]) if parts[count:] else "")
        )
    if len(lines[0]) > count + 1:
        text.append(PUBLISHED.format("" if real else ", other images"))
    return "\n".join(text)


def markdown(rows, setting, real=False):
    """The tables of PSNR (dB) and SSIM as Markdown."""
    text = []
    for value in ("psnr", "ssim"):
        lines, _ = cells(rows, setting, value)
        lines.insert(1, ["---"] * len(lines[0]))
        text += ["| " + " | ".join(line) + " |" for line in lines] + [""]
    return "\n".join([*text, PUBLISHED.format("" if real else ", other images").replace("*", "\\*"), ""])


def missing(setting):
    """One line per real data set that the published table of a setting needs and this benchmark does not read yet."""
    needed = {}
    for column in COLUMNS[setting]:
        if column in REAL:
            name, count, paper = REAL[column]
            needed.setdefault((name, paper), []).append(count)
    return [f"{name} ({paper}): {'; '.join(counts) if len(counts) < 4 else f'{len(counts)} x 200 pairs'}"
            for (name, paper), counts in needed.items()]  # fmt: skip


def check_table(path):
    """Raise InputError, before any work is done, where rows cannot be written under this name."""
    if Path(path).suffix != ".csv" or Path(path).is_dir() or Path(f"{path}.part").is_dir():
        raise InputError(f"cannot write a table to {str(path)!r}: pass the name of a file that ends in .csv")


def write_csv(rows, path):
    """Write the rows of `evaluate`, whole or not at all."""
    check_table(path)
    with whole(path) as temporary, open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path):
    """The rows that `write_csv` wrote. Raises InputError where the file is not one of its."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        for row in rows:
            row |= {name: float(row[name]) for name in ("psnr", "ssim", "lpips") if row.get(name)}
            row["seed"] = int(row["seed"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{str(path)!r} holds no rows of a benchmark: pass a file that --output wrote") from e
    return rows
