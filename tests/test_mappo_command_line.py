"""kalei_mappo_mamujoco.py as a user runs it: training to a saved model and TensorBoard files, and mistakes."""

import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiment
import kalei_mappo_mamujoco as script

SCRIPT = Path(script.__file__)
# rollouts of 40 steps: crosses time limits in mid-rollout, both resets and two evaluations
TINY = "--device cpu --total-timesteps 630 --num-envs 4 --rollout-steps 10 --num-epochs 2 --num-minibatches 2"
TINY += " --hidden-size 32 --num-critics 3 --eval-interval 300 --eval-episodes 3 --episode-limit 17 --log-interval 100"
TINY += " --actor-reset-interval 150 --critic-reset-interval 100 --actor-threshold-bias 0 --save-model"
TINY += " --checkpoint-interval 300"
TINY = TINY.split()
METRICS = {
    "charts": "eval_return eval_return_std eval_length episodic_return episodic_length SPS updates unstable_episodes"
    " checkpoint_seconds",
    "losses": "policy value entropy approx_kl clipfrac explained_variance actor_diversity critic_diversity",
    "coefficients": "actor critic",
    "values": "value",
    "masks": " ".join(
        f"{network}_{what}"
        for network in ("actor", "critic")
        for what in ("difference", *(f"sparsity_layer{layer}" for layer in range(1, 5)))
    ),
    "resets": "actor_weights critic_member",
}

TIMES = ("charts/SPS", "charts/checkpoint_seconds")  # what differs from run to run


def run(*arguments, cwd):
    """The script in a process of its own, on one thread, as (exit code, stdout, stderr)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "100"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def scalars(run_folder):
    """{tag: [(step, value), ...]} of a run's event files."""
    events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


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
    code, out, err = run("--env-id", env_id, "--sharing", sharing, *TINY, cwd=folder)
    assert code == 0, err
    (run_folder,) = (folder / "runs").iterdir()
    return env_id, sharing, run_folder, out + err


def test_a_run_logs_all_there_is(trained):
    env_id, sharing, folder, printed = trained
    assert re.fullmatch(re.escape(env_id.replace("|", "_")) + r"__kalei_mappo_mamujoco__1__\d+", folder.name)
    tags = scalars(folder)
    expected = {f"{group}/{name}" for group, names in METRICS.items() for name in names.split()}
    masked_networks = ("actor", "critic") if sharing == "kaleidoscope" else ("critic",)
    kept = {f"masks/{network}_kept_by_{who}" for network in masked_networks for who in ("none", "all")}
    assert set(tags) == expected | kept
    assert set(EventAccumulator(str(folder)).Reload().Tags()["images"]) == {f"masks/{name}" for name in masked_networks}
    assert all(math.isfinite(value) for series in tags.values() for _, value in series)
    # rollouts of 40 steps, the last one whole: 630 is rounded up to 640
    assert [step for step, _ in tags["charts/eval_return"]] == [320, 600, 640]
    assert tags["charts/updates"] == [(step, step / 10) for step in (120, 200, 320, 400, 520, 600)]
    # intervals of 150 and 100, as long as more than one of them is left before 630
    assert [step for step, _ in tags["resets/actor_weights"]] == [160, 320]
    assert tags["resets/critic_member"] == [(120, 0), (200, 1), (320, 2), (400, 0), (520, 1)]
    masked = sharing == "kaleidoscope"
    assert all((value > 0) == masked for _, value in tags["resets/actor_weights"])
    assert all((value > 0) == masked for _, value in tags["masks/actor_difference"])
    assert all((value < 0) == masked for _, value in tags["losses/actor_diversity"])
    assert all(value > 0 for _, value in tags["masks/critic_difference"])
    assert f"sharing {sharing}, rollout_steps 10" in printed
    assert "640/640" in printed and "SPS=" in printed and "eval=" in printed


def test_hyperparameters_are_logged_as_resolved(trained):
    env_id, sharing, folder, _ = trained
    events = EventAccumulator(str(folder)).Reload()
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    clip = dict(zip(script.TUNED_FLAGS, script.TUNED.get(env_id, script.UNTUNED), strict=True))["clip"]
    for row in (f"|sharing|{sharing}|", f"|clip|{clip}|", "|rollout_steps|10|"):
        assert row in table
    assert len(re.findall(r"^\|\w+\|.*\|$", table, re.M)) == 1 + len(script.Args.__dataclass_fields__)


def test_a_saved_model_evaluates_in_a_fresh_process(trained, tmp_path):
    env_id, _, folder, _ = trained
    code, out, err = run("--evaluate", folder / "model.pt", "--eval-episodes", 3, "--device", "cpu", cwd=tmp_path)
    assert code == 0, err
    mean, std = scalars(folder)["charts/eval_return"][-1][1], scalars(folder)["charts/eval_return_std"][-1][1]
    expected = f"{env_id}: return {mean:.1f} +- {std:.1f} (std), length "
    assert out.startswith(expected) and out.endswith(", 3 episodes\n"), out
    assert not list(tmp_path.iterdir()), "evaluating left files behind"


@pytest.mark.parametrize("sharing", ["kaleidoscope", "none"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(sharing, tmp_path):
    models, logs = [], []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cwd = tmp_path / name
        cwd.mkdir()
        code, _, err = run("--env-id", "HalfCheetah-v2-2x3", "--sharing", sharing, *TINY, "--seed", seed, cwd=cwd)
        assert code == 0, err
        (folder,) = (cwd / "runs").iterdir()
        models.append(torch.load(folder / "model.pt", weights_only=True))
        logs.append({tag: series for tag, series in scalars(folder).items() if tag not in TIMES})
    for network in ("actor", "critic"):
        for key, value in models[0][network].items():
            assert torch.equal(value, models[1][network][key]), key
        differs = [not torch.equal(value, models[2][network][key]) for key, value in models[0][network].items()]
        assert any(differs)
    assert logs[0] == logs[1] != logs[2]


def test_a_single_critic_is_not_reset_and_learning_rates_fall(tmp_path):
    flags = ["--num-critics", 1, "--lr-decay", "True", "--entropy-coef", 0.01]
    code, _, err = run("--env-id", "Hopper-v2-3x1", *TINY, *flags, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    tags = scalars(folder)
    assert "resets/critic_member" not in tags and "resets/actor_weights" in tags
    assert tags["masks/critic_difference"][-1][1] == tags["masks/critic_sparsity_layer4"][-1][1] == 0


MISTAKES = {
    "--nepochs 5": "--nepochs",
    "--num-epochs many": "many",
    "--clip": "--clip",
    "junk": "junk",
    "--device tpu": "tpu",
    "--sharing some": "some",
    "--ensemble-value max": "max",
    "--lr-decay maybe": "maybe",
    "--env-id Ant-v2-3x3": "3x3",
    "--env-id Spot-v2-4x2": "Spot-v2-4x2",
    "--num-epochs 0": "--num-epochs is 0",
    "--rollout-steps 0": "--rollout-steps is 0",
    "--num-minibatches 0": "--num-minibatches is 0",
    "--num-minibatches 9 --num-envs 4 --rollout-steps 2": "8 steps of a rollout",
    "--total-timesteps 0": "--total-timesteps is 0",
    "--clip 0": "--clip is 0",
    "--clip nan": "--clip is nan",
    "--entropy-coef -1": "--entropy-coef is -1",
    "--lr inf": "--lr is inf",
    "--threshold-lr -0.1": "--threshold-lr is -0.1",
    "--threshold-eps 0": "--threshold-eps is 0",
    "--output-gain 0": "--output-gain is 0",
    "--gae-lambda 1.01": "--gae-lambda is 1.01",
    "--gamma nan": "--gamma is nan",
    "--value-norm-beta 1": "--value-norm-beta is 1",
    "--actor-reset-ratio 1.5": "--actor-reset-ratio is 1.5",
    "--actor-threshold-bias inf": "--actor-threshold-bias is inf",
    "--num-envs 0": "--num-envs is 0",
    "--num-critics 0": "--num-critics is 0",
    "--seed -1": "--seed is -1",
    "--eval-episodes -1": "--eval-episodes is -1",
    "--layer-weights 1 2 4": "--layer-weights",
    "--layer-weights 1 2 4 nan": "--layer-weights is",
    "--exp-name a/b": "--exp-name is a/b",
    "--evaluate no/such/model.pt": "no/such/model.pt",
    "--evaluate model.pt --eval-episodes 0": "--eval-episodes is 0",
}


def one_line(err):
    return len(err.splitlines()) == 1 and err.startswith("error: ")


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_end_in_one_line_before_anything_is_made(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "MaMuJoCoVecEnv", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and one_line(err) and not out, err
    assert MISTAKES[arguments] in err
    assert not list(tmp_path.iterdir()), "a refused run left files behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none_in_a_process_of_its_own(tmp_path):
    code, out, err = run("--device", "cuda", cwd=tmp_path)
    assert code == 2 and one_line(err) and "--device is cuda" in err and not out
    assert not list(tmp_path.iterdir())


def make_learner(**changes):
    args = script.parse_args([])[0], np.ones((3, 2), np.float32)
    for name, value in (dict(hidden_size=16) | changes).items():
        setattr(args[0], name, value)
    return script.Learner(7, -args[1], args[1], args[0], torch.device("cpu"))


@pytest.mark.parametrize("content", [b"", b"no model", "truncated", "a flipped bit", "foreign", "of the other script"])
def test_evaluating_what_is_not_a_model(content, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.pt"
    if content == "foreign":
        experiment.write(path, {"weights": torch.zeros(3)})
    elif content == "of the other script":
        experiment.write(path, {"actor": {}, "critic": {}, "args": {"n_step": 5}, "global_step": 0})
    elif content == "truncated":
        experiment.save_model(str(path), make_learner(), 0)
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "a flipped bit":
        experiment.save_model(str(path), make_learner(), 0)
        whole = path.read_bytes()
        path.write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--evaluate", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and str(path) in err, err
    assert path.read_bytes() == before


@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_a_saved_actor_loads_as_it_was_and_not_on_another_task(sharing, tmp_path, capsys):
    path = str(tmp_path / "model.pt")
    learner = make_learner(env_id="Hopper-v2-3x1", sharing=sharing)
    experiment.save_model(path, learner, 0)
    actor, args = experiment.load_actor(path, None, torch.device("cpu"), script.Actor, script.Args)
    assert args.env_id == "Hopper-v2-3x1" and args.sharing == sharing
    for name, value in learner.actor.state_dict().items():
        assert torch.equal(actor.state_dict()[name], value), name
    with pytest.raises(SystemExit) as stop:
        experiment.load_actor(path, "Walker2d-v2-2x3", torch.device("cpu"), script.Actor, script.Args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and "Hopper-v2-3x1" in err


def test_flags_win_over_tuned_values():
    args = script.parse_args(["--env-id", "Walker2d-v2-2x3"])[0]
    assert tuple(getattr(args, name) for name in script.TUNED_FLAGS) == (200, 5, 2, 0.05, 0.0, 1e-3, True)
    args = script.parse_args(["--env-id", "Walker2d-v2-2x3", "--clip", "0.3", "--lr-decay", "False"])[0]
    assert (args.clip, args.lr_decay, args.num_minibatches) == (0.3, False, 2)
    args = script.parse_args(["--env-id", "Reacher-v2-2x1"])[0]
    assert tuple(getattr(args, name) for name in script.TUNED_FLAGS) == script.UNTUNED


def test_standard_deviations_are_per_agent_unless_all_is_shared(make_learner):
    shapes = {
        sharing: make_learner(sharing=sharing).actor.log_std.shape for sharing in ("kaleidoscope", "full", "none")
    }
    assert shapes == {"kaleidoscope": (3, 1, 2), "full": (2,), "none": (3, 1, 2)}


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name in script.Args.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in out
    for args_class in (script.Args, experiment.RunArgs):
        documented = re.findall(r'^    """.+"""$', inspect.getsource(args_class), re.M)
        assert len(documented) == 1 + len(args_class.__annotations__)


def test_partial_observations_train_resume_and_evaluate(tmp_path):
    flags = ("--env-id", "HalfCheetah-v5-6x1", "--agent-obsk", 1)
    code, out, err = run(*flags, *TINY, cwd=tmp_path)
    assert code == 0, err
    assert "agents see 8 to 9 of 17 numbers, filled up with zeros" in out
    (folder,) = (tmp_path / "runs").iterdir()
    code, out, err = run("--resume", folder, "--total-timesteps", 700, cwd=tmp_path)
    assert code == 0, err
    code, out, err = run("--evaluate", folder / "model.pt", "--eval-episodes", 2, cwd=tmp_path)
    assert code == 0 and out.startswith("HalfCheetah-v5-6x1: return "), err
    code, out, err = run("--resume", folder, "--agent-obsk", 2, "--total-timesteps", 800, cwd=tmp_path)
    assert code == 2 and "--agent-obsk is 2, expected 1" in err
