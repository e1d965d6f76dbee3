"""Photos: read with all their bits, restored as the same kind, written with all that was there; or one sentence."""

import base64
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin

from sipl_min import SIPL, InputError, photos
from sipl_min.fast import FAST, accelerate
from sipl_min.photos import find, from_tensor, read, restore_folder, to_tensor, write

EXIF, GPS = 0x8769, 0x8825
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def identity(**overrides):
    model = tiny(**overrides)
    torch.nn.init.zeros_(model.decoder.output.weight)
    return model


def one_sentence(e):
    text = str(e.value if hasattr(e, "value") else e)
    assert text and "\n" not in text and len(text) < 400, text
    return text


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def lzw(content):
    """Bytes as TIFF's LZW of literal codes only, 9 bits each, with a clear code before the codes would grow."""
    codes = []
    for i in range(0, len(content), 250):
        codes += [256, *content[i : i + 250]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(bits.ljust(-len(bits) % 8 + len(bits), "0"), 2).to_bytes((len(bits) + 7) // 8, "big")


def lzw_tiff(path, image, sample_format=1):
    """What Photoshop writes and tifffile cannot read: 16-bit color, compressed by LZW."""
    h, w, channels = image.shape
    data, tags = lzw(image.astype("<u2").tobytes()), Image.Exif()
    tags.update({256: w, 257: h, 258: (16,) * channels, 259: 5, 262: 2, 277: channels, 278: h, 279: len(data), 273: 0})
    tags[339] = (sample_format,) * channels
    tags.endian = "<"
    path.write_bytes(tags.tobytes()[6:] + data)


# --------------------------------------------------------------------------------------------- every kind, all bits
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 2), (6, 9, 3), (6, 9, 4)])
def test_png_and_tiff_keep_everything(tmp_path, dtype, shape):
    image = noise(*shape, dtype=dtype)
    for name in ("a.png", "a.tif"):
        write(tmp_path / name, image)
        assert np.array_equal(read(tmp_path / name), image), name
        assert read(tmp_path / name).dtype == dtype
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), image)  # others read the same


def test_float_goes_to_tiff_only(tmp_path):
    image = np.random.default_rng(0).random((6, 9, 3)).astype(np.float32)
    write(tmp_path / "a.tif", image)
    assert np.array_equal(read(tmp_path / "a.tif"), image)
    for name in ("a.png", "a.jpg"):
        with pytest.raises(InputError, match="cannot hold float32 with 3 channels: name it .tif"):
            write(tmp_path / name, image)
    for name, bad in (("a.jpg", noise(4, 4, 4)), ("a.webp", noise(4, 4, 3, dtype=np.uint16))):
        with pytest.raises(InputError, match="cannot hold uint.* channels: name it .png or .tif"):
            write(tmp_path / name, bad)
    with pytest.raises(InputError, match="end the name in one of"):
        write(tmp_path / "a.docx", image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_sixteen_bits_of_color_are_read_whole_and_fast(tmp_path):
    image = noise(500, 700, 3, dtype=np.uint16)
    write(tmp_path / "a.png", image)
    start = time.process_time()
    assert np.array_equal(read(tmp_path / "a.png"), image)
    assert time.process_time() - start < 1  # a pure-Python decoder takes 0.6 s for a tenth of that
    lzw_tiff(tmp_path / "lzw.tif", image[:30, :40])
    assert np.array_equal(read(tmp_path / "lzw.tif"), image[:30, :40])
    lzw_tiff(tmp_path / "float.tif", image[:30, :40], sample_format=3)
    with pytest.raises(InputError, match="requires the 'imagecodecs' package"):
        read(tmp_path / "float.tif")


TEN_BITS = """AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUEAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAAAAAAAAAAA
AAAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAHwAAAChpaW5mAAAAAAABAAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAA
BqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAACAAAAAgAAAAQcGl4aQAAAAADCgoKAAAADGF2MUOBIEAAAAAAE2NvbHJuY2x4AAIAAgAGgAAAABdpcG1hAAA
AAAAAAAEAAQQBAoMEAAAAJ21kYXQSAAoIOAi/bwICBpAyERlCYwTAADQAAACQP5sMYJFg"""  # AVIF, 8 x 8 pixels


def test_bits_that_would_be_lost_are_refused(tmp_path):
    for name in ("a.jp2", "a.avif", "a.j2k"):
        Image.fromarray(noise(20, 30, 3)).save(tmp_path / name)
        assert read(tmp_path / name).shape == (20, 30, 3)
    content = bytearray((tmp_path / "a.jp2").read_bytes())
    content[content.index(b"\xff\x4f\xff\x51") + 42] = 15  # announces 16 bits
    (tmp_path / "a.jp2").write_bytes(content)
    (tmp_path / "a.avif").write_bytes(base64.b64decode(TEN_BITS))
    for name in ("a.jp2", "a.avif"):
        with pytest.raises(InputError, match="more than 8 bits a channel, which would be lost") as e:
            read(tmp_path / name)
        one_sentence(e)
    Image.fromarray(noise(20, 30, dtype=np.uint16)).save(tmp_path / "gray.jp2")
    assert np.array_equal(read(tmp_path / "gray.jp2"), noise(20, 30, dtype=np.uint16))


def test_colors_survive_every_way_of_storing_them(tmp_path):
    red = Image.new("RGB", (20, 16), (255, 51, 0))  # a color of the web palette
    for mode, name in (("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("P", "a.png"), ("YCbCr", "a.jpg"), ("P", "p.tif")):
        red.convert(mode).save(tmp_path / name)
        image = read(tmp_path / name)
        assert image.shape == (16, 20, 3) and np.abs(image.astype(int) - (255, 51, 0)).max() < 8, (mode, name)
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg"):
        red.save(tmp_path / "c.tif", compression=compression)
        assert np.abs(read(tmp_path / "c.tif").astype(int) - (255, 51, 0)).max() < 8, compression
    for name in ("bits.png", "bits.tif"):
        red.convert("1").save(tmp_path / name)
        assert set(np.unique(read(tmp_path / name))) == {0, 255}
    deep = noise(8, 9, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "white.tif", 65535 - deep, photometric="miniswhite")
    assert np.array_equal(read(tmp_path / "white.tif"), deep)


def test_transparency_and_planes(tmp_path):
    gray = Image.new("L", (20, 16), 76)
    gray.save(tmp_path / "g.png", transparency=76)
    assert read(tmp_path / "g.png").shape == (16, 20, 2) and (read(tmp_path / "g.png")[..., 1] == 0).all()
    Image.new("RGB", (20, 16), (1, 2, 3)).convert("P").save(tmp_path / "p.png", transparency=0)
    assert read(tmp_path / "p.png").shape == (16, 20, 4)
    planes = noise(3, 18, 19)
    tifffile.imwrite(tmp_path / "p.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(read(tmp_path / "p.tif"), planes.transpose(1, 2, 0))
    deep = noise(8, 9, 3, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", deep.astype(">u2"), byteorder=">", photometric="rgb")
    assert np.array_equal(read(tmp_path / "b.tif"), deep)
    tifffile.imwrite(tmp_path / "big.tif", deep, bigtiff=True, photometric="rgb")
    assert np.array_equal(read(tmp_path / "big.tif"), deep)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_kind_of_file_comes_upright(tmp_path, orientation):
    exif, tag = Image.Exif(), [(274, "H", 1, orientation, False)]
    exif[274] = orientation
    plain = {
        "a.png": noise(8, 12, 3),
        "deep.png": noise(8, 12, 3, dtype=np.uint16),
        "gray.png": noise(8, 12, dtype=np.uint16),
        "alpha.png": noise(8, 12, 2, dtype=np.uint16),
    }
    for name, image in plain.items():
        write(tmp_path / name, image)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:33] + chunk(b"eXIf", exif.tobytes()[6:]) + content[33:])
    deep = plain["deep.png"]
    for name, image in (("b.tif", deep), ("f.tif", (deep / 65535).astype(np.float32)), ("a.tif", plain["a.png"])):
        tifffile.imwrite(tmp_path / name, image, photometric="rgb", extratags=tag, metadata=None)
        plain[name] = image
    for name in ("a.jpg", "a.webp", "a.avif"):
        Image.fromarray(plain["a.png"]).save(tmp_path / name)
        plain[name] = read(tmp_path / name)
        Image.fromarray(plain["a.png"]).save(tmp_path / name, exif=exif)
    turns = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
    places = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12))
    if orientation > 1:
        places = places.transpose(Image.Transpose[turns[orientation - 2]])
    for name, image in plain.items():
        assert np.array_equal(read(tmp_path / name), image.reshape(96, *image.shape[2:])[np.asarray(places)]), name


# ------------------------------------------------------------------------------------------- what is no photo to take
def test_bad_files_get_one_sentence(tmp_path, photo):
    for ending in ("png", "jpg", "tif", "webp"):
        write(tmp_path / f"good.{ending}", np.tile(photo, (2, 2, 1)))
        content = (tmp_path / f"good.{ending}").read_bytes()
        for n in (0, 10, len(content) // 2):
            (tmp_path / f"cut.{ending}").write_bytes(content[:n])
            with pytest.raises(InputError, match=f"cannot read '.*cut.{ending}' as an image") as e:
                read(tmp_path / f"cut.{ending}")
            one_sentence(e)
    (tmp_path / "text.png").write_text("this is no image", encoding="utf-8")
    with pytest.raises(InputError, match="cannot read '.*text.png' as an image"):
        read(tmp_path / "text.png")
    with pytest.raises(InputError, match="no file"):
        read(tmp_path / "nowhere.png")
    Image.fromarray(photo).save(tmp_path / "a.ppm")  # Pillow would cut its 16 bits, if it had so many
    with pytest.raises(InputError, match="the format PPM is not read here: convert it to PNG or TIFF"):
        read(tmp_path / "a.ppm")


def test_broken_metadata_does_not_cost_the_photo(tmp_path, photo):
    write(tmp_path / "a.jpg", photo)
    content = (tmp_path / "a.jpg").read_bytes()
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01"  # announces five entries, ends in the first
    exif = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "b.jpg").write_bytes(content[:2] + exif + content[2:])
    assert np.array_equal(read(tmp_path / "b.jpg"), read(tmp_path / "a.jpg"))
    for ending in ("png", "jpg", "tif", "webp"):
        write(tmp_path / f"c.{ending}", photo, like=tmp_path / "b.jpg")
        assert read(tmp_path / f"c.{ending}").shape == photo.shape
    text = PngImagePlugin.PngInfo()
    for key in ("dpi", "exif", "icc_profile", "comment"):
        text.add_text(key, "not what Pillow means by it")
    Image.fromarray(photo).save(tmp_path / "d.png", pnginfo=text)
    for ending in ("png", "jpg", "tif"):
        write(tmp_path / f"e.{ending}", photo, like=tmp_path / "d.png")
    with Image.open(tmp_path / "e.png") as image:
        assert image.text["dpi"] == "not what Pillow means by it"


def test_one_limit_on_pixels_before_decoding(tmp_path, monkeypatch):
    for depth in (8, 16):
        header = struct.pack(">IIBBBBB", 15000, 14000, depth, 2, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
        with pytest.raises(
            InputError, match="its 210.0 million pixels are above the limit of 200.0 million: raise it"
        ) as e:
            read(tmp_path / "a.png")
        assert "damaged" not in one_sentence(e)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit does not stand in the way
    for name in ("b.png", "b.tif", "b.jpg", "b.webp", "b.bmp"):
        write(tmp_path / name, noise(30, 40, 3))
        assert read(tmp_path / name).shape == read(tmp_path / name, 1200).shape == (30, 40, 3)
        with pytest.raises(InputError, match="million pixels"):
            read(tmp_path / name, max_pixels=1199)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_animations_and_pages_are_refused(tmp_path):
    frames = [Image.fromarray(noise(20, 30, 3, seed=i)) for i in range(3)]
    for name in ("a.gif", "a.png", "a.webp", "a.avif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(InputError, match=r"it is an animation or has several pages \(3\): take it apart") as e:
            read(tmp_path / name)
        one_sentence(e)
        frames[0].save(tmp_path / name, save_all=True)
        assert read(tmp_path / name).shape == (20, 30, 3), name
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])  # a camera's JPEG with previews
    (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    assert read(tmp_path / "a.jpg").shape == (20, 30, 3)
    with tifffile.TiffWriter(tmp_path / "thumbnail.tif") as f:
        f.write(noise(20, 30, 3), photometric="rgb", metadata=None)
        f.write(noise(5, 8, 3), photometric="rgb", metadata=None, subfiletype=1)
    assert np.array_equal(read(tmp_path / "thumbnail.tif"), noise(20, 30, 3))


# ------------------------------------------------------------------------------------- what else is in a file stays
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "deep.png", "a.webp", "a.tif", "deep.tif", "f.tif"])
def test_profile_exif_and_resolution_are_carried_through(tmp_path, name):
    image, exif = noise(20, 30, 3), Image.Exif()
    exif.update({271: "Camera", 274: 6, 315: "Author"})
    exif.get_ifd(EXIF)[33434] = 0.25  # seconds of exposure
    exif.get_ifd(GPS)[1] = "N"
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a title")
    text.add_itxt("Author", "Ünïcode")
    Image.fromarray(image).save(tmp_path / "8.png", exif=exif, dpi=(300, 300), icc_profile=SRGB, pnginfo=text)
    image = noise(20, 30, 3, dtype=np.uint16) if "deep" in name else image
    image = (image / 255).astype(np.float32) if name == "f.tif" else image
    write(tmp_path / name, image, like=tmp_path / "8.png")
    again = tmp_path / f"again {name}"
    write(again, read(tmp_path / name), like=tmp_path / name)  # from each kind into the same kind
    if name == "f.tif":  # Pillow does not open it
        with tifffile.TiffFile(again) as f:
            tags = f.pages[0].tags
            assert tags["Make"].value == "Camera" and tags["ExifTag"].value["ExposureTime"] == 0.25
            assert tags[34675].value == SRGB and tags["XResolution"].value[0] > 299 * tags["XResolution"].value[1]
        return
    with Image.open(again) as copy:
        copy.load()
        found = copy.getexif()
        assert found[271] == "Camera" and found[315] == "Author" and found.get(274, 1) == 1
        assert found.get_ifd(EXIF)[33434] == 0.25 and found.get_ifd(GPS)[1] == "N"
        assert copy.info["icc_profile"] == SRGB
        if not name.endswith("webp"):  # which has no resolution
            assert copy.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        if name.endswith("png"):
            assert copy.text["Title"] == "a title" and copy.text["Author"] == "Ünïcode"


def test_a_profile_of_cmyk_does_not_stay_with_rgb(tmp_path):
    profile = SRGB[:16] + b"CMYK" + SRGB[20:]
    for name in ("a.jpg", "a.tif"):
        Image.fromarray(noise(16, 16, 3)).convert("CMYK").save(tmp_path / name, icc_profile=profile)
        write(tmp_path / f"b{name}", read(tmp_path / name), like=tmp_path / name)
        with Image.open(tmp_path / f"b{name}") as image:
            assert image.mode == "RGB" and "icc_profile" not in image.info


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_keeps_quality_and_subsampling(tmp_path, subsampling, photo):
    for quality in (30, 92):
        Image.fromarray(photo).save(tmp_path / "a.jpg", quality=quality, subsampling=subsampling)
        write(tmp_path / "b.jpg", photo, like=tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as a, Image.open(tmp_path / "b.jpg") as b:
            assert a.quantization == b.quantization
            assert JpegImagePlugin.get_sampling(b) == subsampling
    Image.fromarray(photo).save(tmp_path / "95.jpg", quality=95, subsampling=0)
    write(tmp_path / "c.jpg", photo)
    with Image.open(tmp_path / "95.jpg") as a, Image.open(tmp_path / "c.jpg") as b:
        assert a.quantization == b.quantization and JpegImagePlugin.get_sampling(b) == 0
    Image.fromarray(photo[..., 0]).save(tmp_path / "gray.jpg", quality=40)
    write(tmp_path / "d.jpg", photo[..., 0], like=tmp_path / "gray.jpg")
    with Image.open(tmp_path / "gray.jpg") as a, Image.open(tmp_path / "d.jpg") as b:
        assert a.quantization == b.quantization and b.mode == "L"
    write(tmp_path / "e.webp", photo, like=tmp_path / "a.jpg")  # tables are of use to JPEG alone
    assert np.abs(read(tmp_path / "e.webp").astype(int) - photo).mean() < 4


def test_lossless_webp_stays_lossless(tmp_path):
    for profile in (None, SRGB):  # with a profile, the pixels are not in the first part of the file
        image = noise(16, 16, 4)
        Image.fromarray(noise(16, 16, 3)).save(tmp_path / "a.webp", lossless=True, icc_profile=profile)
        write(tmp_path / "b.webp", image, like=tmp_path / "a.webp")
        assert np.array_equal(read(tmp_path / "b.webp"), image)
        Image.fromarray(noise(16, 16, 3)).save(tmp_path / "a.webp", icc_profile=profile)
        write(tmp_path / "b.webp", image, like=tmp_path / "a.webp")
        assert not np.array_equal(read(tmp_path / "b.webp"), image)


# ------------------------------------------------------------------------------------------------ photos in memory
def test_tensor_conversion_is_exact_and_silent():
    for dtype in (np.uint8, np.uint16):
        values = np.linspace(0, np.iinfo(dtype).max, 4096).astype(dtype).reshape(64, 64)
        for image in (values, np.asfortranarray(values), values[::2, ::-1], values.astype(values.dtype.newbyteorder())):
            image.flags.writeable = False
            assert np.array_equal(from_tensor(to_tensor(image), image), image)
            assert from_tensor(to_tensor(image), image).dtype == image.dtype


@st.composite
def any_photo(draw):
    """A photo of any kind that `restore` promises to take, and how it lies in memory."""
    h, w = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    channels = draw(st.sampled_from([None, 1, 2, 3, 4]))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, ">u2", np.float16, np.float32, np.float64]))
    layout = draw(st.sampled_from(["plain", "fortran", "every second", "reversed", "read-only"]))
    image = np.random.default_rng(draw(st.integers(0, 99))).random((h, w) if channels is None else (h, w, channels))
    image = draw(st.sampled_from([image, 0 * image, 0 * image + 1]))
    image = (np.rint(image * np.iinfo(dtype).max) if np.dtype(dtype).kind == "u" else image).astype(dtype)
    if layout == "fortran":
        image = np.asfortranarray(image)
    elif layout == "every second":
        image = np.repeat(np.repeat(image, 2, 0), 2, 1)[::2, ::2]
    elif layout == "reversed":
        image = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    elif layout == "read-only":
        image.setflags(write=False)
    return image


def test_any_photo_comes_back_as_the_same_kind(counted):
    model, cases = tiny(dim=4), []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
    @given(photo=any_photo(), steps=st.integers(0, 1))
    def check(photo, steps):
        before = photo.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y = model.restore(photo, steps)
        assert y.dtype == photo.dtype and y.shape == photo.shape and np.array_equal(photo, before)
        assert np.isfinite(y.astype(np.float64)).all() and y.min() >= 0
        assert y.max() <= (1 if y.dtype.kind == "f" else np.iinfo(y.dtype).max)
        if photo.ndim == 3 and photo.shape[2] in (2, 4):
            assert np.array_equal(y[..., -1], photo[..., -1]), "alpha must pass untouched"
        cases.append(photo.shape)

    check()
    counted("photos of random shape, kind and layout restored, the same kind out", len(cases))


def test_restore_rounds_what_refine_gives(model, photo):
    x = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    expected = model.refine(x, 1)[0].double().clamp(0, 1).permute(1, 2, 0).numpy() * 255
    for steps in (1, np.int64(1)):
        assert np.abs(model.restore(photo, steps) - expected).max() <= 0.5 + 1e-3


def test_an_identity_network_changes_no_bit(photo):
    deep = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70) * 15
    for dtype in (torch.float32, torch.float64):
        model = identity().to(dtype)
        assert np.array_equal(model.restore(photo), photo)
        assert np.array_equal(model.restore(deep), deep)


def test_tensors_and_paths(model, photo, tmp_path):
    write(tmp_path / "a.png", photo)
    expected = model.restore(photo, 1)
    assert np.array_equal(model.restore(tmp_path / "a.png", 1), expected)
    assert np.array_equal(model.restore(str(tmp_path / "a.png"), 1), expected)
    x = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    y = model.restore(x, 1)
    assert y.shape == x.shape and np.abs(y.permute(1, 2, 0).numpy() * 255 - expected).max() <= 0.51
    both = model.restore(torch.stack([x, 1 - x]), 1)
    assert both.shape == (2, *x.shape) and torch.allclose(both[0], y, atol=1e-5)
    for t in (x[:1], x[None, :1], x.double(), x.bfloat16(), x.half(), x.clone().requires_grad_(), x.transpose(1, 2)):
        y = model.restore(t, 1)
        assert y.shape == t.shape and y.dtype == t.dtype and not y.requires_grad and 0 <= y.min() <= y.max() <= 1


@pytest.mark.parametrize(
    "photo, message",
    [
        (np.zeros((4, 4, 5), np.uint8), "C = 1, 2, 3 or 4"),
        (np.zeros((0, 4, 3), np.uint8), "a photo must be"),
        (np.zeros((4, 4, 3), np.int32), "not int32"),
        (np.full((4, 4, 3), 255.0), r"in \[0, 1\], found 255 to 255: scale"),
        (np.full((4, 4, 3), np.nan), "found nan"),
        (torch.full((3, 4, 4), 255.0), "found 255 to 255: scale"),
        (torch.full((1, 3, 4, 4), torch.nan), "found nan"),
        (
            torch.zeros(4, 4, 3),
            r"a tensor must be float, \(B, 3, H, W\) or \(3, H, W\), in \[0, 1\], not torch.float32",
        ),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "not torch.uint8"),
        ("nowhere.png", "no file 'nowhere.png'"),
    ],
)
def test_what_is_no_photo_gets_one_sentence(model, photo, message):
    with pytest.raises(InputError, match=message) as e:
        model.restore(photo)
    one_sentence(e)


def test_what_is_not_finite_never_becomes_pixels(photo):
    model = tiny()
    with torch.no_grad():
        model.decoder.output.weight.mul_(1e5)
    model.restore(photo)
    with pytest.raises(InputError, match="not finite: torch.float16 overflows, use bfloat16 or float32") as e:
        model.half().restore(photo)
    one_sentence(e)
    with torch.no_grad():
        model.float().decoder.output.weight[0, 0] = torch.nan
    for kind in (photo, torch.rand(3, 16, 16)):
        with pytest.raises(InputError, match="not finite: its weights are not"):
            model.restore(kind)


def test_the_model_works_accelerated_and_is_left_as_it_was(photo, monkeypatch):
    model = tiny()
    kinds, seen = [type(m) for m in model.modules()], []
    before = {name: (t.clone(), t.stride()) for name, t in model.state_dict().items()}

    def spied(self, *arguments):
        seen.append({type(m) for m in self.modules()} & {*FAST.values()})
        return refine(self, *arguments)

    refine = SIPL.refine
    monkeypatch.setattr(SIPL, "refine", spied)
    model.restore(photo, 1)
    with pytest.raises(ValueError, match="steps=-1"):
        model.restore(photo, -1)
    assert len(seen) == 2 and all(seen) and [type(m) for m in model.modules()] == kinds
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name][0]) and t.stride() == before[name][1], name
    assert all(p.requires_grad for p in model.parameters())
    accelerate(model).restore(photo, 1)
    assert {type(m) for m in model.modules()} & {*FAST.values()}, "it was fast before"


def test_steps_follow_from_the_weights(photo):
    model = tiny()
    assert np.array_equal(model.restore(photo), model.restore(photo, 1))
    model.about = dict(steps=2)
    assert np.array_equal(model.restore(photo), model.restore(photo, 2))
    assert not np.array_equal(model.restore(photo, 2), model.restore(photo, 1))
    assert tiny(fusion=False).restore(photo).shape == photo.shape


def test_bfloat16_is_close(photo):
    model = tiny()
    expected = model.restore(photo, 1).astype(int)
    assert np.abs(model.bfloat16().restore(photo, 1) - expected).mean() < 4


# --------------------------------------------------------------------------------------------------------- windows
def test_windows_of_a_network_that_sees_one_pixel_change_nothing():
    x = torch.rand(2, 3, 90, 150)
    for side, overlap in ((48, 16), (64, 0), (96, 7), (144, 64)):
        corners = []

        def double(part):
            corners.append(part.shape)
            return part * 2

        assert torch.allclose(photos.windows(double, x, side, overlap), 2 * x, atol=1e-6)
        assert len(corners) > 1 and all(max(shape[-2:]) <= side for shape in corners)
    assert photos.windows(lambda part: part, x, 160) is x, "one window is the whole"


def test_windows_start_at_multiples_of_sixteen():
    grid = torch.arange(200.0).expand(1, 1, 100, 200)
    lefts = []
    photos.windows(lambda part: lefts.append(int(part[0, 0, 0, 0])) or part, grid, 64, overlap=20)
    assert sorted(set(lefts)) == [0, 32, 64, 96, 128, 136]


def test_no_seams_in_a_smooth_image(model):
    """Where windows meet, the brightness jumps from pixel to pixel no more than it does without windows."""
    y, x = np.mgrid[:112, :208]
    ramps = [0.2 + 0.6 * x / 208, 0.8 - 0.6 * y / 112, 0.5 + 0.2 * (x / 208 - y / 112)]
    image = np.stack(ramps, 2).astype(np.float32)
    whole, cut = (model.restore(image, 1, tile=t, overlap=24) for t in (0, 80))
    assert np.array_equal(whole, model.restore(image, 1, tile=208, overlap=24))
    assert np.abs(whole - cut).max() > 1e-4, "windows must matter for this test to mean anything"
    for axis in (0, 1):
        jumps = [np.abs(np.diff(a, axis=axis)).max(axis=(1 - axis, 2)) for a in (whole, cut)]
        assert jumps[1].max() <= jumps[0].max() + np.abs(whole - cut).max() / 24
    pasted = np.concatenate([model.restore(image[:, a : a + 80], 1) for a in (0, 80)], 1)  # has the seam
    assert np.abs(np.diff(pasted, axis=1)).max() > np.abs(np.diff(cut, axis=1)).max()


def test_windows_follow_from_free_memory(model, monkeypatch):
    monkeypatch.setattr(photos, "free_memory", lambda device: 2 * 300 * 400 * 18 * 8 * 4)
    assert photos.window_side(model, (1, 3, 300, 400)) == 400
    side = photos.window_side(model, (1, 3, 1000, 1000))
    assert side % 16 == 0 and 0.9 * 300 * 400 <= side**2 <= 300 * 400
    assert photos.window_side(model, (2, 3, 1000, 1000)) ** 2 <= side**2 / 1.8
    assert photos.window_side(model.bfloat16(), (1, 3, 1000, 1000)) > side
    model.settings = SimpleNamespace(encoder_channels=(4, 8), decoder_channels=(8, 2))  # as of a wrapped network
    assert photos.window_side(model.float(), (1, 3, 1000, 1000)) == 160
    monkeypatch.setattr(photos, "free_memory", lambda device: 0)  # nothing left: small windows, not none
    assert photos.window_side(model, (1, 3, 1000, 1000)) == 144
    assert photos.window_side(model, (1, 3, 1000, 1000), tile=0) == 1000
    assert photos.window_side(model, (1, 3, 1000, 1000), np.int64(160)) == 160


def test_free_memory_with_and_without_proc(monkeypatch):
    assert 2**20 < photos.free_memory(torch.device("cpu")) <= 8e9
    monkeypatch.setattr(photos, "read_text", lambda path: Path("/nowhere").read_text(encoding="utf-8"))
    assert photos.free_memory(torch.device("cpu")) == 8e9
    told = dict(max="3000000000", current="2500000000", stat="anon 1\ninactive_file 500000000\n")
    told = {f"/sys/fs/cgroup/memory.{name}": text for name, text in told.items()}
    monkeypatch.setattr(
        photos, "read_text", {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2000000 kB\n", **told}.get
    )
    assert photos.free_memory(torch.device("cpu")) == 1e9


@pytest.mark.parametrize("options", [dict(tile=100), dict(tile=-16), dict(tile=16), dict(overlap=-1)])
def test_bad_windows_get_one_sentence(model, options, photo):
    with pytest.raises(InputError, match="must be") as e:
        model.restore(photo, 1, **options)
    one_sentence(e)


# --------------------------------------------------------------------------------------------------------- folders
def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_find(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no photos in"):
        find(tmp_path)
    place = tmp_path / "with space and ü"
    (place / "folder.jpg").mkdir(parents=True)
    (place / ".thumbnails").mkdir()
    for name in ("b.png", "a.JPG", "c.Heic", "note.txt", ".hidden.png", ".thumbnails/a.png", "folder.jpg/d.png"):
        (place / name).touch()
    assert [p.relative_to(place).as_posix() for p in find(tmp_path)] == ["a.JPG", "b.png", "c.Heic", "folder.jpg/d.png"]


def camera_folder(folder):
    """A folder as it comes from phones, cameras and the web: 12 photos that can be read, 10 that cannot."""
    folder.mkdir()
    photo = Image.fromarray(noise(20, 30, 3))
    for name in ("a.jpg", "a.png", "b.jfif", "c.webp", "d.tif", "e.bmp", "f.jp2", "g.avif", "h.gif", "i.jpg"):
        photo.save(folder / name, "PNG" if name == "i.jpg" else None)
    write(folder / "deep.png", noise(20, 30, 3, dtype=np.uint16))
    Image.fromarray(noise(20, 30, 4)).save(folder / "j.jpg", "PNG")
    for name in ("k.heic", "l.jxl", "m.CR2", "n.dng", "empty.png", "text.png"):
        (folder / name).write_bytes(b"" if name == "empty.png" else b"this is no photo")
    (folder / "zeros.jpg").write_bytes(bytes(1000))
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:500])
    photo.save(folder / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    tifffile.imwrite(folder / "nan.tif", np.full((9, 9, 3), np.nan, np.float32), photometric="rgb")
    for name in ("notes.txt", "film.mov"):
        (folder / name).touch()


def test_a_folder_as_cameras_fill_it(tmp_path, capsys, counted):
    source, target = tmp_path / "mes photos d'été 写真", tmp_path / "out"
    camera_folder(source)
    restored, skipped, problems = restore_folder(identity(), source, target, 1)
    captured = capsys.readouterr()
    assert (restored, skipped, len(problems)) == (12, 0, 10)
    expected = ["a.jpg", "a.png", "b.jfif", "c.webp", "d.tif", "deep.png", "e.bmp", "f.png", "g.png", "h.png"]
    assert names(target) == [*expected, "i.jpg", "j.png"]
    told = sorted(line.split("/")[-1] for line in captured.out.splitlines())
    assert told == [
        f"{a}: restored as {b}" for a, b in zip(("f.jp2", "g.avif", "h.gif", "j.jpg"), expected[7:] + ["j.png"])
    ]
    reasons = {
        "k.heic": "takes the package pillow-heif",
        "l.jxl": "takes the package pillow-jxl-plugin",
        "m.CR2": "takes the package rawpy",
        "n.dng": "takes the package rawpy",
        "moving.gif": "an animation",
        "nan.tif": "found nan",
    } | dict.fromkeys(("empty.png", "text.png", "zeros.jpg", "cut.jpg"), "is it damaged")
    for name, reason in reasons.items():
        (line,) = [problem for problem in problems if name in problem]
        assert reason in one_sentence(line)
    same = dict.fromkeys(("a.png", "d.tif", "deep.png", "e.bmp")) | {
        "f.png": "f.jp2",
        "h.png": "h.gif",
        "j.png": "j.jpg",
    }
    for name, original in same.items():  # the network changes nothing
        assert np.array_equal(read(target / name), read(source / (original or name))), name
    assert "22/22" in captured.err and "photo" in captured.err  # the bar: total, unit

    times = [p.stat().st_mtime_ns for p in sorted(target.iterdir())]
    (target / "c.webp").unlink()
    (source / "d.tif").write_bytes(b"what is skipped is not read")
    assert restore_folder(identity(), source, target, 1, progress=False)[:2] == (1, 11)
    assert [p.stat().st_mtime_ns for p in sorted(target.iterdir()) if p.name != "c.webp"] == times[:3] + times[4:]
    assert restore_folder(identity(), source, target, 1, force=True, progress=False)[:2] == (11, 0)
    assert capsys.readouterr() == ("", "")
    counted("files of one folder, 10 of them no photos to read: the others restored, these named", 22)


def test_two_photos_never_share_a_place(tmp_path):
    (tmp_path / "in").mkdir()
    for i, name in enumerate(("a.gif", "a.avif", "1.jpg", "1.png", "b.gif", "b.png", "c.gif")):
        Image.fromarray(noise(16, 16, seed=i)).save(tmp_path / "in" / name)
    assert restore_folder(identity(), tmp_path / "in", tmp_path / "out", 1, progress=False) == (7, 0, [])
    places = ["1.jpg", "1.png", "a.avif.png", "a.gif.png", "b.gif.png", "b.png", "c.png"]
    assert names(tmp_path / "out") == places
    assert np.array_equal(read(tmp_path / "out" / "b.gif.png"), read(tmp_path / "in" / "b.gif"))
    assert np.array_equal(read(tmp_path / "out" / "b.png"), read(tmp_path / "in" / "b.png"))


def test_what_was_restored_is_not_restored_again(tmp_path, photo):
    write(tmp_path / "a.png", photo)
    model, run = identity(), dict(steps=1, force=True, progress=False)
    for _ in range(2):
        assert restore_folder(model, tmp_path, tmp_path / "out", **run) == (1, 0, [])
    assert names(tmp_path) == ["a.png", "out/a.png"]
    before = (tmp_path / "a.png").read_bytes()
    for source, target in (
        (tmp_path, tmp_path),
        (tmp_path / "a.png", tmp_path),
        (tmp_path / "a.png", tmp_path / "a.png"),
    ):
        with pytest.raises(InputError, match="is the original itself"):
            restore_folder(tiny(), source, target, **run)
    assert (tmp_path / "a.png").read_bytes() == before
    with pytest.raises(InputError, match="is a file: name a folder"):
        restore_folder(model, tmp_path, tmp_path / "a.png", **run)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="no photos in .* outside"):
        restore_folder(model, tmp_path, tmp_path / "out", **run)
    assert restore_folder(model, tmp_path / "out", tmp_path, **run) == (1, 0, []), "into the folder above"


def test_a_single_photo(tmp_path, photo, capsys):
    model = tiny()
    write(tmp_path / "a.png", photo)
    Image.fromarray(photo).save(tmp_path / "a.gif")
    (tmp_path / "out").mkdir()
    assert restore_folder(model, tmp_path / "a.png", tmp_path / "b.tif", 1) == (1, 0, [])
    assert np.array_equal(read(tmp_path / "b.tif"), model.restore(photo, 1))
    assert restore_folder(model, tmp_path / "a.png", tmp_path / "b.tif", 1) == (0, 1, [])
    assert restore_folder(model, tmp_path / "a.gif", tmp_path / "out", 1) == (1, 0, [])
    assert names(tmp_path / "out") == ["a.png"]
    bad = {"c.docx": "end the name in one of", "a.png": "original itself"}
    for target, message in bad.items():
        with pytest.raises(InputError, match=message) as e:
            restore_folder(model, tmp_path / "a.png", tmp_path / target, 1)
        one_sentence(e)
    with pytest.raises(InputError, match="no file '.*none.png': check the path"):
        restore_folder(model, tmp_path / "none.png", tmp_path / "c.png", 1)
    with pytest.raises(InputError, match="tile=50 must be"):
        restore_folder(model, tmp_path / "a.png", tmp_path / "c.png", 1, tile=50)
    with pytest.raises(ValueError, match="steps=-1"):
        restore_folder(model, tmp_path / "a.png", tmp_path / "c.png", -1)
    with pytest.raises(InputError, match="million pixels"):
        restore_folder(model, tmp_path / "a.png", tmp_path / "c.png", 1, max_pixels=100)
    assert "restored as" not in capsys.readouterr().out


def test_one_bad_photo_never_stops_the_others(tmp_path, photo, monkeypatch):
    def limited(model, photo, *_, **__):
        if len(photo) > 40:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\n more")
        return photo

    monkeypatch.setattr(photos, "restore", limited)
    write(tmp_path / "in" / "large.png", photo)
    write(tmp_path / "in" / "memory.png", photo[:20])
    restored, _, problems = restore_folder(tiny(), tmp_path / "in", tmp_path / "out", progress=False)
    assert restored == 1 and names(tmp_path / "out") == ["memory.png"]
    assert one_sentence(problems[0]).endswith("large.png': not enough memory, pass a smaller tile (--tile)")
    (tmp_path / "out" / "memory.png").unlink()
    (tmp_path / "out" / "memory.png").mkdir()  # cannot be written
    restored, _, problems = restore_folder(tiny(), tmp_path / "in", tmp_path / "out", force=True, progress=False)
    assert restored == 0 and len(problems) == 2 and "cannot write" in one_sentence(problems[1])


def test_nothing_but_what_is_needed_is_loaded():
    """Neither module `resource`, which Windows lacks, nor the large libraries that restoring has no use for."""
    code = "import sys; sys.modules['resource'] = None; import sipl_min.photos; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert not {"matplotlib", "skimage", "scipy", "png"} & {*done.stdout.split()}
