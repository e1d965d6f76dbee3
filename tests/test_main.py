"""The command line: each command does its work, and every error is one sentence and leaves nothing behind."""

import shutil
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from sipl_min import SIPL, InputError, __main__, __version__, evaluate
from sipl_min.__main__ import main
from sipl_min.data import Pairs
from sipl_min.degrade import SHARES
from sipl_min.evaluate import keep


@pytest.fixture
def weights(model, tmp_path):
    model.save(tmp_path / "m.safetensors")
    return str(tmp_path / "m.safetensors")


def test_demo_draws_and_prints(weights, tmp_path, capsys):
    assert main(["demo", "--weights", weights, "--steps", "2", "--output", str(tmp_path / "demo.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["photo,", "degradation", "input", "y0", "y1", "y2"] and len(lines) == 5
    assert iio.imread(tmp_path / "demo.png").std() > 10


def test_restore_a_file_and_a_folder(weights, photo, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg"):
        iio.imwrite(tmp_path / "in" / name, photo)
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    (tmp_path / "in" / "c.ppm").write_bytes(b"P6 1 1 255 abc")
    command = ["restore", str(tmp_path / "in"), str(tmp_path / "out"), "--weights", weights]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "restored 2 of 3 photos" in captured.out and "bad.png" in captured.err
    assert "left alone: 1 .ppm" in captured.out
    assert iio.imread(tmp_path / "out" / "a.png").shape == photo.shape
    assert main(command) == 1 and "restored 0 of 3 photos" in capsys.readouterr().out
    assert main(["restore", str(tmp_path / "in" / "a.png"), str(tmp_path / "one.png"), "--weights", weights]) == 0
    assert np.array_equal(iio.imread(tmp_path / "one.png"), iio.imread(tmp_path / "out" / "a.png"))


def test_train_then_restore_with_the_old_and_new_names_of_options(photo, tmp_path, capsys):
    iio.imwrite(tmp_path / "a.png", photo)
    for names in (("--batch-size", "--crop-size", "--lr", "--suite"), ("--count", "--size", "--peak", "--setting")):
        folder = tmp_path / names[0].strip("-")
        values = [text for pair in zip(names, ("2", "32", "1e-3", "cdd11")) for text in pair]
        assert (
            main(["train", str(folder), "--steps", "2", "--recipe", "unroll", "--backbone", "restormer", *values]) == 0
        )
        assert "weights:" in capsys.readouterr().out
        out = str(tmp_path / f"{folder.name}.png")
        assert main(["restore", str(tmp_path / "a.png"), out, "--weights", str(folder / "model.safetensors")]) == 0
    model = SIPL.load(tmp_path / "batch-size" / "model.safetensors")
    assert model.settings.backbone == "restormer" and model.settings.identity_start
    assert model.about["recipe"] == "unroll"
    small, only = ["--steps", "1", "--batch-size", "2", "--crop-size", "32"], ["low=0", "haze=5"]
    assert main(["train", str(tmp_path / "haze"), *small, "--shares", *only]) == 0
    run = torch.load(tmp_path / "haze" / "checkpoint.pt", weights_only=True)["run"]
    assert run["shares"] == SHARES["cdd11"] | dict(low=0, haze=5)
    other = SIPL.load(tmp_path / "count" / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_a_training_that_goes_on_has_the_crops_and_the_suite_that_it_had(photo, tmp_path, monkeypatch):
    def pairs(x, y, crop_size, seed, skip_bad):
        sizes.append((crop_size, seed))
        return Pairs(x, y, crop_size, seed, skip_bad)

    def found(root, suite):
        suites.append(suite)
        raise InputError("enough")

    sizes, suites, run = [], [], ["train", str(tmp_path / "run"), "--batch-size", "1"]
    monkeypatch.setattr(__main__, "Pairs", pairs)
    monkeypatch.setattr(__main__.datasets, "training", found)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        iio.imwrite(tmp_path / name / "a.png", photo)
    both = ["--pairs", str(tmp_path / "x"), str(tmp_path / "y")]
    begun = [*run, *both, "--crop-size", "32", "--seed", "3", "--steps", "1"]
    assert main(begun) == main([*run, *both, "--steps", "2"]) == 0
    tuned = ["train", str(tmp_path / "tuned"), "--weights", "nano", "--batch-size", "1", "--steps", "1"]
    assert main([*tuned, *both]) == 0  # as weights that are trained already usually go on
    assert sizes == [(32, 3), (32, 3), (128, 0)]
    assert main([*tuned, *both, "--suite", "hard"]) == 2
    other = ["train", str(tmp_path / "other"), "--images", str(tmp_path / "y"), "--suite", "three_task", "--steps", "1"]
    assert main([*other, "--batch-size", "1", "--crop-size", "16"]) == 0
    assert main(["train", str(tmp_path / "other"), "--data", str(tmp_path)]) == 2 and suites == ["three_task"]


def test_a_backbone_trained_to_be_applied_again_is(photo, tmp_path, capsys, monkeypatch):
    iio.imwrite(tmp_path / "a.png", photo)
    small = ["--steps", "2", "--batch-size", "1", "--crop-size", "16", "--suite", "singles"]
    assert main(["train", str(tmp_path / "run"), "--recipe", "again", *small]) == 0
    weights = str(tmp_path / "run" / "model.safetensors")
    model = SIPL.load(weights)
    once, twice = model.restore(photo, steps=0), model.restore(photo)
    assert not model.fusion and np.array_equal(twice, model.restore(photo, 1, feedback="again"))
    assert not np.array_equal(once, twice)
    for more, expected in (([], twice), (["--steps", "0"], once)):
        assert main(["restore", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--weights", weights, *more]) == 0
        assert np.array_equal(iio.imread(tmp_path / "b.png"), expected)
        (tmp_path / "b.png").unlink()
    monkeypatch.setattr(evaluate, "keep", lambda: keep(size=48))
    assert main(["benchmark", "keep", "--weights", weights]) == 0 and "y1" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "more"), "--weights", weights, *small]) == 0  # keeps the recipe
    assert SIPL.load(tmp_path / "more" / "model.safetensors").about["recipe"] == "again"


def test_weights_of_overview_start_open_and_have_no_loop(tmp_path, capsys):
    small = ["--window", "16", "--crop-size", "32", "--steps", "1", "--batch-size", "1"]
    begin = ["train", str(tmp_path / "run"), "--weights", "nano-backbone", "--recipe", "overview", *small]
    assert main(begin) == 0
    weights = str(tmp_path / "run" / "model.safetensors")
    assert not SIPL.load(weights).settings.identity_start
    assert main(["demo", "--weights", weights, "--output", str(tmp_path / "demo.png")]) == 0
    assert "y0" in (printed := capsys.readouterr().out) and "y1" not in printed
    assert main(["study", "capacity", str(tmp_path / "study"), "--weights", weights]) == 2
    assert "has the recipe 'overview', which has no loop: ask about windows" in capsys.readouterr().err


def test_benchmark_writes_rows_and_tables(weights, tmp_path, capsys):
    output = tmp_path / "r.csv"
    command = ["benchmark", "three_task", "--weights", weights, "--steps", "0", "--output", str(output)]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert "CBSD68_15" in first and "PromptIR*" in first and output.with_suffix(".md").is_file()
    before = output.read_bytes()
    assert main(command) == 0 and capsys.readouterr().out == first and output.read_bytes() == before
    assert main([*command, "--dtype", "bfloat16"]) == 2 and "was begun with" in capsys.readouterr().err
    output.unlink()
    assert main(command) == 2 and "r.md' is there, and would be written over" in capsys.readouterr().err


def test_what_a_data_set_lacks_is_told_before_anything_is_measured(weights, tmp_path, capsys, monkeypatch):
    for half in ("input", "target"):
        for name, w in (("1.png", 40), ("2.png", 12)):
            path = tmp_path / "d" / "Rain100L" / "test" / half / name
            path.parent.mkdir(parents=True, exist_ok=True)
            iio.imwrite(path, np.zeros((40, w, 3), np.uint8))
    command = ["benchmark", "five_task", "--data", str(tmp_path / "d"), "--weights", weights, "--steps", "0"]
    assert main(command) == 2
    done = capsys.readouterr()
    assert "note: Rain100L: 2 images instead of 100" in done.out and "2.png' has less than 16 pixels" in done.err
    for half in ("input", "target"):
        (tmp_path / "d" / "Rain100L" / "test" / half / "2.png").unlink()
    assert main([*command, "--output", str(tmp_path / "r.csv")]) == 0
    assert "note: Rain100L: 1 images instead of 100" in (tmp_path / "r.md").read_text(encoding="utf-8")
    command = ["train", str(tmp_path / "run"), "--steps", "1", "--batch-size", "1", "--crop-size", "16", "--data"]
    (tmp_path / "d" / "Rain100L" / "test").rename(tmp_path / "d" / "Rain100L" / "train")
    for suite, line in (("cdd11", "pairs for no column"), ("three_task", "pairs for Rain100L")):
        capsys.readouterr()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert main([*command, str(tmp_path / "d"), "--suite", suite]) == 0 and line in capsys.readouterr().out


def test_memory_that_ran_out_ends_in_one_sentence(weights, capsys, monkeypatch):
    def measure(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(evaluate, "measure", measure)
    assert main(["benchmark", "keep", "--weights", weights]) == 2
    assert "error: memory ran out ([enforce fail" in (said := capsys.readouterr().err) and said.count("\n") == 1
    monkeypatch.setattr(evaluate, "measure", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # a fault of ours shows where it is
        main(["benchmark", "keep", "--weights", weights])


def test_the_second_model_of_a_benchmark_is_as_the_first(weights, capsys, monkeypatch):
    def measure(model, cases, steps, against, output):
        both.extend(next(m.parameters()).dtype for m in (model, against))
        raise InputError("enough")

    both = []
    monkeypatch.setattr(evaluate, "measure", measure)
    assert main(["benchmark", "keep", "--weights", weights, "--against", weights, "--dtype", "bfloat16"]) == 2
    assert both == [torch.bfloat16] * 2


def test_the_rest(tmp_path, capsys):
    assert main(["data", str(tmp_path)]) == 0 and "missing  CBSD68" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    assert main(["study", "who", str(tmp_path), "--images", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main(["study", "who", str(tmp_path), "--weights", "nano-backbone"]) == 2
    assert "nano-backbone has no Proxy Fusion" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, message",
    [
        (["restore", "nowhere.png", "o.png"], "no file 'nowhere.png'"),
        (["restore", "nowhere.png", "o.png", "--weights", "none"], "'none': no such file"),
        (["benchmark", "snowy"], "unknown suite 'snowy'"),
        (["demo", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["benchmark", "cdd11", "--output", "x.txt"], "ends in .csv"),
        (["benchmark", "cdd11", "--data", "nowhere"], "no folder 'nowhere'"),
        (["train", "runs/x", "--images", "nowhere"], "no folder 'nowhere'"),
        (["train", "runs/x", "--lr", "-1"], "lr=-1.0"),
        (["train", "runs/x", "--window", "-1"], "window=-1 must be 0 or more"),
        (["train", "runs/x", "--ema", "1"], "ema=1.0 must be from 0 to 1, less than 1"),
        (["train", "runs/x", "--weights", "nano", "--preset", "small"], "--preset and --backbone are of new weights"),
        (["train", "runs/x", "--weights", "nano", "--recipe", "backbone"], "fusion=False, or nano-backbone"),
        (["benchmark", "cdd11", "--draws", "0"], "--draws 0 --seed 0: they must be at least 1 and 0"),
        (["benchmark", "keep", "--seed", "1"], "--draws and --seed are of suites on embedded photos"),
        (["benchmark", "keep", "--data", "x"], "--data: the suite keep has photos of its own"),
        (["restore", "data", "o", "--feedback", "again"], "nothing is fed back with --steps 0, pass --steps 1 or more"),
        (["demo", "--steps", "-1"], "--steps -1: pass the number of refinements, 0 or more"),
        (["demo", "--output", "figure.xyz"], "end the name in .png, .pdf or .svg"),
        (["train", "runs/x", "--shares", "haze"], "--shares 'haze': write a column and a whole number"),
        (["train", "runs/x", "--shares", "haze=2", "fog=3"], "shares of 'fog': suite 'cdd11' has low, haze"),
    ],
)
def test_errors_are_one_sentence(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_restore_loads_neither_matplotlib_nor_scikit_image(weights, photo, tmp_path):
    iio.imwrite(tmp_path / "a.png", photo)
    code = f"""
import sys
sys.modules["resource"] = None  # as on Windows
from sipl_min.__main__ import main
assert main(["restore", {str(tmp_path / "a.png")!r}, {str(tmp_path / "b.png")!r}, "--weights", {weights!r}]) == 0
assert not {{"matplotlib", "skimage"}} & {{*sys.modules}}
"""
    environment = dict(PYTHONIOENCODING="cp1252", PYTHONPATH=str(__main__.__file__).rsplit("sipl_min", 1)[0])
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment)
