"""From a photo, on disk or in memory, to the restored photo: reading, writing, windows for large ones, folders."""

import itertools
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from .degrade import mirror
from .fast import accelerated
from .files import InputError, Name, atomic_write
from .weights import default_feedback, default_steps, refiner

TIFF = (".tif", ".tiff")
PHOTOS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", *TIFF, ".bmp", ".webp")  # what is read, restored and written
MARGIN = 16  # pixels that `restore` mirrors


def find(folder: Name, empty: bool = False) -> list[Path]:
    """The photos in a folder and its subfolders, sorted, without hidden ones. InputError for none, unless `empty`."""
    if not Path(folder).is_dir():
        raise InputError(f"no folder {str(folder)!r}: check the path")
    files = sorted(p / name for p, _, names in walk(folder) for name in names if Path(name).suffix.lower() in PHOTOS)
    if not (files or empty):
        raise InputError(f"no photos in {str(folder)!r}: put files ending in {', '.join(PHOTOS)} there")
    return files


def walk(folder):
    """As `os.walk`, in order, without what is hidden, and through links to folders: each folder once."""
    seen = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        real = {os.path.realpath(os.path.join(place, f)): f for f in folders if not f.startswith(".")}
        folders[:] = sorted(f for path, f in real.items() if path not in seen)
        seen |= {*real}
        yield Path(place), folders, sorted(name for name in names if not name.startswith("."))


def other_kinds(folder):
    """How many files of a folder end otherwise than photos do, as in "2 .heic, 1 .txt"; empty for none."""
    counts = Counter(Path(name).suffix.lower() or name for _, _, names in walk(folder) for name in names)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common() if ending not in PHOTOS)


# ------------------------------------------------------------------------------------------------------------ files
def read(path: Name) -> np.ndarray:
    """Read a photo: H x W [x C], uint8, uint16 or float (a TIFF's other types too), upright, with all its bits.

    Raises InputError where the file is missing, damaged, no photo, an animation, larger than Pillow allows, or has
    more bits than are read: color of 16 bits is read from TIFF only."""
    return load(path)[0]


def load(path):
    """The pixels of a photo as `read` gives them; and its profile, EXIF and resolution: options of `Image.save`."""
    kinds = ("TIFF",) if Path(path).suffix.lower() in TIFF else ("PNG", "JPEG", "BMP", "WEBP")
    try:
        if "TIFF" in kinds:
            with tifffile.TiffFile(path) as file:
                if file.pages[0].bitspersample > 8:
                    return load_deep(file.pages)
        with Image.open(path, formats=kinds) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a JPEG with previews behind it
                raise InputError("it is an animation or has several pages, take it apart first")
            if ";16B" in str(image.tile) and image.mode != "I;16":  # Pillow would drop 8 bits
                raise InputError("color and alpha of 16 bits are read from .tif only, convert it to a 16-bit TIFF")
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:  # some strange EXIF cannot be written anew: it is left out, the photo turned all the same
                image.info.pop("exif", None)
                image = ImageOps.exif_transpose(image)
        if image.mode != "I;16":  # palettes, CMYK and the like become RGB
            color = "L" if image.mode in ("1", "L", "LA") else "RGB"
            image = image.convert(color + "A" * image.has_transparency_data)
        names = ("icc_profile",) if "TIFF" in kinds else ("icc_profile", "exif", "dpi")
        kept = {name: image.info[name] for name in names if name in image.info}
        if kept.get("icc_profile", b"")[16:20] == b"CMYK":  # the pixels are RGB now
            del kept["icc_profile"]
        return np.asarray(image), kept
    except Exception as e:  # decoders raise anything from OSError to struct.error
        reason = str(e) or type(e).__name__
        if isinstance(e, Image.DecompressionBombError):
            reason += " Raise PIL.Image.MAX_IMAGE_PIXELS (--max-pixels)"
        raise InputError(f"cannot read {str(path)!r} as {', '.join(kinds)}: {reason}") from e


def load_deep(pages):
    """As `load`, for the pages of a TIFF of more than 8 bits, which Pillow would drop."""
    page = pages[0]
    if len(pages) > 1:
        raise InputError("it has several pages, take it apart first")
    if page.bitspersample % 16 or page.photometric not in (1, 2) or 1 in page.extrasamples:  # 1: multiplied by alpha
        raise InputError("its kind of color, bits or alpha is not read, convert it to a plain 16-bit RGB or gray TIFF")
    image = page.asarray()
    image = np.moveaxis(image, 0, -1) if page.planarconfig > 1 and image.ndim == 3 else image  # a plane each
    orientation = page.tags.valueof(274, default=1)
    image = image[:, ::-1] if orientation in (2, 4, 5, 7) else image
    image = np.rot90(image, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0))
    return image, dict(icc_profile=page.iccprofile) if page.iccprofile else {}


def write(path: Name, image: np.ndarray, like: Name | None = None) -> None:
    """Write a photo whole or not at all. Raises InputError where the format cannot hold it; and what Pillow raises.

    `like` is the file that the photo was read from: color profile, EXIF and resolution are carried over (to and
    from TIFF only the profile). JPEG and WebP are of quality 95."""
    check_fits(path, image)
    kept = load(like)[1] if like else {}
    with atomic_write(path) as temporary:
        if Path(path).suffix.lower() not in TIFF:
            iio.imwrite(temporary, image, plugin="pillow", quality=95, subsampling=0, **kept)
            return
        layout = dict(photometric="rgb" if image.shape[2:] > (2,) else "minisblack")
        layout["planarconfig"] = "contig" if image.ndim == 3 else None
        layout["extrasamples"] = [2] if image.shape[2:] in ((2,), (4,)) else None  # alpha, not multiplied in
        layout |= dict(metadata=None, iccprofile=kept.get("icc_profile"))
        iio.imwrite(temporary, image, plugin="tifffile", **layout)


def check_fits(path, image):
    """Raise InputError where a file of this name cannot hold all channels and bits of a photo."""
    ending, channels = Path(path).suffix.lower(), np.atleast_3d(image).shape[2]
    if ending not in PHOTOS:
        raise InputError(f"cannot write {str(path)!r}: end the name in one of {', '.join(PHOTOS)}")
    alpha = {".png": (2, 4), ".webp": (4,)}.get(ending, ())
    eight = image.dtype == np.uint8 and channels in (1, 3, *alpha)
    sixteen = image.dtype == np.uint16 and channels == 1 and ending == ".png"
    if not (eight or sixteen or ending in TIFF):
        raise InputError(f"{str(path)!r} cannot hold {image.dtype} with {channels} channels: name a TIFF (.tif)")


# ------------------------------------------------------------------------------------------------- arrays, tensors
def to_tensor(photo: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A photo as an array or a tensor -> (B, 3, H, W) float32 in [0, 1].

    The array is H x W or H x W x C, C = 1 to 4, uint8, uint16 or float in [0, 1]; B = 1, alpha is left out. The tensor
    is float, (C, H, W) or (B, C, H, W), C = 1 or 3, in [0, 1]. Gray becomes three equal channels.
    Raises InputError for other shapes, kinds and values."""
    array = isinstance(photo, np.ndarray) and photo.ndim in (2, 3) and photo.shape[2:] <= (4,)
    tensor = isinstance(photo, torch.Tensor) and photo.ndim in (3, 4) and photo.shape[-3] in (1, 3)
    if array and photo.dtype.str[1:] in ("u1", "u2", "f2", "f4", "f8"):
        color, _ = split_alpha(photo)
        top = np.iinfo(photo.dtype).max if photo.dtype.kind == "u" else 1
        x = torch.from_numpy(np.array(color, np.float32, order="C")) / top  # a copy: it may be read-only
        x = x.permute(2, 0, 1)[None]
    elif tensor and photo.is_floating_point():
        x = photo.detach().float().reshape(-1, *photo.shape[-3:])
    else:
        wanted = "an array H x W or H x W x C, C = 1 to 4, uint8, uint16 or float, or a float tensor ([B,] 3, H, W)"
        found = f"{type(photo).__name__} {getattr(photo, 'dtype', '')} {getattr(photo, 'shape', '')}"
        raise InputError(f"a photo must be {wanted}, not {found}")
    low, high = (float(v) for v in x.aminmax())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise InputError(f"a float photo must hold values in [0, 1], found {low:.3g} to {high:.3g}: scale or clean it")
    return x.expand(-1, 3, -1, -1).contiguous()


def from_tensor(x: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """(1, 3, H, W) -> a photo of the shape, dtype and alpha of the photo `like`; clamped, rounded to nearest."""
    color, alpha = split_alpha(like)
    y = x[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    y = y.mean(2, keepdims=True) if color.shape[2] == 1 else y
    y = np.rint(y * np.iinfo(like.dtype).max) if like.dtype.kind == "u" else y
    return np.concatenate([y.astype(like.dtype), alpha], axis=2).reshape(like.shape).astype(like.dtype, copy=False)


def split_alpha(image):
    """H x W [x C] -> color (H, W, 1 or 3), alpha (H, W, 0 or 1)."""
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
    x = to_tensor(photo)
    own = next(model.parameters())  # of the model's device and dtype
    side = window_side(model, x.shape, tile, overlap)
    side = math.inf if side >= max(x.shape[-2:]) else side  # its margin cuts no photo into windows
    with accelerated(model):
        see = refiner(model, x, steps, feedback)
        y = mirrored(lambda x: windows(lambda part: see(part.to(own)).to(x), x, side, overlap, progress), x)
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
def restore_folder(model, source, target, steps=None, *, force=False, progress=True, **options):
    """Restore a photo, or all photos of a folder and its subfolders, into files of the same names and kinds.

    What is in `target` already is skipped, unless `force`. `progress` shows a bar. options: feedback, tile, overlap of
    `restore`. Returns how many were restored, how many skipped, and a sentence for each photo that failed.
    Raises InputError where nothing can be done, or `source` is a single photo that failed; OSError where the target
    cannot be written; and what `restore` raises for options that cannot work."""
    source = Path(source)
    jobs = plan(source, Path(target))
    restored, skipped, problems = 0, 0, []
    options |= dict(steps=steps, progress=progress and len(jobs) == 1)
    # options that cannot work, and folders that cannot be written, are found out now and not after minutes
    restore(model, np.zeros((16, 16, 3), np.uint8), **options)
    for folder in {place.parent for place in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    for place, path in tqdm(jobs.items(), unit="photo", disable=not progress or len(jobs) == 1):
        if place.is_file() and not force:
            skipped += 1
            continue
        try:
            photo = read(path)
            check_fits(place, photo)
            write(place, restore(model, photo, **options), like=path)
            restored += 1
        except Exception as e:  # one bad photo never stops the others
            reason = str(e).split("\n")[0] or type(e).__name__
            problems.append(reason if repr(str(path)) in reason else f"{str(path)!r}: {reason}")
    if problems and not source.is_dir():
        raise InputError(problems[0])
    return restored, skipped, problems


def plan(source, target):
    """Where each restored photo goes, and the photo that it comes from."""
    if source.is_dir():
        files = find(source)
        if source.resolve() in target.resolve().parents:  # what was restored earlier is not restored again
            files = [path for path in files if target.resolve() not in path.resolve().parents]
        jobs = {target / path.relative_to(source): path for path in files}
    elif source.exists():
        jobs = {target / source.name if target.is_dir() or not target.suffix else target: source}
    else:
        raise InputError(f"no file {str(source)!r}: check the path")
    originals = {path.resolve() for path in jobs.values()}
    for place in jobs:
        if place.resolve() in originals:
            raise InputError(f"{str(place)!r} is an original itself: name another place for what is restored")
    return jobs
