"""What both scripts do alike: the same seed gives the same run, models load or are refused, agents see a part."""

import itertools
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from run_scripts import TINY_MAPPO, TINY_MATD3, curves, one_line, run_main, run_process, scalars

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3
from experiment import checkpoints, saved_models
from experiment.code_identity import identity
from experiment.run_folder import print_outcome

TINY = {matd3: TINY_MATD3.split(), mappo: TINY_MAPPO.split()}
each_script = pytest.mark.parametrize("script", [matd3, mappo], ids=["matd3", "mappo"])
each_sharing = pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])


def make_learner(script, **flags):
    args = script.parse_args([])[0]
    for name, value in (dict(hidden_size=16) | flags).items():
        setattr(args, name, value)
    high = np.ones((3, 2), np.float32)
    return script.Learner(7, -high, high, args, torch.device("cpu"))


@each_script
@pytest.mark.parametrize("sharing", ["kaleidoscope", "none"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(script, sharing, tmp_path):
    models, logs = [], []
    for name, seed, run in (("a", 3, run_main), ("b", 3, run_process), ("c", 4, run_main)):
        cwd = tmp_path / name
        cwd.mkdir()
        flags = [*TINY[script], "--sharing", sharing, "--eval-interval", 0, "--seed", seed]
        code, _, err = run(script, "--env-id", "HalfCheetah-v2-2x3", *flags, cwd=cwd)
        assert code == 0, err
        (folder,) = (cwd / "runs").iterdir()
        models.append(torch.load(folder / "model.pt", weights_only=True))
        logs.append(curves(folder))
    learner = torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]
    for network in ("actor", "critic"):
        assert all(torch.equal(value, learner[f"{network}.{key}"]) for key, value in models[2][network].items())
        for key, value in models[0][network].items():
            assert torch.equal(value, models[1][network][key]), key
        differs = [not torch.equal(value, models[2][network][key]) for key, value in models[0][network].items()]
        assert any(differs)
    assert logs[0] == logs[1] != logs[2]


@each_script
def test_speed_is_that_of_the_latest_round(script, tmp_path, monkeypatch):
    """By a clock whose readings are 0, 1, 4, 9, ... milliseconds. MATD3 reads it once in each round of the warm-up."""
    clock = itertools.count()
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: next(clock) ** 2 / 1000))
    flags = ["--env-id", "Hopper-v2-3x1", *TINY[script], "--eval-episodes", 0, "--log-interval", 40]
    code, _, err = run_main(script, *flags, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    first, rounds = (5, 11) if script is matd3 else (0, 16)
    readings = [(first + 2 * number, first + 2 * number + 1) for number in range(rounds)]
    expected = [40_000 / (end**2 - start**2) for start, end in readings]
    assert [value for _, value in scalars(folder)["charts/SPS"]] == pytest.approx(expected, abs=1)  # whole numbers


@each_script
@pytest.mark.parametrize("content", [b"", b"no model", "truncated", "a flipped bit", "foreign", "of the other script"])
def test_evaluating_what_is_not_a_model(script, content, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.pt"
    if content == "foreign":
        checkpoints.write(path, {"weights": torch.zeros(3)})
    elif content == "of the other script":
        model = {"actor": {}, "critic": {}, "args": {"n_step": 5}, "global_step": 0}
        checkpoints.write(path, model | identity((mappo if script is matd3 else matd3).Args))
    elif content in ("truncated", "a flipped bit"):
        saved_models.save_model(str(tmp_path), make_learner(script), 0)
        whole = path.read_bytes()
        flipped = whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]
        path.write_bytes(whole[:-1000] if content == "truncated" else flipped)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", [script.__file__, "--evaluate", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        script.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and str(path) in err, err
    assert path.read_bytes() == before


@each_script
@each_sharing
def test_a_saved_actor_loads_as_it_was_and_not_on_another_task(script, sharing, tmp_path, capsys):
    path, cpu = str(tmp_path / "model.pt"), torch.device("cpu")
    learner = make_learner(script, env_id="Hopper-v2-3x1", sharing=sharing)
    saved_models.save_model(str(tmp_path), learner, 0)
    actor, args = saved_models.load_actor(path, None, cpu, script.Actor, script.Args)
    assert args.env_id == "Hopper-v2-3x1" and args.sharing == sharing
    for name, value in learner.actor.state_dict().items():
        assert torch.equal(actor.state_dict()[name], value), name
    with pytest.raises(SystemExit) as stop:
        saved_models.load_actor(path, "Walker2d-v2-2x3", cpu, script.Actor, script.Args)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and one_line(err) and "Hopper-v2-3x1" in err


@each_script
def test_partial_observations_train_resume_and_evaluate(script, tmp_path):
    flags = ("--env-id", "HalfCheetah-v5-6x1", "--agent-obsk", 1)
    code, out, err = run_main(script, *flags, *TINY[script], cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    model = torch.load(folder / "model.pt")
    assert model["actor"]["layers.0.weight"].shape[-1] == 15, "9 of the state and an id of 6"
    code, out, err = run_main(script, "--resume", folder, "--total-timesteps", 700, cwd=tmp_path)
    assert code == 0, err
    code, out, err = run_main(script, "--evaluate", folder / "model.pt", "--eval-episodes", 2, cwd=tmp_path)
    assert code == 0 and out.startswith("HalfCheetah-v5-6x1: return "), err
    code, out, err = run_main(script, "--resume", folder, "--agent-obsk", 2, "--total-timesteps", 800, cwd=tmp_path)
    assert code == 2 and one_line(err) and "--agent-obsk is 2, expected 1" in err


@each_script
def test_networks_see_what_the_scripts_functions_make_of_a_state(script, monkeypatch):
    """A copy may bring its own functions, such as ones that leave a state of one number as it is."""

    def observe(state, num_agents, columns=None):
        return (state + 2)[..., None, :].expand(*state.shape[:-1], num_agents, 1 + num_agents)

    monkeypatch.setattr(script, "critic_state", lambda state: state + 1)
    monkeypatch.setattr(script, "agent_observations", observe)
    cpu, zeros, no = torch.device("cpu"), np.zeros((4, 3, 2)), np.zeros(4, bool)
    steps = [(np.full((4, 1), 5.0), zeros, np.zeros(4), np.full((4, 1), 7.0), no, no)] * 6
    if script is matd3:
        replay = script.Replay(6, 4, 1, (3, 2), 2, 0.9, cpu)
        replay.add(steps)
        batch = replay.sample(20)
        assert (batch.next_state == 8).all() and (batch.next_obs == 9).all()
    else:
        high, seen = np.ones((3, 2), np.float32), []
        learner = script.Learner(1, -high, high, script.parse_args(["--hidden-size", "16"])[0], cpu)
        learner.critic.register_forward_pre_hook(lambda critic, inputs: seen.append(inputs[0]))
        rollout = script.Rollout(6, 4, 1, (3, 2), cpu)
        rollout.store(steps)
        batch, _ = learner.prepare(rollout)
        assert seen[0].flatten().tolist() == [6.0] * 24 + [8.0] * 24
    assert (batch.state == 6).all() and (batch.obs == 7).all()


@each_script
def test_a_run_seeds_and_closes_its_environments_and_logs_and_evaluates_when_asked(script, tmp_path, monkeypatch):
    made, make_env = [], script.make_env

    def make(args, seed, num_envs):
        made.append((seed, make_env(args, seed, num_envs)))
        return made[-1][1]

    monkeypatch.setattr(script, "make_env", make)
    flags = ["--env-id", "Hopper-v2-3x1", *TINY[script], "--seed", 5, "--log-interval", 80]
    code, _, err = run_main(script, *flags, cwd=tmp_path, block=9)
    assert code == 143, err
    (folder,) = (tmp_path / "runs").iterdir()
    steps = {name: [step for step, _ in scalars(folder)[f"charts/{name}"]] for name in ("updates", "eval_return")}
    # a block has 40 steps, and MATD3's warm-up ends after 200
    assert steps == {"updates": [80, 160, 240, 320] if script is mappo else [240, 320], "eval_return": [320]}
    code, _, err = run_main(script, "--evaluate", folder, "--eval-episodes", 2, cwd=tmp_path)
    assert code == 0, err
    expected = [(5, 4, True), (5, 3, True), (1, 2, True)]
    assert [(seed, envs.num_envs, envs.closed) for seed, envs in made] == expected


@each_script
def test_a_finished_run_says_what_it_leaves_and_how_to_go_on(script, tmp_path, capsys):
    print_outcome(tmp_path, script.Args(), {})
    for time, step in enumerate((900, 1000)):  # by name, the film of step 900 comes last
        (tmp_path / f"evaluation_{step}.gif").touch()
        os.utime(tmp_path / f"evaluation_{step}.gif", (time, time))
    print_outcome(tmp_path, script.Args(save_model=True, eval_episodes=3), {"eval": "1.0 +- 2.0"})
    curves = f"  curves: tensorboard --logdir {tmp_path}"
    expected = [curves, "  return: 1.0 +- 2.0 in 3 episodes", curves, f"    film: {tmp_path}/evaluation_1000.gif"]
    expected += [f"evaluate: python {script.__name__}.py --evaluate {tmp_path}"]
    assert capsys.readouterr().out.splitlines() == expected


def stored_by(script, monkeypatch):
    """A list to which a run adds (state, actions, reward, next_state, terminated, truncated) of all steps it stores."""
    stored, (owner, name) = [], (script.Replay, "add") if script is matd3 else (script.Rollout, "store")
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda store, steps: stored.extend(steps) or own(store, steps))
    return stored


@each_script
def test_a_step_is_stored_with_what_it_led_to_and_the_next_begins_after_the_reset(script, tmp_path, monkeypatch):
    stored = stored_by(script, monkeypatch)
    code, _, err = run_main(script, "--env-id", "Hopper-v2-3x1", *TINY[script], "--eval-episodes", 0, cwd=tmp_path)
    assert code == 0, err

    def starts(states):
        return np.abs(states - [1.25, *[0] * 10]).max(1) <= 5e-3  # upright, as after a reset

    for (_, _, _, next_state, terminated, truncated), (state, *_) in itertools.pairwise(stored):
        ended = terminated | truncated
        assert np.array_equal(state[~ended], next_state[~ended])
        assert starts(state[ended]).all() and not starts(next_state[ended]).any()
    assert all(sum(step[kind].sum() for step in stored) > 2 for kind in (4, 5)), "both kinds of ends"


# Humanoid's bounds are +-0.4, and the second agent's last action is padding
HUMANOID = ["--env-id", "Humanoid-v2-9|8"]


@pytest.mark.parametrize("noise", [0.1, 9.0])
def test_matd3_explores_within_the_bounds(noise, tmp_path, monkeypatch):
    """By an actor that always chooses the middle."""
    stored = stored_by(matd3, monkeypatch)
    monkeypatch.setattr(matd3.Actor, "act", lambda actor, obs, effective: actor.centre.expand(len(obs), -1, -1))
    flags = [*HUMANOID, *TINY[matd3], "--exploration-noise", noise]
    code, _, err = run_main(matd3, *flags, "--eval-episodes", 0, cwd=tmp_path)
    assert code == 0, err
    actions = np.stack([step[1] for step in stored]).reshape(-1, 18)
    assert not actions[:, 17].any()
    warm_up, later = actions[:200, :17], actions[200:, :17]
    assert np.abs(actions).max() <= np.float32(0.4)
    assert abs(warm_up.mean()) < 0.02 and warm_up.std() == pytest.approx(0.4 / 3**0.5, rel=0.05), "uniform"
    if noise < 1:
        assert abs(later.mean()) < 0.004 and later.std() == pytest.approx(0.4 * noise, rel=0.05)
    else:
        assert (later == np.float32(0.4)).mean() > 0.4 and (later == np.float32(-0.4)).mean() > 0.4


def test_mappo_stores_its_policys_actions_and_sends_them_within_the_bounds(tmp_path, monkeypatch):
    stored, sent, make_env = stored_by(mappo, monkeypatch), [], mappo.make_env

    def make(*arguments):
        envs = make_env(*arguments)
        step = envs.step
        envs.step = lambda actions: sent.append(actions) or step(actions)
        return envs

    monkeypatch.setattr(mappo, "make_env", make)
    code, _, err = run_main(mappo, *HUMANOID, *TINY[mappo], "--eval-episodes", 0, cwd=tmp_path)
    assert code == 0, err
    drawn, bounds = np.stack([step[1] for step in stored]), np.full((2, 9), 0.4, np.float32)
    bounds[1, 8] = 0
    assert np.abs(drawn).max() > 1 and np.allclose(sent, np.clip(drawn, -1, 1) * bounds)


def test_every_policy_freqth_update_is_one_of_the_policies_too(tmp_path, monkeypatch):
    seen, update = [], matd3.Learner.update
    monkeypatch.setattr(matd3.Learner, "update", lambda *args: seen.append(args[2]) or update(*args))
    flags = ["--env-id", "Hopper-v2-3x1", *TINY[matd3], "--policy-freq", 3, "--eval-episodes", 0]
    code, _, err = run_main(matd3, *flags, cwd=tmp_path)
    assert code == 0, err
    assert seen == [number % 3 == 0 for number in range(1, 45)]
