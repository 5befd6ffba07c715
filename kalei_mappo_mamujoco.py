"""Kaleidoscope-MAPPO on multi-agent MuJoCo, in one file.

    python kalei_mappo_mamujoco.py --env-id Ant-v2-4x2           # train
    tensorboard --logdir runs                                    # watch
    python kalei_mappo_mamujoco.py --evaluate runs/RUN/model.pt  # evaluate what --save-model wrote

All agents share one actor network. What makes them differ is a learnable mask over the shared weights for each of them,
and a loss that drives the masks apart: Li, Pan and Zhang, "Kaleidoscope: Learnable Masks for Heterogeneous Multi-agent
Reinforcement Learning" (NeurIPS 2024, arXiv:2410.08540), who put them on MATD3. The algorithm under them is MAPPO (Yu
et al. 2022, arXiv:2103.01955) with HARL's networks and tuned values (Zhong et al. 2024, arXiv:2304.09870).

In shapes: B batch, N agents, M masks, T steps, E environments, S numbers of state, O of observation, act of action.
"""

import dataclasses
import math
import os
import time
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

from experiment import processes
from experiment.checkpoints import check_resumed, read_checkpoint, restore_checkpoint, write_checkpoint
from experiment.command_line import check_flag_names, check_ranges, fail, require
from experiment.films import open_viewer, save_film
from experiment.hardware import device_type, keep_freed_memory, resolve_precision
from experiment.mask_pictures import log_mask_shares, log_masks
from experiment.run_folder import log_episodes, log_evaluation, log_scalars, open_run, reached
from experiment.saved_models import evaluate_model, save_model
from experiment.stopping import StopSignals, stop_if_diverged
from mamujoco_env import MaMuJoCoVecEnv, agent_observations, standardise


@dataclasses.dataclass
class Args:
    """Train Kaleidoscope-MAPPO on a multi-agent MuJoCo task, or evaluate a saved model."""

    # run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of this experiment, part of the run's folder
    seed: int = 1  # of the weights, the exploration, the minibatches and the environments
    total_timesteps: int = 10_000_000  # environment steps of the run, over all environments
    log_interval: int = 5_000  # environment steps between two entries of losses and masks in TensorBoard; 0: none
    eval_interval: int = 100_000  # environment steps between two evaluations; 0: at the end only
    eval_episodes: int = 40  # of an evaluation, one in each of as many environments; 0: no evaluation
    save_model: bool = False  # write actor and critic to model.pt in the run's folder, at every evaluation
    capture_video: bool = False  # film an episode of each evaluation: a GIF in the run's folder, or beside the model
    render: bool = False  # show an episode of each evaluation in a window, unless it is filmed
    track: bool = False  # log to Weights & Biases as well, to the project and team in WANDB_PROJECT and WANDB_ENTITY
    checkpoint_interval: int = 0  # environment steps between two checkpoints, for --resume; 0: none
    resume: str | None = None  # go on with the run in this folder, with its flags; --total-timesteps may move its end
    evaluate: str | None = None  # do not train: evaluate the model in this file, on its own task and with its flags

    # environment
    env_id: str | None = None  # a robot and its division into agents; by default Ant-v2-4x2, or the model's
    agent_obsk: int | None = None  # agents see their joints and those so many steps away; by default the full state
    episode_limit: int = 1_000  # steps after which an episode is cut; a cut is not a termination
    num_envs: int = 20  # environments stepped side by side (E), by each process

    # speed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of networks and updates; auto takes the GPU if there is one
    num_threads: int = 0  # for the physics, 0 for one per CPU; OMP_NUM_THREADS sets PyTorch's
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"  # of products; auto: tf32 on a GPU, else float32
    cudagraph: bool = True  # on a GPU, launch a whole update at once, not kernel by kernel; not with several processes
    compile: bool = False  # let torch.compile fuse the updates' kernels, which takes minutes at the start

    # MAPPO
    sharing: Literal["kaleidoscope", "full", "none"] = "kaleidoscope"  # actors share all but masks, all, or nothing
    rollout_steps: int | None = None  # steps of every environment in a rollout (T); here to lr_decay, None is TUNED's
    num_epochs: int | None = None  # passes over a rollout
    num_minibatches: int | None = None  # minibatches that a pass divides the rollout into, an update each
    clip: float | None = None  # the probability ratio counts up to 1 +- this, and a value's change up to +- this
    entropy_coef: float | None = None  # weight of the entropy bonus
    lr: float | None = None  # Adam's learning rate for all but thresholds
    lr_decay: bool | None = None  # let all learning rates fall linearly to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    max_grad_norm: float = 10.0  # gradients of actor and critic are scaled down to this norm
    huber_delta: float = 10.0  # value errors beyond this, in std of returns, count linearly
    value_norm_beta: float = 0.99999  # memory of the running mean and std of returns, in which the critic predicts
    hidden_size: int = 128  # width of the three hidden layers of actor and critic
    output_gain: float = 0.01  # gain of the actor's output layer at the start

    # masks of the actor, one an agent
    actor_threshold_scale: float = 5.0  # thresholds start as -(U[0, 1) * scale + bias); |W| > sigmoid(s) is kept
    actor_threshold_bias: float = 4.0  # of the first layer; the others' are shifted by the size of their weights
    actor_diversity_coef: float = 0.1  # beta: the diversity loss is scaled to this share of mean |surrogate|; 0: off
    actor_reset_interval: int = 1_000_000  # environment steps between two resets of weights that no mask keeps; 0: off
    actor_reset_ratio: float = 0.5  # probability that such a weight is reset
    threshold_lr: float = 0.05  # Adam's learning rate for thresholds, which have a long way to go in few updates
    threshold_eps: float = 1e-12  # Adam's epsilon for thresholds, whose gradients are up to a million times smaller
    layer_weights: tuple[float, float, float, float] = (1.0, 2.0, 4.0, 8.0)  # lambda: of layers, in diversity loss
    weighted_diversity: bool = True  # weigh differences of masks by |W|
    deque_len: int = 100  # updates whose losses are averaged for the adaptive coefficient


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
        """What the masks in a slice make of W and bias: (m, out, in), and (out,) or, with `own`, (m, 1, out)."""
        weight, bias = (self.weight[masks], self.bias[masks]) if self.own else (self.weight, self.bias)
        kept = torch.relu(weight.abs() - torch.sigmoid(self.thresholds[masks]))
        return torch.sign(weight.detach()) * kept, bias  # autograd would compute the sign's gradient, which is 0

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


def masked_linear(x, weight, bias):
    """x (B, in) or (M, B, in) by M layers (M, out, in) -> (M, B, out): product in the weight's dtype, sum in bias's."""
    x = x.to(weight.dtype).expand(len(weight), -1, -1)
    if weight.dtype != bias.dtype:  # bfloat16: operands and product are rounded, what follows is float32
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
            # the first layer's) gives all layers the same share of zeros: the last one starts some 100 times smaller
            shift = math.log((gain / max(size) ** 0.5) / (2 / max(inputs, hidden)) ** 0.5)
            shape = (num_masks, 1, size[0]) if own else (1, size[0])
            norms.append(nn.ParameterDict({"weight": torch.ones(shape), "bias": torch.zeros(shape)}))
            layers.append(OrthogonalLinear(num_masks, *size, scale, bias - shift, own, gain))
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)
        # on a CPU, a LayerNorm without scale and shift takes longer than one with ones and zeros
        self.register_buffer("one", torch.ones(hidden), persistent=False)
        self.register_buffer("zero", torch.zeros(hidden), persistent=False)

    def effective_layers(self):
        """Effective weights (M, out, in), hidden ones in the dtype of their products, and biases (M, 1, out).

        In them is the norm before a layer: W (scale * x + shift) + b = (W * scale) x + (W shift + b). On weights this
        is far less work than on a batch, and spares the first layer the gradient towards x.
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
            x = masked_linear(nn.functional.layer_norm(torch.relu_(x), x.shape[-1:], self.one, self.zero), *layer)
        return x


class Actor(MaskedMLP):
    """Gaussian policies of N agents, one mask each, in half action ranges: the bounds low, high (N, act) are -1 and 1.

    The mean is not bounded: actions are clipped and scaled on their way to the environment only (to_bounds).
    """

    def __init__(self, observation_size, low, high, args):
        (agents, act), thresholds = low.shape, (args.actor_threshold_scale, args.actor_threshold_bias)
        sizes = (observation_size, args.hidden_size, act)
        super().__init__(agents, sizes, thresholds, args.output_gain, args.sharing, args.precision)
        self.log_std = nn.Parameter(torch.ones(act if args.sharing == "full" else (agents, 1, act)))
        for name, value in (("low", low), ("high", high), ("centre", (high + low) / 2), ("scale", (high - low) / 2)):
            self.register_buffer(name, torch.as_tensor(value))
        self.register_buffer("real", (self.high > self.low).float()[:, None])  # (N, 1, act): 0 for padded actions

    def std(self):
        """(N, 1, act), since agents may also explore differently, or (act,) with `full`; at most 0.5."""
        return 0.5 * torch.sigmoid(self.log_std)

    def act(self, obs, layers):
        """The means as the environment takes them, for evaluation: obs (B, N, O) -> (B, N, act)."""
        return self.to_bounds(self(obs.transpose(-3, -2), layers).transpose(-3, -2))

    def to_bounds(self, actions):
        """Actions of the policy (..., N, act) as the environment takes them, between low and high."""
        return actions.clamp(-1.0, 1.0) * self.scale + self.centre

    def sample(self, obs, layers, std):
        """Random actions of the policy: obs (B, N, O) -> (B, N, act)."""
        mean = self(obs.transpose(-3, -2), layers)
        return (mean + torch.randn_like(mean) * std).transpose(-3, -2)

    def log_prob(self, obs, actions, layers):
        """Log density of all of an agent's actions together: obs (N, B, O), actions (N, B, act) -> (N, B)."""
        mean, std = self(obs, layers), self.std()
        densities = -0.5 * ((actions - mean) / std).square() - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return (densities * self.real).sum(-1)  # padded actions have no part

    def entropy(self):
        """(), the mean over agents."""
        return ((torch.log(self.std()) + 0.5 * math.log(2 * math.pi * math.e)) * self.real).sum(-1).mean()


class Critic(MaskedMLP):
    """The state's value, in std of returns, by a network of the same kind without masks: state (B, S) -> (1, B, 1)."""

    def __init__(self, state_size, args):
        # `full`: nothing is masked. float32: after some epochs, bfloat16's errors in gradients come near their noise
        super().__init__(1, (state_size, args.hidden_size, 1), thresholds=(20.0, 0.0), output_gain=1.0, sharing="full")
        self.beta = args.value_norm_beta
        self.register_buffer("averages", torch.zeros(3))  # of returns, their squares, and 1: from 0, like Adam's

    def update_value_norm(self, returns):
        latest = torch.stack([returns.mean(), returns.square().mean(), torch.ones_like(self.averages[0])])
        processes.all_reduce_mean([latest])
        self.averages.lerp_(latest, 1 - self.beta)

    def mean_std(self):
        """Of returns, each (): HARL's ValueNorm, running, debiased as Adam's moments are."""
        mean, square = self.averages[:2] / self.averages[2].clamp(min=1e-30)
        return mean, (square - mean.square()).clamp(min=1e-2).sqrt()


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
    """The weight of the diversity loss: |beta * mean(RL losses) / mean(diversity losses)| over the latest `length`."""

    def __init__(self, beta, length, device):
        super().__init__()
        self.beta = beta
        # rings on the device, with equally many losses, so that the ratio of their sums is that of means
        self.register_buffer("losses", torch.zeros(2, length, device=device))
        self.register_buffer("slot", torch.zeros(1, dtype=torch.long, device=device))

    def forward(self, rl_loss, diversity):
        latest = torch.stack([rl_loss, diversity]).detach()
        processes.all_reduce_mean([latest])
        self.losses.index_copy_(1, self.slot, latest[:, None])
        self.slot.add_(1).remainder_(self.losses.shape[1])
        rl_sum, diversity_sum = self.losses.sum(1)
        ratio = rl_sum / torch.where(diversity_sum == 0, 1.0, diversity_sum)
        return torch.where(diversity_sum == 0, self.beta, (self.beta * ratio).abs())


# ---- Resets ----
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


# ---- Rollout and advantages ----
class Rollout:
    """T steps of E environments, on the device. It holds states only: they imply the observations."""

    def __init__(self, steps, num_envs, state_size, action_shape, device):
        self.state = torch.zeros(steps, num_envs, state_size, device=device)
        self.actions = torch.zeros(steps, num_envs, *action_shape, device=device)  # the policy's, not clipped
        self.reward = torch.zeros(steps, num_envs, device=device)
        self.next_state = torch.zeros_like(self.state)  # where the action led to, before any reset
        self.terminated = torch.zeros_like(self.reward, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)

    def store(self, steps):
        """Keep T steps, a list of (state, actions, reward, next_state, terminated, truncated), arrays of E rows."""
        for stored, arrays in zip(vars(self).values(), zip(*steps, strict=True), strict=True):  # in that order
            stored.copy_(torch.from_numpy(np.stack(arrays)).to(stored.dtype))


def estimate_advantages(reward, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimates (T, E), from tensors (T, E); next_values are of the states before any reset."""
    deltas = reward + gamma * next_values * ~terminated - values  # what is cut bootstraps from where it was cut
    goes_on = ~(terminated | truncated)
    advantages, later = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for step in range(len(deltas) - 1, -1, -1):
        later = deltas[step] + gamma * gae_lambda * later * goes_on[step]
        advantages[step] = later
    return advantages


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
        self.actor_coefficient = AdaptiveCoefficient(args.actor_diversity_coef, args.deque_len, device)

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
        """(batch, logs): a rollout's B = T E steps as updates take them, and the losses that are known before them."""
        args, critic, shape = self.args, self.critic, rollout.reward.shape
        state = standardise(rollout.state).flatten(0, 1)
        both = torch.cat([state, standardise(rollout.next_state).flatten(0, 1)])
        predictions = critic(both, critic.effective_layers()).flatten()  # (2 B,)
        mean, std = critic.mean_std()
        values, next_values = (predictions * std + mean).view(2, *shape)
        ends = (rollout.terminated, rollout.truncated)
        advantages = estimate_advantages(rollout.reward, values, next_values, *ends, args.gamma, args.gae_lambda)
        returns = advantages + values
        critic.update_value_norm(returns)
        returns_mean, returns_std = critic.mean_std()
        advantages_mean, advantages_std = processes.mean_std(advantages)

        obs = agent_observations(rollout.state.flatten(0, 1), self.num_agents, columns=self.columns)
        obs = obs.transpose(0, 1).contiguous()
        actions = rollout.actions.flatten(0, 1).transpose(0, 1).contiguous()
        batch = SimpleNamespace(
            state=state,  # (B, S), standardised
            obs=obs,  # (N, B, O)
            actions=actions,  # (N, B, act)
            log_prob=self.actor.log_prob(obs, actions, self.actor.effective_layers()),  # (N, B), before the updates
            advantages=((advantages - advantages_mean) / (advantages_std + 1e-5)).flatten(),  # (B,), normalised
            values=predictions[: len(state)],  # (B,), in std of returns, before the updates
            returns=((returns - returns_mean) / returns_std).flatten(),  # (B,), in std of returns
        )
        explained = 1 - advantages.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        return batch, {"losses/explained_variance": explained, "values/value": values.mean()}

    def step(self, optimizer, network, loss, own=False):
        """One step, its gradient scaled down to max_grad_norm; with `own`, each agent's part (N, ...) by itself."""
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        processes.all_reduce_mean(gradients)
        rows = [gradient.view(len(gradient) if own else 1, -1) for gradient in gradients]
        norm = sum(row.square().sum(1, keepdim=True) for row in rows).sqrt()  # (N, 1) or (1, 1)
        for row in rows:
            row.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        optimizer.step()

    def update_actor(self, batch, rows):
        """One step of all agents' policies on `rows`: (b,) or a slice. Returns its losses as detached scalars."""
        args = self.args
        log_prob = self.actor.log_prob(batch.obs[:, rows], batch.actions[:, rows], self.actor.effective_layers())
        log_ratio = log_prob - batch.log_prob[:, rows]  # (N, b)
        ratio = log_ratio.exp()  # the product over an agent's action dimensions
        advantages, clipped = batch.advantages[rows], ratio.clamp(1 - args.clip, 1 + args.clip)  # (b,), (N, b)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # (N, b), PPO's, to be maximised
        entropy = self.actor.entropy()
        loss = -surrogate.mean()
        diversity = torch.zeros_like(loss)  # without masks
        if args.sharing == "kaleidoscope":
            diversity = diversity_loss(self.actor, args.layer_weights, args.weighted_diversity)
        # the surrogate is about 0 on average, whatever its size: its mean absolute value is the scale
        coefficient = self.actor_coefficient(surrogate.abs().mean(), diversity)
        total = loss - args.entropy_coef * entropy + coefficient * diversity
        own = args.sharing == "none"  # N learners side by side, each with its own loss and norm; Adam is by element
        self.step(self.actor_optimizer, self.actor, total * self.num_agents if own else total, own)
        return {
            "losses/policy": loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": (ratio - 1 - log_ratio).detach().mean(),
            "losses/clipfrac": ((ratio - 1).abs() > args.clip).float().mean(),
            "losses/actor_diversity": diversity.detach(),
            "coefficients/actor": coefficient,
        }

    def update_critic(self, batch, rows):
        """One step of the critic on `rows`: (b,) or a slice. Returns its loss as a detached scalar."""
        args = self.args
        values = self.critic(batch.state[rows], self.critic.effective_layers()).flatten()  # (b,)
        old, returns = batch.values[rows], batch.returns[rows]
        clipped = old + (values - old).clamp(-args.clip, args.clip)
        huber = nn.HuberLoss(reduction="none", delta=args.huber_delta)
        loss = torch.maximum(huber(values, returns), huber(clipped, returns)).mean()  # the worse of the two
        self.step(self.critic_optimizer, self.critic, loss)
        return {"losses/value": loss.detach()}

    def update(self, rollout):
        """All updates on a rollout. Returns losses by name, their means over the updates."""
        batch, known = self.prepare(rollout)
        logs, minibatches = [], [slice(None)]  # a single one is the rollout as it lies, without copying it
        for _ in range(self.args.num_epochs):
            if self.args.num_minibatches > 1:
                minibatches = torch.rand_like(batch.returns).argsort().tensor_split(self.args.num_minibatches)
            for rows in minibatches:
                logs.append(self.update_actor(batch, rows) | self.update_critic(batch, rows))
        return known | {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}


# ---- One launch an update ----
class GraphedUpdate:
    """Calls `update`, compiled if asked for, and on a GPU as a CUDA graph: recorded once, launched as a whole.

    A graph repeats what was recorded, on the same memory: what it returns, the next launch overwrites. It freezes what
    is no tensor: Python's numbers, and which way an `if` went. `update` must not wait, and returns a dict of tensors.
    """

    def __init__(self, update, device, cudagraph, compile):
        if compile:
            torch._inductor.config.fallback_random = True  # draws what it would draw if it were not compiled
            update = torch.compile(update)
        self.update, self.calls, self.graph = update, 0, None
        self.stream = torch.cuda.Stream(device) if cudagraph and device.type == "cuda" else None

    def __call__(self):
        self.calls += 1
        if self.stream is None:
            return self.update()
        if self.calls <= 3:  # what is made once, such as Adam's moments, is made before recording, on the same stream
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                logs = self.update()
            torch.cuda.current_stream().wait_stream(self.stream)
            return logs
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and changes nothing
                self.logs = self.update()
        self.graph.replay()
        return self.logs


# ---- Environments and evaluation ----
def make_env(args, seed, num_envs):
    """`num_envs` environments side by side, for training or evaluation. Another environment comes in here alone."""
    try:
        return MaMuJoCoVecEnv(args.env_id, num_envs, seed, args.num_threads, args.episode_limit, args.agent_obsk)
    except ValueError as error:  # it names the value and what was expected
        fail(error)


@torch.no_grad()
def evaluate(actor, envs, seed, watch=None):
    """(returns (E,), lengths (E,)) of each environment's first episode, without noise; `watch` sees the first one's."""
    layers, device = actor.effective_layers(), actor.low.device
    returns, lengths, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    obs, _ = envs.reset(seed=seed + 1_000_000)  # other starts than training's, and the same every time
    while not finished.all():  # all first episodes and no others, so that long and short ones count alike
        if watch is not None and not finished[0]:
            watch()
        obs, _, _, _, infos = envs.step(actor.act(torch.as_tensor(obs, device=device), layers).cpu().numpy())
        if "episode" in infos:
            first = infos["_episode"] & ~finished
            returns[first], lengths[first] = infos["episode"]["r"][first], infos["episode"]["l"][first]
            finished |= first
    return returns, lengths


# ---- Command line ----
def parse_args(argv=None):
    """(args, checkpoint or None), tuned values filled in. Checked is what would go wrong late or without a word."""
    args, checkpoint = tyro.cli(Args, args=check_flag_names(argv, Args)), None
    if args.resume is not None:
        checkpoint = read_checkpoint(args.resume, Args)
        args = check_resumed(tyro.cli(Args, args=argv, default=checkpoint["args"]), checkpoint)
    if args.env_id is None and args.evaluate is None:
        args.env_id = "Ant-v2-4x2"
    for name, tuned in zip(TUNED_FLAGS, TUNED.get(str(args.env_id).replace("-v5", "-v2"), UNTUNED), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, tuned)
    check_ranges(args)
    rows, parts = args.rollout_steps * args.num_envs, args.num_minibatches
    require(parts <= rows, f"--num-minibatches is {parts}, expected at most the {rows} steps of a rollout")
    # bfloat16 has to be asked for: on Ant, two of three seeds ended below all those of float32
    if args.evaluate is None:  # a model has a precision of its own
        args.precision = resolve_precision(args.precision, device_type(args.device), auto_bfloat16=False)
    return args, checkpoint


# ---- Training ----
def main():
    args, checkpoint = parse_args()
    device, rank, num_processes = processes.setup_processes(args.device)
    if args.evaluate is not None:
        return evaluate_model(args, device, Actor, make_env, evaluate)
    keep_freed_memory()
    stop = StopSignals()

    # set up: the same weights in all processes, other environments and draws
    torch.manual_seed(args.seed)
    seed = processes.seed_of_process(args.seed, rank)
    envs = make_env(args, seed, args.num_envs)
    space, all_envs = envs.single_action_space, args.num_envs * num_processes  # of all processes
    learner = Learner(envs.state_size, space.low, space.high, args, device, envs.columns)
    actor = learner.actor
    rollout = Rollout(args.rollout_steps, args.num_envs, envs.state_size, space.shape, device)
    eval_envs = make_env(args, args.seed, args.eval_episodes) if args.eval_episodes and rank == 0 else None
    viewer = open_viewer(args, eval_envs)

    update = GraphedUpdate(lambda: learner.update(rollout), device, args.cudagraph and num_processes == 1, args.compile)
    if rank > 0:
        torch.manual_seed(seed)
    torch_threads, rollout_size = torch.get_num_threads(), args.rollout_steps * all_envs
    global_step, num_updates, status, stopping = 0, 0, {}, False
    obs, _ = envs.reset()
    if checkpoint is not None:
        obs, (global_step, num_updates), _ = restore_checkpoint(checkpoint, learner, envs)
    state = envs.state
    run_folder, writer = open_run(args, device, global_step, rank)
    last_step = -(-args.total_timesteps // rollout_size) * rollout_size  # a rollout is always whole
    progress = tqdm(total=last_step, initial=global_step, unit="step", unit_scale=True, disable=rank > 0)

    while global_step < args.total_timesteps and not stopping:
        previous_step, round_start = global_step, time.perf_counter()

        # act: the weights stay the same for a whole rollout, and so do the effective ones
        steps = []
        with torch.no_grad():
            layers, std = actor.effective_layers(), actor.std()
            torch.set_num_threads(1)  # waiting threads of PyTorch spin on cores that the physics could use
            for _ in range(args.rollout_steps):
                actions = actor.sample(torch.as_tensor(obs, device=device), layers, std)
                obs, reward, terminated, truncated, infos = envs.step(actor.to_bounds(actions).cpu().numpy())
                steps.append((state, actions.cpu().numpy(), reward, infos["final_state"], terminated, truncated))
                state = infos["state"]
                global_step += all_envs
                log_episodes(writer, infos, global_step)
        rollout.store(steps)

        # learn: resets come last, since a rollout is learnt from with the policy that made it
        torch.set_num_threads(torch_threads)
        if args.lr_decay:
            learner.scale_learning_rates(1 - previous_step / args.total_timesteps)
        logs = update()
        num_updates += args.num_epochs * args.num_minibatches
        if reset_due(args.actor_reset_interval, previous_step, global_step, args.total_timesteps):
            num_reset = reset_actor(actor, args.actor_reset_ratio).item()
            processes.broadcast_parameters(actor)
            writer.add_scalar("resets/actor_weights", num_reset, global_step)

        # log
        stop_if_diverged(learner, logs, num_updates, writer)
        status["SPS"] = int((global_step - previous_step) / (time.perf_counter() - round_start))
        if reached(args.log_interval, previous_step, global_step):
            charts = dict(updates=num_updates, unstable_episodes=infos["unstable"], SPS=status["SPS"])
            log_scalars(writer, logs, charts, global_step)
            log_mask_shares(writer, learner, global_step)

        # evaluate, save
        finished = global_step >= args.total_timesteps
        stopping = not finished and processes.any_process(stop.received is not None, device)
        eval_due = finished or reached(args.eval_interval, previous_step, global_step)
        checkpoint_due = finished or stopping or reached(args.checkpoint_interval, previous_step, global_step)
        if eval_due and eval_envs is not None:
            returns, lengths = evaluate(actor, eval_envs, args.seed, viewer)
            status["eval"] = log_evaluation(writer, returns, lengths, global_step)
            log_masks(writer, learner, global_step)
            save_film(viewer, run_folder, writer, global_step)
        if eval_due and args.save_model and rank == 0:
            save_model(run_folder, learner, global_step)
        if args.checkpoint_interval and checkpoint_due:
            write_checkpoint(run_folder, writer, learner, envs, obs, (global_step, num_updates))
        progress.set_postfix(status, refresh=False)
        progress.update(global_step - previous_step)

    for each in (progress, writer, envs):
        each.close()
    processes.end_processes()
    if stopping:
        stop.exit()


if __name__ == "__main__":
    main()
