"""The published protocol on the real data sets: pairs from files, every image measured once, also across a stop."""

import contextlib
import json
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import datasets
from .benchmark import centre, check_table, estimates, scores, write_csv
from .degrade import CDD11, COLUMNS, check_setting
from .files import InputError, from_tensor, read, to_tensor, whole, write


def opened(path):
    try:
        return to_tensor(centre(np.atleast_3d(read(path))))
    except InputError as e:
        raise InputError(str(e) if repr(str(path)) in str(e) else f"{str(path)!r}: {e}") from e


def pair(column, x, y, rng):
    """Files of a data set -> degraded x and clean y, (1, 3, H, W), cut to multiples of 16 as published.

    Where there is no x, Gaussian noise: 255 y + sigma n, clipped and truncated to uint8; n from the NumPy `rng`, which
    is seeded with 0 before the first image of a column.
    """
    clean = opened(y)
    if x is None:
        pixels = (clean[0].permute(1, 2, 0).numpy() * 255).round()
        noisy = pixels + int(column.split("_")[1]) * rng.standard_normal(pixels.shape)
        return to_tensor(noisy.clip(0, 255).astype(np.uint8)), clean
    degraded = opened(x)
    if degraded.shape != clean.shape:
        raise InputError(f"{str(x)!r} and {str(y)!r} differ in size: check the copy with python -m sipl_min data")
    return degraded, clean


def tests_of(root):
    return [f for f in datasets.find(root) if f.what.role == "test"]


def images(setting, found, root):
    """Every image of a setting that is at hand: column, name (its path below root), its file's size and time, degraded,
    clean. Noise comes in one stream per column."""
    for column in COLUMNS[setting]:
        item = next((f for f in found if column in f.what.columns), None)
        rng = np.random.RandomState(0)
        for x, y in item.of(column) if item else ():
            path = x or y
            stamp = [path.stat().st_size, path.stat().st_mtime_ns]
            yield column, path.relative_to(root).as_posix(), stamp, *pair(column, x, y, rng)


def missing(setting, found, root):
    """One sentence for each column that cannot be measured, or only on other images than the published ones."""
    for column in COLUMNS[setting]:
        item = next((f for f in found if column in f.what.columns), None)
        if item is None:
            yield f"{column}: no data set for it below {str(root)!r}; python -m sipl_min data says what belongs where"
        else:
            count, right = len(item.of(column)), item.what.count // (len(CDD11) if item.what.name == "CDD-11" else 1)
            if count != right:
                yield f"{column}: {count} images instead of {right}, so not the published test set"


def evaluate(model, setting, root, steps=1, output=None, save=None, progress=True, against=None):
    """Measure input, y0, ..., y_T on the data sets below `root`; rows as those of `benchmark.evaluate`.

    Args:
        output: a CSV file. Until it is complete its lines are kept beside it, in `.part`; an interrupted run goes on.
        save: a folder for the restored images y_T, one folder for each column. against: as in `benchmark.evaluate`.
    Returns (rows, sentences): what is measured, and what of the setting is not, or not on the published images.
    """
    check_setting(setting)
    root = Path(root)
    found, rows = tests_of(root), []
    log = Log(output, [f"{fingerprint(model, *[against] * (against is not None)):08x}", setting, steps])
    counts = sum(len(f.of(c)) for c in COLUMNS[setting] for f in found if c in f.what.columns)
    everything = images(setting, found, root)
    for column, name, stamp, x, clean in tqdm(everything, total=counts, unit="image", disable=not progress):
        new = log.done.get((column, name, *stamp))
        if new is None:
            each = estimates(model, x, steps, against)
            about = dict(setting=setting, column=column, photo=name, seed=0)
            new = [about | row | dict(weights=log.run[0]) for row in scores(each, clean)]
            if save:
                restored = from_tensor(each[f"y{steps}"], like=np.empty((*clean.shape[-2:], 3), np.uint8))
                write((Path(save) / column / name).with_suffix(".png"), restored)
            log.add((column, name, *stamp), new)
        rows += new
    log.finish(rows)
    return rows, list(missing(setting, found, root))


class Log:
    """What is measured so far: (column, photo, size, time) -> its rows, also in `output.part`, one line an image."""

    def __init__(self, output, run):
        self.output, self.path, self.run, self.done = output, Path(f"{output}.part") if output else None, run, {}
        if output:
            check_table(output)
        if self.path and self.path.exists():
            self.resume()

    def resume(self):
        """Take over what the same run has measured. A line that was cut short counts as none."""
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                run, key, rows = json.loads(line)
                key = tuple(key)
            except (ValueError, TypeError):
                continue
            if run != self.run:
                raise InputError(f"{str(self.path)!r} was begun with other weights, setting or --steps: delete it, or "
                                 "pass another --output")  # fmt: skip
            self.done[key] = rows
        with whole(self.path) as temporary:
            temporary.write_text("".join(self.line(key) for key in self.done))

    def line(self, key):
        return json.dumps([self.run, key, self.done[key]]) + "\n"

    def add(self, key, rows):
        self.done[key] = rows
        if self.path:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a") as f:
                    f.write(self.line(key))
            except OSError as e:
                raise InputError(f"cannot write {str(self.path)!r}: {e.strerror}") from e

    def finish(self, rows):
        if self.path and rows:
            write_csv(rows, self.output)
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()


def fingerprint(*models):
    """A number that changes with the weights."""
    crc = 0
    for t in (t for model in models for t in model.state_dict().values()):
        crc = zlib.crc32(t.detach().float().cpu().numpy().tobytes(), crc)
    return crc
