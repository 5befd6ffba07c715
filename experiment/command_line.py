"""Warnings and errors: one line on stderr, above the progress bar if there is one. Also the flags' allowed values."""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import os
import re
import signal
import sys
import textwrap
import typing

import tyro
from tqdm import tqdm


def warn(message):
    """Say that something was lost or is doubtful. The run continues."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def fail(message, code=2):
    """End the process. Exit code 2: something is wrong with the command line or with a file that it names."""
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def require(condition, message):
    """Fail unless the condition holds. The message names the value and what was expected."""
    if not condition:
        fail(message)


# flags of CleanRL and HARL, and after each the flags of our scripts in its place
FLAGS_ELSEWHERE = """
    learning-rate lr actor-lr critic-lr | num-steps rollout-steps train-interval | clip-coef clip | tau polyak |
    update-epochs num-epochs updates-per-round | ent-coef entropy-coef | learning-starts warmup-steps | cuda device |
    n-rollout-threads num-envs | num-env-steps total-timesteps | wandb-project-name track | scenario env-id |
    agent-conf env-id | ppo-epoch num-epochs | clip-param clip | share-param sharing | episode-length rollout-steps |
    model-dir evaluate
"""
# {allowed range in words: (test of a number, flags of either script that must pass it)}; NaN never passes
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


def check_ranges(args, where=""):
    """Fail at a flag whose number is out of range, after `where`. Skips None, and flags that args does not have."""
    for expected, (holds, names) in RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            numbers = () if value is None else value if isinstance(value, tuple) else (value,)
            for number in numbers:
                require(holds(number), f"{where}--{name.replace('_', '-')} is {number}, expected {expected}")
    for name in ("evaluate", "capture_video", "render"):
        seen = getattr(args, name, None) and args.eval_episodes == 0
        require(not seen, f"{where}--eval-episodes is 0, expected at least 1 beside --{name.replace('_', '-')}")


def accepts(args_class, words):
    """Whether tyro takes these words. Where it does not, it would draw a box of several lines."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(args_class, args=words, console_outputs=False)
    except SystemExit as end:
        return end.code == 0  # after --help
    return True


def in_words(kind):
    """What a flag of this kind expects: "an integer", "auto or cpu or cuda"."""
    kinds = [in_words(each) for each in typing.get_args(kind) if each is not ...]
    names = {int: "an integer", float: "a number", str: "a text", bool: "no value", type(None): "None"}
    text = " or ".join(dict.fromkeys(kinds)) or names.get(kind, str(kind))
    return f"{len(kinds)} values, each {text}" if typing.get_origin(kind) is tuple and len(kinds) > 1 else text


def check_flag_names(argv, args_class):
    """Return argv (None: the command line's). Fail at a wrong value or flag, in one line, before tyro draws a box."""
    words = list(sys.argv[1:] if argv is None else argv)
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    first, *groups = [words[i:j] for i, j in itertools.pairwise([0, *starts, len(words)])]  # a flag and its values each
    if accepts(args_class, words):
        return argv
    if not accepts(args_class, first):
        require(not first, f"{' '.join(first)!r} is no flag of this script, expected --FLAG VALUE (see --help)")
        return argv  # a tool's positional argument is missing, as tyro will say
    kinds = {name.replace("_", "-"): kind for name, kind in typing.get_type_hints(args_class).items()}
    kinds |= {f"no-{name}": kind for name, kind in kinds.items() if kind is bool}
    elsewhere = {names.split()[0]: names.split()[1:] for names in FLAGS_ELSEWHERE.split("|")}
    for group in groups:
        if not accepts(args_class, [*first, *group]):
            flag, equals, value = group[0].partition("=")
            name, values = flag.removeprefix("--").replace("_", "-"), " ".join([value] * bool(equals) + group[1:])
            if name in kinds:
                fail(f"{flag} {f'is {values!r}' if values else 'has no value'}, expected {in_words(kinds[name])}")
            same = sorted(kinds.keys() & elsewhere.get(name.removeprefix("no-"), []))
            near = " or ".join(f"--{each}" for each in same or difflib.get_close_matches(name, kinds, 1))
            fail(f"{flag} is no flag of this script, expected {near or 'another one'} (see --help)")
    return argv


def check_help(argv, args_class):
    """Return argv (None: the command line's). If it asks for --help, print all flags under their headings and exit.

    Headings, explanations and their order come from the source of args_class; tuned values from its module.
    """
    if not {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        return argv
    if hasattr(signal, "SIGPIPE"):  # `--help | head` closes the pipe early: end there, without a traceback
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    module, hints = sys.modules[args_class.__module__], typing.get_type_hints(args_class)
    defaults = {field.name: field.default for field in dataclasses.fields(args_class)}
    print(f"{args_class.__doc__}\n\nusage: python {os.path.basename(module.__file__)} [--flag VALUE ...]")
    for line in inspect.getsource(args_class).splitlines():
        declaration, _, text = line.strip().partition("# ")
        name = declaration.partition(":")[0]
        if text and not declaration:
            print(f"\n{text}:")
        elif name in defaults:
            default, flag = defaults[name], name.replace("_", "-")
            kinds = [kind for kind in typing.get_args(hints[name]) or [hints[name]] if kind is not type(None)]
            value = " ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            if any(map(typing.get_args, kinds)) or typing.get_origin(hints[name]) is typing.Literal:
                value = "|".join(choice for kind in kinds for choice in typing.get_args(kind) or [kind])
            start = f"--{flag} {value}"
            if isinstance(default, bool):
                start, default = f"--{flag}", f"on; --no-{flag} turns it off" if default else "off"
            elif isinstance(default, tuple):
                default = " ".join(map(str, default))
            for other in set(re.findall(r"\w+_\w+", text)) & defaults.keys():
                text = text.replace(other, f"--{other.replace('_', '-')}")
            end = "" if default is None else f" [{default}]"
            indents = dict(initial_indent=f"  {start:<38} ", subsequent_indent=" " * 41)
            print(textwrap.fill(f"{text}{end}", 116, break_on_hyphens=False, **indents))
    names = [name.replace("_", "-") for name in module.TUNED_FLAGS]
    print(f"\ntuned values of --{', --'.join(names)}, by task:")
    for task, values in {**module.TUNED, "other tasks": module.UNTUNED}.items():
        print(f"  {task:<22} {', '.join(map(str, values))}")
    sys.exit(0)
