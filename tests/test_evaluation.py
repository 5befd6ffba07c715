"""Evaluations during training: a signal ends them early, nothing of them is logged, and a resumed run repeats them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import run_scripts
import torch
from run_scripts import curves, environment, one_line, run_main, scalars

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment.stopping import StopSignals

TINY = "--device cpu --num-threads 1 --env-id Hopper-v2-3x1 --num-envs 4 --hidden-size 16 --eval-episodes 2"
TINY += " --total-timesteps 160 --eval-interval 80 --checkpoint-interval 160 --log-interval 40 --episode-limit 30"
TINY = {
    matd3: f"{TINY} --warmup-steps 40 --batch-size 8 --train-interval 10 --updates-per-round 2 --num-critics 2",
    mappo: f"{TINY} --rollout-steps 10 --num-epochs 1 --num-minibatches 1",
}


class SignalInEvaluation:
    """Stands in for StopSignals: as if SIGTERM came during evaluation number `number`."""

    def __init__(self, number):
        self.number, self.seen, self.last = number, 0, None

    @property
    def received(self):
        frame = sys._getframe(1)
        if frame.f_code.co_name == "evaluate" and frame is not self.last:
            self.seen, self.last = self.seen + 1, frame
        return signal.SIGTERM if self.seen >= self.number else None

    def exit(self):
        sys.exit(128 + signal.SIGTERM)


@pytest.mark.parametrize("number", [1, 2], ids=["first", "last"])
@pytest.mark.parametrize("script", [matd3, mappo], ids=["matd3", "mappo"])
def test_an_evaluation_that_a_signal_ends_is_repeated_by_the_resumed_run(script, number, tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    assert run_main(script, *TINY[script].split(), cwd=tmp_path / "whole")[0] == 0
    (whole,) = (tmp_path / "whole" / "runs").iterdir()

    with monkeypatch.context() as patch:
        patch.setattr(run_scripts, "SignalInBlock", lambda block: SignalInEvaluation(number))
        code, _, err = run_main(script, *TINY[script].split(), cwd=tmp_path / "cut")
    assert code == 143, err
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["counters"][0] == 80 * number
    assert len(scalars(folder).get("charts/eval_return", [])) == number - 1, "half an evaluation was logged"

    earlier = 80 * number - 1  # an end that the run has passed already
    code, _, err = run_main(script, "--resume", folder, "--total-timesteps", earlier, cwd=tmp_path / "cut")
    assert code == 2 and one_line(err) and f"expected more than the {80 * number} steps" in err, err
    with monkeypatch.context() as patch:  # the repetition is cut as well
        patch.setattr(run_scripts, "SignalInBlock", lambda block: SignalInEvaluation(1))
        code, _, err = run_main(script, "--resume", folder, cwd=tmp_path / "cut")
    assert code == 143, err
    code, _, err = run_main(script, "--resume", folder, cwd=tmp_path / "cut")
    assert code == 0, err
    ours, theirs = curves(folder), curves(whole)
    assert [step for step, _ in ours["charts/eval_return"]] == [80, 160]
    assert ours.keys() == theirs.keys()
    for tag, series in theirs.items():
        assert ours[tag] == series, tag


@pytest.mark.parametrize(("received", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 143)])
def test_a_run_exits_with_the_code_of_its_signal(received, code):
    """None: only another process got one."""
    stop = SimpleNamespace(received=received)
    with pytest.raises(SystemExit) as end:
        StopSignals.exit(stop)
    assert end.value.code == code


LONG = "--env-id HumanoidStandup-v2-17x1 --device cpu --num-threads 1 --num-envs 4 --hidden-size 16"
LONG += " --eval-episodes 400 --total-timesteps 100000 --checkpoint-interval 100"
LONG = {  # rounds of 100 steps in each process
    matd3: f"{LONG} --train-interval 25 --warmup-steps 100 --batch-size 20 --buffer-size 4000 --updates-per-round 2",
    mappo: f"{LONG} --rollout-steps 25 --num-epochs 1",
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "processes"), [(mappo, 1), (mappo, 2), (matd3, 2)], ids=["mappo-1", "mappo-2", "matd3-2"]
)
def test_a_signal_in_a_long_evaluation_ends_the_run_in_time(script, processes, tmp_path):
    """The evaluation alone takes minutes; clusters kill a run some 30 seconds after SIGTERM."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [script.__file__, *LONG[script].split(), "--eval-interval", str(100 * processes)]
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=err, stderr=err)
        try:
            deadline = time.monotonic() + 120
            while "evaluating" not in (tmp_path / "err").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()[-2000:]
                time.sleep(0.1)
            os.kill(process.pid, signal.SIGTERM)
            code = process.wait(timeout=25)
        finally:
            process.kill()
    assert code != 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["counters"][0] == 100 * processes
    assert "charts/eval_return" not in scalars(folder)


@pytest.mark.long
@pytest.mark.parametrize("script", [matd3, mappo], ids=["matd3", "mappo"])
def test_a_signal_to_one_process_stops_both(script, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.__file__]
    with open(tmp_path / "err", "w") as err:
        flags = [*LONG[script].split(), "--eval-episodes", "0", "--checkpoint-interval", "100000"]
        process = subprocess.Popen([*command, *flags], cwd=tmp_path, env=environment(), stderr=err)
        try:
            deadline = time.monotonic() + 120
            while "SPS" not in (tmp_path / "err").read_text():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()[-2000:]
                time.sleep(0.1)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            (second,) = [pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
            os.kill(int(second), signal.SIGTERM)
            code = process.wait(timeout=60)
        finally:
            process.kill()
    (folder,) = (tmp_path / "runs").iterdir()
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["counters"][0]
    assert code != 0 and (folder / f"checkpoint_process1_{step}.pt").is_file()
