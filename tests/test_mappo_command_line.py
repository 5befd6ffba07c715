"""kalei_mappo_mamujoco.py as a user runs it: training to a saved model and TensorBoard files, and mistakes."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from run_scripts import TINY_MAPPO, run_main, run_process, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kalei_mappo_mamujoco as script
from experiment.code_identity import identity

SCRIPT = Path(script.__file__)
TINY = TINY_MAPPO.split()
METRICS = {
    "charts": "eval_return eval_return_std eval_length episodic_return episodic_length SPS updates unstable_episodes"
    " checkpoint_seconds lr policy_std",
    "losses": "policy value entropy approx_kl clipfrac explained_variance actor_diversity actor_grad_norm"
    " critic_grad_norm",
    "coefficients": "actor",
    "values": "value",
    "masks": "actor_difference " + " ".join(f"actor_sparsity_layer{layer}" for layer in range(1, 5)),
    "resets": "actor_weights",
}


RUNS = [
    ("Ant-v2-4x2", "kaleidoscope"),
    ("HalfCheetah-v2-2x3", "full"),
    ("Walker2d-v2-2x3", "none"),
    ("Humanoid-v2-9|8", "kaleidoscope"),  # with padded actions
    ("Humanoid-v2-9|8", "none"),
]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def trained(request, tmp_path_factory):
    """(env id, sharing, run folder, what it printed) of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    env_id, sharing = request.param
    code, out, err = run_main(script, "--env-id", env_id, "--sharing", sharing, *TINY, cwd=folder)
    assert code == 0, err
    (run_folder,) = (folder / "runs").iterdir()
    return env_id, sharing, run_folder, out + err


def test_a_run_logs_all_there_is(trained):
    env_id, sharing, folder, printed = trained
    assert re.fullmatch(re.escape(env_id.replace("|", "_")) + r"__kalei_mappo_mamujoco__1__\d+", folder.name)
    tags = scalars(folder)
    expected = {f"{group}/{name}" for group, names in METRICS.items() for name in names.split()}
    masked = sharing == "kaleidoscope"
    if masked:
        expected |= {"masks/actor_kept_by_none", "masks/actor_kept_by_all"}
    else:
        expected -= {tag for tag in expected if tag.startswith(("masks/", "resets/"))}
    assert set(tags) == expected
    assert EventAccumulator(str(folder)).Reload().Tags()["images"] == ["masks/actor"] * masked
    assert all(math.isfinite(value) for series in tags.values() for _, value in series)
    # rollouts of 40 steps, the last one whole: 630 is rounded up to 640
    assert [step for step, _ in tags["charts/eval_return"]] == [320, 600, 640]
    assert tags["charts/updates"] == [(step, step / 10) for step in (120, 200, 320, 400, 520, 600)]
    # an interval of 150, as long as more than one is left before 630
    if masked:
        assert [step for step, _ in tags["resets/actor_weights"]] == [160, 320]
        assert all(value > 0 for tag in ("resets/actor_weights", "masks/actor_difference") for _, value in tags[tag])
    assert all((value < 0) == masked for _, value in tags["losses/actor_diversity"])
    assert masked or f"sharing {sharing}" in printed
    assert "rollout_steps 10" in printed and "precision float32" in printed
    assert "640/640" in printed and "SPS=" in printed and "eval=" in printed
    assert f"evaluate: python {SCRIPT.name} --evaluate runs/{folder.name}\n" in printed


def test_hyperparameters_are_logged_as_resolved(trained):
    env_id, sharing, folder, _ = trained
    events = EventAccumulator(str(folder)).Reload()
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    clip = dict(zip(script.TUNED_FLAGS, script.TUNED.get(env_id, script.UNTUNED), strict=True))["clip"]
    for row in (f"|sharing|{sharing}|", f"|clip|{clip}|", "|rollout_steps|10|"):
        assert row in table
    for name, value in identity(script.Args).items():
        assert f"|{name}|{value}|" in table
    assert len(re.findall(r"^\|\w+\|.*\|$", table, re.M)) == 3 + len(script.Args.__dataclass_fields__)


def test_a_saved_model_evaluates_as_it_did_in_training(trained, tmp_path):
    env_id, _, folder, _ = trained
    run = run_process if env_id == "Ant-v2-4x2" else run_main  # one will do
    flags = ["--eval-episodes", 3, "--device", "cpu"]
    code, out, err = run(script, "--evaluate", folder / "model.pt", *flags, cwd=tmp_path)
    assert code == 0, err
    mean, std = scalars(folder)["charts/eval_return"][-1][1], scalars(folder)["charts/eval_return_std"][-1][1]
    expected = f"{env_id}: return {mean:.1f} +- {std:.1f} (std), length "
    assert out.startswith(expected) and out.endswith(", 3 episodes\n"), out
    assert not list(tmp_path.iterdir()), "evaluating left files behind"


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_learning_rates_fall_where_they_are_to_fall(schedule, tmp_path):
    flags = ["--eval-episodes", 0, "--total-timesteps", 150, "--lr-schedule", schedule, "--log-interval", 40]
    code, _, err = run_main(script, "--env-id", "Hopper-v2-3x1", *TINY, *flags, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    tags = scalars(folder)
    factors = [1 - step / 150 * (schedule == "linear") for step in (0, 40, 80, 120)]
    assert [rate for _, rate in tags["charts/lr"]] == pytest.approx([5e-4 * factor for factor in factors])
    assert tags["charts/policy_std"][0][1] == pytest.approx(0.5 / (1 + math.exp(-1)), rel=0.02), "as at the start"


def test_pytorch_has_one_thread_while_it_acts_and_all_while_it_learns(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(script, "log_episodes", lambda *args: used.append("act"))
    update = script.Learner.update
    monkeypatch.setattr(script.Learner, "update", lambda *args: used.append("learn") or update(*args))
    code, _, err = run_main(script, "--env-id", "Hopper-v2-3x1", *TINY, "--eval-episodes", 0, cwd=tmp_path, block=2)
    assert code == 143, err
    assert used == [1, *["act"] * 10, 3, "learn"] * 2


def make_learner(**changes):
    args = script.parse_args([])[0], np.ones((3, 2), np.float32)
    for name, value in (dict(hidden_size=16) | changes).items():
        setattr(args[0], name, value)
    return script.Learner(7, -args[1], args[1], args[0], torch.device("cpu"))


def test_flags_win_over_tuned_values():
    for env_id in ("Walker2d-v2-2x3", "Walker2d-v5-2x3"):
        args = script.parse_args(["--env-id", env_id])[0]
        assert tuple(getattr(args, name) for name in script.TUNED_FLAGS) == (200, 5, 2, 0.05, 0.0, 1e-3, "linear")
    args = script.parse_args(["--env-id", "Walker2d-v2-2x3", "--clip", "0.3", "--lr-schedule", "constant"])[0]
    assert (args.clip, args.lr_schedule, args.num_minibatches) == (0.3, "constant", 2)
    args = script.parse_args(["--env-id", "Reacher-v2-2x1"])[0]
    assert tuple(getattr(args, name) for name in script.TUNED_FLAGS) == script.UNTUNED


def test_standard_deviations_are_per_agent_unless_all_is_shared_or_the_flag_says_otherwise():
    shapes = {
        sharing: make_learner(sharing=sharing).actor.log_std.shape for sharing in ("kaleidoscope", "full", "none")
    }
    assert shapes == {"kaleidoscope": (3, 1, 2), "full": (2,), "none": (3, 1, 2)}
    asked = [("kaleidoscope", "shared"), ("full", "agent")]
    shapes = [make_learner(sharing=sharing, log_std=log_std).actor.log_std.shape for sharing, log_std in asked]
    assert shapes == [(2,), (3, 1, 2)]
