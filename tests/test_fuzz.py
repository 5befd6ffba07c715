"""Whatever a user types, and whatever becomes of a checkpoint, ends in a run or in exit code 2 and a clear message.

Hypothesis draws the inputs, the same ones every time.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import re
import sys
import time
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_scripts import SignalInBlock

import kalei_mappo_mamujoco
import kalei_matd3_mamujoco
import mamujoco_env
from experiment import checkpoints

SCRIPTS = {"matd3": kalei_matd3_mamujoco, "mappo": kalei_mappo_mamujoco}
# a run of few updates, to be stopped early, with a checkpoint of 60 to 70 kB
TINY = "--device cpu --env-id Hopper-v2-3x1 --num-envs 2 --num-threads 1 --hidden-size 4"
TINY += " --deque-len 2 --episode-limit 15 --eval-episodes 0 --log-interval 20 --checkpoint-interval 1000"
TINY = {
    "matd3": f"{TINY} --num-critics 2 --total-timesteps 120 --warmup-steps 40 --buffer-size 60 --batch-size 8"
    " --train-interval 10 --updates-per-round 2 --policy-freq 1 --n-step 2".split(),
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


class Stop(SignalInBlock):
    """One after which main() returns."""

    def exit(self):
        pass


def main(script, argv, block=math.inf):
    """Outcome of the script's main()."""
    argv = [script.__file__, *argv]
    with mock.patch.object(script, "StopSignals", lambda: Stop(block)), mock.patch.object(sys, "argv", argv):
        return outcome(script.main)


def refused(got):
    """Whether it ended with exit code 2 and a message on stderr: one line of ours, or tyro's box."""
    ours = re.match(r"error: \S", got.err) and len(got.err.splitlines()) == 1 and got.err.endswith("\n")
    return bool(got.code == 2 and not got.out and (ours or "────" in got.err) and "Traceback" not in got.err)


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
    "x" * 300,
    "w" * 20_000,
    "👩‍🚀",
    "\udcff",
    "../x",
    "/",
    "%s",
    "{}",
    "$(id)",
    "`id`",
    "a|b",
    "@file",
    "[red]",
    "--",
]
WORDS += [
    "-",
    "-5",
    "ünï/ço∂e",
    "None",
    "none",
    "True",
    "false",
    "auto",
    "cpu",
    "full",
    "kaleidoscope",
    "mean",
    "agent",
]
GOOD_IDS = [*mamujoco_env.ENV_IDS, "manyagent_swimmer-3x2", "manyagent_ant-10x2"]
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
        new = draw(st.sampled_from(["", "-", "x", "9", "1", "|", "v", " ", "é", "\n", "A"]))
        text = text[:at] + new + text[at + width :]
    return text


def command_lines(script, paths):
    """Lists of arguments: 1 to 4 flags, some unknown, with values that may or may not fit, and bare words."""
    flags = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(script.Args)]
    likely = ["--env-id", "--layer-weights", "--resume", "--evaluate", "--exp-name"]  # more than numbers
    unknown = [
        "--nstep",
        "--gama",
        "--no-gamma",
        "--no-save-model",
        "--no-weighted-diversity",
        "--Gamma",
        "-g",
        "--",
        "-",
    ]
    unknown += ["---", "--=", "--gamma=", "--seed=3", "--env-id=Ant-v2-4x3", "--env_id", "--ünï", "--" + "x" * 500]
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


# how many inputs Hypothesis draws: some by default, and the full size where long tests run too
def sizes(few, many):
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.long)])


@sizes(60, 200)
def test_command_lines(examples, checkpointed, paths, tmp_path, monkeypatch):
    script, *_ = checkpointed
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "Learner", None)
    counts = {"accepted": 0, "refused": 0, "evaluated": 0}

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(command_lines(script, paths))
    def check(argv):
        start = time.process_time()
        got = outcome(script.parse_args, argv)
        if {"-h", "--help"} & set(argv) and got.code == 0:
            return
        if got.code == 0:
            assert not got.err and ("--total-timesteps is" in got.out if got.out else True)
            args, checkpoint = got.result
            assert type(args) is script.Args and (checkpoint is None) == (args.resume is None)
            counts["accepted"] += 1
            if args.evaluate is not None:
                got = main(script, argv)
                assert refused(got), got
                counts["evaluated"] += 1
        else:
            assert refused(got), got
            counts["refused"] += 1
        assert time.process_time() - start < 20  # seconds; `--agent-obsk 1000000000` once took an hour
        assert not os.listdir(tmp_path), "a command line left files behind"

    check()
    assert counts["accepted"] > examples // 30 and counts["refused"] > examples // 2, counts
    assert counts["evaluated"] >= examples // 200, counts


KNOWN = ["Ant-v2-4x2", "Hopper-v5-3x1", "manyagent_swimmer-3x2", "Humanoid-v2-9|8", "Pusher-v5-3p", "Reacher-v2-2x1"]


@sizes(50, 150)
@pytest.mark.parametrize("name", SCRIPTS)
def test_env_ids(name, examples):
    script, counts = SCRIPTS[name], {"made": 0, "refused": 0}

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(env_ids() | st.sampled_from(ENV_IDS) | st.sampled_from(KNOWN))
    def check(env_id):
        got = outcome(script.make_env, script.Args(env_id=env_id, num_threads=1), 1, 1)
        if got.code == 0:
            assert re.fullmatch(r"\w+(-v[25])?-[\dx|dp]+", env_id) and got.result.env_id == env_id
            got.result.close()
        else:
            assert refused(got) and got.err.startswith("error: "), got
        counts["made" if got.code == 0 else "refused"] += 1

    check()
    assert min(counts.values()) >= examples // 8, counts


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


@sizes(100, 1000)
def test_checkpoints_of_other_bytes(examples, checkpointed, tmp_path, monkeypatch):
    script, run_folder, content = checkpointed
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / "checkpoint.pt"
    path.write_bytes(content)
    original = checkpoints.read_checkpoint(str(folder), script.Args)
    counts = {"same": 0, "refused": 0, "main": 0}

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(other_bytes(content))
    def check(changed):
        path.write_bytes(changed)
        start = time.process_time()
        got = outcome(checkpoints.read_checkpoint, str(folder), script.Args)
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
        assert time.process_time() - start < 20  # seconds; `--agent-obsk 1000000000` once took an hour
        assert (
            path.read_bytes() == changed and os.listdir(folder) == ["checkpoint.pt"] and os.listdir(tmp_path) == ["run"]
        )

    check()
    assert counts["refused"] > 0.9 * examples and counts["main"] >= 0.04 * examples, counts
