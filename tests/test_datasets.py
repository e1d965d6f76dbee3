"""The public data sets: made-up copies in every layout are found, counted and paired; what is wrong is said."""

from pathlib import Path

import numpy as np
import pytest

from sipl_min import InputError, data, datasets
from sipl_min.degrade import CDD11, COLUMNS
from sipl_min.photos import write

SHARED = Path(__file__).parents[2] / "shared"


def photo(seed, h=37, w=50):
    return np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8)


def make(root, *names):
    for i, name in enumerate(names):
        write(root / name, photo(i))


def found(root):
    return [f"{f.what.name} {f.what.role}" for f in datasets.find(root)]


LAYOUTS = {  # files -> what they are
    "AirNet and PromptIR": (
        "test/denoise/bsd68/0000.png Train/Denoise/100007.jpg Train/Derain/rainy/rain-1.png "
        "Train/Derain/gt/norain-1.png test/derain/Rain100L/input/1.png test/derain/Rain100L/target/1.png "
        "test/dehaze/input/0001_0.8_0.2.jpg test/dehaze/target/0001.png "
        "Train/Dehaze/synthetic/part1/0025_0.8_0.04.jpg Train/Dehaze/synthetic/part4/0026_1_0.1.jpg "
        "Train/Dehaze/original/0025.jpg Train/Dehaze/original/0026.jpg "
        "test/deblur/gopro/input/a.png test/deblur/gopro/target/a.png test/enhance/lol/input/1.png "
        "test/enhance/lol/target/1.png Train/Enhance/low/2.png Train/Enhance/gt/2.png",
        "CBSD68 test, BSD400 + WED train, Rain100L test, Rain100L train, SOTS-outdoor test, OTS train, GoPro test, "
        "LOL-v1 test, LOL-v1 train",
    ),
    "OneRestore": (
        " ".join(f"CDD-11_{role}/{c}/00001.png" for role in ("test", "train") for c in ("clear", *CDD11)),
        "CDD-11 test, CDD-11 train",
    ),
    "Restormer": (
        "Deraining/Datasets/test/Rain100L/input/rain-1.png Deraining/Datasets/test/Rain100L/target/norain-1.png "
        "Motion_Deblurring/Datasets/test/GoPro/input/1.png Motion_Deblurring/Datasets/test/GoPro/target/1.png "
        "Denoising/Datasets/test/CBSD68/1.png",
        "CBSD68 test, Rain100L test, GoPro test",
    ),
    "as published": (
        "SOTS/outdoor/hazy/0001_0.8_0.2.jpg SOTS/outdoor/gt/0001.png LOLdataset/eval15/low/1.png "
        "LOLdataset/eval15/high/1.png LOLdataset/our485/low/2.png LOLdataset/our485/high/2.png "
        "GoPro/test/GOPR0384/blur/1.png GoPro/test/GOPR0384/sharp/1.png GoPro/test/GOPR0385/blur/1.png "
        "GoPro/test/GOPR0385/sharp/1.png Snow100K-L/synthetic/a.jpg Snow100K-L/gt/a.jpg "
        "raindrop/test_a/data/0_rain.png raindrop/test_a/gt/0_clean.png Test1/input/im_0001_s80_a04.png "
        "Test1/gt/im_0001.png allweather/input/1.png allweather/gt/1.png WED/00001.bmp "
        "OTS_BETA/haze/part2/0005_0.8_0.04.jpg OTS_BETA/clear/clear_images/0005.jpg",
        "WED train, RainDrop test, Outdoor-Rain test, AllWeather train, SOTS-outdoor test, OTS train, GoPro test, "
        "LOL-v1 test, LOL-v1 train, Snow100K-L test",
    ),
    "scenes below each half": (
        "GoPro/train/blur/GOPR1/7.png GoPro/train/blur/GOPR2/7.png GoPro/train/sharp/GOPR1/7.png "
        "GoPro/train/sharp/GOPR2/7.png",
        "GoPro train",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_and_paired(tmp_path, layout):
    names, expected = LAYOUTS[layout][0].split(), LAYOUTS[layout][1].split(", ")
    make(tmp_path, *names)
    items = datasets.find(tmp_path)
    assert [f"{f.what.name} {f.what.role}" for f in items] == expected
    assert all(f.count() and not f.unpaired for f in items), "each input has its target"
    pairs = [pair for f in items for several in f.pairs.values() for pair in several]
    used = {path.relative_to(tmp_path).as_posix() for pair in pairs for path in pair if path}
    assert used == {*names}, "all files, each where it belongs"
    scenes = [(x.parent.name, y.parent.name) for x, y in pairs if x and x.parent.name.startswith("GOPR")]
    assert all(a == b for a, b in scenes) and len(scenes) == 2 * (layout == "scenes below each half")


NEIGHBORS = {  # folder of pairs, or with "images" of clean images -> what they are; space: several folders
    "SOTS/indoor Deraining/test/Rain100H Deraining/test/Test1200 Motion_Deblurring/test/HIDE RainDrop/test_b": None,
    "LOL-v2/Real/test test1/my/own .git/Rain100L __MACOSX/Rain100L": None,
    "DeRaindrop/test_a": "RainDrop test",
    "dehaze_project/LOL/eval15": "LOL-v1 test",
    "outdoor/GoPro/test": "GoPro test",
    "Outdoor_heavy_rain/test": "Outdoor-Rain test",
    "lol/AllWeather/train": "AllWeather train",
    "Rain100L/test": "Rain100L test",
    "GoPro/trainset": "GoPro train",
    "RainTrain/Rain100L": "Rain100L train",
    "wedding/images CBSD68/noisy25/images test/Denoise/Kodak24/images": None,
    "WED/images": "WED train",
    "latest/BSD400/images": "BSD400 train",
    "CBSD68/original_png/images": "CBSD68 test",
    "images/Train/Denoise": "BSD400 + WED train",
}


@pytest.mark.parametrize("folders", NEIGHBORS)
def test_neighbors_are_told_apart(tmp_path, folders):
    for folder in folders.split():
        clean = "images" in folder
        make(tmp_path, *(f"{folder}/{part}1.png" for part in ([""] if clean else ["input/", "target/"])))
    assert found(tmp_path) == [name for name in [NEIGHBORS[folders]] if name]


def test_the_root_may_be_the_data_set(tmp_path, monkeypatch):
    make(tmp_path, "Rain100L/test/input/1.png", "Rain100L/test/target/1.png")
    make(tmp_path, "Train/Dehaze/synthetic/1_0.8.jpg", "Train/Dehaze/original/1.png")
    for root, expected in (("Rain100L", "Rain100L test"), ("Train", "OTS train")):
        monkeypatch.chdir(tmp_path / root)
        assert found(tmp_path / root) == found(".") == [expected]


def line_of(root, name):
    lines = datasets.report(root)
    at = next(i for i, line in enumerate(lines) if line[9:].startswith(name))
    return lines[at : at + 2]


UNUSABLE = {  # files and empty folders -> the set that they are of, a suite that needs it
    "Rain100L/train/rain-1.png Rain100L/train/norain-1.png": ("Rain100L (train)", "three_task"),  # as in 2017
    "Rain100L/rain-1.png Rain100L/norain-1.png": ("Rain100L (train)", "three_task"),  # train or test
    "Train/Derain/rainy/rain-1.png": ("Rain100L (train)", "five_task"),  # its target folder is missing
    "Train/Dehaze/photos/1_0.8.png": ("OTS (train)", "mixed"),
    "CDD-11_train/clear/1.png CDD-11_train/low_haze/1.png": ("CDD-11 (train)", "cdd11"),
    "CDD-11_train/input/1.png CDD-11_train/target/1.png": ("CDD-11 (train)", "cdd11"),
    "GoPro/train/blur/1.png GoPro/train/sharp/2.png": ("GoPro (train)", "five_task"),  # none has its target
    "LOL/our485/low/ LOL/our485/high/": ("LOL-v1 (train)", "five_task"),  # empty
    "LOL/our485/": ("LOL-v1 (train)", "five_task"),
    "BSD400/": ("BSD400 (train)", "everyday"),
}


@pytest.mark.parametrize("names", UNUSABLE)
def test_what_is_there_and_cannot_be_used_is_never_missing_and_stops_training(tmp_path, names):
    (what, suite), names = UNUSABLE[names], names.split()
    for name in names:
        (tmp_path / name if name.endswith("/") else (tmp_path / name).parent).mkdir(parents=True, exist_ok=True)
    make(tmp_path, "WED/1.png", *(name for name in names if not name.endswith("/")))
    first, second = line_of(tmp_path, what)
    assert first.startswith("CHECK") and "no " in second and "arrange it as" in second
    with pytest.raises(InputError, match="has nothing to train .* on: arrange it as .* or move it away") as e:
        datasets.training(tmp_path, suite)
    assert str(tmp_path) in str(e.value)
    (tmp_path / Path(names[0]).parts[0]).rename(tmp_path.with_name(f"{tmp_path.name} away"))  # as advised
    assert datasets.training(tmp_path, suite) == dict(source=[tmp_path / "WED" / "1.png"], pairs={}, unpaired=[])


def test_what_a_set_has_beside_its_images_tells_nothing_of_its_other_half(tmp_path):
    make(tmp_path, "GoPro/test/blur/1.png", "GoPro/test/sharp/1.png", "GoPro/figures/1.png", "WED/1.png")
    assert found(tmp_path) == ["WED train", "GoPro test"]
    assert line_of(tmp_path, "GoPro (train)")[0].startswith("missing")
    assert datasets.training(tmp_path, "five_task")["pairs"] == {}


def test_where_a_missing_set_is_to_be_put_it_is_found(tmp_path):
    for what in datasets.SETS:
        line = line_of(tmp_path, f"{what.name} ({what.role})")[0]
        assert line.startswith("missing") and what.source in line
        place = Path(line.rpartition("put it in ")[2])
        names = ["input/1.png", "target/1.png"]
        if what.clean:
            names = [f"{place.name}/1.png"]
        elif place.name == "clear, low, haze, ...":
            names = [f"{c}/1.png" for c in ("clear", *CDD11)]
        make(place.parent, *names)
        assert f"{what.name} {what.role}" in found(tmp_path)
    assert len(found(tmp_path)) == len(datasets.SETS)


def test_what_is_wrong_with_a_copy_is_named(tmp_path, monkeypatch):
    small = datasets.DataSet("LOL-v1", "test", 3, "lol", ("LOLv1",), "paper, page", other=(4, "the other version"))
    monkeypatch.setattr(datasets, "SETS", (small,))
    make(tmp_path, *(f"lol/test/{kind}/{i}.png" for kind in ("low", "high") for i in range(3)))
    assert datasets.report(tmp_path) == [f"found    LOL-v1 (test) in {tmp_path}/lol/test"]
    write(tmp_path / "lol/test/low/3.png", photo(0))
    (tmp_path / "lol/test/low/0.png").write_bytes((tmp_path / "lol/test/low/0.png").read_bytes()[:900])
    write(tmp_path / "lol/test/low/1.png", photo(0, 20, 20))
    text = "\n".join(datasets.report(tmp_path))
    for part in ("CHECK", "3.png' has no targets", "cannot read", "low/0.png", "has 20 x 20 pixels", "has 50 x 37 pix"):
        assert part in text
    write(tmp_path / "lol/test/high/3.png", photo(0))
    assert "4 pairs instead of 3: this is the other version" in "\n".join(datasets.report(tmp_path))
    (tmp_path / "lol/test/low/2.png").unlink()
    (tmp_path / "lol/test/low/3.png").unlink()
    assert "2 pairs instead of 3: the copy is not whole" in "\n".join(datasets.report(tmp_path))
    assert datasets.report(tmp_path / "lol" / "test" / "low")[0].startswith("missing  LOL-v1 (test): paper, page; put")
    with pytest.raises(InputError, match="no folder"):
        datasets.report(tmp_path / "nowhere")


def test_counts_are_those_of_the_published_sets():
    counts = {(s.name, s.role): (s.count, s.clear, s.other) for s in datasets.SETS}
    assert counts["Rain100L", "test"] == (100, None, (200, datasets.NEW_RAIN))
    assert counts["Rain100L", "train"] == (200, None, (1800, datasets.NEW_RAIN))
    clear = {("SOTS-outdoor", "test"): (500, 492), ("OTS", "train"): (72135, 2061)}
    clear |= {("CDD-11", "test"): (2200, 200), ("CDD-11", "train"): (13013, 1183)}
    assert {key: value[:2] for key, value in counts.items() if value[1]} == clear
    some = dict(CBSD68=68, BSD400=400, WED=4744, GoPro=2103, AllWeather=18069, RainDrop=58)
    assert {name: n for (name, _), (n, *_) in counts.items() if name in some} == some


def test_folders_of_a_project_hide_no_data_sets(tmp_path):
    make(tmp_path, *(f"data/Rain100L/test/{half}/1.png" for half in ("input", "target")))
    (tmp_path / "out").mkdir()  # `data` and `out` are names of halves too
    assert found(tmp_path) == ["Rain100L test"]


def test_training_takes_pairs_where_there_are_and_makes_the_rest(tmp_path):
    names = ["our485/low/0.png", "our485/high/0.png", "Train/Derain/rainy/rain-0.png", "Train/Derain/gt/norain-0.png"]
    make(tmp_path, *names)
    made = datasets.training(tmp_path, "five_task")
    low, high, rain, clean = (tmp_path / name for name in names)
    pairs = {"Rain100L": [(rain, clean)], "LOLv1": [(low, high)]}
    assert made == dict(source=sorted([high, clean]), pairs=pairs, unpaired=[])
    _, _, columns = data.batch(data.Images(**made), 0, suite="five_task", crop_size=16, batch_size=40)
    assert {*columns} == {*COLUMNS["five_task"]}
    assert datasets.training(tmp_path, "everyday") == made | dict(pairs={}), "targets are clean images"

    write(tmp_path / "our485" / "low" / "9.png", photo(5))
    with pytest.raises(InputError, match="1 photos or pairs cannot be used: .*9.png' has no targets .*--skip-bad"):
        data.Images(**datasets.training(tmp_path, "five_task"))
    (left,) = data.Images(**datasets.training(tmp_path, "five_task"), skip_bad=True).left_out
    assert "9.png' has no targets" in left, "what is left out is told"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no training set of cdd11 below"):
        datasets.training(tmp_path / "empty", "cdd11")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real images beside the repository")
def test_real_copies():
    whole = {f.what.name: f for f in datasets.find(SHARED / "benchmarks")}
    counts = {"CBSD68": 68, "Rain100L": 100, "LOL-v1": 15, "SOTS-outdoor": 15, "GoPro": 15}
    assert {name: f.count() for name, f in whole.items()} == counts
    assert all(datasets.problems(whole[name]) == [] for name in ("CBSD68", "Rain100L", "LOL-v1"))
    assert all("the copy is not whole" in datasets.problems(whole[name])[0] for name in ("SOTS-outdoor", "GoPro"))
    samples = {f"{f.what.name} {f.what.role}": f.count() for f in datasets.find(SHARED / "data")}
    expected = {"CBSD68 test": 68, "BSD400 train": 400, "Rain100L test": 2, "SOTS-outdoor test": 2}
    assert samples == expected | {"CDD-11 test": 0, "CDD-11 train": 0}, "there, in a layout that is not known"
