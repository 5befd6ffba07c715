"""Training in several processes: two of them, on Gloo, against each other and against one with all of their data."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker_of_processes as worker
from run_scripts import environment, one_line, run_main
from test_checkpoints import assert_same

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment.processes import all_reduce_mean, any_process, mean_std

ROOT = Path(matd3.__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, what each of two processes found at the end)."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "worker_of_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["matd3", "mappo", "matd3 halves", "mappo halves"])
def test_all_processes_have_the_same_networks(ranks, name):
    _, (first, second) = ranks
    for key, value in first[name].items():
        assert torch.equal(value, second[name][key]), key


@pytest.mark.parametrize("name", ["matd3", "mappo"])
def test_two_processes_learn_as_one_with_the_data_of_both(ranks, name):
    _, (halves, _) = ranks
    make = getattr(worker, f"{name}_learner")
    start, whole = make().state_dict(), worker.updates(make(), lambda size: slice(size))
    half = worker.updates(make(), lambda size: slice(size // 2))
    moved = 0
    for key, value in whole.items():
        torch.testing.assert_close(halves[f"{name} halves"][key], value, rtol=1e-9, atol=1e-10, msg=key)
        moved += not torch.allclose(value, start[key], rtol=1e-3) and not torch.allclose(value, half[key], rtol=1e-3)
    assert moved > 10, "updates that change nothing would agree as well"


def test_one_process_writes_for_all(ranks):
    folder, _ = ranks
    runs = sorted(run.name.split("__")[1] for run in (folder / "runs").iterdir())
    assert runs == ["kalei_mappo_mamujoco", "kalei_matd3_mamujoco"]
    for run in (folder / "runs").iterdir():
        assert len(list(run.glob("events*"))) == 1
        assert torch.load(run / "model.pt", weights_only=True)["global_step"] == 640


# ---- Checkpoints ----
# rounds of 40 steps of both, checkpoints at 320, 600 and 640
FLAGS = "--device cpu --num-threads 1 --env-id Hopper-v2-3x1 --total-timesteps 640 --num-envs 2 --hidden-size 16"
FLAGS += " --eval-interval 300 --eval-episodes 2 --log-interval 40 --checkpoint-interval 300"
FLAGS += " --actor-reset-interval 120 --actor-threshold-bias 0 --episode-limit 23"
FLAGS = {
    matd3: f"{FLAGS} --num-critics 2 --critic-reset-interval 80 --warmup-steps 200 --batch-size 16 --buffer-size 120"
    " --train-interval 10 --updates-per-round 2",
    mappo: f"{FLAGS} --rollout-steps 10 --num-epochs 1 --num-minibatches 1",
}
# dies in the middle of its second checkpoint: with other processes' files written, and the first one's not
KILLED = """
import os, signal, sys
import {name} as script
from experiment import checkpoints
write, count = checkpoints.write, []
def write_some(path, content):
    count.append(path)
    if len(count) == 2 and path.endswith("checkpoint.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)
checkpoints.write = write_some
script.main()
"""


def torchrun(folder, *command, processes=2):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, *map(str, command)]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def checkpoints(run_folder):
    """{name: content} of a run's checkpoint and of its other processes' files."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted(run_folder.glob("checkpoint*.pt"))}


@pytest.mark.long
@pytest.mark.parametrize("script", [matd3, mappo], ids=["matd3", "mappo"])
def test_two_processes_resume_bit_for_bit(script, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    code, err = torchrun(tmp_path / "whole", script.__file__, *FLAGS[script].split())
    assert code == 0, err[-3000:]
    (whole,) = (tmp_path / "whole" / "runs").iterdir()

    (tmp_path / "killed.py").write_text(KILLED.format(name=script.__name__))
    code, err = torchrun(tmp_path / "killed", tmp_path / "killed.py", *FLAGS[script].split())
    assert code != 0
    (folder,) = (tmp_path / "killed" / "runs").iterdir()
    assert list(checkpoints(folder)) == ["checkpoint.pt", "checkpoint_process1_320.pt", "checkpoint_process1_600.pt"]
    assert checkpoints(folder)["checkpoint.pt"]["counters"][0] == 320

    for count, expected in ((1, "is of 2 processes, expected as many, not 1"), (2, None)):
        code, err = torchrun(tmp_path / "killed", script.__file__, "--resume", folder, processes=count)
        assert (code == 0) == (expected is None) and (expected or "640/640") in err, err[-3000:]
    ours, theirs = checkpoints(folder), checkpoints(whole)
    assert list(ours) == list(theirs) == ["checkpoint.pt", "checkpoint_process1_640.pt"]
    for name in ours:
        for content in (ours[name], theirs[name]):
            content.pop("args", None)
        assert_same(ours[name], theirs[name], name)
    first, second = ours.values()
    assert not torch.equal(first["obs"], second["obs"]), "both processes act in the same environments"

    path = folder / "checkpoint_process1_640.pt"
    path.write_bytes(path.read_bytes()[:-9])
    command = ("--resume", folder, "--total-timesteps", 700)
    code, err = torchrun(tmp_path / "killed", script.__file__, *command)
    assert code != 0 and f"error: --resume: {path}: ValueError: not as it was written" in err, err[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("script", [matd3, mappo], ids=["matd3", "mappo"])
def test_three_processes_draw_and_act_differently(script, tmp_path):
    flags = FLAGS[script].replace("--batch-size 16", "--batch-size 15").split()
    code, err = torchrun(tmp_path, script.__file__, *flags, processes=3)
    assert code == 0, err[-3000:]
    (folder,) = (tmp_path / "runs").iterdir()
    saved = list(checkpoints(folder).values())
    assert len(saved) == 3
    found = [{"generator": each["random"]["cpu"], "environments": each["obs"]} for each in saved]
    for each, process in zip(found, saved, strict=True):
        torch.set_rng_state(each["generator"])
        each["noise"], each["rows"] = torch.randn(5), torch.randint(1000, (20,))
        each["resets"] = torch.stack(
            [torch.as_tensor(rng["state"]["state"] % 2**62) for rng in process["envs"]["rngs"]]
        )
        if script is matd3:
            each["actions of the warm-up"] = process["replay"]["actions"][:10]
    for a, b in itertools.combinations(found, 2):
        for name, value in a.items():
            assert not torch.equal(value, b[name]), name


def test_alone_nothing_is_exchanged():
    values = torch.tensor([1.0, 4.0])
    all_reduce_mean([values])
    assert values.tolist() == [1.0, 4.0]
    assert [moment.item() for moment in mean_std(values)] == [2.5, 1.5]
    assert any_process(True, "cpu") is True


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("script", [matd3, mappo], ids=["matd3", "mappo"])
def test_more_processes_than_gpus(script, rank, tmp_path, monkeypatch):
    """Every process says so, so that none waits for another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in dict(
        WORLD_SIZE=2, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=2, MASTER_ADDR="localhost"
    ).items():
        monkeypatch.setenv(name, str(value))
    code, out, err = run_main(script, "--device", "cuda", cwd=tmp_path)
    assert code == 2 and one_line(err) and "--nproc_per_node is 2, expected at most 1, " in err and not out
    assert not list(tmp_path.iterdir())
