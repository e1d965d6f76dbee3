"""Mirrored edges, and tiles: a layer works on a piece of the image at a time, which bounds its memory."""

import math

import torch

# Elements of the widest tensor that a layer makes at once while no gradient is recorded. On a CPU 2**21 floats (8 MB)
# stay in the cache, which makes the layers faster too; a GPU wants more work at a time.
TILE = {"cpu": 2**21, "cuda": 2**26}


def mirror(x, axis, before, after):
    """Reflect-pad one axis, as often as a tiny image needs (`F.pad` cannot pad by more than the image's own size)."""
    n = x.shape[axis]
    i = torch.arange(-before, n + after, device=x.device) % max(2 * n - 2, 1)
    return x.index_select(axis, torch.minimum(i, (2 * n - 2 - i).abs())) if before or after else x


def pad(x, multiple=8):
    """(B, 3, H, W) with right and bottom mirrored up to the next multiples of 8, which three halvings need."""
    return mirror(mirror(x, -2, 0, -x.shape[-2] % multiple), -1, 0, -x.shape[-1] % multiple)


def tiles(x, wide, halo=1):
    """Cut x (B, C, H, W) into tiles for a layer that makes `wide` channels and looks `halo` pixels around.

    Yields (place, tile, inner): the tile with its halo, where in the image its middle belongs, and that middle in the
    tile. One tile, the image, where it is small, or where gradients are recorded and would keep all tiles anyway.
    """
    h, w = x.shape[-2:]
    room = TILE.get(x.device.type, TILE["cuda"]) // (len(x) * wide)  # pixels
    side = max(h, w) if torch.is_grad_enabled() or h * w <= room else max(32, int(room**0.5))
    rows, columns = (math.ceil(n / math.ceil(n / side)) for n in (h, w))  # tiles of much the same size
    for top in range(0, h, rows):
        for left in range(0, w, columns):
            up, back = max(top - halo, 0), max(left - halo, 0)
            yield ((..., slice(top, top + rows), slice(left, left + columns)),
                   x[..., up : top + rows + halo, back : left + columns + halo],
                   (..., slice(top - up, top - up + rows), slice(left - back, left - back + columns)))  # fmt: skip


def local(layer, x, wide, halo=1, own=False):
    """layer(x), tile by tile: what the layer makes in between never exists for the whole image.

    With `own`, x is nobody else's, and the result (of as many channels) may be written over it.
    """
    y, waiting = x if own else None, []
    for place, tile, inner in tiles(x, wide, halo):
        part = layer(tile)
        if tile.shape == x.shape:
            return part
        if y is None:
            size = len(part), part.shape[1], *x.shape[-2:]
            y = torch.empty(size, dtype=part.dtype, device=x.device, memory_format=torch.channels_last)
        waiting.append((place, part[inner]))
        # over x, a part waits until no tile to come looks at what it replaces: until the next row but one
        while waiting and not (own and waiting[0][0][1].stop >= place[1].start):
            before, part = waiting.pop(0)
            y[before] = part
    for before, part in waiting:
        y[before] = part
    return y


def add(x, parts):
    """x (B, C, H, W) + parts, pairs (place, part) as `tiles` makes places, in a new tensor."""
    y = None
    for place, part in parts:
        if part.shape == x.shape:
            return x + part
        y = torch.empty_like(x) if y is None else y
        torch.add(x[place], part, out=y[place])
    return y
