"""Kaleidoscope-MAPPO's pieces against plain loops: advantages, ValueNorm, losses, policies and sharing modes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import kalei_mappo_mamujoco as script
from experiment.mask_pictures import sparsity

CPU = torch.device("cpu")
AGENTS, ACT, STATE = 3, 2, 7


def make_bounds():
    high = np.linspace(0.5, 1.5, AGENTS * ACT, dtype=np.float32).reshape(AGENTS, ACT)
    high[-1, -1] = 0
    return -high, high


@pytest.fixture
def make_learner():
    """A function that makes a small Learner of 3 agents with 2 actions each; the last one's second is padding."""

    def make(dtype=torch.float32, seed=0, **changes):
        torch.manual_seed(seed)
        settings = dict(rollout_steps=6, num_epochs=2, num_minibatches=2, clip=0.2, entropy_coef=0.01, lr=1e-3)
        settings |= dict(lr_schedule="constant", hidden_size=16, deque_len=3, num_envs=4) | changes
        learner = script.Learner(STATE, *make_bounds(), script.Args(**settings), CPU)
        learner.actor.to(dtype)
        learner.critic.to(dtype)
        learner.actor_coefficient.losses = learner.actor_coefficient.losses.to(dtype)
        return learner

    return make


@pytest.fixture
def make_rollout():
    """A function that draws a Rollout that fits make_learner's learners, as if the actor had sampled its actions."""

    def make(steps=6, num_envs=4, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        rollout = script.Rollout(steps, num_envs, STATE, (AGENTS, ACT), CPU)
        for name in ("state", "next_state", "actions", "reward"):
            setattr(rollout, name, torch.randn_like(getattr(rollout, name)).to(dtype))
        rollout.terminated = torch.rand(steps, num_envs) < 0.2
        rollout.truncated = (torch.rand(steps, num_envs) < 0.2) & ~rollout.terminated
        return rollout

    return make


# ---- advantages ----
def plain_advantages(reward, values, next_values, terminated, truncated, gamma, gae_lambda):
    """The definition, forwards: sum_k (gamma lambda)^k delta_{t + k}, up to the end of the episode or the rollout."""
    steps, num_envs = reward.shape
    advantages = torch.zeros_like(reward)
    for env in range(num_envs):
        for start in range(steps):
            total, factor = 0.0, 1.0
            for step in range(start, steps):
                bootstrap = 0.0 if terminated[step, env] else next_values[step, env].item()
                total += factor * (reward[step, env].item() + gamma * bootstrap - values[step, env].item())
                factor *= gamma * gae_lambda
                if terminated[step, env] or truncated[step, env]:
                    break
            advantages[start, env] = total
    return advantages


def test_advantages_equal_the_definition_with_ends_anywhere():
    torch.manual_seed(0)
    reward, values, next_values = torch.randn(3, 9, 6, dtype=torch.float64)
    terminated, truncated = torch.zeros(2, 9, 6, dtype=torch.bool)
    terminated[3, 1] = truncated[4, 2] = terminated[8, 3] = truncated[8, 4] = True  # mid-rollout and at its end
    truncated[0, 5] = terminated[1, 5] = truncated[7, 5] = True
    arguments = (reward, values, next_values, terminated, truncated, 0.97, 0.9)
    torch.testing.assert_close(script.estimate_advantages(*arguments), plain_advantages(*arguments))


@pytest.mark.parametrize("step", [2, 5])
def test_a_cut_bootstraps_from_where_it_was_cut_and_a_termination_from_nothing(step):
    """Steps 2 and 5: in mid-rollout, and the rollout's last."""
    zeros, no = torch.zeros(6, 1), torch.zeros(6, 1, dtype=torch.bool)
    ended = no.clone()
    ended[step] = True
    values, next_values = zeros.clone(), zeros.clone()
    next_values[step] = 10.0  # of the state before the reset
    if step < 5:
        values[step + 1] = -1000.0  # of the next episode
    cut = script.estimate_advantages(zeros, values, next_values, no, ended, 0.9, 0.5)
    terminated = script.estimate_advantages(zeros, values, next_values, ended, no, 0.9, 0.5)
    assert cut[step].item() == pytest.approx(9.0) and terminated[step].item() == 0
    assert cut[step - 1].item() == pytest.approx(9.0 * 0.45) and terminated[step - 1].item() == 0


def test_prepare_bootstraps_from_the_next_state_of_each_step(make_learner, make_rollout):
    learner = make_learner()
    rollout = make_rollout()
    critic = learner.critic
    critic.update_value_norm(torch.randn(100) * 5 + 20)
    mean, std = critic.mean_std()
    with torch.no_grad():
        layers = critic.effective_layers()
        values, next_values = (
            critic(script.critic_state(states).flatten(0, 1), layers)[0, :, 0] * std + mean
            for states in (rollout.state, rollout.next_state)
        )
    ends = (rollout.terminated, rollout.truncated, 0.99, 0.95)
    advantages = plain_advantages(rollout.reward, values.view(6, 4), next_values.view(6, 4), *ends)
    batch, _ = learner.prepare(rollout)
    expected = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(batch.advantages, expected.flatten(), rtol=1e-3, atol=1e-3)
    mean, std = critic.mean_std()
    returns = (advantages.flatten() + values - mean) / std
    torch.testing.assert_close(batch.returns, returns, rtol=1e-3, atol=1e-3)


def test_prepare_lays_out_steps_of_agents_in_one_order(make_learner, make_rollout):
    learner = make_learner()
    rollout = make_rollout()
    batch, _ = learner.prepare(rollout)
    for step, env in ((0, 0), (2, 3), (5, 1)):
        row = step * 4 + env
        obs = script.agent_observations(rollout.state[step, env], AGENTS)
        torch.testing.assert_close(batch.obs[:, row], obs)
        torch.testing.assert_close(batch.state[row], script.critic_state(rollout.state[step, env]))
        assert torch.equal(batch.actions[:, row], rollout.actions[step, env])


def test_partial_observations_come_from_the_columns(make_learner, make_rollout):
    columns = np.array([[0, 3, -1], [1, 2, 6], [4, 5, -1]])
    learner = make_learner()
    rollout = make_rollout()
    learner = script.Learner(STATE, *make_bounds(), learner.args, CPU, columns)
    batch, _ = learner.prepare(rollout)
    assert batch.obs.shape == (AGENTS, 24, 3 + AGENTS)
    for step, env in ((0, 0), (5, 3)):
        expected = script.agent_observations(rollout.state[step, env].numpy(), AGENTS, columns=columns)
        torch.testing.assert_close(batch.obs[:, step * 4 + env].numpy(), expected)
    learner.update(rollout)


# ---- ValueNorm ----
def make_critic(beta):
    return script.Critic(STATE, script.Args(value_norm_beta=beta, hidden_size=16))


def test_value_norm_equals_the_plain_formula():
    torch.manual_seed(0)
    critic, beta = make_critic(0.9).double(), 0.9
    mean_sum = square_sum = weight = 0.0
    for step in range(5):
        returns = torch.randn(40, dtype=torch.float64) * (step + 1) + 10
        critic.update_value_norm(returns)
        mean_sum = beta * mean_sum + (1 - beta) * returns.mean().item()
        square_sum = beta * square_sum + (1 - beta) * returns.square().mean().item()
        weight = beta * weight + (1 - beta)
        mean = mean_sum / weight
        std = math.sqrt(square_sum / weight - mean**2)
        assert [value.item() for value in critic.mean_std()] == pytest.approx([mean, std])
    assert weight == pytest.approx(1 - beta**5)


@pytest.mark.parametrize("beta", [0.99999, 0.9999999])
def test_value_norm_is_right_from_the_first_update_and_finite_before_it(beta):
    critic = make_critic(beta)
    assert all(math.isfinite(value) for value in critic.mean_std()) and critic.mean_std()[1] > 0
    returns = torch.randn(1000) * 3 + 7
    critic.update_value_norm(returns)
    mean, std = critic.mean_std()
    normalised = (returns - mean) / std
    assert normalised.mean().abs() < 0.02 and abs(normalised.std().item() - 1) < 0.02


# ---- losses ----
def test_the_policys_loss_equals_a_plain_loop(make_learner):
    learner, clip = make_learner(torch.float64, sharing="full", clip=0.2, entropy_coef=0.0), 0.2
    obs, actions = torch.randn(AGENTS, 20, STATE + AGENTS).double(), torch.randn(AGENTS, 20, ACT).double()
    actor, advantages = learner.actor, torch.randn(20).double()
    with torch.no_grad():
        now = actor.log_prob(obs, actions, actor.effective_layers())
    old = now + torch.randn(AGENTS, 20).double() * 0.3
    batch = SimpleNamespace(obs=obs, actions=actions, log_prob=old, advantages=advantages)
    logs = learner.update_actor(batch, slice(None))
    losses, divergences, clipped, stopped = [], [], 0, 0
    for agent in range(AGENTS):
        for row in range(20):
            log_ratio, advantage = (now[agent, row] - old[agent, row]).item(), advantages[row].item()
            ratio = math.exp(log_ratio)
            losses.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
            divergences.append(ratio - 1 - log_ratio)
            clipped += abs(ratio - 1) > clip
            stopped += (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert 5 < stopped < clipped < 55, "a test in which nothing or all is clipped tests nothing"
    assert logs["losses/policy"].item() == pytest.approx(sum(losses) / 60)
    assert logs["losses/approx_kl"].item() == pytest.approx(sum(divergences) / 60)
    assert logs["losses/clipfrac"].item() == pytest.approx(clipped / 60)


def test_no_gradient_comes_from_what_is_clipped(make_learner):
    """Advantages whose ratios lie beyond the clip on their better side: nothing moves but Adam's idle moments."""
    learner = make_learner(torch.float64, sharing="full", clip=0.2, entropy_coef=0.0)
    obs, actions = torch.randn(AGENTS, 20, STATE + AGENTS).double(), torch.randn(AGENTS, 20, ACT).double()
    advantages = torch.randn(20).double()
    with torch.no_grad():
        now = learner.actor.log_prob(obs, actions, learner.actor.effective_layers())
    for sign, moves in ((1, False), (-1, True)):
        before = [parameter.detach().clone() for parameter in learner.actor.parameters()]
        batch = SimpleNamespace(obs=obs, actions=actions, log_prob=now - sign * 0.5 * advantages.sign())
        batch.advantages = advantages
        learner.update_actor(batch, slice(None))
        changed = [not torch.equal(*pair) for pair in zip(before, learner.actor.parameters(), strict=True)]
        assert any(changed) == moves


def test_the_values_loss_equals_a_plain_loop(make_learner):
    delta, clip = 1.5, 0.2
    learner = make_learner(torch.float64, clip=clip, huber_delta=delta)
    state, returns = torch.randn(60, STATE).double(), torch.randn(60).double() * 3
    with torch.no_grad():
        values = learner.critic(state, learner.critic.effective_layers()).flatten()
    old = values + torch.randn(60).double()
    logs = learner.update_critic(SimpleNamespace(state=state, values=old, returns=returns), slice(None))

    def huber(error):
        return error**2 / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)

    losses, clipped_is_worse = [], 0
    for value, before, target in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        clipped = before + min(max(value - before, -clip), clip)
        losses.append(max(huber(target - value), huber(target - clipped)))
        clipped_is_worse += huber(target - clipped) > huber(target - value)
    assert 10 < clipped_is_worse < 50, "both are to be the worse one now and then"
    assert logs["losses/value"].item() == pytest.approx(sum(losses) / 60)


# ---- policies ----
def test_probability_and_entropy_leave_padding_out(make_learner):
    learner = make_learner(torch.float64, output_gain=1.0)
    actor = learner.actor
    with torch.no_grad():
        actor.log_std.copy_(torch.randn_like(actor.log_std))
    obs, actions = torch.randn(AGENTS, 5, STATE + AGENTS).double(), torch.randn(AGENTS, 5, ACT).double()
    layers = actor.effective_layers()
    mean, std = actor(obs, layers), actor.std()
    distribution = torch.distributions.Normal(mean, std.expand_as(mean))
    expected, entropy = distribution.log_prob(actions), distribution.entropy()
    ours = actor.log_prob(obs, actions, layers)
    torch.testing.assert_close(ours[:2], expected[:2].sum(-1))
    torch.testing.assert_close(ours[2], expected[2, :, 0])
    torch.testing.assert_close(actor.entropy(), (entropy[:2].sum() + entropy[2, :, 0].sum()) / (AGENTS * 5))
    changed = actions.clone()
    changed[2, :, 1] += 100
    assert torch.equal(actor.log_prob(obs, changed, layers), ours)
    (ours.sum() + actor.entropy()).backward()
    assert actor.log_std.grad[2, 0, 1] == 0 and (actor.log_std.grad[:2] != 0).all()


def test_samples_follow_the_policy_and_are_clipped_and_scaled_on_their_way_out(make_learner):
    actor = make_learner(output_gain=3.0).actor
    with torch.no_grad():
        layers = actor.effective_layers()
        obs = torch.randn(1, AGENTS, STATE + AGENTS)
        many = obs.expand(20_000, -1, -1)
        samples = actor.sample(many, layers, actor.std())
        mean = actor(obs.transpose(0, 1), layers).transpose(0, 1)
        assert actor.std().flatten()[0].item() == pytest.approx(0.5 / (1 + math.exp(-1)))
        assert (samples.mean(0) - mean[0]).abs().max() < 0.02 and (samples.std(0) - actor.std()).abs().max() < 0.02
        best = actor.act(obs, layers)
    torch.testing.assert_close(best, mean.clamp(-1, 1) * actor.high)  # bounds are symmetric here
    assert (mean.abs() > 1).any() and (samples.abs() > 1).any() and (samples.abs() < 1).any()
    torch.testing.assert_close(actor.to_bounds(samples[:9]), torch.clip(samples[:9], -1, 1) * actor.high)


def test_networks_start_orthogonal_and_the_actor_a_few_percent_masked_in_every_layer():
    args = script.Args()
    torch.manual_seed(0)
    high = np.ones((17, 1), np.float32)
    actor, critic = script.Actor(393, -high, high, args), script.Critic(376, args)
    for network, output_gain in ((actor, 0.01), (critic, 1.0)):
        for layer, gain in zip(network.layers, (2**0.5,) * 3 + (output_gain,), strict=True):
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.mT
            torch.testing.assert_close(weight @ weight.mT, gain**2 * torch.eye(len(weight)), rtol=0, atol=1e-5)
            assert (layer.bias == 0).all()
    assert ((sparsity(actor) > 0.01) & (sparsity(actor) < 0.08)).all(), sparsity(actor)


# ---- sharing ----
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_forward_pass_equals_one_network_after_the_other(sharing, make_learner):
    actor = make_learner(torch.float64, sharing=sharing, actor_threshold_bias=1.0, output_gain=1.0).actor
    with torch.no_grad():
        for parameter in actor.parameters():  # so that norms and biases, which start alike, differ
            parameter.add_(torch.randn_like(parameter) * 0.1)
    obs = torch.randn(AGENTS, 5, STATE + AGENTS, dtype=torch.float64)
    together = actor(obs, actor.effective_layers())
    for agent in range(AGENTS):
        x = obs[agent]
        for index, (norm, layer) in enumerate(zip(actor.norms, actor.layers, strict=True)):
            own = sharing == "none"
            scale, shift = (norm.weight[agent, 0], norm.bias[agent, 0]) if own else (norm.weight[0], norm.bias[0])
            weight, bias = (layer.weight[agent], layer.bias[agent, 0]) if own else (layer.weight, layer.bias)
            if sharing == "kaleidoscope":
                weight = weight.sign() * torch.relu(weight.abs() - torch.sigmoid(layer.thresholds[agent]))
            x = F.layer_norm(torch.relu(x), scale.shape) if index else x
            x = F.linear(x * scale + shift, weight, bias)
        torch.testing.assert_close(together[agent], x)


def test_observations_are_what_a_layer_norm_would_make_of_them():
    """So that the networks leave it out."""
    state = torch.randn(20, STATE, dtype=torch.float64) * 7 + 3
    for x in (script.critic_state(state), script.agent_observations(state, AGENTS)):
        torch.testing.assert_close(F.layer_norm(x, x.shape[-1:]), x, rtol=1e-5, atol=0)


def gradients_of_one_agent(learner, agent):
    """The actor's parameters by name, with gradients of that agent's log-probabilities and entropy."""
    actor = learner.actor
    torch.manual_seed(1)
    obs, actions = torch.randn(AGENTS, 5, STATE + AGENTS), torch.randn(AGENTS, 5, ACT)
    log_prob = actor.log_prob(obs, actions, actor.effective_layers())
    actor.zero_grad()
    log_prob[agent].square().sum().backward()
    return dict(actor.named_parameters())


def test_full_sharing_gives_all_agents_the_same_weights_and_they_stay_so(make_learner, make_rollout):
    learner = make_learner(sharing="full", actor_diversity_coef=1.0)
    for seed in range(3):
        for layer in learner.actor.layers:
            assert torch.equal(layer.effective()[0], layer.weight.expand(AGENTS, -1, -1))
        logs = learner.update(make_rollout(seed=seed))
        assert logs["losses/actor_diversity"] == 0
    assert all(torch.isfinite(value) for value in logs.values())


def test_without_sharing_one_agents_loss_touches_its_own_parameters_only(make_learner, make_rollout):
    learner = make_learner(sharing="none", output_gain=1.0)
    for name, parameter in gradients_of_one_agent(learner, 1).items():
        if not name.endswith("thresholds"):
            assert parameter.shape[0] == AGENTS
            assert (parameter.grad[1] != 0).any(), name
            assert (parameter.grad[[0, 2]] == 0).all(), name
    for layer in learner.actor.layers:
        assert not torch.equal(layer.weight[0], layer.weight[1]), "networks that start alike"
    for seed in range(3):
        learner.update(make_rollout(seed=seed))
    for layer in learner.actor.layers:
        assert torch.equal(layer.effective()[0], layer.weight)


def test_kaleidoscope_gradients_reach_own_thresholds_and_the_shared_weights(make_learner):
    learner = make_learner(output_gain=1.0, actor_threshold_bias=1.0)
    for name, parameter in gradients_of_one_agent(learner, 1).items():
        if name.endswith("thresholds"):
            assert (parameter.grad[1] != 0).any() and (parameter.grad[[0, 2]] == 0).all(), name
        else:
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_the_critic_has_no_mask(sharing, make_learner, make_rollout):
    learner = make_learner(sharing=sharing)
    critic = learner.critic
    for _ in range(2):
        for layer in critic.layers:
            assert torch.equal(layer.effective()[0], layer.weight[None])
        values = critic(torch.randn(5, STATE), critic.effective_layers())
        assert values.shape == (1, 5, 1)
        learner.update(make_rollout())


# ---- whole updates ----
@pytest.mark.parametrize("sharing", ["kaleidoscope", "full", "none"])
def test_updates_move_all_that_can_move(sharing, make_learner, make_rollout):
    learner = make_learner(sharing=sharing, output_gain=1.0)
    networks = {"actor": learner.actor, "critic": learner.critic}
    before = {(net, name): p.clone() for net, network in networks.items() for name, p in network.named_parameters()}
    logs = learner.update(make_rollout())
    assert all(torch.isfinite(value) and not value.requires_grad for value in logs.values())
    for (net, name), old in before.items():
        moved = not torch.equal(networks[net].get_parameter(name), old)
        has_masks = sharing == "kaleidoscope" and net == "actor"
        assert moved == (has_masks or not name.endswith("thresholds")), (net, name)


def test_the_first_ratio_is_one(make_learner, make_rollout):
    learner = make_learner(num_epochs=1, num_minibatches=1, output_gain=1.0)
    logs = learner.update(make_rollout())
    assert abs(logs["losses/approx_kl"]) < 1e-6 and logs["losses/clipfrac"] == 0
    assert abs(logs["losses/policy"]) < 1e-4, "advantages are 0 on average, and so is the first surrogate"


def test_an_actor_step_equals_the_equations(make_learner, make_rollout):
    """One step on a whole rollout: loss, entropy bonus, diversity by the mean absolute surrogate, clipping, Adam."""
    learner = make_learner(torch.float64, entropy_coef=0.1, max_grad_norm=0.01, actor_threshold_bias=1.0)
    rollout = make_rollout(dtype=torch.float64)
    batch, _ = learner.prepare(rollout)
    actor, args = learner.actor, learner.args
    log_prob = actor.log_prob(batch.obs, batch.actions, actor.effective_layers())
    ratio = (log_prob - batch.log_prob).exp()
    diversity = script.diversity_loss(actor, args.layer_weights)
    scale = 0.1 * batch.advantages.abs().mean() / diversity.abs()  # the first ratio is 1
    total = -(ratio * batch.advantages).mean() - 0.1 * actor.entropy() + scale.detach() * diversity
    names, parameters = zip(*actor.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters)
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
    assert norm > 0.01
    expected = {}
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        gradient = gradient * 0.01 / (norm + 1e-6)
        threshold = name.endswith("thresholds")
        lr, eps = (args.threshold_lr, args.threshold_eps) if threshold else (args.lr, 1e-5)
        expected[name] = parameter.detach() - lr * gradient / (gradient.abs() + eps)  # Adam's first step
    logs = learner.update_actor(batch, torch.arange(24))
    torch.testing.assert_close(logs["losses/actor_grad_norm"], norm)
    for name, parameter in actor.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-7, msg=name)


def plain_network(network, agent=None):
    """The critic, or an agent's network in an actor without sharing, of torch.nn's modules in float64."""
    modules = []
    for index, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=True)):
        outputs, inputs = layer.weight.shape[-2:]
        # inputs are standardised, and a LayerNorm without epsilon leaves them so
        scale, linear = nn.LayerNorm(inputs, eps=1e-5 if index else 0.0).double(), nn.Linear(inputs, outputs).double()
        modules += [*([nn.ReLU()] if index else []), scale, linear]
        own = slice(None) if agent is None else agent
        with torch.no_grad():
            for ours, theirs in ((norm, scale), (layer, linear)):
                theirs.weight.copy_(ours.weight[own].view_as(theirs.weight))
                theirs.bias.copy_(ours.bias[own].view_as(theirs.bias))
    return nn.Sequential(*modules)


def single_learner(actor, agent):
    """An agent of a learner without sharing as one on its own: its network and its log_std."""
    return plain_network(actor, agent), nn.Parameter(actor.log_std.detach()[agent, 0].clone())


@pytest.mark.parametrize("num_agents", [1, 2, 17])
def test_without_sharing_an_update_equals_that_of_single_learners(num_agents):
    """HARL's separate actors: each with its own surrogate, entropy bonus, gradient norm and Adam, in float64."""
    torch.manual_seed(0)
    settings = dict(clip=0.05, entropy_coef=0.1, lr=1e-2, lr_schedule="constant", hidden_size=16, output_gain=1.0)
    settings |= dict(rollout_steps=6, num_epochs=1, num_minibatches=1, max_grad_norm=1.0, sharing="none")
    high = np.ones((num_agents, ACT), np.float32)
    learner = script.Learner(STATE, -high, high, script.Args(**settings), CPU)
    actor = learner.actor.double()
    learner.actor_coefficient.losses = learner.actor_coefficient.losses.double()
    singles = [single_learner(actor, agent) for agent in range(num_agents)]
    adams = [torch.optim.Adam([*network.parameters(), std], lr=1e-2, eps=1e-5) for network, std in singles]

    state, rows = torch.randn(40, STATE, dtype=torch.float64), slice(None)
    obs = script.agent_observations(state, num_agents).transpose(0, 1)
    actions, advantages = torch.randn(num_agents, 40, ACT).double() / 2, torch.randn(40).double()
    with torch.no_grad():
        before = actor.log_prob(obs, actions, actor.effective_layers())
    batch = SimpleNamespace(obs=obs, actions=actions, log_prob=before, advantages=advantages)
    norms, clipped = [], 0
    for _ in range(6):
        logs = learner.update_actor(batch, rows)
        losses = []
        for agent, ((network, log_std), adam) in enumerate(zip(singles, adams, strict=True)):
            distribution = torch.distributions.Normal(network(obs[agent]), 0.5 * torch.sigmoid(log_std))
            ratio = torch.exp(distribution.log_prob(actions[agent]).sum(-1) - before[agent])
            surrogate = torch.min(ratio * advantages, torch.clamp(ratio, 0.95, 1.05) * advantages)
            loss = -surrogate.mean() - 0.1 * distribution.entropy().sum(-1).mean()
            adam.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_([*network.parameters(), log_std], 1.0).item())
            adam.step()
            losses.append(-surrogate.mean().item())
            clipped += ((ratio - 1).abs() > 0.05).sum()
        assert logs["losses/policy"].item() == pytest.approx(sum(losses) / num_agents)
        assert logs["losses/actor_grad_norm"].item() == pytest.approx(sum(norms[-num_agents:]) / num_agents)
        for agent, (network, log_std) in enumerate(singles):
            copy, copied_std = single_learner(actor, agent)
            for (name, ours), theirs in zip(copy.named_parameters(), network.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, msg=f"{agent} {name}")
            torch.testing.assert_close(copied_std, log_std, rtol=1e-8, atol=1e-10)
    assert clipped > 0 and max(norms) > 1.0, "neither clip was met"
    assert num_agents == 1 or min(norms) < 1.0, (
        "every agent's gradient was scaled down: one norm for all would do it too"
    )


def test_a_critic_step_equals_that_of_a_network_of_torchs(make_learner, make_rollout):
    """Loss, gradients and Adam's first step, of a network that holds LayerNorms and Linears."""
    learner = make_learner(torch.float64, max_grad_norm=1e9, huber_delta=0.5)
    batch, _ = learner.prepare(make_rollout(dtype=torch.float64))
    critic, args = learner.critic, learner.args
    rows = torch.randperm(24)[:10]
    with torch.no_grad():  # so that a value's change since `prepare` counts
        critic.layers[-1].bias += 0.3
    plain = plain_network(critic)
    values, before, returns = plain(batch.state[rows])[:, 0], batch.values[rows], batch.returns[rows]
    near = before + torch.clamp(values - before, -args.clip, args.clip)
    errors = [F.huber_loss(x, returns, reduction="none", delta=args.huber_delta) for x in (values, near)]
    loss = torch.max(*errors).mean()
    assert (errors[0] > errors[1]).any() and (errors[0] < errors[1]).any(), "either may be the worse one"
    adam = torch.optim.Adam(plain.parameters(), lr=args.lr, eps=1e-5)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in plain.parameters()]
    adam.step()
    logs = learner.update_critic(batch, rows)
    assert logs["losses/value"].item() == pytest.approx(loss.item())
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients))
    torch.testing.assert_close(logs["losses/critic_grad_norm"], norm)
    ours = [part for pair in zip(critic.norms, critic.layers, strict=True) for part in pair]
    ours = [getattr(part, name) for part in ours for name in ("weight", "bias")]
    for parameter, gradient, theirs in zip(ours, gradients, plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient.view_as(parameter), rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(parameter, theirs.view_as(parameter), rtol=1e-8, atol=1e-12)


def test_a_pass_shows_every_step_once_to_actor_and_critic(make_learner, make_rollout, monkeypatch):
    learner = make_learner(num_minibatches=5)
    seen = {"actor": [], "critic": []}

    def watch(name, update):
        def watched(batch, rows):
            seen[name].append(rows)
            return update(batch, rows)

        return watched

    monkeypatch.setattr(learner, "update_actor", watch("actor", learner.update_actor))
    monkeypatch.setattr(learner, "update_critic", watch("critic", learner.update_critic))
    learner.update(make_rollout())
    orders = []
    for number in range(learner.args.num_epochs):
        minibatches = slice(5 * number, 5 * number + 5)
        actor, critic = torch.cat(seen["actor"][minibatches]), torch.cat(seen["critic"][minibatches])
        assert torch.equal(actor, critic) and torch.equal(actor.sort().values, torch.arange(24))
        orders.append(tuple(actor.tolist()))
    assert len(set(orders)) == len(orders), "each pass in an order of its own"


def test_learning_rates_scale_from_their_first_values(make_learner):
    learner = make_learner()
    for factor in (0.5, 0.25):
        learner.scale_learning_rates(factor)
        groups = learner.actor_optimizer.param_groups + learner.critic_optimizer.param_groups
        rates = [group["lr"] for group in groups]
        assert rates == [1e-3 * factor, 0.05 * factor, 1e-3 * factor]  # the critic has no thresholds
