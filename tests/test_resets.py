"""Resets: which weights, how many, what they become, what they leave alone, and when they are due."""

import copy
import itertools

import pytest
import torch
from run_scripts import run_main, scalars

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as script
from experiment.run_folder import reached


def snapshot(learner):
    state = {name: copy.deepcopy(getattr(learner, name).state_dict()) for name in ("actor", "critic")}
    state |= {name: copy.deepcopy(getattr(learner, name).state_dict()) for name in ("target_actor", "target_critic")}
    for name in ("actor_optimizer", "critic_optimizer"):
        state[name] = copy.deepcopy(getattr(learner, name).state_dict())
    return state


@pytest.fixture
def learner(make_learner, make_batch):
    """A learner whose Adam has moments and whose actor drops many weights everywhere."""
    learner = make_learner(hidden_size=64, actor_threshold_bias=0.0, actor_threshold_scale=4.0)
    for update in range(1, 5):
        learner.update(make_batch(seed=update), with_policy=update % 2 == 0)
    return learner


def test_actor_reset_touches_half_of_the_unused_weights_only(learner):
    before = snapshot(learner)
    unused = [~layer.masks().any(0) for layer in learner.actor.layers]
    num_unused = sum(int(mask.sum()) for mask in unused)
    assert num_unused > 1000, "too few unused weights to judge a share"
    num_reset = script.reset_actor(learner.actor, 0.5)
    changed_in_all = 0
    for index, (layer, mask) in enumerate(zip(learner.actor.layers, unused, strict=True)):
        old = {name: before["actor"][f"layers.{index}.{name}"] for name in ("weight", "bias", "thresholds")}
        changed = layer.weight != old["weight"]
        assert not (changed & ~mask).any(), "a weight that some mask keeps was reset"
        assert torch.equal((layer.thresholds != old["thresholds"]).all(0), changed), "a weight without its thresholds"
        assert torch.equal((layer.thresholds != old["thresholds"]).any(0), changed), "thresholds without their weight"
        assert torch.equal(layer.bias, old["bias"])
        bound = layer.weight.shape[1] ** -0.5
        assert layer.weight[changed].abs().max() <= bound
        fresh = layer.thresholds[:, changed]
        assert fresh.min() >= -4.0 and fresh.max() <= 0.0
        assert fresh.min() < -3.5 and fresh.max() > -0.5, "fresh thresholds do not fill their range"
        changed_in_all += int(changed.sum())
    assert int(num_reset) == changed_in_all
    # 5 standard deviations of a binomial share
    assert abs(changed_in_all / num_unused - 0.5) < 5 * (0.25 / num_unused) ** 0.5
    for name in ("critic", "target_actor", "target_critic"):
        for key, value in before[name].items():
            assert torch.equal(getattr(learner, name).state_dict()[key], value)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_actor_reset_at_the_ends_of_its_ratio(learner, ratio):
    unused = sum(int((~layer.masks().any(0)).sum()) for layer in learner.actor.layers)
    assert int(script.reset_actor(learner.actor, ratio)) == ratio * unused


def test_resets_leave_adam_and_targets_alone(learner):
    before = snapshot(learner)
    script.reset_actor(learner.actor, 0.5)
    script.reset_critic(learner.critic, 1)
    for name in ("actor_optimizer", "critic_optimizer"):
        states = getattr(learner, name).state_dict()["state"]
        assert states, "Adam has no moments to leave alone"
        for parameter, moments in before[name]["state"].items():
            for key, value in moments.items():
                assert torch.equal(states[parameter][key], value)
    for name in ("target_actor", "target_critic"):
        for key, value in before[name].items():
            assert torch.equal(getattr(learner, name).state_dict()[key], value)


def test_critic_reset_draws_one_members_thresholds(learner):
    before = snapshot(learner)["critic"]
    assert script.reset_critic(learner.critic, 3) == 2
    for key, value in learner.critic.state_dict().items():
        if key.endswith("thresholds"):
            assert (value[2] != before[key][2]).all()
            assert value[2].min() >= -20.0 and value[2].max() <= 0.0
            others = [0, 1, 3]
            assert torch.equal(value[others], before[key][others])
        else:
            assert torch.equal(value, before[key])


def due_steps(interval, total, round_steps=500):
    return [
        step
        for step in range(round_steps, total + 1, round_steps)
        if script.reset_due(interval, step - round_steps, step, total)
    ]


def test_resets_are_due_while_more_than_one_interval_is_left():
    million = 1_000_000
    assert due_steps(million, 10 * million) == [k * million for k in range(1, 9)]  # at 9 million, one is left
    assert due_steps(800_000, 10 * million) == [k * 800_000 for k in range(1, 12)]  # at 9.6 million, half of one
    assert due_steps(million, 2 * million) == []
    assert due_steps(million, 2 * million + 500) == [million]
    assert due_steps(0, 10 * million) == []


def test_a_round_that_passes_a_multiple_reaches_it_once():
    steps = range(0, 10_000, 700)
    assert sum(reached(1000, a, b) for a, b in zip(steps, steps[1:], strict=False)) == steps[-1] // 1000
    assert not reached(0, 0, 10_000)


def test_critic_members_take_turns():
    args = script.Args(hidden_size=4)
    critic = script.Critic(3, args)
    steps = due_steps(args.critic_reset_interval, 10_000_000)
    members = [script.reset_critic(critic, step // args.critic_reset_interval) for step in steps]
    assert members == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]


# ---- When ----
TINY = "--env-id Hopper-v2-3x1 --device cpu --num-threads 1 --total-timesteps 400 --num-envs 4 --hidden-size 16"
TINY += " --eval-episodes 0 --log-interval 0 --actor-reset-interval 150"
FLAGS = {
    script: "--warmup-steps 100 --batch-size 20 --train-interval 10 --updates-per-round 4 --critic-reset-interval 100",
    mappo: "--rollout-steps 10",
}
WHEN = {  # rounds of 40 steps; MATD3's first updates come after 120
    script: "step critic update step actor update step critic update" + " step update" * 5,
    mappo: "step update " * 4 + "actor" + " step update" * 6,
}


@pytest.mark.parametrize("flags", ["--critic-reset-interval 10", "--critic-reset-interval 50 --warmup-steps 130"])
def test_critic_members_take_turns_whatever_the_interval(flags, tmp_path):
    """Also where a round reaches several multiples of it, where the warm-up did, and in a run that was resumed."""
    tiny = [*TINY.split(), *FLAGS[script].split(), "--num-critics", 4, *flags.split(), "--checkpoint-interval", 40]
    code, _, err = run_main(script, *tiny, cwd=tmp_path, block=7)
    assert code == 143, err
    (folder,) = (tmp_path / "runs").iterdir()
    code, _, err = run_main(script, "--resume", folder, cwd=tmp_path)
    assert code == 0, err
    members = [int(member) for _, member in scalars(folder)["resets/critic_member"]]
    assert members == [number % 4 for number in range(len(members))] and len(members) > 3


@pytest.mark.parametrize("module", WHEN, ids=["matd3", "mappo"])
def test_resets_come_before_matd3s_updates_and_after_mappos(module, tmp_path, monkeypatch):
    """As released, and since a rollout is learnt from with the policy that made it."""
    events = []

    def note(owner, name, event):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: events.append(event) or own(*args))

    note(module, "log_episodes", "step")
    note(module, "reset_actor", "actor")
    note(module.Learner, "update", "update")
    if module is script:
        note(module, "reset_critic", "critic")
    code, _, err = run_main(module, *TINY.split(), *FLAGS[module].split(), cwd=tmp_path)
    assert code == 0, err
    assert [event for event, _ in itertools.groupby(events)] == WHEN[module].split()
