"""Photos on disk: every kind comes back as it went; bad files get one sentence."""

import warnings

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from PIL import Image

from sipl_min import InputError
from sipl_min.files import find_photos, from_tensor, read, to_tensor, whole, write

rng = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 2), (6, 9, 3), (6, 9, 4)])
def test_png_and_tiff_keep_everything(tmp_path, dtype, shape):
    image = rng.integers(0, np.iinfo(dtype).max, shape, dtype)
    for name in ("a.png", "a.tif"):
        write(tmp_path / name, image)
        assert np.array_equal(read(tmp_path / name), image), name
        assert read(tmp_path / name).dtype == dtype


def test_float_goes_to_tiff_only(tmp_path):
    image = rng.random((6, 9, 3)).astype(np.float32)
    write(tmp_path / "a.tif", image)
    assert np.array_equal(read(tmp_path / "a.tif"), image)
    for name in ("a.png", "a.jpg"):
        with pytest.raises(InputError, match="cannot hold float32 with 3 channels: name it .tif"):
            write(tmp_path / name, image)
    with pytest.raises(InputError, match="cannot hold uint8 with 4 channels"):
        write(tmp_path / "a.jpg", np.zeros((4, 4, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_jpeg_stays_close(tmp_path, photo):
    write(tmp_path / "a.jpg", photo)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - photo).mean() < 4


def test_exif_rotation_palette_and_bits(tmp_path):
    image = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").shape == (30, 20, 3)
    image.convert("P").save(tmp_path / "palette.png")
    assert read(tmp_path / "palette.png").shape == (20, 30, 3)
    image.convert("1").save(tmp_path / "bits.png")
    assert set(np.unique(read(tmp_path / "bits.png"))) == {0, 255}


def test_colours_survive_every_way_of_storing_them(tmp_path):
    red = Image.new("RGB", (20, 16), (255, 51, 0))  # a colour of the web palette
    for mode, name in (("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("P", "a.png"), ("YCbCr", "a.jpg"), ("P", "p.tif")):
        red.convert(mode).save(tmp_path / name)
        image = read(tmp_path / name)
        assert image.shape == (16, 20, 3) and np.abs(image.astype(int) - (255, 51, 0)).max() < 8, (mode, name)
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg"):
        red.save(tmp_path / "c.tif", compression=compression)
        assert np.abs(read(tmp_path / "c.tif").astype(int) - (255, 51, 0)).max() < 8, compression


def test_broken_metadata_does_not_cost_the_photo(tmp_path, photo):
    write(tmp_path / "a.jpg", photo)
    content = (tmp_path / "a.jpg").read_bytes()
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01"  # announces five entries, ends in the first
    (tmp_path / "b.jpg").write_bytes(
        content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:]
    )
    assert np.array_equal(read(tmp_path / "b.jpg"), read(tmp_path / "a.jpg"))


def test_transparency_and_planes(tmp_path):
    grey = Image.new("L", (20, 16), 76)
    grey.save(tmp_path / "g.png", transparency=76)
    assert read(tmp_path / "g.png").shape == (16, 20, 2) and (read(tmp_path / "g.png")[..., 1] == 0).all()
    Image.new("RGB", (20, 16), (1, 2, 3)).convert("P").save(tmp_path / "p.png", transparency=0)
    assert read(tmp_path / "p.png").shape == (16, 20, 4)
    planes = rng.integers(0, 255, (3, 18, 19), np.uint8)
    tifffile.imwrite(tmp_path / "p.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(read(tmp_path / "p.tif"), planes.transpose(1, 2, 0))
    deep = rng.integers(0, 65535, (8, 9, 3), np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", deep.astype(">u2"), byteorder=">", photometric="rgb")
    assert np.array_equal(read(tmp_path / "b.tif"), deep)


def test_tiff_pages_and_orientation(tmp_path):
    colour = rng.integers(0, 255, (2, 8, 9, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "two.tif") as f:
        f.write(colour[0], photometric="rgb", metadata=None)
        f.write(colour[1, :5], photometric="rgb", metadata=None)
    tifffile.imwrite(tmp_path / "stack.tif", colour, photometric="rgb")
    tifffile.imwrite(tmp_path / "grey.tif", colour[..., 0], photometric="minisblack", metadata=None)
    for name, expected in (("two", colour[0]), ("stack", colour[0]), ("grey", colour[0, ..., 0])):
        assert np.array_equal(read(tmp_path / f"{name}.tif"), expected), name
    for orientation in range(1, 9):
        Image.fromarray(colour[0]).save(tmp_path / "o.png")
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(colour[0]).save(tmp_path / "pillow.png", exif=exif)  # Pillow turns PNG as we turn TIFF
        tag = [(274, "H", 1, orientation, False)]
        tifffile.imwrite(tmp_path / "o.tif", colour[0], photometric="rgb", extratags=tag, metadata=None)
        assert np.array_equal(read(tmp_path / "o.tif"), read(tmp_path / "pillow.png")), orientation


def test_webp_keeps_alpha_and_eight_bits_only(tmp_path):
    image = rng.integers(0, 255, (16, 16, 4), np.uint8)
    write(tmp_path / "a.webp", image)
    assert read(tmp_path / "a.webp").shape == image.shape
    with pytest.raises(InputError, match="cannot hold uint16 with 3 channels"):
        write(tmp_path / "a.webp", image[..., :3].astype(np.uint16))


def test_bad_files_get_one_sentence(tmp_path, photo):
    write(tmp_path / "good.png", photo)
    iio.imwrite(tmp_path / "good.jpg", np.tile(photo, (4, 4, 1)))
    for ending in ("png", "jpg"):
        content = (tmp_path / f"good.{ending}").read_bytes()
        for n in (0, 10, len(content) // 2):
            (tmp_path / f"cut.{ending}").write_bytes(content[:n])
            with pytest.raises(InputError, match=f"cannot read '.*cut.{ending}' as an image") as e:
                read(tmp_path / f"cut.{ending}")
            assert "\n" not in str(e.value)
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "text.png")
    with pytest.raises(InputError, match="no file"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="end the name in one of"):
        write(tmp_path / "a.docx", photo)


def test_folders(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        find_photos(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no photos in"):
        find_photos(tmp_path)
    place = tmp_path / "with space and ü"
    for name in ("b.png", "a.JPG", "note.txt", ".hidden.png"):
        place.mkdir(exist_ok=True)
        (place / name).touch()
    assert [p.name for p in find_photos(tmp_path)] == ["a.JPG", "b.png"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with whole(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(RuntimeError), whole(path) as temporary:
        temporary.write_text("half of the sec")
        raise RuntimeError
    assert path.read_text() == "first" and len(list(path.parent.iterdir())) == 1


def test_tensor_conversion_is_exact_and_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (np.uint8, np.uint16):
            values = np.linspace(0, np.iinfo(dtype).max, 4096).astype(dtype).reshape(64, 64)
            for image in (values, np.asfortranarray(values), values[::2, ::-1]):
                image.flags.writeable = False
                assert np.array_equal(from_tensor(to_tensor(image), image), image)
