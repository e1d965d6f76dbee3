"""Figures, as the demo and the notebooks draw them: rows of labelled images, error maps, bars of gains."""

from itertools import zip_longest

import numpy as np
import torch
from matplotlib import pyplot as plt

from .evaluate import average, psnr, ssim
from .files import atomic_write


def picture(image):
    """A tensor (1, C, H, W), (C, H, W) or (H, W), or an array, as something `imshow` takes; clamped to [0, 1]."""
    if not isinstance(image, torch.Tensor):
        return image
    image = image.detach().float().cpu()
    image = image[0] if image.ndim == 4 else image
    return image.permute(1, 2, 0).clamp(0, 1).numpy().squeeze() if image.ndim == 3 else image.numpy()


def panels(rows, width=2.2, top=0.3):
    """Draw a grid of images. rows: lists of (title, image) or (title, image, text below); None leaves a place empty.

    Images are as in `picture`; two-dimensional ones are maps, in color from 0 to `top`. width: inches of a column."""
    columns = max(len(row) for row in rows)
    shapes = [picture(next(item for item in row if item)[1]).shape for row in rows]
    heights = [width * shape[0] / shape[1] + 0.38 for shape in shapes]
    figure = plt.figure(figsize=(width * columns, sum(heights)), layout="constrained")
    for line, row in zip(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights), rows):
        for ax, item in zip_longest(line, row):
            ax.axis("off")
            if item is None:
                continue
            title, image, *below = item
            ax.imshow(picture(image), cmap="inferno", vmin=0, vmax=top)  # colored images stay as they are
            ax.set_title(title, fontsize=8)
            ax.text(0.5, -0.03, "".join(below), transform=ax.transAxes, ha="center", va="top", fontsize=8)
    return figure


def estimates_row(x, estimates, y, name):
    """One row of `panels`: degraded, y_0..y_T, clean, errors of first and last estimate; PSNR and SSIM below."""

    def score(image):
        return f"{psnr(image, y):.2f} dB, {ssim(image, y):.3f}"

    def error(image):  # mean over colors, (H, W)
        return (image.clamp(0, 1) - y).abs().mean((0, 1))

    row = [(name, x, score(x))]
    row += [(rf"$\hat y_{{{t}}}$", e, score(e)) for t, e in enumerate(estimates)]
    row += [("clean", y)]
    row += [(rf"$|\hat y_{{{t}}} - y|$", error(estimates[t])) for t in sorted({0, len(estimates) - 1})]
    return row


def gains(measured):
    """Bars: the gain in PSNR of each estimate over the input, by suite and column. measured: suite -> rows."""
    means = {suite: average(rows) for suite, rows in measured.items()}
    counts = [len(m["input"]) - 1 for m in means.values()]
    figure = plt.figure(figsize=(2 + 0.45 * sum(counts), 3.6), layout="constrained")
    axes = figure.subplots(1, len(means), width_ratios=counts, sharey=True, squeeze=False)[0]
    for ax, (suite, m) in zip(axes, means.items()):
        columns, names = list(m["input"])[:-1], [n for n in m if n != "input"]
        bar = 0.8 / len(names)
        for k, name in enumerate(names):
            places = np.arange(len(columns)) + (k - (len(names) - 1) / 2) * bar
            label = rf"$\hat y_{{{name[1:]}}}$" if name[0] == "y" else name
            ax.bar(places, [m[name][c] - m["input"][c] for c in columns], bar, label=label)
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
        ax.set_title(suite, fontsize=10)
        ax.axhline(0, color="k", lw=0.8)
    axes[0].set_ylabel("PSNR over the input (dB)")
    axes[-1].legend(fontsize=8)
    return figure


def save(figure, path):
    """Write a figure whole or not at all, and close it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)
