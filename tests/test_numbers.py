"""Numbers in README.md and docs/results.md, and the CSV files of their figures, are those of the published runs."""

import functools
import glob
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from run_scripts import expand

from tools import figures, judge
from tools.grid import read_events

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "published" / "runs"
README, RESULTS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "results.md").read_text()
COLUMNS = ("masks", "one network", "separate networks")
FIGURES = re.findall(r"^python tools/(figures\.py .*) --out docs/figures/(\w+)$", RESULTS, re.M)
JUDGED = re.findall(r"^python tools/(judge\.py .*)$", RESULTS, re.M)

# {row of a table: (steps, folders of masks, of one network, of separate networks)}
SIX = [f"six_{sharing}__*" for sharing in ("kaleidoscope", "full", "none")]
ANT = ["{ant_kaleidoscope_*,k1__*,six_kaleidoscope__*}", "ant_full_*", "six_none__*"]
STUDY = [f"mappo_{sharing}__1[1-5]__*" for sharing in ("kaleidoscope", "full", "none")]
ROWS = {
    "HalfCheetah-v2-2x3, MATD3, 100,000 steps": (100_000, "kalei_matd3_mamujoco__*", "matd3_full__*", "matd3_none__*"),
    "Ant-v2-4x2, MAPPO, 3,000,000, the study": (3_000_000, *STUDY),
    "HalfCheetah-v2-2x3, MAPPO, 2,000,000, the study": (2_000_000, *STUDY),
    "Ant-v2-4x2, MAPPO, 2,000,000": (2_000_000, *ANT),
    "HalfCheetah-v2-2x3, MAPPO, 1,000,000": (
        1_000_000,
        "mappo_kaleidoscope__[1-5]__*",
        "mappo_full__[1-5]__*",
        "six_none__*",
    ),
    "HalfCheetah-v2-2x3, MAPPO, 2,000,000": (2_000_000, *SIX),
    "Hopper-v2-3x1, MAPPO, 2,000,000": (2_000_000, *SIX),
    "Walker2d-v2-2x3, MAPPO, 2,000,000": (2_000_000, *SIX),
    "Walker2d-v2-6x1, MAPPO, 2,000,000": (2_000_000, *SIX),
    "Humanoid-v2-17x1, MAPPO, 10,000,000": (10_000_000, "humanoid_kaleidoscope__*", "", "humanoid_none__*"),
}
# the table over five tasks has the first three runs of Ant
FIVE_TASKS = {row: what for row, what in ROWS.items() if row.endswith(" 2,000,000")}
FIVE_TASKS["Ant-v2-4x2, MAPPO, 2,000,000"] = (2_000_000, "ant_kaleidoscope_*", "ant_full_*", "six_none__*")


@functools.cache
def returns_of(folder):
    return read_events(folder)[1]["charts/eval_return"]


def ends(row, pattern, steps):
    """Returns at `steps` of the runs on the row's task whose folders fit the pattern; {a,b} stands for a or b."""
    patterns = expand(f"{row.partition(',')[0]}__{pattern}")
    return [returns_of(folder)[steps] for each in patterns for folder in RUNS.glob(each)]


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
    # only docs/results.md has the row that is left out
    rows = {row: what for row, what in ROWS.items() if row != "HalfCheetah-v2-2x3, MAPPO, 1,000,000"}
    expected = [[row, *(summary(ends(row, arm, steps)) for arm in arms)] for row, (steps, *arms) in rows.items()]
    assert [cells[:4] for cells in table] == expected


def test_the_returns_beside_the_two_short_commands_are_the_published_runs():
    """MAPPO's runs are longer: their evaluations at the same step count."""
    masks = expand("{mappo_kaleidoscope__[1-5]__*,six_kaleidoscope__*}")
    mappo = [value for each in masks for value in ends("HalfCheetah-v2-2x3", each, 300_000)]
    matd3 = ends("HalfCheetah-v2-2x3", "kalei_matd3_mamujoco__*", 100_000)
    ranges = [f"{min(values):.0f} to {max(values):.0f}" for values in (mappo, matd3)]
    assert len(mappo) == len(matd3) == 8 and all(each in README for each in ranges)
    assert ranges[0] in (ROOT / "docs" / "index.md").read_text()


def test_the_table_over_five_tasks_is_the_published_runs():
    for cells, (row, (steps, *arms)) in zip(rows_of(RESULTS, "task", *COLUMNS), FIVE_TASKS.items(), strict=True):
        expected = [summary(ends(row, arm, steps)).replace(", 3)", ")") for arm in arms]
        assert cells == [row.partition(",")[0], *expected]


def test_tables_of_seeds_are_the_published_runs():
    found = {"HalfCheetah-v2-2x3, MATD3, 100,000 steps": [row[1:] for row in rows_of(RESULTS, "seed", *COLUMNS)]}
    task = None
    for row, _, *cells in rows_of(RESULTS, "task, steps", "seed", *COLUMNS):
        task = row.replace(",", ", MAPPO,", 1) or task  # an empty cell means the task above
        found.setdefault(task, []).append(cells)
    assert len(found) == 3
    for row, lines in found.items():
        steps, *arms = ROWS[row]
        for column, arm in zip(zip(*lines, strict=True), arms, strict=True):
            *seeds, mean = filter(None, column)
            values = ends(row, arm, steps)
            assert sorted(seeds) == sorted(f"{value:.0f}" for value in values) and mean == f"{np.mean(values):.0f}"


@pytest.mark.parametrize("arguments", JUDGED)
def test_a_table_of_the_study_is_what_its_command_prints(arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", expanded(arguments))
    judge.main()
    table = capsys.readouterr().out.partition("\n\n")[0]
    assert table.count("\n") > 2 and f"\n\n{table}\n\n" in RESULTS


def test_the_counts_of_finished_runs_are_those_of_the_published_runs():
    rows = rows_of(RESULTS, "question", "what it asks", "runs finished")
    counts = {question: finished.partition(" of ")[0] for question, _, finished in rows}
    arms = {"1": "mappo_{kaleidoscope,full,none}", "2": "mappo_full_log_std"}
    for question, names in arms.items():
        patterns = expand(f"{{Ant-v2-4x2,HalfCheetah-v2-2x3}}__{names}__1[1-5]__*")
        assert counts[question] == str(sum(len(list(RUNS.glob(each))) for each in patterns))


@pytest.mark.long
@pytest.mark.parametrize(("arguments", "name"), FIGURES, ids=[name for _, name in FIGURES])
def test_a_figures_command_makes_its_csv_files(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*expanded(arguments), "--out", str(tmp_path / name)])
    figures.main()
    made = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert made == {path.name: path.read_text() for path in ROOT.glob(f"docs/figures/{name}*.csv")} and made
