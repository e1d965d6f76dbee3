"""The public data sets on disk: found in the layouts that people have, counted, paired, a sample of them opened."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from .degrade import CDD11, COLUMNS, check_setting
from .files import PHOTOS, InputError

INPUTS = ("input", "rainy", "rain", "hazy", "synthetic", "blur", "low", "data", "lq")
TARGETS = ("target", "gt", "norain", "clear", "original", "sharp", "high", "clean")


@dataclass(frozen=True)
class DataSet:
    """What a right copy is, and where it comes from."""

    name: str
    role: str  # "train" or "test"
    count: int  # pairs, or clean images
    where: str  # names by which a folder is known
    columns: tuple  # of the tables that it is the test or the training for
    paper: str
    page: str
    clean: bool = False  # clean images only: their degradation is made here
    clear: int = None  # distinct targets, where fewer than inputs
    other: tuple = ()  # (count, what a copy of this size is)
    place: str = None  # where below the root to put it, if not simply under its name


RESIDE = "RESIDE, Li et al. 2019", "sites.google.com/view/reside-dehaze-datasets"
JORDER = "JORDER, Yang et al. 2017", "www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html"
BSD = "BSD, Martin et al. 2001", "www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds"
DEEPDEBLUR = "DeepDeblur, Nah et al. 2017", "seungjunnah.github.io/Datasets/gopro"
RETINEX = "RetinexNet, Wei et al. 2018", "daooshee.github.io/BMVC2018website"
ONERESTORE = "OneRestore, Guo et al. 2024", "github.com/gy65896/OneRestore"
DESNOW = "DesnowNet, Liu et al. 2018", "sites.google.com/view/yunfuliu/desnownet"
NEW_RAIN = "the newer version of Rain100L, with which these tables do not compare"
WEATHER = ("Snow100K-S", "Snow100K-L", "Outdoor-Rain", "RainDrop")
NOISE = ("CBSD68_15", "CBSD68_25", "CBSD68_50")

# Names that a part of the path has, in lower case, whole words; behind "=" the word for a task, which counts only as
# the name of the very folder that holds the images. The deepest part that tells wins, then the order of this list.
SETS = (
    DataSet("CBSD68", "test", 68, r"c?bsds?68", NOISE, *BSD, clean=True),
    DataSet("BSD400", "train", 400, r"bsds?400", (), *BSD, clean=True),
    DataSet("WED", "train", 4744, r"wed|waterloo[a-z]*", (), "WED, Ma et al. 2017",
            "ece.uwaterloo.ca/~k29ma/exploration", clean=True),
    DataSet("BSD400 + WED", "train", 5144, r"=denoise", (), "BSD400 and WED in one folder, as AirNet has them", BSD[1],
            clean=True, place="Train/Denoise"),
    DataSet("RainDrop", "test", 58, r"(de)?rain.?drop", ("RainDrop",), "Qian et al. 2018",
            "github.com/rui1996/DeRaindrop"),
    DataSet("Outdoor-Rain", "test", 750, r"outdoor.?(heavy.?)?rain|=test1", ("Outdoor-Rain",), "Li, Cheong & Tan 2019",
            "github.com/liruoteng/HeavyRainRemoval"),
    DataSet("AllWeather", "train", 18069, r"all.?weather", WEATHER, "TransWeather, Valanarasu et al. 2022",
            "github.com/jeya-maria-jose/TransWeather"),
    DataSet("Rain100L", "test", 100, r"rain100l|=derain", ("Rain100L",), *JORDER, other=(200, NEW_RAIN)),
    DataSet("Rain100L", "train", 200, r"rain100l|=derain", ("Rain100L",), *JORDER, other=(1800, NEW_RAIN)),
    DataSet("SOTS-outdoor", "test", 500, r"sots|outdoor|=dehaze", ("SOTS",), *RESIDE, clear=492),
    DataSet("OTS", "train", 72135, r"ots|outdoor|=dehaze", ("SOTS",), *RESIDE, clear=2061),
    DataSet("GoPro", "test", 1111, r"gopro[a-z]*|=deblur", ("GoPro",), *DEEPDEBLUR),
    DataSet("GoPro", "train", 2103, r"gopro[a-z]*|=deblur", ("GoPro",), *DEEPDEBLUR),
    DataSet("LOL-v1", "test", 15, r"lol(v1|.?dataset)?|eval15|=enhance", ("LOLv1",), *RETINEX),
    DataSet("LOL-v1", "train", 485, r"lol(v1|.?dataset)?|our485|=enhance", ("LOLv1",), *RETINEX),
    DataSet("CDD-11", "test", 2200, r"", tuple(CDD11), *ONERESTORE, clear=200),
    DataSet("CDD-11", "train", 13013, r"", tuple(CDD11), *ONERESTORE, clear=1183),
    DataSet("Snow100K-S", "test", 16611, r"snow100k.?s", ("Snow100K-S",), *DESNOW),
    DataSet("Snow100K-L", "test", 16801, r"snow100k.?l", ("Snow100K-L",), *DESNOW),
)  # fmt: skip
# What lies beside those in the same collections and is another data set.
OTHERS = (r"indoor|hide|realblur[a-z]*|rain(100h|800|1200|1400|12600)|test(100|1200|2800)|test.?b|noisy\d*|lol.?v2|"
          r"kodak\d*|urban\d*|mcmaster|sidd|dnd|(nh|dense).?haze|blur.gamma")  # fmt: skip


@dataclass
class Found:
    """One data set as it lies on disk. pairs: combination (CDD-11) or "" -> list of (input or None, target), sorted."""

    what: DataSet
    folders: list = field(default_factory=list)
    pairs: dict = field(default_factory=dict)
    unpaired: list = field(default_factory=list)

    def count(self):
        return sum(map(len, self.pairs.values()))

    def of(self, column):
        """The pairs with which a column of a table is measured."""
        return self.pairs.get(column, self.pairs.get("", []))


def photos_of(folder):
    """Photos directly in a folder, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PHOTOS and not p.name.startswith("."))


def partner(stem, targets):
    """The target of an input, by the names in use: `1`, `rain-1` of `norain-1`, `0_rain` of `0_clean`, and
    `0001_0.8_0.2` of `0001`, where what is behind the last `_` tells of the degradation."""
    for name in (stem, stem.replace("rain", "norain"), stem.replace("rain", "clean")):
        if name in targets:
            return targets[name]
    while "_" in stem:
        stem = stem.rpartition("_")[0]
        if stem in targets:
            return targets[stem]
    return None


def words(part):
    return [w for w in re.split(r"[^a-z0-9]", part.lower()) if w]


def role_of(parts, inputs=""):
    """ "train", "test" or None: the deepest part of a path with such a word tells."""
    for depth, part in reversed(list(enumerate(parts))):
        for word in words(part) if depth or len(words(part)) == 1 else ():  # of the root only a name like "Train"
            if re.fullmatch(r"train(ing|set|data)?|[a-z]*train|our485", word):
                return "train"
            if re.fullmatch(r"test(ing|set|data|1)?|(?!lat|con)[a-z]*test|eval15|val|sots", word):
                return "test"
    return "train" if inputs == "rainy" else None


def choose(parts, role, clean=False):
    """The data set that a folder's path (names from the root down) tells of, or None."""

    def known(pattern, part):
        return pattern and re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", part.lower())

    if any(known(OTHERS, part) for part in parts):
        return None
    for part in reversed(parts):
        for what in SETS:
            name, _, task = what.where.partition("=")
            fits = known(name.rstrip("|"), part) or part is parts[-1] and part.lower() == task
            if fits and what.clean == clean and role in (what.role, None):
                return what
    return None


def find(root):
    """The data sets below a folder, in the order of `SETS`. Raises InputError where there is no such folder.

    Known layouts: AirNet's and PromptIR's (Train/Derain/rainy, test/dehaze/input, ...), OneRestore's
    (CDD-11_test/clear, ...), Restormer's (test/Rain100L/input, ...), the originals, and any folder named after its data
    set with `input` and `target` in it. Several folders of one set (GoPro's scenes) are put together.
    """
    root, found, visited = Path(root), {}, set()
    if not root.is_dir():
        raise InputError(f"no folder {str(root)!r}: put the data sets below one, and name it with --data")
    for place, folders, files in os.walk(root, followlinks=True):
        folder, names = Path(place), {f.lower(): f for f in folders}
        if folder.resolve() in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(folder.resolve())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        parts = (root.resolve().name, *folder.relative_to(root).parts)
        combinations = [c for c in CDD11 if c in names]
        cdd = "clear" in names and len(combinations) > 1
        inputs = [names[c] for c in combinations] if cdd else [names[i] for i in INPUTS if i in names][:1]
        target = names["clear"] if cdd else next((names[t] for t in TARGETS if t in names), None)
        if inputs and target:
            role = role_of(parts, inputs[0].lower())
            what = choose(parts, role)
            if cdd:
                what = next(s for s in SETS if s.name == "CDD-11" and role in (s.role, None))
            if what:
                take(found, what, folder, zip(combinations if cdd else [""], inputs), target)
            folders[:] = [f for f in folders if f not in (*inputs, target)]
        elif any(Path(f).suffix.lower() in PHOTOS for f in files):
            what = choose(parts, role_of(parts), clean=True)
            if what:
                item = found.setdefault(what, Found(what))
                item.folders.append(folder)
                item.pairs.setdefault("", []).extend((None, p) for p in photos_of(folder))
    return [found[what] for what in SETS if what in found]


def take(found, what, folder, inputs, target):
    """Pair the inputs of each column with the targets of one folder."""
    item, targets = found.setdefault(what, Found(what)), {p.stem: p for p in photos_of(folder / target)}
    item.folders.append(folder)
    for column, name in inputs:
        pairs = item.pairs.setdefault(column, [])
        for path in photos_of(folder / name):
            clear = partner(path.stem, targets)
            if clear is None:
                item.unpaired.append(path)
            else:
                pairs.append((path, clear))


def training(root, setting):
    """What lies below `root` to train a setting on, as arguments of `data.Images`: folder (clean images) and pairs.

    Columns without pairs (noise always) get clean images with degradations made on the fly: BSD400 and WED, or else the
    targets of all pairs. Raises InputError where there is nothing.
    """
    check_setting(setting)
    found = [f for f in find(root) if f.what.role == "train"]
    pairs = {c: f.of(c) for c in COLUMNS[setting] for f in found if c in f.what.columns and f.of(c)}
    clean = [y for f in found if f.what.clean for _, y in f.of("")]
    clean = clean or sorted({y for several in pairs.values() for _, y in several})
    if not clean:
        raise InputError(f"no training set of {setting} below {str(root)!r}: python -m sipl_min data says what fits")
    return dict(folder=clean, pairs=pairs)


def problems(item, sample=20):
    """What is wrong with a copy, one sentence each: its count, unpaired files, and what opening a sample shows."""
    what, count, lines = item.what, item.count(), []
    kind = "images" if what.clean else "pairs"
    if what.other and count == what.other[0] and len(item.folders) == 1:
        lines.append(f"{count} {kind} instead of {what.count}: this is {what.other[1]}")
    elif count != what.count:
        lines.append(f"{count} {kind} instead of {what.count}: the copy is not whole, or not this data set")
    clear = len({p for pairs in item.pairs.values() for _, p in pairs})
    if what.clear and count == what.count and clear != what.clear:
        lines.append(f"{clear} different clear images instead of {what.clear}")
    for path in item.unpaired[:3]:
        lines.append(f"{path}: no target of this name")
    if len(item.unpaired) > 3:
        lines.append(f"... and {len(item.unpaired) - 3} more without a target")
    everything = [pair for pairs in item.pairs.values() for pair in pairs]
    for x, y in everything[:: max(1, len(everything) // sample)]:
        sizes = []
        for path in (p for p in (x, y) if p):
            try:
                with Image.open(path) as image:
                    image.load()  # all of it: a truncated file has a good header
                    sizes.append(image.size)
            except Exception as e:  # decoders raise anything
                lines.append(f"{path}: cannot be read ({e})")
        if len(sizes) == 2 and sizes[0] != sizes[1]:
            lines.append(f"{x}: {sizes[0][0]} x {sizes[0][1]} pixels, its target {sizes[1][0]} x {sizes[1][1]}")
    return lines


def report(root):
    """What `python -m sipl_min data` prints: each data set found or missing, one line, and what is wrong below it."""
    found, lines = {item.what: item for item in find(root)}, []
    for what in SETS:
        if what not in found:
            place = Path(root) / (what.place or f"{what.name}/{what.role}")
            lines.append(f"missing  {what.name} ({what.role}): {what.paper}, {what.page}; put it in {place}")
            continue
        item = found[what]
        wrong, places = problems(item), ", ".join(str(f) for f in item.folders[:2])
        places += f" and {len(item.folders) - 2} more" if len(item.folders) > 2 else ""
        lines.append(f"{'found  ' if not wrong else 'CHECK  '}  {what.name} ({what.role}) in {places}")
        lines += [f"           {line}" for line in wrong]
    return lines
