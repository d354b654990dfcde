"""What the GPU shapes cost at least, and what an H200 should take for it: `python -m bench.limits`.

Nothing here is measured. Bytes and flops are counted, and the times are predictions for robustloss from the data
sheet's 4.8 TB/s and 989 TFLOP/s (dense bfloat16), of which 90% and 80% are taken to be reachable.

    sequence_logps: bytes / bandwidth.
    linear_sequence_logps: flops / matrix rate + bytes of the row kernels / bandwidth; as if the two never overlapped
        and every tile of logits went through memory, so that an L2 cache that holds tiles makes it faster.
"""

from __future__ import annotations

from . import linear_sequence_logps, sequence_logps
from .cases import BACKWARD, FORWARD, TRAINING, Case, Shape
from .linear_sequence_logps import FROZEN, KNOWN
from .results import PRODUCTS
from .sequence_logps import TRAFFIC

BANDWIDTH = 0.9 * 4.8e12  # bytes a second
MATRIX_RATE = 0.8 * 989e12  # flops a second
DTYPE = "bfloat16"


def rows() -> list[list[str]]:
    """The table's lines: op, pass, [N, V], GB, TFLOP, predicted ms, and of these what the products take."""
    found = []
    suite = sequence_logps.SUITE
    for shape in suite.gpu_shapes:
        for pass_name in (FORWARD, BACKWARD, TRAINING):
            moved, _ = suite.work(Case(suite, shape, DTYPE, pass_name, ""))
            found.append(_row(suite.op, pass_name, shape, moved, 0.0))
    suite = linear_sequence_logps.SUITE
    for shape in suite.gpu_shapes:
        for pass_name in (FORWARD, FROZEN, KNOWN, TRAINING):
            # The row kernels read each logit for the statistics and, where there is a gradient, once more to write it.
            passes = TRAFFIC[FORWARD if pass_name == FORWARD else TRAINING]
            moved = passes * shape["B"] * shape["T"] * shape["V"] * 2
            flops, _ = suite.work(Case(suite, shape, DTYPE, pass_name, PRODUCTS))
            found.append(_row(suite.op, pass_name, shape, moved, flops))
    return found


def _row(op: str, pass_name: str, shape: Shape, moved: float, flops: float) -> list[str]:
    products = flops / MATRIX_RATE
    total = products + moved / BANDWIDTH
    size = f"{shape['B'] * shape['T']} x {shape['V']}"
    ratio = f"{total / products:.2f}x" if flops else ""
    return [op, pass_name, size, f"{moved / 1e9:.2f}", f"{flops / 1e12:.1f}", f"{1e3 * total:.2f}", ratio]


def main() -> None:
    header = ["op", "pass", "N x V", "GB, row kernels", "TFLOP", "predicted ms", "of its matmuls"]
    print(f"PREDICTED, not measured: H200, {DTYPE}, H = {linear_sequence_logps.SUITE.gpu_shapes[0]['H']};")
    print("90% of 4.8 TB/s, 80% of 989 TFLOP/s, products and row kernels one after the other.\n")
    for row in [header, ["---"] * len(header), *rows()]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
