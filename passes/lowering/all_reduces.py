"""all_reduces: sums over the processes that hold a model together, as one operator. Reads only the graph; on GPUs.

    %all_reduce = _c10d_functional.all_reduce(%int8_gemm, "sum", "0")
    %wait_tensor = _c10d_functional.wait_tensor(%all_reduce)
->
    %all_reduce = sqcompile.all_reduce(%int8_gemm, "0")                 # NVLink, or NCCL: known when it runs

Nothing is done between the two, so that nothing is lost by waiting at once.
"""

from __future__ import annotations

from torch import fx

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.ir.graph import add_op
from sqcompile.passes.ir.operators import COLLECTIVES
from sqcompile.passes.ir.origin import replace


def lower_all_reduces(gm: fx.GraphModule) -> None:
    """Replaces every sum over processes that is waited for, and looked at in no other way."""
    if not COLLECTIVES:  # of a PyTorch without torch.distributed
        return
    all_reduce, waiting = COLLECTIVES[:2]
    for wait in gm.graph.find_nodes(op="call_function", target=waiting):
        summed = wait.args[0]
        if summed.target != all_reduce or summed.args[1] != "sum" or len(summed.users) != 1:
            continue
        with gm.graph.inserting_before(wait):
            new = add_op(gm, sqcompile_ops.all_reduce.default, summed.args[0], summed.args[2])
        replace(gm, wait, new)
        gm.graph.erase_node(wait)
        gm.graph.erase_node(summed)
