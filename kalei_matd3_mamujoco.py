"""Kaleidoscope-MATD3 on multi-agent MuJoCo, in one file.

    python kalei_matd3_mamujoco.py --env-id Ant-v2-4x2           # train
    tensorboard --logdir runs                                    # watch
    python kalei_matd3_mamujoco.py --evaluate runs/RUN/model.pt  # evaluate the model that --save-model wrote

All agents share one actor network, and all critics share one critic network. Each agent and each critic learns its own
mask over the shared weights, and a diversity loss drives the masks apart: Li, Pan and Zhang, "Kaleidoscope: Learnable
Masks for Heterogeneous Multi-agent Reinforcement Learning" (NeurIPS 2024, arXiv:2410.08540). Where the paper is silent,
the authors' released code decides.

Shapes: B batch, N agents, K critics, M masks (N in the actor, K in the critic), E environments; S, O and act are the
sizes of the state, an agent's observation and an agent's action.
"""

import copy
import dataclasses
import functools
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
from experiment.hardware import device_type, keep_freed_memory, require_memory, resolve_precision
from experiment.mask_pictures import log_mask_shares
from experiment.run_folder import log_episodes, log_scalars, open_run, print_outcome, reached
from experiment.saved_models import evaluate_model
from experiment.stopping import StopSignals, stop_if_diverged
from mamujoco_env import EnvError, MaMuJoCoVecEnv, agent_observations, critic_state


@dataclasses.dataclass
class Args:
    """Train Kaleidoscope-MATD3 on a multi-agent MuJoCo task, or evaluate a saved model."""

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
    num_envs: int = 10  # environments stepped in parallel by each process (E)

    # speed
    device: Literal["auto", "cpu", "cuda"] = "auto"  # device of the networks; auto: the GPU if there is one
    num_threads: int = 0  # threads for the physics; 0: one per usable CPU; OMP_NUM_THREADS sets PyTorch's threads
    precision: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"  # auto: tf32 on GPUs, bfloat16 on CPUs with it
    cudagraph: bool = True  # on a GPU, launch each update as one CUDA graph; ignored with several processes
    compile: bool = False  # fuse the updates' kernels with torch.compile, which takes minutes at the start

    # MATD3
    sharing: Literal["kaleidoscope", "full", "none"] = "kaleidoscope"  # agents share all but masks | all | nothing
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 1_000  # transitions per update (B)
    warmup_steps: int = 10_000  # environment steps with uniformly random actions before the first update
    train_interval: int = 50  # steps per environment between two rounds of updates
    updates_per_round: int = 50  # critic updates per round
    policy_freq: int | None = None  # critic updates per policy update; default: the task's tuned value
    n_step: int | None = None  # rewards in an n-step return; default: the task's tuned value
    gamma: float = 0.99  # discount
    polyak: float = 0.005  # rate of target averaging (tau); a target actor shared by N agents takes N steps
    actor_lr: float = 5e-4  # Adam's learning rate for the actor's weights and thresholds
    critic_lr: float = 1e-3  # Adam's learning rate for the critic's weights and thresholds
    exploration_noise: float = 0.1  # std of the noise on actions, in half action ranges
    policy_noise: float = 0.2  # std of the noise on target actions, in half action ranges
    noise_clip: float = 0.5  # bound of the noise on target actions, in half action ranges
    hidden_size: int = 256  # width of both hidden layers of actor and critic

    # actor: one mask for each agent
    actor_threshold_scale: float = 5.0  # thresholds s start as -(U[0, 1) * scale + bias); a mask keeps |W| > sigmoid(s)
    actor_threshold_bias: float = 5.0  # see actor_threshold_scale
    actor_diversity_coef: float = 0.1  # beta: the diversity loss is scaled to this share of the actor loss; 0: off
    actor_reset_interval: int = 1_000_000  # environment steps between resets of weights that no mask keeps; 0: off
    actor_reset_ratio: float = 0.5  # probability of resetting a weight that no mask keeps

    # critic: one mask for each member of the ensemble
    num_critics: int = 5  # members of the ensemble (K)
    critic_sharing: Literal["kaleidoscope", "none"] = "kaleidoscope"  # critics share all but masks | nothing
    critic_layer_norm: bool = True  # LayerNorm before each ReLU of the critic
    critic_threshold_scale: float = 20.0  # see actor_threshold_scale
    critic_threshold_bias: float = 0.0  # see actor_threshold_scale
    critic_diversity_coef: float = 0.1  # beta: the diversity loss is scaled to this share of the critic loss; 0: off
    critic_reset_interval: int = 800_000  # environment steps between resets of one member's thresholds; 0: off

    # actor and critic
    layer_weights: tuple[float, float, float] = (1.0, 2.0, 4.0)  # lambda: weights of the layers in the diversity loss
    weighted_diversity: bool = True  # weight the differences between masks by |W|
    deque_len: int = 100  # policy updates over which losses are averaged for the adaptive coefficients


# values tuned by the authors, used for v5 tasks too; flags override them
TUNED_FLAGS = ("n_step", "policy_freq")
TUNED = {
    "Ant-v2-4x2": (5, 2),
    "HalfCheetah-v2-2x3": (10, 2),
    "Hopper-v2-3x1": (5, 2),
    "Walker2d-v2-2x3": (20, 8),
    "Walker2d-v2-6x1": (25, 2),
    "manyagent_swimmer-10x2": (10, 2),
}
UNTUNED = (10, 2)  # for the other env ids


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


def masked_linear(x, weight, bias):
    """M layers (M, out, in) on x (B, in) or (M, B, in) -> (M, B, out). Multiplies in weight's dtype, adds in bias's."""
    x = x.to(weight.dtype).expand(len(weight), -1, -1)
    if weight.dtype != bias.dtype:  # bfloat16: round the operands and the product, then go on in float32
        return bias + x @ weight.mT
    return torch.baddbmm(bias, x, weight.mT)


class MaskedMLP(nn.Module):
    """M networks of three masked layers with ReLU between them and, with `layer_norm`, a LayerNorm before each ReLU.

    `sharing` says what the networks share: all but the masks (kaleidoscope), everything (full) or nothing (none).
    Callers compute the effective layers once and pass them in, because many forward passes can use them.
    """

    def __init__(self, num_masks, sizes, sharing, thresholds, layer_norm, precision="float32"):
        """sizes: (inputs, hidden, outputs); thresholds: (scale, bias) of their initial values."""
        super().__init__()
        self.bfloat16 = precision == "bfloat16"
        inputs, hidden, outputs = sizes
        shapes = ((inputs, hidden), (hidden, hidden), (hidden, outputs))
        self.layers = nn.ModuleList(MaskedLinear(num_masks, *shape, sharing, *thresholds) for shape in shapes)
        self.masked = sharing == "kaleidoscope"
        # all networks share a norm's scale and shift; networks that share nothing have none
        norms = (nn.LayerNorm(hidden, elementwise_affine=sharing != "none") for _ in range(2))
        self.norms = nn.ModuleList(norms if layer_norm else (nn.Identity(), nn.Identity()))

    def effective_layers(self, which=slice(None)):
        """[(weight (m, out, in), bias)] of a slice of m masks. In bfloat16, only hidden weights have that dtype."""
        *hidden, output = [layer.effective(which) for layer in self.layers]
        return [(weight.bfloat16() if self.bfloat16 else weight, bias) for weight, bias in hidden] + [output]

    def forward(self, x, effective):
        """x (B, in) or (M, B, in) -> (M, B, out): in each layer, one product for all masks."""
        return self.after_first(masked_linear(x, *effective[0]), effective)

    def after_first(self, x, effective):
        """The rest of forward, from the first layer's output x (M, B, hidden). May overwrite x."""
        for norm, layer in zip(self.norms, effective[1:], strict=True):
            x = masked_linear(torch.relu_(norm(x)), *layer)
        return x


class Actor(MaskedMLP):
    """Deterministic policies of N agents, one mask each. A scaled tanh keeps actions within low and high (N, act)."""

    def __init__(self, observation_size, low, high, args):
        thresholds = (args.actor_threshold_scale, args.actor_threshold_bias)
        sizes = (observation_size, args.hidden_size, low.shape[1])
        super().__init__(len(low), sizes, args.sharing, thresholds, False, args.precision)
        for name, value in (("low", low), ("high", high), ("centre", (high + low) / 2), ("scale", (high - low) / 2)):
            self.register_buffer(name, torch.as_tensor(value))

    def act(self, obs, effective):
        """All agents: obs (B, N, O) -> actions (B, N, act)."""
        return torch.tanh(self(obs.transpose(-3, -2), effective)).transpose(-3, -2) * self.scale + self.centre

    def act_alone(self, obs, agent):
        """One agent: its obs (B, O) -> its actions (B, act)."""
        actions = torch.tanh(self(obs, self.effective_layers(slice(agent, agent + 1))).squeeze(-3))
        return actions * self.scale[agent] + self.centre[agent]


class Critic(MaskedMLP):
    """K action-value functions, one mask each: state and joint action (B, S + N act) -> (K, B, 1)."""

    def __init__(self, inputs, args):
        thresholds = (args.critic_threshold_scale, args.critic_threshold_bias)
        sizes, norm = (inputs, args.hidden_size, 1), args.critic_layer_norm
        super().__init__(args.num_critics, sizes, args.critic_sharing, thresholds, norm, args.precision)


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


@torch.no_grad()
def reset_critic(critic, number):
    """Draw one member's thresholds anew. Returns the member: 0 at reset number 1, then 1, ..., K - 1, 0, ..."""
    member = (number - 1) % len(critic.layers[0].thresholds)
    for layer in critic.layers:
        layer.thresholds[member] = layer.fresh_thresholds()[member]
    return member


# ---- n-step replay ----
class Replay:
    """Ring buffer of `rows` steps of E environments, on the device. Observations are computed from stored states."""

    def __init__(self, rows, num_envs, state_size, action_shape, n_step, gamma, device, columns=None):
        shape = (rows, num_envs)
        # zeros, not empty: n-step returns multiply rows that are not filled yet by 0, and NaN times 0 is NaN
        self.state = torch.zeros(*shape, state_size, device=device)
        self.next_state = torch.zeros(*shape, state_size, device=device)
        self.actions = torch.zeros(*shape, *action_shape, device=device)
        self.reward = torch.zeros(shape, device=device)
        self.terminated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.ended = torch.zeros(shape, dtype=torch.bool, device=device)  # terminated or truncated
        self.steps_ahead = torch.arange(n_step, device=device)
        self.gamma = gamma
        self.rows, self.num_envs, self.num_agents = rows, num_envs, action_shape[0]
        self.columns = None if columns is None else torch.as_tensor(columns, device=device)
        self.next_row = 0
        # tensors on the device, because a CUDA graph of `sample` would freeze Python numbers
        self.newest = torch.zeros((), dtype=torch.long, device=device)
        self.filled = torch.zeros((), dtype=torch.long, device=device)

    def add(self, steps):
        """Store steps, a list of (state, actions, reward, next_state, terminated, truncated), arrays of E rows each."""
        row = ((self.next_row + torch.arange(len(steps), device=self.state.device)) % self.rows)[-self.rows :]
        stacked = (torch.from_numpy(np.stack(values)) for values in zip(*steps[-self.rows :], strict=True))
        *arrays, terminated, truncated = stacked
        names = ("state", "actions", "reward", "next_state", "terminated", "ended")
        for name, values in zip(names, (*arrays, terminated, terminated | truncated), strict=True):
            stored = getattr(self, name)
            stored[row] = values.to(stored.dtype).to(stored.device)
        self.next_row = (self.next_row + len(steps)) % self.rows
        self.newest.fill_((self.next_row - 1) % self.rows)
        self.filled.add_(len(steps)).clamp_(max=self.rows)

    def n_step_return(self, row, env):
        """For first steps at row, env (B,): returns (reward (B,), discount (B,), row of the last step (B,)).

        The reward sums at most n rewards. It stops after a step that ended the episode, and at the newest step.
        """
        rows = (row[:, None] + self.steps_ahead) % self.rows  # (B, n)
        last = self.ended[rows, env[:, None]] | (rows == self.newest)
        taken = torch.cumsum(last, 1) - last.long() == 0  # (B, n): no stop before this step
        rewards = self.reward[rows, env[:, None]] * self.gamma**self.steps_ahead
        num_taken = taken.sum(1)
        return (rewards * taken).sum(1), self.gamma**num_taken, (row + num_taken - 1) % self.rows

    def sample(self, batch_size):
        """Draw a batch of n-step transitions uniformly, with replacement, as the networks see them."""
        device = self.reward.device
        # float64: float32 could not draw every row of a large buffer, and could round up to `filled`
        row = (torch.rand(batch_size, dtype=torch.float64, device=device) * self.filled).long()
        env = torch.randint(self.num_envs, (batch_size,), device=device)
        reward, discount, last = self.n_step_return(row, env)
        state, next_state = self.state[row, env], self.next_state[last, env]
        return SimpleNamespace(
            state=critic_state(state),  # (B, S)
            obs=agent_observations(state, self.num_agents, columns=self.columns),  # (B, N, O)
            actions=self.actions[row, env],  # (B, N, act)
            reward=reward,  # (B,), discounted sum of the n-step return's rewards
            discount=discount,  # (B,), gamma to the power of the number of these rewards
            next_state=critic_state(next_state),  # (B, S), the state that the return bootstraps from
            next_obs=agent_observations(next_state, self.num_agents, columns=self.columns),  # (B, N, O)
            terminated=self.terminated[last, env],  # (B,) bool
        )


# ---- The update ----
class Learner(nn.Module):
    """Networks, targets, optimisers and loss histories on the device, and the updates that change them in place."""

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
        # losses of the last `deque_len` policy updates: of every critic update, and of every agent's update
        critic_length, actor_length = args.deque_len * args.policy_freq, args.deque_len * self.num_agents
        self.critic_coefficient = AdaptiveCoefficient(args.critic_diversity_coef, critic_length, device)
        self.actor_coefficient = AdaptiveCoefficient(args.actor_diversity_coef, actor_length, device)

    def update_critic(self, batch):
        """One step on the members' mean squared TD errors. Returns {name: detached loss (), on the device}."""
        args = self.args
        with torch.no_grad():
            actor = self.target_actor
            noise = torch.randn_like(batch.actions).mul_(args.policy_noise)
            noise = noise.clamp_(-args.noise_clip, args.noise_clip) * actor.scale
            next_actions = actor.act(batch.next_obs, actor.effective_layers()) + noise
            next_actions = torch.clamp(next_actions, actor.low, actor.high)
            next_input = torch.cat([batch.next_state, next_actions.flatten(-2)], -1)
            next_values = self.target_critic(next_input, self.target_critic.effective_layers()).squeeze(-1)  # (K, B)
            bootstrap = batch.discount * ~batch.terminated
            target = batch.reward + bootstrap * next_values.amin(-2)  # (B,): the lowest value counts, as in TD3

        critic_input = torch.cat([batch.state, batch.actions.flatten(-2)], -1)
        values = self.critic(critic_input, self.critic.effective_layers()).squeeze(-1)  # (K, B)
        loss = (values - target).square().mean(-1).sum(-1)  # (): mean over the batch, sum over members, as released
        diversity = diversity_loss(self.critic, args.layer_weights, args.weighted_diversity)
        coefficient = self.critic_coefficient(loss, diversity)
        total = loss + coefficient * diversity
        self.critic_optimizer.zero_grad()
        total.backward()
        processes.all_reduce_mean([parameter.grad for parameter in self.critic.parameters()])
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
        """One step for each agent in turn. Returns {name: loss (), the mean over agents}, detached, on the device.

        In agent i's loss, agent i's action comes from its policy, and the others' come from the replay buffer.
        """
        args, act = self.args, self.act_size
        climbed = slice(1) if args.critic_sharing == "none" else slice(None)  # maximise the first (as in TD3), or all
        with torch.no_grad():
            # the critic's first layer is linear: compute it once, then add the effect of an agent's new action
            critic_layers = self.critic.effective_layers(climbed)
            weight, bias = critic_layers[0]
            joint_actions = batch.actions.flatten(-2)
            first = masked_linear(torch.cat([batch.state, joint_actions], -1), weight, bias)  # (K, B, hidden)
            action_weight = weight[..., batch.state.shape[-1] :].mT.to(first.dtype).contiguous()  # (K, N act, hidden)
        logs = []
        for agent in range(self.num_agents):
            columns = slice(agent * act, (agent + 1) * act)
            actions = self.actor.act_alone(batch.obs[..., agent, :], agent)
            change = (actions - joint_actions[..., columns]).expand(len(first), -1, -1)
            hidden = torch.baddbmm(first, change, action_weight[:, columns])  # (K, B, hidden)
            loss = -self.critic.after_first(hidden, critic_layers).mean()  # over members and batch
            diversity = diversity_loss(self.actor, args.layer_weights, args.weighted_diversity)
            coefficient = self.actor_coefficient(loss, diversity)
            total = loss + coefficient * diversity
            # separate networks have separate gradients, so one step after the loop equals one step per agent
            if args.sharing != "none" or agent == 0:
                self.actor_optimizer.zero_grad()
            total.backward(inputs=self.actor_parameters)  # does not touch the critic's gradients
            if args.sharing != "none" or agent == self.num_agents - 1:
                processes.all_reduce_mean([parameter.grad for parameter in self.actor_parameters])
                self.actor_optimizer.step()
            logs.append(torch.stack([loss.detach(), diversity.detach(), coefficient]))
        loss, diversity, coefficient = torch.stack(logs).mean(0)
        return {"losses/actor": loss, "losses/actor_diversity": diversity, "coefficients/actor": coefficient}

    @torch.no_grad()
    def update_targets(self):
        """Polyak averaging. A target actor shared by N agents moves N steps at once, as far as in the released code."""
        times = 1 if self.args.sharing == "none" else self.num_agents
        rates = (self.args.polyak, 1 - (1 - self.args.polyak) ** times)
        pairs = ((self.critic, self.target_critic), (self.actor, self.target_actor))
        for rate, (network, target) in zip(rates, pairs, strict=True):
            torch._foreach_lerp_(list(target.parameters()), list(network.parameters()), rate)

    def gradient_norms(self):
        """{name: norm () of the latest gradient}. With CUDA graphs, the critic's may be policy_freq - 1 updates old."""
        parameters = {"critic": list(self.critic.parameters()), "actor": self.actor_parameters}
        gradients = {name: [p.grad for p in own if p.grad is not None] for name, own in parameters.items()}
        norm = torch.nn.utils.get_total_norm
        return {f"losses/{name}_grad_norm": norm(each) for name, each in gradients.items() if each}

    def update(self, batch, with_policy):
        """Update the critic and, if `with_policy`, each agent's policy and the targets. Returns {name: loss}."""
        logs = self.update_critic(batch)
        if with_policy:
            logs |= self.update_actor(batch)
            self.update_targets()
        return logs


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
    steps, warmup, per_round = args.total_timesteps, args.warmup_steps, args.train_interval * args.num_envs
    require(steps > warmup, f"--total-timesteps is {steps}, expected more than --warmup-steps {warmup}")
    stored = min((warmup // per_round + 1) * per_round, steps, args.buffer_size)
    expected = f"at most the {stored} transitions stored before the first update (--warmup-steps, --train-interval)"
    require(args.batch_size <= stored, f"--batch-size is {args.batch_size}, expected {expected}")
    if args.evaluate is None:  # with --evaluate, load_actor chooses it
        args.precision = resolve_precision(args.precision, device_type(args.device))
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
    rows = -(-min(args.buffer_size, args.total_timesteps) // all_envs)
    stored = rows * args.num_envs * (4 * (2 * envs.state_size + space.low.size + 1) + 2)  # bytes
    require_memory(f"--buffer-size is {args.buffer_size}", stored, device)
    learner = Learner(envs.state_size, space.low, space.high, args, device, envs.columns)
    actor, critic = learner.actor, learner.critic
    replay = Replay(rows, args.num_envs, envs.state_size, space.shape, args.n_step, args.gamma, device, envs.columns)
    eval_envs = make_env(args, args.seed, args.eval_episodes) if args.eval_episodes and rank == 0 else None
    viewer = open_viewer(args, eval_envs)

    def update(with_policy):
        return learner.update(replay.sample(-(-args.batch_size // num_processes)), with_policy)

    graph = (device, args.cudagraph and num_processes == 1, args.compile)  # averaging gradients in a graph: not tried
    updates = {each: GraphedUpdate(functools.partial(update, each), *graph) for each in (False, True)}  # with_policy
    if rank > 0:
        torch.manual_seed(seed)
    global_step, num_updates, num_critic_resets, eval_due, logs = 0, 0, 0, False, {}
    obs, _ = envs.reset()
    if checkpoint is not None:
        obs, counters, logs = restore_checkpoint(checkpoint, learner, envs, replay)
        global_step, num_updates, num_critic_resets, eval_due = counters
    state = envs.state
    run_folder, writer = open_run(args, device, global_step, rank)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", unit_scale=True, disable=rank > 0)
    status = {"warm-up": "random actions, no losses yet"} if global_step < args.warmup_steps else {}
    around = (eval_envs, viewer, stop, run_folder, writer, progress)
    # on --resume, first repeat an evaluation that a signal ended early
    eval_due = eval_due and not evaluate_and_save(learner, global_step, status, *around)
    stopping = processes.any_process(eval_due, device)

    while global_step < args.total_timesteps and not stopping:
        previous_step, round_start = global_step, time.perf_counter()

        # act: the weights stay the same for a whole round, so compute the effective layers once
        steps = []
        with torch.no_grad():
            effective = actor.effective_layers()
            for _ in range(min(args.train_interval, -(-(args.total_timesteps - global_step) // all_envs))):
                if global_step < args.warmup_steps:
                    uniform = torch.rand(args.num_envs, *space.shape, device=device)
                    actions = actor.low + (actor.high - actor.low) * uniform
                else:
                    actions = actor.act(torch.as_tensor(obs, device=device), effective)
                    noise = torch.randn_like(actions) * actor.scale * args.exploration_noise
                    actions = torch.clamp(actions + noise, actor.low, actor.high)
                actions = actions.cpu().numpy()
                obs, reward, terminated, truncated, infos = envs.step(actions)
                steps.append((state, actions, reward, infos["final_state"], terminated, truncated))
                state = infos["state"]
                global_step += all_envs
                log_episodes(writer, infos, global_step)
        replay.add(steps)

        # learn: resets come first, so that updates train the new weights before they act
        if global_step > args.warmup_steps:
            span = (previous_step, global_step, args.total_timesteps)
            if actor.masked and reset_due(args.actor_reset_interval, *span):
                num_reset = reset_actor(actor, args.actor_reset_ratio).item()
                processes.broadcast_parameters(actor)
                writer.add_scalar("resets/actor_weights", num_reset, global_step)
            if critic.masked and reset_due(args.critic_reset_interval, *span):
                num_critic_resets += 1
                member = reset_critic(critic, num_critic_resets)
                processes.broadcast_parameters(critic)
                writer.add_scalar("resets/critic_member", member, global_step)
            for _ in range(args.updates_per_round):
                num_updates += 1
                logs |= updates[num_updates % args.policy_freq == 0]()
            logs |= learner.gradient_norms()
            stop_if_diverged(learner, logs, num_updates, writer)
            status.pop("warm-up", None)
            status["SPS"] = int((global_step - previous_step) / (time.perf_counter() - round_start))

        # log
        if logs and reached(args.log_interval, previous_step, global_step):
            charts = dict(updates=num_updates, unstable_episodes=infos["unstable"], SPS=status["SPS"])
            log_scalars(writer, logs, charts, global_step)
            log_mask_shares(writer, learner, global_step)

        # evaluate, save
        finished = global_step >= args.total_timesteps
        eval_due = finished or reached(args.eval_interval, previous_step, global_step)
        eval_due = eval_due and not evaluate_and_save(learner, global_step, status, *around)  # True: a signal ended it
        stopping = processes.any_process(stop.received is not None and (eval_due or not finished), device)
        checkpoint_due = finished or stopping or reached(args.checkpoint_interval, previous_step, global_step)
        if args.checkpoint_interval and checkpoint_due:
            counters = (global_step, num_updates, num_critic_resets, eval_due)
            write_checkpoint(run_folder, writer, learner, envs, obs, counters, logs, replay)
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
