"""Saved models: actor, critic and arguments in one file, and what --evaluate does with it."""

import dataclasses
import os

from experiment.checkpoints import read, refuse_damage, write
from experiment.command_line import fail
from experiment.films import open_viewer, write_gif


def save_model(run_folder, learner, global_step):
    """Write actor, critic and arguments to model.pt in the folder, for --evaluate."""
    model = {"actor": learner.actor.state_dict(), "critic": learner.critic.state_dict()}
    model |= {"args": dataclasses.asdict(learner.args), "global_step": global_step}
    write(os.path.join(run_folder, "model.pt"), model)


def load_actor(path, env_id, device, actor_class, args_class):
    """(actor, args) of a file that save_model wrote, maybe with other flags; refuses another env id than None."""
    expected = "a model that --save-model wrote"
    with refuse_damage(path, expected):
        model, known = read(path, device), {field.name for field in dataclasses.fields(args_class)}
        args = args_class(**{name: value for name, value in model["args"].items() if name in known})
        state = model["actor"]
        bounds = (state["low"].cpu().numpy(), state["high"].cpu().numpy())
        observation_size = state["layers.0.thresholds"].shape[-1]
    actor = actor_class(observation_size, *bounds, args)
    with refuse_damage(path, expected):
        actor.load_state_dict(state)
    if env_id not in (None, args.env_id):
        fail(f"--env-id {env_id}: the model in {path} was trained on {args.env_id}")
    return actor.to(device), args


def evaluate_model(args, device, actor_class, make_env, evaluate):
    """Print mean and standard deviation of the returns of the model in args.evaluate; film or show an episode."""
    actor, trained = load_actor(args.evaluate, args.env_id, device, actor_class, type(args))
    trained.num_threads = args.num_threads
    envs = make_env(trained, args.seed, args.eval_episodes)
    if trained.episode_limit is None:
        trained.episode_limit = envs.episode_limit  # the task's
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in ("sharing", "episode_limit", "agent_obsk", "hidden_size"):
        asked, known = getattr(args, name), getattr(trained, name)
        if asked not in (defaults[name], known):
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} is {asked}, expected {known} beside --evaluate {args.evaluate}: so the model was trained")
    viewer = open_viewer(args, envs)
    returns, lengths = evaluate(actor, envs, args.seed, viewer)
    result = f"return {returns.mean():.1f} +- {returns.std():.1f} (std), length {lengths.mean():.0f}"
    print(f"{trained.env_id}: {result}, {len(returns)} episodes")
    film = os.path.splitext(args.evaluate)[0] + ".gif"
    if args.capture_video:
        if write_gif(viewer.take(), film):
            print(film)
    elif args.render:
        viewer.close()
