"""Training: it learns, it is deterministic, it resumes bit for bit, it stops when told."""

import functools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import tifffile
import torch
from conftest import tiny

from sipl_min import SIPL, InputError, train

FLAT = [np.full((40, 40, 3), v, np.uint8) for v in (60, 120, 200)]


def run(folder=None, steps=8, model=None, **overrides):
    model = model or tiny()
    options = dict(steps=steps, count=2, size=16, warmup=2, save_every=3, progress=False, setting="three_task")
    log = train.fit(model, FLAT, folder=folder, **{**options, **overrides})
    return model, log


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_lowers_the_loss():
    for recipe, fusion in (("authors", True), ("backbone", False)):
        _, log = run(model=tiny(fusion=fusion), recipe=recipe, steps=60, peak=3e-3, setting="five_task", count=4)
        first, last = (np.mean([r["loss"] for r in part]) for part in (log[:10], log[-10:]))
        assert last < 0.8 * first, (recipe, first, last)


def test_same_seed_same_weights():
    a, b, c = run()[0], run()[0], run(seed=1)[0]
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resume_is_bit_for_bit(tmp_path, stop_at):
    unbroken, log = run(tmp_path / "a")

    def interrupt(model, x, y, count=[]):  # noqa: B006
        count.append(0)
        if len(count) > stop_at:
            raise SystemExit
        return train.authors(model, x, y)

    interrupt.__name__ = "authors"
    with pytest.raises(SystemExit):
        run(tmp_path / "b", recipe=interrupt)
    resumed, again = run(tmp_path / "b", model=tiny())  # at 1 nothing was saved yet: it starts anew
    assert torch.equal(weights(unbroken), weights(resumed))
    assert again == log
    for name in ("model.safetensors", "log.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_ctrl_c_saves_and_the_next_call_continues(tmp_path):
    unbroken, _ = run()

    def press(model, x, y, count=[]):  # noqa: B006
        count.append(0)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return train.authors(model, x, y)

    press.__name__ = "authors"
    with pytest.raises(KeyboardInterrupt, match="after step 4, saved"):
        run(tmp_path, recipe=press)
    assert train.torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5
    assert torch.equal(weights(run(tmp_path, model=tiny())[0]), weights(unbroken))


def test_a_finished_run_is_not_repeated(tmp_path):
    model, log = run(tmp_path)
    again, same = run(tmp_path, model=tiny(), recipe="authors")
    assert torch.equal(weights(model), weights(again)) and same == log


def test_schedule():
    rates = [train.learning_rate(s, 100, 1e-3, 10) for s in range(100)]
    assert rates[0] == pytest.approx(1e-4) and max(rates) == pytest.approx(1e-3) == rates[9]
    assert rates[-1] < 1e-6 and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_autocast_trains_every_weight():
    """Casting weights inside no_grad must not hide them from the gradient of the guided pass."""
    model = tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(model=model, steps=2, autocast=True, decay=0.0)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not still


def test_validation_is_logged():
    _, log = run(validate=lambda m: dict(held=1.5), validate_every=3)
    assert [r["step"] for r in log if "held" in r] == [2, 5, 7]


def test_a_batch_in_parts_is_the_same_batch():
    whole, log = run(count=4)
    parts, again = run(count=4, accumulate=2)
    assert torch.allclose(weights(whole), weights(parts), atol=2e-5)
    for a, b in zip(log, again):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["psnr"] == pytest.approx(b["psnr"], rel=1e-3)


def test_the_average_of_the_weights_is_what_comes_out(tmp_path):
    seen = []
    averaged, _ = run(tmp_path / "a", ema=0.9, validate=lambda m: seen.append(weights(m)) or {}, validate_every=1)
    plain, _ = run()
    assert torch.equal(weights(averaged), seen[-1]) and not torch.equal(weights(averaged), weights(plain))
    expected, decay = None, 0.9
    for step in range(1, 9):  # the weights after each step, averaged by hand
        now = weights(run(steps=8, recipe=stopped(step))[0])
        expected = now if expected is None else decay * expected + (1 - decay) * now
    assert torch.allclose(weights(averaged), expected, atol=1e-6)
    with pytest.raises(SystemExit):
        run(tmp_path / "b", ema=0.9, recipe=stopped(5, SystemExit))
    again, _ = run(tmp_path / "b", ema=0.9, recipe="authors")
    assert torch.equal(weights(again), weights(averaged))


def stopped(after, error=None):
    """The authors' recipe, whose steps behind number `after` change nothing, or raise `error`."""
    count = []

    def authors(model, x, y):
        count.append(0)
        if len(count) > after and error:
            raise error
        y = train.authors(model, x, y)
        if len(count) > after:
            for p in model.parameters():  # neither gradient nor decay
                p.requires_grad_(False)
            return torch.zeros_like(y, requires_grad=True)
        return y

    return authors


def share(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, log = run(
        f"{folder}/run", count=4, accumulate=2, ema=0.5, model=tiny(backbone="adair")
    )  # has unused weights
    torch.save((weights(model), log), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    one, log = run(count=4, ema=0.5, model=tiny(backbone="adair"))
    for rank in range(2):
        theirs, again = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(weights(one), theirs, atol=1e-4)
        for a, b in zip(log, again):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["gradient"] == pytest.approx(
                b["gradient"], rel=1e-2
            )
    saved = SIPL.load(tmp_path / "run" / "model.safetensors")
    assert torch.equal(weights(saved), theirs)
    with pytest.raises(InputError, match="belongs to another run .accumulate=2, now 1"):
        run(tmp_path / "run", count=4, ema=0.5, model=tiny(backbone="adair"))


def life(folder):
    torch.set_num_threads(1)
    run(folder, steps=STEPS, count=1, size=8, save_every=2)


STEPS = 200


def test_killed_at_random_moments_it_ends_the_same(tmp_path, counted):
    """kill -9, at least thirty times in a row, at any moment, also while a checkpoint is written."""
    context, rng, kills = multiprocessing.get_context("forkserver"), np.random.default_rng(0), 0
    context.set_forkserver_preload(["sipl_min.train", "conftest"])
    while kills < 30:
        process = context.Process(target=life, args=(tmp_path / "b",))
        process.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "b" / "log.csv").exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)  # the first life gets far enough to have something to lose
        process.join(rng.uniform(0.1, 0.6))
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        kills += 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the lives before
    resumed, again = run(tmp_path / "b", steps=STEPS, count=1, size=8, save_every=2)
    unbroken, log = run(steps=STEPS, count=1, size=8)
    torch.set_num_threads(threads)
    assert torch.equal(weights(unbroken), weights(resumed)) and again == log
    assert kills >= 30
    counted("training killed by kill -9, resumed, the same weights in the end", kills)


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    def broken(model, x, y, count=[]):  # noqa: B006
        count.append(0)
        return train.authors(model, x, y) * (torch.nan if len(count) == 5 else 1)

    broken.__name__ = "authors"
    with pytest.raises(FloatingPointError, match="the loss is not finite at step 4 .*failed.pt"):
        run(tmp_path, recipe=broken)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3  # the last good one, untouched
    assert torch.load(tmp_path / "failed.pt", weights_only=True)["step"] == 4
    os.replace(tmp_path / "failed.pt", tmp_path / "checkpoint.pt")  # as the message says: it repeats the step
    seen = []

    def watch(model, x, y):
        seen.append(weights(model))
        return train.authors(model, x, y) * torch.nan

    watch.__name__ = "authors"
    with pytest.raises(FloatingPointError, match="at step 4"):
        run(tmp_path, recipe=watch)
    assert len(seen) == 1 and seen[0].isfinite().all()


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path):
    def broken(model, x, y):  # sqrt at 0: the loss is 0, its gradient is not a number
        return train.authors(model, x, y) + (0 * model.encoder.embed.weight.sum()).sqrt()

    model = tiny()
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 0"):
        train.fit(model, FLAT, recipe=broken, folder=tmp_path, steps=8, count=2, size=16, progress=False)
    assert weights(model).isfinite().all() and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(setting="fog"), "unknown setting 'fog'"),
        (dict(recipe="magic"), "unknown recipe 'magic'"),
        (dict(recipe="backbone"), "needs a model with fusion=False"),
        (dict(steps=0), "steps=0 must be a positive"),
        (dict(size=20), "size=20 must be a positive whole number, a multiple of 8"),
        (dict(count=1.5), "count=1.5"),
        (dict(save_every=0), "save_every=0 must be a positive whole number"),
        (dict(accumulate=0), "accumulate=0 must be a positive whole number"),
        (dict(accumulate=2, count=3), "count=3 must be a multiple of 1 processes times accumulate=2"),
        (dict(mild=1.1), "mild=1.1 must be between 0 and 1"),
        (dict(ema=1.0), "ema=1.0 must be at least 0 and below 1"),
        (dict(save_minutes=0), "save_minutes=0 must be a positive number"),
        (dict(seed=-1), "seed=-1 must be a whole number >= 0"),
        (dict(peak=-1.0), "peak=-1.0 must be a positive number"),
        (dict(peak=float("nan")), "peak=nan must be a positive number"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)


def test_bad_folders_of_photos(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        train.fit(tiny(), tmp_path / "nowhere")
    with pytest.raises(InputError, match="no photos"):
        train.fit(tiny(), tmp_path)
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match="cannot read '.*a.png'"):
        train.fit(tiny(), tmp_path)
    (tmp_path / "a.png").unlink()
    tifffile.imwrite(tmp_path / "bright.tif", np.full((9, 9, 3), 7, np.float32), photometric="rgb")
    with pytest.raises(InputError, match="bright.tif' cannot be used: a float photo must hold values"):
        train.fit(tiny(), tmp_path)
    with pytest.raises(InputError, match="no images given"):
        train.fit(tiny(), [])


def test_a_folder_that_cannot_be_written_is_found_out_at_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write"):
        run(tmp_path / "file", recipe=lambda *_: pytest.fail("training began"))


def test_a_run_reads_its_own_checkpoint_whatever_its_arguments_are(tmp_path):
    recipe = functools.partial(train.authors)
    first, log = run(tmp_path, recipe=recipe, peak=np.float64(1e-3))
    again, same = run(tmp_path, model=tiny(), recipe=recipe, peak=1e-3)
    assert torch.equal(weights(first), weights(again)) and same == log


def test_a_log_of_another_run_is_noticed(tmp_path):
    run(tmp_path)
    good = (tmp_path / "log.csv").read_text()
    for text in ("rubbish\n1\n", good.replace("0.", "x."), None):
        (tmp_path / "log.csv").unlink()
        if text:
            (tmp_path / "log.csv").write_text(text)
        with pytest.raises(InputError, match="does not hold one whole run"):
            run(tmp_path)
        (tmp_path / "log.csv").write_text(good)


def test_bad_checkpoints(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="belongs to another run .seed=0, now 3"):
        run(tmp_path, seed=3)
    with pytest.raises(InputError, match="belongs to another run .its 3 images are not the 3 given now"):
        train.fit(tiny(), [image + 1 for image in FLAT], folder=tmp_path, steps=8, count=2, size=16, warmup=2,
                  setting="three_task", progress=False)  # fmt: skip
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"cos\nsystem\n(S'false'\ntR."):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a whole checkpoint"):
            run(tmp_path)
        assert path.read_bytes() == content
