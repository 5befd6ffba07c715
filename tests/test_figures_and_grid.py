"""tools/figures.py against numbers by hand and by NumPy; grid.py with a stub and a real script; publish.py."""

import csv
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

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from experiment.code_identity import identity
from tools import figures, grid, publish

ROOT = Path(grid.__file__).resolve().parent.parent
TAG = "charts/eval_return"


def write_run(folder, curves, hyperparameters=None, purge_step=None):
    """Add an event file with {tag: {step: value}} to a run's folder, later in name than those in it."""
    number = len(list(folder.glob("events*")))
    writer = SummaryWriter(str(folder), purge_step=purge_step, filename_suffix=".new")
    if hyperparameters:
        rows = "\n".join(f"|{name}|{value}|" for name, value in hyperparameters.items())
        writer.add_text("hyperparameters", f"|name|value|\n|-|-|\n{rows}")
    for tag, curve in curves.items():
        for step, value in curve.items():
            writer.add_scalar(tag, value, step)
    writer.close()
    (new,) = folder.glob("*.new")
    new.rename(folder / f"events.out.tfevents.{number:010d}.name")
    return folder


def clear(err):
    """Whether a message is one line of ours, or tyro's box."""
    return len(err.splitlines()) == 1 and err.startswith("error: ") or ("----" in err and "Traceback" not in err)


# ---- figures ----
@pytest.fixture
def make_run(tmp_path):
    """A function that writes the folder of a run with the values at steps 100, 200, ..."""

    def make(task, variant, seed, values, tag=TAG, **hyperparameters):
        name = f"{task.replace('|', '_')}__{variant}_{seed}__{seed}__17"
        curve = values if isinstance(values, dict) else {100 * (i + 1): value for i, value in enumerate(values)}
        known = dict(env_id=task, exp_name="renamed since", seed=seed, sharing=variant) | hyperparameters
        return write_run(tmp_path / "runs" / name, {tag: curve}, known)

    return make


@pytest.fixture
def draw(tmp_path, monkeypatch, capsys):
    """A function that runs figures.py on folders and returns (what it printed, rows of OUT.csv)."""

    def draw(*arguments, out="figure"):
        (tmp_path / "out").mkdir(exist_ok=True)
        path = tmp_path / "out" / out
        monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments), "--out", str(path)])
        figures.main()
        return capsys.readouterr().out, rows_of(f"{path}.csv")

    return draw


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_mean_and_interval_at_the_steps_that_all_seeds_have(make_run, draw, tmp_path):
    runs = [make_run("Ant-v2-4x2", "full", seed, values) for seed, values in ((1, [1, 10, 7]), (2, [4, 40]))]
    runs += [make_run("Ant-v2-4x2", "full", 3, [4, -20, 7]), make_run("Ant-v2-4x2", "none", 1, [5, 6, 8])]
    out, rows = draw("--runs", *runs)
    start = {"task": "Ant-v2-4x2", "variant": "full", "seeds": "3"}
    # of the 27 resamples of three seeds, 1 is the lowest thrice: more than 2.5 %, so the interval is the range
    assert rows[:2] == [
        start | {"step": "100", "mean": "3", "low": "1", "high": "4"},
        start | {"step": "200", "mean": "10", "low": "-20", "high": "40"},
    ]
    start = {"task": "Ant-v2-4x2", "variant": "none", "seeds": "1", "low": "", "high": ""}
    assert rows[2:] == [start | {"step": f"{100 * i}", "mean": f"{i + 4 + (i == 3)}"} for i in (1, 2, 3)]
    assert f"Ant-v2-4x2, {TAG} at step 200\n" in out, "a run has made no more than 200"
    assert "full: 10.0 [-20.0, 40.0]  (seed 1: 10.0, 2: 40.0, 3: -20.0)" in out and "none: 6.0  (seed 1: 6.0)" in out

    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(first) == {"figure.png", "figure.csv"} and first["figure.png"].startswith(b"\x89PNG")
    draw("--runs", *runs)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def assert_interval(row, samples, statistic, confidence=0.95, resamples=50_000):
    """As a plain percentile bootstrap has it, each sample resampled on its own, give or take 0.5 % of the resamples."""
    rng = np.random.default_rng(12)
    values = statistic(np.concatenate([rng.choice(sample, (resamples, len(sample))) for sample in samples], axis=1))
    for bound, share in (("low", (1 - confidence) / 2), ("high", (1 + confidence) / 2)):
        least, most = np.quantile(values, [share - 0.005, share + 0.005])
        assert least - 1e-6 <= float(row[bound]) <= most + 1e-6, (bound, row[bound], least, most)


@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_interval_against_a_plain_bootstrap(confidence, make_run, draw):
    values = np.array([3.0, 8.0, 1.0, 13.0, 21.0, 2.0, 5.0, 9.0])
    runs = [make_run("Ant-v2-4x2", "full", seed, [value, 10 * value]) for seed, value in enumerate(values)]
    _, rows = draw("--runs", *runs, "--confidence", confidence, "--resamples", 9999)
    for row, scale in zip(rows, (1, 10), strict=True):
        assert float(row["mean"]) == scale * values.mean()
        assert_interval(row, [scale * values], lambda resamples: resamples.mean(1), confidence)
    again = draw("--runs", *runs, "--confidence", confidence, "--resamples", 9999)[1]
    assert again == rows, "the same runs give the same figures"


SCORES = {
    "Ant-v2-4x2": {"kaleidoscope": [50, 100, 75, 80], "full": [20, 60]},
    "Humanoid-v2-9|8": {"kaleidoscope": [-1, 3, 2, 0], "full": [0, 1, 2], "none": [1]},
}


@pytest.fixture
def two_tasks(make_run):
    # the first evaluation, at 0 and -1, is the lowest of each task; the highest final scores are 100 and 3
    first = {"Ant-v2-4x2": 0, "Humanoid-v2-9|8": -1}
    return [
        make_run(task, variant, seed, [first[task], score])
        for task, variants in SCORES.items()
        for variant, scores in variants.items()
        for seed, score in enumerate(scores)
    ]


def test_inter_quartile_mean_over_tasks_by_hand(two_tasks, draw, tmp_path):
    out, _ = draw("--runs", *two_tasks, "--resamples", 9999)
    assert (tmp_path / "out" / "figure_iqm.png").read_bytes().startswith(b"\x89PNG")
    rows = {row.pop("variant"): row for row in rows_of(tmp_path / "out" / "figure_iqm.csv")}
    assert set(rows) == {"kaleidoscope", "full"} and "none: left out, since it has no runs on Ant-v2-4x2" in out
    assert [rows[name]["runs"] for name in ("kaleidoscope", "full")] == ["8", "5"]
    assert [line for line in out.splitlines() if "warning" in line] == [
        "  warning: tasks with more seeds count for more: full has 2, 3"
    ]
    # 0, .25, (.5, .75, .75, .8), 1, 1: the middle half of eight
    assert float(rows["kaleidoscope"]["iqm"]) == pytest.approx((0.5 + 0.75 + 0.75 + 0.8) / 4)
    # .2, (.25, .5, .6), .75: a quarter of five rounds down to one
    assert float(rows["full"]["iqm"]) == pytest.approx((0.25 + 0.5 + 0.6) / 3, rel=1e-6)

    def middle_half(resamples):
        cut = resamples.shape[1] // 4
        return np.sort(resamples, axis=1)[:, cut : resamples.shape[1] - cut].mean(1)

    for name in ("kaleidoscope", "full"):
        samples = [np.array(SCORES["Ant-v2-4x2"][name]) / 100, (np.array(SCORES["Humanoid-v2-9|8"][name]) + 1) / 4]
        assert_interval(rows[name], samples, middle_half)


def test_scores_divided_by_a_variants_mean(two_tasks, draw, tmp_path):
    draw("--runs", *two_tasks, "--normalise", "full")
    rows = {row["variant"]: float(row["iqm"]) for row in rows_of(tmp_path / "out" / "figure_iqm.csv")}
    assert rows["full"] == pytest.approx(1.0)  # 0, (.5, 1, 1.5), 2
    # divided by 40 and by 1: -1, 0, (1.25, 1.875, 2, 2), 2.5, 3
    assert rows["kaleidoscope"] == pytest.approx((1.25 + 1.875 + 2 + 2) / 4)


def test_a_single_seed_on_one_task_leaves_the_mean_over_tasks_without_interval(make_run, draw, tmp_path):
    runs = [make_run("Ant-v2-4x2", "full", seed, [0, seed]) for seed in (1, 2)]
    draw("--runs", *runs, make_run("Hopper-v2-3x1", "full", 1, [0, 4]))
    (row,) = rows_of(tmp_path / "out" / "figure_iqm.csv")
    assert row == {"variant": "full", "tasks": "2", "runs": "3", "iqm": f"{2.5 / 3:.7g}", "low": "", "high": ""}


def test_event_files_of_a_resumed_run_are_merged(make_run, draw):
    folder = make_run("Ant-v2-4x2", "full", 1, [1, 2, 3, 4, 5])
    write_run(folder, {TAG: {400: 40}}, purge_step=301)  # resumed from a checkpoint at 300
    _, rows = draw("--runs", folder)
    assert [(row["step"], row["mean"]) for row in rows] == [("100", "1"), ("200", "2"), ("300", "3"), ("400", "40")]
    write_run(folder, {TAG: {400: 41, 500: 50}})  # the same step in two files
    with open(folder / "events.out.tfevents.0000000003.name", "wb") as file:
        file.write((folder / "events.out.tfevents.0000000002.name").read_bytes()[:-7])  # a killed run's
    _, rows = draw("--runs", folder)
    assert [(row["step"], row["mean"]) for row in rows][3:] == [("400", "41"), ("500", "50")]


def test_windows_and_means_at_the_end(make_run, draw, tmp_path):
    """Runs that log at steps of their own share those of --every; --last takes the values as they were logged."""
    tag = "charts/episodic_return"
    one, other = {10: 1, 90: 3, 100: 5, 101: 10, 200: 20, 290: 50}, {50: 7, 150: 1, 180: 3, 199: 5, 270: 50}
    runs = [make_run("Ant-v2-4x2", "full", seed, curve, tag) for seed, curve in ((1, one), (2, other))]
    out, rows = draw("--runs", *runs, "--tag", tag, "--every", 100, "--last", 60, "--each-seed")
    # the window that ends at 300 is not over
    assert [(row["step"], row["mean"]) for row in rows] == [("100", "5"), ("200", "9")]
    seeds = [(row["seed"], row["step"], row["value"]) for row in rows_of(tmp_path / "out" / "figure_seeds.csv")]
    assert seeds == [("1", "100", "3"), ("1", "200", "15"), ("2", "100", "7"), ("2", "200", "3")]
    assert "at step 200, mean over 60 steps\n" in out
    assert "(seed 1: 20.0, 2: 3.0)" in out  # (140, 200]: 20, and the mean of 1, 3 and 5


def test_what_tells_variants_apart(make_run, draw):
    runs = [make_run("Ant-v2-4x2", "full", seed, [seed], num_critics=k) for seed, k in ((1, 1), (2, 1), (3, 5))]
    other = make_run("Ant-v2-4x2", "none", 1, [1])  # of older code, without the flag

    def variants(*names):
        return {row["variant"]: row["seeds"] for row in draw("--runs", *runs, other, "--variant", *names)[1]}

    assert variants("sharing") == variants("exp_name") == {"full": "3", "none": "1"}
    assert variants("sharing", "num_critics") == {
        "full, num_critics 1": "2",
        "full, num_critics 5": "1",
        "none, unknown": "1",
    }


def test_a_reference_curve_is_read(make_run, draw, tmp_path, monkeypatch):
    path = tmp_path / "reference.csv"
    path.write_text("# a comment\nstep,eval_return,more\n100,7.5,0\n200,8,0\n300,9,0\n")
    drawn = []
    monkeypatch.setattr(figures, "draw_curves", lambda *arguments: drawn.append(arguments[3]))
    draw("--runs", make_run("Ant-v2-4x2", "full", 1, [1, 2]), "--reference", path)
    assert drawn == [{"Ant-v2-4x2": {100: 7.5, 200: 8.0, 300: 9.0}}]


MISTAKES = {
    "": "--runs is empty",
    "--runs nowhere": "nowhere is not a folder",
    "--runs good good": "there twice",
    "--runs good ../out/../runs/good": "there twice",
    "--runs good twin": "are both Ant-v2-4x2, full, seed 1",
    "--runs good --tag charts/nothing": "--tag is charts/nothing",
    "--runs empty": "no metrics at all",
    "--runs good --variant colour": "--variant is colour",
    "--runs nameless": "does not say its env_id, seed, exp_name",
    "--runs good apart": "share no step",
    "--runs good --every 1000": "--every is 1000",
    "--runs good --confidence 1": "--confidence is 1",
    "--runs good --resamples 0": "--resamples is 0",
    "--runs good --last -1": "--last is -1",
    "--runs good hopper --normalise none": "--normalise is none",
    "--runs good hopper --normalise full": "mean score on Hopper-v2-3x1 is -2.0",
    "--runs good --reference nowhere.csv": "nowhere.csv",
    "--runs good --reference good.csv": "eval_return",
    "--runs good hopper --reference good.csv": "TASK=FILE",
    "--runs good --smooth": "--smooth",
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    runs = tmp_path_factory.mktemp("mistaken") / "runs"
    known = dict(env_id="Ant-v2-4x2", seed=1, exp_name="a", sharing="full")
    write_run(runs / "good", {TAG: {100: 1, 200: 3}}, known)
    write_run(runs / "twin", {TAG: {100: 1}}, known)
    write_run(runs / "apart", {TAG: {150: 1}}, known | {"seed": 2})
    write_run(runs / "hopper", {TAG: {100: -2}}, known | {"env_id": "Hopper-v2-3x1"})
    write_run(runs / "nameless", {TAG: {100: 1}})
    (runs / "empty").mkdir()
    (runs / "good.csv").write_text("step,return\n1,2\n")
    (runs.parent / "out").mkdir()
    return runs


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_in_figures_end_with_a_clear_message(arguments, mistaken, monkeypatch, capsys):
    monkeypatch.chdir(mistaken)
    monkeypatch.setattr(sys, "argv", ["figures.py", *arguments.split(), "--out", "../out/figure"])
    with pytest.raises(SystemExit) as stop:
        figures.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and clear(err) and MISTAKES[arguments] in err, err
    assert not list((mistaken.parent / "out").iterdir())


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
    assert "A__x__3: starts anew, runs/A__x__3__7 has no checkpoint, see" in out
    assert "A__x__4: runs/A__x__4__5 was made with --lr 0.1, expected 0.5" in out
    assert "A__x__5: runs/A__x__5__5 was made with --lr 0.1, expected 0.5" in out
    resumed = {seed: resume for _, _, seed, _, resume in calls(in_folder)}
    runs_of = {seed: f"runs/A__x__{seed}__5" for seed in (2, 6, 7)}
    assert resumed == runs_of | {3: None, 8: None} and len(calls(in_folder)) == 5
    assert out.endswith("8 runs, 2 failed\n")

    code, out, _ = run_grid("--env-ids", "A", "--seeds", 6, "--variants", "x=", "--checkpoint-interval", 0)
    assert code == 0 and "finished before" in out, "without checkpoints, the last evaluation comes last"


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
    "--env-ids A --seeds one": "one",
    "--env-ids A --workers 0": "--workers is 0",
    "--env-ids A --worker 2": "--worker",
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
    assert code == 2 and clear(err) and GRID_MISTAKES[arguments] in err and not out, err
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


# ---- publish ----
@pytest.fixture
def run_publish(monkeypatch, capsys):
    """A function that runs publish.py and returns (exit code, what it printed, its errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
        try:
            publish.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_published_run_has_its_curves_and_nothing_large(make_run, run_publish, tmp_path):
    run = make_run("Ant-v2-4x2", "full", 1, [1, 2, 3])
    with SummaryWriter(str(run), filename_suffix=".large") as writer:
        writer.add_scalar(TAG, 4.0, 400)
        writer.add_image("masks/actor", np.zeros((3, 200, 200), dtype=np.uint8), 400)
        writer.add_histogram("masks/histogram", np.arange(100), 400)
        writer.add_scalar(TAG, 5.0, 500)
    (run / "model.pt").write_bytes(b"weights")
    code, out, err = run_publish("--runs", run, "--out", tmp_path / "published")
    (copy,) = (tmp_path / "published").iterdir()
    assert code == 0 and not err and str(copy) in out and copy.name == run.name
    assert sorted(file.name for file in copy.iterdir()) == sorted(file.name for file in run.glob("events*"))
    assert grid.read_events(copy) == grid.read_events(run)
    assert grid.read_events(copy)[1] == {TAG: {100: 1, 200: 2, 300: 3, 400: 4, 500: 5}}
    tags = grid.EventAccumulator(str(copy)).Reload().Tags()
    assert not tags["images"] and not tags["histograms"] and tags["tensors"] == ["hyperparameters/text_summary"]


def test_mistakes_in_publishing_leave_everything_as_it_was(make_run, run_publish, tmp_path):
    first, second = (make_run("Ant-v2-4x2", "full", seed, [1, 2]) for seed in (1, 2))
    (tmp_path / "empty").mkdir()
    assert run_publish("--runs", first, "--out", tmp_path / "published")[0] == 0
    before = sorted(tmp_path.rglob("*"))
    for runs, said in {
        (): "--runs is empty",
        (second, first): f"{first}: there is a",
        (second, second): f"{second}: there is a",
        (second, tmp_path / "empty"): f"{tmp_path / 'empty'}: expected the folder of a run",
        (second, tmp_path / "nowhere"): f"{tmp_path / 'nowhere'}: expected the folder of a run",
    }.items():
        code, out, err = run_publish("--out", tmp_path / "published", *(["--runs", *runs] if runs else []))
        assert code == 2 and clear(err) and said in err and not out, err
    assert sorted(tmp_path.rglob("*")) == before
