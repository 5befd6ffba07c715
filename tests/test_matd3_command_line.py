"""The script as a user runs it: training to a saved model and TensorBoard files, evaluation, and mistakes."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from run_scripts import TINY_MATD3, one_line, run_main, run_process, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kalei_mappo_mamujoco
import kalei_matd3_mamujoco as script
from experiment import command_line, hardware, run_folder, saved_models
from experiment.code_identity import identity

SCRIPT = Path(script.__file__)
TINY = TINY_MATD3.split()


@pytest.fixture(scope="module", params=["Ant-v2-4x2", "Walker2d-v2-6x1", "Humanoid-v2-17x1", "manyagent_swimmer-10x2"])
def trained(request, tmp_path_factory):
    """(env id, run folder, what it printed) of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    code, out, err = run_main(script, "--env-id", request.param, *TINY, cwd=folder)
    assert code == 0, err
    (run_folder,) = (folder / "runs").iterdir()
    return request.param, run_folder, out + err


def test_a_run_logs_all_that_its_page_names(trained):
    env_id, folder, printed = trained
    assert re.fullmatch(re.escape(env_id) + r"__kalei_matd3_mamujoco__1__\d+", folder.name)
    tags = scalars(folder)
    section = (SCRIPT.parent / "docs/kalei_matd3.md").read_text().split("## What is logged")[1].split("\n## ")[0]
    documented = set(re.findall(r"`((?:charts|losses|coefficients|values|masks|resets)/\w+)`", section))
    images = EventAccumulator(str(folder)).Reload().Tags()["images"]
    assert documented == {*tags, *images}
    assert all(math.isfinite(value) for series in tags.values() for _, value in series)
    assert [step for step, _ in tags["charts/eval_return"]] == [320, 600, 640]
    assert tags["charts/updates"][-1] == (600, 4 * (600 - 200) / 40)
    # intervals of 150 and 100 after the warm-up, as long as more than one of them is left before 640
    assert [step for step, _ in tags["resets/actor_weights"]] == [320, 480]
    assert all(value > 0 for _, value in tags["resets/actor_weights"])
    assert tags["resets/critic_member"] == [(320, 0), (400, 1), (520, 2)]
    n_step, policy_freq = script.TUNED.get(env_id, script.UNTUNED)
    assert f"policy_freq {policy_freq}, n_step {n_step}" in printed
    assert "640/640" in printed and "SPS=" in printed
    mean, std = tags["charts/eval_return"][-1][1], tags["charts/eval_return_std"][-1][1]
    assert f"eval={mean:.1f} +- {std:.1f}" in printed
    last = [f"tensorboard --logdir runs/{folder.name}", f"python {SCRIPT.name} --evaluate runs/{folder.name}"]
    assert all(line in printed for line in last), printed[-500:]
    assert f"return: {mean:.1f} +- {std:.1f} in 3 episodes\n" in printed


def test_hyperparameters_are_logged_as_resolved(trained):
    env_id, folder, _ = trained
    events = EventAccumulator(str(folder)).Reload()
    table = events.Tensors("hyperparameters/text_summary")[0].tensor_proto.string_val[0].decode()
    n_step, policy_freq = script.TUNED.get(env_id, script.UNTUNED)
    for row in (f"|env_id|{env_id}|", f"|n_step|{n_step}|", f"|policy_freq|{policy_freq}|", "|batch_size|32|"):
        assert row in table
    for name, value in identity(script.Args).items():
        assert f"|{name}|{value}|" in table
    assert len(re.findall(r"^\|\w+\|.*\|$", table, re.M)) == 3 + len(script.Args.__dataclass_fields__)


def test_a_saved_model_evaluates_as_it_did_in_training(trained, tmp_path):
    env_id, folder, _ = trained
    run = run_process if env_id == "Ant-v2-4x2" else run_main  # one will do
    flags = ["--eval-episodes", 3, "--device", "cpu"]
    code, out, err = run(script, "--evaluate", folder / "model.pt", *flags, cwd=tmp_path)
    assert code == 0, err
    mean, std = scalars(folder)["charts/eval_return"][-1][1], scalars(folder)["charts/eval_return_std"][-1][1]
    assert re.fullmatch(rf"{env_id}: return {mean:.1f} \+- {std:.1f} \(std\), length \d+, 3 episodes\n", out), out
    assert not list(tmp_path.iterdir()), "evaluating left files behind"


@pytest.mark.parametrize(("sharing", "critics"), [("full", "kaleidoscope"), ("none", "none")])
def test_agents_without_masks_train_and_evaluate(sharing, critics, tmp_path):
    flags = ["--env-id", "HalfCheetah-v2-2x3", *TINY, "--sharing", sharing, "--critic-sharing", critics]
    code, out, err = run_main(script, *flags, cwd=tmp_path)
    assert code == 0, err
    assert f"sharing {sharing}" in out
    (folder,) = (tmp_path / "runs").iterdir()
    tags = scalars(folder)
    assert all(math.isfinite(value) for series in tags.values() for _, value in series)
    assert not [tag for tag in tags if tag.startswith(("masks/actor", "resets/actor"))], "there are no masks"
    assert ("masks/critic_difference" in tags) == ("resets/critic_member" in tags) == (critics != "none")
    assert all(value == 0 for _, value in tags["losses/actor_diversity"])
    mean = tags["charts/eval_return"][-1][1]
    flags = ["--eval-episodes", 3, "--device", "cpu"]
    code, out, err = run_main(script, "--evaluate", folder / "model.pt", *flags, cwd=tmp_path)
    assert code == 0 and f"return {mean:.1f} " in out, err


class EpisodesOfChosenLength:
    """Stands in for environments. Episodes of environment i have length i + 1; each step gives 1, later episodes 2."""

    def __init__(self, num_envs):
        self.num_envs, self.length, self.episode_limit = num_envs, np.zeros(num_envs), 1000

    def reset(self, seed):
        self.seed, self.length[:], self.reward = seed, 0, np.ones(self.num_envs)
        return np.zeros((self.num_envs, 3, 10), np.float32), {}

    def step(self, actions):
        assert actions.shape == (self.num_envs, 3, 2) and np.isfinite(actions).all()
        self.length += 1
        ended = self.length > np.arange(self.num_envs)
        episode = {"r": self.length * self.reward, "l": self.length.copy()}
        infos = {"episode": episode, "_episode": ended} if ended.any() else {}
        self.length[ended], self.reward[ended] = 0, 2
        return np.zeros((self.num_envs, 3, 10), np.float32), None, None, None, infos

    def close(self):
        pass


def test_evaluation_counts_one_episode_of_every_environment(make_learner):
    envs = EpisodesOfChosenLength(6)
    watched = []
    returns, lengths = script.evaluate(make_learner().actor, envs, 7, lambda: watched.append(envs.length.copy()))
    assert returns.tolist() == lengths.tolist() == [1, 2, 3, 4, 5, 6], "short episodes must not count twice"
    assert envs.seed == 1_000_007
    assert [length.tolist() for length in watched] == [[0.0] * 6], "environment 0's first episode has one step"


MISTAKES_MATD3 = {
    "--env-id Ant-v2-3x3": "3x3",
    "--env-id Spot-v2-4x2": "Spot-v2-4x2",
    "--env-id manyagent_swimmer-0x2": "0x2",
    "--env-id Ant-v2-4x2\n": "Ant-v2-4x2",
    "--num-envs 0": "--num-envs is 0",
    "--episode-limit 0": "--episode-limit is 0, expected at least 1",
    "--agent-obsk -1": "--agent-obsk is -1, expected at least 0",
    "--seed -1": "--seed is -1",
    "--seed 4294967296": "--seed is 4294967296, expected from 0 to 4294967295",
    "--num-threads -1": "--num-threads is -1",
    "--buffer-size 0": "--buffer-size is 0",
    "--buffer-size 1000000000000 --total-timesteps 1000000000000": "expected at most the",
    "--updates-per-round 0": "--updates-per-round is 0",
    "--gamma 2": "--gamma is 2.0, expected from 0 to 1",
    "--gamma nan": "--gamma is nan, expected from 0 to 1",
    "--polyak -0.1": "--polyak is -0.1",
    "--actor-reset-ratio 50": "--actor-reset-ratio is 50.0",
    "--critic-reset-interval -3": "--critic-reset-interval is -3, expected at least 0",
    "--actor-lr -1": "--actor-lr is -1.0",
    "--layer-weights 1 -2 4": "--layer-weights is -2.0, expected at least 0",
    "--eval-episodes -1": "--eval-episodes is -1, expected at least 0",
    "--eval-episodes 0 --capture-video": "--eval-episodes is 0, expected at least 1 beside",
    "--eval-episodes 0 --evaluate model.pt": "--eval-episodes is 0, expected at least 1 beside",
    "--n-step 0": "--n-step is 0",
    "--policy-freq 0": "--policy-freq is 0",
    "--num-critics 0": "--num-critics is 0",
    "--train-interval 0": "--train-interval is 0",
    "--batch-size 10501": "10500 transitions",
    "--warmup-steps 0": "--batch-size is 1000, expected at most the 500 transitions",
    "--batch-size 600 --buffer-size 500": "500 transitions",
    "--total-timesteps 9999": "--total-timesteps is 9999",
    "--total-timesteps 10000": "--total-timesteps is 10000",
    "--evaluate no/such/model.pt": "no/such/model.pt",
    "--resume no/such/run": "no/such/run",
    "--nstep 5": "--nstep is no flag of this script, expected --n-step (see --help)",
    "junk --seed 1": "'junk' is no flag of this script, expected --FLAG VALUE (see --help)",
    "--qqq": "--qqq is no flag of this script, expected another one (see --help)",
    "--no-gamma": "--no-gamma is no flag of this script, expected --gamma (see --help)",
    "--n-step many": "--n-step is 'many', expected an integer or None",
    "--total-timesteps 1e6 --save-model": "--total-timesteps is '1e6', expected an integer",
    "--total_timesteps=1e6": "--total_timesteps is '1e6', expected an integer",
    "--save-model --seed 1 2": "--seed is '1 2', expected an integer",
    "--n-step": "--n-step has no value, expected an integer or None",
    "--n-step --seed 1": "--n-step has no value, expected an integer or None",
    "--save-model yes": "--save-model is 'yes', expected no value",
    "--no-save-model yes": "--no-save-model is 'yes', expected no value",
    "--device tpu": "--device is 'tpu', expected auto or cpu or cuda",
    "--gamma half": "--gamma is 'half', expected a number",
    "--layer-weights 1 2": "--layer-weights is '1 2', expected 3 values, each a number",
    "--layer-weights 1 2 x": "--layer-weights is '1 2 x', expected 3 values, each a number",
}


MISTAKES_MAPPO = {
    "--env-id Ant-v2-3x3": "3x3",
    "--env-id Spot-v2-4x2": "Spot-v2-4x2",
    "--num-envs 0": "--num-envs is 0",
    "--seed -1": "--seed is -1",
    "--total-timesteps -5": "--total-timesteps is -5, expected at least 1",
    "--gamma 1.5": "--gamma is 1.5, expected from 0 to 1",
    "--gae-lambda -0.5": "--gae-lambda is -0.5",
    "--lr nan": "--lr is nan, expected at least 0",
    "--sharing none --log-std shared": "--log-std is shared, expected agent beside --sharing none",
    "--clip 0": "--clip is 0.0, expected more than 0",
    "--output-gain 0": "--output-gain is 0.0, expected more than 0",
    "--threshold-eps 0": "--threshold-eps is 0.0, expected more than 0",
    "--value-norm-beta 1": "--value-norm-beta is 1.0, expected at least 0 and below 1",
    "--eval-episodes 0 --render": "--eval-episodes is 0, expected at least 1 beside",
    "--num-epochs 0": "--num-epochs is 0",
    "--rollout-steps 0": "--rollout-steps is 0",
    "--num-minibatches 0": "--num-minibatches is 0",
    "--num-minibatches 9 --num-envs 4 --rollout-steps 2": "8 steps of a rollout",
    "--deque-len 0": "--deque-len is 0",
    "--evaluate no/such/model.pt": "no/such/model.pt",
    "--resume no/such/run": "no/such/run",
    "--nepochs 5": "--nepochs is no flag of this script, expected --num-epochs (see --help)",
    "--num-epochs many": "--num-epochs is 'many', expected an integer",
    "--clip": "--clip has no value, expected a number or None",
    "--sharing some": "--sharing is 'some', expected kaleidoscope or full or none",
    "--num-critics 5": "--num-critics is no flag of this script",
    "--lr-schedule maybe": "--lr-schedule is 'maybe', expected constant or linear or None",
    "--layer-weights 1 2 4": "--layer-weights is '1 2 4', expected 4 values, each a number",
}
MISTAKES = {  # {(script, its flags): what it must say}
    (module, arguments): expected
    for module, mistakes in ((script, MISTAKES_MATD3), (kalei_mappo_mamujoco, MISTAKES_MAPPO))
    for arguments, expected in mistakes.items()
}


@pytest.mark.parametrize(("module", "arguments"), MISTAKES)
def test_mistakes_end_with_exit_code_2_before_anything_is_made(module, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "Learner", None)
    monkeypatch.setattr(module, "StopSignals", lambda: None)  # the tests' own handlers stay
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments.split(" ")])
    with pytest.raises(SystemExit) as stop:
        module.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out, err
    assert MISTAKES[module, arguments] in err and one_line(err), err
    assert not list(tmp_path.iterdir()), "a refused run left files behind"


NAMES = {  # flags of CleanRL and HARL, and what either script says to them
    "--learning-rate 3e-4": ("--actor-lr or --critic-lr", "--lr"),
    "--learning_rate=3e-4": ("--actor-lr or --critic-lr", "--lr"),
    "--num-steps 5": ("--train-interval", "--rollout-steps"),
    "--update-epochs 5": ("--updates-per-round", "--num-epochs"),
    "--clip-coef 0.2": (None, "--clip"),
    "--ent-coef 0": (None, "--entropy-coef"),
    "--tau 0.1": ("--polyak", None),
    "--learning-starts 5": ("--warmup-steps", None),
    "--n-rollout-threads 5": ("--num-envs", "--num-envs"),
    "--num-env-steps 5": ("--total-timesteps", "--total-timesteps"),
    "--no-cuda": ("--device", "--device"),
    "--wandb-project-name x": ("--track", "--track"),
    "--scenario Ant-v2": ("--env-id", "--env-id"),
    "--agent_conf 4x2": ("--env-id", "--env-id"),
    "--ppo_epoch 5": (None, "--num-epochs"),
}


@pytest.mark.parametrize("arguments", NAMES)
@pytest.mark.parametrize("algorithm", [script, kalei_mappo_mamujoco])
def test_flags_of_other_projects_are_led_to_ours(algorithm, arguments, capsys):
    expected = NAMES[arguments][algorithm is kalei_mappo_mamujoco]
    with pytest.raises(SystemExit) as stop:
        algorithm.parse_args(arguments.split())
    err = capsys.readouterr().err
    flag = re.match("[a-z_-]+", arguments)[0]
    assert stop.value.code == 2 and flag in err
    assert expected is None or one_line(err) and f"{flag} is no flag of this script, expected {expected} (" in err, err


@pytest.mark.parametrize("algorithm", [script, kalei_mappo_mamujoco])
def test_what_tyro_takes_is_taken(algorithm, capsys):
    layers = [str(weight) for weight in algorithm.Args.layer_weights]
    flags = ["--track", "--no-track", "--num_envs=5", "--exp-name", "tau", "--exp-name=--lr", "--gamma", ".5"]
    flags += ["--layer_weights", *layers, "--layer-weights=1", *layers[1:], "--agent-obsk", "None", "--sharing=full"]
    flags += ["--total-timesteps", "1_000_000", "--actor-threshold-bias", "-3", "--seed", "1", "--seed", "2"]
    assert command_line.check_flag_names(flags, algorithm.Args) is flags
    args = tyro.cli(algorithm.Args, args=flags)
    assert (args.num_envs, args.exp_name, args.total_timesteps, args.agent_obsk) == (5, "--lr", 1_000_000, None)
    own = dataclasses.make_dataclass("Args", [("polyak", float, 0.1), ("tau", float, 0.1)])
    flags = ["--tau", "1"]  # a flag of CleanRL, and of this script as well
    assert command_line.check_flag_names(flags, own) is flags
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("algorithm", [script, kalei_mappo_mamujoco])
def test_every_number_of_a_script_has_a_range(algorithm):
    flags = dataclasses.fields(algorithm.Args)
    numbers = {flag.name for flag in flags if re.search(r"\b(int|float)\b", str(flag.type))}
    checked = {name for _, names in command_line.RANGES.values() for name in names.split()}
    assert numbers <= checked


def test_the_memory_that_is_asked_for_is_what_the_buffer_takes(tmp_path, monkeypatch):
    asked, taken = [], []

    class Counted(script.Replay):
        def __init__(self, *shapes):
            super().__init__(*shapes)
            taken.append(sum(x.nbytes for x in vars(self).values() if isinstance(x, torch.Tensor) and x.ndim > 1))

    monkeypatch.setattr(script, "require_memory", lambda what, needed, device: asked.append(needed))
    monkeypatch.setattr(script, "Replay", Counted)
    code, _, err = run_main(script, "--env-id", "Humanoid-v2-9|8", *TINY, cwd=tmp_path, block=1)
    assert code == 143 and len(asked) == 1, err
    assert asked == taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", [script, kalei_mappo_mamujoco])
def test_cuda_where_there_is_none(module, tmp_path):
    code, out, err = run_main(module, "--device", "cuda", cwd=tmp_path)
    assert code == 2 and one_line(err) and "--device is cuda" in err and not out
    assert not list(tmp_path.iterdir())


def test_an_unknown_flag_in_a_process_of_its_own(tmp_path):
    code, out, err = run_process(script, "--total-timestep", 5, cwd=tmp_path)
    assert code == 2 and one_line(err) and "expected --total-timesteps (see --help)" in err and not out
    assert not list(tmp_path.iterdir())


def test_a_copy_is_named_after_itself(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT.read_text())
    code, _, err = run_process("mine.py", "--env-id", "Hopper-v2-3x1", *TINY, "--eval-episodes", 0, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("Hopper-v2-3x1__mine__1__")


def test_runs_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("mine")
    code, _, err = run_main(script, *TINY, cwd=tmp_path)
    assert code == 2 and one_line(err) and "runs" in err
    assert (tmp_path / "runs").read_text() == "mine"


def test_runs_is_not_writable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY])
    monkeypatch.setattr(script, "StopSignals", lambda: None)  # the tests' own handlers stay

    def refuse(path, **kwargs):  # root may write everywhere, so permissions alone would not do
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and "Permission denied" in err


def test_two_runs_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "time", lambda: 1000.0)
    args = script.Args(env_id="Humanoid-v2-9|8", exp_name="a/b")
    folders = [run_folder.make_run_folder(args) for _ in range(3)]
    assert [folder[-4:] for folder in folders] == ["1000", "1001", "1002"]
    assert all(os.path.isdir(folder) and "/Humanoid-v2-9_8__a_b__1__" in folder for folder in folders)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_evaluating_what_has_no_end(kind, tmp_path):
    path = tmp_path / "model.pt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    code, out, err = run_main(script, "--evaluate", path, cwd=tmp_path)
    assert code == 2 and one_line(err) and str(path) in err and "not as it was written" in err, err


def test_a_model_is_evaluated_on_its_own_task_or_refused(trained, tmp_path):
    """The default's name counts as any other: it is not what a model of another task was trained on."""
    env_id, folder, _ = trained
    flags = ("--evaluate", folder / "model.pt", "--eval-episodes", 1, "--device", "cpu")
    for other in {"Ant-v2-4x2", "HalfCheetah-v2-2x3", "Hopper-v2-3x1"} - {env_id}:
        code, out, err = run_main(script, *flags, "--env-id", other, cwd=tmp_path)
        assert code == 2 and one_line(err) and other in err and env_id in err and not out
    for own in ((), ("--env-id", env_id)):
        code, out, err = run_main(script, *flags, *own, cwd=tmp_path)
        assert code == 0 and out.startswith(f"{env_id}: return "), err


def test_a_model_is_evaluated_with_its_own_flags_or_refused(trained, tmp_path):
    _, folder, _ = trained
    evaluate = ("--evaluate", folder / "model.pt", "--eval-episodes", 1, "--device", "cpu")
    for flag, other, own in (
        ("--episode-limit", 20, 30),
        ("--sharing", "full", "kaleidoscope"),
        ("--agent-obsk", 1, None),
    ):
        code, out, err = run_main(script, *evaluate, flag, other, cwd=tmp_path)
        assert code == 2 and one_line(err) and f"{flag} is {other}, expected {own} beside --evaluate" in err and not out
    code, out, err = run_main(script, *evaluate, "--episode-limit", 30, "--hidden-size", 32, cwd=tmp_path)
    assert code == 0 and "1 episodes" in out, err


@pytest.mark.parametrize(
    ("made", "asked", "native", "expected"),
    [
        ("bfloat16", "auto", True, "bfloat16"),
        ("bfloat16", "auto", False, "float32"),
        ("bfloat16", "float32", True, "float32"),
        ("float32", "auto", True, "float32"),
        ("float32", "bfloat16", True, "bfloat16"),
        ("tf32", "auto", True, "float32"),
    ],
)
def test_evaluation_keeps_the_models_precision_unless_told_otherwise(
    made, asked, native, expected, tmp_path, make_learner, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    saved_models.save_model(str(tmp_path), make_learner(env_id="Hopper-v2-3x1", precision=made), 0)
    used = []

    def make_env(args, seed, num_envs):
        used.append(args.precision)
        return EpisodesOfChosenLength(num_envs)

    def evaluate(actor, envs, seed, watch):
        used.append("bfloat16" if actor.bfloat16 else "no bfloat16")
        return np.ones(1), np.ones(1)

    args, _ = script.parse_args(["--evaluate", str(tmp_path), "--device", "cpu", "--precision", asked])
    saved_models.evaluate_model(args, torch.device("cpu"), script.Actor, make_env, evaluate)
    assert used == [expected, "bfloat16" if expected == "bfloat16" else "no bfloat16"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_flags_win_over_tuned_values():
    assert script.parse_args(["--env-id", "Walker2d-v2-2x3"])[0].n_step == 20
    assert script.parse_args(["--env-id", "Walker2d-v2-2x3"])[0].policy_freq == 8
    assert script.parse_args(["--env-id", "Walker2d-v5-2x3"])[0].n_step == 20
    args = script.parse_args(["--env-id", "Walker2d-v2-2x3", "--n-step", "3"])[0]
    assert (args.n_step, args.policy_freq) == (3, 8)
    args = script.parse_args(["--env-id", "Reacher-v2-2x1"])[0]
    assert (args.n_step, args.policy_freq) == script.UNTUNED


@pytest.mark.parametrize(
    ("module", "explanation"),
    [(script, "std of the noise on target actions"), (kalei_mappo_mamujoco, "Adam's epsilon for thresholds")],
)
def test_help_explains_every_flag(module, explanation, capsys, monkeypatch):
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)  # pytest's own process stays as it is
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for name in module.Args.__dataclass_fields__:
        flag = name.replace("_", "-")
        assert f"  --{flag}" in out or f"  --no-{flag}" in out
    assert explanation in " ".join(out.split()) and "None" not in out
    for heading in ("run:", "environment:", "speed:", "actor: one mask for each agent:", "tuned values of --"):
        assert f"\n{heading}" in out
    assert "--sharing kaleidoscope|full|none " in out and "--agent-obsk int " in out
    assert "  --cudagraph " in out and "[on; --no-cudagraph turns it off]" in " ".join(out.split())
    assert "see --actor-threshold-scale" in " ".join(out.split()) or module is kalei_mappo_mamujoco
    for task, values in module.TUNED.items():
        assert any(line.split()[:1] == [task] and str(values[0]) in line for line in out.splitlines())


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="Windows has no SIGPIPE")
def test_help_into_a_closed_pipe_ends_without_a_traceback():
    """As `--help | head`, and a pager that is left early."""
    command = [sys.executable, script.__file__, "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    """Windows has no os.sysconf."""
    monkeypatch.delattr(os, "sysconf")
    hardware.require_memory("--buffer-size is 1", 10**30, torch.device("cpu"))


def test_learning_may_begin_after_the_first_round(tmp_path):
    flags = [*TINY, "--warmup-steps", 0, "--eval-episodes", 0, "--env-id", "Hopper-v2-3x1", "--log-interval", 40]
    code, _, err = run_main(script, *flags, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert scalars(folder)["losses/critic"][0][0] == 40
