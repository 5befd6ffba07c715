"""What a user is told: one line on stderr, above the progress bar if there is one. And which flags are possible."""

import math
import sys

from tqdm import tqdm


def warn(message):
    """Something was lost, and the run goes on."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def fail(message, code=2):
    """End the process. Exit code 2 says that the command line, or a file it names, is not what was expected."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def require(condition, message):
    """Fail unless the condition holds; the message names a value and what was expected."""
    if not condition:
        fail(message)


# {what is expected: (whether a number is that, the flags of either script that have to be)}; NaN is never that
RANGES = {
    "at least 1": (
        lambda number: number >= 1,
        "total_timesteps num_envs episode_limit hidden_size deque_len rollout_steps num_epochs num_minibatches"
        " buffer_size batch_size train_interval updates_per_round policy_freq n_step num_critics",
    ),
    "at least 0": (
        lambda number: number >= 0,
        "num_threads log_interval eval_interval eval_episodes checkpoint_interval agent_obsk warmup_steps"
        " lr actor_lr critic_lr threshold_lr entropy_coef actor_diversity_coef critic_diversity_coef"
        " exploration_noise policy_noise noise_clip layer_weights actor_reset_interval critic_reset_interval",
    ),
    "more than 0": (lambda number: number > 0, "clip max_grad_norm huber_delta threshold_eps output_gain"),
    "from 0 to 1": (lambda number: 0 <= number <= 1, "gamma gae_lambda polyak actor_reset_ratio"),
    "at least 0 and below 1": (lambda number: 0 <= number < 1, "value_norm_beta"),
    "from 0 to 4294967295": (lambda number: 0 <= number < 2**32, "seed"),  # PyTorch keeps 32 bits of it on the CPU
    "a number": (
        lambda number: not math.isnan(number),
        "actor_threshold_scale actor_threshold_bias critic_threshold_scale critic_threshold_bias",
    ),
}


def check_ranges(args):
    """Fail at a flag whose number cannot be meant. None is passed over, and so is a flag that only one script has."""
    for expected, (holds, names) in RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            numbers = () if value is None else value if isinstance(value, tuple) else (value,)
            for number in numbers:
                require(holds(number), f"--{name.replace('_', '-')} is {number}, expected {expected}")
    for name in ("evaluate", "capture_video", "render"):
        seen = getattr(args, name, None) and args.eval_episodes == 0
        require(not seen, f"--eval-episodes is 0, expected at least 1 beside --{name.replace('_', '-')}")
