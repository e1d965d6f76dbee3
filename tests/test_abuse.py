"""Whatever is done to it, it goes on or says in one sentence why not; every kind of abuse is counted."""

import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_published import weights as published_weights
from test_train import run, weights

from sipl_min import SIPL, InputError, from_published
from sipl_min.__main__ import main
from sipl_min.files import read, write

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SENTENCE = 400  # characters at most, without a line break


def one_sentence(error):
    text = str(error)
    assert text and "\n" not in text and len(text) < SENTENCE, text
    return text


# ---------------------------------------------------------------------------------------------------- photos


@st.composite
def photos(draw):
    """A photo of any kind that `restore` promises to take, and how it lies in memory."""
    h, w = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    channels = draw(st.sampled_from([None, 1, 2, 3, 4]))
    dtype = draw(st.sampled_from([np.uint8, np.uint16, np.float16, np.float32, np.float64]))
    layout = draw(st.sampled_from(["plain", "fortran", "every second", "reversed", "read-only", "tensor"]))
    kind = draw(st.sampled_from(["noise", "black", "white", "ramp"]))
    shape = (h, w) if channels is None else (h, w, channels)
    noise = np.random.default_rng(draw(st.integers(0, 99))).random(shape)
    image = {"noise": noise, "black": 0 * noise, "white": 0 * noise + 1,
             "ramp": np.linspace(0, 1, noise.size).reshape(shape)}[kind]  # fmt: skip
    image = (np.rint(image * np.iinfo(dtype).max) if np.dtype(dtype).kind == "u" else image).astype(dtype)
    if layout == "fortran":
        image = np.asfortranarray(image)
    elif layout == "every second":
        image = np.repeat(np.repeat(image, 2, 0), 2, 1)[::2, ::2]
    elif layout == "reversed":
        image = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    elif layout == "read-only":
        image.setflags(write=False)
    elif layout == "tensor":
        return torch.from_numpy(image).to(draw(st.sampled_from(DEVICES)))
    return image


def test_any_photo_comes_back_as_the_same_kind(counted):
    torch.manual_seed(0)
    model, cases = tiny(dim=4), []

    @settings(max_examples=500, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(photo=photos(), steps=st.integers(0, 1))
    def check(photo, steps):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before = photo.clone() if isinstance(photo, torch.Tensor) else photo.copy()
            y = model.restore(photo, steps)
            again = model.restore(photo, steps)
        assert type(y) is type(photo) and y.dtype == photo.dtype and y.shape == photo.shape
        if isinstance(photo, torch.Tensor):
            assert y.device == photo.device
            y, again, photo, before = (t.cpu().numpy() for t in (y, again, photo, before))
        assert np.array_equal(y, again) and np.array_equal(photo, before)
        assert np.isfinite(y.astype(np.float64)).all() and y.min() >= 0
        assert y.max() <= (1 if y.dtype.kind == "f" else np.iinfo(y.dtype).max)
        if photo.ndim == 3 and photo.shape[2] in (2, 4):
            assert np.array_equal(y[..., -1], photo[..., -1])
        cases.append(photo.shape)

    check()
    assert len(cases) >= 500
    counted("photos of random shape, kind and layout restored, the same kind out", len(cases))


# ----------------------------------------------------------------------------------------------------- files


def bad_files(folder):
    """Seven files that are no photos, by name."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8))
    for name in ("cut.png", "cut.jpg", "half.tif"):
        content = io.BytesIO()
        photo.save(content, {"png": "png", "jpg": "jpeg", "tif": "tiff"}[name[-3:]])
        (folder / name).write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is not a photo\n")
    (folder / "zeros.jpg").write_bytes(bytes(1000))
    huge = io.BytesIO()
    photo.save(huge, "png")
    content = bytearray(huge.getvalue())
    content[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)  # a header that promises more pixels than there are
    (folder / "huge.png").write_bytes(content)
    return sorted(p.name for p in folder.iterdir())


def test_a_hundred_files_of_which_seven_are_bad(tmp_path, capsys, counted):
    source = tmp_path / "mes photos d'été 写真"
    source.mkdir()
    bad = bad_files(source)
    assert len(bad) == 7
    rng = np.random.default_rng(1)
    for i in range(93):
        photo = rng.integers(0, 255, (9 + i % 5, 12, 3), np.uint8)
        Image.fromarray(photo).save(source / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    tiny().save(tmp_path / "w.safetensors")
    command = ["restore", str(source), str(tmp_path / "out"), "--weights", str(tmp_path / "w.safetensors")]
    assert main(command) == 1
    output = capsys.readouterr()
    assert "restored 93 of 100 photos" in output.out
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 7 and all(sum(name in line for line in lines) == 1 for name in bad)
    done = sorted((tmp_path / "out").iterdir())
    assert len(done) == 93 and all(read(p).shape == read(source / p.name).shape for p in done)
    times = [p.stat().st_mtime_ns for p in done]
    assert main(command) == 1  # a second time: nothing is overwritten
    assert times == [p.stat().st_mtime_ns for p in done]
    counted("files in one folder, 7 of them bad: the others restored, the bad ones named", 100)


def test_photos_as_they_come(tmp_path, counted):
    """Every way in which phones, scanners and the web store a photo goes through the command line."""
    rng, names = np.random.default_rng(0), []
    photo = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg")
    photo.convert("P").save(tmp_path / "palette.png")
    photo.convert("LA").save(tmp_path / "grey alpha.png")
    photo.convert("1").save(tmp_path / "bits.png")
    photo.save(tmp_path / "moving.gif", save_all=True, append_images=[photo.rotate(90)])
    photo.save(tmp_path / "progressive.jpg", progressive=True, quality=30)
    photo.save(tmp_path / "ünïcode ☃.webp")
    write(tmp_path / "deep.png", rng.integers(0, 65535, (20, 30, 3), np.uint16))
    write(tmp_path / "deep.tif", rng.random((20, 30)).astype(np.float32))
    tiny().save(tmp_path / "w.safetensors")
    for path in sorted(p for p in tmp_path.iterdir() if p.suffix != ".safetensors"):
        out = tmp_path / "out" / (path.stem + (".png" if path.suffix == ".gif" else path.suffix))
        assert main(["restore", str(path), str(out), "--weights", str(tmp_path / "w.safetensors")]) == 0, path
        assert read(out).shape[:2] == ((30, 20) if path.name == "turned.jpg" else (20, 30)), path
        names.append(path.name)
    counted("photos as phones, scanners and the web store them", len(names))


def test_where_nothing_can_be_written(tmp_path, photo, capsys):
    write(tmp_path / "a.png", photo)
    tiny().save(tmp_path / "w.safetensors")
    places = ["/proc/a.png"] if Path("/proc").exists() else []
    if os.geteuid():  # nothing is read-only to root
        (tmp_path / "closed").mkdir(mode=0o500)
        places.append(str(tmp_path / "closed" / "a.png"))
    for place in places:
        assert main(["restore", str(tmp_path / "a.png"), place, "--weights", str(tmp_path / "w.safetensors")]) == 2
        assert "cannot write" in one_sentence(capsys.readouterr().err.strip().removeprefix("error: "))


# ----------------------------------------------------------------------------------------------- checkpoints


def test_weights_with_a_fault_load_as_saved_or_not_at_all(tmp_path, counted):
    model, path = tiny(), tmp_path / "w.safetensors"
    model.save(path)
    content, rng, refused, tried = path.read_bytes(), np.random.default_rng(0), 0, 0
    lengths = [0, 1, 7, 8, 9, len(content) - 1, *rng.integers(0, len(content), 150)]
    flips = [*rng.integers(0, 3000 * 8, 150), *rng.integers(0, 8 * len(content), 150)]  # header, anywhere
    for kind, where in [("cut", n) for n in lengths] + [("flip", n) for n in flips]:
        damaged = bytearray(content[:where] if kind == "cut" else content)
        if kind == "flip":
            damaged[where // 8] ^= 1 << (where % 8)
        path.write_bytes(damaged)
        tried += 1
        try:
            loaded = SIPL.load(path)
        except InputError as e:
            one_sentence(e)
            refused += 1
        else:  # a bit that means nothing, such as a space in the header
            assert kind == "flip" and loaded.settings == model.settings
            assert torch.equal(weights(loaded), weights(model))
    assert refused > 0.9 * tried
    counted("faults in weight files (cut, one bit turned): refused, or the right weights", tried)


def test_a_training_checkpoint_with_a_fault_is_refused(tmp_path, counted):
    run(tmp_path)
    whole, log = run(steps=12)
    path = tmp_path / "checkpoint.pt"
    content, rng, refused, tried = path.read_bytes(), np.random.default_rng(0), 0, 0
    cuts = [(n, None) for n in [0, 1, len(content) - 1, *rng.integers(0, len(content), 60)]]
    flips = [(len(content), n) for n in rng.integers(0, 8 * len(content), 60)]
    for length, bit in cuts + flips:
        damaged = bytearray(content[:length])
        if bit is not None:
            damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        tried += 1
        try:
            model, _ = run(tmp_path)  # finished: it only loads
        except InputError as e:
            assert "delete it, or pass another folder" in one_sentence(e) or "repeat its arguments" in str(e)
            assert path.read_bytes() == bytes(damaged)
            refused += 1
        else:
            assert torch.equal(weights(model), weights(SIPL.load(tmp_path / "model.safetensors")))
    assert refused > 0.8 * tried
    counted("faults in training checkpoints: refused, or the right weights", tried)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_no_file_runs_code(tmp_path, monkeypatch, counted):
    monkeypatch.chdir(tmp_path)
    with open("evil.pkl", "wb") as f:
        pickle.dump(Evil(), f)
    torch.save(Evil(), "evil.pt")
    run(tmp_path / "run")
    tried = 0
    for name in ("evil.pkl", "evil.pt"):
        for load in (SIPL.load, from_published):
            with pytest.raises(InputError) as e:
                load(name)
            one_sentence(e.value)
            tried += 1
        (tmp_path / "run" / "checkpoint.pt").write_bytes(Path(name).read_bytes())
        with pytest.raises(InputError, match="is not a whole checkpoint"):
            run(tmp_path / "run")
        tried += 1
    assert not Path("evil").exists()
    counted("pickles that would run code, given as weights or checkpoints: none ran", tried)


def test_a_published_file_without_a_tensor_is_named(counted):
    full = published_weights("promptir")
    rng = np.random.default_rng(0)
    used = sorted(name for name in full if "chnl_reduce" not in name and "reduce_noise_channel" not in name)
    names = rng.choice(used, 40, replace=False)
    for name in names:
        with pytest.raises(InputError) as e:
            from_published({k: v for k, v in full.items() if k != name})
        one_sentence(e.value)
    counted("published files with a missing tensor: refused in one sentence", len(names))


# -------------------------------------------------------------------------------------------------- training


STEPS = 30


def short_of_room(folder, room):
    """Train where no file may grow beyond `room` bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        torch.set_num_threads(1)
        run(folder, steps=STEPS, count=1, size=8, save_every=2)
    except InputError as e:
        print(one_sentence(e))
        sys.exit(3)


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, counted):
    torch.set_num_threads(1)
    steps = dict(steps=STEPS, count=1, size=8, save_every=2)
    whole, log = run(tmp_path / "whole", **steps)
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    rooms = [0, 100, size // 3, size - 1000]
    for stop, room in enumerate(rooms):
        with pytest.raises(KeyboardInterrupt):  # some steps with room enough
            run(tmp_path / "b", recipe=interrupted(3 + stop), **steps)
        before = (tmp_path / "b" / "checkpoint.pt").read_bytes()
        done = subprocess.run([sys.executable, "-c", "import sys; from test_abuse import short_of_room; "
                               f"short_of_room(sys.argv[1], {room})", str(tmp_path / "b")], capture_output=True,
                              text=True, cwd=Path(__file__).parent)  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "cannot write" in done.stdout
        assert (tmp_path / "b" / "checkpoint.pt").read_bytes() == before
        assert not [p for p in (tmp_path / "b").iterdir() if p.name.startswith(".")]
    resumed, again = run(tmp_path / "b", **steps)
    assert torch.equal(weights(whole), weights(resumed)) and again == log
    counted("disk full while a training saves: what was saved stays, the end is the same", len(rooms))


def interrupted(after):
    from sipl_min import train

    count = []

    def authors(model, x, y):
        count.append(0)
        if len(count) == after:
            signal.raise_signal(signal.SIGINT)
        return train.authors(model, x, y)

    return authors


def test_ctrl_c_at_the_command_line_exits_with_130(tmp_path, photo):
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "a.png", photo)
    command = [sys.executable, "-m", "sipl_min", "train", str(tmp_path / "run"), "--images", str(tmp_path / "images"),
               "--steps", "500", "--count", "1", "--size", "16", "--save-every", "1000"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    text = ""
    while "loss=" not in text:  # the bar: training is under way
        text += process.stderr.read(1)
        assert process.poll() is None, text
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped after step" in rest and "Traceback" not in rest
    assert (tmp_path / "run" / "checkpoint.pt").exists()


# -------------------------------------------------------------------------------------------------- imports


def test_import_is_clean_and_quick():
    code = ("import time, torch, numpy; start = time.perf_counter(); import sipl_min; "
            "print(time.perf_counter() - start)")  # fmt: skip
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert float(done.stdout) < 3
