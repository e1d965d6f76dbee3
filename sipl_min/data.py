"""Clean images to learn from and photos to test on, without a download; and batches cut from them."""

import os
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import torch

from .degrade import COLUMNS, check_setting, degrade, generator
from .files import InputError, check_header, find_photos, read, to_tensor
from .tiles import mirror

# Photographs that come inside the installed scikit-image and Matplotlib. The two lists never meet.
TRAINING = ["astronaut.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "brick.png",
            "coins.png", "grass.png", "gravel.png"]  # fmt: skip
HELD_OUT = {"chelsea": "chelsea.png", "hopper": "grace_hopper.jpg", "camera": "camera.png"}


def installed(name):
    """Path of a sample photo inside the installed scikit-image or Matplotlib."""
    places = [Path(skimage.__file__).parent / "data", Path(matplotlib.get_data_path()) / "sample_data"]
    for folder in places:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{name} is not inside the installed scikit-image or Matplotlib: install the pinned versions")


def held_out():
    """The test photos, never trained on: name -> uint8 (H, W, 3). `camera` is gray, as three equal channels."""
    return {name: np.broadcast_to(np.atleast_3d(read(installed(file))), read(installed(file)).shape[:2] + (3,))
            for name, file in HELD_OUT.items()}  # fmt: skip


def motorcycle_distance():
    """Relative distance (1, H, W) in [0, 1] of `motorcycle_left.png`, 1 far, NaN unknown: 1 - disparity / largest.

    Measured disparity, Middlebury stereo 2014 (Scharstein et al. 2014).
    """
    disparity = torch.from_numpy(np.load(installed("motorcycle_disp.npz"))["arr_0"])
    known = disparity.isfinite() & (disparity > 0)
    return torch.where(known, 1 - disparity / disparity[known].max(), torch.nan)[None]


def dead_leaves(count, size=128, seed=0, leaves=300):
    """Images of occluding textured shapes, uint8 (count, 3, size, size): edges and textures at every scale.

    Front to back, each leaf is an ellipse, diamond or rectangle at a random place with half-axes up to r, where
    p(r) ~ r^-3 makes the statistics scale-invariant (Lee, Mumford & Huang 2001), filled with a colour, a gradient
    and a wave; such images train restorers that work on photos (Achddou, Gousseau & Ladjal 2021).
    """
    g = generator(seed)
    down, right = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    image, open_ = torch.zeros(count, 3, size, size), torch.ones(count, 1, size, size)

    def rand(low, high, channels=1):
        return low + (high - low) * torch.rand(count, channels, 1, 1, generator=g)

    tone = rand(0.1, 0.9) + rand(-0.2, 0.2, 3)  # each image has a mood of its own
    for i in range(leaves):
        # inverse of the distribution function of r^-3 between 0.03 and 1; the last leaf is the ground behind all
        r = 0.03 / (1 - rand(0, 0.999)).sqrt() if i < leaves - 1 else torch.full((count, 1, 1, 1), 9.0)
        y, x, angle = down - rand(0, 1), right - rand(0, 1), rand(0, torch.pi)
        u, v = (x * angle.cos() + y * angle.sin()) / r, (y * angle.cos() - x * angle.sin()) / (r * rand(0.3, 1))
        power = torch.tensor([1.0, 2.0, 8.0])[torch.randint(3, (count, 1, 1, 1), generator=g)]
        inside = (u.abs() ** power + v.abs() ** power + 1e-9) ** (1 / power)  # 1 on the edge
        cover = ((1 - inside) * r * size).clamp(0, 1) * open_  # one soft pixel, where nothing lies in front
        wave = torch.sin(rand(5, 200) * (x * (a := rand(0, 6.3)).cos() + y * a.sin()) + rand(0, 6.3))
        colour = 0.5 * (tone + rand(0, 1)) + 0.25 * (rand(0, 1, 3) - 0.5) + rand(-0.3, 0.3) * u.clamp(-1, 1)
        image += cover * (colour + rand(0, 1) ** 3 * 0.3 * wave)
        open_ = open_ - cover
    grain = rand(0, 0.04) * torch.randn(count, 1, size, size, generator=g)
    return ((image + grain).clamp(0, 1) * 255).byte()


class Images:
    """Clean training images: `len(images)`, `images.crop(i, ...)`. Embedded, or a folder of the user's own photos.

    Args:
        folder: None for the embedded images, half of all crops from photos and half from dead leaves; or a path,
            whose photos then replace them; or a list of H x W x 3 arrays or of paths.
        pairs: for degradations that are on disk and not made here, column -> list of (degraded, clean) paths.
        leaves: how many dead-leaves images; cache: bytes of decoded photos kept in memory.
    Raises InputError where the folder is missing or empty or a file in it is no image.
    """

    def __init__(self, folder=None, leaves=48, seed=0, cache=2**31, pairs=None):
        self.cache, self.kept, self.depths = cache, {}, {}
        self.pairs = {column: several for column, several in (pairs or {}).items() if several}
        if folder is None:
            files = [installed(name) for name in TRAINING]
            self.depths[TRAINING.index("motorcycle_left.png")] = motorcycle_distance()
            made = list(dead_leaves(leaves, seed=seed)) if leaves else []
        elif isinstance(folder, (str, os.PathLike)):
            files, made = find_photos(folder), []
        else:
            files = [Path(image) for image in folder if isinstance(image, (str, os.PathLike))]
            for path in files:
                if not path.is_file():
                    raise InputError(f"no file {str(path)!r}: check the path")
            made = [image for image in folder if not isinstance(image, (str, os.PathLike))]
            made = [(to_tensor(np.asarray(image))[0] * 255).round().byte() for image in made]
            if not files and not made:
                raise InputError("no images given: pass at least one H x W x 3 array, a folder, or None")
        self.sources, self.photos = [*files, *made], len(files)
        if isinstance(folder, (str, os.PathLike)):  # a bad file is named now, not in the middle of the night
            for i, path in enumerate(files):
                if self.cache > 0:  # decoding costs nothing extra where the photo is kept
                    self.load(i)
                else:
                    check_header(path)

    def __len__(self):
        return len(self.sources)

    def names(self):
        """What tells these images from others, so that a resumed training finds the images that it began with."""
        names = [f"{s.name}, {s.stat().st_size} bytes" if isinstance(s, Path) else
                 f"{tuple(s.shape)}, crc {zlib.crc32(s.numpy().tobytes())}" for s in self.sources]  # fmt: skip
        for column, pairs in self.pairs.items():
            crc = zlib.crc32("".join(Path(p).name for pair in pairs for p in pair).encode())
            names.append(f"{column}: {len(pairs)} pairs, crc {crc}")
        return names

    def load(self, i):
        """Image i as uint8 (3, H, W)."""
        return self.sources[i] if isinstance(self.sources[i], torch.Tensor) else self.decode(self.sources[i])

    def decode(self, path):
        if path in self.kept:
            return self.kept[path]
        try:
            image = (to_tensor(read(path))[0] * 255).round().byte()
        except InputError as e:
            raise e if str(path) in str(e) else InputError(f"{str(path)!r} cannot be used: {e}") from e
        if image.numel() <= self.cache:
            self.kept[path] = image
        self.cache -= image.numel()  # below zero the room is used up
        return image

    def crop(self, size, g):
        """A random size x size crop, turned and flipped: uint8 (3, size, size), and its distance (NaN unknown)."""
        groups = [(0, self.photos), (self.photos, len(self))]
        first, last = groups[int(torch.randint(2, (), generator=g))] if 0 < self.photos < len(self) else (0, len(self))
        i = int(torch.randint(first, last, (), generator=g))
        image = self.load(i)
        return cut([image, self.depths.get(i, torch.full((1, *image.shape[-2:]), torch.nan))], size, g)

    def pair(self, column, size, g):
        """A random crop of a pair on disk, both turned and flipped alike: degraded and clean, uint8 (3, size, size)."""
        paths = self.pairs[column][int(torch.randint(len(self.pairs[column]), (), generator=g))]
        both = [self.decode(Path(path)) for path in paths]
        if both[0].shape != both[1].shape:
            raise InputError(f"{str(paths[0])!r} and {str(paths[1])!r} differ in size: leave the pair out")
        return cut(both, size, g)


def cut(images, size, g):
    """The same random size x size crop of images (C, H, W) of one size, turned and flipped; small ones are mirrored."""
    for axis in (-2, -1):
        images = [mirror(t[None], axis, 0, max(size - t.shape[axis], 0))[0] for t in images]
        start = int(torch.randint(images[0].shape[axis] - size + 1, (), generator=g))
        images = [t.narrow(axis, start, size) for t in images]
    turn, flip = int(torch.randint(4, (), generator=g)), int(torch.randint(2, (), generator=g))
    return [torch.rot90(t.flip(-1) if flip else t, turn, (-2, -1)) for t in images]


def batch(images, step, *, setting="cdd11", size=48, count=8, seed=0, device="cpu", mild=0.0):
    """Training batch number `step`: degraded x and clean y, both (count, 3, size, size) in [0, 1], and column names.

    A pure function of its arguments: nothing is remembered between steps, so training resumes where it stopped.
    Crops are cut on the CPU; the degradations run where the batch is. Each crop draws its column evenly, so that no
    task starves, however few images it has; columns in `images.pairs` take their crop from there. A share `mild` of
    the crops is degraded less, x <- y + s (x - y) with s uniform in (0, 1): a network that saw only bad photos spoils
    good ones.
    """
    check_setting(setting)
    g = generator(hash_seed(seed, step))
    crops, depths = zip(*(images.crop(size, g) for _ in range(count)))
    names = list(COLUMNS[setting])
    columns = [names[int(i)] for i in torch.randint(len(names), (count,), generator=g)]
    y, depths = torch.stack(crops), torch.stack(depths)
    x, made = y.clone(), [i for i, column in enumerate(columns) if column not in images.pairs]
    for i in {*range(count)} - {*made}:
        x[i], y[i] = images.pair(columns[i], size, g)
    x, y = (t.to(device).float() / 255 for t in (x, y))
    if made:
        noise = generator(hash_seed(seed, step, 1), device)
        x[made] = degrade(y[made], noise, setting, [columns[i] for i in made], depths[made].to(device))
    if mild:
        weaker, s = torch.rand(2, count, 1, 1, 1, generator=generator(hash_seed(seed, step, 2))).to(device)
        x = torch.where(weaker < mild, y + s * (x - y), x)
    return x, y, columns


def hash_seed(*numbers):
    """Whole numbers -> one well-mixed seed, so that neighbouring steps share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
