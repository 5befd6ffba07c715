"""Run a script with `--precision bfloat16` where the processor does not multiply bfloat16, ten times as fast.

    OMP_NUM_THREADS=1 python benchmark/emulate_bfloat16.py kalei_matd3_mamujoco.py --env-id HalfCheetah-v2-2x3 \
        --seed 1 --total-timesteps 100000

For what a run in bfloat16 learns, not for how fast. The operands, which the script has rounded to bfloat16, are
multiplied and summed in float32 and the product is rounded to bfloat16, as processors with AVX512-BF16 or AMX do. Their
sums have another order, so that now and then a product is rounded the other way. PyTorch's own product of batches of
matrices (aten::bmm on a CPU) is replaced, forward and backward: the networks have no other product in bfloat16. The
script still warns that bfloat16 is slow here.
"""

import runpy
import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiment.command_line import fail  # noqa: E402


def bmm(left, right):
    """(M, B, in) by (M, in, out) -> (M, B, out), in the dtype of the operands; bfloat16 is summed in float32."""
    dtype = torch.float32 if left.dtype == torch.bfloat16 else left.dtype
    out = torch.empty(*left.shape[:2], right.shape[2], dtype=dtype)
    # the variant with `out` is an operation of its own, so that this does not call itself
    return torch.bmm(left.to(dtype), right.to(dtype), out=out).to(left.dtype)


def emulate():
    """Take this module's product in the place of PyTorch's, for as long as what is returned is kept."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is overridden
        library.impl("bmm", bmm, "CPU")
    return library


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        fail(f"the first argument is {' '.join(sys.argv[1:2]) or 'missing'}; it must be the script to run")
    kept = emulate()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
