"""Images to learn from: embedded, own, in pairs; batches and data sets that follow from their seed alone."""

import math
import pickle

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import ConcatDataset, DataLoader

from sipl_min import InputError, data, degrade
from sipl_min.data import Degraded, Images, Pairs, batch
from sipl_min.degrade import COLUMNS, SHARES, generator
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


# ------------------------------------------------------------------------------------------ embedded images
def test_held_out_photos_are_never_trained_on():
    held = data.held_out()
    assert len(held) >= 3 and "chelsea" in held
    assert all(p.ndim == 3 and p.shape[2] == 3 and p.dtype == np.uint8 for p in held.values())
    assert not set(data.HELD_OUT.values()) & set(data.TRAINING)
    training = [to_tensor(read(data.installed(n))) for n in data.TRAINING]
    for one in held.values():
        for other in training:
            if other.shape[-2:] == one.shape[:2]:
                assert (to_tensor(one) - other).abs().mean() > 0.05
    with pytest.raises(InputError, match="nothing.png is not inside the installed scikit-image"):
        data.installed("nothing.png")


def test_motorcycle_has_real_depth():
    d = data.motorcycle_distance()
    known = d[~d.isnan()]
    assert d.shape == (1, 500, 741) and known.min() >= 0 and known.max() <= 1 and known.std() > 0.1
    assert len(known) > 0.9 * d.numel()
    images = Images(leaves=1)
    [(i, depth)] = images.depths.items()
    assert images.sources[i].name == "motorcycle_left.png" and torch.equal(depth.isnan(), d.isnan())


def test_dead_leaves_cover_everything_and_have_all_scales():
    images = data.dead_leaves(4, 96, seed=0)
    assert images.shape == (4, 3, 96, 96) and images.dtype == torch.uint8
    assert torch.equal(images, data.dead_leaves(4, 96, seed=0))
    assert not torch.equal(images, data.dead_leaves(4, 96, seed=1))
    # a natural image's power falls like 1 / f^2: compare octaves of the spectrum
    power = torch.fft.fft2(images.float().mean(1) - 128).abs().square().mean(0)
    f = torch.fft.fftfreq(96) * 96
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt()
    octave = [power[(radius >= r) & (radius < 2 * r)].mean() for r in (3, 6, 12, 24)]
    slopes = [math.log2(a / b) for a, b in zip(octave, octave[1:])]
    assert 1.2 < np.mean(slopes) < 3.2, slopes


# --------------------------------------------------------------------------------------------------- batches
def test_batches_are_a_function_of_seed_and_step():
    images = Images(leaves=2)
    a = batch(images, 7, crop_size=32, batch_size=4, seed=1)
    batch(images, 8, crop_size=40, batch_size=3, seed=1)
    b = batch(Images(leaves=2), 7, crop_size=32, batch_size=4, seed=1)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
    assert a[0].shape == a[1].shape == (4, 3, 32, 32)
    for other in (dict(step=8, seed=1), dict(step=7, seed=2)):
        assert not torch.equal(a[1], batch(images, **other, crop_size=32, batch_size=4)[1])


def test_mild_crops_are_the_same_degradation_in_part():
    images, same = Images(leaves=2), dict(crop_size=32, batch_size=16, suite="five_task")
    x, y, columns = batch(images, 3, **same)
    weak, again, names = batch(images, 3, **same, mild=0.5)
    assert torch.equal(y, again) and columns == names
    share = ((weak - y) * (x - y)).sum((1, 2, 3)) / (x - y).square().sum((1, 2, 3))  # s, per crop
    assert torch.allclose(weak, y + share[:, None, None, None] * (x - y), atol=1e-5)
    assert 2 < (share < 0.999).sum() < 14 and ((share >= 0) & (share < 1.001)).all()


def test_a_crop_and_its_depth_turn_together():
    images, g = Images([np.zeros((40, 50, 3), np.uint8)]), generator(0)
    ramp = np.arange(40 * 50).reshape(1, 40, 50) % 251
    images.sources, images.depths = [ramp.repeat(3, 0).astype(np.uint8)], {0: torch.from_numpy(ramp).float()}
    for _ in range(20):
        image, depth = images.crop(24, g)
        assert torch.equal(image[0].float(), depth[0])


def test_small_images_are_mirrored_up_to_the_crop():
    assert batch(Images([photo(0, 5, 9)]), 0, crop_size=32, batch_size=2)[1].shape == (2, 3, 32, 32)


def within(count, total, share):
    """Whether a count out of a total is what this share gives, to four deviations."""
    return abs(count - total * share) < 4 * (total * share * (1 - share)) ** 0.5


def test_everyday_draws_by_its_shares_and_spares_what_is_sound(monkeypatch):
    compressed = []

    def jpeg(x, g):  # noted, not done
        compressed.append(len(x))
        return x

    monkeypatch.setattr(data, "jpeg", jpeg)
    monkeypatch.setattr(data, "degrade", lambda y, *_: torch.zeros_like(y))  # so that what is done in part shows
    count = 8000
    x, y, columns = batch(
        Images([np.full((9, 9, 3), 128, np.uint8)]), 0, suite="everyday", crop_size=8, batch_size=count
    )
    total = sum(SHARES["everyday"].values())
    for column, share in SHARES["everyday"].items():
        assert within(columns.count(column), count, share / total), column
    others = sum(column not in ("clean", "jpeg") for column in columns)
    assert within(sum(compressed), others, 0.15), "JPEG afterwards"

    as_it_is = torch.tensor([column in ("clean", "jpeg", "noise", "camera") for column in columns])
    in_part = x.amax((1, 2, 3)) > 0
    assert not in_part[as_it_is].any() and within(int(in_part.sum()), int((~as_it_is).sum()), 0.15)

    before = 128 / 255
    assert (y[~as_it_is] == before).all(), "their target is the photo"
    y = y[as_it_is]
    uniform = (y == y[:, :1, :1, :1]).all((1, 2, 3))
    assert within(int((~uniform).sum()), len(y), 0.08), "another color, mostly with a slope"
    gray = y[uniform][:, 0, 0, 0]
    gamma = gray[(gray > 0) & (gray < 1)].log() / math.log(before)  # but for slopes all black or white
    changed = (gamma - 1).abs() > 1e-4
    assert within(int(changed.sum()), len(gamma), 0.4)
    assert gamma.min() > math.exp(-0.4) - 1e-3 and gamma.max() < math.exp(1.4) + 1e-3
    assert abs(float(gamma[changed].log().mean()) - 0.5) < 0.03, "log gamma is uniform"


def test_everyday_degrades_for_real():
    x, y, columns = batch(Images(leaves=2), 0, suite="everyday", crop_size=24, batch_size=60)
    assert x.min() >= 0 and x.max() <= 1 and x.isfinite().all() and y.isfinite().all()
    clean = torch.tensor([column == "clean" for column in columns])
    assert torch.equal(x[clean], y[clean]) and clean.any()
    assert ((x - y).abs().mean((1, 2, 3))[~clean] > 0).float().mean() > 0.9


# ---------------------------------------------------------------------------------------- photos of one's own
def test_a_folder_of_pairs_is_no_folder_of_clean_photos(tmp_path):
    for x, y in (("input", "target"), ("GT", "LQ"), ("scene/Hazy", "scene/clear"), ("a/b/noisy/1", "a/b/clean/1")):
        root = tmp_path / x.replace("/", "-")
        names = sorted((x, y), key=lambda name: name.rpartition("/")[2].lower() in data.TARGETS)
        pairs_on_disk(root, "1.png", x=names[0], y=names[1])
        for make in (Images, lambda folder: Degraded(folder, "cdd11")):
            with pytest.raises(InputError, match="holds pairs, not only clean photos: pass --pairs '") as e:
                make(root)
        x, y = str(e.value).split("--pairs '")[1].split("' (in")[0].split("' '")  # the advice works
        assert is_half(*Pairs(x, y)[0])
        assert len(Images(y)) == len(Images([photo(0)])) == 1
    write(tmp_path / "alone" / "input" / "1.png", photo(0))
    write(tmp_path / "alone" / "holiday" / "1.png", photo(0))
    assert len(Images(tmp_path / "alone")) == 2


def test_all_bad_photos_are_named_and_can_be_left_out(tmp_path):
    write(tmp_path / "good.png", photo(0))
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    tifffile.imwrite(tmp_path / "bright.tif", np.full((9, 9, 3), 7, np.float32), photometric="rgb")
    listed = sorted(tmp_path.iterdir())
    for source in (tmp_path, listed, [str(p) for p in listed]):
        with pytest.raises(InputError, match="3 of 4 cannot be used: .*--skip-bad") as e:
            Images(source)
        assert all(str(tmp_path / name) in str(e.value) for name in ("cut.png", "text.jpg", "bright.tif"))
        assert "\n" not in str(e.value)
        images = Images(source, skip_bad=True)
        assert len(images) == 1 and len(images.left_out) == 3
        assert batch(images, 0, crop_size=16, batch_size=2)[0].shape == (2, 3, 16, 16)
    (tmp_path / "good.png").unlink()
    with pytest.raises(InputError, match="3 of 3 cannot be used: .*: mend them$"):  # there is nothing to leave in
        Images(tmp_path, skip_bad=True)
    for source, message in ((tmp_path / "none", "no folder"), ([], "no images given"), (["none.png"], "none.png")):
        with pytest.raises(InputError, match=message):
            Images(source)


def test_pairs_for_a_column_are_checked_and_what_was_given_is_remembered(tmp_path):
    inputs, targets = pairs_on_disk(tmp_path, "1.png", "2.png", "3.png")
    pairs = {"Rain100L": [(inputs / f"{i}.png", targets / f"{i}.png") for i in (1, 2, 3)]}
    images = Images([photo(0)], pairs=pairs)
    names = images.names()
    x, y, columns = batch(images, 0, suite="five_task", crop_size=16, batch_size=20)
    assert [is_half(a, b) for a, b in zip(x, y)] == [column == "Rain100L" for column in columns]
    write(inputs / "2.png", photo(0, 8, 9))
    with pytest.raises(InputError, match="2.png' has 9 x 8 pixels, .*2.png' has 50 x 40 pixels.*--skip-bad"):
        Images([photo(0)], pairs=pairs)
    images = Images([photo(0)], pairs=pairs, skip_bad=True)
    assert len(images.pairs["Rain100L"]) == 2 and len(images.left_out) == 1
    assert images.names() == names, "so that a training can go on without a pair that has become bad"
    with pytest.raises(InputError, match="no pair of GoPro can be used: .*2.png"):
        Images([photo(0)], pairs=pairs | {"GoPro": pairs["Rain100L"][1:2]}, skip_bad=True)


def test_names_tell_images_apart(tmp_path):
    write(tmp_path / "a.png", photo(0))
    first, second = Images([photo(0)]).names(), Images([photo(1)]).names()
    assert first == Images([photo(0)]).names() != second
    assert Images(tmp_path).names() == [f"a.png, {(tmp_path / 'a.png').stat().st_size} bytes"]
    assert Images(leaves=1).names() == Images(leaves=1).names() != Images(leaves=1, seed=1).names()


def test_the_cache_keeps_what_fits_and_stays_behind(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.png", photo(i))
    images, g = Images(tmp_path, cache=13_000), generator(0)
    for i in (0, 1, 2, 0):
        images.crop(16, g, i)
    assert [path.name for path in images.kept] == ["0.png", "1.png"] and images.cache == 1000
    copy = pickle.loads(pickle.dumps(images))
    assert not copy.kept and copy.cache == 13_000
    assert torch.equal(copy.crop(16, generator(1), 2)[0], images.crop(16, generator(1), 2)[0])


# --------------------------------------------------------------------------------------------------- pairs
@pytest.mark.parametrize(
    "x, y",
    [
        ("1.png", "1.jpg"),
        ("rain-1.png", "norain-1.png"),
        ("0_rain.png", "0_clean.png"),
        ("0001_0.8_0.2.jpg", "0001.png"),
        ("im_0001_s80_a04.png", "im_0001.png"),
        ("part1/0001_0.8.png", "0001.png"),
        ("part3/0001_0.8.png", "clear_images/0001.png"),
        ("S1/7.png", "S1/7.png"),
    ],
)
def test_partners_are_found_by_name(tmp_path, x, y):
    for name in (x, x.replace("1", "2").replace("0_r", "3_r")):
        write(tmp_path / "x" / name, photo(0))
    for name in (y, y.replace("1", "2").replace("0_c", "3_c")):
        write(tmp_path / "y" / name, photo(0))
    found = Pairs(tmp_path / "x", tmp_path / "y").pairs
    assert len(found) == 2 and (tmp_path / "x" / x, tmp_path / "y" / y) in found
    assert len({target for _, target in found}) == 2


def test_scenes_with_the_same_names_are_not_mixed_up(tmp_path):
    for name in ("x/S1/7.png", "x/S2/7.png", "y/S1/7.png", "y/S2/7.png", "x/S1/8.png", "y/S2/8.png"):
        write(tmp_path / name, photo(0))
    with pytest.raises(InputError, match="1 of 3 cannot be used: '[^']*x/S1/8.png' has no targets of its name"):
        Pairs(tmp_path / "x", tmp_path / "y")
    (tmp_path / "y" / "S1" / "7.png").rename(tmp_path / "y" / "S2" / "9.png")
    (tmp_path / "y" / "S1").rmdir()
    with pytest.raises(InputError, match="2 of 3 cannot be used: '[^']*x/S1/7.png' .* '[^']*x/S1/8.png' has no"):
        Pairs(tmp_path / "x", tmp_path / "y")
    write(tmp_path / "x" / "7.png", photo(0))  # but one flat folder of targets serves all
    assert len(Pairs(tmp_path / "x", tmp_path / "y" / "S2")) == 4
    write(tmp_path / "y" / "S1" / "7.png", photo(0))
    (tmp_path / "x" / "7.png").unlink()
    paths = [sorted((tmp_path / half).rglob("7.png")) for half in "xy"]
    with pytest.raises(InputError, match="has 2 targets of its name.*has 2 targets"):  # lists tell nothing of scenes
        Pairs(*paths)
    assert Pairs([paths[0][0]], [str(paths[1][0])]).pairs == [(paths[0][0], paths[1][0])]
    with pytest.raises(InputError, match="is among inputs and targets: name two folders, neither inside the other"):
        Pairs(tmp_path, tmp_path / "y")
    with pytest.raises(InputError, match="no pairs given"):
        Pairs([], [])


def test_all_bad_pairs_are_named_before_anything_and_can_be_left_out(tmp_path):
    x, y = pairs_on_disk(tmp_path, "ok.png", "cut.png", "cut target.png", "size.png", "lonely.png", "text.png")
    for path in (x / "cut.png", y / "cut target.png"):
        path.write_bytes(path.read_bytes()[:2000])
    write(x / "size.png", photo(0, 20, 20))
    (x / "text.png").write_text("no image")
    (y / "lonely.png").unlink()
    write(y / "spare.png", photo(0))  # a target that nobody needs is no fault
    with pytest.raises(InputError, match="5 of 6 cannot be used: ") as e:
        Pairs(x, y)
    for path in (x / "cut.png", y / "cut target.png", x / "size.png", x / "lonely.png", x / "text.png"):
        assert repr(str(path)) in str(e.value)
    assert "--skip-bad" in str(e.value) and "\n" not in str(e.value)
    pairs = Pairs(x, y, skip_bad=True)
    assert len(pairs) == 1 and len(pairs.left_out) == 5 and is_half(*pairs[0])
    assert pairs[-1][0].shape == (3, 40, 50) and len(list(pairs)) == 1


def test_pairs_are_whole_or_cropped_alike(tmp_path):
    x, y = pairs_on_disk(tmp_path, "1.png", "2.png")
    whole = Pairs(x, y)
    assert torch.equal(whole[1][0], to_tensor(photo(1) // 2)[0]) and torch.equal(whole[1][1], to_tensor(photo(1))[0])
    crops = Pairs(x, y, crop_size=16, seed=3)
    assert all(a.shape == b.shape == (3, 16, 16) and is_half(a, b) for a, b in crops)
    first, again = crops[1][1], Pairs(x, y, crop_size=16, seed=3)
    assert torch.equal(first, again[1][1]) and not torch.equal(first, Pairs(x, y, crop_size=16, seed=4)[1][1])
    again.set_epoch(1)
    assert not torch.equal(first, again[1][1])
    again.set_epoch(0)
    assert torch.equal(first, again[1][1])


def test_degraded_crops_follow_from_seed_epoch_and_place():
    images = Images([photo(i) for i in range(4)])
    one, other = Degraded(images, "cdd11", crop_size=16), Degraded([photo(i) for i in range(4)], "cdd11", crop_size=16)
    assert len(one) == 4 and len(list(one)) == 4
    forward, backward = [one[i] for i in range(4)], [other[i] for i in (3, 2, 1, 0)][::-1]
    for (x, y), (u, v) in zip(forward, backward):
        assert x.shape == y.shape == (3, 16, 16) and torch.equal(x, u) and torch.equal(y, v)
        assert x.min() >= 0 and x.max() <= 1 and not torch.equal(x, y)
    other.set_epoch(5)
    assert not any(torch.equal(x, other[i][0]) for i, (x, _) in enumerate(forward))
    assert not torch.equal(forward[0][0], Degraded(images, "cdd11", 16, seed=1)[0][0])
    flat = Degraded([np.full((20, 20, 3), 40 * i, np.uint8) for i in range(6)], "three_task", 16)
    assert [round(float(y.mean() * 255)) for _, y in flat] == [0, 40, 80, 120, 160, 200], "item i is a crop of image i"
    seen = set()
    for epoch in range(30):
        flat.set_epoch(epoch)
        seen |= {float((x - y).abs().mean()) > 0 for x, y in flat}
    with pytest.raises(InputError, match="unknown suite 'fog'"):
        Degraded(images, "fog")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_see_what_the_main_process_sees(tmp_path, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this platform")
    x, y = pairs_on_disk(tmp_path, "1.png", "2.png")
    write(tmp_path / "clean" / "a.png", photo(7))
    parts = [Pairs(x, y, crop_size=16), Degraded(tmp_path / "clean", "mixed", 16), Degraded([photo(3)], "everyday", 16)]
    together, options = ConcatDataset(parts), dict(multiprocessing_context=method, persistent_workers=True)
    loader = DataLoader(together, batch_size=2, num_workers=1, **options)
    for epoch in (0, 1):  # the worker lives on, and is told the epoch
        for part in parts:
            part.set_epoch(epoch)
        expected = list(DataLoader(together, batch_size=2))
        for (a, b), (u, v) in zip(loader, expected, strict=True):
            assert torch.equal(a, u) and torch.equal(b, v)
    del loader


def test_columns_on_disk_of_another_suite_are_not_used(tmp_path):
    inputs, targets = pairs_on_disk(tmp_path, "1.png")
    images = Images([photo(0)], pairs={"LOLv1": [(inputs / "1.png", targets / "1.png")], "GoPro": []})
    assert {*images.pairs} == {"LOLv1"}
    x, y, columns = batch(images, 0, suite="three_task", crop_size=16, batch_size=8)
    assert not any(is_half(a, b) for a, b in zip(x, y)) and {*columns} <= {*COLUMNS["three_task"]}
    assert degrade.SHARES["three_task"] == dict.fromkeys(COLUMNS["three_task"], 1)
