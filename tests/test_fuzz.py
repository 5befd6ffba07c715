"""Whatever a user types, and whatever becomes of a checkpoint, ends in a run or in one line and exit code 2.

Hypothesis draws the inputs, the same ones every time.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import resource
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import experiment
import kalei_mappo_mamujoco
import kalei_matd3_mamujoco
from mamujoco_env import TASKS, partitions_of

SCRIPTS = {"matd3": kalei_matd3_mamujoco, "mappo": kalei_mappo_mamujoco}
# a run of few updates, to be stopped early, with a checkpoint of 60 to 70 kB
TINY = "--device cpu --env-id Hopper-v2-3x1 --num-envs 2 --num-threads 1 --hidden-size 4 --num-critics 2"
TINY += " --history-length 2 --episode-limit 15 --eval-episodes 0 --log-interval 20 --checkpoint-interval 1000"
TINY = {
    "matd3": f"{TINY} --total-timesteps 120 --warmup-steps 40 --buffer-size 60 --batch-size 8 --train-interval 10"
    " --updates-per-round 2 --policy-freq 1 --n-step 2".split(),
    "mappo": f"{TINY} --total-timesteps 120 --rollout-steps 10 --num-epochs 1 --num-minibatches 1".split(),
}


class Outcome(NamedTuple):
    code: int  # 0 if it returned
    out: str
    err: str  # with the warnings that a process of its own would have printed
    result: object


def outcome(function, *arguments):
    """Of a call, as a terminal in UTF-8 would see it. Any exception but SystemExit goes on."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace", write_through=True)
    code, result = 0, None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        try:
            result = function(*arguments)
        except SystemExit as stop:
            code = stop.code
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return Outcome(code, texts[0], texts[1] + "".join(f"{warning.message}\n" for warning in warned), result)


class Stop:
    """Stands in for StopSignals, without handlers: as if a signal came in block number `block`."""

    def __init__(self, block):
        self.block, self.seen = block, 0

    @property
    def received(self):
        self.seen += 1  # the loop asks once a block
        return signal.SIGTERM if self.seen >= self.block else None

    def exit(self):
        pass


def main(script, argv, block=math.inf):
    """Outcome of the script's main()."""
    argv = [script.__file__, *argv]
    with mock.patch.object(experiment, "StopSignals", lambda: Stop(block)), mock.patch.object(sys, "argv", argv):
        return outcome(script.main)


def refused(got):
    """Whether it ended in one line on stderr and exit code 2."""
    one_line = len(got.err.splitlines()) == 1 and re.match(r"error: \S", got.err) and got.err.endswith("\n")
    return bool(got.code == 2 and one_line and not got.out)


@pytest.fixture(scope="module", params=SCRIPTS)
def checkpointed(request, tmp_path_factory):
    """(script, run folder with a checkpoint, the checkpoint's bytes)."""
    folder, script = tmp_path_factory.mktemp(request.param), SCRIPTS[request.param]
    with contextlib.chdir(folder):
        got = main(script, TINY[request.param], block=4)  # of 20 steps
        assert got.code == 0, got
        (run_folder,) = (folder / "runs").iterdir()
    return script, run_folder, (run_folder / "checkpoint.pt").read_bytes()


# ---- Command lines ----
NUMBERS = "0 1 2 3 5 10 100 1000 10000 0.5 0.01 1e-3 -1 -0.5 -0 +7 1_000 007 0x10 1e3 1e400 -1e400 nan -nan inf -inf"
NUMBERS += f" Infinity 1e-400 1.0 2.5 .5 5. 1e 1,5 ½ ٣ {10**12} {10**12 + 1} {2**32 - 1} {2**32} {10**30} {-(10**30)}"
NUMBERS = [*NUMBERS.split(), "9" * 5000, "0." + "3" * 5000]
WORDS = [
    "",
    " ",
    "\n",
    "a b",
    "\t5",
    "5\n",
    "5\n6",
    "\r",
    "\x1b[31m5\x1b[0m",
    "\x07",
    "\x1e",
    "\x85",
    "\u2028",
    "──",
    "│",
]
WORDS += [
    "None",
    "none",
    "True",
    "false",
    "auto",
    "cpu",
    "full",
    "kaleidoscope",
    "mean",
    "min",
    "agent",
    "ünï/ço∂e",
    "👩‍🚀",
]
WORDS += [
    "x" * 300,
    "w" * 20_000,
    "../x",
    "/",
    "%s",
    "{}",
    "$(id)",
    "`id`",
    "a|b",
    "@file",
    "\udcff",
    "[red]",
    "--",
    "-",
    "-5",
]
GOOD_IDS = [
    f"{task}-{partition}" for task, kind in TASKS.items() for partition in partitions_of(kind) or ["3x2", "10x2"]
]
ENV_IDS = "Ant-v2-4x3 ant-v2-4x2 Ant-v2 Ant -Ant-v2-4x2 Ant-v2- Ant-v2-4x2- Ant-v3-4x2 Ant-v2-4X2 Ant-v2-4x2d"
ENV_IDS += " Humanoid-v2-9|8|7 Humanoid-v2-9 manyagent_ant manyagent_ant-99999x99999 manyagent_ant-100x1"
ENV_IDS += " manyagent_swimmer--1x2 manyagent_swimmer-2"
ENV_IDS += " manyagent_swimmer-01x2 manyagent_swimmer-1x2x3 manyagent_swimmer-٣x٣ coupled_half_cheetah-1p2 None"
ENV_IDS = [
    *ENV_IDS.split(),
    "Ant-v2-4x2 ",
    " Ant-v2-4x2",
    "Ant-v2-4x2\n",
    "manyagent_ant-2x2\n",
    "Ant-v2-" + "4x2" * 9_000,
]


@st.composite
def env_ids(draw):
    """Good ones, most of them with some characters changed."""
    text = draw(st.sampled_from(GOOD_IDS))
    for _ in range(draw(st.integers(0, 3))):
        at, width = draw(st.integers(0, len(text))), draw(st.integers(0, 2))
        text = (
            text[:at]
            + draw(st.sampled_from(["", "-", "x", "9", "1", "|", "v", " ", "é", "\n", "A"]))
            + text[at + width :]
        )
    return text


def command_lines(script, paths):
    """Lists of arguments: 1 to 4 flags, some unknown, with values that may or may not fit, and bare words."""
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Args)]
    likely = [
        "--env-id",
        "--layer-weights",
        "--resume",
        "--evaluate",
        "--exp-name",
    ]  # whose values are more than numbers
    unknown = [
        "--nstep",
        "--gama",
        "--no-gamma",
        "--no-save-model",
        "--no-weighted-diversity",
        "--Gamma",
        "-g",
        "--env_id",
    ]
    unknown += ["--", "---", "-", "--=", "--gamma=", "--seed=3", "--env-id=Ant-v2-4x3", "--ünï", "--" + "x" * 500]
    texts = st.text(max_size=6) | st.sampled_from(WORDS)
    numbers = st.sampled_from(NUMBERS) | st.integers(-3, 2000).map(str) | st.floats(-1, 2).map(str)
    value = numbers | numbers | texts | st.sampled_from(flags) | st.sampled_from(paths)
    flag = st.sampled_from(flags) | st.sampled_from(flags) | st.sampled_from(likely) | st.sampled_from(unknown)

    @st.composite
    def group(draw):
        name = draw(flag)
        if name == "--env-id":
            values = [draw(env_ids() | st.sampled_from(ENV_IDS) | value)]
        elif name == "--layer-weights":
            values = draw(st.lists(numbers, min_size=2, max_size=5) | st.lists(value, max_size=6))
        elif name in ("--resume", "--evaluate"):
            values = [draw(st.sampled_from(paths) | texts)]
        else:
            values = draw(st.tuples(value).map(list) | st.tuples(numbers).map(list) | st.lists(value, max_size=2))
        if values and draw(st.integers(0, 7)) == 0:
            name, values = f"{name}={values[0]}", values[1:]
        return draw(st.sampled_from([[name, *values]] * 9 + [[*values]]))

    return st.lists(group(), min_size=1, max_size=4).map(lambda groups: sum(groups, []))


FROM_1 = "total_timesteps num_envs episode_limit log_interval hidden_size num_critics history_length buffer_size"
FROM_1 += " batch_size train_interval updates_per_round policy_freq n_step rollout_steps num_epochs num_minibatches"
TO_1 = "gamma polyak gae_lambda value_norm_beta actor_reset_ratio"
ABOVE_0 = "clip huber_delta max_grad_norm output_gain threshold_eps"
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "sharing": ("kaleidoscope", "full", "none"),
    "ensemble_value": ("mean", "min"),
}


def check_accepted(args):
    """What holds for all arguments that parse_args lets through, said in another way than there."""
    values = dataclasses.asdict(args)
    for field in dataclasses.fields(args):
        name, value = field.name, values[field.name]
        if name in ("resume", "evaluate", "wandb_entity"):
            assert value is None or type(value) is str
        elif name == "agent_obsk" and value is None:
            pass
        elif name in CHOICES:
            assert value in CHOICES[name]
        elif name == "layer_weights":
            assert type(value) is tuple and len(value) == len(field.default)
            assert all(type(weight) is float and 0 <= weight < math.inf for weight in value)
        else:
            kind = type(field.default) if field.default is not None else re.match(r"\w+", str(field.type))[0]
            assert getattr(kind, "__name__", kind) == type(value).__name__, name
        if type(value) is float:
            assert math.isfinite(value), name
            assert value >= 0 or name.endswith("threshold_bias"), name
            assert value <= 1 or name not in TO_1.split(), name
            assert value > 0 or name not in ABOVE_0.split(), name
        if type(value) is int:
            assert (name in FROM_1.split()) <= value <= (2**32 - 1 if name == "seed" else 2**31 - 1), name
    assert re.fullmatch(r"[\w.+-]+", args.exp_name) and os.sep not in args.exp_name
    many = re.fullmatch("manyagent_(ant|swimmer)-[1-9][0-9]?x[1-9][0-9]?", args.env_id)
    assert args.env_id in GOOD_IDS or many
    assert not args.render or args.evaluate is not None
    assert args.evaluate is None or (args.resume is None and args.eval_episodes >= 1)
    if "buffer_size" in values:
        assert args.num_envs <= args.buffer_size and args.warmup_steps < args.total_timesteps
        assert args.batch_size <= args.warmup_steps and args.batch_size <= args.buffer_size
    else:
        assert args.num_minibatches <= args.rollout_steps * args.num_envs


@pytest.fixture(scope="module")
def paths(checkpointed, tmp_path_factory):
    """What --resume and --evaluate may be pointed at; only the first is right, and for --resume only."""
    _, run_folder, content = checkpointed
    folder = tmp_path_factory.mktemp("paths")
    names = ["empty", "no_checkpoint", "junk", "cut", "folder", "other"]
    for name in names:
        (folder / name).mkdir()
    (folder / "empty" / "checkpoint.pt").touch()
    (folder / "junk" / "checkpoint.pt").write_bytes(bytes(range(256)) * 99)
    (folder / "cut" / "checkpoint.pt").write_bytes(content[:-1000])
    (folder / "folder" / "checkpoint.pt").mkdir()
    torch.save({"format": 1, "args": {}}, folder / "other" / "checkpoint.pt")
    wrong = [folder / name for name in names] + [folder / name / "checkpoint.pt" for name in names]
    wrong += [run_folder / "checkpoint.pt", folder / "gone", folder / "gone" / ("x" * 300), f"{folder}/\udcff"]
    wrong += [
        "",
        ".",
        "..",
        "/",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "~",
        "a\0b",
        "é\n",
        "x" * 5000,
        "/x" * 5000,
    ]
    return [str(run_folder), *map(str, wrong)]


def test_command_lines(checkpointed, paths, tmp_path, monkeypatch):
    script, *_ = checkpointed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "MaMuJoCoVecEnv", None)
    counts = {"accepted": 0, "refused": 0, "evaluated": 0}

    @settings(max_examples=600, derandomize=True, deadline=None, database=None)
    @given(command_lines(script, paths))
    def check(argv):
        start = time.process_time()
        got = outcome(script.parse_args, argv)
        if {"-h", "--help"} & set(argv) and got.code == 0:
            return
        if got.code == 0:
            assert not got.err and ("--total-timesteps is" in got.out if got.out else True)
            check_accepted(got.result[0])
            counts["accepted"] += 1
            if got.result[0].evaluate is not None:
                got = main(script, argv)
                assert refused(got), got
                counts["evaluated"] += 1
        else:
            assert refused(got), got
            counts["refused"] += 1
        assert time.process_time() - start < 2
        assert not os.listdir(tmp_path), "a command line left files behind"

    check()
    assert counts["accepted"] > 20 and counts["refused"] > 400 and counts["evaluated"] > 0, counts


# ---- What no memory holds ----
SMALL = dict(device="cpu", num_envs=2, eval_episodes=0, hidden_size=8, total_timesteps=2000, num_threads=1)
SMALL_MATD3 = SMALL | dict(buffer_size=2000, batch_size=100, warmup_steps=1000)
HUGE = 2**31 - 1
SIZES = {
    "matd3": [
        dict(num_envs=10**7, buffer_size=10**7),
        dict(num_envs=HUGE, buffer_size=HUGE),
        dict(num_envs=10**5, buffer_size=10**5, num_threads=HUGE),
        dict(hidden_size=10**5),
        dict(hidden_size=HUGE),
        dict(num_critics=10**8),
        dict(num_critics=HUGE),
        dict(buffer_size=10**9, total_timesteps=10**9),
        dict(buffer_size=HUGE, batch_size=HUGE - 1, warmup_steps=HUGE - 1, total_timesteps=HUGE),
        dict(n_step=HUGE),
        dict(history_length=HUGE),
        dict(history_length=HUGE, policy_freq=HUGE),
        dict(eval_episodes=10**8),
        dict(eval_episodes=HUGE),
    ],
    "mappo": [
        dict(num_envs=10**7),
        dict(num_envs=HUGE),
        dict(hidden_size=10**5),
        dict(hidden_size=HUGE),
        dict(num_critics=10**8),
        dict(rollout_steps=10**8),
        dict(rollout_steps=HUGE, num_minibatches=HUGE),
        dict(rollout_steps=HUGE, num_envs=HUGE),
        dict(history_length=HUGE),
        dict(eval_episodes=10**8),
        dict(eval_episodes=HUGE),
    ],
}


@contextlib.contextmanager
def little_memory(room=2 * 2**30):
    """Within it, the process may take so many bytes of address space more than it has."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("name,sizes", [(name, sizes) for name in SIZES for sizes in SIZES[name]], ids=str)
def test_sizes_that_no_memory_holds(name, sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = (SMALL_MATD3 if name == "matd3" else SMALL) | sizes
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    start = time.process_time()
    with little_memory():
        got = main(SCRIPTS[name], argv)
    assert refused(got), got
    assert time.process_time() - start < 5
    assert not os.listdir(tmp_path), "a refused run left files behind"


TOO_LARGE_TO_LEARN = {  # can be made, and then lack memory in the first update
    "matd3": dict(
        env_id="Hopper-v2-3x1", num_envs=100, buffer_size=10_000, warmup_steps=10_000, batch_size=10_000, n_step=10_000
    ),
    "mappo": dict(env_id="Hopper-v2-3x1", num_envs=100, rollout_steps=200, hidden_size=400),
}


def learn_in_little_memory(name, sizes, folder):
    flags = (SMALL_MATD3 if name == "matd3" else SMALL) | dict(total_timesteps=200_000, log_interval=1) | sizes
    argv = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()] + ["--save-model"]
    with contextlib.chdir(folder), little_memory(room=2**28):
        return main(SCRIPTS[name], argv)


@pytest.mark.parametrize("name", SCRIPTS)
def test_sizes_that_no_memory_holds_in_the_first_update(name, tmp_path):
    got = learn_in_little_memory(name, TOO_LARGE_TO_LEARN[name], tmp_path)
    assert got.code == 2 and "Traceback" not in got.err, got
    (line,) = [line for line in got.err.splitlines() if "error:" in line]
    assert "error: memory ended before anything was learnt (" in line and line.endswith("), expected smaller sizes")
    assert not list((tmp_path / "runs").iterdir()), "a refused run left files behind"


@pytest.mark.parametrize("log_interval", [1, 10**6])  # losses are logged, or there is a model only
def test_memory_that_ends_later(log_interval, tmp_path, monkeypatch):
    learner = kalei_matd3_mamujoco.Learner
    sizes = dict(updates_per_round=20, eval_interval=1, log_interval=log_interval)
    update = learner.update

    def update_and_want_more(self, *arguments, **options):
        self.updates = getattr(self, "updates", 0) + 1
        torch.empty(2**self.updates)
        return update(self, *arguments, **options)

    monkeypatch.setattr(learner, "update", update_and_want_more)
    got = learn_in_little_memory("matd3", sizes, tmp_path)
    assert got.code == 1 and "Traceback" not in got.err, got
    (line,) = [line for line in got.err.splitlines() if "error:" in line]
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert "error: memory ended (" in line and line.endswith(f"; what was saved in runs/{run_folder.name} stays")
    assert "model.pt" in {path.name for path in run_folder.iterdir()}


# ---- Checkpoints of other bytes ----
def same(a, b):
    """Whether two trees of dicts, lists, tensors and plain values are the same bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
    return repr(a) == repr(b)


def other_bytes(content):
    """Strategy of what may become of a file: bytes of `content` flipped, cut off, inserted, dropped, swapped."""
    size = len(content)
    landmarks = [match.start() for match in re.finditer(b"PK|archive/", content)]  # headers, where most can go wrong
    (pickle,) = (match.start() for match in itertools.islice(re.finditer(b"\x80\x02}q", content), 1))
    anywhere = st.integers(0, size - 1)
    near = st.builds(
        lambda start, offset: min(start + offset, size - 1), st.sampled_from(landmarks), st.integers(0, 50)
    )
    inside = st.integers(pickle, min(pickle + 8000, size - 1))
    position = anywhere | near | inside
    length = st.integers(1, 9) | st.integers(1, size)
    junk = st.binary(min_size=1, max_size=40) | length.map(lambda n: content[:n]) | length.map(bytes)

    @st.composite
    def change(draw):
        kind = draw(st.sampled_from(["flip"] * 4 + ["cut", "insert", "drop", "swap", "prefix", "suffix", "repeat"]))
        if kind == "flip":
            new = bytearray(content)
            for at in draw(st.lists(position, min_size=1, max_size=8, unique=True)):
                new[at] ^= draw(st.integers(1, 255) | st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128, 255]))
            return bytes(new)
        if kind == "cut":
            return content[: draw(position)]
        if kind == "prefix":
            return draw(junk) + content
        if kind == "suffix":
            return content + draw(junk)
        at, width = draw(position), draw(length)
        if kind == "insert":
            return content[:at] + draw(junk) + content[at:]
        if kind == "drop":
            return content[:at] + content[at + width :]
        if kind == "repeat":
            return content[: at + width] + content[at:]
        to = draw(position)
        at, to = min(at, to), max(at, to)
        width = min(width, to - at)
        return (
            content[:at]
            + content[to : to + width]
            + content[at + width : to]
            + content[at : at + width]
            + content[to + width :]
        )

    return change()


def test_checkpoints_of_other_bytes(checkpointed, tmp_path, monkeypatch):
    script, run_folder, content = checkpointed
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "checkpoint.pt"
    path.write_bytes(content)
    original = experiment.read_checkpoint(str(folder), script.Args)
    counts = {"same": 0, "refused": 0, "main": 0}

    @settings(max_examples=1000, derandomize=True, deadline=None, database=None)
    @given(other_bytes(content))
    def check(changed):
        path.write_bytes(changed)
        start = time.process_time()
        got = outcome(experiment.read_checkpoint, str(folder), script.Args)
        if got.code == 0:
            assert same(got.result, original), "read something else"
            assert not got.out and not got.err
            counts["same"] += 1
        else:
            assert refused(got) and str(path) in got.err, got
            counts["refused"] += 1
            if counts["refused"] % 20 == 0:
                assert main(script, ["--resume", str(folder)])[:3] == got[:3]
                counts["main"] += 1
        assert time.process_time() - start < 2
        assert (
            path.read_bytes() == changed and os.listdir(folder) == ["checkpoint.pt"] and os.listdir(tmp_path) == ["run"]
        )

    check()
    assert counts["refused"] > 900 and counts["main"] > 40, counts
