"""Judge runs as docs/study.md says: ends, curves and steps of all seeds, and a test for each pair of arms.

    python tools/judge.py --runs published/runs/{Ant-v2-4x2,HalfCheetah-v2-2x3}__mappo_*__1[1-5]__* --reach 2000 \\
        --main "masks vs one network" "masks vs separate networks" --out question_1 --markdown
    python tools/judge.py --runs published/runs/HalfCheetah-v2-2x3__matd3_*__1[1-3]__* --reach 1500 --out question_4 \\
        --pool "masked actors=masks + masks, twin critics" \\
        "separate actors=separate networks + separate networks, twin critics" \\
        "ensemble=masks + separate networks" "twin critics=masks, twin critics + separate networks, twin critics"

An arm is what figures.py calls a variant, and --runs and --variant work as they do there.

The first table, and OUT_runs.csv, hold all runs. The end is the mean return over a run's last five evaluations, the
curve the mean over all evaluations. With --reach R, "steps to R" is the first evaluation that returns at least R, or
never.

The second table, and OUT_pairs.csv, compare each two arms of a task. p comes from the exact two-sided Mann-Whitney test
on the ends. Equal values share the mean of their ranks, and "never" counts as more than any number. The interval is
the 95 % percentile bootstrap interval of the difference of mean ends: 10,000 draws of seeds with replacement,
separately for each arm, from a fixed random seed. Two arms "differ" if p < 0.05 and their mean ends are at least a
tenth of the larger one (in absolute value) apart. The p values of curves and steps are a check; they decide nothing.
Arms with fewer than three runs are examples: no test. Arms with one run have no interval.

--main names the main comparisons, on every task. Their p values get Holm's correction for all of them together, and the
corrected p decides. All other p values are uncorrected. --pool joins arms into a factor, which is then compared with
the other factors that share no arm with it.
"""

import dataclasses
import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.command_line import check_flag_names, fail, require, warn  # noqa: E402
from tools.figures import bootstrap, number, read_runs, write_csv  # noqa: E402

LAST = 5  # evaluations
DRAWS = 10_000
FEWEST = 3  # runs of an arm in a test


@dataclasses.dataclass
class Options:
    runs: tuple[str, ...] = ()
    """folders of runs, or NAME=GLOB: NAME is the arm of all folders that the pattern GLOB finds"""
    out: Path | None = None
    """name of the CSV files, without their endings; none: print only"""
    reach: float | None = None
    """the return R of "steps to R" """
    main: tuple[str, ...] = ()
    """main comparisons, each as "ARM vs ARM", whose p values get Holm's correction"""
    pool: tuple[str, ...] = ()
    """factors, each as "NAME=ARM + ARM": their runs together"""
    variant: tuple[str, ...] = ()
    """hyperparameters whose values name the arms, as in figures.py"""
    markdown: bool = False
    """print Markdown tables"""

    tag, every = "charts/eval_return", 0  # not flags; read_runs asks for them


@dataclasses.dataclass
class Result:
    """What counts of one run."""

    run: object
    end: float
    curve: float
    steps: float | None  # inf: never; None: without --reach


@dataclasses.dataclass
class Pair:
    """Two arms of one task compared; None where there are too few runs."""

    task: str
    arms: tuple[str, str]
    results: tuple[list[Result], list[Result]]
    is_main: bool
    interval: tuple[float, float]
    p: float | None
    p_curve: float | None
    p_steps: float | None
    p_holm: float | None = None

    @property
    def ends(self):
        """Mean ends of both arms."""
        return tuple(float(np.mean([result.end for result in results])) for results in self.results)

    @property
    def verdict(self):
        a, b = self.ends
        if self.p is None:
            return "examples, no test"
        is_large = abs(a - b) >= max(abs(a), abs(b)) / 10
        p = self.p if self.p_holm is None else self.p_holm
        return "differ" if p < 0.05 and is_large else "no difference"


# ---- Statistics ----
def mann_whitney(a, b):
    """Exact two-sided p value of two samples, which may hold ties and inf.

    It is the share of all ways to divide the pooled ranks in which the first sample's rank sum is at least as far from
    its mean as it is now. Equal values share the mean of their ranks.
    """
    pooled = np.array([*a, *b], dtype=float)
    ranks = [int((pooled < x).sum() * 2 + (pooled == x).sum() + 1) for x in pooled]  # doubled, so that they are whole
    ways = [Counter({0: 1})] + [Counter() for _ in a]  # of k ranks chosen so far: {their sum: number of ways}
    for rank in ranks:
        for k in range(len(a), 0, -1):
            for total, count in ways[k - 1].items():
                ways[k][total + rank] += count
    mean = len(a) * (len(ranks) + 1)
    distance = abs(sum(ranks[: len(a)]) - mean)
    far = sum(count for total, count in ways[-1].items() if abs(total - mean) >= distance)
    return far / math.comb(len(ranks), len(a))


def holm(p_values):
    """Holm's corrected p values, in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def difference_of_means(a, b, axis):
    return a.mean(axis) - b.mean(axis)


# ---- Runs and pairs ----
def judge_run(run, reach):
    """The Result of a run. Warns if the run is not finished, and fails if it has too few evaluations."""
    steps = sorted(run.logged)
    returns = [run.logged[step] for step in steps]
    require(len(steps) >= LAST, f"{run.folder} has {len(steps)} evaluations, expected at least {LAST}")
    require(np.isfinite(returns).all(), f"{run.folder} has an evaluation that is no finite number, expected none")
    planned = int(run.hyperparameters.get("total_timesteps", 0))
    if steps[-1] < planned:
        warn(f"{run.folder}: its last evaluation is at {steps[-1]:,} of {planned:,} steps")
    reached = None
    if reach is not None:
        reached = next((step for step, value in zip(steps, returns, strict=True) if value >= reach), math.inf)
    return Result(run, float(np.mean(returns[-LAST:])), float(np.mean(returns)), reached)


def warn_of_steps(task, arms):
    """Warn if the runs of a task have their last evaluations at different steps."""
    last = {tuple(sorted(result.run.logged)[-LAST:]) for results in arms.values() for result in results}
    if len(last) > 1:
        said = ", ".join(f"{steps[0]:,} to {steps[-1]:,}" for steps in sorted(last))
        warn(f"{task}: the ends of these runs are means over different steps: {said}")


def pool_arms(arms, task, options):
    """{factor: (its arms, results of all their runs)} of one task, for --pool."""
    pools = {}
    for entry in options.pool:
        name, equals, members = entry.partition("=")
        members = [member.strip() for member in members.split(" + ")]
        well_formed = name and equals and len(members) == len(set(members))  # an arm given twice would count twice
        require(well_formed, f"--pool: {entry!r} is one of them, expected NAME=ARM + ARM, each arm once")
        for member in members:
            require(member in arms, f"--pool: {member!r} is one arm, expected arms of {task}: {'; '.join(arms)}")
        require(name not in arms and name not in pools, f"--pool: {name!r} is there twice, expected a new name")
        pools[name] = set(members), [result for member in members for result in arms[member]]
    return pools


def main_comparisons(options, tasks):
    """Sets of two arms, from --main."""
    pairs = []
    for entry in options.main:
        pair = tuple(arm.strip() for arm in entry.split(" vs "))
        require(len(set(pair)) == 2 and len(pair) == 2, f"--main: {entry!r} is one of them, expected ARM vs ARM")
        for task, arms in tasks.items():
            for arm in pair:
                require(arm in arms, f"--main: {arm!r} is one arm, expected arms of {task}: {'; '.join(arms)}")
        require(set(pair) not in pairs, f"--main: {entry!r} is there twice, expected once")
        pairs.append(set(pair))
    return pairs


def compare(task, names, results, is_main):
    """The Pair of two arms."""

    def test(measure):
        values = [[getattr(result, measure) for result in of] for of in results]
        too_few = min(map(len, values)) < FEWEST or None in values[0]
        return None if too_few else mann_whitney(*values)

    ends = [np.array([result.end for result in of]) for of in results]
    interval = tuple(float(bound) for bound in bootstrap(ends, difference_of_means, DRAWS, 0.95))
    return Pair(task, names, results, is_main, interval, test("end"), test("curve"), test("steps"))


# ---- Writing ----
def whole(x):
    """A return or steps in a table."""
    if x is None or math.isnan(x):
        return ""
    return "never" if math.isinf(x) else f"{x:,.0f}"


def probability(p):
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def precise(x):
    """A number in a CSV file."""
    if x is None:
        return ""
    return "never" if math.isinf(x) else number(x)


def print_table(header, rows, markdown):
    rows = [header, *rows]
    if markdown:
        rows.insert(1, ["---"] * len(header))
        lines = [f"| {' | '.join(row)} |" for row in rows]
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    print("\n".join(lines) + "\n")


def print_runs(tasks, options):
    header = ["task", "arm", "seeds", "end: mean (each seed)", "curve: mean (each seed)"]
    header += [f"steps to {options.reach:,.0f}"] if options.reach is not None else []
    rows = []
    for task, arms in tasks.items():
        for arm, of in arms.items():
            row = [task, arm, ", ".join(str(result.run.seed) for result in of)]
            for key in ("end", "curve"):
                values = [getattr(result, key) for result in of]
                row.append(f"{whole(np.mean(values))} ({'; '.join(map(whole, values))})")
            rows.append(row + ["; ".join(whole(result.steps) for result in of)] * (options.reach is not None))
    print_table(header, rows, options.markdown)


def print_pairs(pairs, options):
    header = ["task", "arms", "difference", "95 % interval", "p"]
    header += ["p (Holm)"] * bool(options.main) + ["verdict", "p of curves"]
    header += ["p of steps"] * (options.reach is not None)
    rows = []
    for pair in pairs:
        a, b = pair.ends
        low, high = map(whole, pair.interval)
        row = [pair.task, " vs ".join(pair.arms), whole(a - b)]
        row += [f"{low} to {high}" if low else "", probability(pair.p)]
        row += [probability(pair.p_holm)] * bool(options.main) + [pair.verdict, probability(pair.p_curve)]
        rows.append(row + [probability(pair.p_steps)] * (options.reach is not None))
    print_table(header, rows, options.markdown)


def write_results(tasks, pairs, out):
    """Write OUT_runs.csv and OUT_pairs.csv; `tasks` without pools, so that each run has one row."""
    header = ["task", "arm", "seed", "steps", "evaluations", "end", "curve", "steps_to_reach", "folder"]
    rows = []
    for task, arms in tasks.items():
        for arm, results in arms.items():
            for result in results:
                run = result.run
                numbers = map(precise, (result.end, result.curve, result.steps))
                name = run.folder.resolve().name
                rows.append((task, arm, run.seed, max(run.logged), len(run.logged), *numbers, name))
    write_csv(f"{out}_runs.csv", header, rows)
    header = "task arm_a arm_b runs_a runs_b main end_a end_b difference low high p p_holm verdict p_curve p_steps"
    rows = []
    for pair in pairs:
        a, b = pair.ends
        numbers = map(precise, (a, b, a - b, *pair.interval, pair.p, pair.p_holm))
        checks = map(precise, (pair.p_curve, pair.p_steps))
        counts = map(len, pair.results)
        is_main = "yes" if pair.is_main else "no"
        rows.append((pair.task, *pair.arms, *counts, is_main, *numbers, pair.verdict, *checks))
    write_csv(f"{out}_pairs.csv", header.split(), rows)


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
    tasks = {}  # {task: {arm: results}}
    for run in read_runs(options):
        tasks.setdefault(run.task, {}).setdefault(run.variant, []).append(judge_run(run, options.reach))
    mains, pairs, factors = main_comparisons(options, tasks), [], {}
    for task, arms in tasks.items():
        warn_of_steps(task, arms)
        for names in itertools.combinations(arms, 2):
            pairs.append(compare(task, names, tuple(arms[name] for name in names), set(names) in mains))
        pools = pool_arms(arms, task, options)
        for names in itertools.combinations(pools, 2):
            (members, a), (others, b) = (pools[name] for name in names)
            if not members & others:
                pairs.append(compare(task, names, (a, b), False))
        factors[task] = {name: results for name, (_, results) in pools.items()}
    main_pairs = [pair for pair in pairs if pair.is_main]
    for pair in main_pairs:
        what = f"{pair.task}, {' vs '.join(pair.arms)}"
        require(pair.p is not None, f"--main: {what} has an arm of fewer than {FEWEST} runs, expected {FEWEST} or more")
    for pair, p in zip(main_pairs, holm([pair.p for pair in main_pairs]), strict=True):
        pair.p_holm = p
    print_runs({task: arms | factors[task] for task, arms in tasks.items()}, options)
    print_pairs(pairs, options)
    if options.out is not None:
        try:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_results(tasks, pairs, options.out)
        except OSError as error:
            fail(f"--out: {error.filename}: {error.strerror}, expected a place to write to")


if __name__ == "__main__":
    main()
