"""Figures: rows of labelled images, error maps and curves, as the demo and the notebooks draw them."""

import matplotlib
import numpy as np
import torch

from .benchmark import average, psnr, ssim
from .files import whole


def picture(image):
    """A tensor (1, C, H, W), (C, H, W) or (H, W), or an array, as something `imshow` takes; clamped to [0, 1]."""
    if not isinstance(image, torch.Tensor):
        return image
    image = image.detach().float().cpu()
    image = image[0] if image.ndim == 4 else image
    return image.permute(1, 2, 0).clamp(0, 1).numpy().squeeze() if image.ndim == 3 else image.numpy()


def error(y, clean):
    """Absolute error of (1, 3, H, W), mean over colours: (H, W); `panels` draws it from black (0) to bright (0.3)."""
    return (y.clamp(0, 1) - clean).abs().mean((0, 1))


def score(y, clean):
    """'24.31 dB, 0.812': PSNR and SSIM, to write below an image."""
    return f"{psnr(y, clean):.2f} dB, {ssim(y, clean):.3f}"


def panels(rows, width=2.2, top=0.3):
    """Draw a grid. rows: a list of rows, each a list of (title, image) or (title, image, text below the image).

    Images are as in `picture`; two-dimensional ones are maps, drawn in colour from 0 to `top`. None leaves a place
    empty.
    """
    from matplotlib import pyplot as plt

    first = [np.asarray(picture(next(i for i in r if i)[1])).shape for r in rows]
    heights = [width * shape[0] / shape[1] + 0.38 for shape in first]
    columns = max(len(row) for row in rows)
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, figsize=(width * columns, sum(heights)),
                                height_ratios=heights, layout="constrained")  # fmt: skip
    for ax in axes.flat:
        ax.axis("off")
    for row, line in zip(rows, axes):
        for item, ax in zip(row, line):
            if item is not None:
                image = picture(item[1])
                flat = dict(cmap="inferno", vmin=0, vmax=top) if image.ndim == 2 else {}
                ax.imshow(image, **flat)
                ax.set_title(item[0], fontsize=8)
                ax.text(0.5, -0.03, "".join(item[2:]), transform=ax.transAxes, ha="center", va="top", fontsize=8)
    return figure


def estimates_row(x, estimates, y, name):
    """One row of panels, PSNR and SSIM below: degraded, y0..y_T, clean, then the errors of first and last estimate."""
    row = [(name, x, score(x, y))]
    row += [(f"$\\hat y_{{{t}}}$", e, score(e, y)) for t, e in enumerate(estimates)]
    row += [("clean", y)]
    last = len(estimates) - 1
    row += [(f"$|\\hat y_{{{t}}} - y|$", error(estimates[t], y)) for t in sorted({0, last})]
    return row


def gains(measured):
    """Bars: the gain in PSNR of each estimate over the input, by setting and column. measured: setting -> rows."""
    from matplotlib import pyplot as plt

    means = {setting: average(rows) for setting, rows in measured.items()}
    counts = [len(m["input"]) - 1 for m in means.values()]
    figure, axes = plt.subplots(1, len(means), figsize=(2 + 0.45 * sum(counts), 3.6), width_ratios=counts, sharey=True,
                                squeeze=False, layout="constrained")  # fmt: skip
    for ax, (setting, m) in zip(axes.flat, means.items()):
        columns, names = list(m["input"])[:-1], [n for n in m if n != "input"]
        for k, name in enumerate(names):
            label = rf"$\hat y_{{{name[1:]}}}$" if name[0] == "y" else name
            gain = [m[name][c] - m["input"][c] for c in columns]
            ax.bar(
                np.arange(len(columns)) + (k - (len(names) - 1) / 2) * 0.8 / len(names),
                gain,
                0.8 / len(names),
                label=label,
            )
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
        ax.set_title(setting, fontsize=10)
        ax.axhline(0, color="k", lw=0.8)
    axes[0, 0].set_ylabel("PSNR over the input (dB)")
    axes[0, -1].legend(fontsize=8)
    return figure


def save(figure, path):
    """Write a figure whole or not at all, and close it."""
    from matplotlib import pyplot as plt

    with whole(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def without_screen():
    """Let a command draw where there is no display."""
    matplotlib.use("Agg")
