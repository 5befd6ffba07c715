"""Copy runs for publication: curves and hyperparameters, without pictures, histograms and checkpoints.

    python tools/publish.py --runs runs/*__ant_* --out published/runs
    python tools/publish.py --runs published/runs/* --out smaller --model

The returns and lengths of training episodes (charts/episodic_return, charts/episodic_length) become means over windows
of 10,000 environment steps: (0, 10,000], (10,000, 20,000] and so on. Each window in which an episode ended has one
value, at the window's end. The last one stands at the run's last step, if the run stopped within the window. All other
scalars are copied as they are. --model also copies model.pt, where a run has one.

TensorBoard and figures.py read the copies as they read the runs: the event files keep their names, and a resumed run's
later file still replaces what an earlier file holds from the step of the resume on. Scalars of one step share one time.
Publishing a copy again changes nothing.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.command_line import check_flag_names, fail, require  # noqa: E402
from tools.grid import read_events  # noqa: E402

LARGE = ("image", "histo", "audio")
EPISODES = ("charts/episodic_return", "charts/episodic_length")
WINDOW = 10_000  # environment steps


@dataclasses.dataclass
class Options:
    runs: tuple[Path, ...] = ()
    """folders of runs, also of published ones"""
    out: Path | None = None
    """folder that the copies go to"""
    model: bool = False
    """also copy model.pt, where a run has one"""


def end_of_window(step):
    return -(-step // WINDOW) * WINDOW


def window_means(folder):
    """{tag: {end of the window: mean}} of a run's training episodes. The last end is at most the run's last step."""
    _, scalars = read_events(folder)
    last_step = max((max(curve) for curve in scalars.values()), default=0)
    means = {}
    for tag in EPISODES:
        windows = {}
        for step, value in scalars.get(tag, {}).items():
            windows.setdefault(min(end_of_window(step), last_step), []).append(value)
        means[tag] = {end: sum(values) / len(values) for end, values in windows.items()}
    return means


def copy_run(sources, target, means):
    """Write a run's event files `sources` to the folder `target`, with `means` in place of its training episodes."""
    kept, restarts, times = [], [], []  # of each file: events, step of its resume, {window: time of its last episode}
    for source in sources:
        kept.append([])
        restarts.append(None)
        times.append({})
        for record in RawEventFileLoader(str(source)).Load():
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                restarts[-1] = event.step
            values = [value for value in event.summary.value if value.WhichOneof("value") not in LARGE]
            if any(value.tag in EPISODES for value in values):
                times[-1][end_of_window(event.step)] = event.wall_time
                values = [value for value in values if value.tag not in EPISODES]
            if len(values) < len(event.summary.value):
                if not values:
                    continue
                del event.summary.value[:]
                event.summary.value.extend(values)
            previous = kept[-1][-1] if kept[-1] else None
            if values and previous is not None and previous.summary.value and previous.step == event.step:
                previous.summary.value.extend(values)  # one event with all scalars of a step takes half the space
            else:
                kept[-1].append(event)
    ends = sorted({end for curve in means.values() for end in curve})
    for end in ends:
        window = end_of_window(end)
        # a resume within the window drops what earlier files hold at its end
        after = [i for i, restart in enumerate(restarts) if restart is not None and restart <= end]
        file = max([i for i, found in enumerate(times) if window in found] + after)
        event = Event(step=end, wall_time=max(found[window] for found in times if window in found))
        for tag, curve in means.items():
            if end in curve:
                event.summary.value.add(tag=tag, simple_value=curve[end])
        kept[file].append(event)
    for source, events in zip(sources, kept, strict=True):
        with (target / source.name).open("wb") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
    require(len(options.runs) > 0, "--runs is empty, expected folders of runs")
    require(options.out is not None, "--out is not given, expected a folder")
    copies = {}  # {target: (run, event files)}; look at all runs before writing anything
    for run in options.runs:
        target, sources = options.out / run.resolve().name, sorted(run.glob("events.out.tfevents.*"))
        if not sources:
            fail(f"{run}: expected the folder of a run, with TensorBoard's event files in it")
        if target in copies or target.exists():
            fail(f"{run}: there is a {target} already, expected runs that are not published yet, each once")
        copies[target] = run, sources
    for target, (run, sources) in copies.items():
        part = target.with_name(f".{target.name}")  # so an interrupted copy does not look like a published run
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        copy_run(sources, part, window_means(run))
        if options.model and (run / "model.pt").exists():
            shutil.copyfile(run / "model.pt", part / "model.pt")
        part.rename(target)
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"{target}: {size / 1000:.0f} kB" + " with model.pt" * (target / "model.pt").exists())


if __name__ == "__main__":
    main()
