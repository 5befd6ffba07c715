"""Training in several processes: two of them, on Gloo, against each other and against one with all of their data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker_of_processes as worker

import experiment
import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3

ROOT = Path(matd3.__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(folder, what each of two processes found at the end)."""
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "worker_of_processes.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
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


@pytest.mark.parametrize("script", [matd3, mappo])
@pytest.mark.parametrize("flag", ["--checkpoint-interval 100"])
def test_what_holds_one_process_only_is_refused(script, flag, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [script.__file__, *flag.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: --checkpoint-interval") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_alone_nothing_is_exchanged():
    values = torch.tensor([1.0, 4.0])
    experiment.average([values])
    assert values.tolist() == [1.0, 4.0]
    assert [moment.item() for moment in experiment.mean_std(values)] == [2.5, 1.5]
    assert experiment.any_process(True, "cpu") is True
