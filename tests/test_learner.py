"""Whole updates against plain loops in float64, and what each part of an update may change."""

import copy

import pytest
import torch

from benchmark.plain_loops import PlainLearner

NETWORKS = ("actor", "critic", "target_actor", "target_critic")


@pytest.mark.parametrize("num_agents", [1, 3])
@pytest.mark.parametrize("num_critics", [1, 4])
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
@pytest.mark.parametrize("critic", [("kaleidoscope", True), ("kaleidoscope", False), ("none", True), ("none", False)])
def test_updates_equal_plain_loops(make_learner, make_batch, num_agents, num_critics, sharing, critic):
    settings = dict(num_agents=num_agents, num_critics=num_critics, actor_lr=1e-2, critic_lr=1e-2, polyak=0.1)
    settings |= dict(critic_sharing=critic[0], critic_layer_norm=critic[1])
    learner = make_learner(torch.float64, **settings, sharing=sharing)
    plain = PlainLearner(learner)
    for update in range(1, 9):
        batch = make_batch(num_agents=num_agents, dtype=torch.float64, seed=update)
        torch.manual_seed(update)
        noise = (torch.randn_like(batch.actions) * learner.args.policy_noise).clamp_(-0.5, 0.5)
        torch.manual_seed(update)
        learner.update(batch, with_policy=update % 2 == 0)
        plain.update(batch, noise, with_policy=update % 2 == 0)
        for name in NETWORKS:
            ours, theirs = getattr(learner, name).state_dict(), getattr(plain, name).state_dict()
            for key in ours:
                where = f"update {update}, {name} {key}"
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-7, atol=1e-9, msg=where)


def test_a_critic_update_changes_the_critic_only(make_learner, make_batch):
    learner = make_learner()
    before = {name: copy.deepcopy(getattr(learner, name).state_dict()) for name in NETWORKS}
    learner.update(make_batch(), with_policy=False)
    for name in NETWORKS:
        same = [torch.equal(value, before[name][key]) for key, value in getattr(learner, name).state_dict().items()]
        assert not any(same) if name == "critic" else all(same), name


def test_a_policy_update_leaves_the_critic_alone(make_learner, make_batch):
    learner = make_learner()
    batch = make_batch()
    learner.update_critic(batch)
    parameters = [parameter.clone() for parameter in learner.critic.parameters()]
    gradients = [parameter.grad.clone() for parameter in learner.critic.parameters()]
    logs = learner.update_actor(batch)
    assert logs["losses/actor"].shape == ()
    for parameter, old, gradient in zip(learner.critic.parameters(), parameters, gradients, strict=True):
        assert torch.equal(parameter, old) and torch.equal(parameter.grad, gradient)


def test_an_agents_loss_reaches_the_shared_weights_and_its_own_thresholds(make_learner, make_batch):
    learner = make_learner()
    batch = make_batch()
    learner.actor.act_alone(batch.obs[:, 1], 1).sum().backward()
    for layer in learner.actor.layers:
        assert layer.weight.grad.any() and layer.thresholds.grad[1].any()
        assert not layer.thresholds.grad[[0, 2]].any()


def test_full_sharing_gives_all_agents_the_same_weights_and_they_stay_so(make_learner, make_batch):
    learner = make_learner(sharing="full")
    for seed in range(3):
        logs = learner.update(make_batch(seed=seed), with_policy=True)
        for actor in (learner.actor, learner.target_actor):
            for layer, (weight, bias) in zip(actor.layers, actor.effective_layers(), strict=True):
                assert torch.equal(weight, layer.weight.expand(3, -1, -1)) and bias is layer.bias
    assert logs["losses/actor_diversity"] == 0 and logs["losses/critic_diversity"] < 0, "sharing is the actor's"


def test_without_sharing_one_agents_loss_touches_its_own_parameters_only(make_learner, make_batch):
    learner = make_learner(sharing="none")
    batch = make_batch()
    for layer in learner.actor.layers:
        assert not torch.equal(layer.weight[0], layer.weight[1]), "networks that start alike"
    learner.actor.act_alone(batch.obs[:, 1], 1).sum().backward()
    for name, parameter in learner.actor.named_parameters():
        assert parameter.shape[0] == 3
        assert (parameter.grad[1] != 0).any(), name
        assert (parameter.grad[[0, 2]] == 0).all(), name
    for seed in range(3):
        learner.update(make_batch(seed=seed), with_policy=True)
    for network in (learner.actor, learner.target_actor):
        for layer, (weight, _) in zip(network.layers, network.effective_layers(), strict=True):
            assert torch.equal(weight, layer.weight) and torch.isfinite(weight).all()


@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_acting_together_and_alone_agree_and_keep_to_the_bounds(sharing, make_learner, make_batch):
    actor = make_learner(sharing=sharing).actor
    obs = 100 * make_batch(size=50).obs
    actions = actor.act(obs, actor.effective_layers())
    assert (actions >= actor.low - 1e-6).all() and (actions <= actor.high + 1e-6).all()
    assert (actions - actor.high).abs().min() < 1e-3, "tanh never came near a bound"
    for agent in range(3):
        torch.testing.assert_close(actor.act_alone(obs[:, agent], agent), actions[:, agent])


def test_separate_critics_learn_apart_and_agents_climb_the_first(make_learner, make_batch):
    learner = make_learner(critic_sharing="none", critic_layer_norm=False, num_critics=2)
    batch = make_batch()
    for layer in learner.critic.layers:
        assert layer.thresholds is None and not torch.equal(layer.weight[0], layer.weight[1]), "they start alike"
    assert not list(learner.critic.norms.parameters())
    learner.critic(torch.randn(5, 13), learner.critic.effective_layers())[1].sum().backward()
    assert all(not p.grad[0].any() and p.grad[1].any() for p in learner.critic.parameters())
    first = copy.deepcopy(learner)
    with torch.no_grad():
        for parameter in learner.critic.parameters():
            parameter[1] *= 2  # the second critic has no say in the agents' updates
    for each in (first, learner):
        each.update_actor(batch)
    for one, other in zip(first.actor.parameters(), learner.actor.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_target_takes_the_lowest_value_of_the_ensemble_and_none_after_a_termination(make_learner, make_batch):
    learner = make_learner(policy_noise=0.0)
    batch = make_batch()
    next_actions = learner.target_actor.act(batch.next_obs, learner.target_actor.effective_layers())
    critic_input = torch.cat([batch.next_state, next_actions.flatten(1)], 1)
    values = learner.target_critic(critic_input, learner.target_critic.effective_layers())[..., 0]
    assert (values.argmin(0).unique().numel() > 1) and batch.terminated.any() and not batch.terminated.all()
    target = batch.reward + torch.where(batch.terminated, 0.0, batch.discount * values.amin(0))
    torch.testing.assert_close(learner.update_critic(batch)["values/target"], target.mean())


def test_gradient_norms_are_those_of_each_network(make_learner, make_batch):
    learner, batch = make_learner(), make_batch()
    learner.update_critic(batch)
    critics = [parameter.grad.clone() for parameter in learner.critic.parameters()]
    learner.update_actor(batch)
    assert all(map(torch.equal, critics, (parameter.grad for parameter in learner.critic.parameters())))
    norms = learner.gradient_norms()
    assert list(norms) == ["losses/critic_grad_norm", "losses/actor_grad_norm"]
    for norm, network in zip(norms.values(), (learner.critic, learner.actor), strict=True):
        gradients = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        torch.testing.assert_close(norm, gradients.square().sum().sqrt())


def test_the_update_makes_no_host_copies(make_learner, make_batch, monkeypatch):
    """Losses come back as tensors and nothing is read on the way, so that the update can be captured."""
    learner, batch = make_learner(), make_batch()
    learner.update(batch, with_policy=True)

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    logs = learner.update_critic(batch) | learner.update_actor(batch)
    learner.update_targets()
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in logs.values())
