"""The method's pieces stand in both scripts on purpose, so that each reads whole. This holds the copies equal."""

import dataclasses
import inspect

import pytest

import kalei_mappo_mamujoco as mappo
import kalei_matd3_mamujoco as matd3

SHARED = [
    "MaskedLinear",
    "masked_linear",
    "PairwiseMaskDifference",
    "diversity_loss",
    "AdaptiveCoefficient",
    "reset_due",
    "reset_actor",
    "GraphedUpdate",
    "make_env",
]
OWN_DEFAULTS = {"num_envs", "hidden_size", "actor_threshold_bias", "layer_weights"}


@pytest.mark.parametrize("name", SHARED)
def test_both_scripts_hold_the_same_source(name):
    assert inspect.getsource(getattr(mappo, name)) == inspect.getsource(getattr(matd3, name))


def flags(script):
    """{name: the line of Args with its type, default and explanation}; fails if it has none of its own."""
    lines = [line.strip() for line in inspect.getsource(script.Args).splitlines()]
    found = {line.partition(":")[0]: line for line in lines if ": " in line.partition("#")[0]}
    assert list(found) == [field.name for field in dataclasses.fields(script.Args)]
    return found


def test_flags_that_both_scripts_have_are_the_same():
    ours, theirs = flags(mappo), flags(matd3)
    for name in (ours.keys() & theirs.keys()) - OWN_DEFAULTS:
        assert ours[name].partition("#")[0] == theirs[name].partition("#")[0], name


@pytest.mark.parametrize("script", [mappo, matd3])
def test_every_flag_is_explained_in_its_line(script):
    assert all(" # " in line for line in flags(script).values())
