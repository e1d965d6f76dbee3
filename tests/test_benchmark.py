"""The measurements: PSNR and SSIM as scikit-image has them, pairs that repeat, tables that never mix two sources."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny
from skimage.metrics import structural_similarity

from sipl_min import InputError, benchmark, show
from sipl_min.degrade import COLUMNS
from sipl_min.files import asset

PHOTOS = {name: np.random.default_rng(i).integers(0, 255, (40, 52, 3), np.uint8) for i, name in enumerate("ab")}


def test_psnr_and_ssim_follow_the_protocol():
    y, clean = torch.rand(1, 3, 20, 30), torch.rand(1, 3, 20, 30)
    assert benchmark.psnr(y, clean) == pytest.approx(float(-10 * ((y - clean) ** 2).mean().log10()), abs=1e-4)
    a, b = (t[0].permute(1, 2, 0).numpy() for t in (y, clean))
    assert benchmark.ssim(y, clean) == pytest.approx(
        structural_similarity(b, a, data_range=1, channel_axis=-1, win_size=7, gaussian_weights=False)
    )
    assert benchmark.psnr(y + 5, clean) == benchmark.psnr(torch.ones_like(y), clean), "clamped first"
    with pytest.raises(InputError, match="SSIM needs at least 7 x 7"):
        benchmark.ssim(y[..., :6], clean[..., :6])


def test_centre_cuts_to_multiples_of_16():
    photo = np.arange(40 * 52 * 3).reshape(40, 52, 3)
    assert benchmark.centre(photo).shape == (32, 48, 3)
    assert np.array_equal(benchmark.centre(photo), photo[4:36, 2:50])
    assert benchmark.centre(photo, 16).shape == (16, 16, 3)
    with pytest.raises(InputError, match="at least 16 pixels"):
        benchmark.centre(photo[:9])


def test_evaluate_measures_what_refine_gives():
    model = tiny()
    rows = benchmark.evaluate(model, "cdd11", steps=2, photos=PHOTOS, progress=False)
    assert len(rows) == 11 * 2 * 4
    x, y = benchmark.pair(benchmark.centre(PHOTOS["b"]), "cdd11", "snow")
    row = next(r for r in rows if (r["column"], r["photo"], r["estimate"]) == ("snow", "b", "y2"))
    assert row["psnr"] == benchmark.psnr(model.refine(x, 2), y)
    assert rows == benchmark.evaluate(model, "cdd11", steps=2, photos=PHOTOS, progress=False)
    means = benchmark.average(rows)
    assert means["input"]["average"] == pytest.approx(np.mean([r["psnr"] for r in rows if r["estimate"] == "input"]))


def test_each_photo_has_draws_of_its_own():
    """Strengths must not be shared by photos, or many images would be few measurements."""
    grey = [np.full((32, 32, 3), v, np.uint8) for v in (120, 121)]
    veils = [float((benchmark.pair(p, "cdd11", "haze", seed)[0]).mean()) for p in grey for seed in (0, 1)]
    assert len({round(v, 3) for v in veils}) == 4
    assert torch.equal(benchmark.pair(grey[0], "cdd11", "haze")[0], benchmark.pair(grey[0].copy(), "cdd11", "haze")[0])
    rows = benchmark.evaluate(tiny(), "three_task", 0, dict(a=PHOTOS["a"]), seed=4, draws=3, progress=False)
    assert [r["seed"] for r in rows[::2]] == [4, 5, 6] * 5 and len({r["psnr"] for r in rows[::2]}) > 10
    for options in (dict(draws=0), dict(seed=-1)):
        with pytest.raises(InputError, match="must be a whole number"):
            benchmark.evaluate(tiny(), "three_task", 0, **options)


def test_published_figures_are_marked_and_complete():
    tables = json.loads(asset("published.json").read_text())
    for setting in ("three_task", "five_task", "cdd11"):
        assert list(benchmark.published(setting)) == [r["method"] for r in tables[setting]["rows"]]
        assert benchmark.missing(setting)
        rows = [dict(column=c, photo="a", estimate="y0", psnr=1.0, ssim=0.5) for c in COLUMNS[setting]]
        lines = benchmark.table(rows, setting).splitlines()
        names, cells = lines[0].split("|")
        assert "*" not in names and all(name.endswith("*") for name in cells.replace(" (claim)", "").split())
        assert lines[-1].startswith("* published") and len(lines) == len(COLUMNS[setting]) + 3
    assert benchmark.published("deweather") == {}


def test_panels_have_a_place_for_everything():
    x = torch.rand(1, 3, 16, 24)
    figure = show.panels([[("photo", x), ("error", show.error(x, x))], [("only one", x[0]), None]])
    axes = figure.axes
    assert len(axes) == 4 and [bool(a.images) for a in axes] == [True, True, True, False]
    assert axes[0].get_title() == "photo"


def test_rows_come_back_from_their_file(tmp_path):
    rows = benchmark.evaluate(tiny(), "three_task", 1, dict(a=PHOTOS["a"]), progress=False)
    benchmark.write_csv(rows, tmp_path / "rows.csv")
    assert benchmark.read_csv(tmp_path / "rows.csv") == rows
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    for name in ("text.csv", "nowhere.csv"):
        with pytest.raises(InputError, match="holds no rows of a benchmark"):
            benchmark.read_csv(tmp_path / name)


def test_gains_draws_a_bar_for_each_estimate_and_column():
    rows = benchmark.evaluate(tiny(), "three_task", 1, dict(a=PHOTOS["a"]), progress=False)
    figure = show.gains({"three_task": rows})
    means, bars = benchmark.average(rows), figure.axes[0].patches
    expected = [means[f"y{t}"][c] - means["input"][c] for t in (0, 1) for c in COLUMNS["three_task"]]
    assert [b.get_height() for b in bars] == pytest.approx(expected)
