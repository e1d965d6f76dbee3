"""The public data sets on disk: found in the layouts that people have, counted, paired, a sample of them read."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from .data import below, by_name, check, halves
from .degrade import CDD11, COLUMNS, check_suite
from .files import InputError
from .photos import PHOTOS, walk


@dataclass(frozen=True)
class DataSet:
    """What a right copy is, and where it comes from."""

    name: str
    role: str  # "train" or "test"
    count: int  # pairs, or clean images
    where: str  # pattern of names in a folder's path, in lower case, whole words
    columns: tuple  # of the tables that it is the test or the training for
    source: str  # paper and page
    clean: bool = False  # clean images only: their degradation is made here
    clear: int | None = None  # distinct targets, where fewer than inputs
    other: tuple = ()  # (count, what a copy of this size is)
    task: str | None = None  # another name, which counts only for the very folder that holds the images

    def layout(self):
        """Where its images belong below the root, in words."""
        halves = "" if self.clean else "/clear, low, haze, ..." if self.name == "CDD-11" else "/input and target"
        return f"{self.name}/{self.role}" + halves


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

SETS = (  # the deepest part of a path that tells wins, then the order here
    DataSet("CBSD68", "test", 68, r"c?bsds?68", NOISE, BSD, clean=True),
    DataSet("BSD400 + WED", "train", 5144, r"bsds?400.+wed", (), TOGETHER, clean=True, task="denoise"),
    DataSet("BSD400", "train", 400, r"bsds?400", (), BSD, clean=True),
    DataSet("WED", "train", 4744, r"wed|waterloo[a-z]*", (), WED, clean=True),
    DataSet("RainDrop", "test", 58, r"(de)?rain.?drop", ("RainDrop",), QIAN),
    DataSet("Outdoor-Rain", "test", 750, r"outdoor.?(heavy.?)?rain", ("Outdoor-Rain",), HEAVY_RAIN, task="test1"),
    DataSet("AllWeather", "train", 18069, r"all.?weather", WEATHER, TRANSWEATHER),
    DataSet("Rain100L", "test", 100, r"rain100l", ("Rain100L",), JORDER, other=(200, NEW_RAIN), task="derain"),
    DataSet("Rain100L", "train", 200, r"rain100l", ("Rain100L",), JORDER, other=(1800, NEW_RAIN), task="derain"),
    DataSet("SOTS-outdoor", "test", 500, r"sots|outdoor", ("SOTS",), RESIDE, clear=492, task="dehaze"),
    DataSet("OTS", "train", 72135, r"ots|outdoor", ("SOTS",), RESIDE, clear=2061, task="dehaze"),
    DataSet("GoPro", "test", 1111, r"gopro[a-z]*", ("GoPro",), DEEPDEBLUR, task="deblur"),
    DataSet("GoPro", "train", 2103, r"gopro[a-z]*", ("GoPro",), DEEPDEBLUR, task="deblur"),
    DataSet("LOL-v1", "test", 15, r"lol(v1|.?dataset)?|eval15", ("LOLv1",), RETINEX, task="enhance"),
    DataSet("LOL-v1", "train", 485, r"lol(v1|.?dataset)?|our485", ("LOLv1",), RETINEX, task="enhance"),
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


def role_of(parts):
    """ "train", "test" or None: the deepest part of a path with such a word tells."""
    for depth, part in reversed([*enumerate(parts)]):
        words = re.findall("[a-z0-9]+", part.lower())
        for word in words if depth or len(words) == 1 else ():  # of the root only a name like "Train"
            if re.fullmatch(r"train(ing|set|data)?|[a-z]*train|our485", word):
                return "train"
            if re.fullmatch(r"test(ing|set|data|1)?|(?!lat|con)[a-z]*test|eval15|val|sots", word):
                return "test"
    return None


def fitting(parts, role, clean=None):
    """The data sets that a folder's path (names from the root down) may tell of, the likeliest first.

    clean: whether they have clean images only; None for any set, in any layout."""
    parts = [part.lower() for part in parts]
    if any(whole(OTHERS, part) for part in parts):
        return []
    several = [what for what in SETS if role in (what.role, None) and clean in (what.clean, None)]
    for part in reversed(parts):
        task = part if clean is None or part == parts[-1] else ""
        if fits := [what for what in several if whole(what.where, part) or what.task == task]:
            return fits
    return []


def whole(pattern, part):
    return re.search(rf"(?<![a-z0-9])(?:{pattern})(?![a-z0-9])", part)


def find(root):
    """The data sets below a folder, in the order of `SETS`. Raises InputError where there is no such folder.

    Known layouts: those of AirNet, PromptIR, OneRestore, Restormer, the originals, and any folder named after its set
    with `input` and `target` in it. Several folders of one set (GoPro's scenes) are put together."""
    root, found, strange = Path(root), {what: Found(what) for what in SETS}, []
    if not root.is_dir():
        raise InputError(f"no folder {str(root)!r}: put the data sets below one, and name that")
    for folder, folders, files in walk(root):
        folders[:] = [f for f in folders if not f.startswith("__MACOSX")]
        images = [(None, folder / f) for f in files if Path(f).suffix.lower() in PHOTOS]
        parts = (root.resolve().name, *folder.relative_to(root).parts)
        role, pairs = role_of(parts), {}
        inputs, target = columns_of(folders)
        if inputs and target:
            fits, parted = fitting(parts, role, clean=False), (*inputs.values(), target)
            inside = {path.suffix.lower() for name in parted for path in (folder / name).iterdir()}
            if fits or inside & {*PHOTOS}:  # else `data` and `out` of a project, with sets below them
                folders[:] = [f for f in folders if f not in parted]
            if fits and ("" in inputs) != (fits[0].name == "CDD-11"):
                targets = below(folder / target, empty=True)
                pairs = {column: by_name(below(folder / name, empty=True), targets) for column, name in inputs.items()}
        elif images or not folders:
            fits = fitting(parts, role, clean=True) if images else []
            pairs = {"": (images, [])} if fits else {}
            fits = fits or fitting(parts, role)
        else:
            continue
        if not pairs:
            strange.append((folder, fits))
            continue
        item = found[fits[0]]
        item.folders.append(folder)
        for column, (good, unpaired) in pairs.items():
            item.pairs.setdefault(column, []).extend(good)
            item.unpaired += unpaired
    known = {what for what, item in found.items() if item.folders}
    for folder, fits in strange:
        if known.isdisjoint(fits):  # what a role does not tell may be part of what is known already
            for what in fits:
                found[what].folders.append(folder)
    return [item for item in found.values() if item.folders]


def columns_of(folders):
    """Which of some folders hold inputs, combination (CDD-11) or "" -> name, and which one the targets, or ""."""
    inputs, target = halves(folders)
    combinations = {column: f for column in CDD11 for f in folders if f.lower() == column}
    if target.lower() == "clear" and len(combinations) > 1:
        return combinations, target
    return {"": inputs} if inputs else {}, target


def training(root, suite):
    """What lies below `root` to train a suite on, as arguments of `data.Images`: source, pairs and unpaired.

    Columns without pairs (noise always) degrade clean images: BSD400 and WED, or else the targets of all pairs. Raises
    InputError where there is nothing, and where a set that the suite needs is there but cannot be used."""
    check_suite(suite)
    found = [f for f in find(root) if f.what.role == "train"]
    pairs, unpaired = {}, []
    for f in found:
        columns = [column for column in COLUMNS[suite] if column in f.what.columns]
        if empty := [column for column in columns or ["images"] * f.what.clean if not f.of(column)]:
            way = f"arrange it as {f.what.layout()} below {str(root)!r}, or move it away"
            raise InputError(f"{f.what.name} in {str(f.folders[0])!r} has nothing to train {empty[0]} on: {way}")
        pairs |= {column: f.of(column) for column in columns}
        unpaired += f.unpaired if columns else []
    clean = [y for f in found if f.what.clean for _, y in f.of("")]
    for several in ([*pairs.values()], [some for f in found for some in f.pairs.values()]):
        clean = clean or sorted({y for some in several for _, y in some})
    if not clean:
        raise InputError(f"no training set of {suite} below {str(root)!r}: python -m sipl_min data says what fits")
    return dict(source=clean, pairs=pairs, unpaired=unpaired)


def problems(item, sample=20):
    """What is wrong with a copy, one sentence each: its count, inputs left over, and what reading a sample shows."""
    what, count, lines = item.what, item.count(), []
    kind = "images" if what.clean else "pairs"
    pairs = [tuple(filter(None, pair)) for several in item.pairs.values() for pair in several]
    clear = len({pair[-1] for pair in pairs})
    if not count:
        lines.append(f"no {kind}: it is empty, or in a layout that is not known; arrange it as {what.layout()}")
    elif what.other and count == what.other[0] and len(item.folders) == 1:
        lines.append(f"{count} {kind} instead of {what.count}: this is {what.other[1]}")
    elif count != what.count:
        lines.append(f"{count} {kind} instead of {what.count}: the copy is not whole, or not this data set")
    elif what.clear not in (None, clear):
        lines.append(f"{clear} different clear images instead of {what.clear}")
    lines += item.unpaired[:3]
    if len(item.unpaired) > 3:
        lines.append(f"... and {len(item.unpaired) - 3} more without a target")
    return lines + check(pairs[:: max(1, count // sample)], skip_bad=True)[1]


def report(root):
    """What `python -m sipl_min data` prints: each data set found or missing, one line, and what is wrong below it."""
    found, lines = {item.what: item for item in find(root)}, []
    for what in SETS:
        name = f"{what.name} ({what.role})"
        if item := found.get(what):
            wrong, more = problems(item), len(item.folders) - 2
            places = ", ".join(map(str, item.folders[:2])) + (f" and {more} more" if more > 0 else "")
            lines.append(f"{'CHECK' if wrong else 'found'}    {name} in {places}")
            lines += [f"           {line}" for line in wrong]
        else:
            lines.append(f"missing  {name}: {what.source}; put it in {Path(root) / what.layout()}")
    return lines
