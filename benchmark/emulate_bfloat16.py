"""Run a script with `--precision bfloat16` on a CPU without bfloat16, ten times as fast as PyTorch does it there.

    OMP_NUM_THREADS=1 python benchmark/emulate_bfloat16.py kalei_matd3_mamujoco.py --env-id HalfCheetah-v2-2x3 \
        --seed 1 --total-timesteps 100000

Use this to see what a run in bfloat16 learns, not how fast it is. The script rounds the operands to bfloat16. We then
multiply and sum in float32 and round the product to bfloat16, as CPUs with AVX512-BF16 or AMX do. They sum in another
order, so now and then a product is rounded the other way. We replace PyTorch's batched matrix product (aten::bmm on a
CPU), forward and backward: the networks have no other product in bfloat16. The script still warns that bfloat16 is
slow here.
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
    """(M, B, in) @ (M, in, out) -> (M, B, out), in the operands' dtype. Sums bfloat16 in float32."""
    dtype = torch.float32 if left.dtype == torch.bfloat16 else left.dtype
    out = torch.empty(*left.shape[:2], right.shape[2], dtype=dtype)
    # bmm with `out` is another operation, so this function does not call itself
    return torch.bmm(left.to(dtype), right.to(dtype), out=out).to(left.dtype)


def emulate():
    """Replace PyTorch's product by this module's, for as long as the caller keeps the returned object."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch warns that we override it
        library.impl("bmm", bmm, "CPU")
    return library


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        fail(f"the first argument is {' '.join(sys.argv[1:2]) or 'missing'}; it must be the script to run")
    kept = emulate()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
