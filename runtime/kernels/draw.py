"""Tokens drawn from rows of logits, in Triton."""

import triton
import triton.language as tl


@triton.jit
def _with_more(best, place, broken, logits, column, V, uniform):
    """Return the best scores of lanes, their columns, and whether one is no number, with more."""
    x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
    # Half a step is added, so that there is no 0. 1 - u would round away what is small.
    u = uniform + 2.0**-32
    exponential = tl.where(u < 1e-3, u * (1.0 + u * (0.5 + u / 3.0)), -tl.log(1.0 - u))
    score = x - tl.log(exponential)
    better = score > best
    best = tl.where(better, score, best)
    return best, tl.where(better, column, place), broken | (x != x)


@triton.jit(do_not_specialize=["seed"])
def draw_tokens(
    logits_ptr,  # [T, V]
    token_ptr,  # int64 [T]
    score_ptr,  # fp32 [T]
    stride, V, seed,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the column of a row whose logit and Gumbel noise are the largest sum, and that sum.

    The column is drawn from softmax(logits) so. The row is read once, and no noise is written.
    Numbers are those of Philox with 7 rounds, of which each call gives four. The sum of a row in
    which a logit is no number is none.
    """
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits = logits_ptr + row * stride
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    broken = lane < 0
    for start in range(0, V, 4 * BLOCK):
        column = start + lane
        u, v, w, x = tl.rand4x(seed + row, column, n_rounds=7)
        best, place, broken = _with_more(best, place, broken, logits, column, V, u)
        best, place, broken = _with_more(best, place, broken, logits, column + BLOCK, V, v)
        best, place, broken = _with_more(best, place, broken, logits, column + 2 * BLOCK, V, w)
        best, place, broken = _with_more(best, place, broken, logits, column + 3 * BLOCK, V, x)
    top = tl.max(best, 0)
    tl.store(token_ptr + row, tl.min(tl.where(best == top, place, V), 0).to(tl.int64))
    none = tl.max(broken.to(tl.int32), 0) > 0
    tl.store(score_ptr + row, tl.where(none, float("nan"), top))
