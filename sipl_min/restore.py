"""Photos through a model: of any kind, alone or as a batch, whole or in windows where memory is short."""

import contextlib
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

from .files import InputError, batch_of, from_tensor, to_array


@torch.no_grad()
def restore(model, image, steps=None, feedback="privilege", tile=None, overlap=64, progress=False):
    """See `SIPL.restore`."""
    many = isinstance(image, (list, tuple))
    given = list(image) if many else [image]
    images = [to_array(i) for i in given]
    x = batch_of(images)
    size = choose_window(model, len(x), *x.shape[-2:], tile, overlap)
    steps = int(model.settings.fusion) if steps is None else steps
    own = next(model.parameters())  # its device and dtype
    y = windows(lambda part: model.refine(part.to(own), steps, feedback).to(x), x, size, overlap, progress)
    y = [from_tensor(a[None], like=i) for a, i in zip(y, images)]
    y = [torch.from_numpy(a).to(g.device) if isinstance(g, torch.Tensor) else a for a, g in zip(y, given)]
    return y if many else y[0]


def choose_window(model, batch, h, w, tile=None, overlap=64):
    """Sides of the windows in which `restore` works on photos of h x w pixels: (rows, columns)."""
    if type(overlap) is not int or overlap < 0:
        raise InputError(f"overlap={overlap!r} must be a whole number of pixels, 0 or more")
    least = math.ceil((2 * overlap + 16) / 16) * 16
    if tile is not None:
        if type(tile) is not int or tile and (tile < least or tile % 16):
            raise InputError(f"tile={tile!r} must be 0, or a multiple of 16 above twice the overlap={overlap}")
        return (min(h, tile), min(w, tile)) if tile else (h, w)
    device = next(model.parameters()).device
    room = free_memory(device) / 2
    room = min(room, 4e9) if device.type == "cpu" else room
    return window_size(h, w, max(int(room / batch / bytes_per_pixel(model)), least**2))


def bytes_per_pixel(model):
    """What refinement takes above the weights: measured 50 to 70 bytes for each of the channels at full size."""
    s = model.settings
    channels = s.dim if hasattr(s, "dim") else 4 * max(s.encoder_channels + s.decoder_channels)  # wrapped: a guess
    return 18 * channels * next(model.parameters()).element_size()


def free_memory(device):
    """Bytes that a computation on this device may still take, as far as can be told."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [2**33]  # where nothing is told
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as f:
        free = [1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))]
    with contextlib.suppress(OSError, ValueError):  # what a container may use
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        cache = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)  # given back when needed
        free.append(int((group / "memory.max").read_text()) - used + (int(cache[1]) if cache else 0))
    return max(min(free), 0)


def window_size(h, w, pixels):
    """Sides of the window, multiples of 16, with which an image is cut if only so many pixels fit: (rows, columns)."""
    rows = min(h, max(16, math.isqrt(pixels) // 16 * 16))
    columns = min(w, max(16, pixels // rows // 16 * 16))
    return min(h, max(rows, pixels // columns // 16 * 16)), columns


def windows(function, x, size, overlap=64, progress=False):
    """function(x) for an image x (B, C, H, W), a window at a time, the results blended where windows overlap.

    Args:
        function: (B, C, h, w) -> the same shape. size: (rows, columns) of a window.
        overlap: pixels that neighbours share at least; there, weights fall off linearly towards a window's edge.
    """
    h, w = x.shape[-2:]
    if size[0] >= h and size[1] >= w:
        return function(x)
    total, weights = torch.zeros_like(x), x.new_zeros(1, 1, h, w)
    corners = [(top, left) for top in starts(h, size[0], overlap) for left in starts(w, size[1], overlap)]
    for top, left in tqdm(corners, unit="window", disable=not progress, leave=False):
        place = (..., slice(top, top + size[0]), slice(left, left + size[1]))
        part = function(x[place])
        ramps = [torch.arange(1, n + 1, device=x.device) for n in part.shape[-2:]]
        down, right = (torch.minimum(r, r.flip(0)).clamp(max=overlap + 1).to(x) for r in ramps)
        weight = down[:, None] * right
        total[place] += part * weight
        weights[place] += weight
    return total.div_(weights)


def starts(length, window, overlap):
    """Where windows begin, evenly spread; but for the last, multiples of 16, where the network's grid lies as ever."""
    if window >= length:
        return [0]
    count = math.ceil((length - overlap) / (window - overlap))
    while True:
        found = {round(i * (length - window) / (count - 1) / 16) * 16 for i in range(count - 1)}
        found = sorted({s for s in found if s < length - window} | {length - window})
        if all(b - a <= window - overlap for a, b in zip(found, found[1:])):
            return found
        count += 1
