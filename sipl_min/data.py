"""Images to learn from: the embedded ones, a folder of photos, pairs of photos on disk; and crops cut from them.

`batch` makes the batches of our own training. `Degraded` and `Pairs` are ordinary PyTorch data sets for a `DataLoader`.
In all three, what is drawn follows from the seed and the place in the training alone, never from what was drawn before.
"""

import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from . import photos
from .degrade import SHARES, check_suite, degrade, generator, jpeg, mirror, uniform
from .files import InputError, Name

# Photographs that come inside the installed scikit-image and Matplotlib. The two lists never meet.
TRAINING = ["astronaut.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"]
TRAINING += ["brick.png", "coins.png", "grass.png", "gravel.png"]
HELD_OUT = {"chelsea": "chelsea.png", "hopper": "grace_hopper.jpg", "camera": "camera.png"}

# Names of folders, in lower case, that hold the degraded and the clean images of pairs.
INPUTS = ("input", "rainy", "rain", "hazy", "synthetic", "blur", "low", "data", "lq", "inputs", "haze")
TARGETS = ("target", "gt", "norain", "clear", "original", "sharp", "high", "clean", "targets", "hq")


# ------------------------------------------------------------------------------------------ embedded images
def installed(name):
    """Path of a sample photo inside the installed scikit-image or Matplotlib, neither of which is imported."""
    for package, folder in (("skimage", "data"), ("matplotlib", "mpl-data/sample_data")):
        found = find_spec(package)
        if found and (path := Path(found.origin).parent / folder / name).is_file():
            return path
    raise InputError(f"{name} is not inside the installed scikit-image or Matplotlib: install the pinned versions")


def held_out():
    """The test photos, never trained on: name -> uint8 (H, W, 3). `camera` is gray, as three equal channels."""
    found = {name: np.atleast_3d(photos.read(installed(file))) for name, file in HELD_OUT.items()}
    return {name: np.broadcast_to(photo, (*photo.shape[:2], 3)) for name, photo in found.items()}


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
    p(r) ~ r^-3 makes the statistics scale-invariant (Lee, Mumford & Huang 2001), filled with a color, a gradient
    and a wave; such images train restorers that work on photos (Achddou, Gousseau & Ladjal 2021).
    """
    g = generator(seed)
    down, right = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    image, uncovered = torch.zeros(count, 3, size, size), torch.ones(count, 1, size, size)

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
        cover = ((1 - inside) * r * size).clamp(0, 1) * uncovered  # one soft pixel, where nothing lies in front
        wave = torch.sin(rand(5, 200) * (x * (a := rand(0, 6.3)).cos() + y * a.sin()) + rand(0, 6.3))
        color = 0.5 * (tone + rand(0, 1)) + 0.25 * (rand(0, 1, 3) - 0.5) + rand(-0.3, 0.3) * u.clamp(-1, 1)
        image += cover * (color + rand(0, 1) ** 3 * 0.3 * wave)
        uncovered = uncovered - cover
    grain = rand(0, 0.04) * torch.randn(count, 1, size, size, generator=g)
    return ((image + grain).clamp(0, 1) * 255).byte()


# ------------------------------------------------------------------------------------------- files on disk
def load(path):
    """A photo on disk as (3, H, W) in [0, 1]. Raises InputError, with its name, where it cannot be used."""
    try:
        return photos.to_tensor(photos.read(path))[0]
    except InputError as e:
        raise e if repr(str(path)) in str(e) else InputError(f"{str(path)!r} cannot be used: {e}") from e


def size_of(path):
    """(width, height) of a photo that is whole, or a sentence that says what is wrong with it."""
    try:
        return tuple(load(path).shape[:0:-1])
    except InputError as e:
        return str(e)


def sort_out(groups):
    """Paths of photos that belong together, such as pairs -> those without a fault, and a sentence for each other.

    All of a photo is read, since a truncated file begins like a good one.
    """
    paths, good, bad = sorted({path for group in groups for path in group}), [], []
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(8) as pool:  # threads share these filters
        bar = tqdm(pool.map(size_of, paths), "checking", len(paths), unit="photo", delay=5, leave=False)
        sizes = dict(zip(paths, bar))
    for group in groups:
        wrong = [sizes[path] for path in group if isinstance(sizes[path], str)]
        if not wrong and len({sizes[path] for path in group}) > 1:
            wrong = ["{!r} has {} x {} pixels".format(str(path), *sizes[path]) for path in group]
        if wrong:
            bad.append(", ".join(wrong))
        else:
            good.append(group)
    return good, bad


def refuse_bad(good, bad, skip_bad):
    """Raises InputError, which holds all sentences of `bad`, unless they are to be left out and something is left."""
    if bad and not (good and skip_bad):
        way = "mend them, or leave them out with --skip-bad (in Python skip_bad=True)" if good else "mend them"
        raise InputError(f"{len(bad)} of {len(good) + len(bad)} cannot be used: {'; '.join(bad)}: {way}")


def spellings(stem):
    """Names that the target of an input may have: `1` for `1`, `norain-1` for `rain-1`, `0_clean` for `0_rain`, and
    `0001` for `0001_0.8_0.2`, where what is behind a `_` tells of the degradation."""
    yield from (stem, stem.replace("rain", "norain"), stem.replace("rain", "clean"))
    while "_" in stem:
        stem = stem.rpartition("_")[0]
        yield stem


def by_name(inputs, targets):
    """Pair inputs with targets, both path -> its folder: a list of (input, target), and a sentence for each input left.

    A target is looked for in the folder of the same name, or in the only one there is. Raises InputError for a photo
    that is both.
    """
    if both := sorted(inputs.keys() & targets.keys()):
        raise InputError(f"{str(both[0])!r} is among inputs and targets: name two folders, neither inside the other")
    folders = {*targets.values()}
    if folders == {"."} or len(folders) == 1 and folders.isdisjoint(inputs.values()):
        inputs, targets = dict.fromkeys(inputs, "."), dict.fromkeys(targets, ".")
    named, pairs, left = {}, [], []
    for path, folder in targets.items():
        named.setdefault((folder, path.stem), []).append(path)
    for path, folder in inputs.items():
        found = next((named[folder, s] for s in spellings(path.stem) if (folder, s) in named), [])
        if len(found) == 1:
            pairs.append((path, found[0]))
        else:
            left.append(f"{str(path)!r} has {len(found) or 'no'} targets of its name")
    return pairs, left


def below(source):  # a folder, or a list of paths -> path: its folder below the source
    if isinstance(source, Name):
        return {path: path.relative_to(source).parent.as_posix() for path in photos.find(source)}
    return {Path(path): "." for path in source}


def refuse_pairs(folder, files):
    """Raises InputError where a folder of photos holds pairs: half of them are damaged."""
    places = {}
    for part in {part for path in files for part in path.parents if Path(folder) in part.parents}:
        places.setdefault(part.parent, {})[part.name.lower()] = str(part)
    for names in places.values():
        x, y = (next((names[n] for n in known if n in names), "") for known in ((*INPUTS, "noisy"), TARGETS))
        if x and y:
            way = f"pass --pairs {x!r} {y!r} (in Python data.Pairs), or as clean photos {y!r} alone"
            raise InputError(f"{str(folder)!r} holds pairs, not only clean photos: {way}")


# ---------------------------------------------------------------------------------------- crops and batches
class Images:
    """Clean images, and pairs on disk where there are any, from which `batch` and `Degraded` take crops.

    Args:
        source: None for the embedded images, half of all crops from photos and half from dead leaves; or a folder,
            whose photos then replace them; or a list of H x W x 3 arrays or of paths.
        leaves: how many dead-leaves images; seed: of these. cache: bytes of decoded photos kept in memory.
        pairs: for columns whose degradation is on disk and not made here, column -> list of (degraded, clean) paths.
        skip_bad: leave out photos and pairs that cannot be used; `left_out` then says why, a sentence for each.
    Raises InputError, which names them all, where photos are missing, damaged, or of two sizes in one pair; and where
    the folder holds pairs.
    """

    def __init__(self, source=None, leaves=48, seed=0, cache=2**31, pairs=None, skip_bad=False):
        self.cache, self.kept, self.depths = cache, {}, {}
        self.given = {c: [tuple(map(Path, p)) for p in some] for c, some in (pairs or {}).items() if some}
        if source is None:
            files, made = [installed(name) for name in TRAINING], [*dead_leaves(leaves, seed=seed).numpy()]
            self.depths[TRAINING.index("motorcycle_left.png")] = motorcycle_distance()
        elif isinstance(source, Name):
            files, made = photos.find(source), []
            refuse_pairs(source, files)
        else:
            files = [Path(image) for image in source if isinstance(image, Name)]
            made = [photos.to_tensor(np.asarray(image))[0] for image in source if not isinstance(image, Name)]
            made = [(image * 255).round().byte().numpy() for image in made]
        groups = [(path,) for path in files] + [pair for several in self.given.values() for pair in several]
        good, self.left_out = sort_out(groups)
        refuse_bad(good, self.left_out, skip_bad)
        good = {*good}
        files = [path for path in files if (path,) in good]
        self.pairs = {column: [pair for pair in several if pair in good] for column, several in self.given.items()}
        self.sources, self.photos = [*files, *made], len(files)
        if not self.sources:
            raise InputError("no images given: pass at least one H x W x 3 array, a folder, or None")
        if empty := [column for column, several in self.pairs.items() if not several]:
            raise InputError(f"no pair of {empty[0]} can be used: {'; '.join(self.left_out)}")

    def __len__(self):
        return len(self.sources)

    def __getstate__(self):  # for the workers of a DataLoader, each of which has a cache of its own
        return self.__dict__ | dict(kept={}, cache=self.cache + sum(image.numel() for image in self.kept.values()))

    def names(self):
        """What tells these images from others, so that a resumed training finds the images that it began with."""
        files, arrays = self.sources[: self.photos], self.sources[self.photos :]
        names = [f"{path.name}, {path.stat().st_size} bytes" for path in files]
        names += [f"{array.shape}, crc {zlib.crc32(array.tobytes())}" for array in arrays]
        for column, pairs in self.given.items():
            crc = zlib.crc32("".join(path.name for pair in pairs for path in pair).encode())
            names.append(f"{column}: {len(pairs)} pairs, crc {crc}")
        return names

    def decode(self, source):
        """An image as uint8 (3, H, W)."""
        if not isinstance(source, Path):
            return torch.from_numpy(source)
        image = self.kept.get(source)
        if image is None:
            image = (load(source) * 255).round().byte()
            if image.numel() <= self.cache:
                self.kept[source] = image
                self.cache -= image.numel()
        return image

    def crop(self, size, g, i=None):
        """A random crop of image i, None for any, turned and flipped: uint8 (3, size, size), and its distance."""
        if i is None:
            first, last = 0, len(self)
            if 0 < self.photos < len(self):  # photos as often as dead leaves
                first, last = [(0, self.photos), (self.photos, last)][int(torch.randint(2, (), generator=g))]
            i = int(torch.randint(first, last, (), generator=g))
        image = self.decode(self.sources[i])
        return cut([image, self.depths.get(i, torch.full((1, *image.shape[1:]), torch.nan))], size, g)

    def pair(self, column, size, g):
        """A random crop of a pair on disk, both turned and flipped alike: degraded and clean, uint8 (3, size, size)."""
        i = int(torch.randint(len(self.pairs[column]), (), generator=g))
        return cut([self.decode(path) for path in self.pairs[column][i]], size, g)


def cut(images, size, g):
    """The same random size x size crop of images (C, H, W) of one size, turned and flipped; small ones are mirrored."""
    for axis in (-2, -1):
        images = [mirror(t[None], axis, 0, max(size - t.shape[axis], 0))[0] for t in images]
        start = int(torch.randint(images[0].shape[axis] - size + 1, (), generator=g))
        images = [t.narrow(axis, start, size) for t in images]
    turn, flip = int(torch.randint(4, (), generator=g)), int(torch.randint(2, (), generator=g))
    return [torch.rot90(t.flip(-1) if flip else t, turn, (-2, -1)) for t in images]


AS_IT_IS = ("clean", "jpeg", "noise", "camera")  # columns of "everyday" whose target is the crop, be it dark or flat
EXTRA = {"everyday": (0.15, 0.15)}  # suite -> shares of the crops: JPEG afterwards, and degraded only in part


def batch(images, step, *, suite="cdd11", crop_size=48, batch_size=8, seed=0, device="cpu", mild=0.0, which=None):
    """Training batch number `step`: degraded x and clean y, (batch_size, 3, crop_size, crop_size), and their columns.

    A pure function of its arguments: nothing is remembered between steps, so training resumes where it stopped. Crops
    are cut on the CPU, the degradations run on `device`. Each crop draws its column by `degrade.SHARES`, so that no
    task starves, however few images it has; columns in `images.pairs` take their crop from there. A share `mild` of
    the crops is degraded less, x <- y + s (x - y) with s uniform in (0, 1): a network that saw only bad photos spoils
    good ones. The suite "everyday" has such a share of its own, varies the tone of crops, and compresses some.
    which: number of the image that all crops come from; None for any.
    """
    check_suite(suite)
    g = generator(hash_seed(seed, step))
    crops, depths = zip(*(images.crop(crop_size, g, which) for _ in range(batch_size)))
    names = [name for name, share in SHARES[suite].items() for _ in range(share)]
    columns = [names[int(i)] for i in torch.randint(len(names), (batch_size,), generator=g)]
    y, depths = torch.stack(crops), torch.stack(depths).to(device)
    x, made = y.clone(), [i for i, column in enumerate(columns) if column not in images.pairs]
    for i in sorted({*range(batch_size)} - {*made}):
        x[i], y[i] = images.pair(columns[i], crop_size, g)
    x, y = (t.to(device).float() / 255 for t in (x, y))

    g = generator(hash_seed(seed, step, 1), device)
    jpeg_share, mild_share = EXTRA.get(suite, (0.0, 0.0))
    varied = [i for i in made if columns[i] in AS_IT_IS]
    y[varied] = vary_tone(y[varied], g)
    x[made] = degrade(y[made], g, suite, [columns[i] for i in made], depths[made])
    chance = torch.rand(len(made), generator=g, device=device).tolist()
    again = [i for i, u in zip(made, chance) if u < jpeg_share and columns[i] not in ("clean", "jpeg")]
    x[again] = jpeg(x[again], g)

    u, s = torch.rand(2, batch_size, 1, 1, 1, generator=generator(hash_seed(seed, step, 2))).to(device)
    spared = torch.tensor([column in AS_IT_IS for column in columns], device=device)[:, None, None, None]
    return torch.where((u < (mild or mild_share)) & ~spared, y + s * (x - y), x), y, columns


def vary_tone(y, g):
    """Crops y, two fifths of them darker or lighter, some replaced by a flat or sloping color, as of a wall or sky."""
    gamma = torch.exp(uniform(y, g, (-0.4, 1.4)) * (uniform(y, g, (0.0, 1.0)) < 0.4))
    flat = uniform(y, g, (0.0, 1.0)) + 0.3 * torch.rand(len(y), 3, 1, 1, generator=g, device=y.device) - 0.15
    for axis, n in ((-2, y.shape[-2]), (-1, y.shape[-1])):
        slope = uniform(y, g, (-0.3, 0.3)) * (uniform(y, g, (0.0, 1.0)) < 0.5)
        flat = flat + slope * torch.linspace(-1, 1, n, device=y.device).unsqueeze(-1).transpose(-1, axis)
    return torch.where(uniform(y, g, (0.0, 1.0)) < 0.08, flat.clamp(0, 1), y**gamma)


def hash_seed(*numbers):
    """Whole numbers -> one well-mixed seed, so that neighboring steps share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ------------------------------------------------------------------------------------------ for a DataLoader
class Seeded(Dataset):
    """What `Degraded` and `Pairs` share: item i of epoch e is a pure function of (seed, e, i)."""

    def __init__(self, seed):
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def set_epoch(self, epoch):
        """To be called before each epoch, as a `DistributedSampler` wants it too; otherwise all are the same."""
        self.epoch.fill_(epoch)

    def place(self, i):
        """The seed of this epoch, and i as a place from 0. Raises IndexError."""
        return hash_seed(self.seed, int(self.epoch)), range(len(self))[i]


class Degraded(Seeded):
    """Crops of clean images, degraded by a random column of a suite: (x, y), float (3, crop_size, crop_size) in [0, 1].

    images: `Images`, or what it takes as `source`; an epoch has a crop of each. mild: as in `batch`.
    """

    def __init__(self, images, suite, crop_size=64, seed=0, mild=0.0):
        super().__init__(seed)
        check_suite(suite)
        self.images = images if isinstance(images, Images) else Images(images)
        self.options = dict(suite=suite, crop_size=crop_size, mild=mild)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        seed, i = self.place(i)
        x, y, _ = batch(self.images, i, batch_size=1, seed=seed, which=i, **self.options)
        return x[0], y[0]


class Pairs(Seeded):
    """Pairs of photos on disk: (x, y), degraded and clean, float (3, H, W) in [0, 1].

    Args:
        inputs, targets: two folders, whose subfolders are searched too, or lists of paths; paired by name, see
            `spellings` and `by_name`.
        crop_size: side of a random crop, turned and flipped; None gives whole images as they are.
        skip_bad: leave out pairs that cannot be used; `left_out` then says why, a sentence for each.
    Raises InputError, which names all pairs that cannot be used: damaged, of two sizes, or without a partner.
    """

    def __init__(self, inputs, targets, crop_size=None, seed=0, skip_bad=False):
        super().__init__(seed)
        self.crop_size = crop_size
        pairs, unpaired = by_name(below(inputs), below(targets))
        self.pairs, self.left_out = sort_out(pairs)
        self.left_out += unpaired
        refuse_bad(self.pairs, self.left_out, skip_bad)
        if not self.pairs:
            raise InputError("no pairs given: the lists are empty")

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        seed, i = self.place(i)
        both = [load(path) for path in self.pairs[i]]
        return tuple(cut(both, self.crop_size, generator(hash_seed(seed, i))) if self.crop_size else both)
