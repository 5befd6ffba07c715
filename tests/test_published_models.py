"""The models in published/runs are those whose curves lie beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiment.saved_models import load_actor
from tools.models import script_of

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(ROOT.glob("published/runs/*/model.pt"))


def test_there_are_models_to_try():
    assert MODELS


@pytest.mark.parametrize("path", MODELS, ids=[path.parent.name for path in MODELS])
def test_a_published_model_returns_what_its_curve_ends_at(path):
    curves = EventAccumulator(str(path.parent)).Reload()
    end, std = (curves.Scalars(f"charts/{name}")[-1].value for name in ("eval_return", "eval_return_std"))
    script = script_of(path)
    actor, args = load_actor(str(path), None, torch.device("cpu"), script.Actor, script.Args)
    args.num_threads = 1
    envs = script.make_env(args, 1, 6)
    returns, _ = script.evaluate(actor, envs, seed=1)
    envs.close()
    spread = 4 * std / np.sqrt(len(returns))
    # the median, since in a few episodes an ant trips, and which ones those are depends on the processor's last bits
    assert abs(np.median(returns) - end) < spread, (returns, end, std)
    assert end - curves.Scalars("charts/eval_return")[0].value > spread, "the first evaluation's model would do as well"
