"""The measurements: figures as scikit-image has them, pairs that repeat, rows that outlive a stop, honest tables."""

import dataclasses
import json
import os
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import rand, tiny
from skimage.metrics import structural_similarity

from sipl_min import InputError, datasets, evaluate
from sipl_min.backbones import nafnet_local
from sipl_min.degrade import COLUMNS
from sipl_min.evaluate import Rows, average, center, embedded, keep, markdown, measure, pair, psnr, real, ssim, table
from sipl_min.fast import FAST, accelerate
from sipl_min.files import asset
from sipl_min.photos import write

SHARED = Path(__file__).parents[2] / "shared" / "data"
PHOTOS = {name: np.random.default_rng(i).integers(0, 255, (40, 52, 3), np.uint8) for i, name in enumerate("ab")}


def quick(model, cases, *args, **options):
    return measure(model, cases, *args, progress=False, **options)


def leave_alone():
    """A network whose output is its input."""
    model = tiny(fusion=False)
    torch.nn.init.zeros_(model.decoder.output.weight)
    return model


# ------------------------------------------------------------------------------------------------- measures, pairs
def test_psnr_and_ssim_follow_the_protocol():
    y, clean = rand(1, 3, 20, 30), rand(1, 3, 20, 30, seed=1)
    assert psnr(y, clean) == pytest.approx(float(-10 * ((y - clean) ** 2).mean().log10()), abs=1e-4)
    a, b = (t[0].permute(1, 2, 0).numpy() for t in (y, clean))
    options = dict(data_range=1, channel_axis=-1, win_size=7, gaussian_weights=False)
    assert ssim(y, clean) == pytest.approx(structural_similarity(b, a, **options))
    assert psnr(y + 5, clean) == psnr(torch.ones_like(y), clean), "clamped first"
    assert psnr(y, y) == 100 and ssim(y, y) == 1


def test_center_cuts_to_multiples_of_16():
    photo = np.arange(40 * 52 * 3).reshape(40, 52, 3)
    assert np.array_equal(center(photo), photo[4:36, 2:50])
    assert center(photo, 16).shape == (16, 16, 3)
    with pytest.raises(InputError, match="needs 16 pixels a side"):
        center(photo[:9])


def test_each_photo_has_draws_of_its_own():
    """Strengths must not be shared by photos, or many images would be few measurements."""
    gray = [np.full((32, 32, 3), v, np.uint8) for v in (120, 121)]
    veils = [float((pair(p, "cdd11", "haze", seed)[0]).mean()) for p in gray for seed in (0, 1)]
    assert len({round(v, 3) for v in veils}) == 4
    assert torch.equal(pair(gray[0], "cdd11", "haze")[0], pair(gray[0].copy(), "cdd11", "haze")[0])
    cases = embedded("three_task", seed=4, draws=3, photos=dict(a=PHOTOS["a"]))
    rows = quick(tiny(), cases, 0)
    assert [r["draw"] for r in rows[::2]] == [4, 5, 6] * 5 and len({r["psnr"] for r in rows[::2]}) > 10
    assert len(cases) == 15 and all(torch.equal(a[1], b[1]) for a, b in zip(cases, cases))
    with pytest.raises(InputError, match="unknown suite 'fog'"):
        embedded("fog")


def test_embedded_photos_are_those_that_nobody_trains_on():
    cases = list(embedded("three_task", size=32))
    assert {about["photo"] for about, _, _ in cases} == {"chelsea", "hopper", "camera"}
    assert {tuple(x.shape) for _, x, _ in cases} == {(1, 3, 32, 32)}


# ---------------------------------------------------------------------------------------------------- measuring
def test_measure_finds_what_refine_gives():
    model = tiny()
    rows = quick(model, embedded("three_task", photos=PHOTOS), 2)
    assert len(rows) == 5 * 2 * 4 and not any(type(m) in FAST.values() for m in model.modules())
    x, y = pair(center(PHOTOS["b"]), "three_task", "Rain100L")
    for row in (r for r in rows if (r["column"], r["photo"]) == ("Rain100L", "b")):
        expected = x if row["estimate"] == "input" else model.refine(x, int(row["estimate"][1:]))
        assert row["psnr"] == pytest.approx(psnr(expected, y), abs=1e-3), row["estimate"]
        assert row["ssim"] == pytest.approx(ssim(expected, y), abs=1e-4)
    assert rows == quick(accelerate(model), embedded("three_task", photos=PHOTOS), 2)
    assert any(type(m) in FAST.values() for m in model.modules()), "as it was"
    mean = np.mean([r["psnr"] for r in rows if r["estimate"] == "input"])
    assert average(rows)["input"]["average"] == pytest.approx(mean)


def test_steps_are_those_that_suit_the_weights():
    cases, model = list(embedded("three_task", photos=PHOTOS))[:1], tiny()
    assert [r["estimate"] for r in quick(model, cases)] == ["input", "y0", "y1"]
    model.about = dict(steps=2)
    assert [r["estimate"] for r in quick(model, cases)] == ["input", "y0", "y1", "y2"]
    assert [r["estimate"] for r in quick(tiny(fusion=False), cases)] == ["input", "y0"]


def test_a_model_is_measured_in_its_own_precision():
    cases, model = list(embedded("three_task", photos=PHOTOS))[:1], tiny()
    exact = quick(model, cases, 0)[1]["psnr"]
    half = quick(model.bfloat16(), cases, 0)[1]["psnr"]
    assert half != exact and half == pytest.approx(exact, abs=0.5)


def test_own_pairs_are_measured_and_bad_ones_named():
    model, x, y = tiny(), rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1)
    rows = measure(model, [(x, y), (dict(photo="mine"), x[0], y[0])], 0, progress=False)
    assert [row["photo"] for row in rows] == ["0", "0", "mine", "mine"] and len({row["psnr"] for row in rows}) == 2
    two = torch.cat([x, x])
    for own, message in (
        ((x * 255, y * 255), "pair '0' must have values in .0, 1.: divide 0..255 by 255"),
        (((x * 255).byte(), (y * 255).byte()), "pair '0' must be two float tensors"),
        ((two, two), "pair '0' must be two float tensors"),
        ((x, y[..., :8]), "of one size"),
        ((x.numpy(), y.numpy()), "two float tensors"),
        ((x[..., :5], y[..., :5]), "7 pixels a side or more"),
    ):
        with pytest.raises(InputError, match=message):
            measure(model, [own], 0, progress=False)


def test_a_second_model_shows_what_refinement_gains():
    model, backbone = tiny(), tiny(fusion=False)
    rows = quick(model, embedded("three_task", photos=PHOTOS), 1, backbone)
    assert [r["estimate"] for r in rows[:4]] == ["input", "backbone", "y0", "y1"]
    x, y = pair(center(PHOTOS["a"]), "three_task", "SOTS")
    assert rows[1]["psnr"] == pytest.approx(psnr(backbone(x), y), abs=1e-3)
    head, _, *lines = cells(table(rows, "three_task"))
    means = average(rows)
    gain = float(lines[-1][head.index("y1 - backbone")])
    assert gain == pytest.approx(means["y1"]["average"] - means["backbone"]["average"], abs=0.006)


# ----------------------------------------------------------------------------------------------- rows in a file
def test_rows_survive_a_stop_at_any_byte(tmp_path, counted):
    path = tmp_path / "new" / "a.csv"
    names = ["chelsea", 'a "b", c', "über/日本", os.fsdecode(b"caf\xe9"), "007"]
    options = dict(keys=["photo", "draw"], values=["psnr", "step"], steps=1)
    rows = Rows(path, **options)
    for i, name in enumerate(names):
        rows.add(photo=name, draw=i, psnr=1 / 3 + i, step=2.5 if i == 3 else None)
    assert rows.add(photo="007", draw=4, psnr=9.0)["psnr"] == 1 / 3 + 4, "what is there stays"
    whole = path.read_bytes()
    assert Rows(path, **options).done == rows.done and path.read_bytes() == whole
    assert rows.find(photo="007", draw=4)["photo"] == "007" and "step" not in rows.find(photo="007", draw=4)
    head = whole.index(b"\n") + 1
    for cut in (0, *range(head, len(whole) + 1)):
        path.write_bytes(whole[:cut])
        again = Rows(path, **options)
        assert len(again.done) == max(whole[:cut].count(b"\n") - 1, 0)
        for row in rows.done.values():
            assert again.find(**row) in (None, row)
            again.add(**row)
        assert path.read_bytes() == whole
    counted("stops of a benchmark, at each byte of its table", len(whole) - head + 2)


def test_a_file_of_another_run_is_refused_and_stays(tmp_path):
    path, options = tmp_path / "a.csv", dict(keys=["photo"], values=["psnr"])
    Rows(path, **options, steps=1).add(photo="a", psnr=1.0)
    before = path.read_bytes()
    with pytest.raises(InputError, match="was begun with steps=1, not steps=2: pass another file"):
        Rows(path, **options, steps=2)
    with pytest.raises(InputError, match="is a table of another kind: delete it or pass another file"):
        Rows(path, keys=["photo"], values=["seconds"], steps=1)
    assert path.read_bytes() == before
    (tmp_path / "notes.csv").write_text("my notes, without a line end")
    with pytest.raises(InputError, match="another kind"):
        Rows(tmp_path / "notes.csv", **options)
    assert (tmp_path / "notes.csv").read_text() == "my notes, without a line end"
    (tmp_path / "folder.csv").mkdir()
    for name, message in (("a.md", "ends in .csv"), ("folder.csv", "cannot write"), ("a.csv/b.csv", "cannot write")):
        with pytest.raises(InputError, match=message):
            Rows(tmp_path / name, **options)


def test_rows_of_the_same_weights_in_another_loop_are_of_another_run(tmp_path):
    cases, model = [(rand(1, 3, 16, 16), rand(1, 3, 16, 16, seed=1))], tiny()
    quick(model, cases, 1, output=tmp_path / "a.csv")
    model.about = dict(recipe="again")
    with pytest.raises(InputError, match="was begun with .*, not .* feedback=again"):
        quick(model, cases, 1, output=tmp_path / "a.csv")
    model.encoder.window = torch.hann_window(4)  # of a network of one's own: another thing
    quick(model, cases, 0)
    naf = tiny(backbone="nafnet", fusion=False)
    quick(naf, cases, 0, output=tmp_path / "b.csv")
    with pytest.raises(InputError, match="was begun with .*, not .* window=24"):
        quick(nafnet_local(naf, 16), cases, 0, output=tmp_path / "b.csv")


def test_an_interrupted_run_goes_on(lol, tmp_path):
    model, out = tiny(), tmp_path / "rows.csv"
    expected = quick(model, real("five_task", lol), 1)
    calls, refine = [], model.refine

    def stops(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return refine(*args, **options)

    model.refine = stops
    with pytest.raises(KeyboardInterrupt):
        quick(model, real("five_task", lol), 1, output=out)
    out.write_bytes(out.read_bytes()[:-7])  # cut in the middle of a line: only that image is measured again
    assert quick(model, real("five_task", lol), 1, output=out) == expected
    assert len(calls) == 3 + 4 and len(out.read_text().splitlines()) == 1 + len(expected)
    assert quick(model, real("five_task", lol), 1, output=out) == expected and len(calls) == 7
    with pytest.raises(InputError, match="was begun with steps=1 .*, not steps=2"):
        quick(model, real("five_task", lol), 2, output=out)
    with pytest.raises(InputError, match="was begun with"):
        quick(tiny(identity_start=True), real("five_task", lol), 1, output=out)
    write(lol / "cbsd68" / "a.png", image(9))  # another image under the same name is measured anew
    rows = quick(model, real("five_task", lol), 1, output=out)
    assert rows[0]["psnr"] != expected[0]["psnr"] and rows[3:] == expected[3:] and len(calls) == 8


# ---------------------------------------------------------------------------------------------- public data sets
def image(seed, h=37, w=50):
    return np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8)


@pytest.fixture
def lol(tmp_path):
    """Three pairs of LOL-v1 and two photos of CBSD68, made up."""
    root = tmp_path / "data"
    for i, name in enumerate([f"lol/test/{kind}/{n}.png" for kind in ("low", "high") for n in range(3)]):
        write(root / name, image(i))
    for i, name in enumerate("ab"):
        write(root / "cbsd68" / f"{name}.png", image(i))
    return root


def test_noise_and_crop_follow_the_protocol(lol):
    """Written out anew: cut to multiples of 16, then one stream of noise from seed 0, clipped, truncated to uint8."""
    for _ in range(2):  # another loop begins a new stream
        rng = np.random.RandomState(0)
        for (about, x, y), photo in zip(real("five_task", lol), (image(0), image(1))):
            clean = photo[2:34, 1:49]
            noisy = np.clip(clean + 25 * rng.randn(*clean.shape), 0, 255).astype(np.uint8)
            assert (about["column"], about["source"]) == ("CBSD68_25", "real")
            assert np.array_equal((y[0].permute(1, 2, 0) * 255).round(), clean)
            assert np.array_equal((x[0].permute(1, 2, 0) * 255).round(), noisy)


def test_columns_at_hand_are_measured_and_the_others_named(lol):
    model, cases = tiny(), real("five_task", str(lol))
    rows = quick(model, cases, 1)
    places = [f"cbsd68/{name}.png" for name in "ab"] + [f"lol/test/low/{i}.png" for i in range(3)]
    assert [r["photo"] for r in rows[::3]] == places and len(cases) == 5
    x, y = (torch.tensor(image(i)[2:34, 1:49] / 255).float().permute(2, 0, 1)[None] for i in (1, 4))
    row = next(r for r in rows if (r["photo"], r["estimate"]) == ("lol/test/low/1.png", "y1"))
    assert row["psnr"] == pytest.approx(psnr(model.refine(x, 1), y), abs=1e-3)
    assert "SOTS: no data set" in cases.notes[0] and "LOLv1: 3 images instead of 15" in cases.notes[-1]
    assert "CBSD68_25: 2 images instead of 68" in cases.notes[2] and len(cases.notes) == 5
    lines = cells(table(rows, "five_task"))
    assert lines[-1][0] == "average of 2" and lines[-1][-2:] == ["-", "-"]
    assert "other images" not in markdown(rows, "five_task")
    write(lol / "lol/test/low/1.png", image(0, *(side + 1 for side in image(0).shape[:2])))  # alike once cut to 16s
    with pytest.raises(InputError, match="low/1.png.*high/1.png.*differ in size"):
        list(real("five_task", lol))
    with pytest.raises(InputError, match="no folder"):
        real("five_task", lol / "nowhere")


@pytest.mark.parametrize("count, right", [(11, None), (2200, 200)])
def test_images_of_cdd11_are_counted_by_column(tmp_path, monkeypatch, count, right):
    sets = [dataclasses.replace(s, count=count) if s.name == "CDD-11" else s for s in datasets.SETS]
    monkeypatch.setattr(datasets, "SETS", sets)
    for name in ("clear", *COLUMNS["cdd11"]):
        write(tmp_path / "CDD-11_test" / name / "1.png", image(1))
    cases = real("cdd11", tmp_path)
    texts = [f"{c}: 1 images instead of {right}, so not the published test set" for c in COLUMNS["cdd11"] if right]
    assert len(cases) == 11 and cases.notes == texts


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the images of ../shared/data")
def test_real_noise_is_as_strong_as_published():
    found = [psnr(x, y) for about, x, y in real("five_task", SHARED) if about["column"] == "CBSD68_25"]
    assert len(found) == 68
    assert abs(np.mean(found) - 20.3) < 0.3, "near 20.3 dB; 20.17 without clipping, which takes noise away"


# ------------------------------------------------------------------------------------- photos to be left alone
def test_keep_is_hardly_damaged_and_shows_who_leaves_it_alone():
    rows = quick(leave_alone(), keep(size=48), 0)
    means = average(rows)
    assert list(means["input"])[:-1] == ["clean", "dark", "noise5", "jpeg60", "jpeg90", "flat"]
    assert means["input"] == pytest.approx(means["y0"])
    assert all(means["y0"][column] == 100 for column in ("clean", "dark", "flat"))
    assert means["input"]["noise5"] == pytest.approx(20 * np.log10(255 / 5), abs=0.4)
    for column, quality in (("jpeg60", 60), ("jpeg90", 90)):
        x, y = next((x, y) for about, x, y in keep(size=48) if about["column"] == column)
        file = iio.imwrite("<bytes>", (y[0].permute(1, 2, 0) * 255).byte().numpy(), extension=".jpg", quality=quality)
        assert np.array_equal((x[0].permute(1, 2, 0) * 255).round(), iio.imread(file, extension=".jpg")), column
    photos = {r["photo"] for r in rows}
    assert {"chelsea", "retina", "hubble_deep_field", "gray 0", "orange"} <= photos
    assert {r["step"] for r in rows if r["column"] == "flat"} == {0.0} and "step" not in rows[0]
    assert "100 dB stands for equal images." in markdown(rows, "keep")


def test_keep_makes_no_image_that_is_too_small():
    assert all(min(y.shape[-2:]) >= 16 for _, _, y in keep(photos={}, size=24))


def test_keep_finds_a_step_at_the_border_of_a_flat_image():
    model = leave_alone()

    def rim(x, steps, feedback, return_all=False):
        x = x.clone()
        x[:, 1, :, -17] += 12 / 255  # the last column inside the margin
        x[:, 1, :, -1] += 40 / 255
        return (x - 3 / 255)[None]

    model.refine = rim
    rows = quick(model, [case for case in keep(photos={}, size=64) if case[0]["column"] == "flat"], 0)
    steps = {r["photo"]: r["step"] for r in rows if r["estimate"] == "y0"}
    assert steps["gray 128"] == pytest.approx(12, abs=1e-3) and steps["orange"] == pytest.approx(12, abs=1e-3)
    assert steps["gray 0"] == pytest.approx(9, abs=1e-3) and steps["gray 255"] == pytest.approx(3, abs=1e-3), "clamped"
    assert "in levels of 255: input 0.0, y0 12.0." in markdown(rows, "keep")


def test_own_photos_of_any_kind_can_be_kept():
    gray, deep = np.full((40, 40), 70, np.uint8), np.full((40, 40, 4), 900, np.uint16)
    names = {(about["photo"], tuple(y.shape)) for about, _, y in keep(dict(gray=gray, deep=deep), 32)}
    assert {("gray", (1, 3, 32, 32)), ("deep", (1, 3, 32, 32))} <= names


# ------------------------------------------------------------------------------------------------------- tables
def cells(text):
    """A Markdown table as lists of strings."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_published_figures_are_marked_and_never_mixed():
    tables = json.loads(asset("published.json").read_text(encoding="utf-8"))
    for suite in ("three_task", "five_task", "cdd11"):
        theirs = {row["method"]: row["psnr"] for row in tables[suite]["rows"]}
        assert evaluate.published(suite) == theirs
        about = dict(source="embedded", photo="a")
        rows = [dict(about, column=c, estimate=e, psnr=1.0, ssim=0.5) for c in COLUMNS[suite] for e in ("input", "y0")]
        head, _, *lines = cells(table(rows, suite))
        assert head[:3] == ["PSNR", "input", "y0"] and all(name[-1] == "*" for name in head[3:]) and head[3:]
        assert [line[0] for line in lines] == [*COLUMNS[suite], "average"]
        for line in lines:
            assert line[1:3] == ["1.00", "1.00"], "published figures are neither averaged nor subtracted"
            for name, cell in zip(head[3:], line[3:]):
                figure = theirs[name[:-1]].get(line[0])
                assert cell == ("-" if figure is None else f"{figure:.2f}")
        assert "published, on the real data sets, other images, and no results of this run" in markdown(rows, suite)
        assert len({len(line) for line in table(rows, suite).splitlines()}) == 1, "columns stand below each other"
        by_method = cells(table(rows, suite, methods=None, by_method=True))
        assert {line[0] for line in by_method[2:]} == {"input", "y0"} | {f"{name}*" for name in theirs}
        figures = {line[0]: dict(zip(by_method[0], line)) for line in by_method[2:]}
        assert all(figures[name][line[0]] == cell for line in lines for name, cell in zip(head[1:], line[1:]))
    assert evaluate.published("deweather") == {}
