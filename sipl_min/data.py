"""Images to learn from: the embedded ones, a folder of photos, pairs of photos on disk; and crops cut from them.

`batch` makes the batches of our own training. `Degraded` and `Pairs` are ordinary PyTorch data sets for a `DataLoader`.
In all three, what is drawn follows from seed and place in the training alone, never from what was drawn before."""

import bisect
import functools
import itertools
import unicodedata
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from . import photos
from .degrade import SHARES, check_suite, degrade, generator, jpeg, mirror, uniform
from .files import InputError, Name

# Photographs that come inside the installed scikit-image and Matplotlib. The two lists never meet.
TRAINING = ["astronaut.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png"]
TRAINING += ["brick.png", "coins.png", "grass.png", "gravel.png"]
HELD_OUT = {"chelsea": "chelsea.png", "hopper": "grace_hopper.jpg", "camera": "camera.png"}

# Names of folders, in lower case, that hold the degraded and the clean images of pairs.
INPUTS = ("input", "rainy", "rain", "hazy", "synthetic", "blur", "low", "data", "lq", "inputs", "haze", "in")
TARGETS = ("target", "gt", "norain", "clear", "original", "sharp", "high", "clean", "targets", "hq", "out")


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
    """Relative distance (1, H, W) of `motorcycle_left.png`, 0 near to 1 far, NaN unknown (Scharstein et al. 2014)."""
    disparity = torch.from_numpy(np.load(installed("motorcycle_disp.npz"))["arr_0"])
    known = disparity.isfinite() & (disparity > 0)
    return torch.where(known, 1 - disparity / disparity[known].max(), torch.nan)[None]


@functools.lru_cache(maxsize=2)  # they take two seconds
def dead_leaves(count, size=128, seed=0, leaves=300):
    """Images of occluding textured shapes, front to back, uint8 (count, 3, size, size).

    Radii r with p(r) ~ r^-3 make them alike at every scale (Lee, Mumford & Huang 2001; Achddou et al. 2021). Kept for
    the next call: copy them before you change them."""
    g = generator(seed)
    image, uncovered = np.zeros((count, 3, size, size), np.float32), np.ones((count, size, size), np.float32)
    down, right = np.indices((size, size), np.float32) / np.float32(size)

    def rand(low, high, channels=1):
        return low + (high - low) * torch.rand(count, channels, generator=g).numpy()

    tone = rand(0.1, 0.9) + rand(-0.2, 0.2, 3)  # each image has a mood of its own
    for i in range(leaves):
        # inverse of the distribution function of r^-3 between 0.03 and 1; the last leaf is the ground behind all
        radius = 0.03 / np.sqrt(1 - rand(0, 0.999)) if i < leaves - 1 else np.full((count, 1), 9, np.float32)
        shape = np.hstack([radius, rand(0, 1), rand(0, 1), rand(0, torch.pi), rand(0.3, 1)])
        power = np.float32([1, 2, 8])[torch.randint(3, (count,), generator=g).numpy()]
        waves = np.hstack([rand(5, 200), rand(0, 6.3), rand(0, 6.3)])
        color = 0.5 * (tone + rand(0, 1)) + 0.25 * (rand(0, 1, 3) - 0.5)
        slope, strength = rand(-0.3, 0.3), 0.3 * rand(0, 1) ** 3
        for n, ((r, top, left, angle, aspect), p, (frequency, direction, phase)) in enumerate(zip(shape, power, waves)):
            box = n, *(slice(max(0, int((c - 1.5 * r) * size)), int((c + 1.5 * r) * size) + 2) for c in (top, left))
            if not uncovered[box].any():
                continue
            y, x = down[box[1:]] - top, right[box[1:]] - left
            u, v = (x * np.cos(angle) + y * np.sin(angle)) / r, (y * np.cos(angle) - x * np.sin(angle)) / (r * aspect)
            inside = (np.abs(u) ** p + np.abs(v) ** p + np.float32(1e-9)) ** (1 / p)  # 1 on the edge
            cover = ((1 - inside) * r * size).clip(0, 1) * uncovered[box]  # one soft pixel, where nothing lies in front
            wave = np.sin(frequency * (x * np.cos(direction) + y * np.sin(direction)) + phase)
            shade = slope[n] * u.clip(-1, 1) + strength[n] * wave
            image[n, :, box[1], box[2]] += cover * (color[n, :, None, None] + shade)
            uncovered[box] -= cover
    grain = rand(0, 0.04)[..., None, None] * torch.randn(count, 1, size, size, generator=g).numpy()
    return torch.from_numpy(((image + grain).clip(0, 1) * 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------- files on disk
def load(path):
    """A photo on disk as (3, H, W) in [0, 1]. Raises InputError, with its name, where it cannot be used."""
    image = photos.read(path)
    try:
        return photos.to_tensor(image)[0]
    except InputError as e:
        raise InputError(f"{str(path)!r} cannot be used: {e}") from e


def check(groups, skip_bad, bad=()):
    """Groups of paths, such as pairs -> those whose photos are whole and of one size, and a sentence for each other.

    Raises InputError with the first five sentences, those in `bad` too, unless `skip_bad`."""
    good, bad = [], [*bad]
    shape = functools.cache(lambda path: load(path).shape)  # all of it is read: a truncated file begins like a good one
    for group in tqdm(groups, "checking", delay=5, leave=False):
        try:
            if len({shape(path) for path in group}) == 1:
                good.append(group)
            else:
                bad.append(", ".join(f"{str(p)!r} has {shape(p)[2]} x {shape(p)[1]} pixels" for p in group))
        except InputError as e:
            bad.append(str(e))
    if bad and not skip_bad:
        way = "mend them, or leave them out with --skip-bad (in Python skip_bad=True)"
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(f"{len(bad)} photos or pairs cannot be used: {'; '.join(bad[:5])}{more}: {way}")
    return good, bad


def spellings(stem):
    """Names that a target may have: `norain-1` for the input `rain-1`, `0_clean` for `0_rain`, `01` for `01_0.8`."""
    yield from (stem, stem.replace("rain", "norain"), stem.replace("rain", "clean"))
    while "_" in stem:
        stem = stem.rpartition("_")[0]
        yield stem


def by_name(inputs, targets):
    """Pair inputs with targets, both path -> its folder: a list of (input, target), and a sentence for each input left.

    A target lies in the folder of the same name, or at the top. Raises InputError for a photo that is both."""
    if both := sorted(inputs.keys() & targets.keys()):
        raise InputError(f"{str(both[0])!r} is among inputs and targets: name two folders, neither inside the other")
    apart = len({path.stem for path in inputs}) == len(inputs) or len({*inputs.values()}) == 1
    if apart and len({*targets.values()}) == 1 and not {*targets.values()} & {*inputs.values()}:
        targets = dict.fromkeys(targets, ".")  # such as clear/clear_images

    def plain(path):  # systems differ in case, and in how they write an accent
        return unicodedata.normalize("NFC", path.stem).casefold()

    named, pairs, left, taken = {}, [], [], {(folder, plain(path)) for path, folder in inputs.items()}
    for path, folder in targets.items():
        named.setdefault((folder, plain(path)), []).append(path)
    for path, folder in inputs.items():
        stems = [s for s in spellings(plain(path)) if s == plain(path) or (folder, s) not in taken]
        places = [(place, stem) for place in (folder, ".") for stem in stems]
        found = next((named[place] for place in places if place in named), [])
        found = [target for target in found if target.stem == path.stem] or found
        if len(found) == 1:
            pairs.append((path, *found))
        else:
            left.append(f"{str(path)!r} has {len(found) or 'no'} targets of its name")
    return pairs, left


def below(source, empty=False):
    """A folder, or a list of paths -> path: its folder below the source."""
    if isinstance(source, Name):
        return {path: path.relative_to(source).parent.as_posix() for path in photos.find(source, empty)}
    return {Path(path): "." for path in source}


def halves(names, inputs=INPUTS):
    """Which of some folders hold the degraded and the clean half of pairs: two names, "" where there is none."""
    known = {name.lower(): name for name in names}
    return [next((known[name] for name in half if name in known), "") for half in (inputs, TARGETS)]


def clean_photos(folder):
    """The photos in a folder. Raises InputError where it holds pairs: half of them are damaged."""
    found = photos.find(folder)
    for place, folders, _ in photos.walk(folder):
        x, y = (str(place / name) if name else "" for name in halves(folders, (*INPUTS, "noisy")))
        if x and y:
            way = f"pass --pairs {x!r} {y!r} (in Python data.Pairs), or as clean photos {y!r} alone"
            raise InputError(f"{str(place)!r} holds pairs, not only clean photos: {way}")
    return found


# ---------------------------------------------------------------------------------------- crops and batches
class Images:
    """Clean images, and pairs on disk where there are any, from which `batch` and `Degraded` take crops.

    source: None for the embedded images, half of the crops from photos and half from dead leaves; or a folder of
        photos; or a list of H x W x 3 arrays or of paths. leaves, seed: how many dead leaves, and which.
    cache: bytes of decoded photos kept in memory. skip_bad: leave out what cannot be used; `left_out` says why.
    pairs: for columns whose degradation is on disk and not made here, column -> list of (degraded, clean) paths.
    unpaired: sentences on files that found no partner, see `by_name`; they count as what cannot be used.
    Raises InputError, which names all that cannot be used; and where the folder holds pairs."""

    def __init__(self, source=None, leaves=48, seed=0, cache=2**31, pairs=None, skip_bad=False, unpaired=()):
        self.cache, self.kept, self.depths = cache, {}, {}
        self.given = {c: [tuple(map(Path, p)) for p in some] for c, some in (pairs or {}).items() if some}
        if source is None:
            self.depths[TRAINING.index("motorcycle_left.png")] = motorcycle_distance()
            source = [*map(installed, TRAINING), *dead_leaves(leaves, seed=seed).permute(0, 2, 3, 1).numpy()]
        elif isinstance(source, Name):
            source = clean_photos(source)
        files = [Path(image) for image in source if isinstance(image, Name)]
        arrays = [np.asarray(image) for image in source if not isinstance(image, Name)]
        good, self.left_out = check([(path,) for path in files] + sum(self.given.values(), []), skip_bad, unpaired)
        good = {*good}
        files = [path for path in files if (path,) in good]
        self.pairs = {column: [pair for pair in some if pair in good] for column, some in self.given.items()}
        made = [(photos.to_tensor(array)[0] * 255).round().byte().numpy() for array in arrays]
        self.sources, self.photos = files + made, len(files)
        for kind, some in {"images": self.sources, **self.pairs}.items():
            if not some:
                raise InputError(f"no photos for {kind}: {'; '.join(self.left_out) or 'the list is empty'}")

    def __len__(self):
        return len(self.sources)

    def __getstate__(self):  # each worker of a DataLoader has a cache of its own
        return self.__dict__ | dict(kept={})

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
        if source in self.kept:
            return self.kept[source]
        image = (load(source) * 255).round().byte()
        if image.numel() + sum(map(torch.numel, self.kept.values())) <= self.cache:
            self.kept[source] = image
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


AS_IT_IS = ("clean", "jpeg", "noise", "grain", "camera")  # of "everyday": the target may be dark or flat
EXTRA = {"everyday": (0.15, 0.15)}  # shares of crops: JPEG afterwards, degraded only in part


def batch(
    images, step, *, suite="cdd11", crop_size=48, batch_size=8, seed=0, device="cpu", mild=0.0, shares=None, which=None
):
    """Training batch number `step`: degraded x and clean y, (batch_size, 3, crop_size, crop_size), and their columns.

    A pure function of its arguments, so training resumes where it stopped. Each crop draws its column by
    `degrade.SHARES`, or by `shares` where that names it, as in dict(noise=300); columns in `images.pairs` take their
    crop from there. Crops are cut on the CPU, and degraded on `device`. A share `mild` is degraded in part,
    y + s (x - y) with s uniform in (0, 1): a network that saw only bad photos spoils good ones. "everyday" has a share
    of its own, spares columns that keep the target (`AS_IT_IS`), varies the tone, and compresses some.
    which: number of the image that all crops come from; None for any."""
    check_suite(suite, shares or ())
    g = generator(hash_seed(seed, step))
    crops, depths = zip(*(images.crop(crop_size, g, which) for _ in range(batch_size)))
    shares = SHARES[suite] | (shares or {})
    *ends, total = itertools.accumulate(shares.values())
    drawn = torch.randint(total, (batch_size,), generator=g).tolist()
    columns = [[*shares][bisect.bisect(ends, i)] for i in drawn]
    x, y, depths = torch.stack(crops), torch.stack(crops), torch.stack(depths).to(device)
    made = [i for i, column in enumerate(columns) if column not in images.pairs]
    for i, column in enumerate(columns):
        if column in images.pairs:
            x[i], y[i] = images.pair(column, crop_size, g)
    x, y = (t.to(device).float() / 255 for t in (x, y))

    g = generator(hash_seed(seed, step, 1), device)
    jpeg_share, mild_share = EXTRA.get(suite, (0.0, 0.0))
    if suite in EXTRA:
        y[made] = fade(y[made], generator(hash_seed(seed, step, 5), device))
    as_it_is = AS_IT_IS if suite in EXTRA else ()
    varied = [i for i in made if columns[i] in as_it_is]
    y[varied] = vary_tone(y[varied], g)
    x[made] = degrade(y[made], g, suite, [columns[i] for i in made], depths[made])
    chance = torch.rand(len(made), generator=g, device=device).tolist()
    again = [i for i, u in zip(made, chance) if u < jpeg_share and columns[i] not in ("clean", "jpeg")]
    x[again] = jpeg(x[again], g)

    u, s = torch.rand(2, batch_size, 1, 1, 1, generator=generator(hash_seed(seed, step, 2))).to(device)
    spared = torch.tensor([column in as_it_is for column in columns], device=device)[:, None, None, None]
    return torch.where((u < (mild or mild_share)) & ~spared, y + s * (x - y), x), y, columns


def fade(y, g):
    """Crops y, a fifth of them gray, a tenth paler. Networks without these take colored noise on gray for darkness."""
    u, gray = uniform(y, g, (0.0, 1.0)), y.mean(1, keepdim=True)
    saturation = torch.where(u < 0.2, 0.0, torch.where(u < 0.3, uniform(y, g, (0.0, 1.0)), 1.0))
    return gray + saturation * (y - gray)


def vary_tone(y, g):
    """Crops y, two fifths of them darker or lighter, some as at night, some a flat or sloping color, as wall or sky."""
    gamma = torch.exp(uniform(y, g, (-0.4, 0.7)) * (uniform(y, g, (0.0, 1.0)) < 0.4))
    flat = uniform(y, g, (-0.15, 1.15)) + 0.3 * torch.rand(len(y), 3, 1, 1, generator=g, device=y.device) - 0.15
    for axis, n in ((-2, y.shape[-2]), (-1, y.shape[-1])):
        slope = uniform(y, g, (-0.3, 0.3)) * (uniform(y, g, (0.0, 1.0)) < 0.5)
        flat = flat + slope * torch.linspace(-1, 1, n, device=y.device).unsqueeze(-1).transpose(-1, axis)
    kind = uniform(y, g, (0.0, 1.0))
    y = torch.where(kind < 0.15, flat.clamp(0, 1), y**gamma)
    return torch.where(kind > 0.87, night(y, g), y)


def night(y, g):
    """Scenes of patches of light, nearly black else, with bright dots anywhere: lamps, or many faint stars."""
    grid = torch.rand(len(y), 1, 5, 5, generator=g, device=y.device)
    light = F.interpolate(grid, y.shape[-2:], mode="bicubic", align_corners=True).clamp(0, 1)
    light = light ** uniform(y, g, (1.5, 8.0)) + uniform(y, g, (0.0, 0.06))
    lamps = torch.rand(len(y), 1, *y.shape[-2:], generator=g, device=y.device) < 10 ** uniform(y, g, (-3.5, -1.5))
    bright = torch.rand(lamps.shape, generator=g, device=y.device) ** uniform(y, g, (0.0, 4.0))  # few are, as of stars
    large = F.avg_pool2d(F.max_pool2d(lamps * bright, 3, 1, 1), 3, 1, 1)
    glow = torch.where(uniform(y, g, (0.0, 1.0)) < 0.5, large, lamps * bright)
    warm = 1 - uniform(y, g, (0.0, 0.6)) * torch.tensor([0.0, 0.4, 1.0], device=y.device)[:, None, None]
    return (y * light * warm + glow * warm).clamp(0, 1)


def hash_seed(*numbers):
    """Whole numbers -> one well-mixed seed, so that neighboring steps share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# ------------------------------------------------------------------------------------------ for a DataLoader
class Seeded(Dataset):
    """What `Degraded` and `Pairs` share: item i of an epoch is a pure function of (seed, epoch, i)."""

    epoch = 0

    def set_epoch(self, epoch):
        """To be called before each epoch, and before its workers start."""
        self.epoch = epoch

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.item(range(len(self))[i], hash_seed(self.seed, self.epoch))


class Degraded(Seeded):
    """Crops of clean images, degraded by a random column of a suite: (x, y), float (3, crop_size, crop_size) in [0, 1].

    images: `Images`, or what it takes as `source`; an epoch has a crop of each. mild: as in `batch`."""

    def __init__(self, images, suite, crop_size=64, seed=0, mild=0.0):
        check_suite(suite)
        self.items, self.seed = images if isinstance(images, Images) else Images(images), seed
        self.options = dict(suite=suite, crop_size=crop_size, mild=mild, batch_size=1)

    def item(self, i, seed):
        x, y, _ = batch(self.items, i, seed=seed, which=i, **self.options)
        return x[0], y[0]


class Pairs(Seeded):
    """Pairs of photos on disk: (x, y), degraded and clean, float (3, H, W) in [0, 1].

    inputs, targets: two folders, whose subfolders are searched too, or lists of paths; paired by name, see `by_name`.
    crop_size: side of a random crop, turned and flipped; None gives whole images. skip_bad: as in `Images`."""

    def __init__(self, inputs, targets, crop_size=None, seed=0, skip_bad=False):
        self.crop_size, self.seed = crop_size, seed
        pairs, unpaired = by_name(below(inputs), below(targets))
        self.items, self.left_out = check(pairs, skip_bad, unpaired)
        if not self.items:
            raise InputError(f"no photos for pairs: {'; '.join(self.left_out) or 'the lists are empty'}")

    def item(self, i, seed):
        both = [load(path) for path in self.items[i]]
        return tuple(cut(both, self.crop_size, generator(hash_seed(seed, i))) if self.crop_size else both)
