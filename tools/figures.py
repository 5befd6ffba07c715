"""Figures from TensorBoard folders: learning curves, one panel per task, and the inter-quartile mean over tasks.

    python tools/figures.py --runs runs/Ant-v2-4x2__* runs/HalfCheetah-v2-2x3__* --out figures/sharing
    python tools/figures.py --runs "masks=published/runs/Ant-v2-4x2__mappo_kal*" "my copy=runs/Ant-v2-4x2__my_copy__*" \
        --each-seed --out figures/my_copy
    python tools/figures.py --runs runs/*__hc_* --variant sharing log_std --each-seed --out figures/halfcheetah
    python tools/figures.py --runs runs/*__ant_* --tag charts/episodic_return --every 50000 --out figures/with_noise

Runs that differ in nothing but the seed form a variant. NAME=GLOB names the variant of all folders that it finds. Other
folders get the name of their way of sharing, or of their arm in docs/study.md. With --variant, the values of these
hyperparameters name the variants. Ways of sharing and arms have the same name, colour and place in all figures. Other
variants come after them. These and the tasks keep the order in which --runs first lists them.

OUT.png and OUT.csv: each variant's mean over seeds, at the steps that all its seeds have, with a percentile bootstrap
interval of the mean (resampling whole runs). A single seed has no interval: no band, and empty fields in the CSV file.

OUT_final.csv, also printed: each run's final score, which is its metric at its own last step, and each variant's mean
with an interval (in the row whose seed is "mean").

OUT_iqm.png and OUT_iqm.csv, if there are several tasks: inter-quartile mean of the normalised final scores of all tasks
and seeds, with a stratified percentile bootstrap interval (resampling seeds within each task), as in Agarwal et al.
2021, arXiv:2108.13264. Scores are normalised for each task. By default, 0 is the lowest and 1 the highest value of the
metric in any run given, as in Gorsane et al. 2022, arXiv:2209.10485. So normalised scores depend on which runs are
given. With --normalise VARIANT, scores are divided by that variant's mean score, which must be positive. Neither way
resamples the normalisation.

The resamples come from a fixed random seed, so the same runs give the same figures. With few seeds, the intervals are
too narrow: with three, they reach from the lowest to the highest seed and miss the true mean more often than they say.
"""

import csv
import dataclasses
import glob
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend must be chosen first

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.checkpoints import MAY_CHANGE  # noqa: E402
from experiment.command_line import check_flag_names, fail, require, warn  # noqa: E402
from tools.grid import RUN_NAME, read_events  # noqa: E402

ARMS = {  # --sharing, or the end of a folder's mappo_... or matd3_...: (name, colour, line), the same in all figures
    "kaleidoscope": ("masks", "#0072B2", "-"),
    "full": ("one network", "#D55E00", "-"),
    "none": ("separate networks", "#009E73", "-"),
    "full_log_std": ("one network, log_std for each agent", "#E69F00", "-"),
    "no_diversity": ("masks, no diversity loss", "#56B4E9", "-"),
    "kaleidoscope_twin": ("masks, twin critics", "#CC79A7", "--"),
    "none_twin": ("separate networks, twin critics", "#8A7A00", "--"),
}
OTHER_COLORS = ["#4B2E83", "#7F7F7F", "#A6761D", "#882255", "#44AA99"]  # for all other variants
LINES = ["-", "--", ":", "-."]  # for more variants than colours
SAME_RESULTS = MAY_CHANGE - {"total_timesteps", "eval_interval", "eval_episodes"} | {"exp_name", "seed", "time"}
DEFAULTS = {("None", "episode_limit"), ("None", "log_std")}  # older code wrote the values that these stand for
BOOTSTRAP_SEED = 0


@dataclasses.dataclass
class Options:
    runs: tuple[str, ...] = ()
    """folders of runs, or NAME=GLOB: NAME is the variant of all folders that the pattern GLOB finds"""
    out: Path | None = None
    """name of the PNG and CSV files, without their endings"""
    tag: str = "charts/eval_return"
    """the metric to show"""
    variant: tuple[str, ...] = ()
    """hyperparameters whose values name the variants; exp_name is the folder's, without _SEED at its end"""
    every: int = 0
    """average the metric over windows of so many steps, if runs log it at different steps; 0: as logged"""
    last: int = 0
    """final scores are means of the metric, as logged, over a run's last so many steps; 0: the curve's last value"""
    normalise: str = "min-max"
    """how the IQM normalises scores: min-max, or the name of a variant whose mean divides them"""
    each_seed: bool = False
    """also draw and write every run: thin lines, and OUT_seeds.csv"""
    reference: tuple[str, ...] = ()
    """CSV files of curves to compare with, as FILE or TASK=FILE; columns step and eval_return, # starts a comment"""
    reference_name: str = "released code, seed 0"
    """the reference curves' name in the figure"""
    confidence: float = 0.95
    """share of resamples within the intervals"""
    resamples: int = 2_000
    """resamples of the bootstrap"""


class Run(NamedTuple):
    """One run. Metrics, also the one shown (`logged`, and `curve` after averaging), are {step: value}."""

    folder: Path
    task: str
    variant: str
    seed: int
    hyperparameters: dict[str, str]
    logged: dict[int, float]
    curve: dict[int, float]


# ---- Reading ----
def name_of(flag, value):
    """What a hyperparameter's value adds to a variant's name."""
    if flag == "sharing" and value in ARMS:
        return ARMS[value][0]
    is_clear = re.fullmatch(r"[A-Za-z]\S*", value) and value not in ("True", "False", "None")
    return value if is_clear else f"{flag} {value}"


def variant_of(hyperparameters, flags):
    """A run's variant: by its values of `flags` or, without flags, its arm of the study or its way of sharing."""
    arm = re.fullmatch("(?:mappo|matd3)_(.*)", hyperparameters["exp_name"])
    if not flags and arm and arm[1] in ARMS:
        return ARMS[arm[1]][0]
    return ", ".join(name_of(flag, hyperparameters.get(flag, "unknown")) for flag in flags or ("sharing",))


def in_order(variants):
    """Each variant once: ways of sharing and arms in the order of ARMS, then the others."""
    known = [name for name, *_ in ARMS.values()]
    return sorted(dict.fromkeys(variants), key=lambda variant: known.index(variant) if variant in known else len(known))


def average_windows(curve, width, last_step):
    """{end of the window: mean of its values}, for the windows that the run has completed."""
    windows = {}
    for step, value in curve.items():
        windows.setdefault(-(-step // width) * width, []).append(value)
    return {end: float(np.mean(values)) for end, values in windows.items() if end <= last_step}


def find_folders(entries):
    """[(name or None, folder)] of --runs, which lists folders and NAME=GLOB."""
    require(len(entries) > 0, "--runs is empty, expected folders of runs or NAME=GLOB")
    found = []
    for entry in entries:
        name, equals, pattern = entry.partition("=")
        if Path(entry).is_dir():
            found.append((None, Path(entry)))
            continue
        require(equals, f"--runs: {entry} is not a folder, expected the folder of a run or NAME=GLOB")
        folders = sorted(path for path in map(Path, glob.glob(os.path.expanduser(pattern))) if path.is_dir())
        require(name and folders, f"--runs: {entry!r} finds no folder, expected NAME=GLOB with the folders of runs")
        found += [(name, folder) for folder in folders]
    return found


def read_run(folder, variant, options):
    """The run in a folder; `variant` None stands for the name that its hyperparameters give it."""
    hyperparameters, scalars = read_events(folder)
    if options.tag not in scalars:
        there = ", ".join(sorted(scalars)) or "no metrics at all"
        fail(f"--tag is {options.tag}, expected one that {folder} holds: {there}")
    # folders may have been renamed, and older runs have logged less
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
    variant = variant or variant_of(hyperparameters, options.variant)
    return Run(folder, hyperparameters["env_id"], variant, int(seed), hyperparameters, logged, curve)


def read_runs(options):
    """All runs of --runs, sorted. Warns of runs that are hard to compare. Also uses --tag, --variant and --every."""
    known, pairs = set(), []
    for name, folder in find_folders(options.runs):
        if folder.resolve() in known:
            fail(f"--runs: {folder} is there twice, expected once")
        known.add(folder.resolve())
        pairs.append((name, read_run(folder, name, options)))
    for flag in options.variant:
        if not any(flag in run.hyperparameters for _, run in pairs):
            there = ", ".join(dict.fromkeys(key for _, run in pairs for key in run.hyperparameters))
            fail(f"--variant is {flag}, expected a hyperparameter that at least one run has: {there}")
    runs, exp_names = {}, {}
    for name, run in pairs:
        twin = runs.setdefault((run.task, run.variant, run.seed), run)
        if twin is not run:
            what = f"{run.task}, {run.variant}, seed {run.seed}"
            expected = "expected one; NAME=GLOB in --runs or more flags in --variant tell runs apart"
            fail(f"--runs: {twin.folder} and {run.folder} are both {what}, {expected}")
        if name is None:
            exp_names.setdefault((run.task, run.variant), {})[run.hyperparameters["exp_name"]] = None
    for (task, variant), names in exp_names.items():
        if len(names) > 1:
            warn(f"{task}, {variant}: these runs have different names: {', '.join(names)}; NAME=GLOB tells them apart")
    runs = list(runs.values())
    tasks = list(dict.fromkeys(run.task for run in runs))
    variants = in_order(run.variant for run in runs)
    runs.sort(key=lambda run: (tasks.index(run.task), variants.index(run.variant), run.seed))
    warn_of_differences(runs, {"sharing", *options.variant})
    return runs


def warn_of_differences(runs, expected):
    """Warn where runs of one task differ in a flag that changes results and is not among the `expected`."""
    for task in dict.fromkeys(run.task for run in runs):
        members = [run for run in runs if run.task == task]
        said = []
        for flag in dict.fromkeys(flag for run in members for flag in run.hyperparameters):
            values = {}  # older code may have had no such flag
            for run in members:
                value = run.hyperparameters.get(flag)
                if value is not None and (value, flag) not in DEFAULTS:
                    values.setdefault(value, {})[run.variant] = None
            if len(values) > 1 and flag not in SAME_RESULTS | expected:
                said.append(f"{flag} is " + " and ".join(f"{value} ({'; '.join(of)})" for value, of in values.items()))
        if said:
            warn(f"runs of {task} differ in flags that change results: {', '.join(said)}")


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
def bootstrap(samples, statistic, resamples, confidence):
    """Percentile bootstrap interval (low, high) of statistic(*samples, axis=-1).

    samples: arrays (..., n), each with its own n; every resample draws n values of each with replacement. low and high
    have the statistic's shape; they are NaN if a sample has a single value.
    """
    if min(sample.shape[-1] for sample in samples) < 2:
        return (np.full(samples[0].shape[:-1], np.nan),) * 2
    rng, values = np.random.default_rng(BOOTSTRAP_SEED), []
    for start in range(0, resamples, 100):  # all at once may take too much memory
        batch = min(100, resamples - start)
        drawn = [x[..., rng.integers(x.shape[-1], size=(batch, x.shape[-1]))] for x in samples]  # (..., batch, n)
        values.append(statistic(*drawn, axis=-1))
    tail = (1 - confidence) / 2
    return np.quantile(np.concatenate(values, axis=-1), [tail, 1 - tail], axis=-1)


def iqm(*samples, axis=-1):
    """Mean of the middle half of all samples' values together."""
    values = np.sort(np.moveaxis(np.concatenate(samples, axis=axis), axis, -1))
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def mean_curve(runs, options):
    """Steps (T,) that all the runs have, mean, low and high (T,) at them."""
    steps = sorted(set.intersection(*(set(run.curve) for run in runs)))
    if not steps:
        what = f"the runs of {runs[0].task}, {runs[0].variant} share no step of {options.tag}"
        fail(f"{what}: expected --every STEPS, which averages over windows")
    values = np.array([[run.curve[step] for run in runs] for step in steps])  # (T, seeds)
    return np.array(steps), values.mean(-1), *bootstrap((values,), np.mean, options.resamples, options.confidence)


def final_score(run, last):
    """The run's value at its last step, or its mean over its `last` steps."""
    end = max(run.curve)
    values = [value for step, value in run.logged.items() if end - last < step <= end] if last else [run.curve[end]]
    require(values, f"--last is {last}, expected steps in which {run.folder} has a value")
    return float(np.mean(values))


def normalise(cells, scores, options):
    """The final scores, normalised for each task: {(task, variant): array}."""
    normal = {}
    for (task, variant), values in scores.items():
        if options.normalise == "min-max":
            members = [run for (of, _), runs in cells.items() if of == task for run in runs]
            seen = [value for run in members for value in run.curve.values()]
            low, high = min(seen), max(seen)
            if low == high:
                fail(f"--normalise is min-max, expected the name of a variant: all values of {task} are {low:g}")
        else:
            if (task, options.normalise) not in scores:
                there = ", ".join(of for on, of in scores if on == task)
                fail(f"--normalise is {options.normalise}, expected min-max or a variant that {task} has: {there}")
            low, high = 0.0, scores[task, options.normalise].mean()
            if high <= 0:
                fail(f"--normalise is {options.normalise}, expected min-max: its mean score on {task} is {high:.1f}")
        normal[task, variant] = (values - low) / (high - low)
    return normal


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
    """Draw one panel per task."""
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
    widths = [0.6 + 0.065 * len(name) for name in names]  # inches, about
    fitting = [n for n in range(1, len(names) + 1) if sum(map(max, np.array_split(widths, n))) <= size[0]]
    legend_columns = max(fitting, default=1)
    figure.set_size_inches(size[0], size[1] + 0.18 * (-(-len(names) // legend_columns) - 1))
    figure.legend(
        [handles[name] for name in names],
        names,
        title=", ".join(flag.replace("_", " ") for flag in options.variant if flag != "exp_name") or None,
        loc="outside lower center",
        ncols=legend_columns,
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def draw_iqm(path, rows, styles, options):
    """Draw one dot with its interval per variant, the first variant at the top."""
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


def styles_of(variants):
    """{variant: colour and line}"""
    fixed = {name: dict(color=color, linestyle=line) for name, color, line in ARMS.values()}
    others = [variant for variant in variants if variant not in fixed]
    for i, variant in enumerate(others):
        line = LINES[i // len(OTHER_COLORS) % len(LINES)]
        fixed[variant] = dict(color=OTHER_COLORS[i % len(OTHER_COLORS)], linestyle=line)
    return {variant: fixed[variant] for variant in variants}


def report_scores(cells, scores, options):
    """Print the runs' final scores and write them to OUT_final.csv."""
    rows = []
    for task in dict.fromkeys(task for task, _ in cells):
        mine = {variant: runs for (of, variant), runs in cells.items() if of == task}
        ends = sorted({max(run.curve) for runs in mine.values() for run in runs})
        where = f"at step {ends[0]:,}" if len(ends) == 1 else "at each run's last step"
        print(f"{task}, {options.tag} {where}" + f", mean over {options.last:,} steps" * (options.last > 0))
        for variant, runs in mine.items():
            values, alike = scores[task, variant], len({max(run.curve) for run in runs}) == 1
            low, high = bootstrap((values,), np.mean, options.resamples, options.confidence)
            each = []
            for run, score in zip(runs, values, strict=True):
                rows.append((task, variant, run.seed, max(run.curve), number(score), "", ""))
                each.append(f"{run.seed}: {score:.1f}" + f" at {max(run.curve):,}" * (not alike))
            rows.append((task, variant, "mean", "", number(values.mean()), number(low), number(high)))
            interval = "" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]"
            interval += f" at step {max(runs[0].curve):,}" * (alike and len(ends) > 1)
            print(f"  {variant}: {values.mean():.1f}{interval}  (seed {', '.join(each)})")
        if len(ends) > 1:
            warn(f"runs of {task} end at different steps, from {ends[0]:,} to {ends[-1]:,}")
    write_csv(f"{options.out}_final.csv", ("task", "variant", "seed", "steps", "score", "low", "high"), rows)


def check(options):
    require(options.out is not None, "--out is not given, expected a name for the files that are written")
    require(0 < options.confidence < 1, f"--confidence is {options.confidence}, expected a number between 0 and 1")
    for name, least in (("resamples", 1), ("every", 0), ("last", 0)):
        value = getattr(options, name)
        require(value >= least, f"--{name} is {value}, expected at least {least}")


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
    check(options)
    runs = read_runs(options)
    tasks, variants = list(dict.fromkeys(run.task for run in runs)), in_order(run.variant for run in runs)
    styles = styles_of(variants)
    references = read_references(options, tasks)
    cells = {(task, variant): [] for task in tasks for variant in variants}
    for run in runs:
        cells[run.task, run.variant].append(run)
    cells = {cell: members for cell, members in cells.items() if members}
    curves = {cell: mean_curve(members, options) for cell, members in cells.items()}
    scores = {cell: np.array([final_score(run, options.last) for run in members]) for cell, members in cells.items()}
    normal = normalise(cells, scores, options) if len(tasks) > 1 else None

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
        report_scores(cells, scores, options)
        if normal:
            report_iqm(normal, tasks, variants, styles, options)
    except OSError as error:
        fail(f"--out: {error.filename}: {error.strerror}, expected a place to write to")


def report_iqm(normal, tasks, variants, styles, options):
    """Print, draw and write the inter-quartile means of the variants that have runs on all tasks."""
    rows = []
    print(f"inter-quartile mean over {len(tasks)} tasks")
    for variant in variants:
        missing = [task for task in tasks if (task, variant) not in normal]
        if missing:
            print(f"  {variant}: left out, since it has no runs on {', '.join(missing)}")
            continue
        samples = [normal[task, variant] for task in tasks]
        low, high = bootstrap(samples, iqm, options.resamples, options.confidence)
        rows.append((variant, iqm(*samples), low, high))
        interval = "" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]"
        print(f"  {variant}: {rows[-1][1]:.3f}{interval}")
        seeds = [len(sample) for sample in samples]
        single = [task for task, number_of_seeds in zip(tasks, seeds, strict=True) if number_of_seeds == 1]
        if single:
            warn(f"{variant} has no interval over tasks, since it has a single run on {', '.join(single)}")
        if len(set(seeds)) > 1:
            warn(f"tasks with more seeds count for more: {variant} has {', '.join(map(str, seeds))}")
    if not rows:
        return
    draw_iqm(f"{options.out}_iqm.png", rows, styles, options)
    counts = {variant: sum(len(normal[task, variant]) for task in tasks) for variant, *_ in rows}
    table = [(variant, len(tasks), counts[variant], *map(number, row)) for variant, *row in rows]
    write_csv(f"{options.out}_iqm.csv", ("variant", "tasks", "runs", "iqm", "low", "high"), table)


if __name__ == "__main__":
    main()
