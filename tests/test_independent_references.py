"""Updates of both scripts against the sources they follow, written from those and not from the scripts.

HARL (Zhong et al. 2024, arXiv:2304.09870) is followed object by object: agents are a list of networks, which with full
sharing holds one network N times and without sharing N networks, each with an optimiser of its own. Networks are
torch.nn's, densities and entropies torch.distributions'. All is float64.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3

CPU, CLOSE = torch.device("cpu"), dict(rtol=1e-6, atol=1e-9)
STATE, ACT = 7, 2


def take_over(module, weight, bias):
    """Give a Linear or LayerNorm these values, in float64."""
    module.weight = nn.Parameter(weight.detach().clone().double().reshape(module.weight.shape))
    module.bias = nn.Parameter(bias.detach().clone().double().reshape(module.bias.shape))
    return module


def row(parameter, agent, own):
    return parameter[agent] if own else parameter


def linear(layer, agent):
    own = layer.weight.ndim == 3
    outputs, inputs = layer.weight.shape[-2:]
    return take_over(nn.Linear(inputs, outputs), row(layer.weight, agent, own), row(layer.bias, agent, own))


def standardised(x):
    """Over a vector's own entries, by the population's standard deviation."""
    return np.stack([(vector - np.mean(vector)) / np.std(vector) for vector in np.asarray(x)])


def assert_networks(learner_network, plain_of_agent, names):
    """Every agent's parameters in the script's network are those of its plain network, which are as many."""
    for agent, plain in enumerate(plain_of_agent):
        modules = [module for module in plain if isinstance(module, nn.Linear | nn.LayerNorm)]
        assert len(modules) == len(names)
        for name, module in zip(names, modules, strict=True):
            ours = learner_network.get_submodule(name)
            own = learner_network.layers[0].weight.ndim == 3
            for leaf in ("weight", "bias"):
                value = row(getattr(ours, leaf), agent, own).detach()
                theirs = getattr(module, leaf).detach()
                where = f"agent {agent}, {name}.{leaf}"
                torch.testing.assert_close(value.reshape(theirs.shape), theirs, **CLOSE, msg=lambda m, w=where: w + m)


# ---- MAPPO ----
class HarlValueNorm:
    """HARL's ValueNorm in plain floats: beta, a debiasing term of at least 1e-5 and a variance of at least 1e-2."""

    def __init__(self, beta):
        self.beta, self.mean, self.square, self.debias = beta, 0.0, 0.0, 0.0

    def update(self, returns):
        returns = [float(value) for value in returns.flatten()]
        self.mean = self.beta * self.mean + (1 - self.beta) * sum(returns) / len(returns)
        self.square = self.beta * self.square + (1 - self.beta) * sum(value**2 for value in returns) / len(returns)
        self.debias = self.beta * self.debias + (1 - self.beta)

    def moments(self):
        debias = max(self.debias, 1e-5)
        mean = self.mean / debias
        return mean, math.sqrt(max(self.square / debias - mean**2, 1e-2))

    def normalise(self, values):
        mean, std = self.moments()
        return (values - mean) / std

    def denormalise(self, values):
        mean, std = self.moments()
        return values * std + mean


@pytest.mark.parametrize(
    ("scale", "shift", "beta"),
    [(3.0, 7.0, 0.9), (3.0, 7.0, 0.99999), (0.01, 5.0, 0.9), (0.0, -2.0, 0.999)],
    ids=["short memory", "default", "variance below its floor", "constant returns"],
)
def test_value_norm_is_harls(scale, shift, beta):
    torch.manual_seed(0)
    ours, theirs = mappo.Critic(STATE, mappo.Args(value_norm_beta=beta, hidden_size=16)).double(), HarlValueNorm(beta)
    assert [value.item() for value in ours.mean_std()] == pytest.approx(theirs.moments())  # before any update
    for number in range(4):
        returns = torch.randn(5, 3).double() * scale + shift * (1 + number)
        ours.update_value_norm(returns)
        theirs.update(returns)
        assert [value.item() for value in ours.mean_std()] == pytest.approx(theirs.moments(), rel=1e-6, abs=1e-6)


def harl_advantages(reward, values, masks, bad_masks, gamma, gae_lambda):
    """HARL's recursion with proper time limits, (T, E) from values (T + 1, E) of the steps and the one after the last.

    masks (T, E) are 0 after any end of an episode, bad_masks after a cut: there, the advantage is 0.
    """
    gae, advantages = torch.zeros_like(reward[0]), torch.zeros_like(reward)
    for step in reversed(range(len(reward))):
        delta = reward[step] + gamma * values[step + 1] * masks[step] - values[step]
        gae = bad_masks[step] * (delta + gamma * gae_lambda * masks[step] * gae)
        advantages[step] = gae
    return advantages


@pytest.fixture
def ends():
    """(values (T + 1, E), reward, terminated, truncated (T, E)): mid-rollout, in a row, and at its end."""
    torch.manual_seed(0)
    steps, num_envs = 9, 5
    terminated, truncated = torch.zeros(2, steps, num_envs, dtype=torch.bool)
    terminated[3, 1] = terminated[8, 2] = terminated[1, 4] = terminated[2, 4] = True
    truncated[4, 0] = truncated[8, 3] = truncated[6, 4] = True
    return *(torch.randn(steps + extra, num_envs).double() for extra in (1, 0)), terminated, truncated


def test_advantages_without_cuts_are_harls(ends):
    values, reward, terminated, _ = ends
    no = torch.zeros_like(terminated)
    next_values = torch.where(terminated, 1e6, values[1:])  # where a state is terminal its value must not count
    ours = mappo.estimate_advantages(reward, values[:-1], next_values, terminated, no, 0.97, 0.9)
    theirs = harl_advantages(reward, values, (~terminated).double(), torch.ones_like(reward), 0.97, 0.9)
    torch.testing.assert_close(ours, theirs)


def test_advantages_at_a_cut_count_what_would_have_followed(ends):
    """HARL's recursion, where it knows no cuts and the reward before one holds gamma times the final state's value.

    This is how Stable-Baselines3 counts time limits. HARL itself leaves the step before a cut out (advantage 0).
    """
    values, reward, terminated, truncated = ends
    final_values = torch.randn_like(reward)
    done = terminated | truncated
    next_values = torch.where(done, final_values, values[1:])
    ours = mappo.estimate_advantages(reward, values[:-1], next_values, terminated, truncated, 0.97, 0.9)
    going_on = (~done).double()
    paid = reward + 0.97 * final_values * truncated
    torch.testing.assert_close(ours, harl_advantages(paid, values, going_on, torch.ones_like(reward), 0.97, 0.9))
    harls = harl_advantages(reward, values, going_on, (~truncated).double(), 0.97, 0.9)
    assert (harls[truncated] == 0).all() and (ours[truncated] != 0).all()


def harl_huber(error, delta):
    small = (error.abs() <= delta).double()
    return small * error**2 / 2 + (1 - small) * delta * (error.abs() - delta / 2)


def plain_mlp(network, agent):
    """HARL's network: LayerNorm of the input, then Linear, ReLU, LayerNorm three times, and Linear.

    The input is standardised, so that the 1e-5 which its LayerNorm adds to a variance of 1 are left out.
    """
    own, modules = network.layers[0].weight.ndim == 3, []
    for index, (norm, layer) in enumerate(zip(network.norms, network.layers, strict=True)):
        size = layer.weight.shape[-1]
        modules += [nn.ReLU()] if index > 0 else []
        values = row(norm.weight, agent, own), row(norm.bias, agent, own)
        modules += [take_over(nn.LayerNorm(size, eps=1e-5 if index > 0 else 1e-12), *values), linear(layer, agent)]
    return nn.Sequential(*modules)


def adam_step(optimizer, parameters, loss, max_grad_norm):
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return float(norm)


class HarlMAPPO:
    """HARL's MAPPO after one rollout without cuts: `actors` and `log_stds` are lists of each agent's."""

    def __init__(self, learner):
        args, shared = learner.args, learner.args.sharing == "full"
        actor, agents = learner.actor, range(learner.num_agents)
        self.args, self.norms = args, []
        self.actors = [plain_mlp(actor, agent) for agent in agents]
        stds = actor.log_std.detach().double().reshape(-1, ACT)
        self.log_stds = [nn.Parameter(stds[agent % len(stds)].clone()) for agent in agents]
        if shared:
            self.actors, self.log_stds = self.actors[:1] * len(agents), self.log_stds[:1] * len(agents)
        self.critic = plain_mlp(learner.critic, 0)

    def distribution(self, agent, obs):
        return Normal(self.actors[agent](obs), torch.sigmoid(self.log_stds[agent]) * 0.5)

    def update(self, rollout):
        args, agents = self.args, range(len(self.actors))
        steps, num_envs = rollout.reward.shape
        states = torch.cat([rollout.state, rollout.next_state[-1:]]).flatten(0, 1).numpy()
        state = torch.as_tensor(standardised(states))
        obs = [
            torch.as_tensor(standardised([[*s, *one_hot] for s in states]))[:-num_envs]
            for one_hot in np.eye(len(agents))
        ]
        actions = [rollout.actions[:, :, agent].flatten(0, 1) for agent in agents]

        norm = HarlValueNorm(args.value_norm_beta)
        with torch.no_grad():
            predictions = self.critic(state)[:, 0]
            old = [self.distribution(i, obs[i]).log_prob(actions[i]) for i in agents]
        values = norm.denormalise(predictions).view(steps + 1, num_envs)
        live = (~rollout.terminated).double()
        advantages = harl_advantages(rollout.reward, values, live, torch.ones_like(live), args.gamma, args.gae_lambda)
        returns = (advantages + values[:-1]).flatten()
        advantages = advantages.flatten().numpy()
        advantages = torch.as_tensor((advantages - np.mean(advantages)) / (np.std(advantages) + 1e-5))[:, None]

        # one optimiser for each actor object, on the samples of all agents that it acts for
        objects = {id(actor): [i for i in agents if self.actors[i] is actor] for actor in self.actors}
        for members in objects.values():
            parameters = [*self.actors[members[0]].parameters(), self.log_stds[members[0]]]
            optimizer = torch.optim.Adam(parameters, lr=args.lr, eps=1e-5)
            for _ in range(args.num_epochs):
                terms, entropies = [], []
                for i in members:
                    policy = self.distribution(i, obs[i])
                    ratio = torch.prod(torch.exp(policy.log_prob(actions[i]) - old[i]), dim=-1, keepdim=True)
                    clipped = torch.clamp(ratio, 1 - args.clip, 1 + args.clip)
                    terms.append(torch.min(ratio * advantages, clipped * advantages))
                    entropies.append(policy.entropy().sum(-1))
                loss = -torch.cat(terms).mean() - args.entropy_coef * torch.cat(entropies).mean()
                self.norms.append(adam_step(optimizer, parameters, loss, args.max_grad_norm))

        parameters = list(self.critic.parameters())
        optimizer = torch.optim.Adam(parameters, lr=args.lr, eps=1e-5)
        before = predictions[:-num_envs]
        for _ in range(args.num_epochs):
            norm.update(returns)  # in every update, which after one rollout comes to the same as once
            now = self.critic(state[:-num_envs])[:, 0]
            near = before + (now - before).clamp(-args.clip, args.clip)
            errors = [harl_huber(norm.normalise(returns) - value, args.huber_delta) for value in (now, near)]
            self.norms.append(adam_step(optimizer, parameters, torch.max(*errors).mean(), args.max_grad_norm))


def mappo_learner(**changes):
    torch.manual_seed(0)
    high, agents = np.linspace(0.5, 1.5, changes["num_agents"] * ACT), changes.pop("num_agents")
    high = high.reshape(agents, ACT).astype(np.float32)
    settings = dict(rollout_steps=6, num_epochs=4, num_minibatches=1, clip=0.05, entropy_coef=0.1, lr=3e-3)
    settings |= dict(
        lr_schedule="constant", hidden_size=16, output_gain=1.0, max_grad_norm=1.0, huber_delta=0.5, num_envs=4
    )
    learner = mappo.Learner(STATE, -high, high, mappo.Args(**settings | changes), CPU)
    for module in (learner.actor, learner.critic):
        module.double()
    with torch.no_grad():  # norms, biases and log_std start alike: make them differ
        for name, parameter in itertools.chain(learner.actor.named_parameters(), learner.critic.named_parameters()):
            if not name.endswith("thresholds"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    learner.actor_coefficient.losses = learner.actor_coefficient.losses.double()
    return learner


@pytest.mark.parametrize("num_agents", [1, 3])
@pytest.mark.parametrize("sharing", ["full", "none"])
def test_a_rollouts_updates_are_harls(sharing, num_agents):
    learner = mappo_learner(sharing=sharing, num_agents=num_agents)
    plain = HarlMAPPO(learner)
    steps, num_envs = 6, 4
    rollout = mappo.Rollout(steps, num_envs, STATE, (num_agents, ACT), CPU)
    states = torch.randn(steps + 1, num_envs, STATE).double() * 3 + 1
    rollout.state, rollout.next_state, rollout.reward = states[:-1], states[1:], states[1:, :, 0].clone()
    rollout.terminated = torch.rand(steps, num_envs) < 0.2
    rollout.actions = rollout.actions.double()
    for agent, one_hot in enumerate(np.eye(num_agents)):
        obs = standardised([[*s, *one_hot] for s in rollout.state.flatten(0, 1).numpy()])
        with torch.no_grad():
            policy = plain.distribution(agent, torch.as_tensor(obs).view(steps, num_envs, -1))
            rollout.actions[:, :, agent] = policy.sample()
    learner.update(rollout)
    plain.update(rollout)
    assert min(plain.norms) < learner.args.max_grad_norm < max(plain.norms), "some gradients are to be clipped"
    names = [f"{kind}.{index}" for index in range(4) for kind in ("norms", "layers")]
    assert_networks(learner.critic, [plain.critic], names)
    assert_networks(learner.actor, plain.actors, names)
    ours = learner.actor.log_std.detach().reshape(-1, ACT)
    for agent, log_std in enumerate(plain.log_stds):
        torch.testing.assert_close(ours[agent % len(ours)], log_std.detach(), **CLOSE)


# ---- MATD3 ----
class PlainCritic(nn.Module):
    """Section 1's network for K members: masked weights, LayerNorm before each ReLU, which the members share."""

    def __init__(self, critic):
        super().__init__()
        for name in ("weight", "bias", "thresholds"):
            values = [nn.Parameter(getattr(layer, name).detach().clone()) for layer in critic.layers]
            setattr(self, name, nn.ParameterList(values))
        hidden = critic.layers[0].weight.shape[0]
        self.norm = nn.ModuleList(take_over(nn.LayerNorm(hidden), norm.weight, norm.bias) for norm in critic.norms)

    def forward(self, x, member):
        for index in range(3):
            x = torch.relu(self.norm[index - 1](x)) if index > 0 else x
            weight = self.weight[index]
            kept = torch.relu(weight.abs() - torch.sigmoid(self.thresholds[index][member]))
            x = x @ (torch.sign(weight) * kept).T + self.bias[index]
        return x[:, 0]


class HarlMATD3:
    """HARL's MATD3 with an ensemble critic, without diversity: `actors` is a list of each agent's network."""

    def __init__(self, learner):
        self.args, self.low, self.high = learner.args, learner.actor.low, learner.actor.high
        agents = range(learner.num_agents)
        self.actors = [self.policy(learner.actor, agent) for agent in agents]
        if self.args.sharing == "full":
            self.actors = self.actors[:1] * len(agents)
        copies = {id(actor): copy.deepcopy(actor) for actor in self.actors}
        adams = {id(actor): torch.optim.Adam(actor.parameters(), lr=self.args.actor_lr) for actor in self.actors}
        self.targets = [copies[id(actor)] for actor in self.actors]
        self.optimizers = [adams[id(actor)] for actor in self.actors]
        self.critic, self.target_critic = PlainCritic(learner.critic), PlainCritic(learner.target_critic)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.args.critic_lr)

    @staticmethod
    def policy(actor, agent):
        first, second, third = (linear(layer, agent) for layer in actor.layers)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.Tanh())

    def scale(self, agent):  # of bounds in float32, as environments give them
        return ((self.high[agent] - self.low[agent]).float() / 2).double()

    def act(self, actors, obs, agent):
        centre = ((self.high[agent] + self.low[agent]).float() / 2).double()
        return actors[agent](obs[:, agent]) * self.scale(agent) + centre

    def update(self, batch, noise, with_policy):
        agents, members = range(len(self.actors)), range(self.args.num_critics)
        with torch.no_grad():
            following = []
            for i in agents:
                disturbance = noise[:, i] * 0.2 * self.scale(i)
                disturbance = torch.max(torch.min(disturbance, 0.5 * self.scale(i)), -0.5 * self.scale(i))
                action = self.act(self.targets, batch.next_obs, i) + disturbance
                following.append(torch.max(torch.min(action, self.high[i]), self.low[i]))
            joint = torch.cat([batch.next_state, *following], -1)
            lowest = torch.stack([self.target_critic(joint, k) for k in members]).min(0).values
            target = batch.reward + batch.discount * lowest * (1 - batch.terminated.double())
        joint = torch.cat([batch.state, *(batch.actions[:, i] for i in agents)], -1)
        self.critic_optimizer.zero_grad()
        sum(((self.critic(joint, k) - target) ** 2).mean() for k in members).backward()
        self.critic_optimizer.step()
        if not with_policy:
            return
        for i in agents:
            actions = [self.act(self.actors, batch.obs, i) if j == i else batch.actions[:, j] for j in agents]
            joint = torch.cat([batch.state, *actions], -1)
            self.optimizers[i].zero_grad()
            (-torch.stack([self.critic(joint, k) for k in members]).mean()).backward()
            self.optimizers[i].step()
        for i in agents:  # every agent averages its own object, which may be all agents' one
            self.average(self.actors[i], self.targets[i])
        self.average(self.critic, self.target_critic)

    @torch.no_grad()
    def average(self, network, target):
        for fast, slow in zip(network.parameters(), target.parameters(), strict=True):
            slow.copy_(slow * (1 - self.args.polyak) + fast * self.args.polyak)


@pytest.mark.parametrize("num_agents", [1, 3])
@pytest.mark.parametrize("sharing", ["full", "none"])
def test_updates_without_masks_are_harls_agent_by_agent(sharing, num_agents, make_learner, make_batch, monkeypatch):
    settings = dict(
        sharing=sharing, num_critics=3, critic_diversity_coef=0.0, actor_lr=1e-2, critic_lr=1e-2, polyak=0.1
    )
    learner = make_learner(torch.float64, num_agents, **settings)
    plain = HarlMATD3(learner)
    clipped = 0
    for number in range(1, 7):
        batch = make_batch(num_agents=num_agents, dtype=torch.float64, seed=number)
        noise = torch.randn_like(batch.actions) * 2
        clipped += int((noise.abs() * 0.2 > 0.5).sum())
        monkeypatch.setattr(torch, "randn_like", lambda like, noise=noise: noise.clone())
        learner.update(batch, with_policy=number % 2 == 0)
        monkeypatch.undo()
        plain.update(batch, noise, with_policy=number % 2 == 0)
        layers = [f"layers.{index}" for index in range(3)]
        assert_networks(learner.actor, plain.actors, layers)
        assert_networks(learner.target_actor, plain.targets, layers)
        for ours, theirs in ((learner.critic, plain.critic), (learner.target_critic, plain.target_critic)):
            for name in ("weight", "bias", "thresholds"):
                for layer, value in zip(ours.layers, getattr(theirs, name), strict=True):
                    torch.testing.assert_close(getattr(layer, name), value, **CLOSE)
            for one, other in zip(ours.norms.parameters(), theirs.norm.parameters(), strict=True):
                torch.testing.assert_close(one, other, **CLOSE)
    assert clipped > 10


# ---- Tuned values ----
@pytest.mark.parametrize(
    ("env_id", "n_step", "policy_freq"),
    [  # n_step and policy_freq of the released tuned configurations, whose other values are the same for all six
        ("Ant-v2-4x2", 5, 2),
        ("HalfCheetah-v2-2x3", 10, 2),
        ("Hopper-v2-3x1", 5, 2),
        ("Walker2d-v2-2x3", 20, 8),
        ("Walker2d-v2-6x1", 25, 2),
        ("manyagent_swimmer-10x2", 10, 2),
    ],
)
def test_matd3s_values_are_those_of_the_released_configurations(env_id, n_step, policy_freq):
    args, _ = matd3.parse_args(["--env-id", env_id])
    released = dict(n_step=n_step, policy_freq=policy_freq, batch_size=1000, buffer_size=1_000_000, gamma=0.99)
    released |= dict(exploration_noise=0.1, policy_noise=0.2, noise_clip=0.5, polyak=0.005, num_critics=5)
    released |= dict(actor_lr=5e-4, critic_lr=1e-3, hidden_size=256, deque_len=100, layer_weights=(1.0, 2.0, 4.0))
    released |= dict(actor_threshold_scale=5.0, actor_threshold_bias=5.0, actor_diversity_coef=0.1)
    released |= dict(critic_threshold_scale=20.0, critic_threshold_bias=0.0, critic_diversity_coef=0.1)
    released |= dict(actor_reset_interval=1_000_000, actor_reset_ratio=0.5, critic_reset_interval=800_000)
    released |= dict(num_envs=10, train_interval=50, updates_per_round=50, warmup_steps=10_000, episode_limit=None)
    released |= dict(total_timesteps=10_000_000, eval_interval=100_000, eval_episodes=40, weighted_diversity=True)
    assert {name: getattr(args, name) for name in released} == released


@pytest.mark.parametrize(
    ("env_id", "episode_length", "ppo_epoch", "num_mini_batch", "clip_param", "entropy_coef", "lr", "schedule"),
    [  # of HARL's tuned configurations, where actor and critic have the same epochs, minibatches and learning rate
        ("Ant-v2-4x2", 200, 5, 1, 0.1, 0, 5e-4, "constant"),
        ("HalfCheetah-v2-2x3", 200, 15, 1, 0.05, 0.01, 5e-4, "constant"),
        ("Hopper-v2-3x1", 200, 10, 1, 0.05, 0, 5e-4, "linear"),
        ("Walker2d-v2-2x3", 200, 5, 2, 0.05, 0, 1e-3, "linear"),
        ("Walker2d-v2-6x1", 200, 5, 1, 0.1, 0.01, 5e-4, "constant"),
        ("Humanoid-v2-17x1", 100, 5, 1, 0.1, 0, 5e-4, "linear"),
    ],
)
def test_mappos_values_are_those_of_harls_configurations(
    env_id, episode_length, ppo_epoch, num_mini_batch, clip_param, entropy_coef, lr, schedule
):
    args, _ = mappo.parse_args(["--env-id", env_id])
    tuned = dict(rollout_steps=episode_length, num_epochs=ppo_epoch, num_minibatches=num_mini_batch, clip=clip_param)
    tuned |= dict(entropy_coef=entropy_coef, lr=lr, lr_schedule=schedule, gamma=0.99, gae_lambda=0.95, huber_delta=10.0)
    tuned |= dict(max_grad_norm=10.0, hidden_size=128, output_gain=0.01, num_envs=20, total_timesteps=10_000_000)
    tuned |= dict(episode_limit=None, eval_interval=100_000, eval_episodes=40, value_norm_beta=0.99999)
    assert {name: getattr(args, name) for name in tuned} == tuned
