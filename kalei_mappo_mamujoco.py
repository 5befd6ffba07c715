"""Kaleidoscope-MAPPO on multi-agent MuJoCo, in one file.

    python kalei_mappo_mamujoco.py --env-id Ant-v2-4x2           # train
    tensorboard --logdir runs                                    # watch
    python kalei_mappo_mamujoco.py --evaluate runs/RUN/model.pt  # evaluate what --save-model wrote

All agents share one actor network. What makes them differ is a learnable mask over the shared weights for each of
them, and a loss that drives the masks apart. The masks are from Li, Pan and Zhang, "Kaleidoscope: Learnable Masks
for Heterogeneous Multi-agent Reinforcement Learning" (NeurIPS 2024, arXiv:2410.08540), who put them on MATD3; the
algorithm under them is MAPPO (Yu et al. 2022, arXiv:2103.01955) with HARL's networks and tuned values (Zhong et al.
2024, arXiv:2304.09870).

Letters in shapes: B batch, N agents, K critics, M masks (N for the actor, K for the critic), T steps, E environments,
S numbers of state, O of an observation. A mask is a leading dimension of networks and losses.
"""

import dataclasses
import math
import os
import time
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import experiment
from cuda_graphs import OneLaunch
from mamujoco_env import MaMuJoCoVecEnv, agent_observations, standardise


@dataclasses.dataclass
class Args(experiment.RunArgs):
    """Train Kaleidoscope-MAPPO on a multi-agent MuJoCo task, or evaluate a saved model."""

    exp_name: str = "kalei_mappo_mamujoco"
    """name of this experiment, part of the run's folder"""
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    """of the hidden layers' products; auto: bfloat16 where the CPU has it, TF32 on a GPU, else float32"""
    num_envs: int = 20
    """environments stepped side by side (E)"""

    # MAPPO
    sharing: Literal["kaleidoscope", "full", "none"] = "kaleidoscope"
    """what the agents' policies share: weights under masks, one network without masks, or nothing"""
    rollout_steps: int | None = None
    """steps of every environment in a rollout (T); by default the value of TUNED for the env id, as the next six"""
    num_epochs: int | None = None
    """passes over a rollout"""
    num_minibatches: int | None = None
    """minibatches that a pass divides the rollout into, an update each"""
    clip: float | None = None
    """the probability ratio counts up to 1 +- this, and a value's change up to +- this"""
    entropy_coef: float | None = None
    """weight of the entropy bonus"""
    lr: float | None = None
    """Adam's learning rate for all but thresholds"""
    lr_decay: bool | None = None
    """let all learning rates fall linearly to 0 over the run"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimate"""
    max_grad_norm: float = 10.0
    """gradients of actor and critic are scaled down to this norm"""
    huber_delta: float = 10.0
    """value errors beyond this, in std of returns, count linearly"""
    value_norm_beta: float = 0.99999
    """memory of the running mean and std of returns, in which the critic predicts"""
    hidden_size: int = 128
    """width of the three hidden layers of actor and critic"""
    output_gain: float = 0.01
    """gain of the actor's output layer at the start"""

    # masks of the actor, one an agent
    actor_threshold_scale: float = 5.0
    """thresholds start as -(U[0, 1) * scale + bias); a weight is kept where |W| > sigmoid(threshold)"""
    actor_threshold_bias: float = 4.0
    """see actor_threshold_scale"""
    actor_diversity_coef: float = 0.1
    """beta: the diversity loss is scaled to this share of the mean absolute surrogate; 0 turns it off"""
    actor_reset_interval: int = 1_000_000
    """environment steps between two resets of actor weights that no mask keeps; 0 turns them off"""
    actor_reset_ratio: float = 0.5
    """probability that such a weight is reset"""

    # masks of the critic, one a member of the ensemble
    num_critics: int = 1
    """members of the critic ensemble (K); a single one has no mask"""
    ensemble_value: Literal["mean", "min"] = "mean"
    """which of the members' values advantages are computed from"""
    critic_threshold_scale: float = 20.0
    """as actor_threshold_scale"""
    critic_threshold_bias: float = 0.0
    """as actor_threshold_bias"""
    critic_diversity_coef: float = 0.1
    """beta: the diversity loss is scaled to this share of the critic loss; 0 turns it off"""
    critic_reset_interval: int = 800_000
    """environment steps between two resets of one critic's thresholds; 0 turns them off"""

    # both
    threshold_lr: float = 0.05
    """Adam's learning rate for thresholds, which have a long way to go in few updates"""
    threshold_eps: float = 1e-12
    """Adam's epsilon for thresholds, whose gradients are up to a million times smaller than those of weights"""
    layer_weights: tuple[float, float, float, float] = (1.0, 2.0, 4.0, 8.0)
    """lambda: weights of the four layers in the diversity loss"""
    weighted_diversity: bool = True
    """weigh differences of masks by |W|"""
    history_length: int = 100
    """updates whose losses are averaged for the adaptive coefficients"""


# what HARL tuned for MAPPO, taken for v5 tasks too; a flag that is set wins
TUNED_FLAGS = ("rollout_steps", "num_epochs", "num_minibatches", "clip", "entropy_coef", "lr", "lr_decay")
TUNED = {
    "Ant-v2-4x2": (200, 5, 1, 0.1, 0.0, 5e-4, False),
    "HalfCheetah-v2-2x3": (200, 15, 1, 0.05, 0.01, 5e-4, False),
    "Hopper-v2-3x1": (200, 10, 1, 0.05, 0.0, 5e-4, True),
    "Walker2d-v2-2x3": (200, 5, 2, 0.05, 0.0, 1e-3, True),
    "Walker2d-v2-6x1": (200, 5, 1, 0.1, 0.01, 5e-4, False),
    "Humanoid-v2-17x1": (100, 5, 1, 0.1, 0.0, 5e-4, True),
}
UNTUNED = (200, 5, 1, 0.1, 0.0, 5e-4, False)  # for the other env ids
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


class OrthogonalLinear(MaskedLinear):
    """A masked layer as PPO starts it: W (each of them, with `own`) orthogonal times `gain`, bias 0."""

    def __init__(self, num_masks, inputs, outputs, threshold_scale, threshold_bias, own, gain):
        self.gain = gain  # goes first, since the constructor draws W
        super().__init__(num_masks, inputs, outputs, threshold_scale, threshold_bias, own)
        nn.init.zeros_(self.bias)

    def fresh_weight(self):
        """Like W, with entries of gain / sqrt(max(in, out)) in rms."""
        weight = torch.empty_like(self.weight)
        for matrix in weight.view(-1, *weight.shape[-2:]):
            nn.init.orthogonal_(matrix, self.gain)
        return weight


class Norm(nn.Module):
    """Scale and shift after a LayerNorm, which all masks share, (1, size), or with `own` have for themselves."""

    def __init__(self, num_masks, size, own):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((num_masks, 1, size) if own else (1, size)))
        self.bias = nn.Parameter(torch.zeros_like(self.weight))


def masked_linear(x, weight, bias):
    """x (B, in) or (M, B, in) through M effective layers (M, out, in) in one product: (M, B, out), in the bias's dtype.

    The product is made in the weight's dtype: in bfloat16, both operands are rounded to 8 bits, and sums are float32.
    """
    x = x.to(weight.dtype).expand(len(weight), -1, -1)
    if weight.dtype != bias.dtype:
        return bias + x @ weight.mT
    return torch.baddbmm(bias, x, weight.mT)


class MaskedMLP(nn.Module):
    """Scale and shift of LayerNorm (inputs are standardised), then four masked layers, ReLU and LayerNorm between them.

    `sharing` says what the M masks' networks have in common:
      kaleidoscope   everything but the masks
      full           everything: the thresholds' sigmoids are 0, which keeps all of W as it is
      none           nothing: the same thresholds, and weights, biases and norms of their own
    The effective layers are an argument of their own, since they often stay the same over many products.
    """

    def __init__(self, num_masks, sizes, thresholds, output_gain, sharing, precision="float32"):
        """sizes: (inputs, hidden, outputs); thresholds: their (scale, bias) at the start."""
        super().__init__()
        self.bfloat16, own = precision == "bfloat16", sharing == "none"
        (inputs, hidden, outputs), (scale, bias) = sizes, thresholds
        bias = bias if sharing == "kaleidoscope" else UNMASKED
        layers, norms = [], []
        for size in ((inputs, hidden), (hidden, hidden), (hidden, hidden), (hidden, outputs)):
            gain = output_gain if len(layers) == 3 else 2**0.5
            # sigmoid(s) is about exp(s), so that a shift by the log of a layer's size (rms of its weights, relative to
            # the first layer's) gives all layers the same share of zeros: the last one starts 100 times smaller
            shift = math.log((gain / max(size) ** 0.5) / (2 / max(inputs, hidden)) ** 0.5)
            norms.append(Norm(num_masks, size[0], own))
            layers.append(OrthogonalLinear(num_masks, *size, scale, bias - shift, own, gain))
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)
        # a LayerNorm without scale and shift takes twice as long on a CPU as one with ones and zeros
        self.register_buffer("one", torch.ones(hidden), persistent=False)
        self.register_buffer("zero", torch.zeros(hidden), persistent=False)

    def effective_layers(self):
        """The four layers' effective weights (M, out, in) and biases (M, 1, out), each with the norm before it in them.

        W (scale * x + shift) + b = (W * scale) x + (W shift + b): on weights this is far less work than on a batch, and
        spares the first layer the gradient towards x. With --precision bfloat16, the hidden layers' weights are in it.
        """
        layers = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            weight, bias = layer.effective()
            layers.append((weight * norm.weight, norm.bias @ weight.mT + bias))
        return [(weight.bfloat16() if self.bfloat16 else weight, bias) for weight, bias in layers[:-1]] + layers[-1:]

    def forward(self, x, layers):
        """Standardised x (B, in) or (M, B, in) -> (M, B, out), through effective layers: one product for all masks."""
        x = masked_linear(x, *layers[0])
        for layer in layers[1:]:
            x = masked_linear(F.layer_norm(torch.relu_(x), x.shape[-1:], self.one, self.zero), *layer)
        return x

    @torch.no_grad()
    def sparsity(self):
        """(4,): each layer's share of zeros among the effective weights of all masks."""
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
    """Gaussian policies of N agents, one mask each, in half action ranges: the bounds low, high (N, act) are -1 and 1.

    The mean is not bounded: actions are clipped and scaled on their way to the environment only (to_bounds). Where both
    bounds are 0, an action is padding, and has no part in probabilities and entropy.
    """

    def __init__(self, observation_size, low, high, args):
        agents, act = low.shape
        sizes, thresholds = (
            (observation_size, args.hidden_size, act),
            (args.actor_threshold_scale, args.actor_threshold_bias),
        )
        super().__init__(agents, sizes, thresholds, args.output_gain, args.sharing, args.precision)
        self.log_std = nn.Parameter(torch.ones(act if args.sharing == "full" else (agents, 1, act)))
        real = (high > low).astype(low.dtype)[:, None]  # (N, 1, act): 1 for an action, 0 for padding
        for name, value in (("low", low), ("high", high), ("centre", (high + low) / 2), ("scale", (high - low) / 2)):
            self.register_buffer(name, torch.as_tensor(value))
        self.register_buffer("real", torch.as_tensor(real))

    def std(self):
        """(act,) or (N, 1, act), at most 0.5."""
        return 0.5 * torch.sigmoid(self.log_std)

    def act(self, obs, layers):
        """The best actions, for the environment: obs (B, N, obs) -> (B, N, act)."""
        return self.to_bounds(self(obs.transpose(-3, -2), layers).transpose(-3, -2))

    def to_bounds(self, actions):
        """Actions of the policy (..., N, act) as the environment takes them, between low and high."""
        return actions.clamp(-1.0, 1.0) * self.scale + self.centre

    def sample(self, obs, layers, std):
        """Random actions of the policy: obs (B, N, obs) -> (B, N, act)."""
        mean = self(obs.transpose(-3, -2), layers)
        return (mean + torch.randn_like(mean) * std).transpose(-3, -2)

    def log_prob(self, obs, actions, layers):
        """Log density of all of an agent's actions together: obs (N, B, obs), actions (N, B, act) -> (N, B)."""
        std = self.std()
        noise = (actions - self(obs, layers)) / std
        densities = -0.5 * noise.square() - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return (densities * self.real).sum(-1)

    def entropy(self):
        """(), the mean over agents."""
        entropies = torch.log(self.std()) + 0.5 * math.log(2 * math.pi * math.e)
        return (entropies * self.real).sum(-1).mean()


class Critic(MaskedMLP):
    """An ensemble of K state values, one mask each, in std of returns: state (B, S) -> (K, B, 1)."""

    def __init__(self, state_size, args):
        sizes, thresholds = (state_size, args.hidden_size, 1), (args.critic_threshold_scale, args.critic_threshold_bias)
        sharing = "kaleidoscope" if args.num_critics > 1 else "full"
        super().__init__(args.num_critics, sizes, thresholds, 1.0, sharing, args.precision)
        self.value_norm = ValueNorm(args.value_norm_beta)


class ValueNorm(nn.Module):
    """Running mean and std of returns, debiased as Adam's moments are, so that they are right from the first update."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta
        self.register_buffer("averages", torch.zeros(3))  # of returns, their squares, and 1: from 0, like Adam's

    def update(self, returns):
        latest = torch.stack([returns.mean(), returns.square().mean(), torch.ones_like(self.averages[0])])
        experiment.average([latest])
        self.averages.lerp_(latest, 1 - self.beta)

    def mean_std(self):
        mean, square = self.averages[:2] / self.averages[2].clamp(min=1e-5)
        return mean, (square - mean.square()).clamp(min=1e-2).sqrt()

    def normalise(self, returns):
        mean, std = self.mean_std()
        return (returns - mean) / std

    def denormalise(self, values):
        mean, std = self.mean_std()
        return values * std + mean


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


# ---- Rollout, advantages, losses ----
class Rollout:
    """T steps of E environments, on the device. It holds states only: they imply the observations."""

    def __init__(self, steps, num_envs, state_size, action_shape, device):
        shape = (steps, num_envs)
        self.state = torch.zeros(*shape, state_size, device=device)
        self.actions = torch.zeros(*shape, *action_shape, device=device)  # the policy's, not clipped
        self.reward = torch.zeros(shape, device=device)
        self.next_state = torch.zeros(*shape, state_size, device=device)  # where the action led to, before any reset
        self.terminated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.truncated = torch.zeros(shape, dtype=torch.bool, device=device)

    def store(self, steps):
        """Keep T steps, a list of (state, actions, reward, next_state, terminated, truncated), arrays of E rows each.

        All steps go to the device together, in six copies.
        """
        for stored, arrays in zip(vars(self).values(), zip(*steps, strict=True), strict=True):
            stored.copy_(torch.from_numpy(np.stack(arrays)).to(stored.dtype))


class Batch(NamedTuple):
    """What updates work on: the B = T E steps of a rollout."""

    state: torch.Tensor  # (B, S), standardised
    obs: torch.Tensor  # (N, B, O)
    actions: torch.Tensor  # (N, B, act)
    log_prob: torch.Tensor  # (N, B), of the policy before the updates
    advantages: torch.Tensor  # (B,), normalised: mean 0, std 1
    values: torch.Tensor  # (K, B), in std of returns, of the critic before the updates
    returns: torch.Tensor  # (B,), in std of returns


def estimate_advantages(reward, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimates (T, E), from tensors (T, E).

    next_values are those of the states that actions led to, before any reset: an episode that is cut bootstraps from
    where it was cut. One that terminates does not bootstrap.
    """
    deltas = reward + gamma * next_values * ~terminated - values
    goes_on = ~(terminated | truncated)
    advantages, later = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for step in range(len(deltas) - 1, -1, -1):
        later = deltas[step] + gamma * gae_lambda * later * goes_on[step]
        advantages[step] = later
    return advantages


def clipped_surrogate(ratio, advantages, clip):
    """PPO's objective of each step, to be maximised: ratio (N, B), advantages (B,) -> (N, B)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values, old_values, returns, clip, delta):
    """The worse of the Huber losses of a value and of its clipped change: (K, B), (K, B), (B,) -> (K, B)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    returns = returns.expand_as(values)
    losses = (F.huber_loss(each, returns, reduction="none", delta=delta) for each in (values, clipped))
    return torch.maximum(*losses)


def clip_gradients(gradients, max_norm, own=False):
    """Scale gradients (...) in place down to `max_norm` over all of them; with `own`, each agent's part, (N, ...)."""
    rows = [gradient.view(len(gradient) if own else 1, -1) for gradient in gradients]
    norm = sum(row.square().sum(1, keepdim=True) for row in rows).sqrt()  # (N, 1) or (1, 1)
    for row in rows:
        row.mul_((max_norm / (norm + 1e-6)).clamp(max=1))


# ---- The update ----
class Learner(nn.Module):
    """Networks, optimisers and loss histories, and the updates that change them in place on the device."""

    def __init__(self, state_size, low, high, args, device, columns=None):
        super().__init__()
        self.args, self.num_agents = args, len(low)
        self.columns = None if columns is None else torch.as_tensor(columns, device=device)  # that agents see
        seen = state_size if columns is None else columns.shape[1]
        self.actor = Actor(seen + self.num_agents, low, high, args).to(device)
        self.critic = Critic(state_size, args).to(device)
        self.actor_optimizer = self.make_optimizer(self.actor, device)
        self.critic_optimizer = self.make_optimizer(self.critic, device)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer]
        self.actor_coefficient = AdaptiveCoefficient(args.actor_diversity_coef, args.history_length, device)
        self.critic_coefficient = AdaptiveCoefficient(args.critic_diversity_coef, args.history_length, device)

    def make_optimizer(self, network, device):
        """Adam, with learning rate and epsilon of their own for the thresholds."""
        thresholds = [parameter for name, parameter in network.named_parameters() if name.endswith("thresholds")]
        others = [parameter for name, parameter in network.named_parameters() if not name.endswith("thresholds")]
        # learning rates as tensors, so that they can fall in a graph; a GPU's Adam takes no float64
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        lr, threshold_lr = torch.tensor([self.args.lr, self.args.threshold_lr], dtype=dtype, device=device)
        groups = [dict(params=others, lr=lr, eps=1e-5)]
        groups.append(dict(params=thresholds, lr=threshold_lr, eps=self.args.threshold_eps))
        return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def scale_learning_rates(self, factor):
        """Set all learning rates to `factor` times those of the start."""
        for optimizer in self.optimizers:
            for group, lr in zip(optimizer.param_groups, (self.args.lr, self.args.threshold_lr), strict=True):
                group["lr"].fill_(lr * factor)

    @torch.no_grad()
    def prepare(self, rollout):
        """All that a rollout's updates need, in one go: the Batch and the losses that are known before them."""
        args, critic, shape = self.args, self.critic, rollout.reward.shape
        state = standardise(rollout.state).flatten(0, 1)
        both = torch.cat([state, standardise(rollout.next_state).flatten(0, 1)])
        predictions = critic(both, critic.effective_layers()).squeeze(-1)  # (K, 2 B)
        combined = predictions.mean(0) if args.ensemble_value == "mean" else predictions.amin(0)
        values, next_values = critic.value_norm.denormalise(combined).view(2, *shape)
        ends = (rollout.terminated, rollout.truncated)
        advantages = estimate_advantages(rollout.reward, values, next_values, *ends, args.gamma, args.gae_lambda)
        returns = advantages + values
        critic.value_norm.update(returns)
        mean, std = experiment.mean_std(advantages)

        obs = agent_observations(rollout.state.flatten(0, 1), self.num_agents, columns=self.columns)
        obs = obs.transpose(0, 1).contiguous()
        actions = rollout.actions.flatten(0, 1).transpose(0, 1).contiguous()
        batch = Batch(
            state=state,
            obs=obs,
            actions=actions,
            log_prob=self.actor.log_prob(obs, actions, self.actor.effective_layers()),
            advantages=((advantages - mean) / (std + 1e-5)).flatten(),
            values=predictions[:, : len(state)].contiguous(),
            returns=critic.value_norm.normalise(returns).flatten(),
        )
        explained = 1 - advantages.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        return batch, {"losses/explained_variance": explained, "values/value": values.mean()}

    def step(self, optimizer, network, loss, own=False):
        """An optimiser step whose gradient is scaled down to max_grad_norm; with `own`, that of each agent is."""
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        experiment.average(gradients)
        clip_gradients(gradients, self.args.max_grad_norm, own)
        optimizer.step()

    def update_actor(self, batch, rows):
        """One step of all agents' policies on `rows`: (b,) or a slice. Returns its losses as detached scalars."""
        args = self.args
        log_prob = self.actor.log_prob(batch.obs[:, rows], batch.actions[:, rows], self.actor.effective_layers())
        log_ratio = log_prob - batch.log_prob[:, rows]  # (N, b)
        ratio = log_ratio.exp()  # the product over an agent's action dimensions
        surrogate = clipped_surrogate(ratio, batch.advantages[rows], args.clip)
        entropy = self.actor.entropy()
        loss = -surrogate.mean()
        diversity = torch.zeros_like(loss)  # without masks
        if args.sharing == "kaleidoscope":
            diversity = diversity_loss(self.actor, args.layer_weights, args.weighted_diversity)
        # the surrogate is about 0 on average, whatever its size: its mean absolute value is the scale
        coefficient = self.actor_coefficient(surrogate.abs().mean(), diversity)
        total = loss - args.entropy_coef * entropy + coefficient * diversity
        own = args.sharing == "none"  # N learners side by side: each has its own loss, norm and (as always) Adam
        self.step(self.actor_optimizer, self.actor, total * self.num_agents if own else total, own)
        log_ratio, ratio = log_ratio.detach(), ratio.detach()
        return {
            "losses/policy": loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
            "losses/clipfrac": ((ratio - 1).abs() > args.clip).float().mean(),
            "losses/actor_diversity": diversity.detach(),
            "coefficients/actor": coefficient,
        }

    def update_critic(self, batch, rows):
        """One step of all members on `rows`: (b,) or a slice. Returns its losses as detached scalars."""
        args = self.args
        values = self.critic(batch.state[rows], self.critic.effective_layers()).squeeze(-1)  # (K, b)
        old_values, returns = batch.values[:, rows], batch.returns[rows]
        losses = clipped_value_loss(values, old_values, returns, args.clip, args.huber_delta)
        loss = losses.mean(-1).sum(-1)
        diversity = torch.zeros_like(loss)  # of a single member
        if args.num_critics > 1:
            diversity = diversity_loss(self.critic, args.layer_weights, args.weighted_diversity)
        coefficient = self.critic_coefficient(loss, diversity)
        self.step(self.critic_optimizer, self.critic, loss + coefficient * diversity)
        return {
            "losses/value": loss.detach(),
            "losses/critic_diversity": diversity.detach(),
            "coefficients/critic": coefficient,
        }

    def update(self, rollout):
        """All updates on a rollout. Returns losses by name, their means over the updates."""
        args = self.args
        batch, known = self.prepare(rollout)
        logs = []
        for _ in range(args.num_epochs):
            minibatches = [slice(None)]  # a single one is the rollout as it lies, without copying it
            if args.num_minibatches > 1:
                minibatches = torch.rand_like(batch.returns).argsort().tensor_split(args.num_minibatches)
            for rows in minibatches:
                logs.append(self.update_actor(batch, rows) | self.update_critic(batch, rows))
        return known | {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}


# ---- Command line ----
def parse_args(argv=None):
    """(args, checkpoint or None), checked, tuned values filled in. Bad ones end in one line and exit code 2."""
    args, checkpoint = experiment.read_command_line(Args, argv)
    for name, tuned in zip(TUNED_FLAGS, TUNED.get(str(args.env_id).replace("-v5", "-v2"), UNTUNED), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, tuned)
    check_args(args)
    args.precision = resolve_precision(args.precision, experiment.device_type(args))
    return args, checkpoint


def check_args(args):
    """Refuse what cannot work, before anything is made."""
    experiment.check_common_args(args)
    experiment.require_count(args, "rollout_steps num_epochs num_minibatches")
    experiment.require_share(args, "gae_lambda")
    experiment.require(args, "value_norm_beta", lambda x: 0 <= x < 1, "a number from 0 to less than 1")
    experiment.require_size(args, "lr threshold_lr entropy_coef")
    positive = "clip huber_delta max_grad_norm output_gain threshold_eps"
    experiment.require(args, positive, lambda x: 0 < x <= 1e30, "a number above 0, up to 1e30")
    rows = args.rollout_steps * args.num_envs
    experiment.require(args, "num_minibatches", lambda x: x <= rows, f"at most the {rows} steps of a rollout")


@experiment.one_line_without_memory
def main():
    args, checkpoint = parse_args()
    device, rank, num_processes = experiment.start(args)
    if args.evaluate is not None:
        return experiment.evaluate_file(args, device, Actor)

    stop = experiment.StopSignals()
    torch.manual_seed(args.seed)  # the same weights in all processes
    seed = experiment.seed_of_process(args.seed, rank)  # and other environments and draws
    with experiment.refuse_what_does_not_fit():
        settings = (seed, args.num_threads, args.episode_limit, args.agent_obsk)
        envs = MaMuJoCoVecEnv(args.env_id, args.num_envs, *settings)
        space = envs.single_action_space
        learner = Learner(envs.state_size, space.low, space.high, args, device, envs.columns)
        actor = learner.actor
        rollout = Rollout(args.rollout_steps, args.num_envs, envs.state_size, space.shape, device)
        evaluation = experiment.Evaluation(args) if args.eval_episodes and rank == 0 else None
    update = OneLaunch(lambda: learner.update(rollout), device, args.cudagraph, args.compile)

    if rank > 0:
        torch.manual_seed(seed)
    num_threads, num_envs = torch.get_num_threads(), args.num_envs * num_processes
    global_step = num_updates = 0
    training_seconds = 0.0  # without evaluation
    logs, status = {}, {}
    obs, _ = envs.reset()
    if checkpoint is not None:
        parts = (learner, envs, "global_step num_updates training_seconds")
        obs, (global_step, num_updates, training_seconds), _ = experiment.restore(checkpoint, *parts)
    state = envs.state
    run_folder, writer = experiment.open_run(args, global_step, rank)
    if rank == 0:
        flags = ", ".join(f"{name} {getattr(args, name)}" for name in ("sharing", *TUNED_FLAGS, "precision"))
        print(f"{run_folder} on {num_processes} x {device}: {flags}; {experiment.observation_sizes(envs)}")
    steps_per_rollout = args.rollout_steps * num_envs
    num_steps = -(-args.total_timesteps // steps_per_rollout) * steps_per_rollout
    bar = dict(unit="step", unit_scale=True, dynamic_ncols=True, disable=rank > 0)
    progress = tqdm(total=num_steps, initial=global_step, **bar)

    while global_step < args.total_timesteps:
        previous_step, round_start = global_step, time.perf_counter()

        # act: the weights stay the same for a whole rollout, and so do the effective ones
        with torch.no_grad():
            layers, std = actor.effective_layers(), actor.std()
        torch.set_num_threads(1)  # waiting threads of PyTorch spin on cores that the physics could use
        steps = []
        for _ in range(args.rollout_steps):
            with torch.no_grad():
                actions = actor.sample(torch.as_tensor(obs, device=device), layers, std)
            obs, reward, terminated, truncated, infos = envs.step(actor.to_bounds(actions).cpu().numpy())
            steps.append((state, actions.cpu().numpy(), reward, infos["final_state"], terminated, truncated))
            state = infos["state"]
            global_step += num_envs
            experiment.log_episodes(writer, infos, global_step)
        rollout.store(steps)

        # learn
        torch.set_num_threads(num_threads)
        if args.lr_decay:
            learner.scale_learning_rates(1 - previous_step / args.total_timesteps)
        logs = update()
        num_updates += args.num_epochs * args.num_minibatches
        if reset_due(args.actor_reset_interval, previous_step, global_step, args.total_timesteps):
            num_reset = reset_actor(actor, args.actor_reset_ratio)
            experiment.broadcast(actor)
            writer.add_scalar("resets/actor_weights", num_reset.item(), global_step)
        critic_reset_due = reset_due(args.critic_reset_interval, previous_step, global_step, args.total_timesteps)
        if args.num_critics > 1 and critic_reset_due:
            member = member_to_reset(global_step, args)
            reset_critic(learner.critic, member)
            experiment.broadcast(learner.critic)
            writer.add_scalar("resets/critic_member", member, global_step)

        # log
        finished = global_step >= args.total_timesteps
        stopping = not finished and experiment.any_process(stop.received is not None, device)
        log_due = reached(args.log_interval, previous_step, global_step)
        eval_due = finished or reached(args.eval_interval, previous_step, global_step)
        checkpoint_due = finished or stopping or reached(args.checkpoint_interval, previous_step, global_step)
        if logs and log_due:
            charts = dict(updates=num_updates, unstable_episodes=infos["unstable"])
            experiment.log_learning(writer, learner, logs, charts, global_step)
        experiment.stop_if_diverged(learner, logs, num_updates, writer)
        training_seconds += time.perf_counter() - round_start
        status["SPS"] = int(global_step / training_seconds)
        if log_due:
            writer.add_scalar("charts/SPS", status["SPS"], global_step)

        # evaluate, save
        if evaluation is not None and eval_due:
            status["eval"] = evaluation.log(learner, writer, run_folder, global_step)
        if rank == 0 and args.save_model and eval_due:
            experiment.save_model(os.path.join(run_folder, "model.pt"), learner, global_step)
        if args.checkpoint_interval and checkpoint_due:
            counters = dict(global_step=global_step, num_updates=num_updates, training_seconds=training_seconds)
            seconds = experiment.write_checkpoint(run_folder, learner, envs, obs, counters)
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
