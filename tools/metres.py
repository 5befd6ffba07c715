"""How far a saved model's robot gets in an episode: metres, speed and return.

    python tools/metres.py runs/RUN

A return can hide whether a robot walks: on Humanoid, an agent that stands still for 1000 steps earns 5000. Prints the
return, the metres from an episode's start to its last step, and the metres a second: mean and standard deviation over
deterministic episodes. For models of both scripts and of their copies, on tasks that reward moving forward.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiment.command_line import check_flag_names  # noqa: E402
from tools.models import EvaluationOptions, open_model  # noqa: E402


@dataclasses.dataclass
class Options(EvaluationOptions):
    """Measure how far a saved model's robot gets."""


class Measured:
    """A MaMuJoCoVecEnv that notes in `metres` (E,) how far each environment's first episode has got forward."""

    def __init__(self, envs):
        self.envs, self.num_envs = envs, envs.num_envs

    def reset(self, seed):
        result = self.envs.reset(seed=seed)
        self.start, self.metres = self.envs.task.position(), np.zeros(self.num_envs)
        self.ended = np.zeros(self.num_envs, bool)
        return result

    def step(self, actions):
        forward = self.envs.task.position() - self.start  # before the step, since an episode that ends starts again
        self.metres = np.where(self.ended, self.metres, forward)
        result = self.envs.step(actions)
        self.ended |= result[2] | result[3]
        return result


def main():
    options = tyro.cli(Options, args=check_flag_names(None, Options))
    script, actor, args = open_model(options)
    envs = script.make_env(args, args.seed, options.eval_episodes)
    measured = Measured(envs)
    returns, lengths = script.evaluate(actor, measured, args.seed)
    speed = measured.metres / (np.maximum(lengths - 1, 1) * envs.task.dt)
    for name, values in (("return", returns), ("metres", measured.metres), ("metres a second", speed)):
        print(f"{name:>16}  {values.mean():8.2f} +- {values.std():.2f}")
    envs.close()


if __name__ == "__main__":
    main()
