"""How large are bfloat16's errors in gradients, compared with the noise of the batches?

    python benchmark/gradient_precision.py
    python benchmark/gradient_precision.py --parameters --sharing none  # the scripts get the flags it does not know

Each script trains in float32. At some points of the run, we compute the gradients of one batch again, with products in
float64, float32 and bfloat16 and the same random numbers. The error of a parameter's gradient is the norm of its
difference to float64. The noise is the gradient's standard deviation over four batches, in float64. The table has error
over noise, worst and median over a network's parameters, and the lowest cosine with float64. --parameters prints a row
for each parameter; its last two columns use bfloat16 in one network only, and so show which network makes the error.

MATD3: all agents' gradients are computed before any agent's step. MAPPO: "first update" is the first on a rollout,
"after its updates" would be one more update on the same rollout; the other batches are up to three earlier rollouts.
Parameters without gradient or without noise are left out.
"""

import contextlib
import copy
import dataclasses
import functools
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kalei_mappo_mamujoco as mappo  # noqa: E402
import kalei_matd3_mamujoco as matd3  # noqa: E402

NETWORKS = ("actor", "critic")
# {kind: networks whose hidden layers, and those of their targets, multiply in bfloat16}
KINDS = {"float64": (), "float32": (), "bfloat16": NETWORKS, "actor's": ("actor",), "critic's": ("critic",)}


@dataclasses.dataclass
class Options:
    env_id: str = "HalfCheetah-v2-2x3"
    """task to train on, with its tuned values"""
    updates: tuple[int, ...] = (100, 300, 600)
    """MATD3: measure after these numbers of updates; empty: not at all"""
    rollouts: tuple[int, ...] = (2, 5, 20)
    """MAPPO: measure at these rollouts, 2 or later; empty: not at all"""
    parameters: bool = False
    """also print a row for each parameter"""
    threads: int = 2
    """threads for the matrix products, and for the physics"""


def gradients(learner, kind, update, batch):
    """{(network, parameter): (steps, ...) float64}: the gradients that an update gives to the optimisers.

    update(learner, batch) runs on a copy of the learner, in one of the KINDS, and changes no parameter. `batch` is a
    dict of tensors.
    """
    learner, dtype, found = copy.deepcopy(learner), torch.float64 if kind == "float64" else torch.float32, {}
    learner.to(dtype)
    for name, network in learner.named_children():
        if name.endswith(NETWORKS):
            assert not network.bfloat16, "trained in bfloat16, expected --precision float32"
            network.bfloat16 = name.endswith(KINDS[kind])
    for network, optimizer in zip(NETWORKS, learner.optimizers, strict=True):

        def keep(network=network):
            for name, parameter in getattr(learner, network).named_parameters():
                found.setdefault((network, name), []).append(parameter.grad.to(torch.float64, copy=True))

        optimizer.step = keep
    batch = SimpleNamespace(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()})
    draws = mock.patch.object(torch, "randn_like", lambda x: torch.randn(x.shape).to(x.dtype))  # float64 draws others
    with torch.random.fork_rng(devices=[]), draws:
        torch.manual_seed(0)
        update(learner, batch)
    return {name: torch.stack(steps) for name, steps in found.items()}


def compare(learner, update, batches):
    """{(network, parameter): {kind: (error over noise, cosine with float64)}} on the first of two or more batches."""
    exact, *others = [gradients(learner, "float64", update, batch) for batch in batches]
    rounded = {kind: gradients(learner, kind, update, batches[0]) for kind in KINDS if kind != "float64"}
    rows = {}
    for name, right in exact.items():
        noise = torch.stack([right, *(other[name] for other in others)]).var(0).sum().sqrt()
        if right.any() and noise > 0:
            pairs = {kind: (values[name].flatten(), right.flatten()) for kind, values in rounded.items()}
            errors = {kind: ((a - b).norm() / noise).item() for kind, (a, b) in pairs.items()}
            rows[name] = {kind: (errors[kind], torch.cosine_similarity(*pairs[kind], 0).item()) for kind in pairs}
    return rows


def matd3_update(learner, batch):
    learner.update_critic(batch)
    learner.update_actor(batch)


def mappo_update(learner, rollout, later=None):
    """The learner prepares the batch and makes its first update, or an update with the weights of `later`."""
    batch, _ = learner.prepare(rollout)
    if later is not None:
        learner.load_state_dict(later.state_dict())
    learner.update_actor(batch, slice(None))
    learner.update_critic(batch, slice(None))


class Enough(Exception):
    """Ends a run after the last measurement."""


def looks(script, points, options, flags):
    """Run the script in a temporary folder, and compare at updates (MATD3) or rollouts (MAPPO): {name: rows}."""
    own, count, latest, found = script.Learner.update, 0, [], {}

    def update(learner, batch, *arguments):
        nonlocal count
        count, looking = count + 1, count + 1 in points
        before = copy.deepcopy(learner) if looking else None
        fields = vars(batch)
        latest[:] = [{name: x.clone() for name, x in fields.items()}, *latest[:3]]
        logs = own(learner, batch, *arguments)
        if looking and script is matd3:
            found[f"MATD3, {count} updates"] = compare(learner, matd3_update, latest)
        elif looking:
            last = functools.partial(mappo_update, later=learner)
            found[f"MAPPO, rollout {count}, first update"] = compare(before, mappo_update, latest)
            found[f"MAPPO, rollout {count}, after its updates"] = compare(before, last, latest)
        if count == max(points):
            raise Enough
        return logs

    flags = [*f"--env-id {options.env_id} --device cpu --precision float32 --eval-episodes 0".split(), *flags]
    flags += ["--total-timesteps", "10000000", "--num-threads", str(options.threads)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.suppress(Enough):
        patches = mock.patch.object(script.Learner, "update", update), mock.patch.object(sys, "argv", ["", *flags])
        with patches[0], patches[1], contextlib.redirect_stdout(sys.stderr):
            script.main()
    return found


def parameter_rows(rows):
    for name, row in rows.items():
        (exact, _), (error, cosine) = row["float32"], row["bfloat16"]
        parts = [f"{row[kind][0]:.4f}" for kind in ("actor's", "critic's")]
        yield [*name, f"{exact:.1e}", f"{error:.4f}", f"{cosine:.5f}", *parts]


def network_rows(rows):
    for network in NETWORKS:
        own = [row for (where, _), row in rows.items() if where == network]
        exact, errors = ([row[kind][0] for row in own] for kind in ("float32", "bfloat16"))
        cells = [f"{max(exact):.1e}", f"{statistics.median(exact):.1e}"]
        cells += [f"{max(errors):.3f}", f"{statistics.median(errors):.3f}"]
        yield [network, str(len(own)), *cells, f"{min(row['bfloat16'][1] for row in own):.5f}"]


def print_table(head, rows):
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(row), "|")
    print(flush=True)


def main():
    options, flags = tyro.cli(Options, return_unknown_args=True)
    torch.set_num_threads(options.threads)
    print(f"{options.env_id}, flags {' '.join(flags) or 'as they are'}")
    cpu = platform.processor() or platform.machine()
    print(f"{cpu}, {options.threads} threads, torch {torch.__version__}\n")
    row_head = ["network", "parameter", "float32", "bfloat16", "cosine", "in the actor's products", "in the critic's"]
    head = ["network", "parameters", "float32, worst", "median", "bfloat16, worst", "median", "cosine, lowest"]
    for script, points in ((matd3, options.updates), (mappo, options.rollouts)):
        for look, rows in looks(script, points, options, flags).items() if points else ():
            print(look)
            if options.parameters:
                print_table(row_head, parameter_rows(rows))
            print_table(head, network_rows(rows))


if __name__ == "__main__":
    main()
