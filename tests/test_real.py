"""The public data sets: made-up copies in every layout are found, counted, paired and measured by the protocol."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny

from sipl_min import InputError, benchmark, data, datasets, real
from sipl_min.__main__ import main
from sipl_min.degrade import CDD11, COLUMNS
from sipl_min.files import read, write

SHARED = Path(__file__).parents[2] / "shared" / "data"


def photo(seed, h=37, w=50):
    return np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8)


def make(root, *names):
    for i, name in enumerate(names):
        write(root / name, photo(i))


LAYOUTS = {
    "AirNet and PromptIR": (
        ["test/denoise/bsd68/0000.png", "Train/Denoise/100007.jpg", "Train/Derain/rainy/rain-1.png",
         "Train/Derain/gt/norain-1.png", "test/derain/Rain100L/input/1.png", "test/derain/Rain100L/target/1.png",
         "test/dehaze/input/0001_0.8_0.2.jpg", "test/dehaze/target/0001.png",
         "Train/Dehaze/synthetic/0025_0.8_0.04.jpg", "Train/Dehaze/original/0025.jpg",
         "test/deblur/gopro/input/a.png", "test/deblur/gopro/target/a.png",
         "test/enhance/lol/input/1.png", "test/enhance/lol/target/1.png",
         "Train/Enhance/low/2.png", "Train/Enhance/gt/2.png"],
        ["CBSD68 test", "BSD400 + WED train", "Rain100L test", "Rain100L train", "SOTS-outdoor test", "OTS train",
         "GoPro test", "LOL-v1 test", "LOL-v1 train"]),
    "OneRestore": (
        [f"CDD-11_{role}/{c}/00001.png" for role in ("test", "train") for c in ("clear", *CDD11)],
        ["CDD-11 test", "CDD-11 train"]),
    "Restormer": (
        ["Deraining/Datasets/test/Rain100L/input/rain-1.png", "Deraining/Datasets/test/Rain100L/target/norain-1.png",
         "Motion_Deblurring/Datasets/test/GoPro/input/1.png", "Motion_Deblurring/Datasets/test/GoPro/target/1.png",
         "Denoising/Datasets/test/CBSD68/1.png"],
        ["CBSD68 test", "Rain100L test", "GoPro test"]),
    "as published": (
        ["SOTS/outdoor/hazy/0001_0.8_0.2.jpg", "SOTS/outdoor/gt/0001.png", "LOLdataset/eval15/low/1.png",
         "LOLdataset/eval15/high/1.png", "LOLdataset/our485/low/2.png", "LOLdataset/our485/high/2.png",
         "GoPro/test/GOPR0384/blur/1.png", "GoPro/test/GOPR0384/sharp/1.png", "GoPro/test/GOPR0385/blur/1.png",
         "GoPro/test/GOPR0385/sharp/1.png", "Snow100K-L/synthetic/a.jpg", "Snow100K-L/gt/a.jpg",
         "raindrop/test_a/data/0_rain.png", "raindrop/test_a/gt/0_clean.png", "Test1/input/im_0001_s80_a04.png",
         "Test1/gt/im_0001.png", "allweather/input/1.png", "allweather/gt/1.png", "WED/00001.bmp"],
        ["WED train", "RainDrop test", "Outdoor-Rain test", "AllWeather train", "SOTS-outdoor test", "GoPro test",
         "LOL-v1 test", "LOL-v1 train", "Snow100K-L test"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_and_paired(tmp_path, layout):
    names, expected = LAYOUTS[layout]
    make(tmp_path, *names)
    found = datasets.find(tmp_path)
    assert [f"{f.what.name} {f.what.role}" for f in found] == expected
    inputs = [f for f in found if not f.what.clean]
    assert all(f.count() and not f.unpaired for f in found), "each input has its target"
    paths = [p for f in found for pairs in f.pairs.values() for pair in pairs for p in pair if p]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in {*paths}) == sorted(names), (
        "all files, each where it belongs"
    )
    assert all(x != y for f in inputs for pairs in f.pairs.values() for x, y in pairs)


@pytest.mark.parametrize(
    "folder, expected",
    [
        ("SOTS/indoor", None),
        ("Deraining/Datasets/test/Rain100H", None),
        ("Deraining/Datasets/test/Test1200", None),
        ("Motion_Deblurring/Datasets/test/HIDE", None),
        ("DeRaindrop/test_a", "RainDrop test"),
        ("RainDrop/test_b", None),
        ("dehaze_project/LOL/eval15", "LOL-v1 test"),
        ("outdoor/GoPro/test", "GoPro test"),
        ("Outdoor_heavy_rain/test", "Outdoor-Rain test"),
        ("lol/AllWeather/train", "AllWeather train"),
        ("LOL-v2/Real/test", None),
        ("test1/my/own", None),
        ("Rain100L/test", "Rain100L test"),
        ("GoPro/trainset", "GoPro train"),
        ("RainTrain/Rain100L", "Rain100L train"),
        ("Snow100K-S_test", None),  # no such words for its folders: input and target are not what it has
        (".git/Rain100L", None),
        ("__MACOSX/Rain100L", None),
    ],
)
def test_neighbours_are_told_apart(tmp_path, folder, expected):
    names = ("synthetic", "other") if "Snow" in folder else ("input", "target")
    make(tmp_path, *(f"{folder}/{name}/1.png" for name in names))
    assert [f"{f.what.name} {f.what.role}" for f in datasets.find(tmp_path)] == [expected] * (expected is not None)


@pytest.mark.parametrize(
    "folder, expected",
    [("wedding", None), ("WED", "WED"), ("latest/BSD400", "BSD400"), ("CBSD68/noisy25", None),
     ("test/Denoise/Kodak24", None), ("CBSD68/original_png", "CBSD68"), ("Train/Denoise", "BSD400 + WED")],
)  # fmt: skip
def test_clean_images_are_told_from_others(tmp_path, folder, expected):
    make(tmp_path, f"{folder}/1.png")
    found = [f.what.name for f in datasets.find(tmp_path)]
    assert found == [expected] * (expected is not None)


def test_the_root_may_be_the_data_set_and_links_may_lead_back(tmp_path, monkeypatch):
    make(tmp_path, "Rain100L/test/input/1.png", "Rain100L/test/target/1.png", "Train/Dehaze/synthetic/1_0.8.jpg",
         "Train/Dehaze/original/1.png", "GOPRO_Large/test/GOPR0384_11_00/blur/1.png",
         "GOPRO_Large/test/GOPR0384_11_00/sharp/1.png")  # fmt: skip
    (tmp_path / "Rain100L" / "loop").symlink_to(tmp_path / "Rain100L")
    for root, expected in (("Rain100L", "Rain100L test"), ("Train", "OTS train"), ("GOPRO_Large", "GoPro test")):
        monkeypatch.chdir(tmp_path / root)
        for place in (tmp_path / root, "."):
            found = datasets.find(place)
            assert [(f"{f.what.name} {f.what.role}", f.count()) for f in found] == [(expected, 1)]


def test_what_is_wrong_with_a_copy_is_named(tmp_path, monkeypatch):
    small = datasets.DataSet("LOL-v1", "test", 3, "lol", ("LOLv1",), "paper", "page", other=(4, "the other version"))
    monkeypatch.setattr(datasets, "SETS", (small,))
    make(tmp_path, *(f"lol/test/{kind}/{i}.png" for kind in ("low", "high") for i in range(3)))
    assert datasets.problems(datasets.find(tmp_path)[0]) == []
    assert datasets.report(tmp_path) == [f"found    LOL-v1 (test) in {tmp_path}/lol/test"]
    write(tmp_path / "lol/test/low/3.png", photo(0))
    (tmp_path / "lol/test/low/0.png").write_bytes((tmp_path / "lol/test/low/0.png").read_bytes()[:900])
    write(tmp_path / "lol/test/low/1.png", photo(0, 20, 20))
    text = "\n".join(datasets.report(tmp_path))
    for sentence in (
        "CHECK",
        "3.png: no target of this name",
        "0.png: cannot be read",
        "20 x 20 pixels, its target 50 x 37",
    ):
        assert sentence in text
    write(tmp_path / "lol/test/high/3.png", photo(0))
    assert "4 pairs instead of 3: this is the other version" in "\n".join(datasets.report(tmp_path))
    (tmp_path / "lol/test/low/2.png").unlink()
    (tmp_path / "lol/test/low/3.png").unlink()
    assert "2 pairs instead of 3: the copy is not whole" in "\n".join(datasets.report(tmp_path))
    assert datasets.report(tmp_path / "lol" / "test" / "low")[0].startswith(
        "missing  LOL-v1 (test): paper, page; put it in"
    )
    with pytest.raises(InputError, match="no folder"):
        datasets.report(tmp_path / "nowhere")


def test_counts_tell_the_two_versions_of_rain100l_apart():
    test = next(s for s in datasets.SETS if (s.name, s.role) == ("Rain100L", "test"))
    assert test.count == 100 and test.other == (200, datasets.NEW_RAIN)


def test_noise_and_crop_follow_the_protocol(tmp_path):
    """Written out anew: cut to multiples of 16, then one stream of noise from seed 0, clipped, truncated to uint8."""
    make(tmp_path, "CBSD68/a.png", "CBSD68/b.png")
    rng = np.random.RandomState(0)
    for (column, name, _, x, y), image in zip(
        real.images("five_task", real.tests_of(tmp_path), tmp_path), (photo(0), photo(1))
    ):
        clean = image[2:34, 1:49]
        noisy = np.clip(clean + 25 * rng.randn(*clean.shape), 0, 255).astype(np.uint8)
        assert (column, name[-3:]) == ("CBSD68_25", "png")
        assert np.array_equal((y[0].permute(1, 2, 0) * 255).round(), clean)
        assert np.array_equal((x[0].permute(1, 2, 0) * 255).round(), noisy)


@pytest.fixture
def lol(tmp_path):
    make(
        tmp_path, *(f"data/lol/test/{kind}/{i}.png" for kind in ("low", "high") for i in range(3)), "data/cbsd68/a.png"
    )
    return tmp_path / "data"


def test_columns_at_hand_are_measured_and_the_others_named(lol, tmp_path):
    model = tiny()
    rows, notes = real.evaluate(model, "five_task", lol, 2, save=tmp_path / "saved", progress=False)
    assert [(r["column"], r["photo"]) for r in rows[::4]] == [("CBSD68_25", "cbsd68/a.png")] + [
        ("LOLv1", f"lol/test/low/{i}.png") for i in range(3)
    ]
    x, y = real.pair("LOLv1", lol / "lol/test/low/1.png", lol / "lol/test/high/1.png", None)
    row = next(r for r in rows if (r["photo"], r["estimate"]) == ("lol/test/low/1.png", "y2"))
    assert row["psnr"] == benchmark.psnr(model.refine(x, 2), y)
    saved = torch.tensor(read(tmp_path / "saved/LOLv1/lol/test/low/1.png")).permute(2, 0, 1)[None] / 255
    assert (saved - model.refine(x, 2).clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert len(notes) == 5 and "SOTS: no data set" in notes[0] and "LOLv1: 3 images instead of 15" in notes[-1]
    lines = benchmark.table(rows, "five_task", real=True).splitlines()
    assert lines[-2].startswith("average of 2") and lines[-2].split("|")[1].split() == ["-", "-", "-"]
    assert "other images" not in lines[-1]
    assert "| average of 2 |" in benchmark.markdown(rows, "five_task")


@pytest.mark.parametrize("cut", [0, 7])
def test_an_interrupted_benchmark_goes_on(lol, tmp_path, cut, monkeypatch):
    model, out = tiny(), tmp_path / "rows.csv"
    expected, _ = real.evaluate(model, "five_task", lol, 1, progress=False)
    calls, refine = [], model.refine

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return refine(*arguments, **options)

    model.refine = stops
    with pytest.raises(KeyboardInterrupt):
        real.evaluate(model, "five_task", lol, 1, out, progress=False)
    part = Path(f"{out}.part")
    part.write_bytes(part.read_bytes()[: -cut or None])  # the last line may be torn
    assert not out.exists()
    rows, _ = real.evaluate(model, "five_task", lol, 1, out, progress=False)
    assert rows == expected and len(calls) == 3 + (3 if cut else 2)
    assert not part.exists() and len(out.read_text().splitlines()) == 1 + len(expected)
    part.write_text("[]\nnull\n[1, [null], {}\n")  # rubbish is as good as nothing
    assert real.evaluate(model, "five_task", lol, 1, out, progress=False)[0] == expected
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        real.evaluate(model, "five_task", lol, 1, out, progress=False)
    begun = part.read_text()
    with pytest.raises(InputError, match="begun with other weights, setting or --steps"):
        real.evaluate(model, "five_task", lol, 2, out, progress=False)
    assert part.read_text() == begun
    write(lol / "cbsd68" / "a.png", photo(9))  # another image under the same name is measured anew
    rows, _ = real.evaluate(model, "five_task", lol, 1, out, progress=False)
    assert rows[0]["psnr"] != expected[0]["psnr"] and rows[3:] == expected[3:]
    with pytest.raises(InputError, match="pass the name of a file that ends in .csv"):
        real.evaluate(model, "five_task", lol, 1, tmp_path, progress=False)


def test_a_second_model_shows_what_refinement_gains(lol, tmp_path):
    model, plain = tiny(), tiny(fusion=False)
    rows, _ = real.evaluate(model, "five_task", lol, 1, tmp_path / "r.csv", progress=False, against=plain)
    assert [r["estimate"] for r in rows[:4]] == ["input", "backbone", "y0", "y1"]
    x, y = real.pair("LOLv1", lol / "lol/test/low/0.png", lol / "lol/test/high/0.png", None)
    row = next(r for r in rows if (r["photo"], r["estimate"]) == ("lol/test/low/0.png", "backbone"))
    assert row["psnr"] == benchmark.psnr(plain(x), y)
    means = benchmark.average(rows)
    lines, _ = benchmark.cells(rows, "five_task")
    assert lines[0][5] == "y1 - backbone"
    assert float(lines[-1][5]) == pytest.approx(means["y1"]["average"] - means["backbone"]["average"], abs=0.006)
    embedded = benchmark.evaluate(model, "three_task", 1, dict(a=photo(0)), progress=False, against=plain)
    assert {r["estimate"] for r in embedded} == {"input", "backbone", "y0", "y1"}


def test_lpips_is_measured_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(benchmark, "lpips_network", lambda: lambda a, b: (a - b).abs().mean())
    rows = benchmark.evaluate(tiny(), "three_task", 0, dict(a=photo(0)), progress=False)
    x, y = benchmark.pair(benchmark.centre(photo(0)), "three_task", "SOTS")
    assert rows[0]["lpips"] == pytest.approx(2 * float((x - y).abs().mean()), rel=1e-5)


def test_by_command(lol, tmp_path, capsys):
    tiny().save(tmp_path / "w.safetensors")
    job = ["--data", str(lol), "--weights", str(tmp_path / "w.safetensors")]
    assert main(["data", str(lol)]) == 0
    assert "CHECK    LOL-v1 (test)" in capsys.readouterr().out
    assert main(["benchmark", "five_task", *job, "--output", str(tmp_path / "r.csv")]) == 0
    out = capsys.readouterr().out
    assert "published protocol" in out and "note: SOTS: no data set" in out and "PromptIR*" in out
    assert "# five_task" in (tmp_path / "r.md").read_text() and (tmp_path / "r.csv").exists()
    assert (tmp_path / "r.png").stat().st_size > 5000
    tiny(fusion=False).save(tmp_path / "plain.safetensors")
    assert main(["benchmark", "five_task", *job, "--against", str(tmp_path / "plain.safetensors")]) == 0
    assert "y1 - backbone" in capsys.readouterr().out
    for arguments, message in (
        (["benchmark", "cdd11", *job], "nothing of cdd11 can be measured"),
        (["benchmark", "all", *job, "--output", "r.csv"], "--output takes one setting at a time"),
        (["benchmark", "five_task", "--data", "nowhere"], "no folder 'nowhere'"),
        (["data", "nowhere"], "no folder 'nowhere'"),
        (["benchmark", "five_task", "--output", "r.md"], "pass the name of a file that ends in .csv"),
        (["train", "run", "--images", "a", "--data", "b"], "pass one of them"),
        (["train", str(tmp_path / "run"), "--device", "warp"], "device 'warp' cannot be used here"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_training_takes_pairs_where_there_are_and_makes_the_rest(tmp_path, capsys):
    for role, names in dict(low=("low", "high"), rain=("rainy", "gt")).items():
        for i in range(2):
            clean = photo(i)
            folder = tmp_path / ("our485" if role == "low" else "Train/Derain")
            stems = (f"{i}", f"{i}") if role == "low" else (f"rain-{i}", f"norain-{i}")
            write(folder / names[0] / f"{stems[0]}.png", clean // 2)  # exactly half, so that a crop is known again
            write(folder / names[1] / f"{stems[1]}.png", clean)
    made = datasets.training(tmp_path, "five_task")
    assert {c: len(p) for c, p in made["pairs"].items()} == {"Rain100L": 2, "LOLv1": 2} and len(made["folder"]) == 4
    images = data.Images(**made)
    seen = set()
    for step in range(6):
        x, y, columns = data.batch(images, step, setting="five_task", size=16, count=8)
        again = data.batch(images, step, setting="five_task", size=16, count=8)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
        for a, b, column in zip(x, y, columns):
            half = ((b * 255).round() // 2 / 255 - a).abs().max() < 1e-6
            assert half == (column in made["pairs"]), column
        seen |= {*columns}
    assert seen == {*COLUMNS["five_task"]}
    run = [
        "train",
        str(tmp_path / "run"),
        "--data",
        str(tmp_path),
        "--setting",
        "five_task",
        "--steps",
        "2",
        "--size",
        "16",
    ]
    assert main(run) == 0
    assert "4 clean images; pairs: 2 of Rain100L, 2 of LOLv1" in capsys.readouterr().out
    write(tmp_path / "our485" / "low" / "2.png", photo(5))
    write(tmp_path / "our485" / "high" / "2.png", photo(5))
    assert main(run) == 2
    assert "belongs to another run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no training set of cdd11 below"):
        datasets.training(tmp_path / "empty", "cdd11")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real images of ../shared/data")
def test_real_samples():
    found = {f.what.name: f for f in datasets.find(SHARED)}
    assert [found[n].count() for n in ("CBSD68", "BSD400", "Rain100L", "SOTS-outdoor")] == [68, 400, 2, 2]
    assert datasets.problems(found["CBSD68"]) == datasets.problems(found["BSD400"]) == []
    assert all("the copy is not whole" in datasets.problems(found[n])[0] for n in ("Rain100L", "SOTS-outdoor"))
    inputs = {}
    for column, _, _, x, y in real.images("three_task", real.tests_of(SHARED), SHARED):
        inputs.setdefault(column, []).append(benchmark.psnr(x, y))
    means = {column: round(float(np.mean(v)), 1) for column, v in inputs.items()}
    assert abs(means["CBSD68_25"] - 20.3) < 0.3, "near 20.3 dB; 20.17 without clipping, which takes noise away"
    assert 24 < means["CBSD68_15"] < 25.5 and 14 < means["CBSD68_50"] < 15.5
