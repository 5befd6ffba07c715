"""Checkpoints and --resume of both scripts: exactness, signals, kills, full disks, damage, and divergence."""

import contextlib
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_scripts import curves, environment, one_line, run_main

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment import checkpoints, evaluation, run_folder
from experiment.code_identity import identity

SCRIPTS = {"matd3": matd3, "mappo": mappo}
# blocks of 40 steps up to 640, checkpoints at 320, 600 and 640, resets from 240 at the latest to 480, episodes
# that both terminate and are cut, and for MATD3 a replay buffer of 60 rows, which has wrapped at step 240
COMMON = "--device cpu --num-threads 1 --env-id Hopper-v2-3x1 --seed 3 --total-timesteps 640 --num-envs 4"
COMMON += " --hidden-size 32 --eval-interval 300 --eval-episodes 3 --log-interval 40 --save-model"
COMMON += " --checkpoint-interval 300 --actor-reset-interval 120 --actor-threshold-bias 0"
FLAGS = {
    matd3: f"{COMMON} --num-critics 3 --critic-reset-interval 80 --warmup-steps 200 --batch-size 32 --buffer-size 240"
    " --train-interval 10 --updates-per-round 4 --episode-limit 23",
    mappo: f"{COMMON} --rollout-steps 10 --num-epochs 2 --num-minibatches 2 --episode-limit 17",
}


def train(script, folder, *flags, block=math.inf):
    """main() in `folder`, on FLAGS where it does not resume, up to a signal in `block`: (exit code, run folder)."""
    flags = [*([] if "--resume" in flags else FLAGS[script].split()), *map(str, flags)]
    code, out, err = run_main(script, *flags, cwd=folder, block=block)
    sys.stdout.write(out)
    sys.stderr.write(err)
    found = list(Path(folder).glob("runs/*"))
    assert len(found) <= 1, "a run has one folder, however often it is resumed"
    return code, found[0] if found else None


def read(run_folder):
    return torch.load(run_folder / "checkpoint.pt", weights_only=True)


def snapshot(folder):
    """Every file and folder below, with content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


def assert_same(a, b, name):
    """Trees of dicts, lists, tensors and plain values that are the same bit for bit."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_same(a[key], b[key], f"{name}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{name}/{i}")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        assert a.numpy().tobytes() == b.numpy().tobytes(), name
    else:
        assert a == b, name


def assert_same_runs(a, b):
    """Run folders a and b hold the same model, checkpoint and curves, but for what measures time."""
    models = [torch.load(folder / "model.pt", weights_only=True) for folder in (a, b)]
    for network in ("actor", "critic"):
        assert_same(models[0][network], models[1][network], network)
    checkpoints = [read(folder) for folder in (a, b)]
    for checkpoint in checkpoints:
        checkpoint["args"].pop("resume")
    assert_same(*checkpoints, "checkpoint")
    assert_same(curves(a), curves(b), "scalars")


# ---- Exactness ----
# dies in the moment of its second checkpoint, with the steps after the first one done and logged
KILLED = """
import os, signal
import {name} as script
from experiment import mask_pictures
from run_scripts import blank_picture
mask_pictures.draw = blank_picture
write, times = script.write_checkpoint, []
def write_once(*arguments):
    times.append(1)
    if len(times) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
script.write_checkpoint = write_once
script.main()
"""
CASES = {  # script, its flags, and the block in which a signal comes, or None for a kill
    "matd3 killed": (matd3, "", None),
    "matd3 stopped, without sharing": (matd3, "--sharing none --updates-per-round 1", 11),
    "matd3 stopped while it warms up": (matd3, "", 3),
    "mappo killed": (mappo, "--lr-schedule constant", None),
    "mappo stopped, learning rates fall": (mappo, "--lr-schedule linear --total-timesteps 630", 9),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(case, tmp_path):
    script, flags, block = CASES[case]
    flags = flags.split()
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
    code, whole = train(script, tmp_path / "whole", *flags)
    assert code == 0

    if block is None:
        command = [sys.executable, "-c", KILLED.format(name=script.__name__), *FLAGS[script].split(), *flags]
        done = subprocess.run(command, cwd=tmp_path / "interrupted", env=environment(), capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        (folder,) = (tmp_path / "interrupted" / "runs").iterdir()
        assert read(folder)["counters"][0] == 320
        assert max(series[-1][0] for series in curves(folder).values()) > 320, "nothing for the resumed run to replace"
        (events,) = folder.glob("events*")
        os.truncate(events, events.stat().st_size - 3)  # as if killed while it wrote an entry
        # and a second time, from a checkpoint that a resumed run wrote
        code, _ = train(script, tmp_path / "interrupted", "--resume", folder, block=3)
        assert code == 143 and read(folder)["counters"][0] == 440
    else:
        code, folder = train(script, tmp_path / "interrupted", *flags, block=block)
        assert code == 143 and read(folder)["counters"][0] == 40 * block

    stopped = read(folder)
    lengths, step = stopped["envs"]["lengths"], stopped["counters"][0]
    assert (lengths > 0).any(), "no episode was under way"
    if block != 3:
        masked = ["resets/actor_weights"] * ("none" not in flags) + ["resets/critic_member"] * (script is matd3)
        for tag in masked:
            first, *_, last = (reset for reset, _ in curves(whole)[tag])
            assert first < step < last, "resets on one side only"
        if script is matd3:
            replay = stopped["replay"]
            assert len(replay["state"]) == replay["rows"] == 60 and replay["newest"] != 59, "the buffer has not wrapped"

    code, _ = train(script, tmp_path / "interrupted", "--resume", folder)
    assert code == 0
    assert read(folder)["counters"][0] == 640 > step
    assert_same_runs(whole, folder)


# ---- Signals in processes of their own ----
@contextlib.contextmanager
def process(script, folder, *flags):
    """The script on FLAGS, without end, as soon as it trains; what it prints goes to the folder's out and err."""
    flags = [*FLAGS[script].split(), "--total-timesteps", "1_000_000_000", "--eval-episodes", "0", *flags]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        child = subprocess.Popen(
            [sys.executable, script.__file__, *flags], cwd=folder, env=environment(), stdout=out, stderr=err
        )
    try:
        wait_until(lambda: (folder / "out").stat().st_size > 0, child)
        yield child
    finally:
        child.kill()
        child.wait()


def wait_until(condition, child):
    deadline = time.monotonic() + 300
    while not condition():
        assert child.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def warnings_in(err):
    assert "Traceback" not in err and "error" not in err, err
    return re.findall(r"warning: .*", err)


@pytest.mark.parametrize(("name", "number"), [("matd3", signal.SIGTERM), ("mappo", signal.SIGINT)])
def test_a_signal_ends_in_a_checkpoint_from_which_the_run_goes_on(name, number, tmp_path, capsys):
    script = SCRIPTS[name]
    with process(script, tmp_path, "--checkpoint-interval", "100_000_000") as child:
        # when it learns; only the signal can have written the checkpoint
        wait_until(lambda: any(b"losses/" in file.read_bytes() for file in tmp_path.glob("runs/*/events*")), child)
        (folder,) = (tmp_path / "runs").iterdir()
        assert not (folder / "checkpoint.pt").exists()
        child.send_signal(number)
        assert child.wait(300) == 128 + number
    (warning,) = warnings_in((tmp_path / "err").read_text())
    assert number.name in warning and f"continue: python {script.__name__}.py --resume runs/{folder.name}" in warning
    checkpoint = read(folder)
    step = checkpoint["counters"][0]
    assert step % 40 == 0 and checkpoint["counters"][1] > 0

    code, _ = train(script, tmp_path, "--resume", folder, "--total-timesteps", step + 80)
    assert code == 0 and not warnings_in(capsys.readouterr().err)
    assert read(folder)["counters"][0] == step + 80
    assert list((tmp_path / "runs").iterdir()) == [folder]


def test_a_signal_without_checkpoints(tmp_path):
    with process(matd3, tmp_path, "--checkpoint-interval", "0") as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(300) == 143
    (warning,) = warnings_in((tmp_path / "err").read_text())
    assert warning.endswith(". Nothing can continue this run: --checkpoint-interval is 0")
    assert not list(tmp_path.glob("runs/*/checkpoint*"))


def test_a_second_signal_does_not_wait_for_the_end_of_the_block(tmp_path):
    endless = ["--train-interval", "1_000_000_000", "--warmup-steps", "900_000_000"]
    with process(matd3, tmp_path, *endless) as child:
        child.send_signal(signal.SIGTERM)  # two that are under way at once would be one
        wait_until(lambda: "warning: SIGTERM" in (tmp_path / "err").read_text(), child)
        time.sleep(0.2)
        assert child.poll() is None, "the first signal must let the block end"
        child.send_signal(signal.SIGTERM)
        assert child.wait(300) in (-signal.SIGTERM, 143)


# ---- Writing ----
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_kill_at_any_time_leaves_a_whole_file_and_never_an_older_one(tmp_path):
    path, torn = tmp_path / "checkpoint.pt", 0
    rng, seen, rounds_with_news = random.Random(0), 0, 0
    torch.set_num_threads(1)  # no threads of PyTorch's, which do not survive a fork
    start = time.perf_counter()
    checkpoints.write(str(tmp_path / "another"), torch.zeros(500_000))
    wait = 2 * (time.perf_counter() - start)  # for two writes on this disk, and longer where it gets slower
    for _ in range(100):
        child = os.fork()
        if child == 0:
            try:
                counter = seen
                while True:
                    counter += 1
                    checkpoints.write(str(path), {"counter": counter, "tensor": torch.full((500_000,), float(counter))})
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.01 + wait))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended by itself"
        torn += os.path.exists(f"{path}.tmp")
        wait *= 1.1
        if seen or path.exists():
            content = torch.load(path, weights_only=True)
            assert content["counter"] >= seen, "an older one is back"
            assert (content["tensor"] == content["counter"]).all() and len(content["tensor"]) == 500_000
            if content["counter"] > seen:
                rounds_with_news += 1
                wait /= 1.1**2
            seen = content["counter"]
    assert torn >= 10 and rounds_with_news >= 10, "the kills came too early or too late to show anything"


@contextlib.contextmanager
def files_of_at_most(size):
    """What a full disk does to files that grow beyond `size`: writing fails; Python ignores the signal for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_keeps_the_old_file(tmp_path, capsys):
    path = str(tmp_path / "checkpoint.pt")
    assert checkpoints.write(path, {"old": torch.ones(3)}) is True
    before = snapshot(tmp_path)
    with files_of_at_most(50_000):
        assert checkpoints.write(path, {"new": torch.zeros(100_000)}) is False
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and len(err.splitlines()) == 1 and path in err and not out, err
    assert snapshot(tmp_path) == before
    assert checkpoints.write(path, {"new": torch.zeros(100_000)}) is True, "there is room again"
    assert len(torch.load(path, weights_only=True)["new"]) == 100_000 and list(snapshot(tmp_path)) == [path]
    assert not capsys.readouterr().err


@pytest.fixture(scope="module", params=SCRIPTS)
def stopped(request, tmp_path_factory):
    """(script, run folder) of a run that a signal stopped at step 360."""
    script = SCRIPTS[request.param]
    code, folder = train(script, tmp_path_factory.mktemp("stopped"), block=9)
    assert code == 143 and read(folder)["counters"][0] == 360
    return script, folder


@pytest.fixture
def copied(stopped, tmp_path):
    """The same, with a copy of the run folder to work on."""
    script, folder = stopped
    return script, shutil.copytree(folder, tmp_path / "runs" / folder.name)


def test_a_run_goes_on_where_there_is_no_room_for_its_checkpoints(copied, tmp_path, capsys, monkeypatch):
    script, folder = copied
    monkeypatch.setattr(evaluation, "log_masks", lambda *arguments: None)  # histograms need room
    before = (folder / "checkpoint.pt").read_bytes()
    with files_of_at_most(30_000):  # events still fit
        code, _ = train(script, tmp_path, "--resume", folder)
    assert code == 0
    assert (folder / "checkpoint.pt").read_bytes() == before and not list(folder.glob("*.tmp"))
    warned = re.findall(rf"warning: {re.escape(str(folder))}/checkpoint.pt: ", capsys.readouterr().err)
    assert len(warned) == 2, "at steps 600 and 640"
    assert curves(folder)["charts/eval_return"][-1][0] == 640


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's, of its thread
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_goes_on_where_its_folder_is_gone(name, tmp_path, monkeypatch, capsys):
    script = SCRIPTS[name]
    write = script.write_checkpoint

    def write_nowhere(folder, *arguments):
        while os.path.exists(folder):  # TensorBoard's thread may write to it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        return write(folder, *arguments)

    monkeypatch.setattr(script, "write_checkpoint", write_nowhere)
    code, _ = train(script, tmp_path)
    err = capsys.readouterr().err
    assert code == 0 and "640/640" in err
    assert len(re.findall(r"warning: .*checkpoint\.pt: No such file", err)) == 3, "at steps 320, 600 and 640"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_scalars_are_written_again_a_minute_after_their_folder_was_gone(tmp_path, monkeypatch, capsys):
    folder, now = tmp_path / "run", time.monotonic()
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now)
    writer = run_folder.Writer(str(folder))
    writer.add_scalar("x", 0.0, 0)
    writer.flush()
    shutil.rmtree(folder)
    deadline = time.time() + 60
    while "warning" not in (err := capsys.readouterr().err):  # it is a thread that finds out
        assert time.time() < deadline
        writer.add_scalar("x", 1.0, 1)
    assert str(folder) in err and "No such file" in err
    now += 59
    writer.add_scalar("x", 2.0, 2)
    now += 2
    writer.add_scalar("x", 3.0, 3)
    writer.close()
    assert curves(folder)["x"] == [(3, 3.0)] and not capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_messages_do_not_hang_at_the_end_of_the_progress_bar(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert train(SCRIPTS[name], tmp_path)[0] == 0
    lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "warning: " in line]
    assert lines and all(line.startswith("warning: ") for line in lines), lines


# ---- Damage ----
def write(folder, content):
    """What is wrong is then not only that it is not as it was written."""
    assert checkpoints.write(folder / "checkpoint.pt", content)


def edit(folder, change):
    checkpoint = read(folder)
    change(checkpoint)
    write(folder, checkpoint)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def flip_in_the_largest_tensor(path):
    with zipfile.ZipFile(path) as file:
        tensors = [info for info in file.infolist() if "/data/" in info.filename]
        largest = max(tensors, key=lambda info: info.file_size)
        data = file.read(largest)
    assert path.read_bytes().count(data) == 1 and largest.file_size > 1000
    flip(path, path.read_bytes().index(data) + largest.file_size // 2)


def save_the_other_scripts(script, folder):
    other = mappo if script is matd3 else matd3
    args = other.parse_args(["--env-id", "Hopper-v2-3x1"])[0]
    space = np.ones((3, 1), np.float32)
    envs = other.MaMuJoCoVecEnv("Hopper-v2-3x1", 2)
    learner = other.Learner(envs.state_size, -space, space, args, torch.device("cpu"))
    obs, _ = envs.reset()
    checkpoints.write_checkpoint(str(folder), run_folder.NoWriter(), learner, envs, obs, (5, 0))
    envs.close()


DAMAGE = {
    "truncated": lambda script, folder: os.truncate(folder / "checkpoint.pt", 20_000),
    "its last byte is missing": lambda script, folder: os.truncate(
        folder / "checkpoint.pt", (folder / "checkpoint.pt").stat().st_size - 1
    ),
    "empty": lambda script, folder: (folder / "checkpoint.pt").write_bytes(b""),
    "garbage": lambda script, folder: (folder / "checkpoint.pt").write_bytes(random.Random(0).randbytes(5000)),
    "a flipped bit in a tensor": lambda script, folder: flip_in_the_largest_tensor(folder / "checkpoint.pt"),
    "a tensor": lambda script, folder: write(folder, torch.zeros(3)),
    "foreign": lambda script, folder: write(folder, {"model": torch.zeros(3)}),
    "code": lambda script, folder: write(folder, {"format": checkpoints.FORMAT, "x": flip}),
    "a saved model": lambda script, folder: shutil.copy(folder / "model.pt", folder / "checkpoint.pt"),
    "of the other script": save_the_other_scripts,
    "newer": lambda script, folder: edit(folder, lambda it: it.update(format=checkpoints.FORMAT + 1)),
    "arguments that are not there": lambda script, folder: edit(folder, lambda it: it["args"].update(no_such_flag=1)),
    "of another size than it says": lambda script, folder: edit(folder, lambda it: it["args"].update(hidden_size=48)),
    "of more environments than it says": lambda script, folder: edit(folder, lambda it: it["args"].update(num_envs=3)),
    "without a learner": lambda script, folder: edit(folder, lambda it: it.pop("learner")),
    "missing": lambda script, folder: (folder / "checkpoint.pt").unlink(),
    "no folder": lambda script, folder: shutil.rmtree(folder),
    "a file in the place of the folder": lambda script, folder: (shutil.rmtree(folder), folder.write_text("mine")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_ends_in_one_line_and_changes_nothing(damage, copied, tmp_path, capsys, recwarn):
    script, folder = copied
    DAMAGE[damage](script, folder)
    before = snapshot(tmp_path)
    capsys.readouterr()
    code, _ = train(script, tmp_path, "--resume", folder)
    out, err = capsys.readouterr()
    assert code == 2 and one_line(err) and not out, err
    assert f"{folder}/checkpoint.pt" in err
    assert not recwarn.list, "a process of its own would print these too"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_mistakes_in_changed_networks_keep_their_traceback(error, copied, monkeypatch):
    """They do not come from the file."""
    script, folder = copied

    def load(*arguments, **options):
        raise error("of a changed network")

    for how, network in (("checkpoint", script.Learner), ("model", script.Actor)):
        monkeypatch.setattr(network, "load_state_dict", load)
        with pytest.raises(error, match="of a changed network"):
            resume_or_evaluate(how, script, folder)


def test_mistakes_in_a_changed_actors_constructor_keep_their_traceback(copied, monkeypatch):
    script, folder = copied
    monkeypatch.setattr(script.Actor, "__init__", lambda *arguments: np.zeros(3) + np.zeros(4))
    with pytest.raises(ValueError, match="broadcast"):
        resume_or_evaluate("model", script, folder)


def test_networks_of_other_shapes_are_of_another_version(copied):
    script, folder = copied
    for how, network, prefix in (("checkpoint", "learner", "actor."), ("model", "actor", "")):
        content = torch.load(folder / f"{how}.pt", weights_only=True)
        content[network][f"{prefix}layers.1.scale"] = content[network].pop(f"{prefix}layers.1.weight")
        assert checkpoints.write(folder / f"{how}.pt", content)
        code, out, err = resume_or_evaluate(how, script, folder)
        assert code == 2 and one_line(err) and "another version of the code wrote it" in err and not out, err


def test_checkpoints_models_and_their_folders_are_told_apart(copied):
    script, folder = copied
    cwd = folder.parent.parent
    code, out, err = run_main(script, "--evaluate", folder / "checkpoint.pt", "--device", "cpu", cwd=cwd)
    assert code == 2 and one_line(err) and not out, err
    assert f"{folder}/checkpoint.pt is a checkpoint, expected a model: --resume {folder} continues" in err
    results = [
        run_main(script, "--evaluate", path, "--device", "cpu", "--eval-episodes", 1, cwd=cwd)
        for path in (folder, folder / "model.pt")
    ]
    assert results[0] == results[1] and results[0][0] == 0, results
    code, out, err = run_main(script, "--resume", folder / "model.pt", cwd=cwd)
    assert code == 2 and one_line(err) and f"{folder}/model.pt is a model, which --evaluate takes" in err and not out
    assert train(script, cwd, "--resume", folder / "checkpoint.pt")[0] == 0
    assert read(folder)["args"]["resume"] == str(folder) and read(folder)["counters"][0] == 640


def test_auto_resumes_only_in_the_precision_that_it_means_here(copied, monkeypatch):
    script, folder = copied
    own = read(folder)["args"]["precision"]
    monkeypatch.setattr(script, "resolve_precision", lambda asked, *_, **__: {"auto": "tf32"}.get(asked, asked))
    flags = ("--device", "cpu", "--precision", "auto")
    code, _, err = run_main(script, "--resume", folder, *flags, cwd=folder.parent.parent)
    assert code == 2 and f"--precision auto is tf32 here, expected {own}" in err.splitlines()[-1], err
    monkeypatch.setattr(script, "resolve_precision", lambda asked, *_, **__: {"auto": own}.get(asked, asked))
    assert run_main(script, "--resume", folder, *flags, cwd=folder.parent.parent)[0] == 0


def test_a_newer_format_is_named(copied, tmp_path, capsys):
    script, folder = copied
    DAMAGE["newer"](script, folder)
    train(script, tmp_path, "--resume", folder)
    newer, known = checkpoints.FORMAT + 1, checkpoints.FORMAT
    assert f"format {newer} of another version of this code, not {known}" in capsys.readouterr().err


def test_no_flipped_bit_goes_unnoticed_and_changes_what_is_read(stopped, tmp_path, capsys):
    script, folder = stopped
    shutil.copy(folder / "checkpoint.pt", tmp_path)
    path, rng, refused = tmp_path / "checkpoint.pt", random.Random(0), 0
    expected = checkpoints.read_checkpoint(str(tmp_path), script.Args)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:  # what is beyond is the directory, where a bit has more ways to mislead
        directory = file.start_dir
    positions = [rng.randrange(len(whole)) for _ in range(40)]
    for position in positions + [rng.randrange(directory, len(whole)) for _ in range(40)]:
        path.write_bytes(whole)
        flip(path, position)
        try:
            found = checkpoints.read_checkpoint(str(tmp_path), script.Args)
        except SystemExit as stop:
            assert stop.code == 2 and one_line(capsys.readouterr().err)
            refused += 1
        else:
            assert_same(found, expected, f"byte {position}")
    assert refused > 40


# ---- The code that made a file ----
def set_identity(path, **identity):
    """Let a checkpoint or model say that it was made by other code, or with None, nothing at all."""
    content = {name: x for name, x in torch.load(path, weights_only=True).items() if name not in ("script", "code")}
    content |= {name: x for name, x in identity.items() if x is not None}
    assert checkpoints.write(path, content)


def resume_or_evaluate(how, script, folder):
    """(exit code, stdout, stderr) of --resume or --evaluate on a run's folder."""
    flags = ["--resume", folder] if how == "checkpoint" else ["--evaluate", folder, "--eval-episodes", 1]
    return run_main(script, *flags, "--device", "cpu", cwd=folder.parent.parent)


@pytest.mark.parametrize("how", ["checkpoint", "model"])
def test_a_file_of_another_script_is_refused_and_both_are_named(how, copied):
    script, folder = copied
    set_identity(folder / f"{how}.pt", script="kalei_copy.py", code="0123456789abcdef")
    before = snapshot(folder)
    code, out, err = resume_or_evaluate(how, script, folder)
    assert code == 2 and one_line(err) and not out, err
    assert f"{folder}/{how}.pt was made by kalei_copy.py, expected a file of {script.__name__}.py" in err
    assert snapshot(folder) == before


@pytest.mark.parametrize("how", ["checkpoint", "model"])
@pytest.mark.parametrize("case", ["edited", "unknown", "renamed"])
def test_edited_or_unknown_code_is_warned_of_once(case, how, copied):
    script, folder = copied
    own = identity(script.Args)
    assert own == {key: torch.load(folder / f"{how}.pt", weights_only=True)[key] for key in own}
    if case == "edited":
        set_identity(folder / f"{how}.pt", script=own["script"], code="0123456789abcdef")
    elif case == "unknown":
        set_identity(folder / f"{how}.pt")
    else:
        set_identity(folder / f"{how}.pt", script="of_the_same_code.py", code=own["code"])
    code, out, err = resume_or_evaluate(how, script, folder)
    warned = [line for line in re.split(r"[\r\n]", err) if line.startswith("warning: ")]
    expected = {"edited": "before its code changed", "unknown": "does not say which code made it", "renamed": ""}[case]
    assert code == 0 and out, err
    assert len(warned) == (case != "renamed") and expected in "".join(warned), err


# ---- Values that no flag allows ----
WRONG = {
    "precision": "nonsense",
    "hidden_size": 10**6,
    "num_envs": 10**9,
    "deque_len": 10**9,
    "seed": "3",
    "gamma": 1.5,
    "total_timesteps": 0.5,
    "layer_weights": (1.0, 2.0),
    "save_model": 1,
}


@pytest.mark.parametrize("how", ["checkpoint", "model"])
def test_values_that_no_flag_allows_end_in_one_line(how, copied):
    script, folder = copied
    path = folder / f"{how}.pt"
    content = torch.load(path, weights_only=True)
    for name, value in WRONG.items():
        if how == "model" and name in ("num_envs", "deque_len"):  # the actor does not depend on them
            continue
        assert checkpoints.write(path, content | {"args": content["args"] | {name: value}})
        code, out, err = resume_or_evaluate(how, script, folder)
        assert code == 2 and one_line(err) and str(path) in err, err
        assert name in err.replace("-", "_"), err
        assert not out


# ---- Arguments ----
REFUSED = {
    "matd3": "--actor-lr 1e-3|--seed 4|--env-id Walker2d-v2-6x1|--n-step 3|--sharing full|--no-weighted-diversity"
    "|--buffer-size 300|--exp-name other|--layer-weights 1 1 1",
    "mappo": "--clip 0.2|--sharing none|--lr 1e-3|--lr-schedule constant|--num-minibatches 1|--layer-weights 1 1 1 1",
}


@pytest.mark.parametrize("stopped", SCRIPTS, indirect=True)
def test_what_a_run_has_learnt_with_cannot_be_changed(stopped, capsys):
    script, folder = stopped
    for flags in REFUSED["matd3" if script is matd3 else "mappo"].split("|"):
        with pytest.raises(SystemExit) as stop:
            script.parse_args(["--resume", str(folder), *flags.split()])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and one_line(err) and not out, err
        name = flags.split()[0].replace("--no-", "--")
        assert err.startswith(f"error: {name} is ") and str(folder) in err, err


def test_a_runs_own_values_and_what_may_change_are_accepted(stopped, capsys):
    script, folder = stopped
    args, checkpoint = script.parse_args(["--resume", str(folder)])
    assert checkpoint["counters"][0] == 360
    args.resume = None
    own = script.parse_args(FLAGS[script].split())[0]
    assert args == own, "the run's arguments, tuned values included, are those without any flag"

    args, _ = script.parse_args(
        ["--resume", str(folder), *FLAGS[script].split(), "--layer-weights", *map(str, own.layer_weights)]
    )
    args.resume = None
    assert args == own
    assert not capsys.readouterr().out

    changes = dict(total_timesteps=361, device="auto", num_threads=2, log_interval=7, eval_interval=8, eval_episodes=9)
    changes |= dict(save_model=False, checkpoint_interval=10, capture_video=True, render=True)
    changes |= dict(track=True, cudagraph=False, compile=True)
    assert {"resume", *changes} == checkpoints.MAY_CHANGE
    for name, value in changes.items():
        flag = name.replace("_", "-")
        flags = [f"--{flag}", str(value)] if type(value) is not bool else [f"--{flag}" if value else f"--no-{flag}"]
        args, _ = script.parse_args(["--resume", str(folder), *flags])
        assert getattr(args, name) == value != getattr(own, name)
        printed = capsys.readouterr().out
        assert ("--total-timesteps is 361 and was 640" in printed) == (name == "total_timesteps")


@pytest.mark.parametrize("steps", [360, 359, 1])
def test_there_must_be_steps_left(steps, stopped, capsys):
    script, folder = stopped
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--resume", str(folder), "--total-timesteps", str(steps)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and f"--total-timesteps is {steps}" in err and "360" in err, err


def test_a_run_that_goes_on_is_not_resumed_beside_it(copied, tmp_path, capsys):
    script, folder = copied
    before = {path: path.read_bytes() for path in folder.iterdir()}
    lock = run_folder.lock_run_folder(str(folder))  # as another process that trains there
    code, _ = train(script, tmp_path, "--resume", folder)
    err = capsys.readouterr().err
    assert code == 2 and f"error: {folder} is being trained in by another process" in err, err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    os.close(lock)
    assert train(script, tmp_path, "--resume", folder)[0] == 0


def test_a_run_that_is_over_is_not_resumed_without_more_steps(copied, tmp_path, capsys):
    script, folder = copied
    assert train(script, tmp_path, "--resume", folder)[0] == 0
    capsys.readouterr()
    before = snapshot(tmp_path)
    code, _ = train(script, tmp_path, "--resume", folder)
    out, err = capsys.readouterr()
    assert code == 2 and one_line(err) and "--total-timesteps is 640, expected more than the 640 steps" in err
    assert snapshot(tmp_path) == before and not out
    assert train(script, tmp_path, "--resume", folder, "--total-timesteps", 700)[0] == 0
    assert read(folder)["counters"][0] == (700 if script is matd3 else 720)


def test_resuming_and_evaluating_exclude_each_other(stopped, capsys):
    script, folder = stopped
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--resume", str(folder), "--evaluate", str(folder / "model.pt")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and "--evaluate" in err and "--resume" in err


# ---- The replay buffer ----
ENVS, SIZE, ROWS, N_STEP = 3, 5, 11, 4


def steps_of_data(number):
    """Arguments for Replay.add: states follow one another, but where an episode ended most begin anew."""
    rng = np.random.default_rng(0)
    state, steps = rng.normal(size=(ENVS, SIZE)), []
    for _ in range(number):
        terminated, truncated = rng.random(ENVS) < 0.15, rng.random(ENVS) < 0.15
        next_state = rng.normal(size=(ENVS, SIZE))
        steps.append((state, rng.normal(size=(ENVS, 2, 3)), rng.normal(size=ENVS), next_state, terminated, truncated))
        state = np.where((terminated | truncated)[:, None], rng.normal(size=(ENVS, SIZE)), next_state)
    return steps


def make_replay(rows, steps=()):
    replay = matd3.Replay(rows, ENVS, SIZE, (2, 3), N_STEP, 0.9, torch.device("cpu"))
    for step in steps:
        replay.add([step])
    return replay


def assert_same_replay(a, b):
    assert (a.next_row, int(a.newest), int(a.filled)) == (b.next_row, int(b.newest), int(b.filled))
    filled = int(a.filled)
    for name in (*checkpoints.REPLAY_ARRAYS, "next_state"):
        assert_same(getattr(a, name)[:filled], getattr(b, name)[:filled], name)
    rows, envs = (index.flatten() for index in torch.meshgrid(torch.arange(filled), torch.arange(ENVS), indexing="ij"))
    for mine, theirs in zip(a.n_step_return(rows, envs), b.n_step_return(rows, envs), strict=True):
        assert_same(mine, theirs, "n_step_return")


@pytest.mark.parametrize("steps", [1, 7, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS - 1, 3 * ROWS, 38])
def test_a_replay_buffer_comes_back_bit_for_bit(steps):
    data = steps_of_data(steps + 2 * ROWS)
    replay = make_replay(ROWS, data[:steps])
    saved = checkpoints.pack_replay(replay)
    followed = replay.ended.clone()
    followed[int(replay.newest)] = True
    assert len(saved["next_state"]) == followed[: int(replay.filled)].sum(), "what follows is stored once"

    loaded = make_replay(ROWS)
    checkpoints.unpack_replay(loaded, saved)
    assert_same_replay(loaded, replay)
    for step in data[steps:]:  # the ring turns on
        replay.add([step])
        loaded.add([step])
        assert_same_replay(loaded, replay)


@pytest.mark.parametrize("steps", [1, 7, ROWS])
@pytest.mark.parametrize("more", [1, 20])
def test_a_ring_that_has_not_wrapped_loads_into_a_larger_one(steps, more):
    data = steps_of_data(steps + 3 * (ROWS + more))
    loaded, expected = make_replay(ROWS + more), make_replay(ROWS + more, data[:steps])
    checkpoints.unpack_replay(loaded, checkpoints.pack_replay(make_replay(ROWS, data[:steps])))
    assert_same_replay(loaded, expected)
    for step in data[steps:]:
        loaded.add([step])
        expected.add([step])
        assert_same_replay(loaded, expected)


@pytest.mark.parametrize("steps", [1, 4, ROWS])
def test_a_file_holds_only_the_rows_that_are_filled(steps, tmp_path):
    replay = make_replay(4000, steps_of_data(steps))
    assert checkpoints.write(tmp_path / "replay.pt", checkpoints.pack_replay(replay))
    assert (tmp_path / "replay.pt").stat().st_size < 10_000, "a row takes 220 bytes, all rows 900 kB"
    assert_same(checkpoints.read(tmp_path / "replay.pt"), checkpoints.pack_replay(replay), "replay")


# prints by how many MB a checkpoint of a full replay buffer of 200 MB, and then reading it, raise the memory
MEASURED = """
import resource, sys, torch
from experiment import checkpoints
from kalei_matd3_mamujoco import Replay
torch.set_num_threads(1)

def status(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) / 1000

replay = Replay(2500, 100, 80, (2, 20), 5, 0.99, torch.device("cpu"))  # 802 bytes a step
for name in ("state", "next_state", "actions"):
    getattr(replay, name).normal_()
replay.next_state[:-1] = replay.state[1:]
replay.filled.fill_(2500)
replay.newest.fill_(2499)
checkpoints.write("warm_up.pt", {"x": torch.zeros(1000)})
before = status("VmHWM:")
assert checkpoints.write("replay.pt", {"replay": checkpoints.pack_replay(replay)})
written = status("VmHWM:")
anonymous = status("RssAnon:")
content = checkpoints.read("replay.pt")
print(written - before, status("RssAnon:") - anonymous, len(content["replay"]["state"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_checkpoint_takes_no_second_copy_of_the_replay_buffer(tmp_path):
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    writing, reading, rows = map(float, done.stdout.split())
    assert (tmp_path / "replay.pt").stat().st_size > 120e6 and rows == 2500
    assert writing < 80 and reading < 80, (writing, reading)  # MB; a copy of the buffer takes 160


# ---- Divergence ----
NAN = float("nan")


def spoil(network, name, value=NAN):
    """A function that writes one number into a parameter of the learner."""

    def write(learner, logs):
        with torch.no_grad():
            dict(getattr(learner, network).named_parameters())[name].view(-1)[0] = value

    return write


def spoil_loss(name):
    return lambda learner, logs: logs.update({name: torch.tensor(NAN)})


# 40 steps a block: MATD3 learns from step 240 on, 4 updates a block, so that update 16 ends the block up to step 360;
# MAPPO makes 4 updates in each of its calls, and the ninth ends the block up to step 360
DIVERGED = {  # script, the call of Learner.update from which on it is spoilt, how, and what the line must say
    "matd3 loss": (matd3, 16, spoil_loss("losses/critic"), "losses/critic is nan at update 16;"),
    "matd3 critic": (matd3, 14, spoil("critic", "layers.0.weight"), "losses/critic is nan at update 16;"),
    "matd3 critic only": (matd3, 16, spoil("critic", "layers.2.bias"), "critic.layers.2.bias has values"),
    "matd3 actor only": (matd3, 16, spoil("actor", "layers.1.thresholds", math.inf), "actor.layers.1.thresholds has"),
    "matd3 target": (matd3, 16, spoil("target_critic", "layers.0.weight"), "target_critic.layers.0.weight has values"),
    "mappo loss": (mappo, 9, spoil_loss("losses/value"), "losses/value is nan at update 36;"),
    "mappo actor only": (mappo, 9, spoil("actor", "log_std", -math.inf), "actor.log_std has values"),
    "mappo critic only": (mappo, 9, spoil("critic", "norms.3.bias"), "critic.norms.3.bias has values"),
}


def diverge(script, call, how, folder, monkeypatch, *flags):
    """Exit code and run folder of a run whose updates are spoilt from that call on."""
    update, calls = script.Learner.update, []

    def spoilt(learner, *arguments, **options):
        logs = update(learner, *arguments, **options)
        calls.append(1)
        if len(calls) >= call:
            how(learner, logs)
        return logs

    monkeypatch.setattr(script.Learner, "update", spoilt)
    return train(script, folder, *flags)


def assert_finite_at_320(folder):
    checkpoint = read(folder)
    assert checkpoint["counters"][0] == 320
    model = torch.load(folder / "model.pt", weights_only=True)
    for state in (checkpoint["learner"], model["actor"], model["critic"]):
        assert state and all(torch.isfinite(value).all() for value in state.values())
    assert all(torch.isfinite(value) for value in checkpoint["logs"].values())


@pytest.mark.parametrize("case", DIVERGED)
def test_what_diverges_stops_and_is_not_saved(case, tmp_path, monkeypatch, capsys):
    script, call, how, expected = DIVERGED[case]
    code, folder = diverge(script, call, how, tmp_path, monkeypatch)
    err = capsys.readouterr().err
    (line,) = re.findall("error: .*", err)
    assert code == 1 and line.startswith("error: diverged: ") and expected in line, line
    assert "Traceback" not in err
    assert_finite_at_320(folder)
    assert curves(folder)["charts/updates"][-1] == (320, 12 if script is matd3 else 32), "the curves end before it"


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_diverges_long_before_the_next_entry_of_losses_stops_in_one_line_too(name, tmp_path, monkeypatch, capsys):
    """Actions that are not finite would be the first to be noticed, by the environment."""
    script = SCRIPTS[name]
    call = {matd3: 13, mappo: 9}[script]
    flags = ["--log-interval", "100_000"]
    code, folder = diverge(script, call, spoil("actor", "layers.0.bias"), tmp_path, monkeypatch, *flags)
    err = capsys.readouterr().err
    (line,) = re.findall("error: .*", err)
    assert code == 1 and line.startswith("error: diverged: "), line
    assert_finite_at_320(folder)


# ---- A GPU ----
def test_the_random_state_of_a_gpu_goes_into_the_file_and_back(tmp_path, monkeypatch):
    """PyTorch's two functions are replaced, and the learner only says that it is on a GPU."""
    gpu, set_states = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.arange(16 + device.index, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *state_and_device: set_states.append(state_and_device))
    args, high = matd3.parse_args(["--hidden-size", "8"])[0], np.ones((3, 1), np.float32)
    envs = matd3.MaMuJoCoVecEnv("Hopper-v2-3x1", 2)
    learner = matd3.Learner(envs.state_size, -high, high, args, torch.device("cpu"))
    for written_on_gpu in (False, True):
        with monkeypatch.context() as patch:
            if written_on_gpu:
                patch.setattr(learner, "parameters", lambda: iter([SimpleNamespace(device=gpu)]))
            checkpoints.write_checkpoint(str(tmp_path), run_folder.NoWriter(), learner, envs, envs.reset()[0], (5, 0))
            patch.setattr(learner, "parameters", lambda: iter([SimpleNamespace(device=gpu)]))
            checkpoints.restore_checkpoint(checkpoints.read_checkpoint(str(tmp_path), matd3.Args), learner, envs)
        assert len(set_states) == written_on_gpu, "a file that a CPU wrote has no such state"
    ((state, device),) = set_states
    assert state.tolist() == list(range(17)) and device == gpu
    envs.close()
