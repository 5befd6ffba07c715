"""Kaleidoscope-MATD3 on multi-agent MuJoCo, in one file.

    python kalei_matd3_mamujoco.py --env-id Ant-v2-4x2           # train
    tensorboard --logdir runs                                    # watch
    python kalei_matd3_mamujoco.py --evaluate runs/RUN/model.pt  # evaluate what --save-model wrote

All agents share one actor network and all critics one critic network. What makes them differ is a learnable mask
over the shared weights for each of them, and a loss that drives the masks apart. The method is from Li, Pan and
Zhang, "Kaleidoscope: Learnable Masks for Heterogeneous Multi-agent Reinforcement Learning" (NeurIPS 2024,
arXiv:2410.08540); where the paper is silent, the authors' released code decides.

Letters in shapes: B batch, N agents, K critics, M masks (N for the actor, K for the critic), E environments,
S numbers of state, O of an observation. A mask is a leading dimension of networks and losses.
"""

import copy
import dataclasses
import functools
import os
import time
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import experiment
from cuda_graphs import OneLaunch
from mamujoco_env import MaMuJoCoVecEnv, agent_observations, standardise


@dataclasses.dataclass
class Args(experiment.RunArgs):
    """Train Kaleidoscope-MATD3 on a multi-agent MuJoCo task, or evaluate a saved model."""

    exp_name: str = "kalei_matd3_mamujoco"
    """name of this experiment, part of the run's folder"""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """of the hidden layers' products; auto: bfloat16 where the CPU has it, TF32 on a GPU, else float32"""
    checkpoint_buffer: bool = True
    """keep the replay buffer in checkpoints; without, a resumed run fills a new one before it learns on"""
    num_envs: int = 10
    """environments stepped side by side (E)"""

    # MATD3
    sharing: Literal["kaleidoscope", "full", "none"] = "kaleidoscope"
    """what the agents' policies share: weights under masks, one network without masks, or nothing"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    batch_size: int = 1_000
    """transitions in an update (B)"""
    warmup_steps: int = 10_000
    """environment steps of uniformly random actions before the first update"""
    train_interval: int = 50
    """steps of every environment between two rounds of updates"""
    updates_per_round: int = 50
    """critic updates in a round"""
    policy_freq: int | None = None
    """critic updates for one policy update; by default the value of TUNED for the env id"""
    n_step: int | None = None
    """rewards in an n-step return; by default the value of TUNED for the env id"""
    gamma: float = 0.99
    """discount"""
    polyak: float = 0.005
    """rate of the targets per policy update; a target actor that all agents share takes N steps of it, as released"""
    actor_lr: float = 5e-4
    """Adam's learning rate for the actor's weights and thresholds"""
    critic_lr: float = 1e-3
    """Adam's learning rate for the critic's weights and thresholds"""
    exploration_noise: float = 0.1
    """std of the noise on actions, in half action ranges"""
    target_noise: float = 0.2
    """std of the noise on target actions, in half action ranges"""
    target_noise_clip: float = 0.5
    """bound of the noise on target actions, in half action ranges"""
    hidden_size: int = 256
    """width of the two hidden layers of actor and critic"""

    # masks of the actor, one an agent
    actor_threshold_scale: float = 5.0
    """thresholds start as -(U[0, 1) * scale + bias); a weight is kept where |W| > sigmoid(threshold)"""
    actor_threshold_bias: float = 5.0
    """see actor_threshold_scale"""
    actor_diversity_coef: float = 0.1
    """beta: the diversity loss is scaled to this share of the actor loss; 0 turns it off"""
    actor_reset_interval: int = 1_000_000
    """environment steps between two resets of actor weights that no mask keeps; 0 turns them off"""
    actor_reset_ratio: float = 0.5
    """probability that such a weight is reset"""

    # masks of the critic, one a member of the ensemble
    num_critics: int = 5
    """members of the critic ensemble (K)"""
    critic_threshold_scale: float = 20.0
    """as actor_threshold_scale"""
    critic_threshold_bias: float = 0.0
    """as actor_threshold_bias"""
    critic_diversity_coef: float = 0.1
    """beta: the diversity loss is scaled to this share of the critic loss; 0 turns it off"""
    critic_reset_interval: int = 800_000
    """environment steps between two resets of one critic's thresholds; 0 turns them off"""

    # both
    layer_weights: tuple[float, float, float] = (1.0, 2.0, 4.0)
    """lambda: weights of the three layers in the diversity loss"""
    weighted_diversity: bool = True
    """weigh differences of masks by |W|"""
    history_length: int = 100
    """policy updates whose losses are averaged for the adaptive coefficients"""


# (n_step, policy_freq) as tuned by the authors, taken for v5 tasks too; a flag that is set wins
TUNED = {
    "Ant-v2-4x2": (5, 2),
    "HalfCheetah-v2-2x3": (10, 2),
    "Hopper-v2-3x1": (5, 2),
    "Walker2d-v2-2x3": (20, 8),
    "Walker2d-v2-6x1": (25, 2),
    "manyagent_swimmer-10x2": (10, 2),
}
UNTUNED = (10, 2)  # for the other env ids
UNMASKED = 1_000.0  # threshold bias that masks nothing: sigmoid(-1000) is 0


# ---- Masked networks ----
def resolve_precision(precision, device_type):
    """What --precision auto means: bfloat16 where a CPU multiplies it natively, TF32 on a GPU, else float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bfloat16" and device_type == "cpu" and not native:
        experiment.say("warning: this CPU does not multiply bfloat16 natively: --precision bfloat16 is slow here")
    if precision == "auto":
        precision = "tf32" if device_type == "cuda" else "bfloat16" if native else "float32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    return precision


class MaskedLinear(nn.Module):
    """One weight W (out, in) and bias (out,), shared by M masks with thresholds s (M, out, in).

    Mask k keeps the weights with |W| > sigmoid(s_k) and shrinks what it keeps, W_k = sign(W) relu(|W| - sigmoid(s_k)),
    so that gradients reach W and s_k: the paper's adaptive partial parameter sharing, by the soft-threshold
    reparameterisation of Kusupati et al. 2020. With `own`, nothing is shared: every mask has a W and a bias of its own,
    (M, out, in) and (M, 1, out).
    """

    def __init__(self, num_masks, inputs, outputs, threshold_scale, threshold_bias, own=False):
        super().__init__()
        self.threshold_scale, self.threshold_bias, self.own = threshold_scale, threshold_bias, own
        self.weight = nn.Parameter(torch.empty((num_masks, outputs, inputs) if own else (outputs, inputs)))
        self.bias = nn.Parameter(torch.empty((num_masks, 1, outputs) if own else outputs))
        self.thresholds = nn.Parameter(torch.empty(num_masks, outputs, inputs))
        with torch.no_grad():
            self.bias.uniform_(-(inputs**-0.5), inputs**-0.5)
            self.weight.copy_(self.fresh_weight())
            self.thresholds.copy_(self.fresh_thresholds())

    def fresh_weight(self):
        """Like W, drawn as torch.nn.Linear draws it."""
        bound = self.weight.shape[-1] ** -0.5
        return torch.empty_like(self.weight).uniform_(-bound, bound)

    def fresh_thresholds(self):
        """(M, out, in), drawn as -(U[0, 1) * scale + bias)."""
        return -(torch.rand_like(self.thresholds) * self.threshold_scale + self.threshold_bias)

    def effective(self, masks=slice(None)):
        """W and the bias as each of `masks` sees them: (len(masks), out, in) and what adds to (len(masks), B, out)."""
        weight, bias = (self.weight[masks], self.bias[masks]) if self.own else (self.weight, self.bias)
        kept = torch.relu(weight.abs() - torch.sigmoid(self.thresholds[masks]))
        return torch.sign(weight) * kept, bias

    def masks(self):
        """(M, out, in) bool: what each mask keeps."""
        return self.weight.abs() > torch.sigmoid(self.thresholds)


def masked_linear(x, weight, bias):
    """x (B, in) or (M, B, in) through M effective layers (M, out, in) in one product: (M, B, out), in the bias's dtype.

    The product is made in the weight's dtype: in bfloat16, both operands are rounded to 8 bits, and sums are float32.
    """
    x = x.to(weight.dtype).expand(len(weight), -1, -1)
    if weight.dtype != bias.dtype:
        return bias + x @ weight.mT
    return torch.baddbmm(bias, x, weight.mT)


class MaskedMLP(nn.Module):
    """Three masked layers with ReLU between them, and with `layer_norm` a LayerNorm, shared by the masks, before it.

    `sharing` says what the M masks' networks have in common:
      kaleidoscope   everything but the masks
      full           everything: the thresholds' sigmoids are 0, which keeps all of W as it is
      none           nothing: the same thresholds, and a W and a bias of their own
    The effective layers are an argument of their own, since they often stay the same over many products.
    """

    def __init__(self, num_masks, sizes, thresholds, layer_norm, sharing, precision="float32"):
        """sizes: (inputs, hidden, outputs); thresholds: their (scale, bias) at the start."""
        super().__init__()
        self.bfloat16 = precision == "bfloat16"
        (inputs, hidden, outputs), (scale, bias) = sizes, thresholds
        thresholds = (scale, bias if sharing == "kaleidoscope" else UNMASKED)
        shapes = ((inputs, hidden), (hidden, hidden), (hidden, outputs))
        layers = [MaskedLinear(num_masks, *shape, *thresholds, own=sharing == "none") for shape in shapes]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) if layer_norm else nn.Identity() for _ in range(2))

    def effective_layers(self, masks=slice(None)):
        """Effective weights (M, out, in), those of hidden layers in the dtype of their products, and biases."""
        *hidden, output = [layer.effective(masks) for layer in self.layers]
        return [(weight.bfloat16() if self.bfloat16 else weight, bias) for weight, bias in hidden] + [output]

    def forward(self, x, layers):
        """x (B, in) or (M, B, in) -> (M, B, out), through effective layers: one product a layer for all masks."""
        return self.after_first(masked_linear(x, *layers[0]), layers)

    def after_first(self, x, layers):
        """The same from the first layer's output (M, B, hidden) on, which is written to."""
        for norm, layer in zip(self.norms, layers[1:], strict=True):
            x = masked_linear(torch.relu_(norm(x)), *layer)
        return x

    @torch.no_grad()
    def sparsity(self):
        """(3,): each layer's share of zeros among the effective weights of all masks."""
        return torch.stack([1 - layer.masks().float().mean() for layer in self.layers])

    @torch.no_grad()
    def mask_difference(self):
        """The share of weights that one mask keeps and another drops, averaged over pairs of masks."""
        differing = pairs = 0
        for layer in self.layers:
            n, keep = len(layer.thresholds), layer.masks().sum(0)
            differing += (2 * keep * (n - keep)).sum()
            pairs += n * (n - 1) * keep.numel()
        return differing / max(pairs, 1)


class Actor(MaskedMLP):
    """Deterministic policies of N agents, one mask each: tanh scaled to the action bounds low, high (N, act)."""

    def __init__(self, observation_size, low, high, args):
        thresholds = (args.actor_threshold_scale, args.actor_threshold_bias)
        sizes = (observation_size, args.hidden_size, low.shape[1])
        super().__init__(len(low), sizes, thresholds, False, args.sharing, args.precision)
        for name, value in (("low", low), ("high", high), ("centre", (high + low) / 2), ("scale", (high - low) / 2)):
            self.register_buffer(name, torch.as_tensor(value))

    def act(self, obs, layers):
        """All agents: obs (B, N, obs) -> actions (B, N, act)."""
        return torch.tanh(self(obs.transpose(-3, -2), layers)).transpose(-3, -2) * self.scale + self.centre

    def act_alone(self, obs, agent):
        """One agent: its obs (B, obs) -> its actions (B, act)."""
        actions = torch.tanh(self(obs, self.effective_layers(slice(agent, agent + 1))).squeeze(-3))
        return actions * self.scale[agent] + self.centre[agent]


class Critic(MaskedMLP):
    """An ensemble of K action values, one mask each: state and joint action (B, S + N act) -> (K, B, 1)."""

    def __init__(self, inputs, args):
        thresholds = (args.critic_threshold_scale, args.critic_threshold_bias)
        sizes = (inputs, args.hidden_size, 1)
        super().__init__(args.num_critics, sizes, thresholds, True, "kaleidoscope", args.precision)


# ---- Mask diversity ----
class PairwiseMaskDifference(torch.autograd.Function):
    """sum_ij || (M_i - M_j) * |W| ||_1 over all ordered pairs of masks of a layer, in O(M) and not O(M^2).

    Where k of the M masks keep a weight, 2 k (M - k) ordered pairs differ. The gradient towards mask i is that of
    the plain form, 2 (M M_i - k) |W|, not autograd's of k (M - k). It passes through the step function
    M_i = 1[|W| > sigmoid(s_i)] as tanh(gradient) and reaches the thresholds only: W counts as a constant.
    """

    @staticmethod
    def forward(ctx, thresholds, weight, weighted):
        """thresholds (..., M, out, in), weight (..., out, in) -> (...)."""
        sigmoid, magnitude = torch.sigmoid(thresholds), weight.abs()
        masks = magnitude.unsqueeze(-3) > sigmoid
        importance = magnitude if weighted else torch.ones_like(magnitude)
        keep = masks.sum(-3, dtype=weight.dtype)  # k of each weight
        drop = masks.shape[-3] - keep
        ctx.save_for_backward(sigmoid, masks, keep * importance, drop * importance)
        return (2 * keep * drop * importance).sum((-2, -1))

    @staticmethod
    def backward(ctx, grad):
        sigmoid, masks, keep, drop = ctx.saved_tensors
        grad = 2 * grad[..., None, None]
        kept, dropped = torch.tanh(grad * drop), torch.tanh(-grad * keep)  # towards masks that keep or drop a weight
        slope = (sigmoid - 1).mul_(sigmoid)  # of -sigmoid(s)
        return slope.mul_(torch.where(masks, kept.unsqueeze(-3), dropped.unsqueeze(-3))), None, None


def diversity_loss(network, layer_weights, weighted=True):
    """L_div, the paper's diversity regularisation, normalised as released: minus the weighted mean difference."""
    num_masks = network.layers[0].thresholds.shape[-3]
    num_weights = sum(layer.weight.shape[-2] * layer.weight.shape[-1] for layer in network.layers)
    loss = 0.0
    for layer_weight, layer in zip(layer_weights, network.layers, strict=True):
        loss = loss - layer_weight * PairwiseMaskDifference.apply(layer.thresholds, layer.weight.detach(), weighted)
    return loss / max(num_masks * (num_masks - 1) * num_weights, 1)


class AdaptiveCoefficient(nn.Module):
    """The weight of the diversity loss: |beta * mean(RL losses) / mean(diversity losses)| over the latest `length`.

    The histories are rings on the device. Both hold equally many losses and zeros, so that the ratio of the sums
    is the ratio of the means.
    """

    def __init__(self, beta, length, device):
        super().__init__()
        self.beta = beta
        self.register_buffer("losses", torch.zeros(2, length, device=device))
        self.register_buffer("slot", torch.zeros(1, dtype=torch.long, device=device))

    def forward(self, rl_loss, diversity):
        latest = torch.stack([rl_loss, diversity]).detach()
        experiment.average([latest])
        self.losses.index_copy_(1, self.slot, latest[:, None])
        self.slot.add_(1).remainder_(self.losses.shape[1])
        rl_sum, diversity_sum = self.losses.sum(1)
        ratio = rl_sum / torch.where(diversity_sum == 0, 1.0, diversity_sum)
        return torch.where(diversity_sum == 0, self.beta, (self.beta * ratio).abs())


# ---- Resets ----
def reached(interval, previous_step, step):
    """Whether the steps after previous_step, up to `step`, reached a multiple of `interval`; never if it is 0."""
    return interval > 0 and step // interval > previous_step // interval


def reset_due(interval, previous_step, step, total_steps):
    """Whether a multiple of `interval` was reached, and more than one interval is left before the run's end."""
    return reached(interval, previous_step, step) and total_steps - step > interval


@torch.no_grad()
def reset_actor(actor, ratio):
    """Draw afresh, with probability `ratio`, each weight that no mask keeps, and its thresholds. Returns how many."""
    num_reset = 0
    for layer in actor.layers:
        reset = ~layer.masks().any(0) & (torch.rand_like(layer.weight) < ratio)
        layer.weight.copy_(torch.where(reset, layer.fresh_weight(), layer.weight))
        layer.thresholds.copy_(torch.where(reset, layer.fresh_thresholds(), layer.thresholds))
        num_reset += reset.sum()
    return num_reset


def member_to_reset(step, args):
    """The ensemble's members take turns: 0 at the first reset, then 1, ..., K - 1, 0, ...."""
    return (step // args.critic_reset_interval - 1) % args.num_critics


@torch.no_grad()
def reset_critic(critic, member):
    """Draw one member's thresholds afresh."""
    for layer in critic.layers:
        layer.thresholds[member] = layer.fresh_thresholds()[member]


# ---- n-step replay ----
class Batch(NamedTuple):
    """What an update works on: n-step transitions as the networks see them."""

    state: torch.Tensor  # (B, S), standardised
    obs: torch.Tensor  # (B, N, O)
    actions: torch.Tensor  # (B, N, act)
    reward: torch.Tensor  # (B,), discounted sum of the n-step return's rewards
    discount: torch.Tensor  # (B,), gamma to the power of their number
    next_state: torch.Tensor  # (B, S), standardised, where the return bootstraps
    next_obs: torch.Tensor  # (B, N, O)
    terminated: torch.Tensor  # (B,) bool


class Replay:
    """A ring of `rows` steps of E environments, on the device. It holds states only: they imply the observations."""

    ARRAYS = ("state", "actions", "reward", "terminated", "ended")  # and next_state

    @staticmethod
    def following(filled, rows):
        """Of each of the first `filled` rows the row after it."""
        return (torch.arange(filled) + 1) % rows

    def __init__(self, rows, num_envs, state_size, action_shape, n_step, gamma, device, columns=None):
        shape = (rows, num_envs)
        # zeros, since an n-step return looks ahead into rows that are not filled yet, and NaN times 0 is NaN
        self.state = torch.zeros(*shape, state_size, device=device)
        self.next_state = torch.zeros(*shape, state_size, device=device)
        self.actions = torch.zeros(*shape, *action_shape, device=device)
        self.reward = torch.zeros(shape, device=device)
        self.terminated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)  # terminated or truncated
        self.steps_ahead = torch.arange(n_step, device=device)
        self.gamma = gamma
        self.rows, self.num_envs, self.num_agents = rows, num_envs, action_shape[0]
        self.columns = None if columns is None else torch.as_tensor(columns, device=device)  # that agents see
        self.next_row = 0
        # rows, as tensors on the device, so that sampling can be captured in a graph
        self.newest = torch.zeros((), dtype=torch.long, device=device)
        self.filled = torch.zeros((), dtype=torch.long, device=device)

    def add(self, steps):
        """Store steps of all environments: a list of (state, actions, reward, next_state, terminated, truncated).

        Each is a tuple of arrays of E rows. All steps go to the device together, in six copies.
        """
        count = min(len(steps), self.rows)
        row = (self.next_row + torch.arange(len(steps))[-count:]) % self.rows
        *arrays, terminated, truncated = (
            torch.from_numpy(np.stack(values)) for values in zip(*steps[-count:], strict=True)
        )
        names = ("state", "actions", "reward", "next_state", "terminated", "ended")
        for name, values in zip(names, (*arrays, terminated, terminated | truncated), strict=True):
            stored = getattr(self, name)
            stored[row] = values.to(stored.dtype).to(stored.device)
        self.next_row = (self.next_row + len(steps)) % self.rows
        self.newest.fill_((self.next_row - 1) % self.rows)
        self.filled.add_(len(steps)).clamp_(max=self.rows)

    def state_dict(self):
        """What is stored and where, compactly: next states only where the following row does not hold them."""
        filled = int(self.filled)
        saved = {name: getattr(self, name)[:filled].clone() for name in self.ARRAYS}
        known = (self.next_state[:filled] == self.state[self.following(filled, self.rows)]).all(-1)
        saved |= {"known": known, "next_state": self.next_state[:filled][~known]}
        return saved | {"newest": int(self.newest), "rows": self.rows}

    def load_state_dict(self, saved):
        """Store what state_dict returned, in the same rows of a ring that has at least as many as are filled."""
        filled, known = len(saved["state"]), saved["known"]
        for name in self.ARRAYS:
            getattr(self, name)[:filled] = saved[name]
        self.next_state[:filled] = self.state[self.following(filled, saved["rows"])]
        self.next_state[:filled][known.logical_not()] = saved["next_state"].to(self.state.device)
        self.next_row = (saved["newest"] + 1) % self.rows
        self.newest.fill_(saved["newest"])
        self.filled.fill_(filled)

    def n_step_return(self, row, env):
        """From rows and environments (B,): reward (B,), discount (B,), and the row (B,) of the last step reached.

        The return takes up to n rewards. It stops after a step that ended the episode, and at the newest step.
        """
        rows = (row[:, None] + self.steps_ahead) % self.rows  # (B, n)
        last = self.ended[rows, env[:, None]] | (rows == self.newest)
        taken = torch.cumsum(last, 1) - last.long() == 0  # (B, n): no stop before this step
        rewards = self.reward[rows, env[:, None]] * self.gamma**self.steps_ahead
        num_taken = taken.sum(1)
        return (rewards * taken).sum(1), self.gamma**num_taken, (row + num_taken - 1) % self.rows

    def sample(self, batch_size):
        """Draw a Batch with replacement, uniformly over what is stored."""
        device = self.reward.device
        # float64, so that every row can be drawn and rounding never reaches `filled`
        row = (torch.rand(batch_size, dtype=torch.float64, device=device) * self.filled).long()
        env = torch.randint(self.num_envs, (batch_size,), device=device)
        reward, discount, last = self.n_step_return(row, env)
        state, next_state = self.state[row, env], self.next_state[last, env]
        return Batch(
            state=standardise(state),
            obs=agent_observations(state, self.num_agents, columns=self.columns),
            actions=self.actions[row, env],
            reward=reward,
            discount=discount,
            next_state=standardise(next_state),
            next_obs=agent_observations(next_state, self.num_agents, columns=self.columns),
            terminated=self.terminated[last, env],
        )


# ---- The update ----
class Learner(nn.Module):
    """Networks, targets, optimisers and loss histories, and the updates that change them in place on the device."""

    def __init__(self, state_size, low, high, args, device, columns=None):
        super().__init__()
        self.args = args
        self.num_agents, self.act_size = low.shape
        seen = state_size if columns is None else columns.shape[1]
        self.actor = Actor(seen + self.num_agents, low, high, args).to(device)
        self.critic = Critic(state_size + low.size, args).to(device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_parameters = list(self.actor.parameters())
        adam = dict(fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = torch.optim.Adam(self.actor_parameters, lr=args.actor_lr, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=args.critic_lr, **adam)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer]
        # in critic updates and in agents' updates, both the length of `history_length` policy updates
        critic_length, actor_length = args.history_length * args.policy_freq, args.history_length * self.num_agents
        self.critic_coefficient = AdaptiveCoefficient(args.critic_diversity_coef, critic_length, device)
        self.actor_coefficient = AdaptiveCoefficient(args.actor_diversity_coef, actor_length, device)

    def update_critic(self, batch):
        """One step on the sum of the members' TD errors. Returns its losses as detached scalars on the device."""
        args = self.args
        with torch.no_grad():
            actor = self.target_actor
            noise = torch.randn_like(batch.actions).mul_(args.target_noise)
            noise = noise.clamp_(-args.target_noise_clip, args.target_noise_clip) * actor.scale
            next_actions = actor.act(batch.next_obs, actor.effective_layers()) + noise
            next_actions = torch.clamp(next_actions, actor.low, actor.high)
            next_input = torch.cat([batch.next_state, next_actions.flatten(-2)], -1)
            next_values = self.target_critic(next_input, self.target_critic.effective_layers()).squeeze(-1)  # (K, B)
            bootstrap = batch.discount * ~batch.terminated
            target = batch.reward + bootstrap * next_values.amin(-2)  # (B,): the lowest of the members, as TD3's

        critic_input = torch.cat([batch.state, batch.actions.flatten(-2)], -1)
        values = self.critic(critic_input, self.critic.effective_layers()).squeeze(-1)  # (K, B)
        loss = (values - target).square().mean(-1).sum(-1)
        diversity = diversity_loss(self.critic, args.layer_weights, args.weighted_diversity)
        coefficient = self.critic_coefficient(loss, diversity)
        total = loss + coefficient * diversity
        self.critic_optimizer.zero_grad()
        total.backward()
        experiment.average([parameter.grad for parameter in self.critic.parameters()])
        self.critic_optimizer.step()
        return {
            "losses/critic": loss.detach(),
            "losses/critic_diversity": diversity.detach(),
            "losses/critic_total": total.detach(),
            "coefficients/critic": coefficient,
            "values/q": values.detach().mean(),
            "values/target": target.mean(),
        }

    def update_actor(self, batch):
        """One step for each agent in turn on the shared weights. Returns mean losses over agents, on the device.

        Agent i's loss takes agent i's action from its policy, and the others' from the buffer.
        """
        args, act = self.args, self.act_size
        with torch.no_grad():  # the critic stays the same for all agents, and so does most of its first layer
            critic_layers = self.critic.effective_layers()
            weight, bias = critic_layers[0]
            joint_actions = batch.actions.flatten(-2)
            first = masked_linear(torch.cat([batch.state, joint_actions], -1), weight, bias)
            action_columns = weight[..., batch.state.shape[-1] :].mT.to(first.dtype).contiguous()  # (K, N act, hidden)
        logs = []
        for agent in range(self.num_agents):
            own = slice(agent * act, (agent + 1) * act)
            actions = self.actor.act_alone(batch.obs[..., agent, :], agent)
            change = (actions - joint_actions[..., own]).expand(args.num_critics, -1, -1)
            hidden = torch.baddbmm(first, change, action_columns[:, own])  # (K, B, hidden)
            loss = -self.critic.after_first(hidden, critic_layers).mean()
            diversity = torch.zeros_like(loss)  # without masks
            if args.sharing == "kaleidoscope":
                diversity = diversity_loss(self.actor, args.layer_weights, args.weighted_diversity)
            coefficient = self.actor_coefficient(loss, diversity)
            total = loss + coefficient * diversity
            total.backward(inputs=self.actor_parameters)  # leaves the critic's gradients alone
            # gradients towards networks of their own do not meet: one step at the end is one for each agent
            if args.sharing != "none" or agent == self.num_agents - 1:
                experiment.average([parameter.grad for parameter in self.actor_parameters])
                self.actor_optimizer.step()
                self.actor_optimizer.zero_grad()
            logs.append(torch.stack([loss.detach(), diversity.detach(), coefficient]))
        loss, diversity, coefficient = torch.stack(logs).mean(0)
        return {"losses/actor": loss, "losses/actor_diversity": diversity, "coefficients/actor": coefficient}

    @torch.no_grad()
    def update_targets(self):
        """Polyak averaging: the target critic once, and each agent's target actor once.

        Where all agents hold one network, that is N times for it, as released, and done in one step here; networks of
        their own are averaged once each.
        """
        times = 1 if self.args.sharing == "none" else self.num_agents
        rates = (self.args.polyak, 1 - (1 - self.args.polyak) ** times)
        pairs = ((self.critic, self.target_critic), (self.actor, self.target_actor))
        for rate, (network, target) in zip(rates, pairs, strict=True):
            for parameter, target_parameter in zip(network.parameters(), target.parameters(), strict=True):
                target_parameter.lerp_(parameter, rate)

    def update(self, batch, with_policy):
        """A critic update and, `with_policy`, the agents' updates and the targets'. Returns losses by name."""
        logs = self.update_critic(batch)
        if with_policy:
            logs |= self.update_actor(batch)
            self.update_targets()
        return logs


# ---- Command line ----
def parse_args(argv=None):
    """(args, checkpoint or None), checked, tuned values filled in. Bad ones end in one line and exit code 2."""
    args, checkpoint = experiment.read_command_line(Args, argv)
    tuned_values = TUNED.get(str(args.env_id).replace("-v5", "-v2"), UNTUNED)
    for name, tuned in zip(("n_step", "policy_freq"), tuned_values, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, tuned)
    check_args(args)
    args.precision = resolve_precision(args.precision, experiment.device_type(args))
    return args, checkpoint


def check_args(args):
    """Refuse what cannot work, before anything is made."""
    experiment.check_common_args(args)
    experiment.require_count(args, "buffer_size batch_size train_interval updates_per_round policy_freq n_step")
    experiment.require_share(args, "polyak")
    experiment.require_size(args, "exploration_noise target_noise target_noise_clip actor_lr critic_lr")
    experiment.require(args, "buffer_size", lambda x: x >= args.num_envs, f"at least --num-envs {args.num_envs}")
    warmup = args.warmup_steps
    experiment.require(args, "total_timesteps", lambda x: x > warmup, f"more than --warmup-steps {warmup}")
    available = min(warmup, args.buffer_size)
    expected = f"at most the {available} transitions that the buffer holds after the warm-up"
    experiment.require(args, "batch_size", lambda x: x <= available, expected)


@experiment.one_line_without_memory
def main():
    args, checkpoint = parse_args()
    device, rank, num_processes = experiment.start(args)
    if args.evaluate is not None:
        return experiment.evaluate_file(args, device, Actor)

    expected = f"a multiple of the {num_processes} processes"
    experiment.require(args, "batch_size", lambda x: x % num_processes == 0, expected)

    stop = experiment.StopSignals()
    torch.manual_seed(args.seed)  # the same weights in all processes
    seed = experiment.seed_of_process(args.seed, rank)  # and other environments and draws
    with experiment.refuse_what_does_not_fit():
        settings = (seed, args.num_threads, args.episode_limit, args.agent_obsk)
        envs = MaMuJoCoVecEnv(args.env_id, args.num_envs, *settings)
        space = envs.single_action_space
        learner = Learner(envs.state_size, space.low, space.high, args, device, envs.columns)
        actor = learner.actor
        num_envs = args.num_envs * num_processes
        buffer_rows = -(-min(args.buffer_size, args.total_timesteps) // num_envs)
        sizes = (buffer_rows, args.num_envs, envs.state_size, space.shape)
        replay = Replay(*sizes, args.n_step, args.gamma, device, envs.columns)
        evaluation = experiment.Evaluation(args) if args.eval_episodes and rank == 0 else None

    def update(with_policy):
        return learner.update(replay.sample(args.batch_size // num_processes), with_policy)

    launch = (device, args.cudagraph, args.compile)
    updates = [OneLaunch(functools.partial(update, with_policy), *launch) for with_policy in (False, True)]

    if rank > 0:
        torch.manual_seed(seed)
    global_step = num_updates = trained_steps = 0
    training_seconds = 0.0  # without warm-up and evaluation
    learning_starts = args.warmup_steps
    logs, status = {}, {}
    obs, _ = envs.reset()
    if checkpoint is not None:
        names = "global_step num_updates trained_steps training_seconds learning_starts"
        obs, counters, logs = experiment.restore(checkpoint, learner, envs, names, replay)
        global_step, num_updates, trained_steps, training_seconds, learning_starts = counters
        if checkpoint["replay"] is None:
            learning_starts = global_step + args.warmup_steps
            print(f"no replay buffer in the checkpoint: {args.warmup_steps} steps without learning fill a new one")
        checkpoint = None  # frees its copy of the buffer
    state = envs.state
    run_folder, writer = experiment.open_run(args, global_step, rank)
    if rank == 0:
        names = ("sharing", "n_step", "policy_freq", "precision")
        flags = ", ".join(f"{name} {getattr(args, name)}" for name in names)
        print(f"{run_folder} on {num_processes} x {device}: {flags}; {experiment.observation_sizes(envs)}")
    bar = dict(unit="step", unit_scale=True, dynamic_ncols=True, disable=rank > 0)
    progress = tqdm(total=args.total_timesteps, initial=global_step, **bar)

    while global_step < args.total_timesteps:
        previous_step, round_start = global_step, time.perf_counter()

        # act: the weights stay the same for a whole round, and so do the effective ones
        with torch.no_grad():
            layers = actor.effective_layers()
        steps = []
        for _ in range(min(args.train_interval, -(-(args.total_timesteps - global_step) // num_envs))):
            with torch.no_grad():
                if global_step < args.warmup_steps:
                    uniform = torch.rand(args.num_envs, *space.shape, device=device)
                    actions = actor.low + (actor.high - actor.low) * uniform
                else:
                    actions = actor.act(torch.as_tensor(obs, device=device), layers)
                    noise = torch.randn_like(actions) * actor.scale * args.exploration_noise
                    actions = torch.clamp(actions + noise, actor.low, actor.high)
            actions = actions.cpu().numpy()
            obs, reward, terminated, truncated, infos = envs.step(actions)
            steps.append((state, actions, reward, infos["final_state"], terminated, truncated))
            state = infos["state"]
            global_step += num_envs
            experiment.log_episodes(writer, infos, global_step)
        replay.add(steps)

        # learn: what is reset learns before it acts
        learning = global_step > learning_starts
        if learning:
            if reset_due(args.actor_reset_interval, previous_step, global_step, args.total_timesteps):
                num_reset = reset_actor(actor, args.actor_reset_ratio)
                experiment.broadcast(actor)
                writer.add_scalar("resets/actor_weights", num_reset.item(), global_step)
            if reset_due(args.critic_reset_interval, previous_step, global_step, args.total_timesteps):
                member = member_to_reset(global_step, args)
                reset_critic(learner.critic, member)
                experiment.broadcast(learner.critic)
                writer.add_scalar("resets/critic_member", member, global_step)
            for _ in range(args.updates_per_round):
                num_updates += 1
                logs |= updates[num_updates % args.policy_freq == 0]()

        # log
        finished = global_step >= args.total_timesteps
        stopping = not finished and experiment.any_process(stop.received is not None, device)
        log_due = reached(args.log_interval, previous_step, global_step)
        eval_due = finished or reached(args.eval_interval, previous_step, global_step)
        checkpoint_due = finished or stopping or reached(args.checkpoint_interval, previous_step, global_step)
        if logs and log_due:
            charts = dict(updates=num_updates, unstable_episodes=infos["unstable"])
            experiment.log_learning(writer, learner, logs, charts, global_step)
        if learning:
            experiment.stop_if_diverged(learner, logs, num_updates, writer)
            training_seconds += time.perf_counter() - round_start
            trained_steps += global_step - previous_step
            status["SPS"] = int(trained_steps / training_seconds)
            if log_due:
                writer.add_scalar("charts/SPS", status["SPS"], global_step)

        # evaluate, save
        if evaluation is not None and eval_due:
            status["eval"] = evaluation.log(learner, writer, run_folder, global_step)
        if rank == 0 and args.save_model and eval_due:
            experiment.save_model(os.path.join(run_folder, "model.pt"), learner, global_step)
        if args.checkpoint_interval and checkpoint_due:
            counters = dict(global_step=global_step, num_updates=num_updates, trained_steps=trained_steps)
            counters |= dict(training_seconds=training_seconds, learning_starts=learning_starts)
            kept = replay if args.checkpoint_buffer else None
            parts = (learner, envs, obs, counters, logs, kept)
            seconds = experiment.write_checkpoint(run_folder, *parts)
            writer.add_scalar("charts/checkpoint_seconds", seconds, global_step)
        progress.set_postfix(status, refresh=False)
        progress.update(global_step - previous_step)
        if stopping:
            break

    progress.close()
    writer.close()
    envs.close()
    experiment.end_processes()
    if stopping:
        stop.exit()


if __name__ == "__main__":
    main()
