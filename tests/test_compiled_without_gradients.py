"""Every op inside torch.compile where nothing needs a gradient, as in a teacher."""

import os
import subprocess
import sys

PROGRAM = """
import torch
import capi_kernels as ck

def cumulative(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

torch.manual_seed(0)
qkv, kv, q = torch.randn(8, 3, 2, 8), torch.randn(7, 2, 2, 8), torch.randn(4, 2, 8)
tables, k_tables, q_tables = torch.randn(2, 8, 8).unbind(), torch.randn(2, 7, 8).unbind(), torch.randn(2, 4, 8).unbind()
where = (*q_tables, *k_tables, cumulative(3, 1), cumulative(5, 2), 3, 5)
weight, bias = torch.randn(9, 5, requires_grad=True), torch.zeros(9)
CASES = {
    "visible": lambda: ck.visible_attention(*qkv.unbind(1), *tables, cumulative(3, 5), 5),
    "visible, packed": lambda: ck.visible_attention_qkvpacked(qkv, *tables, cumulative(3, 5), 5),
    "cross": lambda: ck.masked_cross_attention(q, *kv.unbind(1), *where),
    "cross, packed": lambda: ck.masked_cross_attention_kvpacked(q, kv, *where),
    "weights": lambda: ck.cross_attention_weights(q, kv[:, 0], *where),
    "sinkhorn": lambda: ck.sinkhorn_positionwise(torch.ones(3, 4, 9)),
    "head": lambda: ck.clustering_head(torch.ones(3, 4, 5), weight, bias).loss,
    "student": lambda: ck.student_loss(torch.ones(4, 9), torch.full((4, 9), 1 / 9)),
}
for name, run in CASES.items():
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(), run())
    if name != "head":  # whose weight is a leaf
        torch.testing.assert_close(compiled(), run())
"""


def test_every_op_compiles_whole() -> None:
    # In a process of its own: the type checks of these tests are not for the compiler.
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stderr
