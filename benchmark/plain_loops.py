"""Kaleidoscope-MATD3's update in plain Python loops over masks, critics, pairs of masks and agents.

The code follows the equations one by one, in any dtype. Tests compare the fast update with it in float64, and
benchmark/update.py times both. Training does not use it.
"""

import copy
from collections import deque

import torch
import torch.nn.functional as F


class Step(torch.autograd.Function):
    """1[x > 0]. Its backward pass returns tanh of the gradient that it gets (straight-through)."""

    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return torch.tanh(grad)


def forward(network, x, k):
    """x (B, in) through mask k of a MaskedMLP: (B, out)."""
    for index, layer in enumerate(network.layers):
        if index > 0:
            x = torch.relu(network.norms[index - 1](x))
        weight, bias = (layer.weight[k], layer.bias[k, 0]) if layer.weight.dim() == 3 else (layer.weight, layer.bias)
        if layer.thresholds is not None:
            weight = torch.sign(weight) * torch.relu(torch.abs(weight) - torch.sigmoid(layer.thresholds[k]))
        x = F.linear(x, weight, bias)
    return x


def diversity_loss(network, layer_weights, weighted=True):
    """L_div from the tensor of all pairwise differences, (M, M, out, in)."""
    num_masks = len(network.layers[0].thresholds)
    num_weights = sum(layer.weight.numel() for layer in network.layers)
    loss = 0.0
    for layer_weight, layer in zip(layer_weights, network.layers, strict=True):
        magnitude = layer.weight.detach().abs()
        masks = torch.stack([Step.apply(magnitude - torch.sigmoid(threshold)) for threshold in layer.thresholds])
        difference = masks[:, None] - masks[None, :]
        if weighted:
            difference = difference * magnitude
        loss = loss - layer_weight * difference.abs().sum()
    return loss / max(num_masks * (num_masks - 1) * num_weights, 1)


def coefficient(beta, rl_losses, diversities):
    rl, diversity = sum(rl_losses) / len(rl_losses), sum(diversities) / len(diversities)
    return abs(beta * rl / diversity) if diversity != 0 else beta


class PlainLearner:
    """The same learner as the script's Learner. Starts from copies of its networks and updates them in loops."""

    def __init__(self, learner, dtype=torch.float64):
        self.args, self.num_agents = learner.args, learner.num_agents
        for name in ("actor", "critic", "target_actor", "target_critic"):
            setattr(self, name, copy.deepcopy(getattr(learner, name)).to(dtype))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=self.args.actor_lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=self.args.critic_lr)
        self.alone = []  # with --sharing none: (parameters, optimiser) of each agent
        for agent in range(self.num_agents if self.args.sharing == "none" else 0):
            rows = [parameter.detach()[agent].clone() for parameter in self.actor.parameters()]
            self.alone.append((rows, torch.optim.Adam(rows, lr=self.args.actor_lr)))
        critic_length = self.args.deque_len * self.args.policy_freq
        actor_length = self.args.deque_len * self.num_agents
        self.critic_history = deque(maxlen=critic_length), deque(maxlen=critic_length)
        self.actor_history = deque(maxlen=actor_length), deque(maxlen=actor_length)

    def action(self, actor, obs, agent):
        return torch.tanh(forward(actor, obs[:, agent], agent)) * actor.scale[agent] + actor.centre[agent]

    def update_critic(self, batch, noise):
        """One critic step. noise: of the target actions (B, N, act), in half action ranges, already clipped."""
        args, actor = self.args, self.target_actor
        with torch.no_grad():
            next_actions = []
            for agent in range(self.num_agents):
                action = self.action(actor, batch.next_obs, agent) + noise[:, agent] * actor.scale[agent]
                next_actions.append(torch.max(torch.min(action, actor.high[agent]), actor.low[agent]))
            next_input = torch.cat([batch.next_state, *next_actions], -1)
            members = range(args.num_critics)
            next_values = torch.stack([forward(self.target_critic, next_input, k)[:, 0] for k in members])
            live = (~batch.terminated).to(next_values.dtype)
            target = batch.reward + batch.discount * live * next_values.min(0).values
        critic_input = torch.cat([batch.state, *batch.actions.unbind(1)], -1)
        loss = 0.0
        for k in range(args.num_critics):
            loss = loss + F.mse_loss(forward(self.critic, critic_input, k)[:, 0], target)
        diversity = torch.zeros_like(loss)
        if args.critic_sharing == "kaleidoscope":
            diversity = diversity_loss(self.critic, args.layer_weights, args.weighted_diversity)
        self.critic_history[0].append(loss.item())
        self.critic_history[1].append(diversity.item())
        total = loss + coefficient(args.critic_diversity_coef, *self.critic_history) * diversity
        self.critic_optimizer.zero_grad()
        total.backward()
        self.critic_optimizer.step()

    def update_actor(self, batch):
        args = self.args
        # the actor maximises the ensemble's mean, or the first of separate critics, as in TD3
        climbed = [0] if args.critic_sharing == "none" else list(range(args.num_critics))
        self.critic.requires_grad_(False)
        for agent in range(self.num_agents):
            actions = list(batch.actions.unbind(1))
            actions[agent] = self.action(self.actor, batch.obs, agent)
            critic_input = torch.cat([batch.state, *actions], -1)
            loss = 0.0
            for k in climbed:
                loss = loss - forward(self.critic, critic_input, k).mean() / len(climbed)
            diversity = torch.zeros_like(loss)
            if args.sharing == "kaleidoscope":
                diversity = diversity_loss(self.actor, args.layer_weights, args.weighted_diversity)
            self.actor_history[0].append(loss.item())
            self.actor_history[1].append(diversity.item())
            total = loss + coefficient(args.actor_diversity_coef, *self.actor_history) * diversity
            self.actor_optimizer.zero_grad()
            total.backward()
            if args.sharing == "none":
                self.step_alone(agent)
            else:
                self.actor_optimizer.step()
        self.critic.requires_grad_(True)

    @torch.no_grad()
    def step_alone(self, agent):
        """An Adam step for one agent's rows of all parameters, as if they were a separate network."""
        rows, optimizer = self.alone[agent]
        for row, parameter in zip(rows, self.actor.parameters(), strict=True):
            row.grad = parameter.grad[agent].clone()
        optimizer.step()
        for row, parameter in zip(rows, self.actor.parameters(), strict=True):
            parameter[agent] = row

    @torch.no_grad()
    def update_targets(self):
        """Polyak averaging: first the critic's target, then, agent by agent, the target of the agent's network.

        So a network that all agents share is averaged once per agent, and an agent's separate network once.
        """
        polyak, agents = self.args.polyak, [slice(None)] * self.num_agents
        if self.args.sharing == "none":
            agents = range(self.num_agents)  # the rows of the agent's network
        pairs = [(self.critic, self.target_critic, slice(None))]
        pairs += [(self.actor, self.target_actor, rows) for rows in agents]
        for network, target, rows in pairs:
            for parameter, slow in zip(network.parameters(), target.parameters(), strict=True):
                slow[rows] = (1 - polyak) * slow[rows] + polyak * parameter[rows]

    def update(self, batch, noise, with_policy):
        self.update_critic(batch, noise)
        if with_policy:
            self.update_actor(batch)
            self.update_targets()
