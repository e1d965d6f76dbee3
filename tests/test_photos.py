"""Photos: read with all their bits, restored as the same kind, written with all that was there; or one sentence."""

import base64
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from conftest import tiny
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin

from sipl_min import InputError, evaluate, photos
from sipl_min.fast import FAST
from sipl_min.photos import find, from_tensor, read, restore_folder, to_tensor, write

EXIF, GPS = 0x8769, 0x8825
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TEN_BITS = """AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAAA
AAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAHwAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAA
BqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAGgAAAABdpcG1hAAA
AAAAAAAEAAQQBAoMEAAAAJ21kYXQSAAoIOAi/bwICBpAyERlCYwTAADQAAACQP5sMYJFg"""  # AVIF, 8 x 8 pixels


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def identity():
    model = tiny()
    torch.nn.init.zeros_(model.decoder.output.weight)
    return model


def refused(match, function, *arguments, **options):
    with pytest.raises(InputError, match=match) as e:
        function(*arguments, **options)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width, height, depth):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


# --------------------------------------------------------------------------------------------- every kind, all bits
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [(), (2,), (3,), (4,)])
def test_png_and_tiff_keep_everything_or_refuse(tmp_path, dtype, channels):
    image = noise(6, 9, *channels, dtype=np.uint16).astype(dtype)
    write(tmp_path / "a.tif", image)
    assert np.array_equal(read(tmp_path / "a.tif"), image) and read(tmp_path / "a.tif").dtype == dtype
    if dtype == np.uint8 or (dtype == np.uint16 and not channels):
        write(tmp_path / "a.png", image)
        assert np.array_equal(read(tmp_path / "a.png"), image) and read(tmp_path / "a.png").dtype == dtype
    else:
        refused(r"cannot hold .*: name a (16|32)-bit TIFF \(.tif\)", write, tmp_path / "b.png", image)
    if dtype != np.uint8 or channels in ((2,), (4,)):
        refused("cannot hold .* channels: name a", write, tmp_path / "b.jpg", image)
    assert not [*tmp_path.glob("*b.*")]


def test_bits_that_would_be_lost_are_refused(tmp_path):
    for name in ("8.jp2", "8.avif", "8.j2k"):
        Image.fromarray(noise(20, 30, 3)).save(tmp_path / name)
        assert read(tmp_path / name).shape == (20, 30, 3)
    content = bytearray((tmp_path / "8.jp2").read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 15  # announces 16 bits
    (tmp_path / "a.jp2").write_bytes(content)
    (tmp_path / "a.avif").write_bytes(base64.b64decode(TEN_BITS))
    (tmp_path / "a.png").write_bytes(png_header(30, 20, 16))
    Image.fromarray(noise(20, 60, 3)).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    with tifffile.TiffFile(tmp_path / "lzw.tif", mode="r+b") as f:  # the same bytes as half as many numbers
        f.pages[0].tags[256].overwrite(30)
        f.pages[0].tags[258].overwrite((16, 16, 16))
    for name in ("a.jp2", "a.avif", "a.png", "lzw.tif"):
        refused("more than 8 bits .* convert it to a plain 16-bit TIFF", read, tmp_path / name)
    Image.fromarray(noise(20, 30, dtype=np.uint16)).save(tmp_path / "gray.jp2")
    assert np.array_equal(read(tmp_path / "gray.jp2"), noise(20, 30, dtype=np.uint16))


def test_colors_survive_every_way_of_storing_them(tmp_path):
    red = Image.new("RGB", (20, 16), (255, 51, 0))  # a color of the web palette
    ways = [("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("P", "a.png"), ("YCbCr", "a.jpg"), ("P", "p.tif")]
    ways += [("RGB", f"{way}.tif") for way in ("tiff_lzw", "tiff_deflate", "jpeg")]
    for mode, name in ways:
        red.convert(mode).save(tmp_path / name, compression=name[:-4] if mode == "RGB" else None)
        image = read(tmp_path / name)
        assert image.shape == (16, 20, 3) and np.abs(image.astype(int) - (255, 51, 0)).max() < 8, (mode, name)
    red.convert("CMYK").save(tmp_path / "a.jpg", icc_profile=SRGB[:16] + b"CMYK" + SRGB[20:])
    write(tmp_path / "b.jpg", read(tmp_path / "a.jpg"), like=tmp_path / "a.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.mode == "RGB" and "icc_profile" not in image.info
    red.convert("1").save(tmp_path / "bits.tif")
    assert set(np.unique(read(tmp_path / "bits.tif"))) == {0, 255}
    Image.new("L", (20, 16), 76).save(tmp_path / "g.png", transparency=76)
    assert (read(tmp_path / "g.png")[..., 1] == 0).all()
    Image.new("P", (20, 16)).save(tmp_path / "p.png", transparency=0)
    assert read(tmp_path / "p.png").shape == (16, 20, 4)
    Image.fromarray(np.full((16, 20), 9400, np.uint16)).save(tmp_path / "clear.png", transparency=9400)
    refused("a color that stands for transparent is not read from 16 bits", read, tmp_path / "clear.png")


def test_kinds_of_tiff(tmp_path):
    deep = noise(18, 19, 3, dtype=np.uint16)
    for options in (dict(byteorder=">"), dict(bigtiff=True), dict(compression="zlib"), {}):
        tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb", **options)
        assert np.array_equal(read(tmp_path / "a.tif"), deep), options
    tifffile.imwrite(tmp_path / "white.tif", ~deep[..., 0], photometric="miniswhite")
    assert np.array_equal(read(tmp_path / "white.tif"), deep[..., 0])
    both, of = noise(6, 9, 2), dict(photometric="miniswhite", extrasamples=[2])
    tifffile.imwrite(tmp_path / "white.tif", both, **of, planarconfig="contig")
    assert np.array_equal(read(tmp_path / "white.tif"), np.stack([255 - both[..., 0], both[..., 1]], 2)), "alpha stays"
    tifffile.imwrite(tmp_path / "times.tif", noise(6, 9, 4), photometric="rgb", extrasamples=[1])
    refused("colors are multiplied by alpha", read, tmp_path / "times.tif")
    write(tmp_path / "none.tif", deep)
    Image.fromarray(noise(6, 9, 3)).save(tmp_path / "pillow.tif")
    for name in ("none.tif", "pillow.tif"):
        write(tmp_path / "copy.jpg", noise(6, 9, 3), like=tmp_path / name)
        with Image.open(tmp_path / "copy.jpg") as copy:
            assert "dpi" not in copy.info, "no resolution is invented"
    for planes in (noise(3, 18, 19), noise(3, 18, 19, dtype=np.uint16), noise(3, 18, 19).astype(np.float32) / 255):
        tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
        found = read(tmp_path / "planes.tif")
        assert found.dtype == planes.dtype and np.array_equal(found, planes.transpose(1, 2, 0)), (
            "all bits of all planes"
        )
    for gray, right in (
        (deep[..., 0], ~deep[..., 0]),
        (noise(18, 19), noise(18, 19)),
    ):  # Pillow inverts what has 8 bits
        Image.fromarray(gray).save(tmp_path / "white.tif", compression="tiff_lzw", tiffinfo={262: 0})
        assert np.array_equal(read(tmp_path / "white.tif"), right), "0 is white"
    write(tmp_path / "la.tif", noise(6, 9, 2))
    with Image.open(tmp_path / "la.tif") as image:
        assert image.mode == "LA", "alpha for other programs, too"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_kind_of_file_comes_upright(tmp_path, orientation):
    exif, tag = Image.Exif(), [(274, "H", 1, orientation, False)]
    exif[274] = orientation
    image, deep = noise(8, 12, 3), noise(8, 12, dtype=np.uint16)
    plain = {"a.png": image, "deep.png": deep, "a.jpg": image, "a.webp": image, "lzw.tif": image, "a.avif": image}
    for name, pixels in plain.items():
        options = dict(compression="tiff_lzw") if name == "lzw.tif" else {}
        Image.fromarray(pixels).save(tmp_path / name, **options)
        plain[name] = read(tmp_path / name)
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **options)
    for name, pixels in {"b.tif": noise(8, 12, 3, dtype=np.uint16), "f.tif": image.astype(np.float32)}.items():
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", extratags=tag, metadata=None)
        plain[name] = pixels
    places = np.arange(96).reshape(8, 12)
    places = places.T if orientation > 4 else places
    places = places[::-1] if orientation in (3, 4, 7, 8) else places
    places = places[:, ::-1] if orientation in (2, 3, 6, 7) else places
    for name, pixels in plain.items():
        assert np.array_equal(read(tmp_path / name), pixels.reshape(96, *pixels.shape[2:])[places]), name


# ------------------------------------------------------------------------------------------- what is no photo to take
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_bad_files_get_one_sentence_and_bad_metadata_costs_no_photo(tmp_path, photo, ending):
    write(tmp_path / f"good.{ending}", np.tile(photo, (2, 2, 1)))
    content = (tmp_path / f"good.{ending}").read_bytes()
    for part in (b"", content[:10], content[: len(content) // 2], b"this is no image"):
        (tmp_path / f"bad.{ending}").write_bytes(part)
        refused(f"cannot read '.*bad.{ending}' as a photo: .", read, tmp_path / f"bad.{ending}")
    refused("no file '.*nowhere", read, tmp_path / f"nowhere.{ending}")
    Image.fromarray(photo).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    for exif in (b"II*\x00\x08\x00\x00\x00\x05\x00\x12\x01", b"garbage and garbage"):  # cut short, and none at all
        exif = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
        (tmp_path / "a.jpg").write_bytes(content[:2] + exif + content[2:])
        write(tmp_path / f"c.{ending}", read(tmp_path / "a.jpg"), like=tmp_path / "a.jpg")
        assert read(tmp_path / f"c.{ending}").shape == photo.shape
    text = PngImagePlugin.PngInfo()
    for key in ("dpi", "icc_profile", "comment", "gamma", "Raw profile type exif"):
        text.add_text(key, "not what Pillow means by it")
    text.add(b"gAMA", struct.pack(">I", 45455))
    Image.fromarray(photo).save(tmp_path / "d.png", pnginfo=text)
    write(tmp_path / f"e.{ending}", photo, like=tmp_path / "d.png")


def test_one_limit_on_pixels_before_decoding(tmp_path, monkeypatch):
    for depth in (8, 16):
        (tmp_path / "a.png").write_bytes(png_header(15000, 14000, depth))
        refused("its 210.0 million pixels are above the limit of 200.0 million, raise it", read, tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit does not stand in the way
    for name in ("b.png", "b.tif", "b.jpg", "b.webp", "b.bmp"):
        write(tmp_path / name, noise(30, 40, 3))
        assert read(tmp_path / name).shape == read(tmp_path / name, 1200).shape == (30, 40, 3)
        refused("million pixels", read, tmp_path / name, max_pixels=1199)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_animations_and_pages_are_refused(tmp_path):
    frames = [Image.fromarray(noise(20, 30, 3, seed=i)) for i in range(3)]
    for name in ("a.gif", "a.png", "a.webp", "a.avif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        refused(r"it is an animation or has several pages \(3\), take it apart", read, tmp_path / name)
        frames[0].save(tmp_path / name, save_all=True)
        assert read(tmp_path / name).shape == (20, 30, 3), name
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])  # as a camera's previews
    assert read(tmp_path / "a.jpg").shape == (20, 30, 3)
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as f:
        f.write(noise(20, 30, 3), photometric="rgb", metadata=None)
        f.write(noise(5, 8, 3), photometric="rgb", metadata=None, subfiletype=1)
    assert np.array_equal(read(tmp_path / "thumbnail.tif"), noise(20, 30, 3))
    with tifffile.TiffWriter(tmp_path / "before.tif") as f:
        f.write(noise(5, 8, 3), photometric="rgb", metadata=None, subfiletype=1)
        f.write(noise(20, 30, 3), photometric="rgb", metadata=None)
    assert np.array_equal(read(tmp_path / "before.tif"), noise(20, 30, 3))
    with tifffile.TiffWriter(tmp_path / "planes.tif") as f:
        f.write(noise(5, 8, 3), photometric="rgb", metadata=None, subfiletype=1)
        f.write(noise(20, 30, 4), photometric="separated", metadata=None)  # CMYK, which Pillow reads
    refused("its first page is a thumbnail", read, tmp_path / "planes.tif")
    tifffile.imwrite(tmp_path / "cmyk.tif", noise(20, 30, 4, dtype=np.uint16), photometric="separated")
    refused("more than 8 bits a channel are not read here, convert it", read, tmp_path / "cmyk.tif")


def test_a_photo_with_a_strange_tag_comes_upright(tmp_path):
    strange = struct.pack("<HHI4sHHI4sI", 0x0112, 3, 1, b"\6\0\0\0", 0x0100, 2, 4, b"300\0", 0)  # a width that is text
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + strange
    Image.fromarray(noise(20, 32, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path / "a.jpg").shape == (32, 20, 3)


# ------------------------------------------------------------------------------------- what else is in a file stays
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "deep.png", "a.webp", "a.tif", "deep.tif"])
def test_profile_exif_and_resolution_are_carried_through(tmp_path, name):
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif.update({271: "Camera", 274: 6})
    exif.get_ifd(EXIF)[33434] = 0.25  # seconds of exposure
    exif.get_ifd(GPS)[1] = "N"
    text.add_text("Title", "a title")
    text.add_itxt("Author", "Ünïcode")
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    carried = dict(exif=exif, dpi=(300, 300), icc_profile=SRGB, pnginfo=text)
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "8.png", **carried)
    image = noise(20, 30, dtype=np.uint16) if "deep" in name else noise(20, 30, 3)
    write(tmp_path / name, image, like=tmp_path / "8.png")
    again = tmp_path / f"again {name}"
    write(again, read(tmp_path / name), like=tmp_path / name)  # from each kind into the same kind
    with Image.open(again) as copy:
        copy.load()
        found = copy.getexif()
        assert copy.info["icc_profile"] == SRGB and found.get(274, 1) == 1
        if not name.endswith("tif"):
            assert found[271] == "Camera" and found.get_ifd(EXIF)[33434] == 0.25 and found.get_ifd(GPS)[1] == "N"
        if not name.endswith("webp"):  # which has no resolution
            assert copy.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        if name.endswith("png"):
            assert copy.text["Title"] == "a title" and copy.text["Author"] == "Ünïcode"
            assert (
                b"<x:xmpmeta/>" in copy.info["xmp"].encode() if isinstance(copy.info["xmp"], str) else copy.info["xmp"]
            )


@pytest.mark.parametrize("quality, subsampling", [(30, 0), (92, 1), (92, 2), (95, 0)])
def test_jpeg_keeps_quality_and_subsampling(tmp_path, quality, subsampling, photo):
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=quality, subsampling=subsampling)
    like = None if quality == 95 else tmp_path / "a.jpg"  # which is what a photo without an original gets
    write(tmp_path / "b.jpg", photo, like)
    with Image.open(tmp_path / "a.jpg") as a, Image.open(tmp_path / "b.jpg") as b:
        assert a.quantization == b.quantization and JpegImagePlugin.get_sampling(b) == subsampling
    write(tmp_path / "c.webp", photo, like=tmp_path / "a.jpg")  # tables are of use to JPEG alone
    write(tmp_path / "gray.jpg", photo[..., 0], like=tmp_path / "a.jpg")
    assert read(tmp_path / "gray.jpg").shape == photo.shape[:2]


@pytest.mark.parametrize("profile", [None, SRGB])  # with a profile, the pixels are not in the first part of the file
@pytest.mark.parametrize("lossless", [True, False])
def test_lossless_webp_stays_lossless(tmp_path, profile, lossless):
    Image.fromarray(noise(16, 16, 3)).save(tmp_path / "a.webp", lossless=lossless, icc_profile=profile)
    write(tmp_path / "b.webp", noise(16, 16, 4), like=tmp_path / "a.webp")
    assert np.array_equal(read(tmp_path / "b.webp"), noise(16, 16, 4)) == lossless


# ------------------------------------------------------------------------------------------------ photos in memory
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.float16, np.float64])
def test_any_photo_comes_back_as_the_same_kind(dtype):
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    model, same = tiny(dim=4), identity()
    for channels in ((), (1,), (2,), (3,), (4,)):
        photo = np.asfortranarray((np.random.default_rng(0).random((9, 26, *channels)) * top).astype(dtype))[::-1, ::2]
        photo.flags.writeable = False
        y = model.restore(photo, 0)
        assert y.dtype == photo.dtype and y.shape == photo.shape and 0 <= y.min() <= y.max() <= top
        assert channels not in ((2,), (4,)) or np.array_equal(y[..., -1], photo[..., -1]), "alpha must pass untouched"
        if photo.dtype.kind == "u":
            assert np.array_equal(same.restore(photo, 0), photo)
            assert np.array_equal(from_tensor(to_tensor(photo), photo), photo)


def test_tensors_and_paths(model, photo, tmp_path):
    write(tmp_path / "a.png", photo)
    expected = model.restore(photo, np.int64(1))
    x = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    refined = model.refine(torch.nn.functional.pad(x[None], [16] * 4, "reflect"), 1)[0, :, 16:-16, 16:-16]  # a margin
    assert np.abs(expected - refined.clamp(0, 1).permute(1, 2, 0).detach().numpy() * 255).max() <= 0.5 + 1e-3
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(model.restore(path, 1), expected)
    both = model.restore(torch.stack([x, 1 - x]), 1)
    assert torch.allclose(both[0], model.restore(x, 1), atol=1e-5)
    for t in (x[:1], x[None, :1], x.double(), x.bfloat16(), x.half(), x.clone().requires_grad_(), x.transpose(1, 2)):
        y = model.restore(t, 1)
        assert y.shape == t.shape and y.dtype == t.dtype and not y.requires_grad and 0 <= y.min() <= y.max() <= 1
    model.about = dict(steps=2)
    assert np.array_equal(model.restore(photo), model.restore(photo, 2)) and (model.restore(photo) != expected).any()


def test_what_cannot_work_gets_one_sentence(model):
    x = torch.zeros(3, 4, 4)
    refused("C = 1, 2, 3 or 4", model.restore, np.zeros((4, 4, 5), np.uint8))
    refused("a photo must be", model.restore, np.zeros((0, 4, 3), np.uint8))
    refused("not int32", model.restore, np.zeros((4, 4, 3), np.int32))
    refused(r"in \[0, 1\], found 255 to 255: scale", model.restore, np.full((4, 4, 3), 255.0))
    refused("found nan", model.restore, x[None] * torch.nan)
    for bad in (torch.zeros(4, 4, 3), x.byte()):
        refused(r"a tensor must be float, \(B, 3, H, W\) or \(3, H, W\), in \[0, 1\]", model.restore, bad)
    for options in (dict(tile=100), dict(tile=16), dict(overlap=-1)):
        refused("tile must be", model.restore, x, **options)


def test_what_is_not_finite_never_becomes_pixels_and_the_model_is_left_as_it_was(photo):
    model = tiny()
    kinds = [type(m) for m in model.modules()]
    fast = []
    model.encoder.register_forward_hook(lambda *_: fast.append({type(m) for m in model.modules()} & {*FAST.values()}))
    model.restore(photo)
    with pytest.raises(ValueError, match="steps=-1"):
        model.restore(photo, -1)
    assert all(fast) and fast and [type(m) for m in model.modules()] == kinds
    with torch.no_grad():
        model.decoder.output.weight.mul_(1e5)
    model.restore(photo)
    for kind in (photo, to_tensor(photo)):
        refused("not finite: torch.float16 overflows", model.half().restore, kind)


# --------------------------------------------------------------------------------------------------------- windows
def test_windows_blend_without_seams(model):
    x = torch.rand(2, 3, 90, 150)
    for side, overlap in ((48, 16), (64, 0), (96, 7), (144, 64)):
        assert torch.allclose(photos.windows(lambda part: part * 2, x, side, overlap), 2 * x, atol=1e-6)
    lefts, grid = [], torch.arange(200.0).expand(1, 1, 100, 200)
    photos.windows(lambda part: lefts.append(int(part[0, 0, 0, 0])) or part, grid, 64, overlap=20)
    assert sorted(set(lefts)) == [0, 32, 64, 96, 128, 136]  # multiples of 16, but for the last
    y, x = np.mgrid[:112, :208]
    ramps = [0.2 + 0.6 * x / 208, 0.8 - 0.6 * y / 112, 0.5 + 0.2 * (x / 208 - y / 112)]
    image = np.stack(ramps, 2).astype(np.float32)
    whole, cut = (model.restore(image, 1, tile=t, overlap=24) for t in (0, 80))
    assert np.abs(whole - cut).max() > 1e-4, "windows must matter for this test to mean anything"
    assert np.array_equal(model.restore(image, 1, tile=208, overlap=24), whole), "a photo that fits a window is whole"
    for axis in (0, 1):  # where windows meet, the brightness jumps no more than elsewhere
        jumps = [np.abs(np.diff(a, axis=axis)).max() for a in (whole, cut)]
        assert jumps[1] <= jumps[0] + np.abs(whole - cut).max() / 24


def test_windows_are_guided_by_an_overview_of_the_photo(model):
    photo = torch.rand(1, 3, 96, 208)
    without = model.restore(photo, tile=80, overlap=24, steps=0)
    model.about = dict(recipe="overview", window=32)  # as such a training leaves it
    with torch.no_grad():
        P = model.privileged(F.interpolate(photo, (32, 32), mode="area"))

        def in_windows(x):
            return photos.windows(lambda part: model(part, P), x, 80, 24)

        expected = photos.mirrored(in_windows, photo).clamp(0, 1)
    guided = model.restore(photo, tile=80, overlap=24)
    assert model.restore(photo[..., :5, :7]).shape == (1, 3, 5, 7), "smaller than the overview"
    assert torch.allclose(guided, expected, atol=1e-5) and not torch.allclose(guided, without, atol=1e-3)
    case = dict(source="", suite="", column="", photo="", draw=0)
    (_, y0) = evaluate.measure(model, [(case, photo, photo)], progress=False)
    with torch.no_grad():
        assert y0["estimate"] == "y0" and y0["psnr"] == pytest.approx(evaluate.psnr(model(photo, P), photo), abs=1e-3)
    for wrong in (dict(steps=1), dict(feedback="chain")):
        with pytest.raises(InputError, match="weights of the recipe 'overview' make one guided pass, pass steps=0"):
            model.restore(photo, **wrong)


def test_windows_follow_from_free_memory(model, monkeypatch):
    assert 2**20 < photos.free_memory(torch.device("cpu")) <= 8e9
    monkeypatch.setattr(photos, "free_memory", lambda device: 2 * 300 * 400 * 18 * 8 * 4)
    assert photos.window_side(model, (1, 3, 300, 400)) == 400
    side = photos.window_side(model, (1, 3, 1000, 1000))
    assert side % 16 == 0 and 0.9 * 300 * 400 <= side**2 <= 300 * 400
    assert photos.window_side(model, (2, 3, 1000, 1000)) ** 2 <= side**2 / 1.8
    assert photos.window_side(model.double(), (1, 3, 1000, 1000)) ** 2 <= side**2 / 1.8
    model.settings = SimpleNamespace(encoder_channels=(4, 8), decoder_channels=(8, 2))  # as of a wrapped network
    assert photos.window_side(model.float(), (1, 3, 1000, 1000)) == 160
    monkeypatch.setattr(photos, "free_memory", lambda device: 0)  # nothing left: small windows, not none
    assert photos.window_side(model, (1, 3, 1000, 1000)) == 144


# --------------------------------------------------------------------------------------------------------- folders
def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_find(tmp_path):
    refused("no folder", find, tmp_path / "nowhere")
    refused("no photos in", find, tmp_path)
    place = tmp_path / "with space and ü"
    (place / "folder.jpg").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "c.Heic", "note.txt", ".hidden.png", "folder.jpg/d.png"):
        (place / name).touch()
    assert [p.relative_to(place).as_posix() for p in find(tmp_path)] == ["a.JPG", "b.png", "c.Heic", "folder.jpg/d.png"]


def test_a_folder_as_cameras_fill_it(tmp_path, capsys, counted):
    source, target, model = tmp_path / "mes photos d'été 写真", tmp_path / "out", identity()
    source.mkdir()
    photo = Image.fromarray(noise(20, 30, 3))
    good = ["a.jpg", "a.png", "b.jfif", "c.webp", "d.tif", "e.bmp", "f.jp2", "g.avif", "h.gif"]
    for name in good:
        photo.save(source / name)
    reasons = {"k.heic": "pillow-heif", "l.jxl": "pillow-jxl-plugin", "m.CR2": "rawpy", "n.dng": "rawpy"}
    reasons |= {"empty.png": "cannot identify", "text.png": "cannot identify", "cut.jpg": "truncated"}
    for name in reasons:
        (source / name).write_bytes(b"" if name == "empty.png" else b"this is no photo")
    (source / "cut.jpg").write_bytes((source / "a.jpg").read_bytes()[:700])
    photo.save(source / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    Image.fromarray(noise(20, 30, 4)).save(source / "j.jpg", "PNG")
    (source / "deep.png").write_bytes(png_header(30, 20, 16))
    tifffile.imwrite(source / "nan.tif", np.full((9, 9, 3), np.nan, np.float32), photometric="rgb")
    reasons |= {"moving.gif": "animation", "j.jpg": "cannot hold", "deep.png": "16-bit TIFF", "nan.tif": "found nan"}
    (source / "notes.txt").touch()
    restored, skipped, problems = restore_folder(model, source, target, 1)
    captured = capsys.readouterr()
    assert (restored, skipped, len(problems)) == (len(good), 0, len(reasons))
    assert names(target) == good[:6] + [f"{name}.png" for name in good[6:]]
    assert [line.split("/")[-1] for line in captured.out.splitlines()] == [
        f"{a}: restored as {a}.png" for a in good[6:]
    ]
    assert f"{len(good) + len(reasons)}/{len(good) + len(reasons)}" in captured.err and "photo" in captured.err
    for name, reason in reasons.items():
        (line,) = [problem for problem in problems if name in problem]
        assert reason in line and "\n" not in line and str(source) in line
    for name in ("a.png", "d.tif", "f.jp2.png", "h.gif.png"):
        original = source / name.replace("2.png", "2").replace("f.png", "f")
        assert np.array_equal(read(target / name), read(original)), name
    times = {p: p.stat().st_mtime_ns for p in target.iterdir() if p.name != "c.webp"}
    (target / "c.webp").unlink()
    (source / "d.tif").write_bytes(b"what is skipped is not read")
    assert restore_folder(model, source, target, 1, progress=False)[:2] == (1, len(good) - 1)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert restore_folder(model, source, target, 1, force=True, progress=False)[:2] == (len(good) - 1, 0)
    assert capsys.readouterr() == ("", "")
    counted("files of one folder, 11 of them no photos to read: the others restored, these named", 20)


def test_nothing_is_overwritten_or_restored_twice(tmp_path, photo):
    model, run = identity(), dict(steps=1, force=True, progress=False)
    write(tmp_path / "a.png", photo)
    before = (tmp_path / "a.png").read_bytes()
    for _ in range(2):
        assert restore_folder(model, tmp_path, tmp_path / "out", **run) == (1, 0, [])
    assert names(tmp_path) == ["a.png", "out/a.png"]
    for source, target in (("", ""), ("a.png", ""), ("a.png", "a.png")):
        refused("is an original itself", restore_folder, model, tmp_path / source, tmp_path / target, **run)
    assert (tmp_path / "a.png").read_bytes() == before
    Image.fromarray(photo).save(tmp_path / "b.gif")
    write(tmp_path / "b.gif.png", photo)
    refused("would be one file", restore_folder, model, tmp_path, tmp_path / "out", **run)
    for name in ("c/x.png", "c/c/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, photo)
    refused("c/x.png' is an original itself", restore_folder, model, tmp_path / "c", tmp_path, **run)
    (tmp_path / "c" / "x.png").unlink()
    refused("no photos in '.*c' but those in '.*c'", restore_folder, model, tmp_path / "c", tmp_path / "c" / "c", **run)
    (tmp_path / "linked").symlink_to(tmp_path / "c", target_is_directory=True)
    (tmp_path / "c" / "again").symlink_to(tmp_path / "c", target_is_directory=True)
    assert [p.name for p in find(tmp_path / "linked")] == ["x.png"], "through links, each folder once"


def test_a_single_photo(tmp_path, photo):
    model = tiny()
    write(tmp_path / "a.png", photo)
    Image.fromarray(photo).save(tmp_path / "a.gif")
    (tmp_path / "out").mkdir()
    for expected in ((1, 0, []), (0, 1, [])):
        assert restore_folder(model, tmp_path / "a.png", tmp_path / "b.tif", 1) == expected
    assert np.array_equal(read(tmp_path / "b.tif"), model.restore(photo, 1))
    assert restore_folder(model, tmp_path / "a.gif", tmp_path / "out", 1) == (1, 0, [])
    assert names(tmp_path / "out") == ["a.gif.png"]
    refused("no file '.*none.png'", restore_folder, model, tmp_path / "none.png", tmp_path / "c.png")
    refused("end the name in one of", restore_folder, model, tmp_path / "a.png", tmp_path / "c.docx")
    for options in (dict(tile=50), dict(steps=-1), dict(max_pixels=100)):
        name = [*options][0]
        refused(name, restore_folder, model, tmp_path / "a.png", tmp_path / "c.png", **options)
    assert restore_folder(model, tmp_path / "a.png", tmp_path / "new", 1) == (1, 0, [])
    assert names(tmp_path / "new") == ["a.png"]


def test_what_cannot_work_is_refused_before_the_first_photo(tmp_path, photo):
    for name in ("a.png", "b.png"):
        write(tmp_path / "in" / name, photo)
    for options, message in (
        (dict(steps=-1), "steps=-1"),
        (dict(tile=17), "tile=17"),
        (dict(overlap=-1), "overlap=-1"),
    ):
        refused(message, restore_folder, tiny(), tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    refused("cannot write to the folder", restore_folder, tiny(), tmp_path / "in", tmp_path / "in" / "a.png")
    refused("mode 'P': pass its file, or photo.convert", tiny().restore, Image.fromarray(photo).quantize())
    deep = noise(18, 19, dtype=np.uint16)
    assert np.array_equal(tiny().restore(Image.fromarray(deep)), tiny().restore(deep)), "16 bits stay"
    refused("no file '.*nowhere.png'", restore_folder, tiny(), tmp_path / "nowhere.png", tmp_path / "new" / "a.png")
    assert not (tmp_path / "new").exists()
    assert np.array_equal(tiny().restore(Image.fromarray(photo)), tiny().restore(photo))


def test_one_bad_photo_never_stops_the_others(tmp_path, photo, monkeypatch):
    def limited(model, photo, *_, **__):
        if len(photo) > 40:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\n more")
        return photo

    monkeypatch.setattr(photos, "restore", limited)
    write(tmp_path / "in" / "large.png", photo)
    write(tmp_path / "in" / "small.png", photo[:20])
    restored, _, problems = restore_folder(tiny(), tmp_path / "in", tmp_path / "out", progress=False)
    assert restored == 1 and names(tmp_path / "out") == ["small.png"]
    assert "large.png': " in problems[0] and problems[0].endswith("memory: pass a smaller tile (--tile)")
    (tmp_path / "out" / "small.png").unlink()
    (tmp_path / "out" / "small.png").mkdir()  # cannot be written
    restored, _, problems = restore_folder(tiny(), tmp_path / "in", tmp_path / "out", progress=False)
    assert restored == 0 and len(problems) == 2 and "cannot write" in problems[1]


@pytest.mark.parametrize("name", ["\u5199" * 83 + ".png", "a" * 246 + ".jpg"])
def test_names_as_long_as_they_may_be_are_written(tmp_path, name):
    write(tmp_path / name, noise(9, 9, 3))
    assert [path.name for path in tmp_path.iterdir()] == [name] and read(tmp_path / name).shape == (9, 9, 3)
