"""The command line: python -m sipl_min demo | train | restore | benchmark | study | data."""

import argparse
import os
import sys
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from . import benchmark, data, datasets, real, show, speed, study, train
from .degrade import COLUMNS, SETTINGS, check_setting
from .files import InputError, check_photo, check_writable, find_photos, read, whole, write
from .published import from_published
from .restore import choose_window
from .settings import PRESETS
from .sipl import SIPL
from .weights import included


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m sipl_min", description=(
        "Self-Improved Privilege Learning for image restoration. Start with: python -m sipl_min demo"))  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, function, text):
        c = commands.add_parser(name, help=text, description=text)
        c.set_defaults(function=function)
        return c

    c = command(
        "demo", demo, "Degrade three photos the model never saw, restore and refine them: a figure and a table."
    )
    weights(c)
    c.add_argument("--output", default="demo.png", help="where the figure goes (default: %(default)s)")
    c.add_argument("--setting", default="cdd11", help=f"{', '.join(SETTINGS)} (default: %(default)s)")
    c.add_argument("--seed", type=int, default=0, help="of the degradations (default: %(default)s)")

    c = command("restore", restore, "Restore a photo, or all photos of a folder; size, depth and alpha are kept.")
    c.add_argument("input", help="a photo, or a folder of photos")
    c.add_argument("output", help="a file name, or a folder that will be made")
    weights(c)
    c.add_argument(
        "--feedback",
        default="privilege",
        choices=["privilege", "chain"],
        help="what is fed back: the privilege (the paper's equations) or the image (the released code)",
    )
    c.add_argument("--tile", type=int, default=None, help="restore in windows of so many pixels a side, 0: never "
                   "(default: as large as memory allows)")  # fmt: skip
    c.add_argument("--overlap", type=int, default=64, help="pixels that windows share (default: %(default)s)")
    c.add_argument("--force", action="store_true", help="overwrite files that exist")
    c.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there)")

    c = command("train", train_model, "Train a model. Ctrl-C saves; the same command again continues.")
    c.add_argument("folder", help="where checkpoint, log and weights go")
    c.add_argument("--preset", default="nano", help=f"{', '.join(PRESETS)} (default: %(default)s)")
    c.add_argument("--weights", default=None, help="go on from a file that model.save wrote, or a published .ckpt or "
                   ".pth; a plain backbone gets new Proxy Fusion (default: new weights)")  # fmt: skip
    c.add_argument("--images", default=None, help="a folder of clean photos (default: the embedded images)")
    c.add_argument("--setting", default="cdd11", help=f"{', '.join(SETTINGS)} (default: %(default)s)")
    c.add_argument("--recipe", default="authors", help=f"{', '.join(train.RECIPES)} (default: %(default)s)")
    c.add_argument("--data", default=None, help="a folder with the real data sets: their training pairs (instead of "
                   "--images)")  # fmt: skip
    for name, text in (("steps", "training steps"), ("count", "crops in a batch, of all processes together"),
                       ("size", "pixels a side of a crop"), ("peak", "highest learning rate"),
                       ("warmup", "steps until it is reached")):  # fmt: skip
        kind = float if name == "peak" else int
        small, large = train.SCHEDULES["nano"][name], train.SCHEDULES["paper"][name]
        c.add_argument(f"--{name}", type=kind, help=f"{text} (default: {small}; preset paper: {large})")
    for name, value, text in (("seed", 0, "of everything random"), ("save-every", 100, "steps between checkpoints"),
                              ("validate-every", 0, "log PSNR of the embedded held-out photos every so many steps"),
                              ("accumulate", 1, "work on a batch in so many parts, for lack of memory")):  # fmt: skip
        c.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    c.add_argument("--save-minutes", type=float, default=10, help="and minutes (default: %(default)s)")
    c.add_argument("--ema", type=float, default=0.0, help="decay of a moving average of the weights, e.g. 0.999, which "
                   "then is the result (default: none)")  # fmt: skip
    c.add_argument("--mild", type=float, default=0.0, help="share of the crops that are degraded only in part, so that "
                   "good photos are not spoilt (default: none)")  # fmt: skip
    c.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there)")

    c = command("benchmark", run_benchmark, "PSNR and SSIM on each column of a setting, the published table beside; "
                "or, as setting, speed: time and memory against the naive path, in one run; interrupted, "
                "the same command with --output goes on.")  # fmt: skip
    c.add_argument("setting", help=f"{', '.join(SETTINGS)}, all, or speed")
    weights(c)
    c.add_argument("--output", default=None, help="a CSV file with one line per column, photo and estimate; beside it "
                   "the tables as .md and a figure as .png")  # fmt: skip
    c.add_argument("--seed", type=int, default=0, help="of the degradations (default: %(default)s)")
    speed_options = c.add_argument_group("for speed only")
    speed_options.add_argument("--presets", nargs="+", default=["nano", "small"], help="(default: nano small)")
    speed_options.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512], help="pixels a side")
    speed_options.add_argument(
        "--T", nargs="+", type=refinements, default=[0, 1, 2], help="steps, or train: a training step"
    )
    speed_options.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    c.add_argument("--draws", type=int, default=1, help="how often each photo is degraded anew (default: %(default)s)")

    c.add_argument("--against", default=None, help="a second model, e.g. the plain backbone of equal training, to see "
                   "what refinement gains over it")  # fmt: skip
    c.add_argument("--data", default=None, help="a folder with the real data sets: measure on those, as published")
    c.add_argument("--save", default=None, help="with --data, a folder for the restored images")

    c = command("study", run_study, "Does refinement pay? Trains every recipe with several seeds, equally long, and "
                "writes tables and a figure. Ctrl-C stops; the same command continues.")  # fmt: skip
    c.add_argument("folder", help="where trainings, study.csv, study.md and study.png go")
    c.add_argument("--images", default=None, help="a folder of clean photos (default: the embedded images)")
    c.add_argument("--test", default=None, help="a folder of test photos (default: the embedded held-out ones)")
    c.add_argument("--settings", nargs="+", default=["cdd11", "five_task"], help="(default: cdd11 five_task)")
    c.add_argument("--arms", nargs="+", default=study.MAIN, help=f"of "
                   f"{', '.join(map(repr, study.ARMS))} (default: the first six)")  # fmt: skip
    c.add_argument("--preset", default="nano", help=f"{', '.join(PRESETS)} (default: %(default)s)")
    for name, value, text in (("seeds", 3, "trainings of each"), ("steps", 400, "training steps"),
                              ("T", 4, "refinement steps measured"), ("photos", 12, "test photos used, at most"),
                              ("size", 128, "pixels a side of a test photo, at most")):  # fmt: skip
        c.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    c.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there)")

    c = command(
        "data", show_data, "Which public data sets are there, whole and readable, and where the others come from."
    )
    c.add_argument("folder", nargs="?", default="data", help="where to look (default: %(default)s)")

    options = parser.parse_args(arguments)
    try:
        code = options.function(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 141
    except (InputError, FloatingPointError, OSError) as e:  # OSError: of paths that the system does not take
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        print(f"stopped{f': {e}' if str(e) else ''}", file=sys.stderr)
        return 130


def refinements(text):
    return text if text == "train" else int(text)


def weights(c):
    c.add_argument("--weights", "--checkpoint", help="a file that model.save wrote, or a published .ckpt, "
                   ".pt or .pth (default: the nano model included)")  # fmt: skip
    c.add_argument("--steps", type=int, default=None, help="refinement steps T (default: 1; a plain backbone: 0)")


def load(options):
    """The model of --weights, and --steps T checked."""
    options.device = train.usable(getattr(options, "device", None))
    if options.steps is not None and options.steps < 0:
        raise InputError(f"--steps must be a whole number >= 0, not {options.steps}")
    model = open_model(options.weights or included("nano"), options.device)
    if options.steps is None:
        options.steps = int(model.settings.fusion)
    return model


def open_model(path, device):
    published = Path(path).suffix in (".ckpt", ".pt", ".pth")
    return from_published(path).to(device) if published else SIPL.load(path, device)


# One row of the demo each: photo, column of the setting by its place in the published order (from the end).
DEMO = [("chelsea", -1), ("hopper", 0), ("camera", 2)]


def demo(options):
    check_setting(options.setting)
    if options.seed < 0:
        raise InputError(f"seed={options.seed} must be a whole number >= 0")
    show.without_screen()
    model, photos, columns = load(options), data.held_out(), list(COLUMNS[options.setting])
    rows = []
    print(f"{'photo, degradation':30s}{'input':>9s}" + "".join(f"{f'y{t}':>9s}" for t in range(options.steps + 1)))
    for name, number in DEMO:
        column = columns[number]
        photo = benchmark.centre(photos[name], 256)
        x, y = benchmark.pair(photo, options.setting, column, options.seed, next(model.parameters()).device)
        estimates = model.refine(x, options.steps, return_all=True)
        numbers = [benchmark.psnr(e, y) for e in (x, *estimates)]
        print(f"{f'{name}, {column}':30s}" + "".join(f"{n:6.2f} dB" for n in numbers))
        rows.append(show.estimates_row(x, estimates, y, f"{name}: {column}"))
    show.save(show.panels(rows), options.output)
    print(f"figure: {options.output}")


def restore(options):
    source, target = Path(options.input), Path(options.output)
    if source.is_dir():
        if target.is_file():
            raise InputError(f"{str(target)!r} is a file: name a folder for the restored photos")
        found, out = find_photos(source), target.resolve()
        if source.resolve() in out.parents:  # what was restored earlier is not restored again
            found = [p for p in found if out not in p.resolve().parents]
        jobs = [(path, target / path.relative_to(source)) for path in found]
        if not jobs:
            raise InputError(f"no photos in {str(source)!r} outside {str(target)!r}: put some there")
    else:
        jobs = [(source, target / source.name if target.is_dir() else target)]
    model, failed = load(options), []
    choose_window(model, 1, 8, 8, options.tile, options.overlap)  # bad values are named before any work
    for group in tqdm(one_size(opened(jobs, options.force, failed)), unit="group", disable=len(jobs) == 1):
        paths, places, photos = zip(*group)
        try:
            restored = model.restore(list(photos), options.steps, options.feedback, options.tile, options.overlap,
                                     progress=len(group) == 1)  # fmt: skip
        except (InputError, MemoryError, RuntimeError) as e:
            if isinstance(e, RuntimeError) and "memory" not in str(e):
                raise
            failed += [named(path, e) for path in paths]
            continue
        for path, place, photo in zip(paths, places, restored):
            try:
                write(place, photo)
            except InputError as e:
                failed.append(named(path, e))
    if failed and len(jobs) == 1:
        raise InputError(failed[0])
    print(f"restored {len(jobs) - len(failed)} of {len(jobs)} photos, in {str(target)!r}")
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def opened(jobs, force, failed):
    """The photos of jobs (path, place), read one by one; why one cannot be done is added to `failed`."""
    for path, place in jobs:
        try:
            if place.exists() and not force:
                raise InputError(f"{str(place)!r} exists: pass --force to overwrite it, or another name")
            photo = read(path)
            check_photo(photo)
            check_writable(place, photo)
        except InputError as e:
            failed.append(named(path, e))
        else:
            yield path, place, photo


def one_size(photos, pixels=2**18):
    """Groups of (path, place, photo) that fit into one batch: photos of one size, up to so many pixels together."""
    waiting = {}
    for item in photos:
        size = item[2].shape[:2]
        waiting.setdefault(size, []).append(item)
        if len(waiting[size]) * size[0] * size[1] >= pixels:
            yield waiting.pop(size)
        while sum(len(group) * h * w for (h, w), group in waiting.items()) > 16 * pixels:
            yield waiting.pop(next(iter(waiting)))  # sizes of which few come must not pile up
    yield from waiting.values()


def named(path, e):
    if not isinstance(e, InputError):  # torch has no type of its own for the end of memory on a CPU
        return f"not enough memory to restore {str(path)!r}: pass a smaller --tile"
    return str(e) if repr(str(path)) in str(e) or repr(path.name)[1:-1] in str(e) else f"{str(path)!r}: {e}"


def beginning(options):
    """The model that training starts from, and a word for it: new, or that of --weights."""
    torch.manual_seed(abs(options.seed))  # a negative seed is refused by fit, in its own words
    if not options.weights:
        return SIPL(options.preset, **train.DESIGN.get(options.recipe, {})), ""
    model = open_model(options.weights, "cpu")
    if options.recipe != "backbone" and not model.settings.fusion:  # starts as good as the backbone is
        model = SIPL.from_backbone(model, **(dict(identity_start=True) | train.DESIGN.get(options.recipe, {})))
    return model, f"weights of crc {zlib.crc32(Path(options.weights).read_bytes())}"


def train_model(options):
    model, start = beginning(options)
    with train.processes(options.device) as (device, first):
        if first:
            million = sum(p.numel() for p in model.parameters()) / 1e6
            print(f"{options.weights or options.preset}: {million:.2f} M parameters")
        check_setting(options.setting)
        images = options.images
        if options.data and options.images:
            raise InputError("--images and --data are two sources: pass one of them")
        if options.data:
            images = data.Images(**datasets.training(options.data, options.setting), cache=2**33)
            if first:
                print(f"{len(images)} clean images; pairs: " + (", ".join(
                    f"{len(p)} of {c}" for c, p in images.pairs.items()) or "none"))  # fmt: skip
        schedule = train.SCHEDULES[options.preset]
        schedule = {name: value if getattr(options, name) is None else getattr(options, name)
                    for name, value in schedule.items()}  # fmt: skip

        def validate(model):
            rows = benchmark.evaluate(model, options.setting, int(model.settings.fusion), size=128, progress=False)
            return {f"held_out_{e}": means["average"] for e, means in benchmark.average(rows).items()}

        every = options.validate_every
        schedule |= dict(validate=validate, validate_every=every) if every else {}
        names = ("setting", "recipe", "seed", "save_every", "save_minutes", "accumulate", "ema", "mild", "folder")
        given = {name: getattr(options, name) for name in names}
        train.fit(model, images, device=device, start=start, **schedule, **given)
        if first:
            print(f"weights: {Path(options.folder) / 'model.safetensors'}")


def run_study(options):
    names = ("images", "test", "settings", "arms", "seeds", "preset", "steps", "T", "photos", "size", "device")
    show.without_screen()
    rows = study.run(options.folder, **{name: getattr(options, name) for name in names})
    study.save(rows, options.folder)
    print(study.report(rows))


def show_data(options):
    print("\n".join(datasets.report(options.folder)))


def run_speed(options):
    show.without_screen()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path, rows = Path(options.output or ""), []
    keep = path.with_suffix(".unfinished.json") if options.output else None
    print(speed.HEAD)
    for row in speed.measure(options.presets, options.sizes, options.T, options.repeats, device, keep=keep):
        tqdm.write(speed.line(row))
        rows.append(row)
    print(f"medians of {options.repeats} alternating runs on {device}; memory: peak above the weights, each in its own "
          f"process;\na large matrix product reaches {speed.matrix_rate(device):.0f} GFLOP/s here; data: what "
          "making the batch takes, as part of our training step; differ: max |ours - naive| / max |naive|")  # fmt: skip
    if keep:
        benchmark.write_csv(rows, path)
        speed.draw(rows, path.with_suffix(".png"))
        keep.unlink()
        print(f"table: {path}, figure: {path.with_suffix('.png')}")


def run_benchmark(options):
    if options.output:
        benchmark.check_table(options.output)
    if options.setting == "speed":
        return run_speed(options)
    settings = list(SETTINGS) if options.setting == "all" else [options.setting]
    model, rows = load(options), []
    if options.data and options.output and len(settings) > 1:
        raise InputError("with --data, --output takes one setting at a time, so that an interrupted run can go on")
    against = open_model(options.against, options.device) if options.against else None
    text, parts = [], {}
    for setting in settings:
        if options.data:
            part, notes = real.evaluate(model, setting, options.data, options.steps, options.output, options.save,
                                        against=against)  # fmt: skip
            print(f"\n{setting}: the data sets below {options.data}, published protocol\n")
        else:
            part = benchmark.evaluate(model, setting, options.steps, seed=options.seed, draws=options.draws,
                                      against=against)  # fmt: skip
            notes = benchmark.missing(setting)
            print(f"\n{setting}: embedded held-out photos, synthetic degradations, middle 256 x 256 pixels\n")
        if part:
            for value in ("psnr", "ssim"):
                print(benchmark.table(part, setting, value, bool(options.data)) + "\n")
            text.append(f"## {setting}\n\n" + benchmark.markdown(part, setting, bool(options.data)))
        for line in notes:
            print(f"not measured here: {line}" if not options.data else f"note: {line}")
        rows += part
        parts |= {setting: part} if part else {}
    if not rows:
        raise InputError(f"nothing of {options.setting} can be measured with what lies below {options.data!r}")
    if options.output:
        benchmark.write_csv(rows, options.output)
        with whole(Path(options.output).with_suffix(".md")) as temporary:
            temporary.write_text("\n".join(text))
        show.without_screen()
        show.save(show.gains(parts), Path(options.output).with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
