"""Kernels of feed-forward parts of which every token runs some experts.

Neurons of experts lie side by side: expert e is rows e SIZE to e SIZE + SIZE of `up` and `gate`
[E SIZE, D], and the same columns of `down` [OUT, E SIZE]. A kernel reads 16 bits, adds up in fp32
and rounds where it writes. What an expert computes is in one place of memory whatever the other
tokens do, and sums have one order, so that runs repeat bit for bit.

For many tokens, in this order: `route` or `top_k_gating`, `list_tokens`, `expand`, `reduce` and
`combine`. For few, behind the gates, `expand_few` and `reduce_few`, which also run the neurons that
every token shares.
"""

import triton
import triton.language as tl

from graphopt.runtime.kernels.block import activation


@triton.jit
def _products(
    x_ptr, weight_ptr, row, there, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return the inner products of x [D] with some rows of a weight."""
    feature = tl.arange(0, BLOCK_D)
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * D + feature[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + feature < D
        x = tl.load(x_ptr + start + feature, mask=inside, other=0.0).to(tl.float32)
        mask = there[:, None] & inside[None, :]
        weight = tl.load(weight_at + start, mask=mask, other=0.0).to(tl.float32)
        total += weight * x[None, :]
    return tl.sum(total, 1)


@triton.jit
def _choose(
    logits, selection_bias_ptr, gate_scale_ptr, expert,
    E: tl.constexpr, TOP_K: tl.constexpr, BY_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Return the gates [T, E] of the TOP_K experts with the highest logits; the others' are 0.

    With BY_THRESHOLD those are chosen whose logit is above 0.
    """
    there = (expert < E)[None, :]
    ranked = tl.where(there, logits, -float("inf"))
    probabilities = logits
    if selection_bias_ptr is not None or gate_scale_ptr is not None:
        probabilities = tl.exp(ranked - tl.max(ranked, 1)[:, None])
        probabilities = probabilities / tl.sum(probabilities, 1)[:, None]
    if selection_bias_ptr is not None:
        bias = tl.load(selection_bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
        ranked = (logits if BY_THRESHOLD else probabilities) + bias[None, :]
        ranked = tl.where(there, ranked, -float("inf"))
    if BY_THRESHOLD:
        chosen = ranked > 0.0
    else:
        mine, other = ranked[:, :, None], ranked[:, None, :]
        ahead = (other > mine) | ((other == mine) & (expert[None, None, :] < expert[None, :, None]))
        chosen = tl.sum(ahead.to(tl.int32), 2) < TOP_K
    gates = tl.where(chosen, 1.0, 0.0)
    if gate_scale_ptr is not None:
        scale = tl.load(gate_scale_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
        gates = tl.where(chosen, 1.0 + probabilities * scale[None, :], 0.0)
    return gates


@triton.jit
def top_k_gating(
    logits_ptr, selection_bias_ptr, gate_scale_ptr, gates_ptr, tokens, logits_stride,
    E: tl.constexpr, TOP_K: tl.constexpr, BY_THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the gates [T, E] of router logits [T, E]."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    inside = (token < tokens)[:, None] & (expert < E)[None, :]
    at = token.to(tl.int64)[:, None] * logits_stride + expert[None, :]
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gates = _choose(logits, selection_bias_ptr, gate_scale_ptr, expert, E, TOP_K, BY_THRESHOLD)
    target = token.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(gates_ptr + target, gates.to(gates_ptr.dtype.element_ty), mask=inside)


@triton.jit
def route(
    x_ptr, weight_ptr, router_bias_ptr, selection_bias_ptr, gate_scale_ptr, gates_ptr,
    tokens, x_stride,
    D: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, BY_THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gates [T, E] of router logits x weight^T + router_bias, which are not rounded."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    if BLOCK_T == 1:
        # Matrix units need 16 tokens; one is read by a single program, as much at a time as can be.
        at = x_ptr + tl.program_id(0).to(tl.int64) * x_stride
        logits = _products(at, weight_ptr, expert, expert < E, D, BLOCK_E, BLOCK_D)[None, :]
    else:
        feature = tl.arange(0, BLOCK_D)
        x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + feature[None, :]
        weight_at = weight_ptr + expert[None, :] * D + feature[:, None]
        logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for start in range(0, D, BLOCK_D):
            inside = start + feature < D
            mask = (token < tokens)[:, None] & inside[None, :]
            x = tl.load(x_at + start, mask=mask, other=0.0)
            mask = inside[:, None] & (expert < E)[None, :]
            weight = tl.load(weight_at + start, mask=mask, other=0.0)
            logits = tl.dot(x, weight, logits)
    if router_bias_ptr is not None:
        bias = tl.load(router_bias_ptr + expert, mask=expert < E, other=0.0).to(tl.float32)
        logits += bias[None, :]
    gates = _choose(logits, selection_bias_ptr, gate_scale_ptr, expert, E, TOP_K, BY_THRESHOLD)
    inside = (token < tokens)[:, None] & (expert < E)[None, :]
    target = token.to(tl.int64)[:, None] * E + expert[None, :]
    tl.store(gates_ptr + target, gates.to(gates_ptr.dtype.element_ty), mask=inside)


@triton.jit
def list_tokens(
    gates_ptr, order_ptr, counts_ptr, tokens,
    E: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write which tokens an expert runs, and how many; one program an expert.

    `order` [E, T] holds t COUNT + s for token t, of whose experts this is number s from 0.
    """
    this = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    count = 0
    for start in range(0, tokens, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        at = token.to(tl.int64)[:, None] * E + expert[None, :]
        inside = (token < tokens)[:, None] & (expert < E)[None, :]
        runs = (tl.load(gates_ptr + at, mask=inside, other=0.0) != 0.0).to(tl.int32)
        mine = tl.sum(tl.where((expert == this)[None, :], runs, 0), 1)
        slot = tl.sum(tl.where((expert < this)[None, :], runs, 0), 1)
        # Gates of more experts than a token may run have no room.
        mine = tl.where(slot < COUNT, mine, 0)
        place = count + tl.cumsum(mine, 0) - mine
        target = order_ptr + this.to(tl.int64) * tokens + place
        tl.store(target, token * COUNT + slot, mask=mine > 0)
        count += tl.sum(mine, 0)
    tl.store(counts_ptr + this, count)


@triton.jit
def _tile_of(
    counts_ptr, order_ptr, tokens, tiles, columns,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Return a program's tile of rows, its column tile, its expert and what its rows are.

    Experts' tokens fill tiles of BLOCK_T rows, one expert behind the other. Programs go through
    GROUP tiles of rows a column, so that those at work together read the same weights. The
    expert is E for a program that has nothing to do. An entry of -1 is no token.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inner = pid % (GROUP * columns)
    tile, column = first + inner % height, inner // height
    expert = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + expert, mask=expert < E, other=0)
    heights = (counts + BLOCK_T - 1) // BLOCK_T
    ends = tl.cumsum(heights, 0)
    this = tl.sum((ends <= tile).to(tl.int32), 0)
    this = tl.minimum(this, E)
    before = tl.sum(tl.where(expert == this, ends - heights, 0), 0)
    count = tl.sum(tl.where(expert == this, counts, 0), 0)
    row = (tile - before) * BLOCK_T + tl.arange(0, BLOCK_T)
    source = order_ptr + this.to(tl.int64) * tokens + row
    entry = tl.load(source, mask=row < count, other=-1)
    return tile, column, this, entry


@triton.jit
def _block(at, place, end, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of what is summed over; where ALL is no multiple of it, zeros behind `end`."""
    if ALL % BLOCK == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=place < end, other=0.0)


@triton.jit
def expand(
    x_ptr, up_ptr, gate_ptr, up_tiles, gate_tiles, up_bias_ptr, gate_bias_ptr,
    gates_ptr, order_ptr, counts_ptr, hidden_ptr,
    tokens, tiles, x_stride,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr, COUNT: tl.constexpr,
    ACT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write the neurons of one expert for one tile of its tokens, times the tokens' gates.

    `hidden` [tiles BLOCK_T, ROOM] has room for whole blocks of neurons; those behind SIZE are 0.
    `up_tiles` and `gate_tiles` are tensor descriptors of the weights, where the GPU copies tiles.
    """
    columns: tl.constexpr = (ROOM + BLOCK_N - 1) // BLOCK_N
    tile, column, expert, entry = _tile_of(
        counts_ptr, order_ptr, tokens, tiles, columns, E, BLOCK_E, BLOCK_T, GROUP
    )
    if expert < E:
        token = tl.maximum(entry, 0) // COUNT
        neuron = column * BLOCK_N + tl.arange(0, BLOCK_N)
        feature = tl.arange(0, BLOCK_D)
        x_at = x_ptr + token.to(tl.int64)[:, None] * x_stride + feature[None, :]
        first = expert * SIZE + column * BLOCK_N
        # Rows of the next expert, or the last row, fill the last block: their neurons are put to 0.
        row = tl.minimum(first + tl.arange(0, BLOCK_N), E * SIZE - 1)
        weight_at = row.to(tl.int64)[None, :] * D + feature[:, None]
        above = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        gated = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, D, BLOCK_D):
            left = D - start
            x = _block(x_at + start, feature[None, :], left, D, BLOCK_D)
            if up_tiles is not None:
                up = up_tiles.load([first, start]).T
            else:
                up = _block(up_ptr + weight_at + start, feature[:, None], left, D, BLOCK_D)
            above = tl.dot(x, up, above)
            if gate_ptr is not None:
                if gate_tiles is not None:
                    gate = gate_tiles.load([first, start]).T
                else:
                    gate = _block(gate_ptr + weight_at + start, feature[:, None], left, D, BLOCK_D)
                gated = tl.dot(x, gate, gated)
        if up_bias_ptr is not None:
            above += tl.load(up_bias_ptr + row).to(tl.float32)[None, :]
        if gate_ptr is not None:
            if gate_bias_ptr is not None:
                gated += tl.load(gate_bias_ptr + row).to(tl.float32)[None, :]
            hidden = activation(gated, ACT) * above
        else:
            hidden = activation(above, ACT)
        own = tl.load(gates_ptr + token.to(tl.int64) * E + expert).to(tl.float32)
        hidden = tl.where((neuron < SIZE)[None, :], hidden * own[:, None], 0.0)
        line = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        target = hidden_ptr + line[:, None] * ROOM + neuron[None, :]
        mask = (entry >= 0)[:, None] & (neuron < ROOM)[None, :]
        tl.store(target, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce(
    hidden_ptr, hidden_tiles, down_ptr, down_tiles, order_ptr, counts_ptr, parts_ptr,
    tokens, tiles,
    OUT: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write what one expert adds to the tokens of one tile: `parts` [T, COUNT, OUT]."""
    columns: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    tile, column, expert, entry = _tile_of(
        counts_ptr, order_ptr, tokens, tiles, columns, E, BLOCK_E, BLOCK_T, GROUP
    )
    if expert < E:
        line = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        out = column * BLOCK_N + tl.arange(0, BLOCK_N)
        neuron = tl.arange(0, BLOCK_D)
        hidden_at = hidden_ptr + line[:, None] * ROOM + neuron[None, :]
        row = tl.minimum(out, OUT - 1).to(tl.int64)
        down_at = down_ptr + row[None, :] * (E * SIZE) + neuron[:, None]
        total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for start in range(0, ROOM, BLOCK_D):
            place = expert * SIZE + start
            if hidden_tiles is not None:
                hidden = hidden_tiles.load([tile * BLOCK_T, start])
                down = down_tiles.load([column * BLOCK_N, place]).T
            else:
                # Rows of no token come to nothing, whatever is in them.
                hidden = tl.load(hidden_at + start)
                # Columns of the next expert meet neurons that are 0.
                end = E * SIZE - place
                down = _block(down_at + place, neuron[:, None], end, SIZE, BLOCK_D)
            total = tl.dot(hidden, down, total)
        target = parts_ptr + tl.maximum(entry, 0).to(tl.int64)[:, None] * OUT + out[None, :]
        mask = (entry >= 0)[:, None] & (out < OUT)[None, :]
        tl.store(target, total.to(parts_ptr.dtype.element_ty), mask=mask)


@triton.jit
def combine(
    parts_ptr, gates_ptr, bias_ptr, shared_ptr, y_ptr,
    OUT: tl.constexpr, E: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a block of one token's sum over its experts, a bias [OUT] and `shared` [T, OUT]."""
    token = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.arange(0, BLOCK_E)
    gates = tl.load(gates_ptr + token * E + expert, mask=expert < E, other=0.0)
    count = tl.sum((gates != 0.0).to(tl.int32), 0)
    total = tl.zeros((BLOCK,), tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + out, mask=out < OUT, other=0.0).to(tl.float32)
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + token * OUT + out, mask=out < OUT, other=0.0)
        total += shared.to(tl.float32)
    for slot in tl.static_range(COUNT):
        part = parts_ptr + (token * COUNT + slot) * OUT + out
        room = tl.minimum(tl.maximum(count - slot, 0), 1) * OUT
        total += tl.load(part, mask=out < room, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * OUT + out, total.to(y_ptr.dtype.element_ty), mask=out < OUT)


@triton.jit
def _expert_in(
    gates_ptr, token, slot, E: tl.constexpr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Return the number, the gate and the neurons of a token's expert in a slot.

    Where there is none, so are its neurons.
    """
    expert = tl.arange(0, BLOCK_E)
    gates = tl.load(gates_ptr + token * E + expert, mask=expert < E, other=0.0).to(tl.float32)
    runs = (gates != 0.0).to(tl.int32)
    here = (runs > 0) & (tl.cumsum(runs, 0) - 1 == slot)
    own = tl.sum(tl.where(here, gates, 0.0), 0)
    return tl.sum(tl.where(here, expert, 0), 0), own, tl.sum(here.to(tl.int32), 0) * SIZE


@triton.jit
def _neurons(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr, row, there,
    D: tl.constexpr, ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return some neurons of one token."""
    above = _products(x_ptr, up_ptr, row, there, D, BLOCK_N, BLOCK_D)
    if up_bias_ptr is not None:
        above += tl.load(up_bias_ptr + row, mask=there, other=0.0).to(tl.float32)
    if gate_ptr is None:
        hidden = activation(above, ACT)
    else:
        gated = _products(x_ptr, gate_ptr, row, there, D, BLOCK_N, BLOCK_D)
        if gate_bias_ptr is not None:
            gated += tl.load(gate_bias_ptr + row, mask=there, other=0.0).to(tl.float32)
        hidden = activation(gated, ACT) * above
    return hidden


@triton.jit
def expand_few(
    x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr,
    shared_up_ptr, shared_gate_ptr, shared_up_bias_ptr, shared_gate_bias_ptr,
    gates_ptr, hidden_ptr, x_stride,
    D: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr,
    COUNT: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write a block of one token's neurons: the shared ones, then its experts' [COUNT, SIZE]."""
    block = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    x_ptr += token * x_stride
    hidden_ptr += token * (SHARED + COUNT * SIZE)
    shared_blocks: tl.constexpr = (SHARED + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    if SHARED > 0:
        if block < shared_blocks:
            neuron = block * BLOCK_N + tl.arange(0, BLOCK_N)
            there = neuron < SHARED
            hidden = _neurons(
                x_ptr, shared_up_ptr, shared_gate_ptr, shared_up_bias_ptr, shared_gate_bias_ptr,
                neuron, there, D, ACT, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            tl.store(hidden_ptr + neuron, hidden.to(hidden_ptr.dtype.element_ty), mask=there)
    if block >= shared_blocks:
        slot = (block - shared_blocks) // blocks
        expert, own, count = _expert_in(gates_ptr, token, slot, E, SIZE, BLOCK_E)
        neuron = (block - shared_blocks) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        hidden = _neurons(
            x_ptr, up_ptr, gate_ptr, up_bias_ptr, gate_bias_ptr,
            expert * SIZE + neuron, neuron < count, D, ACT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        target = hidden_ptr + SHARED + slot * SIZE + neuron
        hidden = tl.where(neuron < count, hidden * own, 0.0)
        tl.store(target, hidden.to(hidden_ptr.dtype.element_ty), mask=neuron < SIZE)


@triton.jit
def reduce_few(
    hidden_ptr, down_ptr, shared_down_ptr, down_bias_ptr, gates_ptr, y_ptr,
    OUT: tl.constexpr, E: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write a block of one token's output from the neurons that it runs."""
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64)
    hidden_ptr += token * (SHARED + COUNT * SIZE)
    neuron = tl.arange(0, BLOCK_D)
    inside = out < OUT
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if SHARED > 0:
        shared_at = shared_down_ptr + out.to(tl.int64)[:, None] * SHARED + neuron[None, :]
        for start in range(0, SHARED, BLOCK_D):
            there = start + neuron < SHARED
            hidden = tl.load(hidden_ptr + start + neuron, mask=there, other=0.0).to(tl.float32)
            mask = inside[:, None] & there[None, :]
            total += tl.load(shared_at + start, mask=mask, other=0.0).to(tl.float32) * hidden
    for slot in tl.static_range(COUNT):
        expert, _, count = _expert_in(gates_ptr, token, slot, E, SIZE, BLOCK_E)
        first = expert * SIZE
        down_at = down_ptr + out.to(tl.int64)[:, None] * (E * SIZE) + first + neuron[None, :]
        hidden_at = hidden_ptr + SHARED + slot * SIZE
        for start in range(0, SIZE, BLOCK_D):
            there = start + neuron < count
            hidden = tl.load(hidden_at + start + neuron, mask=there, other=0.0).to(tl.float32)
            mask = inside[:, None] & there[None, :]
            total += tl.load(down_at + start, mask=mask, other=0.0).to(tl.float32) * hidden
    y = tl.sum(total, 1)
    if down_bias_ptr is not None:
        y += tl.load(down_bias_ptr + out, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * OUT + out, y.to(y_ptr.dtype.element_ty), mask=inside)
