"""tools/grid.py with a stub and with a real script."""

import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from run_scripts import one_line, write_run

from experiment.code_identity import identity
from experiment.run_folder import lock_run_folder
from tools import figures, grid

ROOT = Path(grid.__file__).resolve().parent.parent
TAG = "charts/eval_return"


# ---- grid ----
STUB = """
import dataclasses, json, os, signal, sys, time

@dataclasses.dataclass
class Args:
    env_id: str = ""
    exp_name: str = ""
    seed: int = 0
    checkpoint_interval: int = 0
    total_timesteps: int = 100
    eval_interval: int = 50
    eval_episodes: int = 40
    log_interval: int = 10
    lr: float = 0.5
    precision: str = "auto"
    then: str = "end"
    evaluate: str | None = None

def parse_args(argv):
    args = Args()
    for flag, value in zip(argv[::2], argv[1::2], strict=True):
        name = flag[2:].replace("-", "_")
        if not hasattr(args, name):
            print(f"error: {flag}", file=sys.stderr)
            sys.exit(2)
        setattr(args, name, type(getattr(Args, name))(value) if name != "evaluate" else value)
    args.precision = args.precision.replace("auto", "float32")
    return args, None

class Envs:
    def close(self):
        pass

def make_env(args, seed, num_envs):
    if args.env_id == "Antt":
        print("error: unknown env id 'Antt'; there are A, B", file=sys.stderr)
        sys.exit(2)
    return Envs()

def receive(number, frame):
    print("received", number, os.getpgrp() == os.getpid(), file=open("received", "a"), flush=True)
    time.sleep(0.3)  # for a second signal to arrive
    sys.exit(128 + number)

if __name__ == "__main__":
    start, flags = time.monotonic(), sys.argv[1:]
    resume = flags.pop() if "--resume" in flags else None
    args, _ = parse_args(flags[: len(flags) - (resume is not None)])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    print(json.dumps([args.env_id, args.exp_name, args.seed, args.then, resume]), file=open("calls", "a"), flush=True)
    time.sleep(60 if args.then == "wait" else 0.2)
    print(start, time.monotonic(), file=open("times", "a"))
    print("progress\\rthe last words", file=sys.stderr)
    sys.exit(7 if args.then == "fail" else 0)
"""
DEFAULTS = dict(env_id="A", exp_name="x", seed=1, checkpoint_interval=100_000, total_timesteps=100, lr=0.5, then="end")
DEFAULTS |= dict(precision="float32", script="stub_of_a_script.py")


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """An empty working directory with the stub, and everything that the grid changes in this process put back."""
    (tmp_path / "stub_of_a_script.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(DEFAULTS, "code", identity(importlib.import_module("stub_of_a_script").Args)["code"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    sys.modules.pop("stub_of_a_script", None)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_grid(in_folder, monkeypatch, capsys):
    """A function that runs grid.py with the stub and returns (exit code, stdout, stderr)."""

    def run(*arguments, script="stub_of_a_script.py"):
        monkeypatch.setattr(sys, "argv", ["grid.py", "--script", str(script), *map(str, arguments)])
        code = 0
        try:
            grid.main()
        except SystemExit as stop:
            code = stop.code
        return int(code or 0), *capsys.readouterr()

    return run


def calls(folder):
    path = folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_grid_runs_all_and_goes_on_where_one_fails(run_grid, in_folder):
    arguments = ["--env-ids", "A|1", "B", "--seeds", 1, 2, "--variants", "x=", "bad=--then fail", "--workers", 2]
    code, out, err = run_grid(*arguments, "--", "--lr", 0.25)
    assert code == 1 and not err
    expected = [[task, *what, None] for task in ("A|1", "B") for what in VARIANTS_AND_SEEDS]
    assert sorted(calls(in_folder)) == sorted(expected)
    assert "[1/8] A_1__x__1: starts, see runs/grid_logs/A_1__x__1.log\n" in out
    assert out.count("exit code 0 after") == 4 and out.count(": the last words\n") == 4
    assert "B__bad__2: exit code 7 after 0.0 minutes: the last words\n" in out
    assert out.endswith("8 runs, 4 failed\n")
    assert "the last words" in (in_folder / "runs" / "grid_logs" / "B__x__2.log").read_text()
    times = [tuple(map(float, line.split())) for line in (in_folder / "times").read_text().splitlines()]
    side_by_side = [sum(start <= moment < end for start, end in times) for moment, _ in times]
    assert max(side_by_side) == 2


VARIANTS_AND_SEEDS = [["x", 1, "end"], ["x", 2, "end"], ["bad", 1, "fail"], ["bad", 2, "fail"]]


def test_what_is_finished_is_skipped_and_what_is_not_is_resumed(run_grid, in_folder):
    runs = in_folder / "runs"
    done, half = {TAG: {50: 0, 100: 0}}, {TAG: {50: 0}, "charts/episodic_return": {100: 0}}

    def make(seed, curves, checkpoint, made=5, name="x", **changes):
        folder = runs / f"A__{name}__{seed}__{made}"
        write_run(folder, curves, DEFAULTS | {"seed": seed, "exp_name": name} | changes)
        if checkpoint:
            (folder / "checkpoint.pt").touch()

    make(1, done, checkpoint=True)
    make(2, half, checkpoint=True)  # killed in its last rollout, where episodes end at the last step
    make(2, half, checkpoint=False, made=6)
    make(2, half, checkpoint=True, made=4)
    make(3, half, checkpoint=False, made=7)
    make(4, done, checkpoint=False, lr=0.1)
    make(5, half, checkpoint=True, lr=0.1)
    make(6, {"charts/checkpoint_seconds": {50: 0}} | done, checkpoint=True)  # killed before its last checkpoint
    make(7, {"charts/checkpoint_seconds": {50: 0}} | done, checkpoint=True, total_timesteps=50)
    make(8, done, checkpoint=False, name="x__8")
    code, out, err = run_grid("--env-ids", "A", "--seeds", *range(1, 9), "--variants", "x=", "--workers", 4)
    assert code == 1 and not err
    assert "A__x__1: finished before, in runs/A__x__1__5\n" in out
    left = "without a checkpoint, is now in runs/abandoned, see"
    assert f"A__x__2: resumes runs/A__x__2__5; runs/A__x__2__6, {left}" in out
    assert f"A__x__3: starts anew; runs/A__x__3__7, {left}" in out
    assert {path.name for path in runs.glob("abandoned/*")} == {"A__x__2__6", "A__x__3__7"}
    assert {path.name for path in runs.glob("*__[23]__*")} == {"A__x__2__4", "A__x__2__5"}
    assert "A__x__4: runs/A__x__4__5 was made with --lr 0.1, expected 0.5" in out
    assert "A__x__5: runs/A__x__5__5 was made with --lr 0.1, expected 0.5" in out
    resumed = {seed: resume for _, _, seed, _, resume in calls(in_folder)}
    runs_of = {seed: f"runs/A__x__{seed}__5" for seed in (2, 6, 7)}
    assert resumed == runs_of | {3: None, 8: None} and len(calls(in_folder)) == 5
    assert out.endswith("8 runs, 2 failed\n")

    code, out, _ = run_grid("--env-ids", "A", "--seeds", 6, "--variants", "x=", "--checkpoint-interval", 0)
    assert code == 0 and "finished before" in out, "without checkpoints, the last evaluation comes last"


def test_figures_of_a_grid_that_was_killed_and_restarted_find_each_run_once(run_grid, in_folder):
    write_run(in_folder / "runs" / "A__x__1__5", {TAG: {50: 0}}, DEFAULTS)  # killed, without a checkpoint
    assert run_grid("--env-ids", "A", "--seeds", 1, "--variants", "x=")[0] == 0
    write_run(in_folder / "runs" / "A__x__1__9", {TAG: {100: 7}}, DEFAULTS)  # by the run that the grid has started
    options = figures.Options(runs=("x=runs/*__*",), out=Path("figure"))
    (run,) = figures.read_runs(options)
    assert run.folder.name == "A__x__1__9" and run.curve == {100: 7}
    assert [path.name for path in Path("runs/abandoned").iterdir()] == ["A__x__1__5"], "it is kept"


def test_a_run_that_trains_before_its_first_checkpoint_is_left_alone(run_grid, in_folder):
    folder = write_run(in_folder / "runs" / "A__x__1__5", {TAG: {50: 0}}, DEFAULTS)
    lock = lock_run_folder(str(folder))  # as another process that trains there
    code, out, _ = run_grid("--env-ids", "A", "--seeds", 1, "--variants", "x=")
    assert code == 1 and "another process trains in runs/A__x__1__5" in out and folder.is_dir() and not calls(in_folder)
    os.close(lock)
    code, out, _ = run_grid("--env-ids", "A", "--seeds", 1, "--variants", "x=", "--dry-run")
    assert code == 0 and folder.is_dir(), "a dry run moves nothing"


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "no checkpoint"])
@pytest.mark.parametrize("episodes", [40, 0])
def test_a_run_without_its_only_evaluation_is_not_finished(episodes, checkpoint, run_grid, in_folder):
    """A signal, or a kill, ended the evaluation at the run's end, so there is no curve of evaluations at all."""
    curves = {"losses/critic": {100: 0}} | ({"charts/checkpoint_seconds": {100: 0}} if checkpoint else {})
    folder = write_run(in_folder / "runs" / "A__x__1__5", curves, DEFAULTS | {"eval_episodes": episodes})
    if checkpoint:
        (folder / "checkpoint.pt").touch()
    code, out, _ = run_grid("--env-ids", "A", "--seeds", 1, "--variants", "x=", "--", "--eval-episodes", episodes)
    expected = ("resumes" if checkpoint else "starts anew") if episodes else "finished before"
    assert code == 0 and expected in out, out


@pytest.mark.parametrize(
    "flag, made, message",
    [
        ("total_timesteps", 200, "was made with --total-timesteps 200, expected 100"),
        ("total_timesteps", 50, "resumes"),
        ("total_timesteps", 50, "was made with --total-timesteps 50, expected 100"),  # without a checkpoint
        ("eval_interval", 7, "was made with --eval-interval 7, expected 50"),
        ("eval_episodes", 5, "was made with --eval-episodes 5, expected 40"),
        ("log_interval", 7, "finished before"),
    ],
)
def test_a_finished_run_whose_curve_was_made_otherwise_does_not_pass_for_the_one_asked_for(
    flag, made, message, run_grid, in_folder
):
    """A longer run has other resets, and its end is the mean of other evaluations. A shorter one can go on."""
    curves = {TAG: {50: 0, min(100, made if flag == "total_timesteps" else 100): 0}}
    folder = write_run(in_folder / "runs" / "A__x__1__5", curves, DEFAULTS | {flag: made})
    if (made, message[:3]) != (50, "was"):
        (folder / "checkpoint.pt").touch()
    code, out, _ = run_grid("--env-ids", "A", "--seeds", 1, "--variants", "x=")
    assert message in out and code == ("was made" in message) and folder.exists(), out


OTHER_CODE = {  # what a run says of its code, the grid's message, and what it does with --accept-other-code
    "edited": ({"code": "0123"}, "was made by stub_of_a_script.py before its code changed", "accepted"),
    "old": ({"script": None, "code": None}, "does not say which code made it", "accepted"),
    "another": (
        {"script": "original.py", "code": "0123"},
        "was made by original.py, expected a file of stub",
        "refused",
    ),
    "renamed": ({"script": "original.py"}, None, None),
}


@pytest.mark.parametrize("case", OTHER_CODE)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_of_other_code_is_neither_skipped_nor_resumed_in_silence(case, finished, run_grid, in_folder):
    changes, message, accepted = OTHER_CODE[case]
    table = {name: value for name, value in (DEFAULTS | changes).items() if value is not None}
    folder = write_run(in_folder / "runs" / "A__x__1__5", {TAG: {100 if finished else 50: 0}}, table)
    (folder / "checkpoint.pt").touch()
    flags = ["--env-ids", "A", "--seeds", 1, "--variants", "x="]
    resumed = 0
    for more in ([], ["--accept-other-code"]):
        code, out, err = run_grid(*flags, *more)
        done = message is None or bool(more) and accepted == "accepted"
        resumed += done and not finished
        assert code == (not done) and not err and (message or "") in out, out
        assert ("finished before" in out, "resumes runs/A__x__1__5" in out) == (
            done and finished,
            done and not finished,
        )
        assert ("--accept-other-code" in out) == (not done and accepted == "accepted")
        assert len(calls(in_folder)) == resumed
    assert [path.name for path in (in_folder / "runs").glob("A__*")] == ["A__x__1__5"]


def test_a_run_that_went_on_with_edited_code_is_of_both(run_grid, in_folder):
    folder = write_run(in_folder / "runs" / "A__x__1__5", {TAG: {50: 0}}, DEFAULTS | {"code": "0123"})
    write_run(folder, {TAG: {100: 0}}, DEFAULTS, purge_step=51)
    assert grid.read_events(folder)[0]["code"] == f"0123, {DEFAULTS['code']}"
    code, out, _ = run_grid("--env-ids", "A", "--seeds", 1, "--variants", "x=")
    assert code == 1 and "before its code changed" in out


@pytest.mark.parametrize(("made", "flags"), [("bfloat16", ""), ("bfloat16", "float32"), ("float32", "tf32")])
@pytest.mark.parametrize("finished", [True, False])
def test_precision_is_what_was_asked_for(made, flags, finished, run_grid, in_folder):
    """The stub's auto means float32."""
    curve = {TAG: {100 if finished else 50: 0}}
    folder = write_run(in_folder / "runs" / "A__x__1__5", curve, DEFAULTS | {"precision": made})
    (folder / "checkpoint.pt").touch()
    grid_flags = ["--env-ids", "A", "--seeds", 1, "--variants", "x=", "--"]
    code, out, _ = run_grid(*grid_flags, *(["--precision", flags] if flags else []))
    assert code == 1 and f"was made with --precision {made}, expected {flags or 'float32'}" in out
    code, out, _ = run_grid(*grid_flags, "--precision", made)
    assert code == 0 and ("finished before" if finished else "resumes") in out


def test_a_run_that_another_process_holds_is_left_alone(run_grid, in_folder):
    (in_folder / "runs" / "grid_logs").mkdir(parents=True)
    with open(in_folder / "runs" / "grid_logs" / "A__x__1.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_SH)
        code, out, _ = run_grid("--env-ids", "A", "--seeds", 1, 2, "--variants", "x=")
    assert code == 1 and "A__x__1: runs already" in out and [call[2] for call in calls(in_folder)] == [2]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_goes_on_to_the_runs_once(number, code, run_grid, in_folder):
    locked = []

    def stop():
        end = time.monotonic() + 120
        while len(calls(in_folder)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        with open("runs/grid_logs/A__x__1.log") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    ended, out, _ = run_grid("--env-ids", "A", "--seeds", 1, 2, 3, "--variants", "x=--then wait", "--workers", 2)
    thread.join()
    assert ended == code and len(calls(in_folder)) == 2, "the third run must not start"
    received = (in_folder / "received").read_text()
    assert received == f"received {number.value} True\n" * 2, "once each, in process groups of their own"
    assert locked, "a run holds its log for itself"
    assert out.count(f"exit code {code} after") == 2 and f"{number.name}: 2 runs are told to stop\n" in out


def test_dry_run_prints_commands_and_does_nothing(run_grid, in_folder):
    write_run(in_folder / "runs" / "A__x__1__5", {TAG: {100: 0}}, DEFAULTS)
    before = sorted(in_folder.rglob("*"))
    flags = ["--env-ids", "A", "--seeds", 1, 2, "--variants", "x=--lr 0.5", "--checkpoint-interval", 9, "--dry-run"]
    code, out, err = run_grid(*flags, "--", "--total-timesteps", 100)
    stub = in_folder / "stub_of_a_script.py"
    command = f"{sys.executable} {stub} --env-id A --exp-name x --seed 2 --checkpoint-interval 9"
    skipped = "# A__x__1: finished before, in runs/A__x__1__5\n"
    assert (code, out, err) == (0, f"{skipped}{command} --total-timesteps 100 --lr 0.5\n", "")
    assert [path for path in sorted(in_folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_the_array_job_stops_in_time_and_is_queued_again(run_grid, in_folder):
    variants = ["--variants", "x=", "slow=--then wait"]
    code, text, err = run_grid("--env-ids", "A", *variants, "--seeds", 4, 5, "--slurm", "--", "--lr", 0.25)
    assert code == 0 and not err and not calls(in_folder)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in ("--array=0-3", "--requeue", "--signal=B:USR1@120", f"--chdir={in_folder}"):
        assert f"#SBATCH {line}" in lines
    assert (in_folder / "runs" / "grid_logs").is_dir(), "where Slurm writes the output"

    # as Slurm would run it, with a scontrol that takes notes
    (in_folder / "job.sh").write_text(text)
    (in_folder / "scontrol").write_text('#!/bin/bash\necho "$@" > requeued\n')
    (in_folder / "scontrol").chmod(0o755)
    environment = os.environ | {"PATH": f"{in_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    job = subprocess.Popen(["bash", "job.sh"], env=environment | {"SLURM_ARRAY_TASK_ID": "3"}, **streams)
    end = time.monotonic() + 120
    while not calls(in_folder) and time.monotonic() < end and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 143 and out == "A__slow__5: starts\n", out
    assert calls(in_folder) == [["A", "slow", 5, "wait", None]]
    assert (in_folder / "received").read_text().startswith(f"received {signal.SIGTERM.value} ")
    assert (in_folder / "requeued").read_text() == "requeue 77\n"


GRID_MISTAKES = {
    "": "--env-ids is ()",
    "--env-ids A A": "--env-ids is ('A', 'A')",
    "--env-ids A --seeds": "--seeds is ()",
    "--env-ids A --seeds 1 one": "--seeds is '1 one', expected an integer",
    "--env-ids A --workers 0": "--workers is 0",
    "--env-ids A --worker 2": "--worker is no flag of this script, expected --workers (see --help)",
    "--env-ids A --variants full": "'full' is one of them",
    "--env-ids A --variants full= full=--lr": "'full=--lr' is one of them",
    "--env-ids A --variants x:1= x_1=": "'x:1' and 'x_1' have the same folders A__x_1__1__*",
    "--env-ids A --checkpoint-interval -1": "--checkpoint-interval is -1",
    "--env-ids A --only 15": "--only is 15",
    "--env-ids A --slurm --only 1": "--only is 1",
    "--env-ids A --script nowhere.py": "--script is nowhere.py",
    "--env-ids A Antt": "'Antt'",
    "--env-ids A -- --smooth 1": "--smooth",
    "--env-ids A --variants x= -- --seed 9": "--seed",
    "--env-ids A --variants x= -- --evaluate model.pt": "--evaluate",
}


@pytest.mark.parametrize("arguments", GRID_MISTAKES)
def test_mistakes_in_a_grid_end_with_a_clear_message_before_anything_starts(arguments, run_grid, in_folder):
    defaults = [] if "--variants" in arguments else ["--variants", "x="]
    flags, dashes, more = arguments.partition("--" if arguments.startswith("-- ") else " -- ")
    code, out, err = run_grid(*flags.split(), *defaults, *dashes.split(), *more.split())
    assert code == 2 and one_line(err) and GRID_MISTAKES[arguments] in err and not out, err
    assert not calls(in_folder)


def test_a_real_run_is_made_resumed_and_skipped(run_grid, in_folder):
    flags = ["--device", "cpu", "--num-envs", 2, "--rollout-steps", 10, "--hidden-size", 8, "--episode-limit", 10]
    flags += ["--eval-episodes", 1, "--num-threads", 1, "--num-epochs", 1, "--total-timesteps"]
    grid_flags = ["--env-ids", "Humanoid-v2-9|8", "--seeds", 3, "--variants", "in full=--sharing full"]
    grid_flags += ["--checkpoint-interval", 20, "--"]
    for steps, what in ((20, ": starts, see"), (40, ": resumes runs/Hum"), (40, ": finished before, in runs/Hum")):
        code, out, err = run_grid(*grid_flags, *flags, steps, script=ROOT / "kalei_mappo_mamujoco.py")
        log = (in_folder / "runs" / "grid_logs" / "Humanoid-v2-9_8__in_full__3.log").read_text()
        assert code == 0 and what in out, out + err + log
        (folder,) = in_folder.glob("runs/Humanoid-v2-9_8__in_full__3__*")
        hyperparameters, scalars = grid.read_events(folder)
        assert list(scalars[TAG]) == list(range(20, steps + 1, 20))
    assert hyperparameters["env_id"] == "Humanoid-v2-9|8" and hyperparameters["sharing"] == "full"
    assert len(list(folder.glob("events*"))) == 2
