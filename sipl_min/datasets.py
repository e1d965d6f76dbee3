"""The public data sets on disk: found in the layouts that people have, counted, paired, a sample of them read."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from .data import INPUTS, TARGETS, by_name, refuse_bad, sort_out
from .degrade import CDD11, COLUMNS, check_suite
from .files import InputError
from .photos import PHOTOS


@dataclass(frozen=True)
class DataSet:
    """What a right copy is, and where it comes from."""

    name: str
    role: str  # "train" or "test"
    count: int  # pairs, or clean images
    where: str  # names by which a folder is known
    columns: tuple  # of the tables that it is the test or the training for
    source: str  # paper and page
    clean: bool = False  # clean images only: their degradation is made here
    clear: int | None = None  # distinct targets, where fewer than inputs
    other: tuple = ()  # (count, what a copy of this size is)
    place: str | None = None  # where below the root to put it, if not simply under its name

    def layout(self):
        """Where its images belong below the root, in words."""
        halves = "" if self.clean else "/clear, low, haze, ..." if self.name == "CDD-11" else "/input and target"
        return (self.place or f"{self.name}/{self.role}") + halves


RESIDE = "RESIDE, Li et al. 2019, sites.google.com/view/reside-dehaze-datasets"
JORDER = "JORDER, Yang et al. 2017, www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html"
BSD = "BSD, Martin et al. 2001, www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds"
WED = "WED, Ma et al. 2017, ece.uwaterloo.ca/~k29ma/exploration"
TOGETHER = "BSD400 and WED in one folder, as AirNet has them"
QIAN = "Qian et al. 2018, github.com/rui1996/DeRaindrop"
HEAVY_RAIN = "Li, Cheong & Tan 2019, github.com/liruoteng/HeavyRainRemoval"
TRANSWEATHER = "TransWeather, Valanarasu et al. 2022, github.com/jeya-maria-jose/TransWeather"
DEEPDEBLUR = "DeepDeblur, Nah et al. 2017, seungjunnah.github.io/Datasets/gopro"
RETINEX = "RetinexNet, Wei et al. 2018, daooshee.github.io/BMVC2018website"
ONERESTORE = "OneRestore, Guo et al. 2024, github.com/gy65896/OneRestore"
DESNOW = "DesnowNet, Liu et al. 2018, sites.google.com/view/yunfuliu/desnownet"
NEW_RAIN = "the newer version of Rain100L, with which these tables do not compare"
NOISE = ("CBSD68_15", "CBSD68_25", "CBSD68_50")
WEATHER = ("Snow100K-S", "Snow100K-L", "Outdoor-Rain", "RainDrop")

# `where`: names that a part of the path has, in lower case, whole words; behind "=" the word for a task, which counts
# only as the name of the very folder that holds the images. The deepest part that tells wins, then the order here.
SETS = (
    DataSet("CBSD68", "test", 68, r"c?bsds?68", NOISE, BSD, clean=True),
    DataSet("BSD400", "train", 400, r"bsds?400", (), BSD, clean=True),
    DataSet("WED", "train", 4744, r"wed|waterloo[a-z]*", (), WED, clean=True),
    DataSet("BSD400 + WED", "train", 5144, r"=denoise", (), TOGETHER, clean=True, place="Train/Denoise"),
    DataSet("RainDrop", "test", 58, r"(de)?rain.?drop", ("RainDrop",), QIAN),
    DataSet("Outdoor-Rain", "test", 750, r"outdoor.?(heavy.?)?rain|=test1", ("Outdoor-Rain",), HEAVY_RAIN),
    DataSet("AllWeather", "train", 18069, r"all.?weather", WEATHER, TRANSWEATHER),
    DataSet("Rain100L", "test", 100, r"rain100l|=derain", ("Rain100L",), JORDER, other=(200, NEW_RAIN)),
    DataSet("Rain100L", "train", 200, r"rain100l|=derain", ("Rain100L",), JORDER, other=(1800, NEW_RAIN)),
    DataSet("SOTS-outdoor", "test", 500, r"sots|outdoor|=dehaze", ("SOTS",), RESIDE, clear=492),
    DataSet("OTS", "train", 72135, r"ots|outdoor|=dehaze", ("SOTS",), RESIDE, clear=2061),
    DataSet("GoPro", "test", 1111, r"gopro[a-z]*|=deblur", ("GoPro",), DEEPDEBLUR),
    DataSet("GoPro", "train", 2103, r"gopro[a-z]*|=deblur", ("GoPro",), DEEPDEBLUR),
    DataSet("LOL-v1", "test", 15, r"lol(v1|.?dataset)?|eval15|=enhance", ("LOLv1",), RETINEX),
    DataSet("LOL-v1", "train", 485, r"lol(v1|.?dataset)?|our485|=enhance", ("LOLv1",), RETINEX),
    DataSet("CDD-11", "test", 2200, r"cdd.?11", tuple(CDD11), ONERESTORE, clear=200),
    DataSet("CDD-11", "train", 13013, r"cdd.?11", tuple(CDD11), ONERESTORE, clear=1183),
    DataSet("Snow100K-S", "test", 16611, r"snow100k.?s", ("Snow100K-S",), DESNOW),
    DataSet("Snow100K-L", "test", 16801, r"snow100k.?l", ("Snow100K-L",), DESNOW),
)
# What lies beside those in the same collections and is another data set.
OTHERS = r"indoor|hide|realblur[a-z]*|rain(100h|800|1200|1400|12600)|test(100|1200|2800)|test.?b|noisy\d*|lol.?v2"
OTHERS += r"|kodak\d*|urban\d*|mcmaster|sidd|dnd|(nh|dense).?haze|blur.gamma"


@dataclass
class Found:
    """One data set as it lies on disk. pairs: combination (CDD-11) or "" -> list of (input or None, target), sorted.
    It has none where `folders` are empty, or hold something in a layout that is not known."""

    what: DataSet
    folders: list = field(default_factory=list)
    pairs: dict = field(default_factory=dict)
    unpaired: list = field(default_factory=list)  # a sentence for each input without a target

    def count(self):
        return sum(map(len, self.pairs.values()))

    def of(self, column):
        """The pairs with which a column of a table is measured or trained."""
        return self.pairs.get(column, self.pairs.get("", []))

    def take(self, folder, inputs, target):
        """Pair the inputs, column -> name of a folder, with the targets beside them."""
        self.folders.append(folder)
        for column, name in inputs.items():
            pairs, unpaired = by_name(photos_of(folder / name), photos_of(folder / target))
            self.pairs.setdefault(column, []).extend(pairs)
            self.unpaired += unpaired


def photos_of(folder, patterns=("*", "*/*")):
    """Photos in a folder and one level deeper, where RESIDE has part1 to part4: path -> its folder, sorted."""
    found = {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        name = path.relative_to(folder)
        if path.suffix.lower() in PHOTOS and not any(part.startswith((".", "__MACOSX")) for part in name.parts):
            found[path] = name.parent.as_posix()
    return found


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
    return "train" if inputs.lower() == "rainy" else None


def fitting(parts, role, clean=None):
    """The data sets that a folder's path (names from the root down) may tell of, the likeliest first.

    clean: whether they have clean images only; None for any set, in any layout.
    """

    def known(pattern, part):
        return pattern and re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", part.lower())

    if any(known(OTHERS, part) for part in parts):
        return []
    several = [what for what in SETS if role in (what.role, None) and clean in (what.clean, None)]
    for depth, part in reversed(list(enumerate(parts))):
        task_counts = depth == len(parts) - 1 or clean is None and depth > 0
        fits = []
        for what in several:
            name, _, task = what.where.partition("=")
            if known(name.rstrip("|"), part) or task_counts and part.lower() == task:
                fits.append(what)
        if fits:
            return fits
    return []


def find(root):
    """The data sets below a folder, in the order of `SETS`. Raises InputError where there is no such folder.

    Known layouts: AirNet's and PromptIR's (Train/Derain/rainy, test/dehaze/input, ...), OneRestore's
    (CDD-11_test/clear, ...), Restormer's (test/Rain100L/input, ...), the originals, and any folder named after its data
    set with `input` and `target` in it. Several folders of one set (GoPro's scenes) are put together.
    """
    root, found, visited, strange = Path(root), {}, set(), []
    if not root.is_dir():
        raise InputError(f"no folder {str(root)!r}: put the data sets below one, and name it with --data")
    for place, folders, files in os.walk(root, followlinks=True):
        folder = Path(place)
        if folder.resolve() in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(folder.resolve())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
        parts = (root.resolve().name, *folder.relative_to(root).parts)
        inputs, target = halves(folders)
        if inputs and target:
            folders[:] = [f for f in folders if f not in (*inputs.values(), target)]
            role, cdd = role_of(parts, next(iter(inputs.values()))), "" not in inputs
            several = fitting(parts, role, clean=False)
            if cdd:  # told by what is in it, not by its name
                several = [what for what in SETS if what.name == "CDD-11" and role in (what.role, None)]
            if several and cdd == (several[0].name == "CDD-11"):
                found.setdefault(several[0], Found(several[0])).take(folder, inputs, target)
            else:
                strange.append((folder, several))
        elif any(Path(f).suffix.lower() in PHOTOS for f in files) or not folders:
            role = role_of(parts)
            images, several = photos_of(folder, ["*"]), fitting(parts, role, clean=True)
            if images and several:
                item = found.setdefault(several[0], Found(several[0]))
                item.folders.append(folder)
                item.pairs.setdefault("", []).extend((None, path) for path in images)
            else:
                strange.append((folder, fitting(parts, role)))
    known = {*found}
    for folder, several in strange:  # what a role does not tell may be part of what is known already
        for what in several if known.isdisjoint(several) else ():
            found.setdefault(what, Found(what)).folders.append(folder)
    return [found[what] for what in SETS if what in found]


def halves(folders):
    """Which of some folders hold inputs, combination (CDD-11) or "" -> name, and which one the targets, or None."""
    names = {f.lower(): f for f in folders}
    combinations = {c: names[c] for c in CDD11 if c in names}
    if "clear" in names and len(combinations) > 1:
        return combinations, names["clear"]
    inputs, targets = ([names[n] for n in known if n in names] for known in (INPUTS, TARGETS))
    return {"": name for name in inputs[:1]}, next(iter(targets), None)


def training(root, suite, skip_bad=False):
    """What lies below `root` to train a suite on, as arguments of `data.Images`: source (clean images) and pairs.

    Columns without pairs (noise always) get clean images with degradations made on the fly: BSD400 and WED, or else the
    targets of all pairs. Raises InputError where there is nothing, and where a set that the suite needs is there, but
    empty, in a layout that is not known, or without the target of some input (unless `skip_bad`).
    """
    check_suite(suite)
    found = [f for f in find(root) if f.what.role == "train"]
    pairs = {}
    for f in found:
        columns = [column for column in COLUMNS[suite] if column in f.what.columns]
        empty = [column for column in columns or ["images"] * f.what.clean if not f.of(column)]
        if empty:
            way = f"arrange it as {f.what.layout()} below {str(root)!r}, or move it away"
            raise InputError(f"{f.what.name} in {str(f.folders[0])!r} has nothing to train {empty[0]} on: {way}")
        pairs |= {column: f.of(column) for column in columns}
        if columns:
            refuse_bad([pair for several in f.pairs.values() for pair in several], f.unpaired, skip_bad)
    clean = [y for f in found if f.what.clean for _, y in f.of("")]
    clean = clean or sorted({y for several in pairs.values() for _, y in several})
    clean = clean or sorted({y for f in found for several in f.pairs.values() for _, y in several})
    if not clean:
        raise InputError(f"no training set of {suite} below {str(root)!r}: python -m sipl_min data says what fits")
    return dict(source=clean, pairs=pairs)


def problems(item, sample=20):
    """What is wrong with a copy, one sentence each: its count, inputs left over, and what reading a sample shows."""
    what, count, lines = item.what, item.count(), []
    kind = "images" if what.clean else "pairs"
    if not count:
        lines.append(f"no {kind}: it is empty, or in a layout that is not known; arrange it as {what.layout()}")
    elif what.other and count == what.other[0] and len(item.folders) == 1:
        lines.append(f"{count} {kind} instead of {what.count}: this is {what.other[1]}")
    elif count != what.count:
        lines.append(f"{count} {kind} instead of {what.count}: the copy is not whole, or not this data set")
    everything = [tuple(filter(None, pair)) for pairs in item.pairs.values() for pair in pairs]
    clear = len({pair[-1] for pair in everything})
    if what.clear and count == what.count and clear != what.clear:
        lines.append(f"{clear} different clear images instead of {what.clear}")
    lines += item.unpaired[:3]
    if len(item.unpaired) > 3:
        lines.append(f"... and {len(item.unpaired) - 3} more without a target")
    return lines + sort_out(everything[:: max(1, count // sample)])[1]


def report(root):
    """What `python -m sipl_min data` prints: each data set found or missing, one line, and what is wrong below it."""
    found, lines = {item.what: item for item in find(root)}, []
    for what in SETS:
        if what not in found:
            place = Path(root) / what.layout()
            lines.append(f"missing  {what.name} ({what.role}): {what.source}; put it in {place}")
            continue
        item = found[what]
        wrong, places = problems(item), ", ".join(str(f) for f in item.folders[:2])
        places += f" and {len(item.folders) - 2} more" if len(item.folders) > 2 else ""
        lines.append(f"{'CHECK  ' if wrong else 'found  '}  {what.name} ({what.role}) in {places}")
        lines += [f"           {line}" for line in wrong]
    return lines
