"""Saved models: actor, critic and arguments in one file, and what --evaluate does with it."""

import dataclasses
import os

import torch

from experiment.checkpoints import check_args, read, refuse_damage, write
from experiment.code_identity import check_identity, identity
from experiment.command_line import fail, require
from experiment.films import open_viewer, write_gif
from experiment.hardware import resolve_precision

EXPECTED = "a model that --save-model of this script wrote"


def save_model(run_folder, learner, global_step):
    """Write actor, critic, arguments and the code's identity to model.pt in the folder, for --evaluate."""
    model = {"actor": learner.actor.state_dict(), "critic": learner.critic.state_dict()}
    model |= {"args": dataclasses.asdict(learner.args), "global_step": global_step, **identity(type(learner.args))}
    write(os.path.join(run_folder, "model.pt"), model)


def read_model(path, device="cpu"):
    """(file, content) of what save_model wrote to a file, or to model.pt in a folder. Fails at any other content."""
    path = os.path.join(path, "model.pt") if os.path.isdir(path) else str(path)
    with refuse_damage(path, EXPECTED):
        model = read(path, device)
    expected = f"a model: --resume {os.path.dirname(path) or '.'} continues its run, --save-model writes models"
    require("envs" not in model, f"{path} is a checkpoint, expected {expected}")
    return path, model


def load_actor(path, env_id, device, actor_class, args_class, precision="auto"):
    """(actor, args) of a saved model. Ignores flags that args_class lacks; auto keeps the model's precision if it can.

    Fails if another script made the model, or if env_id is not None or the model's.
    """
    path, model = read_model(path, device)
    with refuse_damage(path, EXPECTED):
        state, critic, flags = (dict(model[name]) for name in ("actor", "critic", "args"))
        check_identity(model, args_class, path)
        flags = {field.name: flags[field.name] for field in dataclasses.fields(args_class) if field.name in flags}
        args = check_args(flags, args_class, [*state.values(), *critic.values()], "hidden_size num_critics", path)
        bounds = (state["low"].cpu().numpy(), state["high"].cpu().numpy())
        observation_size = state["layers.0.weight"].shape[-1]
    args.precision = resolve_precision(precision, torch.device(device).type, saved=args.precision)
    actor = actor_class(observation_size, *bounds, args)
    with refuse_damage(path, EXPECTED):
        actor.load_state_dict(state)
    if env_id not in (None, args.env_id):
        fail(f"--env-id {env_id}: the model in {path} was trained on {args.env_id}")
    return actor.to(device), args


def evaluate_model(args, device, actor_class, make_env, evaluate):
    """Print mean and standard deviation of the returns of the model in args.evaluate; film or show an episode."""
    path, _ = read_model(args.evaluate)
    actor, trained = load_actor(path, args.env_id, device, actor_class, type(args), args.precision)
    trained.num_threads = args.num_threads
    envs = make_env(trained, args.seed, args.eval_episodes)
    if trained.episode_limit is None:
        trained.episode_limit = envs.episode_limit  # the task's
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in ("sharing", "episode_limit", "agent_obsk", "hidden_size"):
        asked, known = getattr(args, name), getattr(trained, name)
        if asked not in (defaults[name], known):
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} is {asked}, expected {known} beside --evaluate {path}: the model was trained with it")
    viewer = open_viewer(args, envs)
    returns, lengths = evaluate(actor, envs, args.seed, viewer)
    envs.close()
    result = f"return {returns.mean():.1f} +- {returns.std():.1f} (std), length {lengths.mean():.0f}"
    print(f"{trained.env_id}: {result}, {len(returns)} episodes")
    film = os.path.splitext(path)[0] + ".gif"
    if args.capture_video:
        if write_gif(viewer.take(), film):
            print(film)
    elif args.render:
        viewer.close()
