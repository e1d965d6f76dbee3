"""The command line: what it writes, what it prints, and one clear sentence with exit code 2 for bad input."""

import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import tiny

from sipl_min import SIPL, speed
from sipl_min.__main__ import main
from sipl_min.files import read, write


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.safetensors"
    tiny().save(path)
    return ["--weights", str(path)]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_demo_writes_a_figure_and_prints_a_table(tmp_path, weights, capsys):
    assert main(["demo", "--output", str(tmp_path / "d.png"), "--steps", "2", *weights]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[0].split()[-3:] == ["y0", "y1", "y2"]
    assert lines[1].startswith("chelsea, low_haze_snow") and lines[1].count("dB") == 4
    assert read(tmp_path / "d.png").std() > 10


def test_restore_one_photo(tmp_path, weights, photo, capsys):
    write(tmp_path / "in.png", photo)
    assert main(["restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--steps", "1", *weights]) == 0
    expected = SIPL.load(weights[1]).restore(photo, steps=1)
    assert np.array_equal(read(tmp_path / "out.png"), expected)
    before = (tmp_path / "out.png").read_bytes()
    assert main(["restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), *weights]) == 2
    assert "exists: pass --force" in capsys.readouterr().err and (tmp_path / "out.png").read_bytes() == before
    assert main(["restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--force", *weights]) == 0


def test_restore_a_folder_does_the_good_and_names_the_bad(tmp_path, weights, photo, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "deep/b.jpg", "c.tif"):
        write(source / name, photo)
    (source / "bad.png").write_text("not an image")
    (source / "notes.txt").write_text("skipped")
    assert main(["restore", str(source), str(target), *weights]) == 1
    captured = capsys.readouterr()
    assert "restored 3 of 4" in captured.out and "bad.png" in captured.err
    assert files(target) == ["a.png", "c.tif", "deep/b.jpg"]


def test_restore_again_leaves_what_was_restored(tmp_path, weights, photo, capsys):
    write(tmp_path / "a.png", photo)
    assert main(["restore", str(tmp_path), str(tmp_path / "out"), *weights]) == 0
    assert main(["restore", str(tmp_path), str(tmp_path / "out"), "--force", *weights]) == 0
    assert files(tmp_path) == ["a.png", "out/a.png", "w.safetensors"]
    (tmp_path / "a.png").unlink()
    assert main(["restore", str(tmp_path), str(tmp_path / "out"), "--force", *weights]) == 2
    assert "no photos in" in capsys.readouterr().err
    assert main(["restore", str(tmp_path / "out"), str(tmp_path), *weights]) == 0, "into the folder above"
    assert files(tmp_path) == ["a.png", "out/a.png", "w.safetensors"]


def test_one_photo_too_large_does_not_cost_the_others(tmp_path, weights, photo, capsys, monkeypatch):
    def limited(self, images, *_, **__):
        if images[0].shape[0] > 40:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return images

    monkeypatch.setattr(SIPL, "restore", limited)
    write(tmp_path / "in" / "large.png", photo)
    write(tmp_path / "in" / "small.png", photo[:20])
    assert main(["restore", str(tmp_path / "in"), str(tmp_path / "out"), *weights]) == 1
    assert "not enough memory to restore" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["small.png"]


def test_photos_of_one_size_are_one_batch(tmp_path, weights, photo, capsys, monkeypatch):
    batches, restore = [], SIPL.restore

    def counted(self, images, *arguments, **options):
        batches.append(len(images))
        return restore(self, images, *arguments, **options)

    monkeypatch.setattr(SIPL, "restore", counted)
    for i in range(5):
        write(tmp_path / "in" / f"{i}.png", np.roll(photo, i, 1) if i != 2 else photo[:20])
    iio.imwrite(tmp_path / "in" / "nan.tif", np.full((*photo.shape[:2], 3), np.nan, np.float32))
    assert main(["restore", str(tmp_path / "in"), str(tmp_path / "out"), *weights]) == 1
    assert batches == [4, 1]
    out = capsys.readouterr()
    assert "restored 5 of 6" in out.out and "nan.tif" in out.err and "found nan" in out.err
    model = SIPL.load(weights[1])
    for i in (0, 2, 4):
        alone = restore(model, read(tmp_path / "in" / f"{i}.png"))
        assert np.abs(read(tmp_path / "out" / f"{i}.png").astype(int) - alone).max() <= 1


def test_windows_by_command(tmp_path, weights, photo):
    write(tmp_path / "a.png", np.tile(photo, (2, 2, 1)))
    job = ["restore", str(tmp_path / "a.png")]
    assert main([*job, str(tmp_path / "cut.png"), "--tile", "48", "--overlap", "16", *weights]) == 0
    assert main([*job, str(tmp_path / "whole.png"), "--tile", "0", *weights]) == 0
    cut, whole = read(tmp_path / "cut.png").astype(int), read(tmp_path / "whole.png").astype(int)
    assert cut.shape == whole.shape and np.abs(cut - whole).max() > 0


def test_speed_prints_a_table_and_writes_two_files(tmp_path, capsys):
    small = ["--presets", "nano", "--sizes", "16", "--T", "train", "--repeats", "1"]
    assert main(["benchmark", "speed", *small, "--output", str(tmp_path / "s.csv")]) == 0
    out = capsys.readouterr().out
    assert "GFLOP/s here" in out and sum(line.startswith("nano") for line in out.splitlines()) == 1
    assert "%" in next(line for line in out.splitlines() if line.startswith("nano")), "what data cost"
    assert files(tmp_path) == ["s.csv", "s.png"]


def test_an_interrupted_benchmark_of_speed_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    command = ["benchmark", "speed", "--presets", "nano", "--sizes", "16", "24", "--T", "0", "--repeats", "1"]
    command += ["--output", str(tmp_path / "s.csv")]
    sizes, time = [], speed.time

    def stopped(preset, size, *rest):
        sizes.append(size)
        if sizes == [16, 24]:
            raise KeyboardInterrupt
        return time(preset, size, *rest)

    monkeypatch.setattr(speed, "time", stopped)
    assert main(command) == 130
    assert files(tmp_path) == ["s.unfinished.json"]
    assert main(command) == 0
    assert sizes == [16, 24, 24]
    assert files(tmp_path) == ["s.csv", "s.png"]
    assert main(command) == 0
    assert sizes == [16, 24, 24, 16, 24], "a finished table is measured anew"
    for strange in ("[1]", "{}", '[{"preset": "nano"', '[{"preset": "nano", "T": 0, "size": 16}]'):
        (tmp_path / "s.unfinished.json").write_text(strange)
        assert main(command) == 0, strange


def test_a_plain_backbone_needs_no_word_about_steps(tmp_path, photo, capsys):
    tiny(fusion=False).save(tmp_path / "plain.safetensors")
    write(tmp_path / "a.png", photo)
    plain = ["--weights", str(tmp_path / "plain.safetensors")]
    assert main(["restore", str(tmp_path / "a.png"), str(tmp_path / "b.png"), *plain]) == 0
    assert main(["restore", str(tmp_path / "a.png"), str(tmp_path / "c.png"), "--steps", "1", *plain]) == 2
    assert "pass steps 0" in capsys.readouterr().err


def test_training_goes_on_from_weights(tmp_path, photo, weights, capsys):
    write(tmp_path / "photos" / "a.png", photo)
    run = ["train", str(tmp_path / "run"), "--images", str(tmp_path / "photos"), "--size", "16", "--count", "1"]
    short = ["--steps", "1", "--peak", "1e-9", *weights]
    assert main([*run, *short]) == 0
    x = torch.rand(1, 3, 24, 24)
    before, after = SIPL.load(weights[1]), SIPL.load(tmp_path / "run" / "model.safetensors")
    assert after.settings == before.settings  # not those of the preset
    assert torch.allclose(after.refine(x), before.refine(x), atol=1e-4)
    assert main([*run, *short[:-1], str(tmp_path / "run" / "model.safetensors")]) == 2, "it began from others"
    assert "start='weights of crc" in capsys.readouterr().err
    assert main([*run, *short[:-2]]) == 2
    assert "(settings.dictionary_size=[6, 4, 2], now [16, 8, 4])" in capsys.readouterr().err
    assert main([*run, *short, "--recipe", "backbone"]) == 2
    assert "fusion=False" in capsys.readouterr().err
    assert main([*run, *short[:-1], str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["backbone", "unroll"])
def test_a_plain_backbone_gets_new_proxy_fusion_where_the_recipe_needs_it(tmp_path, photo, recipe):
    plain = tiny(fusion=False)
    plain.save(tmp_path / "plain.safetensors")
    write(tmp_path / "photos" / "a.png", photo)
    run = ["train", str(tmp_path / "run"), "--images", str(tmp_path / "photos"), "--size", "16", "--count", "1"]
    run += ["--weights", str(tmp_path / "plain.safetensors"), "--recipe", recipe, "--steps", "1", "--peak", "1e-9"]
    assert main(run) == 0
    model, x = SIPL.load(tmp_path / "run" / "model.safetensors"), torch.rand(1, 3, 24, 24)
    assert model.settings.fusion == model.settings.aligned == (recipe == "unroll")  # what the recipe is made for
    assert torch.allclose(model(x), plain(x), atol=1e-4), "as good as the backbone"


def test_train_then_use_the_weights(tmp_path, photo, capsys):
    write(tmp_path / "photos" / "a.png", photo)
    run = ["train", str(tmp_path / "run"), "--images", str(tmp_path / "photos"), "--steps", "2", "--size", "16"]
    assert main([*run, "--count", "1", "--save-every", "1", "--validate-every", "2"]) == 0
    assert "held_out_input,held_out_y0,held_out_y1" in (tmp_path / "run" / "log.csv").read_text()
    assert files(tmp_path / "run") == ["checkpoint.pt", "log.csv", "model.safetensors"]
    iio.imwrite(tmp_path / "tiny.png", np.zeros((1, 1, 3), np.uint8))
    out = str(tmp_path / "o.png")
    assert main(["restore", str(tmp_path / "tiny.png"), out, "--weights", str(tmp_path / "run/model.safetensors")]) == 0
    assert read(out).shape == (1, 1, 3)


def test_torchrun_trains_as_one_process(tmp_path, photo):
    write(tmp_path / "photos" / "a.png", photo)
    job = ["--images", str(tmp_path / "photos"), "--steps", "3", "--size", "16", "--count", "4", "--device", "cpu"]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sipl_min"]
    done = subprocess.run([*together, "train", str(tmp_path / "two"), *job], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1.33 M parameters") == 1, "one of them speaks"
    assert main(["train", str(tmp_path / "one"), *job]) == 0
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        for u, v in zip(a.split(","), b.split(",")):
            assert u == v or float(u) == pytest.approx(float(v), rel=1e-3)


def test_schedules_follow_the_preset(tmp_path, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("sipl_min.train.fit", lambda model, images, **options: seen.update(options))
    assert main(["train", str(tmp_path), "--preset", "paper", "--peak", "3e-4"]) == 0
    assert (seen["count"], seen["size"], seen["peak"], seen["steps"]) == (32, 128, 3e-4, 660_000)
    assert main(["train", str(tmp_path), "--preset", "huge"]) == 2
    assert "unknown preset 'huge'" in capsys.readouterr().err


def test_benchmark_prints_measured_beside_published(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.setattr("sipl_min.benchmark.held_out", lambda: {"grey": np.full((32, 32, 3), 99, np.uint8)})
    assert main(["benchmark", "three_task", "--output", str(tmp_path / "b.csv"), *weights]) == 0
    out = capsys.readouterr().out
    assert "PromptIR*" in out and "* published" in out and "32.06" in out
    assert out.count("not measured here:") == 3
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 1 + 5 * 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["restore", "nowhere.png", "o.png"], "no file 'nowhere.png'"),
        (["restore", "text.png", "o.png"], "cannot read 'text.png' as an image"),
        (["restore", "empty", "o"], "no photos in 'empty'"),
        (["restore", "good.png", "o.docx"], "end the name in one of"),
        (["restore", "good.png", "o.png", "--steps", "-1"], "steps must be a whole number"),
        (["restore", "good.png", "o.png", "--weights", "no.safetensors"], "no weights at 'no.safetensors'"),
        (["restore", "good.png", "o.png", "--weights", "text.png"], "'text.png' is not a whole safetensors file"),
        (["restore", "good.png", "o.png", "--device", "warp"], "device 'warp' cannot be used here"),
        (["restore", "nan.tif", "o.tif"], "found nan"),
        (["restore", "bright.tif", "o.tif"], "found 0 to 2"),
        (["restore", "five.tif", "o.tif"], "C = 1, 2, 3 or 4"),
        (["restore", "good.png", "o.png", "--tile", "50"], "tile=50 must be 0, or a multiple of 16"),
        (["restore", "good.png", "o.png", "--overlap", "-1"], "overlap=-1 must be"),
        (["benchmark", "speed", "--presets", "huge"], "unknown preset 'huge'"),
        (["benchmark", "speed", "--repeats", "0"], "repeats=0 is too small"),
        (["demo", "--setting", "fog", "--output", "o.png"], "unknown setting 'fog'"),
        (["demo", "--seed", "-1", "--output", "o.png"], "seed=-1 must be"),
        (["restore", "deep.png", "o.jpg"], "cannot hold uint16 with 3 channels"),
        (["restore", "alpha.png", "o.jpg"], "cannot hold uint8 with 4 channels"),
        (["train", "o", "--seed", "-1"], "seed=-1 must be"),
        (["train", "o", "--save-every", "0"], "save_every=0 must be"),
        (["train", "o", "--peak", "-1"], "peak=-1.0 must be"),
        (["benchmark", "cdd11", "--draws", "0"], "draws=0 must be"),
        (["train", "o", "--preset", "huge"], "unknown preset 'huge'"),
        (["train", "o", "--recipe", "magic"], "unknown recipe 'magic'"),
        (["train", "o", "--images", "empty"], "no photos in 'empty'"),
        (["benchmark", "fog", "--output", "o.csv"], "unknown setting 'fog'"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(tmp_path, weights, photo, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    write(tmp_path / "good.png", photo)
    iio.imwrite("nan.tif", np.full((9, 9, 3), np.nan, np.float32))
    iio.imwrite("bright.tif", np.linspace(0, 2, 243, dtype=np.float32).reshape(9, 9, 3))
    iio.imwrite("five.tif", np.zeros((9, 9, 5), np.uint8), plugin="tifffile", photometric="minisblack")
    write(tmp_path / "deep.png", photo.astype(np.uint16))
    write(tmp_path / "alpha.png", np.dstack([photo, photo[..., :1]]))
    before = files(tmp_path)
    if "--weights" not in arguments and arguments[0] != "train":
        arguments = [*arguments, *weights]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert files(tmp_path) == before, "nothing half-written"


def test_help_is_for_people_and_no_traceback_reaches_them():
    def call(*arguments):
        return subprocess.run([sys.executable, "-m", "sipl_min", *arguments], capture_output=True, text=True)

    text = call("--help").stdout
    assert all(name in text for name in ("demo", "train", "restore", "benchmark"))
    failed = call("restore", "nowhere.png", "out.png")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr and "nowhere.png" in failed.stderr
    assert call("dance").returncode == 2


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    command = [sys.executable, "-m", "sipl_min", "data", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()  # what `| head` does
        assert run.stderr.read() == b"" and run.wait() == 141
