"""Images to learn from: embedded, own, in pairs; batches and data sets that follow from their seed alone."""

import math
import pickle

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import ConcatDataset, DataLoader

from sipl_min import InputError, data
from sipl_min.data import Degraded, Images, Pairs, batch
from sipl_min.degrade import COLUMNS, SHARES, SUITES, generator, noise
from sipl_min.photos import read, to_tensor, write


def photo(seed, h=40, w=50):
    return np.random.default_rng(seed).integers(0, 255, (h, w, 3), np.uint8)


def pairs_on_disk(root, *names, x="input", y="target"):
    """Pairs whose degraded half is exactly half as bright, so that a crop of it is known again."""
    for i, name in enumerate(names):
        write(root / x / name, photo(i) // 2)
        write(root / y / name, photo(i))
    return root / x, root / y


def is_half(x, y):
    return ((y * 255).round() // 2 / 255 - x).abs().max() < 1e-6


def test_held_out_photos_are_never_trained_on():
    held = data.held_out()
    assert len(held) >= 3 and all(p.shape[2:] == (3,) and p.dtype == np.uint8 for p in held.values())
    training = [to_tensor(read(data.installed(n))) for n in data.TRAINING]
    for one in held.values():
        alike = [other for other in training if other.shape[-2:] == one.shape[:2]]
        assert all((to_tensor(one) - other).abs().mean() > 0.05 for other in alike)
    with pytest.raises(InputError, match="nothing.png is not inside the installed scikit-image"):
        data.installed("nothing.png")


def test_motorcycle_has_real_depth():
    d = data.motorcycle_distance()
    known = d[~d.isnan()]
    assert d.shape == (1, 500, 741) and len(known) > 0.9 * d.numel()
    assert known.min() >= 0 and known.max() <= 1 and known.std() > 0.1
    images = Images(leaves=1)
    assert [images.sources[i].name for i in images.depths] == ["motorcycle_left.png"]


def test_dead_leaves_have_all_scales():
    images = data.dead_leaves(4, 96, seed=0)
    assert images.shape == (4, 3, 96, 96) and images.dtype == torch.uint8
    assert torch.equal(images, data.dead_leaves.__wrapped__(4, 96, seed=0)) and not torch.equal(
        images, data.dead_leaves(4, 96, 1)
    )
    # a natural image's power falls like 1 / f^2: compare octaves of the spectrum
    power = torch.fft.fft2(images.float().mean(1) - 128).abs().square().mean(0)
    f = torch.fft.fftfreq(96) * 96
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    octave = [power[(radius >= r) & (radius < 2 * r)].mean() for r in (3, 6, 12, 24)]
    assert 1.2 < np.mean([math.log2(a / b) for a, b in zip(octave, octave[1:])]) < 3.2


def test_batches_are_a_function_of_seed_and_step():
    images = Images(leaves=2)
    x, y, columns = batch(images, 7, crop_size=32, batch_size=4, seed=1)
    batch(images, 8, crop_size=40, batch_size=3, seed=1)
    u, v, names = batch(Images(leaves=2), 7, crop_size=32, batch_size=4, seed=1)
    assert torch.equal(x, u) and torch.equal(y, v) and columns == names and x.shape == y.shape == (4, 3, 32, 32)
    for step, seed in ((8, 1), (7, 2)):
        assert not torch.equal(y, batch(images, step, seed=seed, crop_size=32, batch_size=4)[1])
    assert batch(Images([photo(0, 5, 9)]), 0, crop_size=32, batch_size=2)[1].shape == (2, 3, 32, 32), "mirrored"


def test_mild_crops_are_the_same_degradation_in_part():
    images, same = Images(leaves=2), dict(crop_size=32, batch_size=16, suite="five_task")
    x, y, columns = batch(images, 3, **same)
    weak, again, names = batch(images, 3, **same, mild=0.5)
    assert torch.equal(y, again) and columns == names
    share = ((weak - y) * (x - y)).sum((1, 2, 3)) / (x - y).square().sum((1, 2, 3))  # s, per crop
    assert torch.allclose(weak, y + share[:, None, None, None] * (x - y), atol=1e-5)
    assert 2 < (share < 0.999).sum() < 14 and ((share >= 0) & (share < 1.001)).all()


def test_a_crop_and_its_depth_turn_together():
    images, g = Images([photo(0)]), generator(0)
    images.depths = {0: torch.from_numpy(images.sources[0][:1]).float()}
    for _ in range(20):
        image, depth = images.crop(24, g)
        assert torch.equal(image[0].float(), depth[0])


def within(count, total, share):
    """Whether a count out of a total is what this share gives, to four deviations."""
    return abs(count - total * share) < 4 * (total * share * (1 - share)) ** 0.5


def test_some_crops_are_gray_and_some_paler(monkeypatch):
    color = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(4000, 3, 2, 2)
    spread = data.fade(color, generator(0)).std(1).flatten(1).mean(1) / 0.4
    assert within(int((spread < 1e-6).sum()), 4000, 0.2) and within(int((spread > 1 - 1e-6).sum()), 4000, 0.7)
    assert spread.max() < 1 + 1e-6 and torch.allclose(data.fade(color, generator(0)).mean(1), color.mean(1))
    monkeypatch.setattr(data, "fade", lambda y, g: torch.zeros_like(y))
    photos = Images([photo(0)])
    for suite, share in (("everyday", 1.0), ("cdd11", 0.0)):
        _, y, columns = batch(photos, 0, suite=suite, crop_size=8, batch_size=50)
        dark = [not y[i].any() for i, column in enumerate(columns) if column not in data.AS_IT_IS]
        assert sum(dark) == share * len(dark) and dark, suite


def test_everyday_draws_by_its_shares_and_spares_what_is_sound(monkeypatch):
    compressed = []
    monkeypatch.setattr(data, "jpeg", lambda x, g: compressed.append(len(x)) or x)  # noted, not done
    monkeypatch.setattr(data, "degrade", lambda y, *_: torch.zeros_like(y))  # so that what is done in part shows
    monkeypatch.setattr(data, "night", lambda y, g: torch.full_like(y, -1))
    gray = Images([np.full((9, 9, 3), 128, np.uint8)])
    x, y, columns = batch(gray, 0, suite="everyday", crop_size=8, batch_size=8000)
    for column, share in SHARES["everyday"].items():
        assert within(columns.count(column), 8000, share / sum(SHARES["everyday"].values())), column
    assert within(sum(compressed), sum(column not in ("clean", "jpeg") for column in columns), 0.15)

    _, _, others = batch(gray, 0, suite="everyday", crop_size=8, batch_size=2000, shares=dict(noise=3000, jpeg=0))
    total = sum((SHARES["everyday"] | dict(noise=3000, jpeg=0)).values())
    assert within(others.count("noise"), 2000, 3000 / total) and "jpeg" not in others

    as_it_is = torch.tensor([column in ("clean", "jpeg", "noise", "grain", "camera") for column in columns])
    in_part = x.amax((1, 2, 3)) > 0
    assert not in_part[as_it_is].any() and within(int(in_part.sum()), int((~as_it_is).sum()), 0.15)

    before = 128 / 255
    assert (y[~as_it_is] == before).all(), "their target is the photo"
    y = y[as_it_is]
    at_night = (y == -1).all((1, 2, 3))
    assert within(int(at_night.sum()), len(y), 0.13)
    uniform = ~at_night & (y == y[:, :1, :1, :1]).all((1, 2, 3))
    assert within(int((~uniform & ~at_night).sum()), len(y), 0.15), "another color, mostly with a slope"
    tone = y[uniform][:, 0, 0, 0]
    gamma = tone[(tone > 0) & (tone < 1)].log() / math.log(before)  # but for slopes all black or white
    changed = (gamma - 1).abs() > 1e-4
    assert within(int(changed.sum()), len(gamma), 0.4) and abs(float(gamma[changed].log().mean()) - 0.15) < 0.06
    assert gamma.min() > math.exp(-0.4) - 1e-3 and gamma.max() < math.exp(0.7) + 1e-3


def test_a_night_scene_is_dark_with_white_lamps_or_stars():
    y = data.night(torch.full((64, 3, 64, 64), 0.6), generator(0))
    assert y.min() >= 0 and y.max() == 1, "in range, and lamps are white"
    sky = data.night(torch.zeros(400, 3, 32, 32), generator(0)).amax(1)
    around = torch.nn.functional.max_pool2d(sky, 3, 1, 1)
    stars = [s[(s == a) & (s > 0.01)] for s, a in zip(sky, around)]
    small = torch.tensor([bool((s > 0).sum() <= 1.5 * len(p)) for s, p in zip(sky, stars) if len(p)])
    assert 0.3 < small.float().mean() < 0.7, "in half of the scenes a light is one pixel"
    assert any(p.min() < 0.1 and p.max() > 0.7 for p in stars if len(p) > 5), "bright and faint ones together"
    dark = (y.mean(1) < 0.1).float().mean((1, 2))
    assert dark.mean() > 0.5 and float((y.amax((1, 2, 3)) > 0.99).float().mean()) > 0.5, (
        "most of it dark, lamps in most"
    )


@pytest.mark.parametrize(
    "x, y", [("input", "target"), ("LQ", "GT"), ("Hazy", "clear"), ("noisy", "clean"), ("in", "out")]
)
def test_a_folder_of_pairs_is_no_folder_of_clean_photos(tmp_path, x, y):
    inputs, targets = pairs_on_disk(tmp_path / "scene", "1.png", x=x, y=y)
    for make in (Images, lambda folder: Degraded(folder, "cdd11")):
        for folder in (tmp_path / "scene", tmp_path):
            with pytest.raises(InputError, match="holds pairs, not only clean photos: pass --pairs ") as e:
                make(folder)
            assert f"--pairs {str(inputs)!r} {str(targets)!r}" in str(e.value)
    assert is_half(*Pairs(inputs, targets)[0]) and len(Images(targets)) == 1, "the advice works"


def test_all_bad_photos_are_named_and_can_be_left_out(tmp_path):
    write(tmp_path / "good.png", photo(0))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    tifffile.imwrite(tmp_path / "bright.tif", np.full((9, 9, 3), 7, np.float32), photometric="rgb")
    for source in (tmp_path, sorted(tmp_path.iterdir())):
        with pytest.raises(InputError, match="3 photos or pairs cannot be used: .*--skip-bad") as e:
            Images(source)
        assert all(str(tmp_path / name) in str(e.value) for name in ("cut.png", "text.jpg", "bright.tif"))
        images = Images(source, skip_bad=True)
        assert len(images) == 1 and len(images.left_out) == 3
    with pytest.raises(InputError, match="2000 photos .* and 1995 more: mend them") as e:
        Images([tmp_path / "text.jpg"] * 2000)
    assert len(str(e.value)) < 2000
    (tmp_path / "good.png").unlink()
    cases = (
        (tmp_path, "no photos for images: .*text.jpg"),
        (tmp_path / "none", "no folder"),
        ([], "the list is empty"),
    )
    for source, message in cases:
        with pytest.raises(InputError, match=message):
            Images(source, skip_bad=True)


def test_pairs_for_a_column_are_checked_and_what_was_given_is_remembered(tmp_path):
    inputs, targets = pairs_on_disk(tmp_path, "1.png", "2.png", "3.png")
    pairs = {"Rain100L": [(inputs / f"{i}.png", targets / f"{i}.png") for i in (1, 2, 3)], "SOTS": []}
    images = Images([photo(0)], pairs=pairs)
    names = images.names()
    for suite in ("five_task", "cdd11"):
        x, y, columns = batch(images, 0, suite=suite, crop_size=16, batch_size=20)
        assert [is_half(a, b) for a, b in zip(x, y)] == [column == "Rain100L" for column in columns]
        assert {*columns} <= {*COLUMNS[suite]}
    write(inputs / "2.png", photo(0, 8, 9))
    with pytest.raises(InputError, match="2.png' has 9 x 8 pixels, .*2.png' has 50 x 40 pixels.*--skip-bad"):
        Images([photo(0)], pairs=pairs)
    images = Images([photo(0)], pairs=pairs, skip_bad=True)
    assert len(images.pairs["Rain100L"]) == 2 and len(images.left_out) == 1
    assert images.names() == names, "so that a training can go on without a pair that has become bad"
    with pytest.raises(InputError, match="no photos for GoPro: .*2.png"):
        Images([photo(0)], pairs={"GoPro": pairs["Rain100L"][1:2]}, skip_bad=True)


def test_names_tell_images_apart(tmp_path):
    write(tmp_path / "a.png", photo(0))
    assert Images([photo(0)]).names() == Images([photo(0)]).names() != Images([photo(1)]).names()
    assert Images(tmp_path).names() == [f"a.png, {(tmp_path / 'a.png').stat().st_size} bytes"]
    assert Images(leaves=1).names() == Images(leaves=1).names() != Images(leaves=1, seed=1).names()


def test_the_cache_keeps_what_fits_and_stays_behind(tmp_path):
    _, folder = pairs_on_disk(tmp_path, "0.png", "1.png", "2.png")
    images = Images(folder, cache=13_000)
    for i in (0, 1, 2, 0):
        images.crop(16, generator(0), i)
    assert [path.name for path in images.kept] == ["0.png", "1.png"]
    copy = pickle.loads(pickle.dumps(images))
    assert not copy.kept and torch.equal(copy.crop(16, generator(1), 2)[0], images.crop(16, generator(1), 2)[0])


PARTNERS = [  # input, its target
    ("1.png", "1.jpg"),
    ("rain-1.png", "norain-1.png"),
    ("0_rain.png", "0_clean.png"),
    ("0001_0.8_0.2.jpg", "0001.png"),
    ("im_0001_s80_a04.png", "im_0001.png"),
    ("part1/0001_0.8.png", "0001.png"),
    ("part3/0001_0.8.png", "clear_images/0001.png"),
    ("S1/7.png", "S1/7.png"),
    ("IMG_1.JPG", "img_1.png"),
    ("\u00c4rger 1.PNG", "A\u0308rger 1.png"),  # as macOS writes it
]


@pytest.mark.parametrize("x, y", PARTNERS)
def test_partners_are_found_by_name(tmp_path, x, y):
    for name in (x, x.replace("1", "2").replace("0_r", "3_r")):
        write(tmp_path / "x" / name, photo(0))
    for name in (y, y.replace("1", "2").replace("0_c", "3_c")):
        write(tmp_path / "y" / name, photo(0))
    found = dict(Pairs(tmp_path / "x", tmp_path / "y").items)
    assert found[tmp_path / "x" / x] == tmp_path / "y" / y and len({*found.values()}) == 2


def test_scenes_with_the_same_names_are_not_mixed_up(tmp_path):
    for name in ("x/S1/7.png", "x/S2/7.png", "y/S1/7.png", "y/S2/7.png", "x/S1/8.png", "y/S2/8.png"):
        write(tmp_path / name, photo(0))
    x, y = tmp_path / "x", tmp_path / "y"
    with pytest.raises(InputError, match="1 photos .*: '[^']*x/S1/8.png' has no targets of its name"):
        Pairs(x, y)
    assert len(Pairs(x, y / "S2")) == 3, "but one flat folder of targets serves all"
    paths = [sorted(half.rglob("7.png")) for half in (x, y)]
    assert Pairs([paths[0][0]], [str(paths[1][0])]).items == [(paths[0][0], paths[1][0])]
    wrong = ((*paths, "has 2 targets of its name"), (tmp_path, y, "is among inputs and targets"), ([], [], "are empty"))
    for inputs, targets, message in wrong:
        with pytest.raises(InputError, match=message):
            Pairs(inputs, targets)
    write(y / "S2" / "7_1.png", photo(0))
    write(x / "S2" / "7_1.png", photo(0))
    assert dict(Pairs(x, y, skip_bad=True).items)[x / "S2" / "7_1.png"] == y / "S2" / "7_1.png"
    (y / "S2" / "7_1.png").unlink()
    assert x / "S2" / "7_1.png" not in dict(Pairs(x, y, skip_bad=True).items), "7.png has an input of its own"
    (x / "S2" / "7_1.png").unlink()
    for name in ("c/A.png", "d/a.png", "d/a.jpg"):
        write(tmp_path / name, photo(0))
    with pytest.raises(InputError, match="has 2 targets of its name"):
        Pairs(tmp_path / "c", tmp_path / "d")
    for name in ("a/S1/blur/1.png", "a/S2/blur/1.png", "b/S1/sharp/1.png"):
        write(tmp_path / name, photo(0))
    with pytest.raises(InputError, match="has no targets of its name"):  # of a copy that is not whole
        Pairs(tmp_path / "a", tmp_path / "b")
    (y / "S1" / "7.png").unlink()
    with pytest.raises(InputError, match="2 photos .*x/S1/7.png' has no .*x/S1/8.png' has no"):
        Pairs(x, y)


def test_all_bad_pairs_are_named_before_anything_and_can_be_left_out(tmp_path):
    x, y = pairs_on_disk(tmp_path, "ok.png", "cut.png", "cut target.png", "size.png", "lonely.png")
    for path in (x / "cut.png", y / "cut target.png"):
        path.write_bytes(path.read_bytes()[:2000])
    write(x / "size.png", photo(0, 20, 20))
    (y / "lonely.png").unlink()
    write(y / "spare.png", photo(0))  # a target that nobody needs is no fault
    with pytest.raises(InputError, match="4 photos or pairs cannot be used: .*--skip-bad") as e:
        Pairs(x, y)
    for path in (x / "cut.png", y / "cut target.png", x / "size.png", x / "lonely.png"):
        assert repr(str(path)) in str(e.value)
    pairs = Pairs(x, y, skip_bad=True)
    assert len(pairs) == 1 and len(pairs.left_out) == 4 and is_half(*pairs[0])


def test_items_follow_from_seed_epoch_and_place(tmp_path):
    folders, images = pairs_on_disk(tmp_path, "1.png", "2.png"), Images([photo(i) for i in range(2)])
    x, y = Pairs(*folders)[1]
    assert torch.equal(y, to_tensor(photo(1))[0]) and is_half(x, y), "whole images"
    makers = (lambda seed: Pairs(*folders, 16, seed=seed), lambda seed: Degraded(images, "cdd11", 16, seed=seed))
    for make in makers:
        one, other = make(0), make(0)
        forward, backward = list(one), [other[-1], other[0]][::-1]
        assert len(one) == len(forward) == 2 and all(t.shape == (3, 16, 16) for item in forward for t in item)
        assert all(torch.equal(a, b) for xy, uv in zip(forward, backward) for a, b in zip(xy, uv))
        assert not torch.equal(forward[0][0], make(1)[0][0])
        other.set_epoch(5)
        assert not any(torch.equal(x, u) for (x, _), (u, _) in zip(forward, other))
    flat = Degraded([np.full((20, 20, 3), 40 * i, np.uint8) for i in range(6)], "three_task", 16)
    assert [round(float(y.mean() * 255)) for _, y in flat] == [0, 40, 80, 120, 160, 200], "item i is a crop of image i"
    with pytest.raises(InputError, match="unknown suite 'fog'"):
        Degraded(images, "fog")


@pytest.mark.parametrize("method", torch.multiprocessing.get_all_start_methods())
def test_workers_see_what_the_main_process_sees(tmp_path, method):
    folders = pairs_on_disk(tmp_path, "1.png", "2.png")
    parts = [Pairs(*folders, 16), Degraded(folders[1], "mixed", 16), Degraded([photo(3)], "everyday", 16)]
    for part in parts:
        part.set_epoch(3)
    together = ConcatDataset(parts)
    loader = DataLoader(together, batch_size=2, num_workers=1, multiprocessing_context=method)
    for (x, y), (u, v) in zip(loader, DataLoader(together, batch_size=2), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_names_of_columns_mean_something_in_everyday_alone(monkeypatch):
    for name in ("noise", "mine"):  # a suite of one's own
        for table, value in ((SUITES, (noise, dict(sigma=1.0))), (COLUMNS, [name]), (SHARES, 1)):
            monkeypatch.setitem(table, f"suite of {name}", {name: value})
    images = Images([photo(i) for i in range(3)])
    first, second = (batch(images, 0, suite=f"suite of {name}", batch_size=16, mild=0.5) for name in ("noise", "mine"))
    assert torch.equal(first[1], second[1]) and torch.equal(first[0], second[0])
