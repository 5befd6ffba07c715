"""Numbers in README.md and the docs, and the CSV files of their figures, are those of the published runs."""

import csv
import functools
import glob
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from run_scripts import expand

import kalei_mappo_mamujoco as mappo
from tools import figures, judge
from tools.grid import read_events

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "published" / "runs"
README, RESULTS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
COLUMNS = ("masks", "one network", "separate networks")
FIGURES = re.findall(r"^python tools/(figures\.py .*) --out docs/figures/(\w+)$", RESULTS, re.M)
JUDGED = re.findall(r"^python tools/(judge\.py .*)$", RESULTS, re.M)

# {row of a table: (steps, folders of masks, of one network, of separate networks)}
ENSEMBLE = ["matd3_kaleidoscope__1[1-3]__*", "", "matd3_none__1[1-3]__*"]
TWIN = ["matd3_kaleidoscope_twin__1[1-3]__*", "", "matd3_none_twin__1[1-3]__*"]
STUDY = [f"mappo_{sharing}__1[1-5]__*" for sharing in ("kaleidoscope", "full", "none")]
ROWS = {
    "Ant-v2-4x2, MAPPO, 3,000,000, the study": (3_000_000, *STUDY),
    "HalfCheetah-v2-2x3, MAPPO, 2,000,000, the study": (2_000_000, *STUDY),
    "HalfCheetah-v2-2x3, MATD3, 500,000, the study": (500_000, *ENSEMBLE),
    "HalfCheetah-v2-2x3, MATD3 with twin critics, 500,000, the study": (500_000, *TWIN),
    "Hopper-v2-3x1, MAPPO, 2,000,000, the study": (2_000_000, *STUDY),
    "Walker2d-v2-6x1, MAPPO, 2,000,000, the study": (2_000_000, *STUDY),
    "Humanoid-v2-17x1, MAPPO, 10,000,000": (10_000_000, "humanoid_kaleidoscope__*", "", "humanoid_none__*"),
}


@functools.cache
def returns_of(folder):
    return read_events(folder)[1]["charts/eval_return"]


def ends(row, pattern, steps):
    """Means of the last five evaluations of the runs on the row's task whose folders fit the pattern."""
    curves = [returns_of(folder) for folder in RUNS.glob(f"{row.partition(',')[0]}__{pattern}")]
    assert all(max(curve) == steps for curve in curves)
    return [np.mean([curve[step] for step in sorted(curve)[-5:]]) for curve in curves]


def expanded(arguments):
    """The words of a command, its patterns replaced by the folders that they find."""
    words = []
    for word in shlex.split(arguments):
        globs = "*" in word and "=" not in word  # the tools themselves expand NAME=GLOB
        words += [path for each in expand(word) for path in sorted(glob.glob(each))] if globs else [word]
    return words


def rows_of(text, *columns):
    """The rows, lists of cells, of the table that has these columns."""
    start = text.index(f"| {' | '.join(columns)} |\n")
    lines = text[start:].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def summary(values):
    """As the tables write it: mean (lowest to highest, number of runs)."""
    if len(values) < 2:
        return "".join(f"{value:.0f} (1)" for value in values)
    return f"{np.mean(values):.0f} ({min(values):.0f} to {max(values):.0f}, {len(values)})"


def test_the_readmes_results_are_the_published_runs():
    table = rows_of(README, "task and algorithm", *COLUMNS, "other code")
    expected = [[row, *(summary(ends(row, arm, steps)) for arm in arms)] for row, (steps, *arms) in ROWS.items()]
    assert [cells[:4] for cells in table] == expected


def curve_of_other_code(name):
    with open(ROOT / "tests" / "reference" / name) as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    return {int(row["step"]): float(row["eval_return"]) for row in rows}


def test_the_released_codes_numbers_are_those_of_its_run():
    released = curve_of_other_code("halfcheetah_2x3_released_code.csv")
    assert max(released) == 300_000
    end = np.mean([released[step] for step in sorted(released)[-5:]])
    assert f"the authors' code, masks, 300,000 steps: {end:.0f} (1)" in README
    ours = [returns_of(folder) for folder in RUNS.glob("HalfCheetah-v2-2x3__matd3_kaleidoscope__1[1-3]__*")]
    for steps in (100_000, 300_000):
        *others, last = (f"{value:,.0f}" for value in sorted(curve[steps] for curve in ours))
        sentence = f"After {steps:,} steps, it has {released[steps]:,.0f}, and ours have {', '.join(others)} and {last}"
        assert sentence in " ".join(RESULTS.split())


def test_harls_numbers_are_those_of_its_run():
    harl = curve_of_other_code("ant_4x2_harl_mappo.csv")
    end = np.mean([harl[step] for step in sorted(harl)[-5:]])
    assert f"HARL, one network: {end:.0f} (1)" in README and f"its end, {end:,.0f}," in RESULTS
    ours = [returns_of(folder) for folder in RUNS.glob("Ant-v2-4x2__mappo_full__1[1-5]__*")]
    inside = sum(min(c[step] for c in ours) <= harl[step] <= max(c[step] for c in ours) for step in harl)
    assert f"at {inside} of {len(harl)} evaluations" in " ".join(RESULTS.split())


def test_the_returns_beside_the_two_short_commands_are_the_published_runs():
    """The runs are the study's, at these steps of their curves, and MATD3's in bfloat16."""
    of_mappo, of_matd3, of_bfloat16 = (
        [returns_of(folder)[steps] for folder in RUNS.glob(f"HalfCheetah-v2-2x3__{arm}_kaleidoscope__*")]
        for arm, steps in (("mappo", 300_000), ("matd3", 100_000), ("bfloat16", 100_000))
    )
    of_scripts = [of_mappo, of_matd3 + of_bfloat16]
    ranges = [f"{min(values):.0f} to {max(values):.0f}" for values in of_scripts]
    assert [len(values) for values in of_scripts] == [5, 11] and all(each in README for each in ranges)
    assert ranges[1] in " ".join(RESULTS.split()) and ranges[0] in (ROOT / "docs" / "index.md").read_text()


def test_the_table_of_learning_rates_is_the_published_runs():
    rows = rows_of(RESULTS, "thresholds' learning rate and epsilon", "seeds", "masks differ in", "deterministic")
    arms = ("hc_likeweights_*", "hc_lr01_*", "mappo_kaleidoscope__1[1-5]__*", "mappo_full__1[1-5]__*")
    for (_, _, differ, deterministic), arm in zip(rows, arms, strict=True):
        scalars = [read_events(folder)[1] for folder in RUNS.glob(f"HalfCheetah-v2-2x3__{arm}")]
        returns = [each["charts/eval_return"][1_000_000] for each in scalars]
        assert len(returns) == (3 if "hc_" in arm else 5)
        assert deterministic == f"{np.mean(returns):.0f} ({min(returns):.0f} to {max(returns):.0f})"
        if differ:
            shares = [each["masks/actor_difference"][1_000_000] for each in scalars]
            assert differ.startswith(f"{min(shares):.3f} to {max(shares):.3f}")


def test_the_table_of_precisions_is_the_published_runs():
    arms = [
        ("HalfCheetah-v2-2x3__matd3_kaleidoscope__1[1-3]__*", 100_000),
        ("HalfCheetah-v2-2x3__bfloat16_kaleidoscope__*", 100_000),
        ("HalfCheetah-v2-2x3__mappo_kaleidoscope__1[1-5]__*", 1_000_000),
        ("HalfCheetah-v2-2x3__bfloat16_mappo__*", 1_000_000),
        ("Ant-v2-4x2__mappo_kaleidoscope__1[1-5]__*", 2_000_000),
        ("Ant-v2-4x2__bfloat16_mappo__*", 2_000_000),
    ]
    rows = rows_of(PERFORMANCE, "script, task, steps", "precision", "runs", "end: mean", "lowest to highest")
    ends_of = {}
    for (_, precision, runs, mean, extremes), (pattern, steps) in zip(rows, arms, strict=True):
        assert (precision == "bfloat16") == ("bfloat16" in pattern)
        values = ends_of[pattern] = [returns_of(folder)[steps] for folder in RUNS.glob(pattern)]
        found = str(len(values)), f"{np.mean(values):.0f}", f"{min(values):.0f} to {max(values):.0f}"
        assert (runs, mean, extremes) == found
    *_, float32, bfloat16 = ends_of.values()
    assert f"Mann-Whitney test: p = {judge.mann_whitney(float32, bfloat16):.2f})" in PERFORMANCE


def test_the_table_of_models_is_the_published_runs():
    rows = rows_of(RESULTS, "task", "script", "steps", "return", "folder in `published/runs`")
    folders = [folder.strip("`") for *_, folder in rows]
    assert sorted(folders) == sorted(model.parent.name for model in RUNS.glob("*/model.pt"))
    for (task, script, steps, value, _), folder in zip(rows, folders, strict=True):
        curve = returns_of(RUNS / folder)
        assert folder.startswith(f"{task}__") and steps == f"{max(curve):,}" and value == f"{curve[max(curve)]:.0f}"
        hyperparameters = read_events(RUNS / folder)[0]
        assert ("policy_freq" in hyperparameters) == (script == "MATD3")


def test_the_table_of_one_mask_for_all_is_its_output():
    text = (ROOT / "benchmark" / "results" / "one_mask.txt").read_text()
    of_models = re.split(r"^.*published/runs/(.*)/model\.pt$", text, flags=re.M)[1:]
    found = set()
    for folder, output in zip(of_models[::2], of_models[1::2], strict=True):
        own, *others = [float(mean) for mean in re.findall(r"(\S+) \+- ", output)]
        found.add((folder.partition("__")[0], *(f"{mean:.0f}" for mean in (own, max(others), min(others)))))
    columns = "each its own mask", "one for all: best", "one for all: worst"
    assert {(task.partition(",")[0], *means) for task, *means in rows_of(RESULTS, "task", *columns)} == found


def test_the_table_of_parameters_is_that_of_the_actor():
    method = (ROOT / "docs" / "kaleidoscope.md").read_text()
    high = np.ones((4, 2), np.float32)
    for value, _, parameters in rows_of(method, "value", "what it means", "actor's parameters (MAPPO, Ant-v2-4x2)"):
        args = mappo.Args(sharing=value.strip("`"), hidden_size=128, precision="float32")
        sizes = {name: each.numel() for name, each in mappo.Actor(115, -high, high, args).named_parameters()}
        thresholds = sum(size for name, size in sizes.items() if name.endswith("thresholds"))
        of_which = f", of which {thresholds:,} are thresholds" if thresholds else ""
        assert parameters == f"{sum(sizes.values()):,}{of_which}"


def test_the_table_of_humanoids_returns_is_the_published_runs():
    curves = []
    for arm in ("kaleidoscope", "none"):
        (folder,) = RUNS.glob(f"Humanoid-v2-17x1__humanoid_{arm}__*")
        scalars = read_events(folder)[1]
        curves += [scalars["charts/eval_return"], scalars["charts/eval_length"]]
    for steps, *cells in rows_of(RESULTS, "steps", "masks", "length", "separate networks", "length"):
        assert cells == [f"{curve[int(steps.replace(',', ''))]:.0f}" for curve in curves]
    masks, _, none, _ = (np.mean([curve[step] for step in sorted(curve)[-5:]]) for curve in curves)
    assert f"are {masks:.0f} with masks and {none:.0f} with separate networks" in " ".join(RESULTS.split())


def test_the_resets_on_ant_did_not_cost_returns():
    """The page says this of all five runs of masks."""
    folders = list(RUNS.glob("Ant-v2-4x2__mappo_kaleidoscope__1[1-5]__*"))
    assert len(folders) == 5
    for folder in folders:
        scalars = read_events(folder)[1]
        assert list(scalars["resets/actor_weights"]) == [1_000_000]
        returns = scalars["charts/episodic_return"].items()
        before, after = (
            np.mean([value for step, value in returns if end - 100_000 < step <= end]) for end in (1_000_000, 1_100_000)
        )
        assert after > before


@pytest.mark.parametrize("arguments", JUDGED)
def test_the_tables_of_the_study_are_what_their_command_prints(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", expanded(arguments))
    judge.main()
    runs, pairs = capsys.readouterr().out.strip().split("\n\n")
    assert min(runs.count("\n"), pairs.count("\n")) > 2 and f"\n\n{runs}\n\n{pairs}\n\n" in RESULTS


def test_the_counts_of_finished_runs_are_those_of_the_published_runs():
    rows = rows_of(RESULTS, "question", "what it asks", "runs finished", "answer")
    counts = {question: finished.partition(" of ")[0] for question, _, finished, _ in rows}
    runs = {
        "1": "{Ant-v2-4x2,HalfCheetah-v2-2x3}__mappo_{kaleidoscope,full,none}__1[1-5]__*",
        "2": "{Ant-v2-4x2,HalfCheetah-v2-2x3}__mappo_full_log_std__1[1-5]__*",
        "4": "HalfCheetah-v2-2x3__matd3_{kaleidoscope,none}{,_twin}__1[1-3]__*",
        "7": "{Walker2d-v2-6x1,Hopper-v2-3x1}__mappo_{kaleidoscope,full,none}__1[1-5]__*",
    }
    for question, patterns in runs.items():
        assert counts[question] == str(sum(len(list(RUNS.glob(each))) for each in expand(patterns)))


@pytest.mark.long
@pytest.mark.parametrize(("arguments", "name"), FIGURES, ids=[name for _, name in FIGURES])
def test_a_figures_command_makes_its_csv_files(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*expanded(arguments), "--out", str(tmp_path / name)])
    figures.main()
    made = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert made == {path.name: path.read_text() for path in ROOT.glob(f"docs/figures/{name}*.csv")} and made
