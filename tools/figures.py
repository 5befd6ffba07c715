"""Figures from TensorBoard folders: learning curves, one panel a task, and the inter-quartile mean over tasks.

    python tools/figures.py --runs runs/Ant-v2-4x2__* runs/HalfCheetah-v2-2x3__* --out figures/sharing
    python tools/figures.py --runs runs/*__hc_* --variant sharing log_std --each-seed --out figures/halfcheetah
    python tools/figures.py --runs runs/*__ant_* --tag charts/episodic_return --every 50000 --out figures/with_noise

Runs that differ in nothing but the seed are a variant; --variant names the hyperparameters that tell variants apart.
Variants and tasks come in the order in which --runs first holds them.

OUT.png and OUT.csv: mean over a variant's seeds at the steps that all of them have, with a percentile bootstrap
interval of that mean (whole runs are resampled). One seed has no interval: no band, and empty fields in the CSV file.
Printed, and the base of what follows, are final scores: each run's metric at the last step that all runs of its task
have reached.

OUT_iqm.png and OUT_iqm.csv, where there are several tasks: inter-quartile mean of the normalised final scores of all
tasks and seeds, with a stratified percentile bootstrap interval (seeds are resampled within each task), as in Agarwal
et al. 2021, arXiv:2108.13264. Scores are normalised task by task: by default, 0 is the lowest and 1 the highest value
of the metric in any run given, as in Gorsane et al. 2022, arXiv:2209.10485, so that they depend on which runs are
given. With --normalise VARIANT, they are divided by that variant's mean score, which must be positive. Either way, the
normalisation is not resampled.

The resamples are drawn from a fixed seed: the same runs give the same figures. Such intervals are too narrow where
seeds are few: those of three reach from the lowest to the highest, and hold the true mean less often than they say.
"""

import csv
import dataclasses
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.command_line import fail, require  # noqa: E402
from tools.grid import RUN_NAME, read_events  # noqa: E402

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # told apart by the colour-blind, too
LINES = ["-", "--", ":", "-."]  # where the colours do not suffice
BOOTSTRAP_SEED = 0


@dataclasses.dataclass
class Options:
    runs: tuple[Path, ...] = ()
    """folders of runs"""
    out: Path | None = None
    """name of the PNG and CSV files, without their endings"""
    tag: str = "charts/eval_return"
    """the metric to show"""
    variant: tuple[str, ...] = ("sharing",)
    """hyperparameters whose values tell variants apart; exp_name is the folder's, without a _SEED at its end"""
    every: int = 0
    """average the metric over windows of so many steps, for one that each run logs at steps of its own; 0: as logged"""
    last: int = 0
    """final scores are means of the metric, as logged, over so many steps; 0 takes the last value of the curve"""
    normalise: str = "min-max"
    """how scores are normalised for the IQM: min-max, or the name of the variant that they are divided by"""
    each_seed: bool = False
    """draw and write every run as well: thin lines, and OUT_seeds.csv"""
    reference: tuple[str, ...] = ()
    """CSV files of curves to compare with, as FILE or TASK=FILE; columns step and eval_return, # starts a comment"""
    reference_name: str = "released code, seed 0"
    """what they are called in the figure"""
    confidence: float = 0.95
    """share of resamples within the intervals"""
    resamples: int = 2_000
    """resamples of the bootstrap"""


class Run(NamedTuple):
    """One run. Both `logged` and `curve`, which is averaged with --every, are {step: value} of the metric."""

    folder: Path
    task: str
    variant: str
    seed: str
    logged: dict[int, float]
    curve: dict[int, float]


# ---- Reading ----
def name_of(name, value):
    """How a hyperparameter's value is called in a variant's name."""
    says_it_all = re.fullmatch(r"[A-Za-z]\S*", value) and value not in ("True", "False", "None")
    return value if says_it_all else f"{name} {value}"


def average_windows(curve, width, last_step):
    """{end of the window: mean of the values in it}, of those windows that the run has passed."""
    windows = {}
    for step, value in curve.items():
        windows.setdefault(-(-step // width) * width, []).append(value)
    return {end: float(np.mean(values)) for end, values in windows.items() if end <= last_step}


def read_run(folder, options):
    """(folder's hyperparameters, Run without its variant's name)."""
    if not folder.is_dir():
        fail(f"--runs: {folder} is not a folder, expected that of a run")
    hyperparameters, scalars = read_events(folder)
    if options.tag not in scalars:
        there = ", ".join(sorted(scalars)) or "no metrics at all"
        fail(f"--tag is {options.tag}, expected one that {folder} holds: {there}")
    # a folder may have been renamed since, and an older run have logged less
    name = RUN_NAME.fullmatch(folder.resolve().name)
    hyperparameters = (name.groupdict() if name else {}) | hyperparameters
    missing = [key for key in ("env_id", "seed", "exp_name") if key not in hyperparameters]
    if missing:
        fail(f"--runs: {folder} does not say its {', '.join(missing)}, expected ENV__NAME__SEED__TIME as its name")
    seed = hyperparameters["seed"]
    exp_name = name["exp_name"] if name else hyperparameters["exp_name"]
    hyperparameters["exp_name"] = exp_name.removesuffix(f"_{seed}")
    curve = logged = scalars[options.tag]
    if options.every:
        curve = average_windows(curve, options.every, max(max(series) for series in scalars.values()))
        if not curve:
            fail(f"--every is {options.every}, expected at most the steps that {folder} has made")
    return hyperparameters, Run(folder, hyperparameters["env_id"], "", seed, logged, curve)


def read_runs(options):
    """All runs, each with its variant's name."""
    if not options.runs:
        fail("--runs is empty, expected folders of runs")
    known, pairs = set(), []
    for folder in options.runs:
        if folder.resolve() in known:
            fail(f"--runs: {folder} is there twice, expected once")
        known.add(folder.resolve())
        pairs.append(read_run(folder, options))
    for name in options.variant:
        if not any(name in hyperparameters for hyperparameters, _ in pairs):
            there = ", ".join(dict.fromkeys(key for hyperparameters, _ in pairs for key in hyperparameters))
            fail(f"--variant is {name}, expected a hyperparameter of one run at least: {there}")
    runs = {}
    for hyperparameters, run in pairs:
        values = [(name, hyperparameters.get(name, "unknown")) for name in options.variant]
        run = run._replace(variant=", ".join(name_of(*pair) for pair in values))
        twin = runs.setdefault((run.task, run.variant, int(run.seed)), run)
        if twin is not run:
            what = f"{run.task}, {run.variant}, seed {run.seed}"
            fail(f"--runs: {twin.folder} and {run.folder} are both {what}, expected one; or more names in --variant")
    return list(runs.values())


def read_references(options, tasks):
    """{task: {step: value}}"""
    references = {}
    for entry in options.reference:
        task, equals, path = entry.rpartition("=")
        task = task if equals else tasks[0]
        if task not in tasks or not equals and len(tasks) > 1:
            fail(f"--reference is {entry}, expected TASK=FILE with one of the tasks {', '.join(tasks)}")
        try:
            lines = [line for line in Path(path).read_text().splitlines() if not line.startswith("#")]
            references[task] = {int(row["step"]): float(row["eval_return"]) for row in csv.DictReader(lines)}
        except OSError as error:
            fail(f"--reference: {path}: {error.strerror}, expected a CSV file")
        except (KeyError, ValueError, TypeError) as error:
            fail(f"--reference: {path}: expected numbers in columns step and eval_return ({error!r})")
    return references


# ---- Statistics ----
def bootstrap(samples, statistic, options):
    """(low, high) of statistic(*samples, axis=-1), each sample resampled on its own; NaN if one has a single value."""
    if min(sample.shape[-1] for sample in samples) < 2:
        return (np.full(samples[0].shape[:-1], np.nan),) * 2
    result = stats.bootstrap(
        samples,
        statistic,
        n_resamples=options.resamples,
        confidence_level=options.confidence,
        method="percentile",
        axis=-1,
        vectorized=True,
        batch=100,
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    )
    return result.confidence_interval


def iqm(*samples, axis=-1):
    """Mean of the middle half of all samples' values together."""
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def mean_curve(runs, options):
    """Steps (T,) that all the runs have, mean, low and high (T,) at them."""
    steps = sorted(set.intersection(*(set(run.curve) for run in runs)))
    if not steps:
        what = f"the runs of {runs[0].task}, {runs[0].variant} share no step of {options.tag}"
        fail(f"{what}: expected --every STEPS, which averages over windows")
    values = np.array([[run.curve[step] for run in runs] for step in steps])  # (T, seeds)
    return np.array(steps), values.mean(-1), *bootstrap((values,), np.mean, options)


def final_scores(runs, last):
    """(step that all the runs of a task have reached, [each run's mean over the `last` steps up to it])."""
    end = min(max(run.curve) for run in runs)
    scores = []
    for run in runs:
        if last:
            values = [value for step, value in run.logged.items() if end - last < step <= end]
        else:
            values = [run.curve[step] for step in sorted(run.curve) if step <= end][-1:]
        if not values:
            what = f"in the last {last} steps" if last else "at any step"
            fail(f"{run.folder} has no value {what} up to {end}, which another run of {run.task} ends with")
        scores.append(float(np.mean(values)))
    return end, scores


def normalised(runs, scores, options):
    """The scores of one task's runs, normalised."""
    task = runs[0].task
    if options.normalise == "min-max":
        values = [value for run in runs for value in run.curve.values()]
        low, high = min(values), max(values)
        if low == high:
            fail(f"--normalise is min-max, expected the name of a variant: all values of {task} are {low:g}")
        return (np.array(scores) - low) / (high - low)
    own = [score for run, score in zip(runs, scores, strict=True) if run.variant == options.normalise]
    if not own:
        variants = ", ".join(dict.fromkeys(run.variant for run in runs))
        fail(f"--normalise is {options.normalise}, expected min-max or a variant that {task} has: {variants}")
    if np.mean(own) <= 0:
        fail(f"--normalise is {options.normalise}, expected min-max: its mean score on {task} is {np.mean(own):.1f}")
    return np.array(scores) / np.mean(own)


# ---- Writing ----
def number(x):
    return "" if np.isnan(x) else f"{x:.7g}"


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def axis_label(tag):
    return tag.rpartition("/")[2].replace("eval_", "evaluation ").replace("_", " ")


def in_millions(steps):
    return np.asarray(steps) / 1e6


def draw_curves(path, runs, curves, references, styles, options):
    """One panel a task."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    columns = 2 if len(tasks) == 4 else min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    size = (5.2, 3.6) if len(tasks) == 1 else (3.3 * columns, 2.6 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for index, ax in enumerate(axes.flat):
        if index >= len(tasks):
            ax.remove()
            continue
        task = tasks[index]
        for variant, style in styles.items():
            if (task, variant) not in curves:
                continue
            steps, mean, low, high = curves[task, variant]
            x, dot = in_millions(steps), "o" if len(steps) == 1 else None
            if options.each_seed:
                for run in runs:
                    if (run.task, run.variant) == (task, variant):
                        own = sorted(run.curve)
                        values = [run.curve[step] for step in own]
                        ax.plot(in_millions(own), values, **style, linewidth=0.6, alpha=0.6)
            ax.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
            handles[variant] = ax.plot(x, mean, **style, linewidth=1.6, marker=dot, zorder=3)[0]
        if task in references:
            last_step = max(max(run.curve) for run in runs if run.task == task)
            steps = sorted(step for step in references[task] if step <= last_step)
            values = [references[task][step] for step in steps]
            style = dict(color="black", linestyle=(0, (4, 2)), linewidth=1.2)
            handles[options.reference_name] = ax.plot(in_millions(steps), values, **style)[0]
        ax.set_title(task, fontsize=10)
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3, linewidth=0.5)
        ax.spines[["top", "right"]].set_visible(False)
        if index % columns == 0:
            ax.set_ylabel(axis_label(options.tag))
        if index + columns >= len(tasks):
            ax.set_xlabel("environment steps (millions)")
    names = [name for name in (*styles, options.reference_name) if name in handles]
    title = ", ".join(name.replace("_", " ") for name in options.variant if name != "exp_name") or None
    figure.legend(
        [handles[name] for name in names],
        names,
        title=title,
        loc="outside lower center",
        ncols=min(len(names), 2 + columns),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_iqm(path, rows, styles, options):
    """One dot a variant, with its interval; the first variant at the top."""
    figure, ax = plt.subplots(figsize=(4.6, 0.9 + 0.35 * len(rows)), layout="constrained")
    for y, (variant, value, low, high) in enumerate(rows):
        color = styles[variant]["color"]
        if not np.isnan(low):
            ax.plot([low, high], [y, y], color=color, linewidth=7, alpha=0.3, solid_capstyle="butt")
        ax.plot(value, y, "o", color=color, markersize=5)
    ax.set_yticks(range(len(rows)), [variant for variant, *_ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.1)
    ax.set_xlabel(f"IQM of the normalised {axis_label(options.tag)}")
    ax.grid(axis="x", alpha=0.3, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def check(options):
    require(options.out is not None, "--out is not given, expected a name for the files that are written")
    require(len(options.variant) > 0, "--variant is empty, expected a hyperparameter at least")
    require(0 < options.confidence < 1, f"--confidence is {options.confidence}, expected a number between 0 and 1")
    for name, least in (("resamples", 1), ("every", 0), ("last", 0)):
        value = getattr(options, name)
        require(value >= least, f"--{name} is {value}, expected at least {least}")


def main():
    options = tyro.cli(Options)
    check(options)
    runs = read_runs(options)
    tasks, variants = (list(dict.fromkeys(names)) for names in zip(*((r.task, r.variant) for r in runs), strict=True))
    styles = {
        variant: dict(color=COLORS[i % len(COLORS)], linestyle=LINES[i // len(COLORS) % len(LINES)])
        for i, variant in enumerate(variants)
    }
    references = read_references(options, tasks)
    cells = {(task, variant): [] for task in tasks for variant in variants}
    for run in sorted(runs, key=lambda run: int(run.seed)):
        cells[run.task, run.variant].append(run)
    cells = {cell: members for cell, members in cells.items() if members}
    curves = {cell: mean_curve(members, options) for cell, members in cells.items()}

    normal = {}  # {(task, variant): normalised scores}
    for task in tasks:
        members = [run for (of, _), cell in cells.items() if of == task for run in cell]
        end, scores = final_scores(members, options.last)
        print(f"{task}, {options.tag} at step {end:,}" + f", mean over {options.last:,} steps" * (options.last > 0))
        several = len(tasks) > 1
        scaled = normalised(members, scores, options) if several else scores
        for variant in variants:
            mine = np.array([run.variant == variant for run in members])
            if mine.any():
                values = np.array(scores)[mine]
                low, high = bootstrap((values,), np.mean, options)
                interval = "" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]"
                each = ", ".join(f"{run.seed}: {s:.1f}" for run, s in zip(cells[task, variant], values, strict=True))
                print(f"  {variant}: {values.mean():.1f}{interval}  (seed {each})")
                normal[task, variant] = np.array(scaled)[mine]

    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw_curves(f"{options.out}.png", runs, curves, references, styles, options)
        rows = [
            (task, variant, step, len(cells[task, variant]), number(mean), number(low), number(high))
            for (task, variant), curve in curves.items()
            for step, mean, low, high in zip(*curve, strict=True)
        ]
        write_csv(f"{options.out}.csv", ("task", "variant", "step", "seeds", "mean", "low", "high"), rows)
        if options.each_seed:
            rows = [
                (run.task, run.variant, run.seed, step, number(run.curve[step]))
                for cell in cells.values()
                for run in cell
                for step in sorted(run.curve)
            ]
            write_csv(f"{options.out}_seeds.csv", ("task", "variant", "seed", "step", "value"), rows)
        if len(tasks) > 1:
            write_iqm(normal, tasks, variants, styles, options)
    except OSError as error:
        fail(f"--out: {error.filename}: {error.strerror}, expected a place to write to")


def write_iqm(normal, tasks, variants, styles, options):
    """OUT_iqm.png and OUT_iqm.csv, of the variants that have runs on all tasks."""
    rows = []
    print(f"inter-quartile mean over {len(tasks)} tasks")
    for variant in variants:
        missing = [task for task in tasks if (task, variant) not in normal]
        if missing:
            print(f"  {variant}: left out, since it has no runs on {', '.join(missing)}")
            continue
        samples = [normal[task, variant] for task in tasks]
        low, high = bootstrap(samples, iqm, options)
        rows.append((variant, iqm(*samples), low, high))
        interval = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        print(f"  {variant}: {rows[-1][1]:.3f}{interval}")
        seeds = [len(sample) for sample in samples]
        if len(set(seeds)) > 1:
            print(f"  warning: tasks with more seeds count for more: {variant} has {', '.join(map(str, seeds))}")
    if not rows:
        return
    draw_iqm(f"{options.out}_iqm.png", rows, styles, options)
    counts = {variant: sum(len(normal[task, variant]) for task in tasks) for variant, *_ in rows}
    table = [(variant, len(tasks), counts[variant], *map(number, row)) for variant, *row in rows]
    write_csv(f"{options.out}_iqm.csv", ("variant", "tasks", "runs", "iqm", "low", "high"), table)


if __name__ == "__main__":
    main()
