"""The ops in plain torch: composite, differentiable, compilable.

What programs are run with, and what emitted models are made of: this file, or the functions of it
that a model calls, are copied into them, so that it imports nothing of graphopt and is one file.

Layout letters: B batch, S query tokens, T key tokens (cached ones first), H query heads,
G key/value heads, D head size, N features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in the dtype of `weight` [out, in], or that of autocast; `x` [..., in]."""
    # Autocast, which rounds both, would round again what is widened here.
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    return F.linear(x, weight, bias)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Take bytes [..., n] apart into codes [..., n * 8 // bits], uint8; the lowest bits first."""
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
    # Eight codes lie in `bits` bytes, which are one whole number here.
    padded = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits)).long()
    words = (padded << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(-1, keepdim=True)
    codes = (words >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return codes.flatten(-2)[..., : packed.shape[-1] * 8 // bits].to(torch.uint8)


def dequantise(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    bits: int,
    group: int,
    axis: int = -1,
) -> Tensor:
    """The matrix that packed codes stand for: (code - zero point) * scale, group by group.

    Computed in fp32, or in fp64 for scales of that type.

    Args:
        packed: uint8 [..., groups, ceil(group * bits / 8)]; see `unpack`.
        scales: [..., groups].
        zeros: uint8 [..., ceil(groups * bits / 8)], zero points packed as the codes are; None
            where all are 2 ** (bits - 1).
        group: Codes of a group.
        axis: Where the axis of the groups belongs; it is the last one of `packed`.

    Returns:
        [..., groups * group] in the dtype of `scales`, its last axis moved to `axis`.
    """
    wide = torch.float64 if scales.dtype == torch.float64 else torch.float32
    codes = unpack(packed, bits)[..., :group].to(wide)
    if zeros is None:
        codes = codes - 2 ** (bits - 1)
    else:
        codes = codes - unpack(zeros, bits)[..., : scales.shape[-1], None].to(wide)
    return (codes * scales[..., None].to(wide)).flatten(-2).movedim(-1, axis).to(scales.dtype)


def packed_linear(x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
    """x weight()^T + bias, where `weight` is kept in another form and a call gives the matrix."""
    return linear(x, weight(), bias)


def integer_linear(
    codes: Tensor, scales: Tensor, weight: Callable[[], Tensor], bias: Tensor | None = None
) -> Tensor:
    """(codes scales) weight()^T + bias: int8 [..., N] and one scale [...] of each row."""
    matrix = weight()
    return linear((codes * scales[..., None]).to(matrix.dtype), matrix, bias)


def gated_packed_linear(
    x: Tensor, weight: Callable[[], Tensor], bias: Tensor | None = None, *, act: str
) -> Tensor:
    """act(first) second of both halves of a `packed_linear`."""
    gate, up = packed_linear(x, weight, bias).chunk(2, -1)
    return act_mul(gate, up, act)


def gated_integer_linear(
    codes: Tensor,
    scales: Tensor,
    weight: Callable[[], Tensor],
    bias: Tensor | None = None,
    *,
    act: str,
) -> Tensor:
    """act(first) second of both halves of an `integer_linear`."""
    gate, up = integer_linear(codes, scales, weight, bias).chunk(2, -1)
    return act_mul(gate, up, act)


def norm_packed_linear(
    x: Tensor,
    y: Tensor | None,
    norm_weight: Tensor | None,
    weight: Callable[[], Tensor],
    bias: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    act: str = "",
    sizes: Sequence[int] = (),
) -> tuple[Tensor, ...]:
    """x + y, and the `packed_linear` of its norm, or with `act` the `gated_packed_linear`.

    Args:
        sizes: Of the parts that the product is split into; empty for one.
    """
    total, normed = add_rms_norm(x, y, norm_weight, eps, offset)
    if act:
        return total, gated_packed_linear(normed, weight, bias, act=act)
    product = packed_linear(normed, weight, bias)
    return (total, *product.split([*sizes], -1)) if sizes else (total, product)


def quantise(
    x: Tensor, clip_low: Tensor | None = None, clip_high: Tensor | None = None, *, bits: int
) -> tuple[Tensor, Tensor]:
    """The codes and scales by which `quantise_dequantise` rounds `x` symmetrically.

    Returns:
        int8 [..., N], and the scales [...] in fp32, or in fp64 for an `x` of that type; a row with
        a NaN or an infinity has the scale NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    low = wide.amin(-1, keepdim=True).clamp(max=0)
    high = wide.amax(-1, keepdim=True).clamp(min=0)
    low = low if clip_low is None else low * clip_low.to(wide.dtype)
    high = high if clip_high is None else high * clip_high.to(wide.dtype)
    largest = 2 ** (bits - 1) - 1
    scales = torch.maximum(high, -low) / largest
    scales = scales.masked_fill(scales == 0, 1.0)
    scales = scales.masked_fill(~scales.isfinite(), float("nan"))
    codes = (wide / scales).round().clamp(-largest - 1, largest)
    return codes.nan_to_num().to(torch.int8), scales[..., 0]


def transformed(
    x: Tensor,
    y: Tensor | None = None,
    norm_weight: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    *,
    before: str = "",
    total: bool = False,
    eps: float = 0.0,
    offset: float = 0.0,
    bits: int = 0,
) -> Any:
    """A norm or a gate, a Kronecker transform and rounding to codes, each there or not.

    Args:
        before: `norm`: the root-mean-square norm of x + y, or of x alone; the name of an
            activation: act(x) y.
        left, right: See `kronecker`.
        clip_low, clip_high, bits: See `quantise`; without bits nothing is rounded.
        total: Give x + y too.

    Returns:
        The values, or codes and scales; behind x + y, if that is asked for.
    """
    results: list[Tensor] = []
    if before == "norm":
        whole, x = add_rms_norm(x, y, norm_weight, eps, offset)
        results += [whole] if total else []
    elif before:
        assert y is not None
        x = act_mul(x, y, before)
    if left is not None or right is not None:
        x = kronecker(x, left, right)
    results += quantise(x, clip_low, clip_high, bits=bits) if bits else [x]
    return tuple(results) if len(results) > 1 else results[0]


def transformed_packed_linear(
    x: Tensor,
    y: Tensor | None,
    norm_weight: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    weight: Callable[[], Tensor],
    bias: Tensor | None = None,
    *,
    before: str = "",
    total: bool = False,
    eps: float = 0.0,
    offset: float = 0.0,
    act: str = "",
    sizes: Sequence[int] = (),
) -> Any:
    """The `packed_linear` of a `transformed` without rounding, or with `act` the gated one.

    Args:
        total: Give x + y too, first.
        sizes: Of the parts that the product is split into; empty for one.
    """
    made = transformed(
        x, y, norm_weight, left, right, before=before, total=total, eps=eps, offset=offset
    )
    values = made[1] if total else made
    results: list[Tensor] = [made[0]] if total else []
    if act:
        results.append(gated_packed_linear(values, weight, bias, act=act))
    else:
        product = packed_linear(values, weight, bias)
        results += product.split([*sizes], -1) if sizes else [product]
    return tuple(results) if len(results) > 1 else results[0]


def quantise_dequantise(
    x: Tensor,
    clip_low: Tensor | None = None,
    clip_high: Tensor | None = None,
    *,
    bits: int,
    symmetric: bool,
    straight_through: bool = False,
) -> Tensor:
    """Round the last axis of `x` to 2 ** bits evenly spaced values, and return those values.

    Computed in fp32 for 16-bit inputs. Halves are rounded to even; a row of zeros gives zeros, and
    one with a NaN or an infinity NaN.

    Args:
        x: [..., N]; each row of N has a scale of its own.
        clip_low, clip_high: Broadcast against [..., 1]: what part of the range from a row's least
            element to 0, and from 0 to its largest, the codes cover; None for all of it.
        symmetric: Whether the codes are signed and 0 is code 0; else there is a zero point.
        straight_through: Whether roundings have the gradient of the identity.

    Returns:
        [..., N] in the dtype of `x`.
    """

    def rounded(values: Tensor) -> Tensor:
        return values + (values.round() - values).detach() if straight_through else values.round()

    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    clipped = clip_low is not None or clip_high is not None
    if symmetric and not clipped:
        low, high = None, wide.abs().amax(-1, keepdim=True)
    else:
        low = wide.amin(-1, keepdim=True).clamp(max=0)
        high = wide.amax(-1, keepdim=True).clamp(min=0)
        low = low if clip_low is None else low * clip_low.to(wide.dtype)
        high = high if clip_high is None else high * clip_high.to(wide.dtype)
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        reach = high if low is None else torch.maximum(high, -low)
        scale = reach / largest
        scale = scale.masked_fill(scale == 0, 1.0)
        codes = rounded(wide / scale).clamp(-largest - 1, largest)
        return (codes * scale).to(x.dtype)
    assert low is not None
    largest = 2**bits - 1
    scale = (high - low) / largest
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = rounded(-low / scale)
    codes = (rounded(wide / scale) + zero).clamp(0, largest)
    return ((codes - zero) * scale).to(x.dtype)


def kronecker(x: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """x (left kron right) by two small products, in the dtype of the factors; `x` may be wider.

    A row of n1 n2 features is read as a matrix X [n1, n2]; the result is left^T X right, flattened.

    Args:
        x: [..., n1 * n2].
        left: [n1, n1]; None for the identity.
        right: [n2, n2]; None for the identity. One of the two is given.
    """
    if left is None:
        assert right is not None
        rows = x.to(right.dtype).unflatten(-1, (-1, right.shape[0]))
        return (rows @ right).flatten(-2)
    rows = x.to(left.dtype).unflatten(-1, (left.shape[0], -1))
    if right is not None:
        rows = rows @ right
    return (left.transpose(0, 1) @ rows).flatten(-2)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product a b in the dtype of `b`; `a` may be wider."""
    return a.to(b.dtype) @ b


def narrowed(op: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call an operator whose operands must be of one dtype: the narrowest that any of them has.

    A number that this dtype does not reach becomes its last one, as what masks by the lowest
    number of fp32 has to in 16 bits.

    Args:
        args: The operator's; floating-point tensors among them, also in lists, may be wider.
    """
    listed = [item for x in args for item in (x if isinstance(x, (list, tuple)) else [x])]
    kinds = [x.dtype for x in listed if isinstance(x, Tensor) and x.is_floating_point()]
    dtype = min(kinds, key=lambda kind: kind.itemsize, default=torch.float32)
    most = torch.finfo(dtype).max

    def change(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [change(item) for item in x]
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.to(dtype)
        if isinstance(x, float) and most < abs(x) < float("inf"):
            return most if x > 0 else -most
        return x

    return op(*map(change, args), **options)


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each row of `x` [N, K] by the matrix of its group in `weight` [E, K, M].

    Group e is the rows from `ends[e - 1]` up to `ends[e]` (int [E], ascending); rows behind the
    last group give 0.

    Returns:
        [N, M] in the dtype of `weight`.
    """
    counts = torch.diff(ends, prepend=ends.new_zeros(1), append=ends.new_full((1,), len(x)))
    *groups, rest = x.to(weight.dtype).split(counts.tolist())
    products = [rows @ matrix for rows, matrix in zip(groups, weight, strict=True) if len(rows)]
    return torch.cat([*products, rest.new_zeros(len(rest), weight.shape[2])])


def vocab_parallel_embedding(ids: Tensor, weight: Any, first_row: Tensor, vocab: int) -> Tensor:
    """Look ids up in a rank's rows [R, N] of a table, those from `first_row` [1] on.

    Ids whose rows other ranks have give zeros. One that none of the table's `vocab` rows is for is
    out of range here as it is in a whole table; nothing waits for the device to find that out.
    """
    row = ids - first_row
    elsewhere = row.div(len(weight), rounding_mode="floor") != 0
    # A multiple of `vocab`: 0 for what is an id, and otherwise beyond the rows of any rank.
    beyond = ids - ids % vocab
    rows = F.embedding(row.masked_fill(elsewhere, 0) + beyond, weight)
    return rows.masked_fill(elsewhere[..., None], 0)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last dimension, gain `weight + offset`.

    Computed in fp32 for 16-bit inputs. `weight` is [N] or broadcasts against `x` [..., N].
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        gain = weight.to(wide.dtype)
        normed = normed * (gain + offset if offset else gain)
    return normed.to(x.dtype)


def mean_square(x: Tensor, features: int) -> Tensor:
    """The sum of x^2 over the last axis by the number of `features`, [..., 1], in fp32 at least."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide.square().sum(-1, keepdim=True) / features


def rms_norm_by(
    x: Tensor, mean_square: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> Tensor:
    """`rms_norm` of x [..., N] by a mean square [..., 1] that is known."""
    normed = x.to(mean_square.dtype) * torch.rsqrt(mean_square + eps)
    if weight is not None:
        gain = weight.to(normed.dtype)
        normed = normed * (gain + offset if offset else gain)
    return normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, y: Tensor | None, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum x + y, or `x` where there is no `y`, and its `rms_norm`."""
    total = x if y is None else x + y
    return total, rms_norm(total, weight, eps, offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Mean-and-variance norm over the last dimension, in the dtype of `x`.

    `weight` and `bias` are [N], or broadcast against `x` [..., N].
    """
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if (weight is None or weight.dim() == 1) and (bias is None or bias.dim() == 1):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    normed = F.layer_norm(x, x.shape[-1:], None, None, eps)
    if weight is not None:
        normed = normed * weight
    return normed if bias is None else normed + bias


def by_length(positions: Tensor, short: Tensor, long: Tensor, length: int) -> Tensor:
    """Return `long` where the longest sequence has more than `length` tokens, else `short`.

    `positions` [B, S] hold the newest token of every sequence; the longest decides for all.

    Source: Ding et al., LongRoPE, arXiv 2402.13753, section 3.3.
    """
    return torch.where(positions.max() >= length, long, short)


def ntk_frequencies(
    positions: Tensor, exponents: Tensor, base: float, factor: float, length: int
) -> Tensor:
    """Rotary frequencies [R/2] of a base that grows once `positions` [B, S] pass `length`.

    `exponents` [R/2] are 2i / R. The order of the operations is transformers', since the angle of
    a late position shows every rounding.

    Source: Peng et al., YaRN, arXiv 2309.00071, appendix B.2 (dynamic NTK).
    """
    longest = (positions.max() + 1).clamp(min=length).to(exponents.dtype)
    stretch = factor * longest / length - (factor - 1)
    rotated = 2 * exponents.shape[0]
    return 1.0 / (base * stretch ** (rotated / (rotated - 2))) ** exponents


def rope_table(positions: Tensor, inv_freq: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, R/2] of the angles `positions` [B, S] times `inv_freq` [R/2].

    Source: Su et al., RoFormer, arXiv 2104.09864, section 3.2; `scale` is YaRN's attention
    factor (arXiv 2309.00071).
    """
    angles = positions[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos() * scale, angles.sin() * scale


def axial_rope_table(
    positions: Tensor, inv_freq: Tensor, time: int, height: int, width: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`rope_table` of positions [3, B, S], each axis with frequencies of its own.

    Source: Wang et al., Qwen2-VL, arXiv 2409.12191, section 2.1.

    Args:
        positions: In time, height and width; [B, S] where all three are one.
        time, height, width: How many frequencies turn with each axis, in this order.
    """
    if positions.dim() == 2:
        return rope_table(positions, inv_freq, scale)
    angles = positions[..., None].to(inv_freq.dtype) * inv_freq
    parts = angles.split((time, height, width), -1)
    angles = torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
    return angles.cos() * scale, angles.sin() * scale


def picture_numbers(own: Tensor) -> Tensor:
    """Return which run of True each place of bool [..., S] belongs to, from 0 on; -1 elsewhere."""
    starts = own & ~F.pad(own[..., :-1], (1, 0))
    return torch.where(own, starts.long().cumsum(-1) - 1, -1)


def picture_mask(pictures: Tensor, tokens: Tensor, window: int | None = None) -> Tensor:
    """An attention's bias [B, 1, S, T] by which the tokens of a picture see each other both ways.

    Args:
        pictures: int [B, T], the picture that a token belongs to, negative for none.
        tokens: [B, S], the newest; only the shape counts.
        window: Of all that a token would see, the keys after its window-th last.
    """
    keys, queries = pictures.shape[1], tokens.shape[1]
    key = torch.arange(keys, device=pictures.device)
    query = key[keys - queries :, None]
    own = pictures[:, keys - queries :, None]
    seen = (key <= query) | ((own == pictures[:, None]) & (own >= 0))
    if window is not None:
        seen = seen & (key > query - window)
    blocked = torch.where(seen, 0.0, float("-inf"))
    return blocked[:, None]


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, heads_first: bool = True
) -> Tensor:
    """Rotate the first R features of each head of `x`; the others pass.

    Args:
        x: [B, H, S, D] where `heads_first`, else [B, S, H, D].
        cos, sin: [B, S, R/2].
        interleaved: Pairs are neighbours (0,1), (2,3), ... rather than halves (0,R/2), ...
    """
    axis = 1 if heads_first else 2
    cos, sin = cos.unsqueeze(axis).to(x.dtype), sin.unsqueeze(axis).to(x.dtype)
    rotated = 2 * cos.shape[-1]
    head, tail = x[..., :rotated], x[..., rotated:]
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
        head = pairs.flatten(-2)
    else:
        first, second = head.chunk(2, -1)
        head = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return head if tail.shape[-1] == 0 else torch.cat((head, tail), -1)


def rope_pair(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_right: Tensor | None = None,
    k_right: Tensor | None = None,
    interleaved: bool = False,
    heads_first: bool = True,
) -> tuple[Tensor, Tensor]:
    """`rope` of queries and keys, each times a factor [D, D] where there are both."""
    options = (cos, sin, interleaved, heads_first)
    turned = rope(q, *options), rope(k, *options)
    if q_right is None or k_right is None:
        return turned
    return turned[0] @ q_right, turned[1] @ k_right


def allowed_keys(
    query_count: int,
    mask: Tensor | None,
    key_count: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    device: torch.device,
    kv_lens: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query may see: bool, broadcastable to [B, H, S, T]; None means all.

    Query i stands at cache index T - S + i, or with `kv_lens` [B] in place of T, behind which
    there are no keys. `mask` [B, T] is nonzero where a key is a real token. `window` keeps the
    last `window` keys including the query's own, `chunk` those of the query's own chunk of that
    length, `seen` those for which it holds.
    """
    if query_count == 1 and kv_lens is None:
        causal = False  # the newest token sees all keys, and needs no mask for it
    allowed: Tensor | None = None
    if causal or window is not None or chunk is not None or kv_lens is not None:
        end = key_count if kv_lens is None else kv_lens[:, None, None]
        query = torch.arange(query_count, device=device)[:, None] + (end - query_count)
        key = torch.arange(key_count, device=device)
        allowed = key <= query if causal else (key < end).expand_as(key <= query)
        if window is not None:
            allowed = allowed & (key > query - window)
        if chunk is not None:
            allowed = allowed & (key // chunk == query // chunk)
        allowed = allowed[None, None] if kv_lens is None else allowed[:, None]
    if mask is not None:
        real = mask.bool()[:, None, None, :]
        allowed = real if allowed is None else allowed & real
    if seen is not None:
        allowed = seen if allowed is None else allowed & seen
    return allowed


def selected_keys(selected_blocks: Tensor, page: int, key_count: int, groups: int) -> Tensor:
    """Which keys lie in pages that are selected: bool [B, H, 1, T], or 1 in place of B or H.

    Args:
        selected_blocks: int [B, G, M], or 1 in place of B or G: numbers of pages of a row, each at
            most once and in any order. A negative one names no page, and nor does one behind the
            last key.
        page: Keys of a page.
        key_count: T.
        groups: Query heads that share a key head.
    """
    pages = -(-key_count // page)
    named = selected_blocks.long()
    # One more column for what names none.
    named = torch.where((named >= 0) & (named < pages), named, pages)
    chosen = torch.zeros(*named.shape[:2], pages + 1, dtype=torch.bool, device=named.device)
    chosen = chosen.scatter(2, named, True)[..., :pages]
    if chosen.shape[1] > 1:
        chosen = chosen.repeat_interleave(groups, 1)
    return chosen.repeat_interleave(page, -1)[:, :, None, :key_count]


def alibi(slopes: Tensor, mask: Tensor) -> Tensor:
    """ALiBi bias [B, H, 1, T]: `slopes` [H] times each key's position among the real tokens.

    Equal to the bias by distance, since softmax ignores what a whole row shares.
    Source: Press et al., arXiv 2108.12409, section 3.
    """
    real = mask.to(slopes.dtype)
    positions = (real.cumsum(-1) - 1) * real
    return slopes[None, :, None, None] * positions[:, None, None, :]


def masked_scores(
    q: Tensor,
    k: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """cap(q k^T scale) + bias [B, H, S, T], with -inf where `allowed` is not."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, 1) if groups > 1 else k
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    return scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))


def shared_by_heads(x: Tensor, groups: int) -> Tensor:
    """[B, G, T, D] -> [B, G * groups, T, D]: a copy, but a view where G is 1."""
    B, G, T, D = x.shape
    return x[:, :, None].expand(B, G, groups, T, D).reshape(B, G * groups, T, D)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, *, is_causal: bool, scale: float
) -> Tensor:
    """torch's scaled_dot_product_attention with grouped heads, by a fused kernel if there is one.

    On a GPU only the flash kernel takes fewer heads of keys than of queries, and it takes neither
    masks, nor fp32, nor wide heads: without a copy of the keys such a call would write all scores.
    For a single query, that copy would cost more than its scores; the heads of a group are its
    queries then, which all kernels take.
    """
    groups = q.shape[1] // k.shape[1]
    alike = added is None or (added.dim() == 4 and added.shape[1] == 1)
    if q.is_cuda and groups > 1 and q.shape[2] == 1 and alike and not is_causal:
        grouped = q.unflatten(1, (-1, groups))[:, :, :, 0]
        out = F.scaled_dot_product_attention(grouped, k, v, added, scale=scale)
        return out.flatten(1, 2)[:, :, None]
    flash = added is None and q.element_size() == 2 and max(q.shape[3], v.shape[3]) <= 256
    if q.is_cuda and groups > 1 and q.shape[2] > 1 and not flash:
        k, v, groups = shared_by_heads(k, groups), shared_by_heads(v, groups), 1
    return F.scaled_dot_product_attention(
        q, k, v, added, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    kv_lens: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """softmax(cap(q k^T scale) + alibi + bias) v with grouped heads; rows with no key give 0.

    Computed in the dtype of `v`: what was rotated by fp32 tables may be wider.

    Args:
        q: [B, H, S, D].
        k, v: [B, G, T, D] and [B, G, T, Dv], H a multiple of G; the S newest keys are last.
        mask: [B, T], nonzero at real tokens.
        bias: Additive, broadcastable to [B, H, S, T].
        slopes: [H], see `alibi`.
        sinks: [H], one more logit per head that takes part in the softmax and carries no value.
        kv_lens: int [B]: keys of each row, the queries' own last, where T is room for more.
        seen: bool, broadcastable to [B, H, S, T]: without which a query does not see a key.

    Returns:
        [B, H, S, Dv].
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    S, T = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    extras = (mask, bias, slopes, softcap, sinks, chunk, kv_lens, seen)
    if causal and S == T and all(e is None for e in extras) and (window is None or window >= T):
        # A mask would keep torch from its fastest kernels.
        return sdpa(q, k, v, None, is_causal=True, scale=scale)
    rows = 512
    uncut = (bias, chunk, kv_lens, seen)
    if causal and rows < S and not q.is_cuda and all(e is None for e in uncut):
        # On a CPU, scores of keys that no query of a part sees would be computed all the same.
        parts = []
        for start in range(0, S, rows):
            stop = min(start + rows, S)
            end = T - S + stop
            first = 0 if window is None else max(0, T - S + start - window + 1)
            real = None if mask is None else mask[:, first:end]
            part = attention(
                q[:, :, start:stop], k[:, :, first:end], v[:, :, first:end], real,
                slopes=slopes, sinks=sinks, scale=scale, window=window, softcap=softcap,
            )  # fmt: skip
            parts.append(part)
        return torch.cat(parts, 2)
    allowed = allowed_keys(S, mask, T, causal, window, chunk, q.device, kv_lens, seen)
    if slopes is not None:
        slope_bias = alibi(slopes, q.new_ones(q.shape[0], T) if mask is None else mask)
        bias = slope_bias if bias is None else bias + slope_bias
    bias = None if bias is None else bias.to(q.dtype)
    if softcap is None and sinks is None:
        if bias is not None and allowed is not None:
            bias = torch.where(allowed, bias, float("-inf"))
        added = allowed if bias is None else bias
        out = sdpa(q, k, v, added, is_causal=False, scale=scale)
        if added is None or (mask is None and bias is None and seen is None):
            return out
        empty = ~added if bias is None else added == float("-inf")
        return out.masked_fill(empty.all(-1, keepdim=True), 0.0)
    scores = masked_scores(q, k, allowed, bias, scale, softcap)
    v = v.repeat_interleave(groups, 1) if groups > 1 else v
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks[None, :, None, None].to(scores.dtype))
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[None, :, None, None].to(scores.dtype) - top)
    return (weights / total.masked_fill(total == 0, 1.0)) @ v


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    ring: int | None = None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`attention` that also sees the keys and values of the tokens before.

    Args:
        q, k, v: Queries, keys and values of the S new tokens.
        past: Keys [B, G, P, D] and values [B, G, P, Dv] of the cached tokens; None if there are
            none.
        mask: [B, P + S], nonzero at real tokens.
        ring: How many of the newest keys are kept; `past` then has at most as many, and of the
            mask the newest count.
        bias, slopes, sinks, options: As for `attention`, with T = P + S.

    Returns:
        The output [B, H, S, Dv], and the cache: keys [B, G, P + S, D] and values
        [B, G, P + S, Dv], of both at most `ring` tokens.
    """
    k = k.to(v.dtype)
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    if ring is not None and mask is not None:
        mask = mask[:, -k.shape[2] :]
    out = attention(q, k, v, mask, bias, slopes, sinks, **options)
    return out, ((k, v) if ring is None else (k[:, :, -ring:], v[:, :, -ring:]))


def picture_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    pictures: Tensor | None,
    window: int | None = None,
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`cached_attention` in which the tokens of one picture see each other both ways.

    Args:
        pictures: int [B, P + S], as for `picture_mask`; None where there is no picture.
        window: As for `attention`, also among the tokens of a picture.
    """
    if pictures is None:
        return cached_attention(
            q, k, v, past, mask, bias, slopes, sinks, window=window, **options
        )  # fmt: skip
    held = 0 if past is None else past[0].shape[2]
    # Of a ring the newest keys are at hand.
    both_ways = picture_mask(pictures[:, -held - k.shape[2] :], q[:, 0, :, 0], window)
    bias = both_ways if bias is None else bias + both_ways
    options["causal"] = False
    return cached_attention(q, k, v, past, mask, bias, slopes, sinks, **options)


def attention_statistics(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    page_max: int | None = None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    kv_lens: Tensor | None = None,
    seen: Tensor | None = None,
    selected_blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What merges attentions over parts of the keys, and what ranks parts of the keys.

    Args:
        page_max: How many neighbouring keys have a maximum together; None for no maxima.
        kv_lens, seen: As for `attention`.
        selected_blocks: See `selected_keys`; `seen` is what it gives.

    Returns:
        The log-sum-exp [B, H, S] of each row's scores, sinks included, -inf where there are none;
        and the largest score of every page, [B, H, S, ceil(T / page_max)], or of every selected
        one, [B, H, S, M], -inf where nothing is seen. Both in fp32 at least.
    """
    q, k = (x if x.dtype in (torch.float32, torch.float64) else x.float() for x in (q, k))
    keys, groups = k.shape[2], q.shape[1] // k.shape[1]
    allowed = allowed_keys(q.shape[2], mask, keys, causal, window, chunk, q.device, kv_lens, seen)
    if slopes is not None:
        slope_bias = alibi(slopes, q.new_ones(q.shape[0], keys) if mask is None else mask)
        bias = slope_bias if bias is None else bias + slope_bias
    scores = masked_scores(q, k, allowed, bias, scale, softcap)
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks[None, :, None].to(lse.dtype))
    if page_max is None:
        return lse, None
    # One page more, for numbers of pages that there are not.
    padded = F.pad(scores, (0, -keys % page_max + page_max), value=float("-inf"))
    maxima = padded.unflatten(-1, (-1, page_max)).amax(-1)
    if selected_blocks is None:
        return lse, maxima[..., :-1]
    named = selected_blocks.long().expand(q.shape[0], k.shape[1], -1)
    last = maxima.shape[-1] - 1
    named = torch.where((named >= 0) & (named < last), named, last)
    named = named.repeat_interleave(groups, 1)[:, :, None].expand(-1, -1, q.shape[2], -1)
    return lse, maxima.gather(-1, named)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selected_blocks: Tensor,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    page: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention` of each row's newest token, over selected pages that are gathered.

    What other pages hold is not read.

    Args:
        q: [B, H, 1, D].
        k, v: [B, G, T, D] and [B, G, T, Dv].
        selected_blocks: int [B, G, M], as for `selected_keys`.
        mask: [B, T], nonzero at real tokens.
        page: Keys of a page.

    Returns:
        The output [B, H, 1, Dv]; and as of `attention_statistics` the log-sum-exp [B, H, 1] and the
        largest score of every selected page, [B, H, 1, M].
    """
    keys, batch, heads = k.shape[2], k.shape[0], k.shape[1]
    named = selected_blocks.long().expand(batch, heads, -1)
    index = (named[..., None] * page + torch.arange(page, device=k.device)).flatten(2)
    seen = (index >= 0) & (index < keys)
    index = index.clamp(0, keys - 1)
    if mask is not None:
        seen = seen & mask.bool()[:, None].expand(-1, heads, -1).gather(2, index)
    k, v = (x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    rows = q.to(v.dtype).unflatten(1, (heads, -1))[:, :, :, 0]  # [B, G, H / G, D]
    scores = (rows @ k.transpose(-1, -2)).to(torch.promote_types(v.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen[:, :, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, heads, -1))
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = weights.to(v.dtype) @ v
    maxima = scores.unflatten(-1, (-1, page)).amax(-1)
    return (
        out.flatten(1, 2)[:, :, None],
        lse.flatten(1, 2)[..., None],
        maxima.flatten(1, 2)[:, :, None],
    )


def attention_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: tuple[Tensor, Tensor] | None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    cached: bool,
    lse: bool = False,
    page_max: int | None = None,
    ring: int | None = None,
    selected_blocks: Tensor | None = None,
    page: int | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """`cached_attention` with its optional results, over all pages of keys or selected ones.

    Args:
        cached: Whether the cache is a result.
        lse: Whether the log-sum-exp is one; see `attention_statistics`.
        page_max: Keys of a page whose largest score is one; None for no such result.
        selected_blocks, page: See `selected_keys`; None where all keys may be seen.

    Returns:
        The output, and in this order what is asked for: cache, log-sum-exp, page maxima.
    """
    k = k.to(v.dtype)
    keys = k if past is None else torch.cat((past[0], k), 2)
    if selected_blocks is not None:
        assert page is not None
        groups = q.shape[1] // k.shape[1]
        options["seen"] = selected_keys(selected_blocks, page, keys.shape[2], groups)
    out, cache = cached_attention(q, k, v, past, mask, bias, slopes, sinks, ring=ring, **options)
    found = [out, *([cache] if cached else ())]
    if not lse and page_max is None:
        return tuple(found)
    real = mask if mask is None or ring is None else mask[:, -keys.shape[2] :]
    total, maxima = attention_statistics(
        q.to(v.dtype), keys, real, bias, slopes, sinks,
        page_max=page_max, selected_blocks=selected_blocks, **options,
    )  # fmt: skip
    found += [total] if lse else []
    return tuple(found) if maxima is None else (*found, maxima)


def split_heads(x: Tensor, head_dim: int, swap: bool = True) -> Tensor:
    """[B, S, H * head_dim] to [B, H, S, head_dim]; without swap to [B, S, H, head_dim]."""
    heads = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(1, 2) if swap else heads


def merge_heads(x: Tensor, swap: bool = True) -> Tensor:
    """[B, H, S, D], or without swap [B, S, H, D], to [B, S, H * D]."""
    return (x.transpose(1, 2) if swap else x).flatten(2)


def transpose_heads(x: Tensor) -> Tensor:
    """[B, S, H, D] to [B, H, S, D], or back."""
    return x.transpose(1, 2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU."""
    return F.relu(x).square()


def act_mul(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up; `act` is one of ACTIVATIONS."""
    return ACTIVATIONS[act](gate) * up


def top_k_gating(
    router_logits: Tensor,
    selection_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    *,
    top_k: int,
    mean_active_experts: int = 0,
) -> Tensor:
    """Return the gates [..., E] of the `top_k` experts with the highest router logits, 0 of others.

    Args:
        router_logits: [..., E].
        selection_bias: [E]. The highest of softmax(router_logits) + selection_bias are chosen;
            of equal ones the first.
        gate_scale: [E]. A chosen gate is 1 + softmax(router_logits) gate_scale in place of 1.
        mean_active_experts: If not 0, experts are chosen by a threshold in place of their number:
            all of which the router logit, and selection_bias, is above 0.
    """
    wide = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    probabilities = torch.softmax(wide, -1)
    if mean_active_experts:
        ranked = router_logits if selection_bias is None else wide + selection_bias
        chosen = (ranked > 0).to(router_logits.dtype)
    else:
        ranked = router_logits if selection_bias is None else probabilities + selection_bias
        order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        chosen = torch.zeros_like(router_logits).scatter(-1, order, 1.0)
    if gate_scale is None:
        return chosen
    return chosen * (1 + probabilities * gate_scale).to(chosen.dtype)


def route(
    x: Tensor,
    weight: Tensor,
    router_bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    *,
    top_k: int,
    mean_active_experts: int = 0,
) -> Tensor:
    """Return `top_k_gating` of the router logits x weight^T + router_bias.

    Args:
        x: [..., N].
        weight: [E, N].
        router_bias, selection_bias, gate_scale: [E].
    """
    return top_k_gating(
        linear(x, weight, router_bias),
        selection_bias,
        gate_scale,
        top_k=top_k,
        mean_active_experts=mean_active_experts,
    )


def experts(
    x: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """The sum of experts by their gates, every neuron computed and those of no gate put to 0.

    Args:
        x: [..., N].
        gates: [..., E].
        up, gate: [E m, N], the experts' neurons side by side; without `gate` one is act(up x).
        down: [N', E m].
    """
    hidden = linear(x, up, up_bias)
    hidden = act(hidden) if gate is None else act(linear(x, gate, gate_bias)) * hidden
    by_expert = hidden.unflatten(-1, (gates.shape[-1], -1))
    return linear((by_expert * gates.to(hidden.dtype)[..., None]).flatten(-2), down)


def moe(
    x: Tensor,
    gates: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
    shared_gate: Tensor | None = None,
    shared_up_bias: Tensor | None = None,
    shared_gate_bias: Tensor | None = None,
    shared_down_bias: Tensor | None = None,
    *,
    act: str,
    active: int,
) -> Tensor:
    """The sum of `experts` and of a feed-forward part that every token runs, if there is one.

    Args:
        shared_up, shared_gate: [M, N].
        shared_down: [N', M].
        act: One of ACTIVATIONS.
        active: How many gates of a token are not 0, at most.
    """
    routed = experts(x, gates, up, down, gate, up_bias, gate_bias, act=ACTIVATIONS[act])
    if shared_up is None or shared_down is None:
        return routed
    hidden = linear(x, shared_up, shared_up_bias)
    if shared_gate is None:
        hidden = ACTIVATIONS[act](hidden)
    else:
        hidden = act_mul(linear(x, shared_gate, shared_gate_bias), hidden, act)
    return linear(hidden, shared_down, shared_down_bias) + routed


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return torch.tanh(x / cap) * cap


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
}
"""The activations of `act_mul` and `experts`, by their names as ops."""
