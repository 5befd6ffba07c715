"""Runs side by side: PyTorch's idle threads must not spin on cores that another run could use."""

import os
import subprocess
import sys

import pytest
from run_scripts import environment

from benchmark import side_by_side

# prints OMP_WAIT_POLICY in the moment when PyTorch, whose libgomp reads it, is imported
IMPORT = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
import {script}
"""


@pytest.mark.parametrize("script", ["kalei_matd3_mamujoco", "kalei_mappo_mamujoco"])
@pytest.mark.parametrize("users, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_idle_threads_sleep_unless_the_user_says_otherwise(script, users, expected):
    variables = environment()
    variables.pop("OMP_WAIT_POLICY", None)  # which importing a script has set in this process
    if users is not None:
        variables["OMP_WAIT_POLICY"] = users
    command = [sys.executable, "-c", IMPORT.format(script=script)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a run has a single thread here")
def test_two_runs_side_by_side_get_their_share(monkeypatch):
    """With spinning threads, each of two runs was 4 to 20 times as slow as one alone."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = []
    for _ in range(3):  # other tests run at the same time
        alone, together = side_by_side.shares(side_by_side.Options(rounds=1))
        found.append(alone / together)
        if found[-1] >= 0.35:
            break
    assert found[-1] >= 0.35, found
