"""The experiment on speed: as released is the same network, ratios are of one run, nothing is measured twice."""

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import rand, tiny

from sipl_min import SIPL, speed
from sipl_min.sipl import CrossAttention, LayerNorm2d

WORK = ("nano", "1", 32)


@pytest.fixture
def small(monkeypatch):
    """A tiny model stands for every preset; the list of those that were built."""
    models = []
    monkeypatch.setattr(speed, "SIPL", lambda preset: models.append(tiny()) or models[-1])
    return models


@pytest.mark.parametrize("backbone", ["promptir", "restormer"])
def test_as_released_is_the_same_network_called_as_a_whole(backbone):
    model, x, calls = tiny(backbone=backbone), rand(2, 3, 40, 48), []
    expected = model.refine(x, 2, return_all=True)
    state = model.state_dict()
    released = speed.as_released(model)
    assert not {LayerNorm2d, CrossAttention, SIPL} & {type(module) for module in released.modules()}
    released.encoder.register_forward_hook(lambda *_: calls.append(1))
    for a, b in zip(released.refine(x, 2, return_all=True), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(calls) == 3 + 2, "E(x) in each of three passes, and E(y) twice"
    assert type(SIPL("nano")) is SIPL and state.keys() == released.state_dict().keys()


def test_attention_as_released_has_its_whole_matrix():
    write = tiny().fusion[0].write
    query, context = rand(2, 16, 12, 20), rand(1, 16, 6, 6, seed=1)
    expected = write(query, context)
    write.__class__ = speed.RELEASED[type(write)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        assert torch.allclose(write(query, context), expected, atol=1e-5)
    assert (2, write.heads, 12 * 20, 6 * 6) in {tuple(s) for s in sizes}


@pytest.mark.parametrize("T", ["1", "train"])
def test_all_kinds_do_the_same_work(T, small):
    kinds = list(product(("released", "plain", "fast"), speed.DTYPES))
    results = dict(zip(kinds, speed.race(("nano", T, 24), kinds, 1, "cpu"), strict=True))
    first = results["released", "float32"]
    assert first["faster"] == 1 and first["difference"] == 0
    for (_, dtype), result in results.items():
        assert result["seconds"] > 0 and result["faster"] > 0
        assert result["difference"] < (1e-4 if dtype == "float32" else 0.1)
    assert results["plain", "bfloat16"]["difference"] > 1e-4, "it does compute in bfloat16"


def test_ratios_are_medians_of_rounds(monkeypatch):
    clock = iter([8.0, 2.0, 9.0, 3.0, 30.0, 2.0])  # the third round was disturbed
    monkeypatch.setattr(speed, "job", lambda *_: lambda: torch.ones(3))
    monkeypatch.setattr(speed, "seconds", lambda function: next(clock))
    first, second = speed.race(WORK, [("plain", "float32"), ("fast", "float32")], 3, "cpu")
    assert first == dict(seconds=9.0, faster=1.0, difference=0.0)
    assert second == dict(seconds=2.0, faster=4.0, difference=0.0)


def test_a_step_of_training_finds_gradients(small):
    speed.job("nano", "train", 24, "fast", "float32", "cpu")()
    assert all(p.grad.abs().max() > 0 for p in small[0].encoder.parameters())


def test_memory_is_that_of_the_process(monkeypatch, tmp_path):
    """A job that holds 200 MB for a moment; without Linux's file there is no number."""

    def job(*_):
        return lambda: torch.ones(50_000_000).sum()

    monkeypatch.setattr(speed, "job", job)
    if speed.STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of earlier tests
        assert 190 < speed.peak(WORK, ("plain", "float32"), "cpu") < 260
    assert speed.peak(WORK, ("compiled", "float32"), "cpu") is None
    monkeypatch.setattr(speed, "STATUS", tmp_path / "nowhere")
    assert speed.peak(WORK, ("plain", "float32"), "cpu") is None


def test_by_command(tmp_path, capsys, monkeypatch, small):
    output = tmp_path / "s.csv"
    command = ["--presets", "nano", "--sizes", "16", "24", "--dtypes", "float32", "--variants", "plain", "fast"]
    command += ["--repeats", "1", "--device", "cpu", "--output", str(output)]
    jobs, alone = [], speed.alone

    def stops(function, work, *rest):
        jobs.append((function.__name__, work[2]))
        if len(jobs) == 5:
            raise KeyboardInterrupt
        if len(jobs) == 1:
            return alone(function, work, *rest)  # in a new process, once
        return 10.0 if function is speed.peak else function(work, *rest)

    monkeypatch.setattr(speed, "alone", stops)
    assert speed.main(command) == 130
    assert jobs == [("peak", 16), ("peak", 16), ("race", 16), ("peak", 24), ("peak", 24)]
    first = output.read_text(encoding="utf-8")
    assert first.count("\n") == 3
    speed.main(command)
    assert jobs[5:] == [("peak", 24), ("peak", 24), ("race", 24)]
    assert output.read_text(encoding="utf-8").startswith(first)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "nano" in line]
    assert [line[:5] for line in lines[-4:]] == [
        ["nano", "1", size, variant, "float32"] for size in ("16", "24") for variant in ("plain", "fast")
    ]
    rows = list(csv.DictReader(output.read_text(encoding="utf-8").splitlines()))
    assert [float(row["faster"]) for row in rows[::2]] == [1, 1] and float(rows[3]["smaller"]) == 1
    assert "ratios_to=plain, float32" in rows[0]["run"]
    for extra, message in (
        (["--variants", "fast"], "was begun with"),
        (["--output", "s.txt"], "ends in .csv"),
        (["--device", "warp"], "device 'warp' cannot be used here"),
    ):
        assert speed.main([*command, *extra]) == 2
        assert message in capsys.readouterr().err
    for extra, message in (
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--presets", "huge"], "invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            speed.main([*command, *extra])
        assert message in capsys.readouterr().err


def test_ctrl_c_ends_in_one_word(tmp_path):
    """Ctrl-C reaches all processes of a terminal: also the one that measures, which must leave no traceback behind."""
    command = [sys.executable, "-u", "-m", "sipl_min.speed", "--sizes", "512", "--device", "cpu"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    with subprocess.Popen(command, start_new_session=True, **pipes) as run:
        signal.signal(signal.SIGINT, before)
        try:
            run.stdout.readline()  # the run; then the measuring begins
            time.sleep(1)
            os.killpg(run.pid, signal.SIGINT)
            _, said = run.communicate(timeout=60)  # once nothing of it runs on
            assert (run.returncode, said) == (130, "stopped\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
