"""Photos on disk and in memory, and files that are written whole or not at all."""

import contextlib
import os
import warnings
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps

Name = str | os.PathLike  # of a file or folder
PHOTOS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

UMASK = os.umask(0)
os.umask(UMASK)  # reading it means setting it


class InputError(ValueError):
    """Something handed in cannot be used. The message is one sentence: what is wrong, where, and what to do."""


def asset(name):
    """Path of a file of the project's `data/` folder, in a checkout or in an installed package."""
    here = Path(__file__).parent
    places = [here.parent / "data" / name, here / "assets" / name]
    for path in places:
        if path.exists():
            return path
    raise InputError(f"the project's own file data/{name} is missing: install or clone sipl_min again")


@contextlib.contextmanager
def whole(path):
    """`with whole(path) as temporary:` write to `temporary`; it takes the name `path` only once it is complete."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # same folder and ending: renaming is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)  # some libraries write for the owner alone
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"cannot write {str(path)!r}: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------- photos in memory


def check_photo(image):
    """Raise InputError unless `image` is H x W or H x W x C (C = 1..4), uint8, uint16, or float in [0, 1]."""
    if not (image.ndim == 2 or image.ndim == 3 and image.shape[2] in (1, 2, 3, 4)) or 0 in image.shape:
        raise InputError(f"a photo must be H x W or H x W x C with C = 1, 2, 3 or 4, not {image.shape}")
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
        raise InputError(f"a photo must be uint8, uint16 or float in [0, 1], not {image.dtype}")
    if image.dtype.kind == "f" and not (image.min() >= 0 and image.max() <= 1):  # NaN fails both
        raise InputError(f"a float photo must hold values in [0, 1], found {image.min():.3g} to {image.max():.3g}")


def check_batch(x, model, name="x"):
    """Raise InputError unless `x` is a tensor (B, 3, H, W) in the dtype of `model`, without NaN."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
        shape = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"{name} must be a tensor (B, 3, H, W), not {shape}: for NumPy photos use model.restore")
    own = next(model.parameters()).dtype
    if x.dtype != own and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise InputError(f"{name} is {x.dtype}, the model {own}: convert it, with values in [0, 1]")
    if not model.training and x.isnan().any():  # in training the loss tells, without waiting for the device
        raise InputError(f"{name} holds NaN: clean it first")


def check_privileged(privileged, x, widths):
    """Raise InputError unless these are features as `model.privileged` makes them, `widths` channels, for images x."""
    given = privileged if isinstance(privileged, (list, tuple)) else ()
    if [getattr(p, "ndim", 0) == 4 and len(p) in (1, len(x)) and p.shape[1] for p in given] != widths:
        raise InputError(f"privileged must be {len(widths)} features (B, C, h, w), C = {widths}, B = {len(x)} "
                         "as in x or 1: pass what model.privileged(image) returns")  # fmt: skip


def check_loop(model, steps, feedback, stop, tolerance):
    """Raise InputError unless `SIPL.refine` can work with these."""
    if feedback not in ("privilege", "chain"):
        raise InputError(f"unknown feedback {feedback!r}: choose 'privilege' or 'chain'")
    if stop not in (None, "converged"):
        raise InputError(f"unknown stop {stop!r}: choose 'converged' or None")
    if type(tolerance) not in (int, float) or not tolerance >= 0:  # NaN fails too
        raise InputError(f"tolerance={tolerance!r} must be a number >= 0")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps must be a whole number >= 0, not {steps!r}")
    if steps:
        check_fusion(model, "refinement")


def check_fusion(model, what):
    """Raise InputError where a model has no Proxy Fusion."""
    if not model.settings.fusion:
        raise InputError(f"{what} needs Proxy Fusion, and this model is a plain backbone: pass steps 0")


def check_range(x):
    """Raise InputError where values are far outside [0, 1]: noise may leave it a little, a 0..255 image does not."""
    low, high = (float(v) for v in x.detach().aminmax())
    if not (low >= -1 and high <= 2):  # NaN fails every comparison
        raise InputError(f"x must hold values in [0, 1], found {low:.3g} to {high:.3g}: scale or clean it first")


def split_alpha(image):
    """H x W [x C] -> colour (H, W, 1 or 3) and alpha (H, W, 0 or 1)."""
    image = np.atleast_3d(image)
    return np.split(image, [image.shape[2] - (image.shape[2] % 2 == 0)], axis=2)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """A photo -> (1, 3, H, W) float32 in [0, 1]; gray becomes three equal channels, alpha is left out."""
    check_photo(image)
    colour, _ = split_alpha(image)
    top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    x = torch.from_numpy(np.array(colour, np.float32, order="C")) / top  # a copy: it may be read-only
    return x.permute(2, 0, 1)[None].expand(-1, 3, -1, -1).contiguous()


def to_array(image):
    """A photo, array or tensor on any device, as an array. Raises InputError for tensors that NumPy cannot hold."""
    if not isinstance(image, torch.Tensor):
        return np.asarray(image)
    try:
        return image.detach().cpu().numpy()
    except (TypeError, RuntimeError) as e:  # bfloat16, sparse, or without data
        raise InputError(f"a photo must be uint8, uint16 or float in [0, 1], not a tensor of {image.dtype} on "
                         f"{image.device}: convert it") from e  # fmt: skip


def batch_of(images):
    """Photos of one H x W -> (B, 3, H, W). Raises InputError where there is none, or their sizes differ."""
    tensors = [to_tensor(image) for image in images]
    if len({t.shape for t in tensors}) != 1:
        raise InputError(f"a batch needs photos of one size, not {sorted({i.shape[:2] for i in images}) or 'none'}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def from_tensor(x: torch.Tensor, like: np.ndarray) -> np.ndarray:
    """(1, 3, H, W) -> a photo of the shape, dtype and alpha of the photo `like`; clamped, rounded to nearest."""
    colour, alpha = split_alpha(like)
    y = x[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    y = y.mean(2, keepdims=True) if colour.shape[2] == 1 else y
    y = np.rint(y * np.iinfo(like.dtype).max) if like.dtype.kind == "u" else y
    return np.concatenate([y.astype(like.dtype), alpha], axis=2).reshape(like.shape)


# ------------------------------------------------------------------------------------------ photos on disk


def read(path: Name) -> np.ndarray:
    """Read a photo: H x W [x C], uint8, uint16 or float; turned upright as its EXIF says; palettes resolved.

    Raises InputError where the file is missing, damaged or not an image.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {str(path)!r}: check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is no damage; damaged pixels raise
            if deep_png(path):
                import png  # Pillow would cut 16-bit colour to 8 bits

                with open(path, "rb") as f:
                    w, h, rows, _ = png.Reader(file=f).asDirect()
                    return np.vstack([np.asarray(r, dtype=np.uint16) for r in rows]).reshape(h, w, -1)
            image = read_tiff(path) if decoder(path) == "tifffile" else read_pillow(path)
    except Exception as e:  # decoders raise anything from OSError to struct.error
        reason = str(e).strip().split("\n")[0] or type(e).__name__
        raise InputError(f"cannot read {str(path)!r} as an image ({reason}): is it damaged or of another kind?") from e
    return image.astype(np.uint8) * 255 if image.dtype == bool else image


def read_pillow(path):
    """Upright, and in one of the kinds that `check_photo` takes: palettes, CMYK and the like become RGB."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("L", "RGB") and image.has_transparency_data:
            image = image.convert(image.mode + "A")
        elif image.mode not in ("1", "L", "LA", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        array = np.asarray(image)
    return array.astype(np.uint16) if image.mode.startswith("I") else array  # 16-bit gray may come as 32 bits


def read_tiff(path):
    """The first page, upright; Pillow reads the kinds and compressions that tifffile alone does not, at 8 bits."""
    with tifffile.TiffFile(path) as f:
        page = f.pages[0]
        if page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB):
            whole_array = f.series[0].kind == "shaped" and page.ndim == 2  # one array, spread over pages by tifffile
            try:
                image = f.series[0].asarray() if whole_array else page.asarray()
            except ValueError:  # a compression that needs the package imagecodecs
                return read_pillow(path)
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and image.ndim == 3:
                image = np.moveaxis(image, 0, -1)
            turn = page.tags.get("Orientation")
            return upright(image, int(turn.value) if turn else 1)
    return read_pillow(path)


def upright(image, orientation):
    """Undo the turning and mirroring that the TIFF and EXIF tag Orientation (1..8) tells of."""
    if orientation in (5, 6, 7, 8):
        image = np.swapaxes(image, 0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def decoder(path):
    return "tifffile" if Path(path).suffix.lower() in (".tif", ".tiff") else "pillow"


def check_header(path):
    """Raise InputError where a file does not begin like an image; quick, for going through a large folder."""
    try:
        iio.improps(path, plugin=decoder(path))
    except Exception:
        read(path)  # says what is wrong


def deep_png(path):
    """True for a PNG with 16 bits a channel and more than gray."""
    with open(path, "rb") as f:
        head = f.read(26)
    return head[:8] == b"\x89PNG\r\n\x1a\n" and len(head) == 26 and head[24] == 16 and head[25] != 0


def write(path: Name, image: np.ndarray) -> None:
    """Write a photo whole or not at all. Raises InputError where the format cannot hold it."""
    path, ending = Path(path), Path(path).suffix.lower()
    channels = np.atleast_3d(image).shape[2]
    check_writable(path, image)
    image = image[..., 0] if image.ndim == 3 and channels == 1 else image
    with whole(path) as temporary:
        if image.dtype == np.uint16 and channels > 1 and ending == ".png":
            import png

            mode = {2: "LA;16", 3: "RGB;16", 4: "RGBA;16"}[channels]
            png.from_array(image.reshape(len(image), -1), mode).save(temporary)
        elif decoder(path) == "tifffile":
            kind = dict(photometric="rgb" if channels > 2 else "minisblack")
            kind |= dict(planarconfig="contig") if channels > 1 else {}
            kind |= dict(extrasamples=["unassalpha"]) if channels in (2, 4) else {}
            tifffile.imwrite(temporary, image, **kind)
        else:
            quality = dict(quality=95) if ending in (".jpg", ".jpeg", ".webp") else {}
            iio.imwrite(temporary, image, plugin="pillow", **quality)


def check_writable(path, image):
    """Raise InputError, before any work is done, where a photo like `image` cannot be written under this name."""
    ending, channels = Path(path).suffix.lower(), np.atleast_3d(image).shape[2]
    if ending not in PHOTOS:
        raise InputError(f"cannot write {str(path)!r}: end the name in one of {', '.join(PHOTOS)}")
    wide = ending in (".png", ".tif", ".tiff")  # all other kinds: 8 bits, and of them only .webp knows alpha
    alpha = wide or (1, 3, *[4] * (ending == ".webp")).count(channels)
    if not alpha or not wide and image.dtype != np.uint8 or ending == ".png" and image.dtype.kind == "f":
        raise InputError(f"{str(path)!r} cannot hold {image.dtype} with {channels} channels: name it .tif"
                         + ("" if image.dtype.kind == "f" else " or .png"))  # fmt: skip


def find_photos(folder):
    """The photos in a folder and its subfolders, sorted. Raises InputError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r}: check the path")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTOS and not p.name.startswith("."))
    if not found:
        raise InputError(f"no photos in {str(folder)!r}: put files ending in {', '.join(PHOTOS)} there")
    return found
