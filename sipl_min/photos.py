"""From a photo, on disk or in memory, to the restored photo: reading, writing, windows for large ones, folders."""

import contextlib
import io
import itertools
import math
import re
import struct
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

from .fast import FAST, accelerate
from .files import InputError, Name, atomic_write

JPEG, TIFF = (".jpg", ".jpeg", ".jpe", ".jfif"), (".tif", ".tiff")
WRITTEN = (".png", *JPEG, *TIFF, ".bmp", ".webp")  # these keep their format
READ = (".gif", ".avif", ".jp2", ".j2k")  # these become PNG
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
PACKAGES = dict.fromkeys(RAW, "rawpy") | dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif")
PACKAGES |= {".jxl": "pillow-jxl-plugin", ".psd": "psd-tools"}  # these only such a package reads
PHOTOS = (*WRITTEN, *READ, *PACKAGES)  # what a folder is searched for
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "WEBP", "GIF", "AVIF", "JPEG2000", "TIFF")  # as Pillow calls them
MAX_PIXELS = 200e6


def find(folder: Name) -> list[Path]:
    """The photos in a folder and its subfolders, sorted, without hidden ones. InputError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}: check the path")
    files = [p for p in folder.rglob("*") if p.suffix.lower() in PHOTOS and not p.is_dir()]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise InputError(f"no photos in {str(folder)!r}: put files ending in {', '.join(WRITTEN)} there")
    return sorted(files)


# --------------------------------------------------------------------------------------------------------- reading
def read(path: Name, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """Read a photo: H x W [x C], uint8, uint16 or float, upright, palettes resolved, with all its bits.

    Raises InputError where the file is missing, damaged, no photo, an animation, or has more than `max_pixels`."""
    return load(path, max_pixels)[0]


def load(path, max_pixels):
    """The pixels of a photo; and what else its file holds, as options of Pillow's `save`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: check the path")
    pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the only limit is `max_pixels`
    try:
        with warnings.catch_warnings(), open(path, "rb") as f:
            warnings.simplefilter("ignore")  # odd metadata is no damage; damaged pixels raise
            if package := PACKAGES.get(path.suffix.lower()):
                raise InputError(f"reading this kind takes the package {package}: convert it to PNG or TIFF first")
            loader = load_tiff if f.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else load_pillow
            return loader(path, max_pixels)
    except InputError as e:
        raise InputError(f"cannot read {str(path)!r}: {e}") from e
    except Exception as e:  # decoders raise anything from OSError to struct.error
        reason = str(e).strip().split("\n")[0].replace(f" {str(path)!r}", "") or type(e).__name__
        raise InputError(f"cannot read {str(path)!r} as an image ({reason}): is it damaged or of another kind?") from e
    finally:
        Image.MAX_IMAGE_PIXELS = pillow_limit


def check_size(pixels, pages, max_pixels):
    if pages > 1:
        raise InputError(f"it is an animation or has several pages ({pages}): take it apart first")
    if pixels > max_pixels:
        limit = f"the limit of {max_pixels / 1e6:.1f} million: raise it with max_pixels (--max-pixels)"
        raise InputError(f"its {pixels / 1e6:.1f} million pixels are above {limit}")


def load_pillow(path, max_pixels):
    with Image.open(path) as image:
        if image.format not in FORMATS:
            raise InputError(f"the format {image.format} is not read here: convert it to PNG or TIFF first")
        previews = image.format == "MPO" and "Multi-Frame" not in str(image.mpinfo)  # as in JPEGs of many cameras
        check_size(image.width * image.height, 1 if previews else getattr(image, "n_frames", 1), max_pixels)
        content = path.read_bytes() if image.format in ("AVIF", "JPEG2000", "WEBP") else b""
        deep = re.search(rb"av1C..[\x40-\x7f\xc0-\xff]|\xff\x4f\xff\x51.{38}[\x08-\x7f\x88-\xff]", content, re.DOTALL)
        if deep and image.mode != "I;16":  # a flag of AVIF, the bits of JPEG 2000
            raise InputError("it has more than 8 bits a channel, which would be lost: convert it to TIFF first")
        array, info = pillow_pixels(path, image)
        kinds = dict(icc_profile=bytes, exif=bytes, xmp=bytes, comment=bytes, dpi=tuple)
        kept = {name: info[name] for name, kind in kinds.items() if isinstance(info.get(name), kind)}
        if kept.get("icc_profile", b"")[16:20] == b"CMYK":  # the pixels become RGB
            del kept["icc_profile"]
        if image.format == "PNG":
            kept["pnginfo"] = PngImagePlugin.PngInfo()
            for key, text in image.text.items():
                kept["pnginfo"].add_text(key, info.get(key, text))
        if image.format in ("JPEG", "MPO"):
            tables = [image.quantization.get(layer[3]) for layer in image.layer[:2]]  # luma, chroma
            kept |= dict(qtables=tables, subsampling=max(JpegImagePlugin.get_sampling(image), 0)) if all(tables) else {}
        if image.format == "WEBP" and re.search(rb"VP8[L ]", content)[0] == b"VP8L":
            kept |= dict(lossless=True, exact=True)
    return array, kept


def pillow_pixels(path, image):
    """The pixels of an opened image, and what Pillow knows of it; upright, in the metadata too."""
    wide = re.search(r"'(\w+);16([BLN])'", str(image.tile[:1]))  # e.g. "RGB;16B": how bytes become pixels
    image = upright(image)
    alpha = image.has_transparency_data
    if image.mode.startswith("I;16"):
        array = np.asarray(image).astype(np.uint16)
    elif wide:
        array = deep_color(path, image, *wide.groups())
    elif image.mode in ("1", "L", "LA"):
        array = np.asarray(image.convert("LA" if alpha else "L"))
    elif image.mode in ("I", "F"):
        array = np.asarray(image)
    else:  # palettes, CMYK and the like become RGB
        array = np.asarray(image.convert("RGBA" if alpha else "RGB"))
    return array, image.info


def upright(image):
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # what is marked as EXIF is none
        del image.info["exif"]
        return image


def deep_color(path, image, kind, order):
    """Of 16-bit color Pillow keeps the high bytes; told that the byte order is the other one, it keeps the low ones."""
    if kind not in ("LA", "RGB", "RGBA") or "transparency" in image.info:
        raise InputError("16 bits a channel are read as gray, RGB or RGBA only: convert it first")
    little = order == "L" or order == "N" and sys.byteorder == "little"
    with Image.open(path) as again:
        rawmode = "RGBA" if kind == "LA" else f"{kind};16{'B' if little else 'L'}"  # LA has the four bytes of RGBA
        args = again.tile[0].args
        again.tile = [again.tile[0]._replace(args=rawmode if isinstance(args, str) else (rawmode, *args[1:]))]
        low = np.asarray(upright(again))
    return low.view(">u2").astype(np.uint16) if kind == "LA" else np.asarray(image).astype(np.uint16) << 8 | low


DESCRIBING = (270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 33432, 33723)  # other tags of a TIFF tell of pixels
IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
PROFILE = 34675


def load_tiff(path, max_pixels):
    """tifffile reads floats and 16 bits; Pillow reads compressions and kinds of color that it does not."""
    with tifffile.TiffFile(path) as f:
        page = f.pages[0]
        pages = sum(not p.subfiletype & 0b101 for p in f.pages)  # without thumbnails and masks
        check_size(page.imagewidth * page.imagelength, pages, max_pixels)
        if 8 < page.bitspersample < 16:
            raise InputError(f"{page.bitspersample} bits a channel are not read: convert it to 16 bits first")
        tags, exif = Image.Exif(), Image.Exif()
        tags.endian, tags.bigtiff = f.byteorder, f.is_bigtiff
        tags.load_from_fp(f.filehandle, page.offset)
        for tag in (t for t in (*DESCRIBING, *IFDS) if t in tags):
            exif[tag] = tags.get_ifd(tag) if tag in IFDS else tags[tag]
        kept = dict(exif=exif.tobytes())
        if tags.get(PROFILE, b"")[16:20] in (b"RGB ", b"GRAY"):
            kept["icc_profile"] = tags[PROFILE]
        try:
            if page.photometric > 2 or page.bitspersample in (2, 4):  # 0, 1: gray, where 0 is white or black; 2: RGB
                raise ValueError(f"{page.bitspersample} bits of {page.photometric.name} are not read")
            image = page.asarray()
        except ValueError:  # of the compression too
            with contextlib.suppress(UnidentifiedImageError), Image.open(path) as opened:
                return pillow_pixels(path, opened)[0], kept
            raise
        image = ~image if page.photometric == 0 else image
        image = image.astype(np.uint8) * 255 if image.dtype == bool else image
        image = np.moveaxis(image, 0, -1) if page.planarconfig == 2 and image.ndim == 3 else image
        orientation = tags.get(274, 1)
    image = image[:, ::-1] if orientation in (2, 4, 5, 7) else image
    return np.rot90(image, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)), kept


# --------------------------------------------------------------------------------------------------------- writing
def write(path: Name, image: np.ndarray, like: Name | None = None) -> None:
    """Write a photo whole or not at all. Raises InputError where the format cannot hold it.

    `like` is the file that the photo was read from: color profile, EXIF, resolution and texts are carried over, and the
    quality of a JPEG, and whether a WebP is lossless; JPEG and WebP are of quality 95 else."""
    if fault := unfit(path, image):
        raise InputError(fault)
    ending, kept = Path(path).suffix.lower(), load(like, math.inf)[1] if like else {}
    options = dict(quality=95, subsampling=0) | kept
    if ending in JPEG and "qtables" in kept:
        options["quality"] = -1  # any other scales the tables
    image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if ending in TIFF:
                temporary.write_bytes(tiff(image, kept))
            elif image.dtype.itemsize == 2 and image.ndim == 3:
                temporary.write_bytes(deep_png(image, kept))
            else:
                iio.imwrite(temporary, image.astype(image.dtype.newbyteorder("=")), plugin="pillow", **options)
        except (ValueError, struct.error) as e:  # the image, or its metadata, is too large for the format
            raise InputError(f"cannot write {str(path)!r}: {e}") from e


def unfit(path, image):
    """Why a photo like `image` cannot be written under this name, or ""."""
    ending, channels = Path(path).suffix.lower(), np.atleast_3d(image).shape[2]
    if ending not in WRITTEN:
        return f"cannot write {str(path)!r}: end the name in one of {', '.join(WRITTEN)}"
    eight_bits = image.dtype == np.uint8 and (channels in (1, 3) or channels == 4 and ending == ".webp")
    if ending in TIFF or eight_bits or ending == ".png" and image.dtype.kind == "u":
        return ""
    better = ".tif" if image.dtype.kind == "f" else ".png or .tif"
    return f"{str(path)!r} cannot hold {image.dtype} with {channels} channels: name it {better}"


def tiff(image, kept):
    """EXIF is a TIFF without pixels: add the pixels and the tags that tell of them."""
    h, w, channels = np.atleast_3d(image).shape
    number = 3 if image.dtype.kind == "f" else 1
    tags = Image.Exif()
    tags.load(kept.get("exif", b""))
    tags.update({256: w, 257: h, 258: (8 * image.itemsize,) * channels, 259: 1, 262: 2 if channels > 2 else 1})
    tags.update({277: channels, 278: h, 279: image.nbytes, 339: (number,) * channels})
    tags[273] = 0  # where the pixels are, from the end of the tags
    if channels in (2, 4):
        tags[338] = 2  # the last channel is alpha
    if "dpi" in kept:
        tags.update({282: kept["dpi"][0], 283: kept["dpi"][1], 296: 2})
    if "icc_profile" in kept:
        tags[PROFILE] = kept["icc_profile"]
    tags.endian = "<"
    return tags.tobytes().removeprefix(b"Exif\0\0") + image.astype(image.dtype.newbyteorder("<")).tobytes()


def deep_png(image, kept):
    """16-bit color, which Pillow does not write: let it write the bytes as gray levels, then replace the header."""
    h, w, channels = image.shape
    content, palette = io.BytesIO(), bytes(768)
    levels = Image.frombytes("P", (w * channels * 2, h), image.astype(">u2").tobytes())
    levels.putpalette(palette)
    levels.save(content, "png", **kept)
    header = struct.pack(">4sIIBBBBB", b"IHDR", w, h, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    header += struct.pack(">I", zlib.crc32(header))
    chunk = struct.pack(">I4s768sI", 768, b"PLTE", palette, zlib.crc32(b"PLTE" + palette))
    return content.getvalue()[:12] + header + content.getvalue()[33:].replace(chunk, b"", 1)


# ------------------------------------------------------------------------------------------------- arrays, tensors
def to_tensor(image: np.ndarray) -> torch.Tensor:
    """H x W or H x W x C, uint8, uint16 or float in [0, 1] -> (1, 3, H, W) float32 in [0, 1].

    Gray becomes three equal channels, alpha is left out. Raises InputError for other shapes, kinds and values."""
    if image.ndim not in (2, 3) or 0 in image.shape or image.ndim == 3 and image.shape[2] > 4:
        raise InputError(f"a photo must be H x W or H x W x C with C = 1, 2, 3 or 4, not {image.shape}")
    if not (image.dtype.kind == "f" or image.dtype.kind == "u" and image.dtype.itemsize <= 2):
        raise InputError(f"a photo must be uint8, uint16 or float in [0, 1], not {image.dtype}")
    color, _ = split_alpha(image)
    top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    x = torch.from_numpy(np.array(color, np.float32, order="C")) / top  # a copy: it may be read-only
    return check_range(x).permute(2, 0, 1)[None].expand(-1, 3, -1, -1).contiguous()


def from_tensor(x: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """(1, 3, H, W) -> a photo of the shape, dtype and alpha of the photo `like`; clamped, rounded to nearest."""
    color, alpha = split_alpha(like)
    y = x[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    y = y.mean(2, keepdims=True) if color.shape[2] == 1 else y
    y = np.rint(y * np.iinfo(like.dtype).max) if like.dtype.kind == "u" else y
    return np.concatenate([y.astype(like.dtype), alpha], axis=2).reshape(like.shape).astype(like.dtype, copy=False)


def split_alpha(image):  # H x W [x C] -> color (H, W, 1 or 3), alpha (H, W, 0 or 1)
    image = np.atleast_3d(image)
    return np.split(image, [image.shape[2] - (image.shape[2] % 2 == 0)], axis=2)


def check_range(x):
    low, high = (float(v) for v in x.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise InputError(f"a float photo must hold values in [0, 1], found {low:.3g} to {high:.3g}: scale or clean it")
    return x


# ------------------------------------------------------------------------------------------------------- restoring
@torch.no_grad()
def restore(model, photo, steps=None, feedback="privilege", tile=None, overlap=64, progress=False):
    """A photo in, the restored photo out, of the same kind. The model runs accelerated, and is left as it was.

    Args:
        photo: an array H x W or H x W x C (gray, RGB, with or without alpha, which stays), uint8, uint16 or float in
            [0, 1]; or a float tensor (C, H, W) or (B, C, H, W) in [0, 1], C = 1 or 3; or a file, which gives an array.
        steps, feedback: as in `SIPL.refine`; steps=None is what suits the weights.
        tile: the side of windows in pixels, a multiple of 16, where large photos are cut into windows and blended; 0
            for the photo as a whole, None for what free memory allows. overlap: pixels that windows share, at least.
    Raises InputError where photo, tile or overlap cannot work, and where the result is not finite."""
    from .weights import default_steps

    steps = default_steps(model) if steps is None else steps
    photo = read(photo) if isinstance(photo, Name) else photo
    photo = photo if isinstance(photo, torch.Tensor) else np.asarray(photo)
    x = to_tensor(photo) if isinstance(photo, np.ndarray) else batch(photo)
    side = window_side(model, x.shape, tile, overlap)
    own = next(model.parameters())  # of the model's device and dtype
    with accelerated(model):
        y = windows(lambda part: model.refine(part.to(own), steps, feedback).to(x), x, side, overlap, progress)
    if not y.isfinite().all():
        finite = all(p.isfinite().all() for p in model.parameters())
        cause = f"{own.dtype} overflows, use bfloat16 or float32" if finite else "its weights are not"
        raise InputError(f"what the model makes of this photo is not finite: {cause}")
    if isinstance(photo, np.ndarray):
        return from_tensor(y, like=photo)
    y = y.mean(1, keepdim=True) if photo.shape[-3] == 1 else y
    return y.clamp(0, 1).to(photo).reshape(photo.shape)


def batch(x):  # a tensor -> (B, 3, H, W) float32
    if x.ndim not in (3, 4) or x.shape[-3] not in (1, 3) or 0 in x.shape or not x.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}"
        raise InputError(f"a tensor must be float, (B, 3, H, W) or (3, H, W), in [0, 1], not {found}")
    return check_range(x.detach().float()).reshape(-1, *x.shape[-3:]).expand(-1, 3, -1, -1)


@contextlib.contextmanager
def accelerated(model):
    plain = not any(type(m) in FAST.values() for m in model.modules())
    accelerate(model)
    try:
        yield
    finally:
        if plain:
            accelerate(model, fast=False)


# --------------------------------------------------------------------------------------------------------- windows
def windows(function, x, side, overlap=64, progress=False):
    """function(x) for x (B, C, H, W), a window of side x side pixels at a time, results blended where they overlap.

    Windows start at multiples of 16, but for the last, so that the network's grid lies as in the whole image."""
    H, W = x.shape[-2:]
    if side >= max(H, W):
        return function(x)
    total, weights = torch.zeros_like(x), x.new_zeros(1, 1, H, W)
    tops, lefts = ([*range(0, n - side, (side - overlap) // 16 * 16), max(n - side, 0)] for n in (H, W))
    for top, left in tqdm([*itertools.product(tops, lefts)], unit="window", disable=not progress, leave=False):
        place = (..., slice(top, top + side), slice(left, left + side))
        y = function(x[place])
        ramps = [torch.arange(1, n + 1, device=x.device) for n in y.shape[-2:]]
        down, right = (torch.minimum(ramp, ramp.flip(0)).to(x) for ramp in ramps)  # falls linearly towards the edges
        total[place] += y * down[:, None] * right
        weights[place] += down[:, None] * right
    return total.div_(weights)


def window_side(model, shape, tile=None, overlap=64):
    """The side of the windows in which images of a shape (B, C, H, W) are restored."""
    B, _, H, W = shape
    least = math.ceil((2 * overlap + 16) / 16) * 16
    if overlap < 0 or overlap != int(overlap):
        raise InputError(f"overlap={overlap} must be a whole number of pixels, 0 or more")
    if tile and (tile < least or tile % 16):
        raise InputError(f"tile={tile} must be 0, or a multiple of 16 above twice the overlap={overlap}")
    if tile is not None:
        return int(tile) or max(H, W)
    own, s = next(model.parameters()), model.settings
    channels = s.dim if hasattr(s, "dim") else 4 * max(*s.encoder_channels, *s.decoder_channels)  # wrapped: a guess
    room = free_memory(own.device) / 2 / (B * channels * own.element_size())
    pixels = int(room / 18)  # measured: at most 17 numbers for each channel of a pixel
    return max(H, W) if pixels >= H * W else max(math.isqrt(pixels) // 16 * 16, least)


def free_memory(device):
    """Bytes that a computation on this device may still take, as far as can be told; of a CPU's, at most 8 GB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [8e9]
    with contextlib.suppress(OSError, ValueError):
        lines = read_text("/proc/meminfo").splitlines()
        free += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError, KeyError):  # what a container may use
        limit, used, stat = (read_text(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current", "stat"))
        cache = dict(line.split() for line in stat.splitlines())["inactive_file"]  # given back when needed
        free.append(max(int(limit) - int(used) + int(cache), 0))
    return min(free)


def read_text(path):
    return Path(path).read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- folders
def restore_folder(model, source, target, steps=None, *, force=False, max_pixels=MAX_PIXELS, progress=True, **options):
    """Restore a photo, or all photos of a folder and its subfolders, into files of the same names and kinds.

    What a format cannot hold becomes PNG. What is in `target` already is skipped, unless `force`. `progress` shows a
    bar, and a line for each photo that became PNG. options: feedback, tile, overlap of `restore`.
    Returns how many were restored, how many skipped, and a sentence for each photo that failed.
    Raises InputError where nothing can be done, or `source` is a single photo that failed."""
    source, target = Path(source), Path(target)
    jobs = plan(source, target)
    window_side(model, (1, 3, 8, 8), options.get("tile"), options.get("overlap", 64))  # fail early
    restored, skipped, problems = 0, 0, []
    options |= dict(steps=steps, progress=progress and len(jobs) == 1)
    with accelerated(model):
        for path, place, png in tqdm(jobs, unit="photo", disable=not progress or len(jobs) == 1):
            try:
                written = restore_file(model, path, place, png, force, max_pixels, options)
            except (InputError, RuntimeError, MemoryError, OSError) as e:
                problems.append(sentence(path, e))
                continue
            restored += written is not None
            skipped += written is None
            if progress and written and source.is_dir() and written.suffix != path.suffix:
                tqdm.write(f"{path}: restored as {written.name}")
    if problems and not source.is_dir():
        raise InputError(problems[0])
    return restored, skipped, problems


def restore_file(model, path, place, png, force, max_pixels, options):
    """Where the restored photo was written; None where it was there already."""
    if place.exists() and not force:
        return None
    photo = read(path, max_pixels)
    if unfit(place, photo):
        place = png
    if fault := unfit(place, photo):
        raise InputError(fault)
    if place.exists() and not force:
        return None
    write(place, restore(model, photo, **options), like=path)
    return place


def plan(source, target):
    """Photos, each with the place for what becomes of it, and with that for a PNG, if the first cannot hold it."""
    files, root = [source], source.parent
    if source.is_dir():
        files, root = find(source), source
        if target.is_file():
            raise InputError(f"{str(target)!r} is a file: name a folder for the restored photos")
        if source.resolve() in target.resolve().parents:  # what was restored earlier is not restored again
            files = [p for p in files if target.resolve() not in p.resolve().parents]
        if not files:
            raise InputError(f"no photos in {str(source)!r} outside {str(target)!r}: put some there")
    names = [path.relative_to(root) for path in files]
    stems = Counter(name.with_suffix("") for name in names)
    jobs = []
    for path, name in zip(files, names):
        png = name.with_suffix(".png") if stems[name.with_suffix("")] == 1 else name.with_name(f"{name.name}.png")
        place = name if name.suffix.lower() in WRITTEN else png
        jobs.append((path, target / place, target / png))
    if not source.is_dir() and not target.is_dir():  # the name of a file
        jobs = [(source, target, target)]
    for path, place, _ in jobs:
        if place.resolve() == path.resolve():
            raise InputError(f"{str(place)!r} is the original itself: name another place for what is restored")
    return jobs


def sentence(path, e):
    text = str(e).split("\n")[0]
    if isinstance(e, MemoryError) or isinstance(e, RuntimeError) and "memory" in text:
        text = "not enough memory, pass a smaller tile (--tile)"
    return text if repr(str(path)) in text else f"{str(path)!r}: {text}"
