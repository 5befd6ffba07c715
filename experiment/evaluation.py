"""Evaluation: one episode in each environment, without exploration."""

import numpy as np
import torch

from experiment.films import save_film
from experiment.mask_pictures import log_masks
from experiment.processes import rank_and_size
from experiment.saved_models import save_model


@torch.no_grad()
def evaluate(actor, envs, seed, watch=None, stop=None):
    """Each environment's first episode: returns (E,) and lengths (E,). None if `stop`, a StopSignals, gets a signal.

    `actor` has act(obs, effective_layers()) and a buffer `low`; `watch` is called before each step of the first
    environment's episode.
    """
    effective, device = actor.effective_layers(), actor.low.device
    returns, lengths, finished = np.zeros(envs.num_envs), np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    obs, _ = envs.reset(seed=seed + 1_000_000)  # other starts than in training, the same in every evaluation
    while not finished.all():  # count first episodes only: later ones would favour environments with short episodes
        if stop is not None and stop.received is not None:
            return None
        if watch is not None and not finished[0]:
            watch()
        obs, _, _, _, infos = envs.step(actor.act(torch.as_tensor(obs, device=device), effective).cpu().numpy())
        if "episode" in infos:
            ended = infos["_episode"] & ~finished
            returns[ended], lengths[ended] = infos["episode"]["r"][ended], infos["episode"]["l"][ended]
            finished |= ended
    return returns, lengths


def evaluate_and_save(learner, global_step, status, envs, viewer, stop, run_folder, writer, progress):
    """Save the model if asked for; evaluate, log and film. Returns False if a signal ended that early, without logging.

    learner: a module with `args`, `actor` and `critic`; status: receives the result as text for the progress bar;
    envs: one for each episode, or None for no evaluation.
    """
    if learner.args.save_model and rank_and_size()[0] == 0:
        save_model(run_folder, learner, global_step)
    if envs is not None:
        progress.set_postfix_str("evaluating")
        result = evaluate(learner.actor, envs, learner.args.seed, viewer, stop)
        if result is None:
            return False
        returns, lengths = result
        for name, value in (("return", returns.mean()), ("return_std", returns.std()), ("length", lengths.mean())):
            writer.add_scalar(f"charts/eval_{name}", value, global_step)
        status["eval"] = f"{returns.mean():.1f} +- {returns.std():.1f}"
        log_masks(writer, learner, global_step)
        save_film(viewer, run_folder, writer, global_step)
    return True
