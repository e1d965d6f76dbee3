"""The command line: python -m sipl_min demo | restore | train | benchmark | study | data.

What needs Matplotlib or scikit-image is imported by the commands that use it, so that `restore` starts without them.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from . import BACKBONES, PRESETS, SIPL, InputError, __version__, datasets, degrade, photos
from . import train as training
from .data import Images, Pairs, held_out
from .fast import accelerate
from .files import atomic_write, exit_code
from .weights import default_feedback, default_steps, refiner

SUITES = ", ".join(degrade.SUITES)


def main(arguments=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a file name that the terminal cannot show is no reason to fail
    options = parse(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: options.function(options))


def parse(arguments):
    about = "Self-Improved Privilege Learning for image restoration. Start with: python -m sipl_min demo"
    parser = argparse.ArgumentParser(prog="python -m sipl_min", description=about)
    parser.add_argument("--version", action="version", version=f"sipl_min {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, text, **options):
        c = commands.add_parser(function.__name__, help=text, description=text, **options)
        c.set_defaults(function=function)
        return c

    def model(c):
        c.add_argument(
            "--weights",
            "--checkpoint",
            default="nano",
            help="nano, nano-authors, nano-backbone, or a file, as train makes them (default: nano)",
        )
        c.add_argument("--steps", type=int, help="refinement steps T (default: what suits the weights)")
        c.add_argument("--device", help="cpu, cuda, ... (default: cuda if there)")
        c.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="to compute in")

    c = command(demo, "Degrade three photos that the model never saw, and restore them: a figure and a table.")
    model(c)
    c.add_argument("--output", default="demo.png", help="where the figure goes (default: %(default)s)")

    c = command(
        restore, "Restore a photo, or all photos of a folder; size, depth, alpha and metadata (TIFF: few) are kept."
    )
    c.add_argument("input", help="a photo, or a folder of photos")
    c.add_argument("output", help="a file name, or a folder that will be made")
    model(c)
    c.add_argument("--feedback", choices=["privilege", "chain", "again"], help="(default: what suits the weights)")
    c.add_argument("--tile", type=int, help="pixels a side of windows, 0: never (default: what fits the memory)")
    c.add_argument("--overlap", type=int, default=64, help="pixels that windows share (default: %(default)s)")
    c.add_argument("--max-pixels", type=float, default=200e6, help="refuse larger photos (default: %(default).0f)")
    c.add_argument("--force", action="store_true", help="restore anew, and write over, what is there already")

    c = command(train, "Train a model. Ctrl-C saves; the same command again continues.")
    c.add_argument("folder", help="where checkpoint, log and weights go")
    c.add_argument("--preset", choices=PRESETS, help="of new weights (default: nano)")
    c.add_argument("--backbone", choices=BACKBONES, help="of new weights (default: promptir)")
    c.add_argument("--weights", help="go on from: nano, your file, a published file; a backbone gets Proxy Fusion")
    source = c.add_mutually_exclusive_group()
    source.add_argument("--images", help="a folder of clean photos (default: the embedded images)")
    source.add_argument("--pairs", nargs=2, metavar=("INPUTS", "TARGETS"), help="folders of degraded and clean photos")
    source.add_argument("--data", help="a folder with the public data sets: train on their pairs")
    c.add_argument("--skip-bad", action="store_true", help="leave out photos and pairs that cannot be used")
    c.add_argument("--recipe", choices=training.RECIPES, help="(default: authors, or that of the weights)")
    c.add_argument("--suite", "--setting", help=f"{SUITES} (default: cdd11, or that of the weights)")
    c.add_argument("--steps", "--num-steps", dest="num_steps", type=int, help="training steps")
    c.add_argument("--batch-size", "--count", type=int, help="crops in a batch, of all processes together")
    c.add_argument("--crop-size", "--size", type=int, help="pixels a side of a crop")
    c.add_argument("--lr", "--peak", type=float, help="highest learning rate")
    c.add_argument("--warmup", type=int, help="steps until it is reached")
    c.add_argument("--weight-decay", type=float, help="of AdamW")
    c.add_argument("--grad-clip", type=float, help="largest gradient norm")
    c.add_argument("--seed", type=int, help="of everything random")
    c.add_argument("--save-every", type=int, help="steps between checkpoints")
    c.add_argument("--save-minutes", type=float, help="minutes between checkpoints")
    c.add_argument("--accumulate", type=int, help="work on a batch in so many parts, for lack of memory")
    c.add_argument("--num-workers", type=int, help="processes that make batches ahead")
    c.add_argument("--ema", type=float, help="decay of a moving average of the weights, e.g. 0.999: the result then")
    c.add_argument(
        "--decibels", type=float, help="weight of PSNR in the loss beside L1, e.g. 0.002: spares good photos"
    )
    c.add_argument(
        "--shares", nargs="+", metavar="COLUMN=N", help="how often training meets a column, 1 or as in degrade.SHARES"
    )
    c.add_argument("--window", type=int, help="pixels a side of the part of each crop that is learned from")
    c.add_argument("--mild", type=float, help="share of the crops that are degraded only in part")
    c.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="in bfloat16 (default: on CUDA only)")
    c.add_argument("--device", help="cpu, cuda, ... (default: cuda if there)")

    c = command(benchmark, "PSNR and SSIM on each column of a suite, the published table beside.")
    c.add_argument("suite", help=f"{SUITES}, or keep: photos that should be left alone")
    model(c)
    c.add_argument("--data", help="a folder with the public data sets: measure on those, as published")
    c.add_argument("--against", help="weights of a second model, e.g. the backbone of equal training")
    c.add_argument("--output", help="a CSV file, a line for each estimate; an interrupted run continues; tables as .md")
    c.add_argument("--draws", type=int, default=1, help="how often each photo is degraded (default: %(default)s)")
    c.add_argument("--seed", type=int, default=0, help="of the degradations (default: %(default)s)")

    c = command(data, "Which public data sets are there, whole and readable, and where the others come from.")
    c.add_argument("folder", nargs="?", default="data", help="where to look (default: %(default)s)")

    command(study, "What the loop is worth: see python -m sipl_min.study --help", add_help=False)
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.function is not study:
        parser.error(f"unrecognized arguments: {' '.join(options.rest)}")
    options.command = f"python -m sipl_min {shlex.join(arguments)}"
    return options


def load(options):
    """The model of --weights on --device in --dtype, fast, and --steps."""
    model = SIPL.load(options.weights, training.pick_device(options.device)).to(getattr(torch, options.dtype))
    options.steps = default_steps(model) if options.steps is None else options.steps
    if getattr(options, "feedback", None) and not options.steps:
        raise InputError(f"--feedback {options.feedback}: nothing is fed back with --steps 0, pass --steps 1 or more")
    options.feedback = getattr(options, "feedback", None) or default_feedback(model)
    if options.steps < 0:
        raise InputError(f"--steps {options.steps}: pass the number of refinements, 0 or more")
    if options.steps and not model.fusion and options.feedback != "again":
        raise InputError(f"--steps {options.steps}: {options.weights} has no Proxy Fusion, pass --steps 0")
    return accelerate(model)


def demo(options):
    import matplotlib
    from matplotlib.backend_bases import FigureCanvasBase

    from . import evaluate, show

    matplotlib.use("Agg")  # draw where there is no display
    if Path(options.output).suffix[1:].lower() not in FigureCanvasBase.filetypes:
        raise InputError(f"cannot write a figure to {options.output!r}: end the name in .png, .pdf or .svg")
    asked, model, rows = options.steps, load(options), []
    if asked is None and model.fusion and "window" not in model.about:  # shows the loop, though one pass would do
        options.steps = max(options.steps, 1)
    print(f"{'photo, degradation':30s}{'input':>9s}" + "".join(f"{f'y{t}':>9s}" for t in range(options.steps + 1)))
    for (name, photo), column in zip(held_out().items(), ("streaks", "dim", "noise")):
        x, y = evaluate.pair(evaluate.center(photo, 256), "everyday", column)
        see = refiner(model, x, options.steps, options.feedback, return_all=True)
        estimates = see(x.to(next(model.parameters())))
        numbers = [evaluate.psnr(e, y) for e in (x, *estimates)]
        print(f"{f'{name}, {column}':30s}" + "".join(f"{n:6.2f} dB" for n in numbers))
        rows.append(show.estimates_row(x, [e.float().cpu() for e in estimates], y, f"{name}: {column}"))
    show.save(show.panels(rows), options.output)
    print(f"figure: {options.output}")


def restore(options):
    chosen = {name: getattr(options, name) for name in ("steps", "feedback", "tile", "overlap", "force", "max_pixels")}
    restored, skipped, problems = photos.restore_folder(load(options), options.input, options.output, **chosen)
    there = f"; {skipped} were there already (--force restores them anew)" if skipped else ""
    print(f"restored {restored} of {restored + skipped + len(problems)} photos, in {options.output!r}{there}")
    if Path(options.input).is_dir() and (others := photos.other_kinds(options.input)):
        print(f"not photos by their endings, and left alone: {others}")
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


def train(options):
    chosen = {n: v for n in training.Options.__annotations__ if (v := getattr(options, n, None)) is not None}
    if options.shares:
        chosen["shares"] = dict(map(share, options.shares))
    if options.weights and (options.preset or options.backbone):
        raise InputError("--preset and --backbone are of new weights: leave them out, or --weights")
    torch.manual_seed(options.seed or 0)
    if not options.weights:
        settings, preset = training.RECIPE_SETTINGS[options.recipe or "authors"], options.preset or "nano"
        model = SIPL(preset, backbone=options.backbone or "promptir", **settings)
        chosen = training.SCHEDULES[preset] | chosen
    else:
        model, chosen["start"] = SIPL.load(options.weights), options.weights
        if options.recipe and training.needs_fusion(options.recipe) > bool(model.fusion):  # begins as the backbone is
            closed = options.recipe != "overview"  # whose path would stay closed, see data/README.md
            about, model = model.about, SIPL.from_backbone(model, identity_start=closed)
            model.about = {"num_steps": about.get("num_steps", 0)}
    images, o = None, vars(training.Options) | chosen
    if options.pairs or options.data:  # which are read with the options that `fit` will find
        begun = training.read_checkpoint(Path(options.folder), model)
        o |= (begun["run"] if begun else training.finetune_options(model, options.weights, options.recipe)) | chosen
    if options.pairs:
        images = Pairs(*options.pairs, crop_size=o["crop_size"], seed=o["seed"], skip_bad=options.skip_bad)
    elif options.data:
        found = datasets.training(options.data, o["suite"])
        made = f"what else suite {o['suite']} has is made of {len(found['source'])} clean images"
        print(f"pairs for {', '.join(found['pairs']) or 'no column'}; {made}")
        images = Images(**found, cache=2**33, skip_bad=options.skip_bad)
    elif options.images:
        images = Images(options.images, skip_bad=options.skip_bad)
    for line in getattr(images, "left_out", ()):
        print(f"left out: {line}")
    with training.processes(options.device) as (device, first):
        training.fit(model, images, recipe=options.recipe, folder=options.folder, device=device, **chosen)
        if first:
            print(f"weights: {Path(options.folder) / 'model.safetensors'}")


def share(text):
    """ "noise=300" -> ("noise", 300)"""
    column, _, number = text.partition("=")
    if not number.isdecimal():
        raise InputError(f"--shares {text!r}: write a column and a whole number, as in noise=300")
    return column, int(number)


def benchmark(options):
    from . import evaluate

    if options.draws < 1 or options.seed < 0:
        raise InputError(f"--draws {options.draws} --seed {options.seed}: they must be at least 1 and 0")
    if (options.data or options.suite == "keep") and (options.draws, options.seed) != (1, 0):
        raise InputError("--draws and --seed are of suites on embedded photos: leave them out")
    if options.data and options.suite == "keep":
        raise InputError("--data: the suite keep has photos of its own, leave it out")
    model = load(options)
    against = SIPL.load(options.against).to(next(model.parameters())) if options.against else None
    if options.suite == "keep":
        cases = evaluate.keep()
    elif options.data:
        cases = evaluate.real(options.suite, options.data)
    else:
        cases = evaluate.embedded(options.suite, seed=options.seed, draws=options.draws)
    notes = "\n".join(f"note: {note}" for note in cases.notes)
    print(notes, end="\n" * bool(notes), flush=True)
    if not len(cases):
        raise InputError(f"nothing of {options.suite} lies below {options.data!r}: see python -m sipl_min data")
    report = Path(options.output).with_suffix(".md") if options.output else None
    if report and report.exists() and not Path(options.output).exists():
        raise InputError(f"{str(report)!r} is there, and would be written over: move it, or pass another --output")
    text = evaluate.markdown(evaluate.measure(model, cases, options.steps, against, options.output), options.suite)
    print(text)
    if report:
        with atomic_write(report) as temporary:
            temporary.write_text(f"{text}\n{notes}".strip() + "\n", encoding="utf-8")


def data(options):
    print("\n".join(datasets.report(options.folder)))


def study(options):
    from .study import main

    return main(options.rest)


if __name__ == "__main__":
    sys.exit(main())
