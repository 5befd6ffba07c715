"""Learning curves from TensorBoard folders: a table, a CSV file and a picture.

    python benchmark/learning_curves.py --runs runs/reference/HalfCheetah-v2-2x3__* \
        --reference tests/reference/halfcheetah_2x3_released_code.csv --out benchmark/results/halfcheetah_2x3

Reads `charts/eval_return` and its std of every run, and the columns step and eval_return of the reference. Writes
OUT.csv and OUT.png, and prints the table. --tag shows another metric.
"""

import csv
import dataclasses
import sys
from pathlib import Path

import matplotlib
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, the backend comes first


@dataclasses.dataclass
class Options:
    runs: tuple[Path, ...]
    """folders of runs"""
    out: Path
    """name of the CSV and PNG files, without their endings"""
    reference: Path | None = None
    """CSV file of a curve to compare with; lines that start with # are skipped"""
    reference_name: str = "released code, seed 0"
    """what the reference is called in the picture"""
    tag: str = "charts/eval_return"
    """the metric to show"""
    last: int = 0
    """print also each run's mean of the metric over this many steps at its end"""


def read_run(folder, tag):
    """{step: value} of a metric."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if tag not in events.Tags()["scalars"]:
        sys.exit(f"error: {folder} holds no {tag}")
    return {event.step: event.value for event in events.Scalars(tag)}


def read_reference(path):
    rows = csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#"))
    return {int(row["step"]): float(row["eval_return"]) for row in rows}


def main():
    options = tyro.cli(Options)
    curves, spreads, experiments = {}, {}, {}
    for folder in sorted(options.runs):
        _, exp_name, seed, _ = folder.name.split("__")
        experiment = exp_name.removesuffix(f"_{seed}")
        name = f"{experiment}, seed {seed}"
        experiments[name] = experiment
        curves[name] = read_run(folder, options.tag)
        if options.tag == "charts/eval_return":
            spreads[name] = read_run(folder, "charts/eval_return_std")
    last_step = max(max(curve) for curve in curves.values())
    if options.reference:
        reference = read_reference(options.reference)
        curves[options.reference_name] = {step: value for step, value in reference.items() if step <= last_step}

    steps = sorted(set().union(*curves.values()))
    table = [["step", *curves]]
    table += [[str(step), *(f"{c[step]:.5g}" if step in c else "" for c in curves.values())] for step in steps]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out.with_suffix(".csv"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))

    for name, curve in curves.items() if options.last else ():
        tail = [value for step, value in curve.items() if step > max(curve) - options.last]
        print(f"{name}: {sum(tail) / len(tail):.1f} over the last {options.last} steps")

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(experiments.values()))}
    for name, curve in curves.items():  # one colour an experiment, one line a run
        experiment = experiments.get(name, name)
        style = dict(color=colors[experiment]) if name in experiments else dict(color="black", linestyle="--")
        seen = experiment in axes.get_legend_handles_labels()[1]
        x = sorted(curve)
        axes.plot(x, [curve[step] for step in x], label=None if seen else experiment, **style)
        if name in spreads:
            low, high = ([curve[step] + sign * spreads[name][step] for step in x] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(options.tag.rpartition("/")[2].replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(options.out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
