"""Steps of KV policies in Triton: which pages a token reads, and what is learnt from it.

Programs are counted by key heads: program b G + g has the pages of row b and key head g.
Numbers of tokens are read from tensors, so that a step can be recorded as a CUDA graph. The kernels
of all policies stand in one file, which is a little long, since an emitted package has it as one.
"""

import triton
import triton.language as tl

UNOBSERVED: tl.constexpr = tl.constexpr(-1.0)
"""As `graphopt.ir.kv_policies.moving_average.UNOBSERVED`."""


@triton.jit
def page_of(slot, PAGE: tl.constexpr):
    """Return the page of a slot; -1 for slot -1, that of a row without keys."""
    return tl.where(slot < 0, -1, slot // PAGE).to(tl.int32)


@triton.jit
def begin_early():
    """Let the next kernel be launched, and wait for the end of the one in front of this."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@triton.jit
def in_order(score):
    """Return numbers, uint32, that compare as the scores do.

    0.0 and -0.0 are equal. +inf counts as the largest number, since what is always read stands
    above, and -inf and NaN as 0, which is below every number.
    """
    bits = (tl.minimum(score, 3.4028234663852886e38) + 0.0).to(tl.int32, bitcast=True)
    # Of negative numbers the larger has the smaller bits: all of theirs are flipped.
    ordered = bits ^ ((bits >> 31) | (tl.full([1, 1], 1, tl.int32) << 31))
    return tl.where(score > float("-inf"), ordered, 0).to(tl.uint32, bitcast=True)


@triton.jit
def narrowed(
    order,  # uint32 [ROWS, COLUMNS]
    high,  # uint32: above `order` of all that is to be chosen from
    present,  # how many there are at most
    above,  # how many reach `high`
    READ: tl.constexpr,
):
    """Return numbers low < high, next to each other or such that READ of `order` reach `high`.

    More than READ reach `low`, if it is not 0. Also returned is how many reach `high`. Which number
    is tried next hangs on how many reach both ends, as if `order` were spread evenly; where that
    leaves more than half of what there was, it is the middle.
    """
    low = tl.zeros_like(high)
    halve = low > 0
    while (high - low > 1) & (above < READ):
        wide = high - low
        share = (present - READ).to(tl.float32) / (present - above).to(tl.float32)
        step = tl.where(halve, wide >> 1, (share * wide.to(tl.float32)).to(tl.uint32))
        middle = low + tl.minimum(tl.maximum(step, 1), wide - 1)
        count = tl.sum(tl.sum((order >= middle).to(tl.int32), 1), 0)
        many = count > READ
        low, present = tl.where(many, middle, low), tl.where(many, count, present)
        high, above = tl.where(many, high, middle), tl.where(many, above, count)
        halve = (high - low > (wide >> 1)) & (halve == 0)
    return low, high, above


@triton.jit
def places(marks, ROWS: tl.constexpr):
    """Return how many marks, int32 [ROWS, COLUMNS], lie in front of each, row after row."""
    totals = tl.sum(marks, 1)
    row = tl.arange(0, ROWS)
    earlier = row[None, :] < row[:, None]
    in_front = tl.sum(tl.where(earlier, tl.expand_dims(totals, 0), 0), 1)
    return in_front[:, None] + tl.cumsum(marks, 1) - marks


@triton.jit
def pooled_shares(
    places_ptr,  # [ROWS, COLUMNS]: where the estimates of the first query head are
    known,  # which pages have one
    width,  # from one query head to the next
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Return the mean over query heads of the softmax of estimates over all pages."""
    shares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for head in tl.static_range(0, HEADS):
        estimate = tl.load(places_ptr + head * width, mask=known, other=float("-inf"))
        # A row without a known page has no share to give.
        most = tl.maximum(tl.max(tl.max(estimate, 1), 0), -3.4028234663852886e38)
        weight = tl.where(known, tl.exp(estimate - most), 0.0)
        total = tl.sum(tl.sum(weight, 1), 0)
        shares += weight / (tl.maximum(total, 1e-30) * HEADS)
    return shares


@triton.jit
def select_pages(
    scores_ptr,  # fp32 [B, G, width], by strides, or estimates; None: the number of the page
    kept_from_ptr,  # int64 [B]: slot from whose page on pages stand above all others
    first_ptr,  # int64 [B]: slot of a row's first key
    last_ptr,  # int64 [B]: slot of its last one
    out_ptr,  # int64 [B, G, READ], contiguous
    score_stride_b, score_stride_g,
    G, width,
    PAGE: tl.constexpr,
    READ: tl.constexpr,  # pages that a step reads, with SINK and LOCAL
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    ROWS: tl.constexpr,  # times COLUMNS: the power of two from the number of pages up
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,  # that from READ up
    SCORES: tl.constexpr,
    ESTIMATES: tl.constexpr,  # 0, or how many rows of estimates [B, G, ESTIMATES, width] are pooled
    KEPT: tl.constexpr,
    OVERLAP: tl.constexpr,  # start before the kernel in front has ended
):  # fmt: skip
    """Write the numbers of the pages that a step reads, ascending, and -1 behind them.

    Of the scores the READ-th largest is found by counting how many reach a number; of equal ones
    those in front are taken. As `graphopt.ir.kv_policies.pages.select_pages`. Pages are in rows, so
    that counting those in front takes threads of one warp, and then one sum of each row.
    """
    if OVERLAP:
        begin_early()
    row = tl.program_id(0)
    batch = row // G
    first = page_of(tl.load(first_ptr + batch), PAGE)
    last = page_of(tl.load(last_ptr + batch), PAGE)
    number = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    score_row = scores_ptr
    if SCORES:
        score_row += batch.to(tl.int64) * score_stride_b + (row % G) * score_stride_g
    if ESTIMATES > 0:
        before = page_of(tl.load(last_ptr + batch) - 1, PAGE)
        known = (number >= first) & (number <= before)
        score = pooled_shares(score_row + number, known, width, ESTIMATES, ROWS, COLUMNS)
    elif SCORES:
        score = tl.load(score_row + number, mask=number < width, other=float("-inf"))
    else:
        score = number.to(tl.float32)
    if KEPT:
        kept = number >= page_of(tl.load(kept_from_ptr + batch), PAGE)
        score = tl.where(kept, number.to(tl.float32) + 2.0, score)
    # Where all pages of a row fit, none is to be chosen.
    fits = last - first < READ
    always = (number < tl.where(fits, last + 1, first + SINK)) | (number > last - LOCAL)
    present = (number >= first) & (number <= last)
    order = tl.where(always | (present == 0), 0, in_order(score))
    high = tl.max(tl.max(order, 1), 0) + 1
    order = tl.where(always & present, tl.full([ROWS, COLUMNS], 4294967295, tl.uint32), order)
    enough = tl.where(fits, READ, SINK + LOCAL)
    low, high, above = narrowed(order, high, last - first + 1, enough, READ)

    taken = order >= high
    if (above < READ) & (low > 0):
        equal = order == low
        taken = taken | (equal & (places(equal.to(tl.int32), ROWS) < READ - above))
    marks = taken.to(tl.int32)
    out_row = out_ptr + row.to(tl.int64) * READ
    tl.store(out_row + places(marks, ROWS), number.to(tl.int64), mask=taken)
    slot = tl.arange(0, SLOTS)
    listed = tl.sum(tl.sum(marks, 1), 0)
    nothing = tl.full([SLOTS], -1, tl.int64)
    tl.store(out_row + slot, nothing, mask=(slot >= listed) & (slot < READ))


@triton.jit(do_not_specialize=["pages"])
def bound_scores(
    q_ptr,  # [B, H, 1, HEAD_DIM], by strides
    least_ptr,  # [B, G, width, HEAD_DIM], by strides: least of each feature of a page's keys
    largest_ptr,  # the largest
    out_ptr,  # fp32 [B, G, pages], contiguous; estimates: [B, G, GROUP, pages]
    scale,  # of estimates
    q_stride_b, q_stride_h,
    least_stride_b, least_stride_g, least_stride_n,
    largest_stride_b, largest_stride_g, largest_stride_n,
    G, pages,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,  # the power of two from HEAD_DIM up, and 16 or more
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,  # the power of two from GROUP up, and 16 or more
    BLOCK: tl.constexpr,
    LOWER: tl.constexpr,  # what the lower bound counts in an estimate
    SOFTCAP: tl.constexpr,  # of estimates; 0 for none
    ESTIMATES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write Quest's bound on the scores of each page's keys, the largest over the query heads.

    Or what each query head's scores are estimated at, between the upper bound and the lower one.

    Of q min and q max the larger is told by the sign of q, so that the sum over d of the larger is
    a product of what is positive in q with the largest features, and one of the rest with the
    least.
    """
    if OVERLAP:
        begin_early()
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D0)
    inside = (number < pages)[:, None] & (d < HEAD_DIM)[None, :]
    page = number.to(tl.int64)[:, None]
    least_rows = least_ptr + batch * least_stride_b + group * least_stride_g
    largest_rows = largest_ptr + batch * largest_stride_b + group * largest_stride_g
    least = tl.load(least_rows + page * least_stride_n + d[None, :], mask=inside, other=0.0)
    largest = tl.load(largest_rows + page * largest_stride_n + d[None, :], mask=inside, other=0.0)
    head = tl.arange(0, HEADS)
    q_rows = q_ptr + batch * q_stride_b + (group * GROUP + head.to(tl.int64))[:, None] * q_stride_h
    real = (head < GROUP)[:, None]
    q = tl.load(q_rows + d[None, :], mask=real & (d < HEAD_DIM)[None, :], other=0.0)
    if q_ptr.dtype.element_ty != least_ptr.dtype.element_ty:
        q, least, largest = q.to(tl.float32), least.to(tl.float32), largest.to(tl.float32)
    positive = tl.where(q > 0, q, 0.0).to(q.dtype)
    negative = tl.where(q > 0, 0.0, q).to(q.dtype)
    if ESTIMATES:
        # The lower bound is by the other ends of the ranges: both are linear in what they multiply.
        mixed = (1.0 - LOWER) * positive + LOWER * negative
        negative = (LOWER * positive + (1.0 - LOWER) * negative).to(q.dtype)
        positive = mixed.to(q.dtype)
    bounds = tl.dot(positive, tl.trans(largest), input_precision="ieee")
    bounds = tl.dot(negative, tl.trans(least), bounds, input_precision="ieee")
    if ESTIMATES:
        bounds *= scale
        if SOFTCAP > 0:
            bounds = SOFTCAP * (2.0 / (1.0 + tl.exp(-2.0 / SOFTCAP * bounds)) - 1.0)
        rows = out_ptr + (row.to(tl.int64) * GROUP + head.to(tl.int64))[:, None] * pages
        tl.store(rows + number[None, :], bounds, mask=real & (number < pages)[None, :])
    else:
        bound = tl.max(tl.where(real, bounds, float("-inf")), 0)
        tl.store(out_ptr + row.to(tl.int64) * pages + number, bound, mask=number < pages)


@triton.jit
def extend_bounds(
    k_ptr,  # [B, G, 1, HEAD_DIM], by strides: the new key
    least_ptr,  # [B, G, width, HEAD_DIM], by strides
    largest_ptr,
    first_ptr,  # int64 [B]
    last_ptr,  # int64 [B]: slot of the new key
    k_stride_b, k_stride_g,
    least_stride_b, least_stride_g, least_stride_n,
    largest_stride_b, largest_stride_g, largest_stride_n,
    G,
    PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Widen the bounds of a page by the key that it gets; the first key of a page sets them."""
    if OVERLAP:
        begin_early()
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    first, last = tl.load(first_ptr + batch), tl.load(last_ptr + batch)
    opens = (last % PAGE == 0) | (last == first)
    page = last // PAGE
    d = tl.arange(0, D0)
    inside = d < HEAD_DIM
    k = tl.load(k_ptr + batch * k_stride_b + group * k_stride_g + d, mask=inside, other=0.0)
    least_row = least_ptr + batch * least_stride_b + group * least_stride_g + page * least_stride_n
    largest_row = largest_ptr + batch * largest_stride_b + group * largest_stride_g
    largest_row += page * largest_stride_n
    k_least = k.to(least_ptr.dtype.element_ty)
    k_largest = k.to(largest_ptr.dtype.element_ty)
    least = tl.load(least_row + d, mask=inside, other=0.0)
    largest = tl.load(largest_row + d, mask=inside, other=0.0)
    tl.store(least_row + d, tl.where(opens | (k_least < least), k_least, least), mask=inside)
    tl.store(
        largest_row + d, tl.where(opens | (k_largest > largest), k_largest, largest), mask=inside
    )


@triton.jit
def read_probability(
    page_max_ptr,  # fp32 [B, H, read], contiguous
    lse_ptr,  # fp32 [B, H], contiguous
    row,
    item,  # [BLOCK]: which pages of the list
    listed,
    read,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest probability in pages that were read, over the query heads."""
    probability = tl.zeros([BLOCK], tl.float32)
    for head in tl.static_range(0, GROUP):
        at = row.to(tl.int64) * GROUP + head
        top = tl.load(page_max_ptr + at * read + item, mask=listed, other=float("-inf"))
        seen = top > float("-inf")
        found = tl.where(seen, tl.exp(top - tl.load(lse_ptr + at)), 0.0)
        probability = tl.maximum(probability, found)
    return probability


@triton.jit(do_not_specialize=["read"])
def observe_average(
    selected_ptr,  # int64 [B, G, read], by strides
    page_max_ptr,  # fp32 [B, H, read], contiguous
    lse_ptr,  # fp32 [B, H], contiguous
    average_ptr,  # fp32 [B, G, width], by strides
    steps_ptr,  # int64 [B]
    selected_stride_b, selected_stride_g,
    average_stride_b, average_stride_g,
    G, read,
    share,  # what the newest probability counts
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Take the probabilities of the pages that were read into their moving averages."""
    if OVERLAP:
        begin_early()
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    listed = slot < read
    selected_row = selected_ptr + batch * selected_stride_b + group * selected_stride_g
    page = tl.load(selected_row + slot, mask=listed, other=-1)
    known = page >= 0
    probability = read_probability(page_max_ptr, lse_ptr, row, slot, listed, read, GROUP, BLOCK)
    average_row = average_ptr + batch * average_stride_b + group * average_stride_g
    before = tl.load(average_row + page, mask=known, other=UNOBSERVED)
    average = share * probability + (1.0 - share) * before
    average = tl.where(before == UNOBSERVED, probability, average)
    tl.store(average_row + page, average, mask=known)
    if (tl.program_id(1) == 0) & (group == 0):
        tl.store(steps_ptr + batch, tl.load(steps_ptr + batch) + 1)


@triton.jit(do_not_specialize=["pages", "read"])
def append_row(
    selected_ptr,  # int64 [B, G, read], by strides
    page_max_ptr,  # fp32 [B, H, read], contiguous
    lse_ptr,  # fp32 [B, H], contiguous
    history_ptr,  # fp32 [B, G, ROWS, width], by strides: a ring of rows
    observed_ptr,  # int8 of the same shape: which of it was read; None with one channel
    steps_ptr,  # int64 [B], before this step
    selected_stride_b, selected_stride_g,
    history_stride_b, history_stride_g, history_stride_r,
    observed_stride_b, observed_stride_g, observed_stride_r,
    G, pages, read,
    share,  # what the newest probability counts
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Put the row of a step into a predictor's ring: what was read, and before that the last row.

    Values are fourth roots of moving averages. With one channel they are probabilities, and what
    was not read is 0.
    """
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    steps = tl.load(steps_ptr + batch)
    slot, before = steps % ROWS, (steps + ROWS - 1) % ROWS
    history = history_ptr + batch * history_stride_b + group * history_stride_g
    new_row = history + slot * history_stride_r
    if CHANNELS == 2:
        observed = observed_ptr + batch * observed_stride_b + group * observed_stride_g
        observed += slot * observed_stride_r
    for start in range(0, pages, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < pages
        kept = tl.zeros([BLOCK], tl.float32)
        if CHANNELS == 2:
            kept = tl.load(history + before * history_stride_r + number, mask=inside, other=0.0)
            tl.store(observed + number, tl.zeros([BLOCK], tl.int8), mask=inside)
        tl.store(new_row + number, kept, mask=inside)
    tl.debug_barrier()
    selected_row = selected_ptr + batch * selected_stride_b + group * selected_stride_g
    for start in range(0, read, BLOCK):
        item = start + tl.arange(0, BLOCK)
        listed = item < read
        page = tl.load(selected_row + item, mask=listed, other=-1)
        value = read_probability(page_max_ptr, lse_ptr, row, item, listed, read, GROUP, BLOCK)
        if CHANNELS == 2:
            old = tl.load(history + before * history_stride_r + page, mask=page >= 0, other=0.0)
            average = share * value + (1.0 - share) * (old * old) * (old * old)
            value = tl.sqrt(tl.sqrt(tl.where(old > 0.0, average, value)))
            tl.store(observed + page, tl.full([BLOCK], 1, tl.int8), mask=page >= 0)
        tl.store(new_row + page, value, mask=page >= 0)


@triton.jit
def hidden_features(
    history_ptr,  # to a row of B and G
    observed_ptr,
    ages,  # [BLOCK] or a number: row of the ring by its age, the oldest being 0
    columns,  # [BLOCK] or a number: page
    steps,
    low, high,  # first and last page that the network sees
    weight_ptr,  # fp32 [16, CHANNELS, 3, 3]
    bias_ptr,  # fp32 [16]
    history_stride_r, observed_stride_r,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Return the first convolution's features [BLOCK, 16]; 0 outside of rows and pages."""
    ages = tl.zeros([BLOCK], tl.int32) + ages
    columns = tl.zeros([BLOCK], tl.int32) + columns
    feature = tl.arange(0, 16)
    features = tl.zeros([BLOCK, 16], tl.float32) + tl.load(bias_ptr + feature)[None, :]
    for place in range(9):
        age, column = ages + (place // 3 - 1), columns + (place % 3 - 1)
        seen = (age >= 0) & (age < ROWS) & (column >= low) & (column <= high)
        slot = (steps + age + ROWS) % ROWS
        x = tl.load(history_ptr + slot * history_stride_r + column, mask=seen, other=0.0)
        tap = weight_ptr + feature * (9 * CHANNELS) + place
        features += x[:, None] * tl.load(tap)[None, :]
        if CHANNELS == 2:
            at = observed_ptr + slot * observed_stride_r + column
            read = tl.load(at, mask=seen, other=0).to(tl.float32)
            features += read[:, None] * tl.load(tap + 9)[None, :]
    there = (ages >= 0) & (ages < ROWS) & (columns >= low) & (columns <= high)
    return tl.where(there[:, None], tl.maximum(features, 0.0), 0.0)


@triton.jit
def row_features(
    history_ptr,
    observed_ptr,
    ages,
    columns,
    steps,
    low,
    high,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,  # fp32 [32, 16, 3, 3]
    bias2_ptr,  # fp32 [32]
    history_stride_r,
    observed_stride_r,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Return the second convolution's features [BLOCK, 32]; arguments as of `hidden_features`.

    Loops are loops: written out, they take a compiler minutes.
    """
    first, second = tl.arange(0, 16), tl.arange(0, 32)
    features = tl.zeros([BLOCK, 32], tl.float32) + tl.load(bias2_ptr + second)[None, :]
    for place in range(9):
        hidden = hidden_features(
            history_ptr, observed_ptr, ages + (place // 3 - 1), columns + (place % 3 - 1), steps,
            low, high, weight1_ptr, bias1_ptr, history_stride_r, observed_stride_r,
            ROWS, BLOCK, CHANNELS,
        )  # fmt: skip
        tap = weight2_ptr + second[None, :] * 144 + first[:, None] * 9 + place
        features += tl.dot(hidden, tl.load(tap), input_precision="ieee")
    return tl.maximum(features, 0.0)


@triton.jit
def last_pages(
    history_ptr,  # fp32 [B, G, ROWS, width], by strides
    observed_ptr,  # int8, or None with one channel
    steps_ptr,  # int64 [B], with this step
    first_ptr, last_ptr,  # int64 [B]
    weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr,
    sums_ptr,  # fp32 [B, G, 3, 32]
    history_stride_b, history_stride_g, history_stride_r,
    observed_stride_b, observed_stride_g, observed_stride_r,
    G,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two from ROWS up
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the sums over the inner rows of the last three pages that the network sees."""
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    steps = tl.load(steps_ptr + batch)
    low = page_of(tl.load(first_ptr + batch), PAGE) + SINK
    high = page_of(tl.load(last_ptr + batch) + 1, PAGE) - LOCAL
    column = high - 2 + tl.program_id(1)
    history = history_ptr + batch * history_stride_b + group * history_stride_g
    observed = observed_ptr
    if CHANNELS == 2:
        observed += batch * observed_stride_b + group * observed_stride_g
    ages = tl.arange(0, BLOCK)
    feature = tl.arange(0, 32)
    features = row_features(
        history, observed, ages, column, steps, low, high,
        weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, history_stride_r, observed_stride_r,
        ROWS, BLOCK, CHANNELS,
    )  # fmt: skip
    inner = (ages >= 3) & (ages < ROWS - 2)
    total = tl.sum(tl.where(inner[:, None], features, 0.0), 0)
    tl.store(sums_ptr + (row * 3 + tl.program_id(1)) * 32 + feature, total)


@triton.jit(do_not_specialize=["pages"])
def predict_row(
    history_ptr,  # fp32 [B, G, ROWS, width], by strides
    observed_ptr,  # int8, or None with one channel
    steps_ptr,  # int64 [B], with this step
    first_ptr, last_ptr,  # int64 [B]
    weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr,
    sums_ptr,  # fp32 [B, G, 3, 32]: `last_pages`
    sliding_ptr,  # fp32 [B, G, 32, width], by strides
    scores_ptr,  # fp32 [B, G, width], by strides
    history_stride_b, history_stride_g, history_stride_r,
    observed_stride_b, observed_stride_g, observed_stride_r,
    sliding_stride_b, sliding_stride_g, sliding_stride_f,
    scores_stride_b, scores_stride_g,
    G, pages,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
    SINK: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Slide a predictor's sum by a row, and write the scores of the next step.

    Three rows of features are computed at the top, the outer two and the one that goes, and three
    at the bottom, the one that comes and the outer two.
    """
    row = tl.program_id(0)
    batch, group = (row // G).to(tl.int64), (row % G).to(tl.int64)
    steps = tl.load(steps_ptr + batch)
    low = page_of(tl.load(first_ptr + batch), PAGE) + SINK
    high = page_of(tl.load(last_ptr + batch) + 1, PAGE) - LOCAL
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    history = history_ptr + batch * history_stride_b + group * history_stride_g
    observed = observed_ptr
    if CHANNELS == 2:
        observed += batch * observed_stride_b + group * observed_stride_g
    feature = tl.arange(0, 32)
    total = tl.zeros([BLOCK, 32], tl.float32)
    change = tl.zeros([BLOCK, 32], tl.float32)
    for index in range(6):
        # Rows 0, 1, 2 and the last three: row 2 goes, and the first of the last three comes.
        age = tl.where(index < 3, index, ROWS - 6 + index)
        features = row_features(
            history, observed, age, number, steps, low, high,
            weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, history_stride_r, observed_stride_r,
            ROWS, BLOCK, CHANNELS,
        )  # fmt: skip
        total += tl.where(index == 3, 0.0, features)
        change += tl.where(index == 3, features, tl.where(index == 2, -features, 0.0))
    inside = (number < pages)[:, None]
    sliding = sliding_ptr + batch * sliding_stride_b + group * sliding_stride_g
    sliding += feature[None, :] * sliding_stride_f + number[:, None]
    sums = tl.load(sliding, mask=inside, other=0.0) + change
    again = number - (high - 2)
    anew = ((again >= 0) & (again < 3) & (number >= low))[:, None]
    sums_row = sums_ptr + row * 96 + again[:, None] * 32 + feature[None, :]
    sums = tl.where(anew, tl.load(sums_row, mask=anew, other=0.0), sums)
    tl.store(sliding, sums, mask=inside)
    total += sums
    weight = tl.load(weight3_ptr + feature)[None, :]
    score = tl.sum(total * weight, 1) / ROWS + tl.load(bias3_ptr)
    scores_row = scores_ptr + batch * scores_stride_b + group * scores_stride_g
    tl.store(scores_row + number, score, mask=number < pages)
