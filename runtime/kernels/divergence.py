"""How far a row of logits is from another as distributions, in Triton."""

import triton
import triton.language as tl


@triton.jit
def _with_more(top, total, x):
    """Return the maxima of lanes, and their sums of exponentials less these, with more values."""
    more = tl.maximum(top, x)
    return more, total * tl.exp(top - more) + tl.exp(x - more)


@triton.jit
def _log_sum(top, total):
    """Return the log-sum-exp of all lanes."""
    most = tl.max(top, 0)
    return most + tl.log(tl.sum(total * tl.exp(top - most), 0))


@triton.jit
def row_divergence(
    student_ptr,  # [T, V]
    teacher_ptr,  # [T, V]
    gradient_ptr,  # [T, V]
    loss_ptr,  # fp32 [T]
    student_stride, teacher_stride, V,
    share,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write KL(softmax(teacher) || softmax(student)) of a row, and its gradient, times `share`.

    Each row is read twice: for both log-sum-exps, and for what is written.
    """
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    student, teacher = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    # Below all numbers of 16 bits, and no infinity, of which a difference would be none.
    student_top = tl.full([BLOCK], -1e30, tl.float32)
    student_sum = tl.zeros([BLOCK], tl.float32)
    teacher_top, teacher_sum = student_top, student_sum
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        s = tl.load(student + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + start + lane, mask=inside, other=float("-inf")).to(tl.float32)
        student_top, student_sum = _with_more(student_top, student_sum, s)
        teacher_top, teacher_sum = _with_more(teacher_top, teacher_sum, t)
    student_lse = _log_sum(student_top, student_sum)
    teacher_lse = _log_sum(teacher_top, teacher_sum)
    losses = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        s = tl.load(student + start + lane, mask=inside, other=0.0).to(tl.float32) - student_lse
        t = tl.load(teacher + start + lane, mask=inside, other=0.0).to(tl.float32) - teacher_lse
        p = tl.exp(t)
        # What the teacher never gives costs nothing, however unlikely it is; no number stays none.
        losses += tl.where(inside & (p != 0), p * (t - s), 0.0)
        gradient = (tl.exp(s) - p) * share
        tl.store(gradient_ptr + row * V + start + lane, gradient, mask=inside)
    tl.store(loss_ptr + row, tl.sum(losses, 0) * share)
