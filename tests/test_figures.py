"""tools/figures.py, publish.py and judge.py against numbers by hand, plain loops and SciPy."""

import csv
import itertools
import math
import sys

import numpy as np
import pytest
from run_scripts import one_line, write_run
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

from tools import figures, grid, judge, publish

TAG = "charts/eval_return"


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
        printed = capsys.readouterr()
        return printed.out + printed.err, rows_of(f"{path}.csv")

    return draw


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_mean_and_interval_at_the_steps_that_all_seeds_have(make_run, draw, tmp_path):
    runs = [make_run("Ant-v2-4x2", "full", seed, values) for seed, values in ((1, [1, 10, 7]), (2, [4, 40]))]
    runs += [make_run("Ant-v2-4x2", "full", 3, [4, -20, 7]), make_run("Ant-v2-4x2", "none", 1, [5, 6, 8])]
    out, rows = draw("--runs", *runs)
    start = {"task": "Ant-v2-4x2", "variant": "one network", "seeds": "3"}
    # of the 27 resamples of three seeds, 1 is the lowest thrice: more than 2.5 %, so the interval is the range
    assert rows[:2] == [
        start | {"step": "100", "mean": "3", "low": "1", "high": "4"},
        start | {"step": "200", "mean": "10", "low": "-20", "high": "40"},
    ]
    start = {"task": "Ant-v2-4x2", "variant": "separate networks", "seeds": "1", "low": "", "high": ""}
    assert rows[2:] == [start | {"step": f"{100 * i}", "mean": f"{i + 4 + (i == 3)}"} for i in (1, 2, 3)]
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(first) == {"figure.png", "figure.csv", "figure_final.csv"} and first["figure.png"].startswith(b"\x89PNG")
    draw("--runs", *runs)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_each_run_counts_with_its_own_end(make_run, draw, tmp_path):
    runs = [make_run("Ant-v2-4x2", "full", 1, [1, 10, 7.26]), make_run("Ant-v2-4x2", "full", 2, [4, 40])]
    out, _ = draw("--runs", *runs, make_run("Ant-v2-4x2", "none", 1, [5, 6, 8]))
    assert f"Ant-v2-4x2, {TAG} at each run's last step\n" in out
    assert "  one network: 23.6 [7.3, 40.0]  (seed 1: 7.3 at 300, 2: 40.0 at 200)\n" in out
    assert "  separate networks: 8.0 at step 300  (seed 1: 8.0)\n" in out
    assert "warning: runs of Ant-v2-4x2 end at different steps, from 200 to 300\n" in out
    columns = ("variant", "seed", "steps", "score", "low", "high")
    assert [tuple(row[name] for name in columns) for row in rows_of(tmp_path / "out" / "figure_final.csv")] == [
        ("one network", "1", "300", "7.26", "", ""),
        ("one network", "2", "200", "40", "", ""),
        ("one network", "mean", "", "23.63", "7.26", "40"),
        ("separate networks", "1", "300", "8", "", ""),
        ("separate networks", "mean", "", "8", "", ""),
    ]
    out, _ = draw("--runs", *runs[:1], make_run("Ant-v2-4x2", "none", 2, [5, 6, 8]))
    assert f"Ant-v2-4x2, {TAG} at step 300\n" in out and "(seed 2: 8.0)" in out and "end at" not in out


def test_bootstrap_and_inter_quartile_mean_are_those_of_scipy():
    rng = np.random.default_rng(3)
    samples = [rng.normal(size=(2, n)) for n in (3, 5, 6)]

    def trimmed(*samples, axis):
        return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    assert figures.iqm(*samples) == pytest.approx(trimmed(*samples, axis=-1))
    generator = np.random.default_rng(figures.BOOTSTRAP_SEED)
    known = dict(n_resamples=250, confidence_level=0.9, method="percentile", axis=-1, batch=100, rng=generator)
    low, high = stats.bootstrap(samples, trimmed, vectorized=True, **known).confidence_interval
    ours = figures.bootstrap(samples, figures.iqm, resamples=250, confidence=0.9)
    assert ours == pytest.approx(np.array([low, high]))


def test_interval_over_tasks_is_that_of_rliable():
    """rliable 1.2.0, the library of Agarwal et al., printed these numbers with 50,000 resamples of five runs."""
    tasks = [[0.3, 0.7, 0.45, 0.85, 0.15], [0.9, 0.1, 0.6, 0.35, 0.75], [0.5, 0.65, 0.2, 0.95, 0.4]]
    samples = [np.array(scores) for scores in tasks]
    assert figures.iqm(*samples) == pytest.approx(0.52222222)
    low, high = figures.bootstrap(samples, figures.iqm, resamples=20_000, confidence=0.95)
    assert (low, high) == (pytest.approx(0.35, abs=0.006), pytest.approx(0.69444, abs=0.006))


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
    assert set(rows) == {"masks", "one network"}
    assert "separate networks: left out, since it has no runs on Ant-v2-4x2" in out
    assert [rows[name]["runs"] for name in ("masks", "one network")] == ["8", "5"]
    assert [line for line in out.splitlines() if "warning" in line] == [
        "warning: tasks with more seeds count for more: one network has 2, 3"
    ]
    # 0, .25, (.5, .75, .75, .8), 1, 1: the middle half of eight
    assert float(rows["masks"]["iqm"]) == pytest.approx((0.5 + 0.75 + 0.75 + 0.8) / 4)
    # .2, (.25, .5, .6), .75: a quarter of five rounds down to one
    assert float(rows["one network"]["iqm"]) == pytest.approx((0.25 + 0.5 + 0.6) / 3, rel=1e-6)

    def middle_half(resamples):
        cut = resamples.shape[1] // 4
        return np.sort(resamples, axis=1)[:, cut : resamples.shape[1] - cut].mean(1)

    for sharing, name in (("kaleidoscope", "masks"), ("full", "one network")):
        ant, humanoid = (np.array(SCORES[task][sharing]) for task in SCORES)
        assert_interval(rows[name], [ant / 100, (humanoid + 1) / 4], middle_half)


def test_scores_divided_by_a_variants_mean(two_tasks, draw, tmp_path):
    draw("--runs", *two_tasks, "--normalise", "one network")
    rows = {row["variant"]: float(row["iqm"]) for row in rows_of(tmp_path / "out" / "figure_iqm.csv")}
    assert rows["one network"] == pytest.approx(1.0)  # 0, (.5, 1, 1.5), 2
    # divided by 40 and by 1: -1, 0, (1.25, 1.875, 2, 2), 2.5, 3
    assert rows["masks"] == pytest.approx((1.25 + 1.875 + 2 + 2) / 4)


def test_a_single_seed_on_one_task_leaves_the_mean_over_tasks_without_interval(make_run, draw, tmp_path):
    runs = [make_run("Ant-v2-4x2", "full", seed, [0, seed]) for seed in (1, 2)]
    out, _ = draw("--runs", *runs, make_run("Hopper-v2-3x1", "full", 1, [0, 4]))
    assert "one network has no interval over tasks, since it has a single run on Hopper-v2-3x1\n" in out
    (row,) = rows_of(tmp_path / "out" / "figure_iqm.csv")
    assert row == {"variant": "one network", "tasks": "2", "runs": "3", "iqm": f"{2.5 / 3:.7g}", "low": "", "high": ""}


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
    out, rows = draw("--runs", *runs, "--tag", tag, "--every", 100, "--last", 50, "--each-seed")
    # the window that ends at 300 is not over
    assert [(row["step"], row["mean"]) for row in rows] == [("100", "5"), ("200", "9")]
    seeds = [(row["seed"], row["step"], row["value"]) for row in rows_of(tmp_path / "out" / "figure_seeds.csv")]
    assert seeds == [("1", "100", "3"), ("1", "200", "15"), ("2", "100", "7"), ("2", "200", "3")]
    assert "at step 200, mean over 50 steps\n" in out
    assert "(seed 1: 20.0, 2: 4.0)" in out  # (150, 200]: 20, and the mean of 3 and 5


def test_what_tells_variants_apart(make_run, draw):
    runs = [make_run("Ant-v2-4x2", "full", seed, [seed], num_critics=k) for seed, k in ((1, 1), (2, 1), (3, 5))]
    other = make_run("Ant-v2-4x2", "none", 1, [1])  # of older code, without the flag

    def variants(*names):
        return {row["variant"]: row["seeds"] for row in draw("--runs", *runs, other, "--variant", *names)[1]}

    assert variants("exp_name") == {"full": "3", "none": "1"}
    assert variants("sharing") == {"one network": "3", "separate networks": "1"}
    assert variants("sharing", "num_critics") == {
        "one network, num_critics 1": "2",
        "one network, num_critics 5": "1",
        "separate networks, unknown": "1",
    }


def test_each_way_of_sharing_has_one_name_and_colour(tmp_path, draw, monkeypatch):
    runs, names = (
        {},
        {
            "mappo_none": "separate networks",
            "mappo_full": "one network",
            "mappo_full_log_std": "one network, log_std for each agent",
            "mappo_kaleidoscope": "masks",
            "bfloat16_kaleidoscope": "masks",
            "mappo_no_diversity": "masks, no diversity loss",
            "matd3_kaleidoscope_twin": "masks, twin critics",
            "matd3_none_twin": "separate networks, twin critics",
        },
    )
    for seed, arm in enumerate(names):
        sharing = next((way for way in ("full", "none") if way in arm), "kaleidoscope")
        known = dict(env_id="Ant-v2-4x2", seed=seed, exp_name=arm, sharing=sharing)
        runs[arm] = write_run(tmp_path / "runs" / f"Ant-v2-4x2__{arm}__{seed}__17", {TAG: {100: 1}}, known)
    styles = []
    monkeypatch.setattr(figures, "draw_curves", lambda *arguments: styles.append(arguments[4]))
    draw("--runs", *runs.values())
    assert set(styles[0]) == set(names.values()) and list(styles[0])[:3] == [
        "masks",
        "one network",
        "separate networks",
    ]
    assert len({style["color"] for style in styles[0].values()}) == len(styles[0])
    for arm, name in names.items():
        draw("--runs", f"my copy={runs['mappo_full' if arm != 'mappo_full' else 'mappo_none']}", runs[arm])
        assert styles[-1][name] == styles[0][name] and list(styles[-1]) == [name, "my copy"]
        assert styles[-1]["my copy"]["color"] not in [style["color"] for style in styles[0].values()]


def test_runs_get_the_name_of_their_group(make_run, draw, tmp_path):
    ours = [make_run("Ant-v2-4x2", "kaleidoscope", seed, [seed]) for seed in (1, 2)]
    copies = [make_run("Ant-v2-4x2", "my_copy", seed, [seed], sharing="kaleidoscope") for seed in (1, 2, 3)]
    out, rows = draw("--runs", *ours, f"my copy={tmp_path}/runs/*my_copy_*")
    assert [(row["variant"], row["seeds"], row["mean"]) for row in rows] == [
        ("masks", "2", "1.5"),
        ("my copy", "3", "2"),
    ]
    assert "warning" not in out
    groups = [f"my copy={path}" for path in copies[:2]]
    _, rows = draw("--runs", *groups, "one network=" + str(tmp_path / "runs" / "*kaleidoscope_[1]_*"))
    assert [(row["variant"], row["seeds"]) for row in rows] == [("one network", "1"), ("my copy", "2")]
    out, rows = draw("--runs", ours[0], copies[2])  # by their way of sharing, they are one variant
    assert [(row["variant"], row["seeds"]) for row in rows] == [("masks", "2")]
    assert "Ant-v2-4x2, masks: these runs have different names: kaleidoscope, my_copy; NAME=GLOB tells" in out


def test_flags_that_change_results_are_compared(make_run, draw):
    def warnings(*runs):
        return [line for line in draw("--runs", *runs)[0].splitlines() if line.startswith("warning")]

    same = dict(lr=0.5, log_interval=10, num_threads=1, episode_limit=None)
    first = make_run("Ant-v2-4x2", "full", 1, [0, 1], **same | dict(episode_limit=1000))
    other = make_run("Ant-v2-4x2", "none", 1, [1, 1], **same | dict(log_interval=20, num_threads=2, its_own_flag=3))
    assert warnings(first, other) == []
    third = make_run("Ant-v2-4x2", "none", 2, [1], **same | dict(lr=0.1, total_timesteps=7, eval_episodes=5))
    elsewhere = make_run("Hopper-v2-3x1", "none", 1, [0, 1], **same | dict(lr=0.2, eval_episodes=6))
    line = warnings(first, other, third, elsewhere)[0]
    said = "lr is 0.5 (one network; separate networks) and 0.1 (separate networks)"
    assert line == f"warning: runs of Ant-v2-4x2 differ in flags that change results: {said}"


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
    "--runs good x=nowhere*": "'x=nowhere*' finds no folder",
    "--runs good x=good.csv": "'x=good.csv' finds no folder",
    "--runs =good": "'=good' finds no folder",
    "--runs good x=goo*": "there twice",
    "--runs good good": "there twice",
    "--runs good ../out/../runs/good": "there twice",
    "--runs good twin": "are both Ant-v2-4x2, one network, seed 1, expected one; NAME=GLOB",
    "--runs good --tag charts/nothing": "--tag is charts/nothing",
    "--runs empty": "no metrics at all",
    "--runs good --variant colour": "--variant is colour",
    "--runs nameless": "does not say its env_id, seed, exp_name",
    "--runs good apart": "share no step",
    "--runs good --every 1000": "--every is 1000",
    "--runs good --confidence 1": "--confidence is 1",
    "--runs good --resamples 0": "--resamples is 0",
    "--runs good --last -1": "--last is -1",
    "--runs good hopper --normalise none": "is none, expected min-max or a variant that Ant-v2-4x2 has: one",
    "--runs good hopper --normalise one_network": "mean score on Hopper-v2-3x1 is -2.0",
    "--runs good --reference nowhere.csv": "nowhere.csv",
    "--runs good --reference good.csv": "eval_return",
    "--runs good hopper --reference good.csv": "TASK=FILE",
    "--runs good --smooth": "--smooth is no flag of this script, expected",
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
    words = [word.replace("one_network", "one network") for word in arguments.split()]
    monkeypatch.setattr(sys, "argv", ["figures.py", *words, "--out", "../out/figure"])
    with pytest.raises(SystemExit) as stop:
        figures.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and MISTAKES[arguments] in err, err
    assert not list((mistaken.parent / "out").iterdir())


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


RESUMED = {  # episodes of a run that stopped at 23,000 and was resumed at 12,000
    0: {500: 1, 9_000: 2, 10_000: 6, 10_500: 10, 11_900: 20, 12_500: 300, 15_000: 300, 22_000: 300},
    12_001: {19_000: 60, 20_001: 5, 34_000: 8, 34_100: 9},
}


def resumed_run(folder, episodes=RESUMED):
    known = dict(env_id="Ant-v2-4x2", seed=1, exp_name="mappo_full", sharing="full", total_timesteps=35_000)
    for purge_step, curve in episodes.items():
        evaluations = {step: step / 3 for step in range(3_000, max(curve) + 1, 3_000) if step >= purge_step}
        scalars = {"charts/episodic_return": curve, "charts/episodic_length": dict(curve), TAG: evaluations}
        write_run(folder, scalars, None if purge_step else known, purge_step=purge_step or None)
    return folder


def test_training_episodes_are_published_as_means_of_windows(run_publish, tmp_path):
    run = resumed_run(tmp_path / "runs" / "Ant-v2-4x2__mappo_full__1__17")
    assert run_publish("--runs", run, "--out", tmp_path / "once")[0] == 0
    once = tmp_path / "once" / run.name
    hyperparameters, scalars = grid.read_events(once)
    # (0, 10,000], then of both files: 10, 20 and 60; 5; and the last window up to the run's last step
    means = {10_000: 3, 20_000: 30, 30_000: 5, 34_100: 8.5}
    assert scalars.pop("charts/episodic_return") == scalars.pop("charts/episodic_length") == means
    before = grid.read_events(run)
    assert hyperparameters == before[0] and scalars == {TAG: before[1][TAG]} and len(scalars[TAG]) == 11
    assert run_publish("--runs", once, "--out", tmp_path / "twice")[0] == 0
    assert grid.read_events(tmp_path / "twice" / run.name) == grid.read_events(once)


def test_a_mean_outlives_a_resume_within_its_window(run_publish, tmp_path):
    """No episode of the second file ends in the window that it begins in; of the third, none at all."""
    episodes = {0: {500: 1, 10_500: 10, 11_900: 20, 13_000: 300}, 12_001: {25_000: 7}}
    run = resumed_run(tmp_path / "Ant-v2-4x2__mappo_full__1__17", episodes)
    write_run(run, {TAG: {31_000: 1, 32_000: 2}}, purge_step=30_000)
    assert run_publish("--runs", run, "--out", tmp_path / "out")[0] == 0
    copy = tmp_path / "out" / run.name
    assert grid.read_events(copy)[1]["charts/episodic_return"] == {10_000: 1, 20_000: 15, 30_000: 7}
    assert [path.name for path in sorted(copy.iterdir())] == [path.name for path in sorted(run.iterdir())]


def test_published_runs_give_the_figures_of_the_runs(make_run, run_publish, draw, tmp_path):
    rng, runs = np.random.default_rng(5), []
    for task, sharing, seed in itertools.product(("Ant-v2-4x2", "Hopper-v2-3x1"), ("full", "none"), (1, 2, 3)):
        evaluations = {step: rng.normal() for step in (10_000, 20_000)}
        run = make_run(task, sharing, seed, evaluations, total_timesteps=20_000)
        runs.append(write_run(run, {"charts/episodic_return": {step: rng.normal() for step in range(90, 20_001, 90)}}))
    assert run_publish("--runs", *runs, "--out", tmp_path / "published")[0] == 0
    copies = [tmp_path / "published" / run.name for run in runs]
    for flags in ([], ["--tag", "charts/episodic_return", "--every", 10_000]):
        for of, out in ((runs, "raw"), (copies, "copied")):
            draw("--runs", *of, *flags, out=out)
        for ending in (".csv", "_iqm.csv", "_final.csv"):
            raw, copied = (rows_of(tmp_path / "out" / f"{name}{ending}") for name in ("raw", "copied"))
            assert len(raw) == len(copied) >= 2
            for row, other in zip(raw, copied, strict=True):
                for name, value in row.items():
                    try:
                        assert float(other[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
                    except ValueError:  # a word
                        assert other[name] == value
            assert flags or raw == copied


def test_a_model_is_copied_on_request(make_run, run_publish, tmp_path):
    runs = [make_run("Ant-v2-4x2", "full", seed, [1, 2]) for seed in (1, 2)]
    (runs[0] / "model.pt").write_bytes(b"weights")
    assert run_publish("--runs", *runs, "--out", tmp_path / "without")[0] == 0
    code, out, _ = run_publish("--runs", *runs, "--out", tmp_path / "with", "--model")
    assert code == 0 and [line.endswith("with model.pt") for line in out.splitlines()] == [True, False]
    assert not list(tmp_path.glob("without/*/model.pt"))
    (model,) = tmp_path.glob("with/*/model.pt")
    assert model.read_bytes() == b"weights" and model.parent.name == runs[0].name


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
        assert code == 2 and one_line(err) and said in err and not out, err
    assert sorted(tmp_path.rglob("*")) == before


# ---- judge ----
def plain_p(a, b):
    """The share of all ways to divide the values whose U is as far from its mean as that of (a, b)."""

    def distance(first, second):
        wins = sum((x > y) + (x == y) / 2 for x in first for y in second)
        return abs(wins - len(first) * len(second) / 2)

    values, ways, far = [*a, *b], 0, 0
    for chosen in itertools.combinations(range(len(values)), len(a)):
        others = [values[i] for i in range(len(values)) if i not in chosen]
        ways += 1
        far += distance([values[i] for i in chosen], others) >= distance(a, b)
    return far / ways


def test_mann_whitney_is_exact_also_with_ties():
    rng, never = np.random.default_rng(4), math.inf
    for n, m in ((3, 3), (5, 5), (4, 6), (2, 3), (6, 6)):
        for values in (rng.normal(size=n + m), rng.integers(4, size=n + m).astype(float)):
            a, b = list(values[:n]), list(values[n:])
            assert judge.mann_whitney(a, b) == pytest.approx(plain_p(a, b)), (a, b)
            if len(set(values)) == n + m:
                exact = stats.mannwhitneyu(a, b, method="exact").pvalue
                assert judge.mann_whitney(a, b) == pytest.approx(exact)
    large = rng.normal(size=20), rng.normal(0.5, size=25)
    assert judge.mann_whitney(*large) == pytest.approx(stats.mannwhitneyu(*large, method="exact").pvalue)
    assert judge.mann_whitney([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)  # the study's 0.008
    some = [2, never, never], [1, 1, 3]
    assert judge.mann_whitney(*some) == pytest.approx(plain_p(*some))
    assert judge.mann_whitney([never] * 5, [never] * 5) == 1


def test_holm_is_the_smallest_level_at_which_a_step_down_test_rejects():
    def rejected(p_values, level):
        left = sorted(range(len(p_values)), key=lambda i: p_values[i])
        found = set()
        while left and p_values[left[0]] * len(left) <= level:
            found.add(left.pop(0))
        return found

    for p_values in ([0.01, 0.04, 0.03, 0.005], [0.02, 0.01, 0.02], [0.5, 0.9], [0.3], []):
        corrected = judge.holm(p_values)
        for i, p in enumerate(corrected):
            assert i in rejected(p_values, p + 1e-12) or p == 1
            assert i not in rejected(p_values, p - 1e-9)
    assert judge.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_interval_of_a_difference_resamples_each_arm():
    a, b = np.array([1.0, 4, 9]), np.array([2.0, 2.5, 7])
    means = [[sum(drawn) / 3 for drawn in itertools.product(x, repeat=3)] for x in (a, b)]
    all_draws = [x - y for x in means[0] for y in means[1]]
    low, high = figures.bootstrap((a, b), judge.difference_of_means, judge.DRAWS, 0.95)
    for bound, share in ((low, 0.025), (high, 0.975)):
        least, most = np.quantile(all_draws, [share - 0.006, share + 0.006])
        assert least <= bound <= most


@pytest.fixture
def run_judge(tmp_path, monkeypatch, capsys):
    """A function that runs judge.py and returns (exit code, what it printed, its errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, arguments)])
        try:
            judge.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


ENDS = {"kaleidoscope": [110, 120, 130, 140, 150], "full": [10, 20, 30, 40, 50], "none": [100, 105, 125, 90, 85]}


@pytest.fixture
def study(make_run):
    """Runs of two tasks, which on the second are all alike; their last five evaluations are the end - 2 to + 2."""
    runs = []
    for task, scale in (("Ant-v2-4x2", 1), ("HalfCheetah-v2-2x3", 0)):
        for sharing, ends in ENDS.items():
            for seed, end in enumerate(ends, start=11):
                end *= scale
                runs.append(make_run(task, sharing, seed, [0, end - 2, end + 2, end - 1, end + 1, end]))
    return runs


def test_a_study_is_judged_by_its_rules(study, run_judge, tmp_path):
    flags = ["--main", "masks vs one network", "masks vs separate networks", "--reach", 102]
    flags += ["--out", tmp_path / "o" / "q"]
    code, out, err = run_judge("--runs", *study, *flags)
    assert code == 0 and not err, err
    runs = rows_of(tmp_path / "o" / "q_runs.csv")
    assert len(runs) == 30
    for task, scale in (("Ant-v2-4x2", 1), ("HalfCheetah-v2-2x3", 0)):
        for arm, ends in zip(("masks", "one network", "separate networks"), ENDS.values(), strict=True):
            rows = [row for row in runs if (row["task"], row["arm"]) == (task, arm)]
            assert [row["seed"] for row in rows] == ["11", "12", "13", "14", "15"]
            assert [float(row["end"]) for row in rows] == [scale * end for end in ends]
            assert [float(row["curve"]) for row in rows] == pytest.approx([scale * end * 5 / 6 for end in ends])
    # 85 and 90 never get there, 100 does with its + 2, and the others do with their - 2
    assert [row["steps_to_reach"] for row in runs[10:15]] == ["300", "200", "200", "never", "never"]
    assert {row["steps_to_reach"] for row in runs[5:10]} == {"never"}

    pairs = {(row["task"][:3], row["arm_a"], row["arm_b"]): row for row in rows_of(tmp_path / "o" / "q_pairs.csv")}
    assert len(pairs) == 6
    first = pairs["Ant", "masks", "one network"]
    assert (first["end_a"], first["end_b"], first["difference"]) == ("130", "30", "100")
    # each mean has a standard error of 10 * sqrt(2 / 5), and the difference one of 8.9
    assert float(first["low"]) == pytest.approx(100 - 1.96 * 8.9, abs=2.5)
    assert float(first["high"]) == pytest.approx(100 + 1.96 * 8.9, abs=2.5)
    assert float(first["p"]) == pytest.approx(2 / 252, rel=1e-5)
    second = pairs["Ant", "masks", "separate networks"]
    p = plain_p(ENDS["kaleidoscope"], ENDS["none"])
    assert float(second["p"]) == pytest.approx(p) == pytest.approx(8 / 252)
    # Holm's four: 2 / 252 times 4, 8 / 252 times 3, and 1 twice
    assert [float(row["p_holm"]) for row in (first, second)] == pytest.approx([8 / 252, 24 / 252], rel=1e-5)
    assert (first["verdict"], second["verdict"]) == ("differ", "no difference")
    assert (first["main"], second["main"]) == ("yes", "yes")
    third = pairs["Ant", "one network", "separate networks"]
    assert (third["main"], third["p_holm"], third["verdict"]) == ("no", "", "differ")
    never = [math.inf] * 5
    assert float(third["p_steps"]) == pytest.approx(plain_p(never, [300, 200, 200, math.inf, math.inf]))
    alike = pairs["Hal", "masks", "one network"]
    assert (alike["p"], alike["p_holm"], alike["verdict"], alike["low"]) == ("1", "1", "no difference", "0")
    assert "0.008  0.032     differ" in out

    _, out, _ = run_judge("--runs", *study, *flags, "--markdown")
    assert "| Ant-v2-4x2 | masks | 11, 12, 13, 14, 15 | 130 (110; 120; 130; 140; 150) | 108 (92; 100; 108;" in out
    assert "| Ant-v2-4x2 | masks vs one network | 100 |" in out and "\n| --- | --- |" in out


def test_two_arms_differ_only_if_their_means_are_apart_by_a_tenth(make_run, run_judge, tmp_path):
    for other, verdict in ((90.0, "differ"), (91.0, "no difference")):
        runs = []
        for sharing, end in (("full", 100.0), ("none", other)):
            runs += [make_run(f"Task{other}", sharing, s, [end + (s - 3) / 8] * 5) for s in range(1, 6)]
        assert run_judge("--runs", *runs, "--out", tmp_path / "q")[0] == 0
        (row,) = rows_of(tmp_path / "q_pairs.csv")
        assert float(row["p"]) < 0.05 and row["verdict"] == verdict


def test_factors_are_compared_with_factors_that_share_no_arm(make_run, run_judge, tmp_path):
    arms = {"kaleidoscope": 10, "none": 20, "kaleidoscope_twin": 5, "none_twin": 15}
    for arm, end in arms.items():
        for seed in (11, 12, 13):
            known = dict(env_id="Ant-v2-4x2", seed=seed, exp_name=f"matd3_{arm}", sharing=arm.removesuffix("_twin"))
            curve = {step: end + seed / 10 for step in range(100, 600, 100)}
            folder = tmp_path / "runs" / f"Ant-v2-4x2__matd3_{arm}__{seed}__17"
            write_run(folder, {TAG: curve}, known)
    pools = [
        "masked=masks + masks, twin critics",
        "separate=separate networks + separate networks, twin critics",
        "ensemble=masks + separate networks",
        "twin=masks, twin critics + separate networks, twin critics",
    ]
    code, _, err = run_judge("--runs", *tmp_path.glob("runs/*"), "--pool", *pools, "--out", tmp_path / "q")
    assert code == 0, err
    pairs = {(row["arm_a"], row["arm_b"]): row for row in rows_of(tmp_path / "q_pairs.csv")}
    assert [pair for pair in pairs if pair[0] in ("masked", "separate", "ensemble", "twin")] == [
        ("masked", "separate"),
        ("ensemble", "twin"),
    ]
    row = pairs["masked", "separate"]
    assert (row["runs_a"], row["runs_b"], row["verdict"]) == ("6", "6", "differ")
    assert (float(row["end_a"]), float(row["end_b"])) == pytest.approx((8.7, 18.7))
    assert float(row["p"]) == pytest.approx(2 / math.comb(12, 6), rel=1e-5)  # the study's 0.002
    assert len(pairs) == 6 + 2 and pairs["masks", "separate networks"]["p"] == "0.1"
    runs = rows_of(tmp_path / "q_runs.csv")
    assert len(runs) == 12


def test_few_runs_are_examples(make_run, run_judge, tmp_path):
    long = {100 * (i + 1): 9.0 for i in range(6)}
    runs = [make_run("Ant-v2-4x2", "full", 1, long), make_run("Ant-v2-4x2", "none", 1, [9] * 5, total_timesteps=900)]
    code, _, err = run_judge("--runs", *runs, make_run("Ant-v2-4x2", "none", 2, [5] * 5), "--out", tmp_path / "q")
    assert code == 0 and f"{runs[1]}: its last evaluation is at 500 of 900 steps" in err
    assert "Ant-v2-4x2: the ends of these runs are means over different steps: 100 to 500, 200 to 600\n" in err
    (row,) = rows_of(tmp_path / "q_pairs.csv")
    assert (row["end_a"], row["end_b"], row["difference"], row["low"], row["p"]) == ("9", "7", "2", "", "")
    assert row["verdict"] == "examples, no test"


def test_mistakes_in_judging_end_with_a_clear_message(study, make_run, run_judge, tmp_path):
    short = make_run("Ant-v2-4x2", "full", 1, [1, 2, 3, 4])
    broken = make_run("Ant-v2-4x2", "full", 2, [1, 2, 3, 4, math.nan])
    ant = ["--runs", *study[:15]]
    for arguments, said in {
        (): "--runs is empty",
        ("--runs", short): f"{short} has 4 evaluations, expected at least 5",
        ("--runs", broken): f"{broken} has an evaluation that is no finite number",
        (*ant, "--main", "masks"): "'masks' is one of them, expected ARM vs ARM",
        (*ant, "--main", "masks vs masks"): "'masks vs masks' is one of them",
        (*ant, "--main", "masks vs x"): "'x' is one arm, expected arms of Ant-v2-4x2: masks; one network; sep",
        (*ant, "--main", "masks vs one network", "one network vs masks"): "'one network vs masks' is there twice",
        ("--runs", *study[:6], "--main", "masks vs one network"): "has an arm of fewer than 3 runs",
        (*ant, "--pool", "masks + one network"): "expected NAME=ARM + ARM",
        (*ant, "--pool", "a=masks + x"): "'x' is one arm",
        (*ant, "--pool", "a=masks + masks"): "each arm once",
        (*ant, "--pool", "masks=masks + one network"): "'masks' is there twice",
        (*ant, "--out", short / "nowhere" / "q", "--reach", "x"): "--reach is 'x', expected a number or None",
    }.items():
        code, out, err = run_judge(*arguments)
        assert code == 2 and said in err and not out and one_line(err.splitlines()[-1]), err
