"""From a photo, on disk or in memory, to the restored photo: reading, writing, windows for large ones, folders."""

import itertools
import math
import os
import re
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin
from tqdm import tqdm

from .degrade import mirror
from .fast import accelerated
from .files import InputError, Name, atomic_write
from .weights import default_feedback, default_steps, refiner

JPEG, TIFF = (".jpg", ".jpeg", ".jpe", ".jfif"), (".tif", ".tiff")
WRITTEN = (".png", *JPEG, *TIFF, ".bmp", ".webp")  # these keep their format
READ = (".gif", ".avif", ".jp2", ".j2k")  # these become PNG
RAW = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
PACKAGES = dict.fromkeys(RAW, "rawpy") | dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif")
PACKAGES |= {".jxl": "pillow-jxl-plugin", ".psd": "psd-tools"}  # these only such a package reads
PHOTOS = (*WRITTEN, *READ, *PACKAGES)  # what a folder is searched for
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "AVIF", "JPEG2000", "TIFF")  # as Pillow calls them
DEEP = rb"av1C..[\x40-\x7f\xc0-\xff]|\xff\x4f\xff\x51.{38}[\x08-\x7f\x88-\xff]"  # a flag of AVIF, bits of JPEG 2000
KEPT = dict(icc_profile=bytes, exif=bytes, xmp=bytes, comment=bytes, dpi=tuple)  # of Pillow's `info`, if of these types
ALONE = threading.RLock()  # Pillow's limit and Python's warnings belong to all threads
MAX_PIXELS = 200e6
MARGIN = 16  # pixels that `restore` mirrors around a photo


def find(folder: Name, empty: bool = False) -> list[Path]:
    """The photos in a folder and its subfolders, sorted, without hidden ones. InputError for none, unless `empty`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}: check the path")
    files = sorted(p for p in visible(folder) if p.suffix.lower() in PHOTOS)
    if not (files or empty):
        raise InputError(f"no photos in {str(folder)!r}: put files ending in {', '.join(WRITTEN)} there")
    return files


def visible(folder):
    """All files in a folder and its subfolders, without hidden ones."""
    return [place / name for place, _, names in walk(folder) for name in names]


def walk(folder):
    """As `os.walk`, in order, without what is hidden, and through links to folders: each folder once."""
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = {os.path.realpath(os.path.join(place, f)): f for f in folders if not f.startswith(".")}
        folders[:] = sorted(f for path, f in real.items() if path not in seen)
        seen |= {*real}
        yield Path(place), folders, sorted(name for name in names if not name.startswith("."))


def other_kinds(folder):
    """How many files of a folder end otherwise than photos do, as in "2 .ppm, 1 .txt"; empty for none."""
    counts = Counter(p.suffix.lower() or p.name for p in visible(folder) if p.suffix.lower() not in PHOTOS)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))


# --------------------------------------------------------------------------------------------------------- reading
def read(path: Name, max_pixels: float = MAX_PIXELS) -> np.ndarray:
    """Read a photo: H x W [x C], uint8, uint16 or float (a TIFF's other types too), upright, with all its bits.

    Raises InputError where the file is missing, damaged, no photo, an animation, has more than `max_pixels`, or more
    bits than are read: color of 16 bits is read from TIFF only."""
    return load(path, max_pixels)[0]


def load(path, max_pixels=math.inf):
    """The pixels of a photo; and what else its file holds, as options of Pillow's `save`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: check the path")
    with ALONE, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is no damage; damaged pixels raise
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # `max_pixels` is the only limit
        try:
            with open(path, "rb") as f:
                start = f.read(4)
            if package := PACKAGES.get(path.suffix.lower()):
                raise InputError(f"reading this kind takes the package {package}, convert it to PNG or TIFF first")
            loader = load_tiff if start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") else load_pillow
            return loader(path, max_pixels)
        except Exception as e:  # decoders raise anything from OSError to struct.error
            reason = str(e).split("\n")[0] or type(e).__name__
            raise InputError(f"cannot read {str(path)!r} as a photo: {reason}") from e
        finally:
            Image.MAX_IMAGE_PIXELS = before


def check_size(pixels, pages, max_pixels):
    if pages > 1:
        raise InputError(f"it is an animation or has several pages ({pages}), take it apart first")
    if pixels > max_pixels:
        limit = f"{max_pixels / 1e6:.1f} million, raise it with max_pixels (--max-pixels)"
        raise InputError(f"its {pixels / 1e6:.1f} million pixels are above the limit of {limit}")


def load_pillow(path, max_pixels):
    with Image.open(path, formats=FORMATS) as image:
        previews = image.format == "MPO" and "Multi-Frame" not in str(image.mpinfo)  # as in JPEGs of many cameras
        check_size(image.width * image.height, 1 if previews else getattr(image, "n_frames", 1), max_pixels)
        content = path.read_bytes() if image.format in ("AVIF", "JPEG2000") else b""
        deep = re.search(DEEP, content, re.DOTALL) or re.search(";16[BLN]", str(image.tile))  # e.g. RGB;16B in PNG
        if deep and not image.mode.startswith("I;16"):
            raise InputError("more than 8 bits a channel are read from gray only, convert it to a plain 16-bit TIFF")
        image.load()
        try:
            upright = ImageOps.exif_transpose(image)
        except Exception:  # no EXIF, or some that cannot be written anew: it is left out, the photo turned all the same
            image.info.pop("exif", None)
            upright = ImageOps.exif_transpose(image)
        info = upright.info
        kept = {name: info[name] for name, kind in KEPT.items() if isinstance(info.get(name), kind)}
        if kept.get("icc_profile", b"")[16:20] == b"CMYK":  # the pixels become RGB
            del kept["icc_profile"]
        if image.format == "PNG":
            texts = kept["pnginfo"] = PngImagePlugin.PngInfo()
            for key, text in image.text.items():
                changed = info.get(key)  # `info` knows that the pixels are upright
                add = texts.add_itxt if key.startswith("XML:") else texts.add_text  # XMP
                add(key, changed if isinstance(changed, str) else text)
        if image.format in ("JPEG", "MPO"):
            kept |= dict(qtables=image.quantization, subsampling=max(JpegImagePlugin.get_sampling(image), 0))
        if image.format == "WEBP" and re.search(rb"VP8[L ]", path.read_bytes())[0] == b"VP8L":
            kept |= dict(lossless=True, exact=True)
        if upright.mode not in ("I", "F") and not upright.mode.startswith("I;16"):
            color = "L" if upright.mode in ("1", "L", "LA") else "RGB"  # palettes, CMYK and the like become RGB
            upright = upright.convert(color + "A" * upright.has_transparency_data)
        elif upright.has_transparency_data:
            raise InputError("a color that stands for transparent is not read from 16 bits, save it as TIFF with alpha")
        return np.asarray(upright), kept


def load_tiff(path, max_pixels):
    """tifffile reads plain gray and RGB of any depth; other compressions and kinds of color are Pillow's."""
    with tifffile.TiffFile(path) as f:
        pages = [p for p in f.pages if not p.subfiletype & 0b101]  # without thumbnails and masks
        page = (pages or f.pages)[0]
        check_size(page.imagewidth * page.imagelength, len(pages), max_pixels)
        if 8 < page.bitspersample < 16:
            raise InputError(f"{page.bitspersample} bits a channel are not read, convert it to 16 bits first")
        deflated = page.compression in (1, 8, 32946)  # or not compressed
        if not deflated or page.photometric > 2 or page.bitspersample < 8:
            if page.index:  # where Pillow would take the first
                raise InputError("its first page is a thumbnail, save it as a plain TIFF of one page first")
            if page.bitspersample > 8 and page.samplesperpixel > 1:
                raise InputError("more than 8 bits a channel are not read here, convert it to a plain 16-bit TIFF")
            image, kept = load_pillow(path, max_pixels)
            inverted = page.photometric == 0 and image.dtype == np.uint16  # gray where 0 is white, left so by Pillow
            return 65535 - image if inverted else image, kept
        if page.extrasamples[:1] == (1,):
            raise InputError("its colors are multiplied by alpha, save it with unassociated alpha first")
        image = page.asarray()
        image = np.moveaxis(image, 0, -1) if page.planarconfig > 1 and image.ndim == 3 else image  # a plane each
        if page.photometric == 0:  # gray where 0 is white
            color, alpha = split_alpha(image)
            top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
            image = np.concatenate([top - color, alpha], axis=2).reshape(image.shape)
        kept = dict(icc_profile=page.iccprofile) if page.iccprofile else {}
        if 282 in page.tags and page.tags.valueof(296, default=2) > 1:  # 1: no unit, so no resolution
            kept["dpi"] = page.get_resolution("inch")
        orientation = page.tags.valueof(274, default=1)
    image = image[:, ::-1] if orientation in (2, 4, 5, 7) else image
    return np.rot90(image, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)), kept


# --------------------------------------------------------------------------------------------------------- writing
def write(path: Name, image: np.ndarray, like: Name | None = None) -> None:
    """Write a photo whole or not at all. Raises InputError where the format cannot hold it; and what Pillow raises.

    `like` is the file that the photo was read from: color profile, EXIF, resolution and texts are carried over (to and
    from TIFF only profile and resolution), and the quality of a JPEG, and whether a WebP is lossless; JPEG and WebP
    are of quality 95 else."""
    check_fits(path, image)
    ending = Path(path).suffix.lower()
    kept = load(like)[1] if like else {}
    image = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    with atomic_write(path) as temporary:
        if ending in TIFF:
            options = dict(resolution=kept["dpi"], resolutionunit="inch") if "dpi" in kept else {}
            options["iccprofile"] = kept.get("icc_profile")
            options["photometric"] = "rgb" if image.shape[2:] > (2,) else "minisblack"
            options["planarconfig"] = "contig" if image.ndim == 3 else None
            options["extrasamples"] = [2] if image.shape[2:] in ((2,), (4,)) else None  # alpha, not multiplied in
            iio.imwrite(temporary, image, plugin="tifffile", metadata=None, **options)
        else:
            options = kept if ending in JPEG and "qtables" in kept else dict(quality=95, subsampling=0) | kept
            iio.imwrite(temporary, image, plugin="pillow", **options)


def check_fits(path, image):
    ending, channels = Path(path).suffix.lower(), np.atleast_3d(image).shape[2]
    if ending not in WRITTEN:
        raise InputError(f"cannot write {str(path)!r}: end the name in one of {', '.join(WRITTEN)}")
    alpha = {".png": (2, 4), ".webp": (4,)}.get(ending, ())
    eight = image.dtype == np.uint8 and channels in (1, 3, *alpha)
    sixteen = ending == ".png" and channels == 1 and image.dtype.kind == "u" and image.itemsize == 2
    if not (eight or sixteen or ending in TIFF):
        better = "PNG (.png)" if image.dtype == np.uint8 else f"{8 * image.itemsize}-bit TIFF (.tif)"
        raise InputError(f"{str(path)!r} cannot hold {image.dtype} with {channels} channels: name a {better}")


# ------------------------------------------------------------------------------------------------- arrays, tensors
def to_tensor(image: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A photo in memory, as `restore` takes it -> (B, 3, H, W) float32 in [0, 1]; B = 1 for an array H x W [x C].

    Gray becomes three equal channels, alpha is left out. Raises InputError for other shapes, kinds and values."""
    size = image.shape
    if isinstance(image, torch.Tensor):
        if len(size) not in (3, 4) or size[-3] not in (1, 3) or 0 in size or not image.is_floating_point():
            wanted = "a tensor must be float, (B, 3, H, W) or (3, H, W), in [0, 1]"
            raise InputError(f"{wanted}, not {image.dtype} {tuple(size)}")
        x = image.detach().float().reshape(-1, *size[-3:]).expand(-1, 3, -1, -1)
    else:
        shaped = len(size) in (2, 3) and 0 not in size and size[2:] <= (4,)
        if not shaped or image.dtype.kind not in "fu" or image.dtype.kind == "u" and image.itemsize > 2:
            wanted = "H x W or H x W x C with C = 1, 2, 3 or 4, and uint8, uint16 or float in [0, 1]"
            raise InputError(f"a photo must be {wanted}, not {image.dtype} {size}")
        color, _ = split_alpha(image)
        top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
        x = torch.from_numpy(np.array(color, np.float32, order="C")) / top  # a copy: it may be read-only
        x = x.permute(2, 0, 1)[None].expand(-1, 3, -1, -1).contiguous()
    low, high = (float(v) for v in x.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise InputError(f"a float photo must hold values in [0, 1], found {low:.3g} to {high:.3g}: scale or clean it")
    return x


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


# ------------------------------------------------------------------------------------------------------- restoring
@torch.no_grad()
def restore(model, photo, steps=None, feedback=None, tile=None, overlap=64, progress=False):
    """A photo in, the restored photo out, of the same kind. The model runs accelerated, and is left as it was.

    The network sees the photo with 16 mirrored pixels around it, so that borders come back like the rest.

    Args:
        photo: an array H x W or H x W x C (gray, RGB, with or without alpha, which stays), uint8, uint16 or float in
            [0, 1]; or a float tensor (C, H, W) or (B, C, H, W) in [0, 1], C = 1 or 3; or a file, which gives an array.
        steps, feedback: as in `SIPL.refine`; None is what suits the weights.
        tile: the side of windows in pixels, a multiple of 16, where large photos are cut into windows and blended; 0
            for the photo as a whole, None for what free memory allows. overlap: pixels that windows share, at least.
    Raises InputError where photo, tile or overlap cannot work, and where the result is not finite."""
    steps = default_steps(model) if steps is None else steps
    feedback = feedback or default_feedback(model)
    photo = read(photo) if isinstance(photo, Name) else photo
    if isinstance(photo, Image.Image) and photo.mode not in ("L", "LA", "RGB", "RGBA", "I;16", "F"):
        raise InputError(f"a photo of Pillow's mode {photo.mode!r}: pass its file, or photo.convert('RGB')")
    photo = photo if isinstance(photo, torch.Tensor) else np.asarray(photo)
    x = to_tensor(photo)
    own = next(model.parameters())  # of the model's device and dtype
    side = window_side(model, x.shape, tile, overlap)
    side = math.inf if side >= max(x.shape[-2:]) else side  # its margin cuts no photo into windows

    def refine(x):
        return windows(lambda part: see(part.to(own)).to(x), x, side, overlap, progress)

    with accelerated(model):
        see = refiner(model, x, steps, feedback)
        y = mirrored(refine, x)
    if not y.isfinite().all():
        raise InputError(f"the result is not finite: {own.dtype} overflows, use float32, or the weights are broken")
    if isinstance(photo, np.ndarray):
        return from_tensor(y, like=photo)
    y = y.mean(1, keepdim=True) if photo.shape[-3] == 1 else y
    return y.clamp(0, 1).to(photo).reshape(photo.shape)


def mirrored(function, x, margin=MARGIN):
    """function(x) for x (B, C, H, W) with a mirrored margin, which is cut off again."""
    H, W = x.shape[-2:]
    y = function(mirror(mirror(x, -2, margin, margin), -1, margin, margin))
    return y[..., margin : margin + H, margin : margin + W]


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
    if overlap < 0 or tile and (tile < least or tile % 16):
        wanted = "0, or a multiple of 16 above twice the overlap, which is 0 or more"
        raise InputError(f"tile={tile}, overlap={overlap}: tile must be {wanted}")
    if tile is not None:
        return int(tile) or max(H, W)
    own, s = next(model.parameters()), model.settings
    channels = s.dim if hasattr(s, "dim") else 4 * max(*s.encoder_channels, *s.decoder_channels)  # wrapped: a guess
    # measured: at most 17 numbers for each channel of a pixel, and half of the memory stays free
    pixels = int(free_memory(own.device) // (2 * 18 * B * channels * own.element_size()))
    return max(H, W) if pixels >= H * W else max(math.isqrt(pixels) // 16 * 16, least)


def free_memory(device):
    """Bytes that a computation on this device may still take, as far as can be told; of a CPU's, at most 8 GB."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    linux = Path("/proc/meminfo")
    told = re.search(r"MemAvailable:\s+(\d+)", linux.read_text(encoding="utf-8")) if linux.exists() else None
    return min(1024 * int(told[1]), 8e9) if told else 8e9


# --------------------------------------------------------------------------------------------------------- folders
def restore_folder(model, source, target, steps=None, *, force=False, max_pixels=MAX_PIXELS, progress=True, **options):
    """Restore a photo, or all photos of a folder and its subfolders, into files of the same names and kinds.

    Kinds that are only read become PNG: a.gif becomes a.gif.png. What is in `target` already is skipped, unless
    `force`. `progress` shows a bar, and a line for each photo that became PNG. options: feedback, tile, overlap of
    `restore`. Returns how many were restored, how many skipped, and a sentence for each photo that failed.
    Raises InputError where nothing can be done, or `source` is a single photo that failed."""
    source = Path(source)
    jobs = plan(source, Path(target))
    options |= dict(steps=steps, progress=progress and len(jobs) == 1)
    try:
        restore(model, np.zeros((16, 16, 3), np.uint8), **options)  # options that cannot work are found out now
    except (ValueError, RuntimeError) as e:
        raise InputError(str(e).split("\n")[0]) from e
    folder = next(iter(jobs)).parent
    try:  # so is a folder in which no file can be made
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f"cannot write to the folder {str(folder)!r}: {e.strerror or e}") from e
    restored, skipped, problems = 0, 0, []
    for place, path in tqdm(jobs.items(), unit="photo", disable=not progress or len(jobs) == 1):
        if place.is_file() and not force:
            skipped += 1
            continue
        try:
            photo = read(path, max_pixels)
            check_fits(place, photo)
            write(place, restore(model, photo, **options), like=path)
            restored += 1
            if progress and path.suffix.lower() not in WRITTEN:
                tqdm.write(f"{path}: restored as {place.name}")
        except Exception as e:  # one bad photo never stops the others
            text = str(e).split("\n")[0] or type(e).__name__
            if "memory" in text.lower() and not isinstance(e, InputError):
                text += ": pass a smaller tile (--tile)"
            problems.append(text if repr(str(path)) in text else f"{str(path)!r}: {text}")
    if problems and not source.is_dir():
        raise InputError(problems[0])
    return restored, skipped, problems


def plan(source, target):
    """The places of restored photos, each with the photo that it comes from."""
    if not source.exists():
        raise InputError(f"no file {str(source)!r}: check the path")
    files, root = (find(source), source) if source.is_dir() else ([source], source.parent)
    if source.resolve() in target.resolve().parents:  # what was restored earlier is not restored again
        files = [p for p in files if target.resolve() not in p.resolve().parents]
    if not files:
        raise InputError(f"no photos in {str(source)!r} but those in {str(target)!r}: check the paths")
    jobs, originals = {}, {path.resolve() for path in files}
    for path in files:
        name = path.relative_to(root)
        place = target / (name if path.suffix.lower() in WRITTEN else f"{name}.png")
        if not source.is_dir() and not target.is_dir() and target.suffix:  # the name of a file
            place = target
        if place.resolve() in originals:
            raise InputError(f"{str(place)!r} is an original itself: name another place for what is restored")
        if place in jobs:
            raise InputError(f"{str(path)!r} and {str(jobs[place])!r} would be one file, {str(place)!r}: rename one")
        jobs[place] = path
    return jobs
