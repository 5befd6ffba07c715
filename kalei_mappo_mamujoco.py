"""Kaleidoscope-MAPPO on multi-agent MuJoCo, in one file.

    python kalei_mappo_mamujoco.py --env-id Ant-v2-4x2           # train
    tensorboard --logdir runs                                    # watch
    python kalei_mappo_mamujoco.py --evaluate runs/RUN/model.pt  # evaluate the model that --save-model wrote

All agents share one actor network. Each agent learns its own mask over the shared weights, and a diversity loss drives
the masks apart: Li, Pan and Zhang, "Kaleidoscope: Learnable Masks for Heterogeneous Multi-agent Reinforcement Learning"
(NeurIPS 2024, arXiv:2410.08540). The paper puts masks on MATD3. This script puts them on MAPPO (Yu et al. 2022,
arXiv:2103.01955), with HARL's networks and tuned values (Zhong et al. 2024, arXiv:2304.09870).

Shapes: B batch, N agents, M masks, T steps, E environments; S, O and act are the sizes of the state, an agent's
observation and an agent's action.
"""

import dataclasses
import math
import os
import time
from types import SimpleNamespace
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is imported: its idle threads then sleep, not spin

import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

from experiment import processes
from experiment.checkpoints import check_resumed, read_checkpoint, restore_checkpoint, write_checkpoint
from experiment.command_line import check_flag_names, check_help, check_ranges, fail, require
from experiment.evaluation import evaluate, evaluate_and_save
from experiment.films import open_viewer
from experiment.hardware import device_type, keep_freed_memory, resolve_precision
from experiment.mask_pictures import log_mask_shares
from experiment.run_folder import log_episodes, log_scalars, open_run, print_outcome, reached
from experiment.saved_models import evaluate_model
from experiment.stopping import StopSignals, stop_if_diverged
from mamujoco_env import EnvError, MaMuJoCoVecEnv, agent_observations, critic_state


@dataclasses.dataclass
class Args:
    """Train Kaleidoscope-MAPPO on a multi-agent MuJoCo task, or evaluate a saved model."""

    # run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of this experiment, part of the run folder's name
    seed: int = 1  # random seed
    total_timesteps: int = 10_000_000  # environment steps of the run, summed over environments
    log_interval: int = 5_000  # environment steps between log entries of losses and masks; 0: no such entries
    eval_interval: int = 100_000  # environment steps between evaluations; 0: only at the end
    eval_episodes: int = 40  # episodes per evaluation, each in its own environment; 0: no evaluation
    save_model: bool = False  # write actor and critic to model.pt in the run's folder at every evaluation
    capture_video: bool = False  # film an episode of each evaluation: a GIF in the run's folder, or in the model's
    render: bool = False  # show an episode of each evaluation in a window; ignored with --capture-video
    track: bool = False  # also log to Weights & Biases: project WANDB_PROJECT, team WANDB_ENTITY
    checkpoint_interval: int = 0  # environment steps between checkpoints for --resume; 0: no checkpoints
    resume: str | None = None  # continue the run in this folder with its flags; --total-timesteps may change its end
    evaluate: str | None = None  # evaluate the model in this file or run folder on the model's task; no training

    # environment
    env_id: str | None = None  # task: robot, version and partition; default: Ant-v2-4x2, or the model's task
    agent_obsk: int | None = None  # agents see joints at most this many joints away; default: the full state
    episode_limit: int | None = None  # steps until an episode is truncated; default: the task's limit, 1000 for most
    num_envs: int = 20  # environments stepped in parallel by each process (E)

    # speed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # device of the networks; auto: the GPU if there is one
    num_threads: int = 0  # threads for the physics; 0: one per usable CPU; OMP_NUM_THREADS sets PyTorch's threads
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"  # auto: tf32 on GPUs, float32 on CPUs
    cudagraph: bool = True  # on a GPU, launch all updates of a rollout as one CUDA graph; not with several processes
    compile: bool = False  # fuse the updates' kernels with torch.compile, which takes minutes at the start

    # MAPPO
    sharing: Literal["kaleidoscope", "full", "none"] = "kaleidoscope"  # agents share all but masks | all | nothing
    log_std: Literal["shared", "agent"] | None = None  # std for all agents or each; default: shared if --sharing full
    rollout_steps: int | None = None  # steps per environment in a rollout (T); default: tuned
    num_epochs: int | None = None  # passes over a rollout (epochs); default: tuned
    num_minibatches: int | None = None  # minibatches per pass, one update each; default: tuned
    clip: float | None = None  # clips probability ratios to 1 +- this and value changes to +- this; default: tuned
    entropy_coef: float | None = None  # weight of the entropy bonus; default: tuned
    lr: float | None = None  # Adam's learning rate for everything but thresholds; default: tuned
    lr_schedule: Literal["constant", "linear"] | None = None  # linear: rates fall to 0 over the run; default: tuned
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimate
    max_grad_norm: float = 10.0  # gradients of actor and critic are clipped to this norm
    huber_delta: float = 10.0  # value errors beyond this, in std of returns, count linearly
    value_norm_beta: float = 0.99999  # decay of the running mean and std that normalise returns for the critic
    hidden_size: int = 128  # width of the three hidden layers of actor and critic
    output_gain: float = 0.01  # gain of the actor's output layer at initialisation

    # actor: one mask for each agent
    actor_threshold_scale: float = 5.0  # thresholds s start as -(U[0, 1) * scale + bias); a mask keeps |W| > sigmoid(s)
    actor_threshold_bias: float = 4.0  # the first layer's bias; other layers shift it to suit the size of their weights
    actor_diversity_coef: float = 0.1  # beta: the diversity loss is scaled to this share of mean |surrogate|; 0: off
    actor_reset_interval: int = 1_000_000  # environment steps between resets of weights that no mask keeps; 0: off
    actor_reset_ratio: float = 0.5  # probability of resetting a weight that no mask keeps
    threshold_lr: float = 0.05  # Adam's learning rate for thresholds, which must go far in few updates
    threshold_eps: float = 1e-12  # Adam's epsilon for thresholds: their gradients are far below the weights'
    layer_weights: tuple[float, float, float, float] = (1.0, 2.0, 4.0, 8.0)  # lambda: weights of layers in L_div
    weighted_diversity: bool = True  # weight the differences between masks by |W|
    deque_len: int = 100  # updates over which losses are averaged for the adaptive coefficient


# values tuned by HARL for MAPPO, used for v5 tasks too; flags override them
TUNED_FLAGS = ("rollout_steps", "num_epochs", "num_minibatches", "clip", "entropy_coef", "lr", "lr_schedule")
TUNED = {
    "Ant-v2-4x2": (200, 5, 1, 0.1, 0.0, 5e-4, "constant"),
    "HalfCheetah-v2-2x3": (200, 15, 1, 0.05, 0.01, 5e-4, "constant"),
    "Hopper-v2-3x1": (200, 10, 1, 0.05, 0.0, 5e-4, "linear"),
    "Walker2d-v2-2x3": (200, 5, 2, 0.05, 0.0, 1e-3, "linear"),
    "Walker2d-v2-6x1": (200, 5, 1, 0.1, 0.01, 5e-4, "constant"),
    "Humanoid-v2-17x1": (100, 5, 1, 0.1, 0.0, 5e-4, "linear"),
}
UNTUNED = (200, 5, 1, 0.1, 0.0, 5e-4, "constant")  # for the other env ids


# ---- Masked networks ----
class MaskedLinear(nn.Module):
    """One weight W (out, in) and bias (out,), shared by M masks with thresholds s (M, out, in).

    Mask k keeps the weights with |W| > sigmoid(s_k), shrunk by sigmoid(s_k): W_k = sign(W) relu(|W| - sigmoid(s_k)).
    Gradients reach W and s_k through W_k: the paper's adaptive partial parameter sharing, by the soft-threshold
    reparameterisation of Kusupati et al. 2020. The other ways of sharing have no thresholds. `full`: all M networks use
    W unchanged. `none`: each network has its own weight and bias, (M, out, in) and (M, 1, out).
    """

    def __init__(self, num_masks, inputs, outputs, sharing, threshold_scale, threshold_bias):
        super().__init__()
        self.num_masks, self.separate = num_masks, sharing == "none"
        self.threshold_scale, self.threshold_bias = threshold_scale, threshold_bias
        self.weight = nn.Parameter(torch.empty((num_masks, outputs, inputs) if self.separate else (outputs, inputs)))
        self.bias = nn.Parameter(torch.empty((num_masks, 1, outputs) if self.separate else outputs))
        self.thresholds = nn.Parameter(torch.empty(num_masks, outputs, inputs)) if sharing == "kaleidoscope" else None
        with torch.no_grad():
            self.bias.uniform_(-(inputs**-0.5), inputs**-0.5)
            self.weight.copy_(self.fresh_weight())
            if self.thresholds is not None:
                self.thresholds.copy_(self.fresh_thresholds())

    def fresh_weight(self):
        """A new weight of W's shape, drawn as torch.nn.Linear draws it."""
        bound = self.weight.shape[-1] ** -0.5
        return torch.empty_like(self.weight).uniform_(-bound, bound)

    def fresh_thresholds(self):
        """New thresholds (M, out, in), drawn as -(U[0, 1) * scale + bias)."""
        return -(torch.rand_like(self.thresholds) * self.threshold_scale + self.threshold_bias)

    def effective(self, which=slice(None)):
        """Effective weights (m, out, in) of a slice of m masks, and their bias: (out,) or, with `none`, (m, 1, out)."""
        if self.separate:
            return self.weight[which], self.bias[which]
        if self.thresholds is None:
            return self.weight.expand(self.num_masks, -1, -1)[which], self.bias
        kept = torch.relu(self.weight.abs() - torch.sigmoid(self.thresholds[which]))
        return torch.sign(self.weight.detach()) * kept, self.bias  # detach: the gradient of a sign is 0

    def masks(self):
        """(M, out, in) bool: True for weights that the mask keeps."""
        return self.weight.abs() > torch.sigmoid(self.thresholds)


class OrthogonalLinear(MaskedLinear):
    """A masked layer as PPO initialises it: W (each W, with `none`) orthogonal times `gain`, bias 0."""

    def __init__(self, num_masks, inputs, outputs, sharing, threshold_scale, threshold_bias, gain):
        self.gain = gain  # before super().__init__, which draws W
        super().__init__(num_masks, inputs, outputs, sharing, threshold_scale, threshold_bias)
        nn.init.zeros_(self.bias)

    def fresh_weight(self):
        """A new weight of W's shape, orthogonal, with entries of rms gain / sqrt(max(in, out))."""
        weight = torch.empty_like(self.weight)
        for matrix in weight.view(-1, *weight.shape[-2:]):
            nn.init.orthogonal_(matrix, self.gain)
        return weight


def masked_linear(x, weight, bias):
    """M layers (M, out, in) on x (B, in) or (M, B, in) -> (M, B, out). Multiplies in weight's dtype, adds in bias's."""
    x = x.to(weight.dtype).expand(len(weight), -1, -1)
    if weight.dtype != bias.dtype:  # bfloat16: round the operands and the product, then go on in float32
        return bias + x @ weight.mT
    return torch.baddbmm(bias, x, weight.mT)


class MaskedMLP(nn.Module):
    """M networks of four masked layers with ReLU and LayerNorm between them. Inputs must be standardised.

    `sharing` says what the networks share: all but the masks (kaleidoscope), everything (full) or nothing (none).
    Callers compute the effective layers once and pass them in, because many forward passes can use them.
    """

    def __init__(self, num_masks, sizes, sharing, thresholds, output_gain, precision="float32"):
        """sizes: (inputs, hidden, outputs); thresholds: (scale, bias) of the first layer's initial values."""
        super().__init__()
        self.bfloat16, self.masked = precision == "bfloat16", sharing == "kaleidoscope"
        (inputs, hidden, outputs), (scale, bias) = sizes, thresholds
        layers, norms = [], []
        for size in ((inputs, hidden), (hidden, hidden), (hidden, hidden), (hidden, outputs)):
            gain = output_gain if len(layers) == 3 else 2**0.5
            # start all layers with the same share of zeros, though the last one's weights are some 100 times smaller:
            # sigmoid(s) is about exp(s), so shift s by log(rms of the layer's weights / rms of the first layer's)
            shift = math.log((gain / max(size) ** 0.5) / (2 / max(inputs, hidden)) ** 0.5)
            shape = (num_masks, 1, size[0]) if sharing == "none" else (1, size[0])
            norms.append(nn.ParameterDict({"weight": torch.ones(shape), "bias": torch.zeros(shape)}))
            layers.append(OrthogonalLinear(num_masks, *size, sharing, scale, bias - shift, gain))
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(norms)
        # on a CPU, a LayerNorm without scale and shift takes longer than one with ones and zeros
        self.register_buffer("one", torch.ones(hidden), persistent=False)
        self.register_buffer("zero", torch.zeros(hidden), persistent=False)

    def effective_layers(self):
        """[(weight (M, out, in), bias (M, 1, out))]. In bfloat16, only hidden weights have that dtype.

        They include the scale and shift of a norm before the layer, also before the first one: W (scale * x + shift) +
        b = (W * scale) x + (W shift + b). This is far less work than scaling a batch, and x needs no gradient.
        """
        layers = []
        for norm, layer in zip(self.norms, self.layers, strict=True):
            weight, bias = layer.effective()
            layers.append((weight * norm.weight, norm.bias @ weight.mT + bias))
        return [(weight.bfloat16() if self.bfloat16 else weight, bias) for weight, bias in layers[:-1]] + layers[-1:]

    def forward(self, x, effective):
        """Standardised x (B, in) or (M, B, in) -> (M, B, out): in each layer, one product for all masks."""
        x = masked_linear(x, *effective[0])
        for layer in effective[1:]:
            x = masked_linear(nn.functional.layer_norm(torch.relu_(x), x.shape[-1:], self.one, self.zero), *layer)
        return x


class Actor(MaskedMLP):
    """Gaussian policies of N agents, one mask each, in half action ranges: the bounds low, high (N, act) become -1, 1.

    Means and actions have no bounds. Only to_bounds, on the way to the environment, clips and scales actions.
    """

    def __init__(self, observation_size, low, high, args):
        (agents, act), thresholds = low.shape, (args.actor_threshold_scale, args.actor_threshold_bias)
        sizes = (observation_size, args.hidden_size, act)
        super().__init__(agents, sizes, args.sharing, thresholds, args.output_gain, args.precision)
        shared_std = args.sharing == "full" if args.log_std is None else args.log_std == "shared"
        self.log_std = nn.Parameter(torch.ones(act if shared_std else (agents, 1, act)))
        for name, value in (("low", low), ("high", high), ("centre", (high + low) / 2), ("scale", (high - low) / 2)):
            self.register_buffer(name, torch.as_tensor(value))
        self.register_buffer("real", (self.high > self.low).float()[:, None])  # (N, 1, act): 0 for padded actions

    def std(self):
        """Standard deviations, at most 0.5: (N, 1, act), one for each agent, or (act,) with a shared log_std."""
        return 0.5 * torch.sigmoid(self.log_std)

    def act(self, obs, effective):
        """Actions for evaluation, the policies' means, clipped and scaled: obs (B, N, O) -> (B, N, act)."""
        return self.to_bounds(self(obs.transpose(-3, -2), effective).transpose(-3, -2))

    def to_bounds(self, actions):
        """Clip the policies' actions (..., N, act) to [-1, 1] and scale them to low and high."""
        return actions.clamp(-1.0, 1.0) * self.scale + self.centre

    def sample(self, obs, effective, std):
        """Draw the policies' actions: obs (B, N, O) -> (B, N, act)."""
        mean = self(obs.transpose(-3, -2), effective)
        return (mean + torch.randn_like(mean) * std).transpose(-3, -2)

    def log_prob(self, obs, actions, effective):
        """Log density of each agent's joint action: obs (N, B, O), actions (N, B, act) -> (N, B)."""
        mean, std = self(obs, effective), self.std()
        densities = -0.5 * ((actions - mean) / std).square() - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return (densities * self.real).sum(-1)  # without padded actions

    def entropy(self):
        """The entropy of an agent's policy, mean over agents: ()."""
        return ((torch.log(self.std()) + 0.5 * math.log(2 * math.pi * math.e)) * self.real).sum(-1).mean()


class Critic(MaskedMLP):
    """The state's value, normalised as returns are, from a network without masks: state (B, S) -> (1, B, 1)."""

    def __init__(self, state_size, args):
        # float32: after some epochs, bfloat16's error in a gradient is over a third of the gradient's noise
        super().__init__(1, (state_size, args.hidden_size, 1), "full", thresholds=(0.0, 0.0), output_gain=1.0)
        self.beta = args.value_norm_beta
        self.register_buffer("averages", torch.zeros(3))  # means of returns, their squares and 1, starting at 0

    def update_value_norm(self, returns):
        """Add returns, of any shape, to the running averages."""
        latest = torch.stack([returns.mean(), returns.square().mean(), torch.ones_like(self.averages[0])])
        processes.all_reduce_mean([latest])
        self.averages.lerp_(latest, 1 - self.beta)

    def mean_std(self):
        """Running mean and std of returns, (): HARL's ValueNorm, debiased like Adam's moments."""
        mean, square = self.averages[:2] / self.averages[2].clamp(min=1e-30)
        return mean, (square - mean.square()).clamp(min=1e-2).sqrt()


# ---- Mask diversity ----
class PairwiseMaskDifference(torch.autograd.Function):
    """sum_ij || (M_i - M_j) * |W| ||_1 over all ordered pairs of a layer's masks, in O(M) instead of O(M^2).

    A weight that k of the M masks keep differs in 2 k (M - k) ordered pairs. backward gives mask i the gradient of the
    sum above, 2 (M M_i - k) |W|; autograd on k (M - k) would give all masks the same gradient. The step function
    M_i = 1[|W| > sigmoid(s_i)] passes on tanh(gradient), to the thresholds only, not to W.
    """

    @staticmethod
    def forward(ctx, thresholds, weight, weighted):
        """thresholds (M, out, in), weight (out, in) -> ()."""
        sigmoid, magnitude = torch.sigmoid(thresholds), weight.abs()
        masks = magnitude > sigmoid
        importance = magnitude if weighted else torch.ones_like(magnitude)
        keep = masks.sum(0, dtype=weight.dtype)  # k for each weight
        drop = len(masks) - keep
        ctx.save_for_backward(sigmoid, masks, keep * importance, drop * importance)
        return (2 * keep * drop * importance).sum()

    @staticmethod
    def backward(ctx, grad):
        sigmoid, masks, keep, drop = ctx.saved_tensors
        kept, dropped = torch.tanh(2 * grad * drop), torch.tanh(-2 * grad * keep)  # if the mask keeps, drops the weight
        slope = (sigmoid - 1).mul_(sigmoid)  # derivative of -sigmoid(s)
        return slope.mul_(torch.where(masks, kept, dropped)), None, None


def diversity_loss(network, layer_weights, weighted=True):
    """L_div (), the paper's diversity loss: minus the weighted mean difference between masks; 0 without masks.

    It is divided by M (M - 1) and by the number of weights, as in the released code.
    """
    layers = network.layers
    if not network.masked:
        return layers[0].weight.new_zeros(())
    loss, num_masks, num_weights = 0.0, len(layers[0].thresholds), sum(layer.weight.numel() for layer in layers)
    for layer_weight, layer in zip(layer_weights, layers, strict=True):
        loss = loss - layer_weight * PairwiseMaskDifference.apply(layer.thresholds, layer.weight.detach(), weighted)
    return loss / max(num_masks * (num_masks - 1) * num_weights, 1)


class AdaptiveCoefficient(nn.Module):
    """Factor of the diversity loss: |beta * mean(RL losses) / mean(diversity losses)| over `length` latest updates."""

    def __init__(self, beta, length, device):
        super().__init__()
        self.beta = beta
        # two ring buffers of equal length on the device: the ratio of their sums is the ratio of their means
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
    """True if this round reached a multiple of `interval`; never during the run's last interval."""
    return reached(interval, previous_step, step) and total_steps - step > interval


@torch.no_grad()
def reset_actor(actor, ratio):
    """Draw weights that no mask keeps, and their thresholds, anew with probability `ratio`. Returns how many, ()."""
    num_reset = 0
    for layer in actor.layers:
        reset = ~layer.masks().any(0) & (torch.rand_like(layer.weight) < ratio)
        layer.weight.copy_(torch.where(reset, layer.fresh_weight(), layer.weight))
        layer.thresholds.copy_(torch.where(reset, layer.fresh_thresholds(), layer.thresholds))
        num_reset += reset.sum()
    return num_reset


# ---- Rollout and advantages ----
class Rollout:
    """T steps of E environments, on the device. Observations are computed from the stored states."""

    def __init__(self, steps, num_envs, state_size, action_shape, device):
        self.state = torch.zeros(steps, num_envs, state_size, device=device)
        self.actions = torch.zeros(steps, num_envs, *action_shape, device=device)  # as sampled, not clipped
        self.reward = torch.zeros(steps, num_envs, device=device)
        self.next_state = torch.zeros_like(self.state)  # after the action, before any reset
        self.terminated = torch.zeros_like(self.reward, dtype=torch.bool)
        self.truncated = torch.zeros_like(self.terminated)

    def store(self, steps):
        """Keep T steps, a list of (state, actions, reward, next_state, terminated, truncated), arrays of E rows."""
        names = ("state", "actions", "reward", "next_state", "terminated", "truncated")
        for name, arrays in zip(names, zip(*steps, strict=True), strict=True):
            stored = getattr(self, name)
            stored.copy_(torch.from_numpy(np.stack(arrays)).to(stored.dtype))


def estimate_advantages(reward, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimates (T, E) from tensors (T, E). next_values: of the next states, before any reset."""
    deltas = reward + gamma * next_values * ~terminated - values  # a truncated episode bootstraps from its final state
    goes_on = ~(terminated | truncated)
    advantages, later = torch.empty_like(deltas), torch.zeros_like(deltas[0])
    for step in range(len(deltas) - 1, -1, -1):
        later = deltas[step] + gamma * gae_lambda * later * goes_on[step]
        advantages[step] = later
    return advantages


# ---- The update ----
class Learner(nn.Module):
    """Networks, optimisers and loss histories on the device, and the updates that change them in place."""

    def __init__(self, state_size, low, high, args, device, columns=None):
        super().__init__()
        self.args, self.num_agents = args, len(low)
        self.columns = None if columns is None else torch.as_tensor(columns, device=device)
        seen = state_size if columns is None else columns.shape[1]
        self.actor = Actor(seen + self.num_agents, low, high, args).to(device)
        self.critic = Critic(state_size, args).to(device)
        self.actor_optimizer = self.make_optimizer(self.actor, device)
        self.critic_optimizer = self.make_optimizer(self.critic, device)
        self.optimizers = [self.actor_optimizer, self.critic_optimizer]
        self.actor_coefficient = AdaptiveCoefficient(args.actor_diversity_coef, args.deque_len, device)

    def make_optimizer(self, network, device):
        """Adam; thresholds, if there are any, have their own learning rate and epsilon."""
        parameters, args = dict(network.named_parameters()), self.args
        thresholds = [parameters.pop(name) for name in list(parameters) if name.endswith("thresholds")]
        # learning rates are tensors, so that they can fall in a CUDA graph; on a GPU, Adam takes no float64
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        lr, threshold_lr = torch.tensor([args.lr, args.threshold_lr], dtype=dtype, device=device)
        groups = [dict(params=list(parameters.values()), lr=lr, eps=1e-5)]
        groups += [dict(params=thresholds, lr=threshold_lr, eps=args.threshold_eps)] if thresholds else []
        return torch.optim.Adam(groups, fused=True, capturable=device.type == "cuda")

    def scale_learning_rates(self, factor):
        """Set all learning rates to `factor` times their initial values."""
        for optimizer in self.optimizers:
            for group, lr in zip(optimizer.param_groups, (self.args.lr, self.args.threshold_lr), strict=False):
                group["lr"].fill_(lr * factor)

    @torch.no_grad()
    def prepare(self, rollout):
        """Make the batch of a rollout's B = T E steps. Returns (batch, logs that are known before the updates)."""
        args, critic, shape = self.args, self.critic, rollout.reward.shape
        state = critic_state(rollout.state).flatten(0, 1)
        both = torch.cat([state, critic_state(rollout.next_state).flatten(0, 1)])
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
            values=predictions[: len(state)],  # (B,), normalised as returns are, before the updates
            returns=((returns - returns_mean) / returns_std).flatten(),  # (B,), normalised
        )
        explained = 1 - advantages.var(correction=0) / returns.var(correction=0).clamp(min=1e-8)
        return batch, {"losses/explained_variance": explained, "values/value": values.mean()}

    def step(self, optimizer, network, loss, separate=False):
        """One step with clipped gradient norm; `separate`: one norm for each agent. Returns the mean norm."""
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        processes.all_reduce_mean(gradients)
        rows = [gradient.view(len(gradient) if separate else 1, -1) for gradient in gradients]
        norm = sum(row.square().sum(1, keepdim=True) for row in rows).sqrt()  # (N, 1) or (1, 1)
        for row in rows:
            row.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        optimizer.step()
        return norm.mean()

    def update_actor(self, batch, rows):
        """One step of all agents' policies on `rows`, (b,) or a slice. Returns {name: detached loss ()}."""
        args = self.args
        log_prob = self.actor.log_prob(batch.obs[:, rows], batch.actions[:, rows], self.actor.effective_layers())
        log_ratio = log_prob - batch.log_prob[:, rows]  # (N, b)
        ratio = log_ratio.exp()  # (N, b): the product over an agent's action dimensions
        advantages, clipped = batch.advantages[rows], ratio.clamp(1 - args.clip, 1 + args.clip)  # (b,), (N, b)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # (N, b), PPO's objective
        entropy = self.actor.entropy()
        loss = -surrogate.mean()
        diversity = diversity_loss(self.actor, args.layer_weights, args.weighted_diversity)
        # scale L_div by the mean absolute surrogate: the mean surrogate is always about 0
        coefficient = self.actor_coefficient(surrogate.abs().mean(), diversity)
        total = loss - args.entropy_coef * entropy + coefficient * diversity
        separate = args.sharing == "none"  # N learners: sum their losses, clip each norm; Adam is elementwise
        norm = self.step(self.actor_optimizer, self.actor, total * self.num_agents if separate else total, separate)
        return {
            "losses/actor_grad_norm": norm,
            "losses/policy": loss.detach(),
            "losses/entropy": entropy.detach(),
            "losses/approx_kl": (ratio - 1 - log_ratio).detach().mean(),
            "losses/clipfrac": ((ratio - 1).abs() > args.clip).float().mean(),
            "losses/actor_diversity": diversity.detach(),
            "coefficients/actor": coefficient,
        }

    def update_critic(self, batch, rows):
        """One step of the critic on `rows`, (b,) or a slice. Returns {name: detached loss ()}."""
        args = self.args
        values = self.critic(batch.state[rows], self.critic.effective_layers()).flatten()  # (b,)
        old, returns = batch.values[rows], batch.returns[rows]
        clipped = old + (values - old).clamp(-args.clip, args.clip)
        huber = nn.HuberLoss(reduction="none", delta=args.huber_delta)
        loss = torch.maximum(huber(values, returns), huber(clipped, returns)).mean()  # the worse of the two
        norm = self.step(self.critic_optimizer, self.critic, loss)
        return {"losses/value": loss.detach(), "losses/critic_grad_norm": norm}

    def update(self, rollout):
        """All updates on a rollout. Returns {name: loss (), the mean over the updates}."""
        batch, known = self.prepare(rollout)
        logs, minibatches = [], [slice(None)]  # one minibatch: the whole rollout, not copied
        for _ in range(self.args.num_epochs):
            if self.args.num_minibatches > 1:
                minibatches = torch.rand_like(batch.returns).argsort().tensor_split(self.args.num_minibatches)
            for rows in minibatches:
                logs.append(self.update_actor(batch, rows) | self.update_critic(batch, rows))
        return known | {name: torch.stack([log[name] for log in logs]).mean() for name in logs[0]}


# ---- One launch per update ----
class GraphedUpdate:
    """Calls `update`, compiled if asked for. On a GPU, it records `update` once as a CUDA graph and launches the graph.

    Each launch overwrites the tensors that the last one returned. Python numbers and the branches of an `if` stay as
    recorded. `update` must return a dict of tensors and must never wait for the GPU.
    """

    def __init__(self, update, device, cudagraph, compile):
        if compile:
            torch._inductor.config.fallback_random = True  # draw the same random numbers as eager code
            update = torch.compile(update)
        self.update, self.calls, self.graph = update, 0, None
        self.stream = torch.cuda.Stream(device) if cudagraph and device.type == "cuda" else None

    def __call__(self):
        self.calls += 1
        if self.stream is None:
            return self.update()
        if self.calls <= 3:  # first run eagerly on a side stream, so that Adam's moments and the like exist
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                logs = self.update()
            torch.cuda.current_stream().wait_stream(self.stream)
            return logs
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records without running
                self.logs = self.update()
        self.graph.replay()
        return self.logs


# ---- Environments ----
def make_env(args, seed, num_envs):
    """`num_envs` environments side by side, for training or evaluation. Return your own environment here."""
    try:
        return MaMuJoCoVecEnv(args.env_id, num_envs, seed, args.num_threads, args.episode_limit, args.agent_obsk)
    except EnvError as error:  # a wrong flag; other errors are bugs
        fail(error)


# ---- Command line ----
def parse_args(argv=None):
    """Returns (args with tuned values, checkpoint or None). Checks flags whose mistakes would show late or never."""
    args, checkpoint = tyro.cli(Args, args=check_flag_names(check_help(argv, Args), Args)), None
    if args.resume is not None:
        checkpoint = read_checkpoint(args.resume, Args)
        args = check_resumed(tyro.cli(Args, args=argv, default=checkpoint["args"]), checkpoint)
    if args.env_id is None and args.evaluate is None:
        args.env_id = "Ant-v2-4x2"
    for name, tuned in zip(TUNED_FLAGS, TUNED.get(str(args.env_id).replace("-v5", "-v2"), UNTUNED), strict=True):
        if getattr(args, name) is None:
            setattr(args, name, tuned)
    check_ranges(args)
    if (args.sharing, args.log_std) == ("none", "shared"):
        fail("--log-std is shared, expected agent beside --sharing none")
    rows, parts = args.rollout_steps * args.num_envs, args.num_minibatches
    require(parts <= rows, f"--num-minibatches is {parts}, expected at most the {rows} steps of a rollout")
    # auto never means bfloat16: on Ant, two of three bfloat16 seeds ended below all float32 seeds
    if args.evaluate is None:  # with --evaluate, load_actor chooses it
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

    # set up: all processes start with the same weights, and each has its own environments and random numbers
    torch.manual_seed(args.seed)
    seed = processes.seed_of_process(args.seed, rank)
    envs = make_env(args, seed, args.num_envs)
    space, all_envs = envs.single_action_space, args.num_envs * num_processes  # all_envs: in all processes
    learner = Learner(envs.state_size, space.low, space.high, args, device, envs.columns)
    actor = learner.actor
    rollout = Rollout(args.rollout_steps, args.num_envs, envs.state_size, space.shape, device)
    eval_envs = make_env(args, args.seed, args.eval_episodes) if args.eval_episodes and rank == 0 else None
    viewer = open_viewer(args, eval_envs)

    update = GraphedUpdate(lambda: learner.update(rollout), device, args.cudagraph and num_processes == 1, args.compile)
    if rank > 0:
        torch.manual_seed(seed)
    torch_threads, rollout_size = torch.get_num_threads(), args.rollout_steps * all_envs
    global_step, num_updates, eval_due, status = 0, 0, False, {}
    obs, _ = envs.reset()
    if checkpoint is not None:
        obs, (global_step, num_updates, eval_due), _ = restore_checkpoint(checkpoint, learner, envs)
    state = envs.state
    run_folder, writer = open_run(args, device, global_step, rank)
    last_step = -(-args.total_timesteps // rollout_size) * rollout_size  # a run ends with a whole rollout
    progress = tqdm(total=last_step, initial=global_step, unit="step", unit_scale=True, disable=rank > 0)
    around = (eval_envs, viewer, stop, run_folder, writer, progress)
    # on --resume, first repeat an evaluation that a signal ended early
    eval_due = eval_due and not evaluate_and_save(learner, global_step, status, *around)
    stopping = processes.any_process(eval_due, device)

    while global_step < args.total_timesteps and not stopping:
        previous_step, round_start = global_step, time.perf_counter()

        # act: the weights stay the same for a whole rollout, so compute the effective layers once
        steps = []
        with torch.no_grad():
            effective, std = actor.effective_layers(), actor.std()
            torch.set_num_threads(1)  # enough to act; more would spin, or be woken at every step
            for _ in range(args.rollout_steps):
                actions = actor.sample(torch.as_tensor(obs, device=device), effective, std)
                obs, reward, terminated, truncated, infos = envs.step(actor.to_bounds(actions).cpu().numpy())
                steps.append((state, actions.cpu().numpy(), reward, infos["final_state"], terminated, truncated))
                state = infos["state"]
                global_step += all_envs
                log_episodes(writer, infos, global_step)
        rollout.store(steps)

        # learn: resets come last, because updates must start from the policy that collected the rollout
        torch.set_num_threads(torch_threads)
        if args.lr_schedule == "linear":
            learner.scale_learning_rates(1 - previous_step / args.total_timesteps)
        logs = update()
        num_updates += args.num_epochs * args.num_minibatches
        if actor.masked and reset_due(args.actor_reset_interval, previous_step, global_step, args.total_timesteps):
            num_reset = reset_actor(actor, args.actor_reset_ratio).item()
            processes.broadcast_parameters(actor)
            writer.add_scalar("resets/actor_weights", num_reset, global_step)

        # log
        stop_if_diverged(learner, logs, num_updates, writer)
        status["SPS"] = int((global_step - previous_step) / (time.perf_counter() - round_start))
        if reached(args.log_interval, previous_step, global_step):
            charts = dict(updates=num_updates, unstable_episodes=infos["unstable"], SPS=status["SPS"])
            charts |= dict(policy_std=actor.std().detach().mean(), lr=learner.actor_optimizer.param_groups[0]["lr"])
            log_scalars(writer, logs, charts, global_step)
            log_mask_shares(writer, learner, global_step)

        # evaluate, save
        finished = global_step >= args.total_timesteps
        eval_due = finished or reached(args.eval_interval, previous_step, global_step)
        eval_due = eval_due and not evaluate_and_save(learner, global_step, status, *around)  # True: a signal ended it
        stopping = processes.any_process(stop.received is not None and (eval_due or not finished), device)
        checkpoint_due = finished or stopping or reached(args.checkpoint_interval, previous_step, global_step)
        if args.checkpoint_interval and checkpoint_due:
            write_checkpoint(run_folder, writer, learner, envs, obs, (global_step, num_updates, eval_due))
        progress.set_postfix(status, refresh=False)
        progress.update(global_step - previous_step)

    for each in filter(None, (progress, writer, envs, eval_envs)):
        each.close()
    processes.end_processes()
    if stopping:
        stop.exit()
    if rank == 0:
        print_outcome(run_folder, args, status)


if __name__ == "__main__":
    main()
