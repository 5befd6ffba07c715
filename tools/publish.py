"""Copy runs for publication: their curves and hyperparameters, without pictures, histograms, models and checkpoints.

    python tools/publish.py --runs runs/*__ant_* --out published/runs

Event files keep their names and the order of what is in them, so that TensorBoard and figures.py show the copies as
they show the runs. A run's megabytes become some hundred kilobytes.
"""

import dataclasses
import shutil
import sys
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.command_line import fail, require  # noqa: E402

LARGE = ("image", "histo", "audio")


@dataclasses.dataclass
class Options:
    runs: tuple[Path, ...] = ()
    """folders of runs"""
    out: Path | None = None
    """folder that their copies go to"""


def copy_scalars(source, target):
    """Write the event file `source` to `target` without its pictures, histograms and sounds."""
    with target.open("wb") as file:
        writer = RecordWriter(file)
        for record in RawEventFileLoader(str(source)).Load():
            event = Event.FromString(record)
            kept = [value for value in event.summary.value if value.WhichOneof("value") not in LARGE]
            if len(kept) < len(event.summary.value):
                if not kept:
                    continue
                del event.summary.value[:]
                event.summary.value.extend(kept)
            writer.write(event.SerializeToString())


def main():
    options = tyro.cli(Options)
    require(len(options.runs) > 0, "--runs is empty, expected folders of runs")
    require(options.out is not None, "--out is not given, expected a folder")
    copies = {}  # {target: event files}; all is looked at before anything is written
    for run in options.runs:
        target, sources = options.out / run.resolve().name, sorted(run.glob("events.out.tfevents.*"))
        if not sources:
            fail(f"{run}: expected the folder of a run, with TensorBoard's event files in it")
        if target in copies or target.exists():
            fail(f"{run}: there is a {target} already, expected runs that are not published yet, each once")
        copies[target] = sources
    for target, sources in copies.items():
        part = target.with_name(f".{target.name}")  # an interrupted copy does not pass for a published run
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for source in sources:
            copy_scalars(source, part / source.name)
        part.rename(target)
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"{target}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
