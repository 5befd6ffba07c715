"""The method's pieces stand in both scripts on purpose, so that each reads whole. This holds the copies equal."""

import inspect

import pytest

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3

SHARED = [
    "MaskedLinear",
    "PairwiseMaskDifference",
    "diversity_loss",
    "AdaptiveCoefficient",
    "reached",
    "reset_due",
    "reset_actor",
    "member_to_reset",
    "reset_critic",
]
SHARED_FLAGS = (
    "seed device log_interval eval_interval eval_episodes save_model evaluate env_id num_threads episode_limit"
)
SHARED_FLAGS += " gamma actor_threshold_scale actor_diversity_coef actor_reset_interval actor_reset_ratio"
SHARED_FLAGS += " critic_threshold_scale critic_threshold_bias critic_diversity_coef critic_reset_interval"
SHARED_FLAGS += " weighted_diversity sharing"


@pytest.mark.parametrize("name", SHARED)
def test_both_scripts_hold_the_same_source(name):
    assert inspect.getsource(getattr(mappo, name)) == inspect.getsource(getattr(matd3, name))


def test_masks_are_measured_in_the_same_way():
    name = "mask_difference"
    ours, theirs = getattr(mappo.MaskedMLP, name), getattr(matd3.MaskedMLP, name)
    assert inspect.getsource(ours) == inspect.getsource(theirs)


def test_flags_of_both_scripts_have_the_same_defaults():
    for name in SHARED_FLAGS.split():
        assert getattr(mappo.Args, name) == getattr(matd3.Args, name), name
