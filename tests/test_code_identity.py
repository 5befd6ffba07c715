"""experiment/code_identity.py, and what tools do with files of a changed copy."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch
from run_scripts import ROOT, run_process

import kalei_matd3_mamujoco as matd3
from experiment import code_identity
from experiment.code_identity import compare, identity
from experiment.saved_models import save_model

SCRIPT = '''"""A script."""
import dataclasses
import toy_environment
from experiment import checkpoints

@dataclasses.dataclass
class Args:
    """Flags."""
    lr: float = 0.5  # learning rate

def loss(x):
    """The loss."""
    return 2 * x
'''
ENVIRONMENT = "import toy_physics\n\ndef reward():\n    return 1\n"


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """A function that writes a script, its environment and the environment's module, and returns its identity."""

    def write(script=SCRIPT, environment=ENVIRONMENT, physics="G = 9.81\n", name="toy_script"):
        monkeypatch.syspath_prepend(tmp_path)
        files = {name: script, "toy_environment": environment, "toy_physics": physics}
        for stem, text in files.items():
            (tmp_path / f"{stem}.py").write_text(text)
            monkeypatch.delitem(sys.modules, stem, raising=False)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        return identity(importlib.import_module(name).Args)

    yield write
    for stem in ("toy_script", "toy_copy", "toy_environment", "toy_physics"):
        sys.modules.pop(stem, None)


def test_only_what_decides_results_counts(digest):
    own = digest()
    assert own["script"] == "toy_script.py" and re.fullmatch("[0-9a-f]{16}", own["code"])
    same = SCRIPT.replace("# learning rate", "# how fast").replace("The loss.", "Twice x.").replace("2 * x", "(2*x)")
    assert same != SCRIPT and digest(same) == own
    assert digest(name="toy_copy") == own | {"script": "toy_copy.py"}
    others = [
        digest(SCRIPT.replace("2 * x", "3 * x")),
        digest(SCRIPT.replace("0.5", "0.25")),
        digest(SCRIPT.replace("return 2 * x", "return None")),
        digest(environment=ENVIRONMENT.replace("1", "2")),
        digest(physics="G = 3.7\n"),
    ]
    assert len({other["code"] for other in [own, *others]}) == 6


def test_what_surrounds_a_run_does_not_count(digest, tmp_path):
    own = digest()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "checkpoints.py").write_text("FORMAT = 0")
    assert digest() == own


@pytest.mark.parametrize("statement", ["from toy_nets import layers", "from toy_nets.layers import Net"])
def test_the_modules_of_a_package_count(statement, digest, tmp_path):
    package = tmp_path / "toy_nets"
    package.mkdir()
    codes = set()
    for init, layers in (("", "class Net: a = 1"), ("A = 1", "class Net: a = 1"), ("", "class Net: a = 2")):
        (package / "__init__.py").write_text(init)
        (package / "layers.py").write_text(layers)
        codes.add(digest(SCRIPT.replace("import toy_environment", statement))["code"])
        for name in ("toy_nets", "toy_nets.layers"):
            sys.modules.pop(name, None)
    assert len(codes) == 3


def test_a_module_that_the_script_does_not_use_does_not_count(digest, tmp_path, monkeypatch):
    """The repository's environment, where a script imports the one in its own folder, twice."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "toy_environment.py").write_text("A = 1")
    monkeypatch.setattr(code_identity, "ROOT", repository)
    script = SCRIPT.replace("import dataclasses", "import dataclasses\nfrom toy_environment import reward")
    own = digest(script)
    (repository / "toy_environment.py").write_text("A = 2")
    assert digest(script) == own


def test_a_run_keeps_the_identity_of_its_start(digest, tmp_path):
    own = digest()
    args_class = sys.modules["toy_script"].Args
    (tmp_path / "toy_script.py").write_text(SCRIPT.replace("2 * x", "3 * x"))
    assert identity(args_class) == own


def test_the_scripts_environment_counts_and_experiment_does_not(tmp_path, monkeypatch):
    own = identity(matd3.Args)
    for name in ("kalei_matd3_mamujoco.py", "mamujoco_env.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(matd3, "__file__", str(tmp_path / "kalei_matd3_mamujoco.py"))
    assert identity.__wrapped__(matd3.Args) == own
    with open(tmp_path / "mamujoco_env.py", "a") as file:
        file.write("GRAVITY = 0\n")
    assert identity.__wrapped__(matd3.Args)["code"] != own["code"]


def test_compare_tells_another_script_from_an_edited_one():
    own = identity(matd3.Args)
    assert compare(own, matd3.Args) == compare(own | {"script": "copy.py"}, matd3.Args) == (False, "")
    for found, another in ((own | {"code": "0"}, False), ({}, False), ({"script": "copy.py", "code": "0"}, True)):
        got, difference = compare(found, matd3.Args)
        assert got is another and difference


# ---- Tools on a copy's model ----
@pytest.fixture
def copy(tmp_path, monkeypatch):
    """(path of a copy whose masks keep other weights, file of a model that it made)."""
    text, kept = (ROOT / "kalei_matd3_mamujoco.py").read_text(), "self.weight.abs() > torch.sigmoid(self.thresholds)"
    assert text.count(kept) == 1
    (tmp_path / "kalei_toy_copy.py").write_text(text.replace(kept, f"{kept} - 2"))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("kalei_toy_copy")
    args = module.Args(env_id="Hopper-v2-3x1", hidden_size=8, policy_freq=2, n_step=5, actor_threshold_bias=1.0)
    envs = module.make_env(args, 1, 1)
    space = envs.single_action_space
    torch.manual_seed(0)
    save_model(tmp_path, module.Learner(envs.state_size, space.low, space.high, args, torch.device("cpu")), 0)
    envs.close()
    yield tmp_path / "kalei_toy_copy.py", tmp_path / "model.pt"
    sys.modules.pop("kalei_toy_copy")


@pytest.mark.parametrize("tool", ["masks", "one_mask"])
def test_a_tool_reads_a_copys_model_with_the_copys_own_code(tool, copy, tmp_path):
    script, model = copy
    path = ROOT / "tools" / f"{tool}.py"
    more = ["--eval-episodes", 1] if tool == "one_mask" else []
    code, out, err = run_process(path, model, *more, cwd=tmp_path)
    assert code == 2 and len(err.splitlines()) == 1 and not out, err
    assert f"{model} was made by kalei_toy_copy.py" in err and "--script" in err
    code, out, err = run_process(path, model, *more, "--script", ROOT / "kalei_mappo_mamujoco.py", cwd=tmp_path)
    assert code == 2 and err.splitlines()[-1].startswith("error: "), err
    code, out, err = run_process(path, model, *more, "--script", script, cwd=tmp_path)
    assert code == 0 and not err, err
    if tool == "masks":
        shares = [line.split()[4:] for line in out.splitlines() if line.split()[0] in ("actor", "critic")]
        assert shares and np.array(shares, float).tolist() == [[0, 0, 0, 100]] * len(shares), "masks that keep all"
