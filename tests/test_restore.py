"""Large images: layers in tiles give the same numbers, windows give an image without seams, batches what each gives."""

import numpy as np
import pytest
import torch
from conftest import Largest, tiny

from sipl_min import SIPL, InputError, restore, speed, tiles


def ramp(h, w):
    """A smooth photo: brightness rises to the right and falls downwards."""
    y, x = np.mgrid[:h, :w]
    return np.stack([0.2 + 0.6 * x / w, 0.8 - 0.6 * y / h, 0.5 + 0.2 * (x / w - y / h)], 2).astype(np.float32)


# ------------------------------------------------------------------------------------------ tiles of a layer


@pytest.mark.parametrize("h, w", [(33, 40), (100, 67), (64, 1)])
def test_tiles_cover_the_image_once(h, w, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 32 * 32 * 5)
    x, seen = torch.rand(2, 3, h, w), torch.zeros(2, 3, h, w)
    with torch.no_grad():
        for place, tile, inner in tiles.tiles(x, 5, halo=2):
            assert torch.equal(tile[inner], x[place])
            seen[place] += 1
        assert (seen == 1).all()
        blurred = tiles.local(lambda t: torch.nn.functional.avg_pool2d(t, 3, 1, 1), x, 5)
        over = tiles.local(lambda t: torch.nn.functional.avg_pool2d(t, 3, 1, 1), mine := x.clone(), 5, own=True)
    assert torch.allclose(blurred, torch.nn.functional.avg_pool2d(x, 3, 1, 1))
    assert torch.equal(over, blurred) and (over.data_ptr() == mine.data_ptr() or w == 1)  # over its source


@torch.no_grad()
def test_a_block_leaves_its_input_alone(monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 1)
    block, x = tiny().encoder.levels[0][0], torch.rand(1, 8, 70, 70)
    before = x.clone()
    y = block(x)
    assert torch.equal(x, before) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backbone", ["promptir", "adair"])
@torch.no_grad()
def test_tiles_change_nothing_but_rounding(backbone, monkeypatch):
    model, x = tiny(backbone=backbone, identity_start=backbone == "adair"), torch.rand(2, 3, 75, 100)
    whole = model.refine(x, 2, return_all=True)
    monkeypatch.setitem(tiles.TILE, "cpu", 1)  # tiles of 32 x 32
    cut = model.refine(x, 2, return_all=True)
    for a, b in zip(whole, cut):
        assert 0 < (a - b).abs().max() <= 3e-6 * a.abs().max()


@torch.no_grad()
def test_no_tensor_is_wider_than_it_must_be():
    """The widest layer of the preset makes 128 channels at full size; ours never has more than a tile of it."""
    model, x = SIPL("nano").eval(), torch.rand(1, 3, 256, 256)
    with Largest() as ours:
        y = model.refine(x, 1)
    with Largest() as released:
        z = speed.refine_naive(model, x, 1)[-1]
    assert released.elements == 128 * 256**2
    assert ours.elements <= 1.2 * tiles.TILE["cpu"]
    assert (y - z).abs().max() <= 3e-6 * z.abs().max()


# ------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    "length, window, overlap", [(100, 100, 8), (100, 16, 0), (101, 48, 16), (1000, 160, 64), (4000, 1056, 64)]
)
def test_windows_reach_every_pixel_and_share_the_overlap(length, window, overlap):
    found = restore.starts(length, window, overlap)
    assert found[0] == 0 and found[-1] == length - window
    assert all(0 < b - a <= window - overlap for a, b in zip(found, found[1:]))
    assert all(a % 16 == 0 for a in found[:-1]) and len({*found}) == len(found)


@pytest.mark.parametrize(
    "h, w, pixels", [(3000, 4000, 10**6), (100, 5000, 2**16), (5000, 20, 2**16), (600, 600, 10**5)]
)
def test_a_window_uses_the_room_there_is(h, w, pixels):
    rows, columns = restore.window_size(h, w, pixels)
    assert 0.9 * pixels <= rows * columns <= pixels
    assert rows <= h and columns <= w


def test_windows_of_a_network_that_sees_one_pixel_change_nothing():
    x = torch.rand(2, 3, 90, 150)
    y = restore.windows(lambda part: part * 2, x, (48, 64), overlap=16)
    assert torch.allclose(y, 2 * x, atol=1e-6)


def test_no_seams_in_a_smooth_image(model):
    """Where windows meet, the brightness jumps from pixel to pixel no more than it does without windows."""
    image = ramp(112, 208)
    whole, cut = (model.restore(image, tile=t, overlap=24) for t in (0, 80))
    assert np.abs(whole - cut).max() > 1e-4, "windows must matter for this test to mean anything"
    for axis in (0, 1):
        jumps = [np.abs(np.diff(a, axis=axis)).max(axis=(1 - axis, 2)) for a in (whole, cut)]
        assert jumps[1].max() <= jumps[0].max() + np.abs(whole - cut).max() / 24

    def hard(overlap):  # the check can see a seam: pasted without blending, the jump is there
        parts = [model.restore(image[:, a : a + 80]) for a in (0, 80)]
        joined = np.concatenate(parts, 1)
        return np.abs(np.diff(joined, axis=1)).max()

    assert hard(0) > np.abs(np.diff(cut, axis=1)).max()


def test_windows_follow_from_free_memory(model, monkeypatch):
    monkeypatch.setattr(restore, "free_memory", lambda device: 2 * 300 * 400 * restore.bytes_per_pixel(model))
    assert restore.choose_window(model, 1, 200, 200) == (200, 200)
    rows, columns = restore.choose_window(model, 1, 1000, 1000)
    assert 0.9 * 300 * 400 <= rows * columns <= 300 * 400
    assert rows * columns > 1.8 * np.prod(restore.choose_window(model, 2, 1000, 1000))
    monkeypatch.setattr(restore, "free_memory", lambda device: 0)  # nothing left: small windows, not none
    assert restore.choose_window(model, 1, 1000, 1000) == (144, 144)
    assert restore.choose_window(model, 1, 1000, 1000, tile=0) == (1000, 1000)
    for overlap in (0, 1, 4, 5, 15, 16):  # windows move on by 16 pixels at least
        rows, columns = restore.choose_window(model, 1, 200, 200, overlap=overlap)
        assert rows % 16 == columns % 16 == 0 and len(restore.starts(200, rows, overlap)) < 14


def test_free_memory_is_a_plausible_number():
    assert 2**20 < restore.free_memory("cpu") < 2**46


@pytest.mark.parametrize("options", [dict(tile=100), dict(tile=-16), dict(tile=16), dict(tile=64.0), dict(overlap=-1)])
def test_bad_windows_get_one_sentence(model, options, photo):
    with pytest.raises(InputError, match="must be"):
        model.restore(photo, **options)


# ------------------------------------------------------------------------------------------------- batches


def test_a_list_of_photos_is_one_batch(model, photo):
    gray, deep = photo[..., 0], photo.astype(np.uint16) * 257
    together = model.restore([photo, gray, deep])
    for one, image in zip(together, (photo, gray, deep)):
        alone = model.restore(image)
        assert one.shape == image.shape and one.dtype == image.dtype
        assert np.abs(one.astype(int) - alone.astype(int)).max() <= 1
    assert model.restore((photo,))[0].shape == photo.shape
    for photos in ([], [photo, photo[:-1]]):
        with pytest.raises(InputError, match="a batch needs photos of one size"):
            model.restore(photos)


# --------------------------------------------------------------------------------------------------- speed


@pytest.mark.parametrize("options", [dict(dtype=torch.bfloat16), dict(dtype=torch.int64), dict(device="meta")])
def test_tensors_that_are_no_photos(model, options):
    with pytest.raises(InputError, match="a photo must be uint8, uint16 or float"):
        model.restore(torch.zeros(8, 8, 3, **options))


def test_the_naive_path_is_put_away_again():
    forwards = [part.forward for part in speed.PARTS]
    with pytest.raises(RuntimeError), speed.naive():
        assert all(part.forward is not f for part, f in zip(speed.PARTS, forwards))
        raise RuntimeError
    assert [part.forward for part in speed.PARTS] == forwards, "put back, whatever happens"


def test_the_benchmark_measures_what_it_says(tmp_path):
    rows = list(speed.measure(["nano"], [16, 32], [1], repeats=1, device="cpu", progress=False))
    assert [(r["T"], r["size"]) for r in rows] == [(1, 16), (1, 32)]
    for r in rows:
        assert r["seconds"] > 0 and r["naive_seconds"] > 0 and r["difference"] < 1e-5
        assert r["faster"] == pytest.approx(r["naive_seconds"] / r["seconds"])
        assert r["bytes"] > 0 and r["naive_bytes"] > 0
    assert "16 |" in speed.line(rows[0]) and speed.line(rows[0]).count("|") == speed.HEAD.count("|")
    speed.draw(rows, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    squares = [dict(size=s, seconds=3.0 * s**2, bytes=5.0 * s**4) for s in (8, 16, 64)]
    assert speed.exponent(squares, "seconds") == pytest.approx(1) and speed.exponent(squares, "bytes") == pytest.approx(
        2
    )
    with pytest.raises(InputError, match="size=4 is too small"):
        next(speed.measure(["nano"], [4], [1]))
    with pytest.raises(InputError, match="unknown preset 'huge'"):
        next(speed.measure(["huge"], [16], [1]))
