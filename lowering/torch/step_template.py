"""The parts of `model.py` that run step after step: with a cache that grows, or has room."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.lowering.torch.text import series

_STEPS = "def steps(model: Model, texts: list[list[int]], count: int) -> Iterator[list[int]]:"
_STEPS_WITH_ARENA = """def steps(
    model: Model, texts: list[list[int]], count: int, arena: Any = None
) -> Iterator[list[int]]:"""

_CACHED = '''
@torch.no_grad()
{steps}
    """Yield the likeliest next token of every text, `count` times, with a cache that grows."""
{begin}    device = next(model.parameters()).device
    longest, cache = max(map(len, texts)), model.empty_cache(len(texts))
    # Padded in front, so that the newest token of every text is the last one.
    pads = [longest - len(text) for text in texts]
    new = torch.tensor([[0] * pad + text for pad, text in zip(pads, texts)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    for number in range(count):
        # Attention is faster without a mask, which prompts of one length do not need.
        logits, cache = model(new, mask if number or any(pads) else None, cache=cache)
        new = logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, mask.new_ones(len(texts), 1)), -1)
        yield new[:, 0].tolist()
'''

_BEGIN = """    if arena is not None:
        yield from steps_in_arena(model, texts, count, arena)
        return
"""

_ARENA = '''
def arena_for(model: Model) -> Any:
    """Return a buffer for what steps of `model` compute; `arena/arena.py` says how it works."""
    return package(Path(__file__).with_name("arena")).Arena(next(model.parameters()).device)
'''

_IN_ARENA = '''
@torch.no_grad()
def steps_in_arena(
    model: Model, texts: list[list[int]], count: int, arena: Any
) -> Iterator[list[int]]:
    """Yield what `steps` does. Keys and values have room for the whole texts, and grow in it."""
    device = next(model.parameters()).device
    longest, empty = max(map(len, texts)), model.empty_cache(len(texts))
    pads, room = [longest - len(text) for text in texts], longest + count
    prompt = torch.tensor([[0] * pad + text for pad, text in zip(pads, texts)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (room - pad) for pad in pads], device=device)
    rooms = [(arena.room(k, room), arena.room(v, room)) for k, v in empty]
    token = torch.zeros_like(prompt[:, :1])

    def step(P: int) -> Tensor:
        new, masked = token if P else prompt, P or any(pads)
{past}
        logits, _ = model(new, mask[:, : P + new.shape[1]] if masked else None, cache=cache)
        return logits[:, -1:].argmax(-1)

    for number in range(count):
        if number == 0:
            sizes = " x ".join(map(str, prompt.shape))
            padded = ["padded"] if any(pads) else []
            new = arena.run(("prefill", sizes, "tokens", *padded), step)
        else:
            # Before the last step, two of the tokens that there is room for are still to come.
            key = ("decode", f"{len(texts)} x 1", "token")
            new = arena.run(key, step, longest + number - 1, room - 2)
        token.copy_(new)
        yield token[:, 0].tolist()
'''

_PAST = "        cache = [(k[:, :, :P], v[:, :, :P]) for k, v in rooms]"
_PAST_IN_RINGS = """        starts = [max(P - ring, 0) for ring in {rings}]
        cache = [(k[:, :, i:P], v[:, :, i:P]) for i, (k, v) in zip(starts, rooms)]"""
_ALL = 2**31
"""More tokens than a text has: the ring of a layer that keeps all."""

_STATIC = '''
class Decoder(kernels.Decoder):
    """Greedy decoding in a cache with room for a whole text, or for several at once."""

    positions, records, last_alone = POSITIONS, RECORDS, {last_alone}
    reads_room = not kernels.PLANS
{sees}

{steps}
    """Yield the likeliest next token of every text, `count` times."""
    decoder = Decoder(model, max(map(len, texts)) + max(count, 1), len(texts){argument})
    if count > 0:
        yield decoder.start(texts)
        yield from decoder.steps(count - 1)
'''

UNCACHED = '''
@torch.no_grad()
def steps(model: Model, texts: list[list[int]], count: int) -> Iterator[list[int]]:
    """Yield the likeliest next token of every text, `count` times.

    {why}: every step runs every text again.
    """
    device = next(model.parameters()).device
    texts = [list(text) for text in texts]
    for _ in range(count):
        for text in texts:
            logits, _ = model(torch.tensor([text], device=device))
            text.append(int(logits[0, -1].argmax()))
        yield [text[-1] for text in texts]
'''


def growing(rings: Sequence[int | None], with_arena: bool) -> str:
    """Return `steps` of a model whose cache grows.

    Args:
        rings: Of each layer how many of the newest tokens it keeps, None for all.
    """
    if not with_arena:
        return _CACHED.replace("{steps}", _STEPS).replace("{begin}", "").strip()
    past = _PAST
    if any(rings):
        past = _PAST_IN_RINGS.replace("{rings}", series([str(ring or _ALL) for ring in rings]))
    parts = [
        _ARENA,
        _IN_ARENA.replace("{past}", past),
        _CACHED.replace("{steps}", _STEPS_WITH_ARENA).replace("{begin}", _BEGIN),
    ]
    return "\n\n\n".join(part.strip() for part in parts)


def static(with_arena: bool, last_alone: bool, *, sees: bool = False) -> str:
    """Return `steps` of a model with caches of fixed room.

    Args:
        last_alone: The model can be asked for the logits of one token of each text alone.
        sees: It takes embeddings in the place of ids.
    """
    whole = _STATIC.replace("{last_alone}", str(last_alone))
    whole = whole.replace("{sees}", "    sees = True\n" if sees else "")
    if not with_arena:
        return whole.replace("{steps}", _STEPS).replace("{argument}", "").strip()
    text = whole.replace("{steps}", _STEPS_WITH_ARENA).replace("{argument}", ", arena")
    return f"{_ARENA.strip()}\n\n\n{text.strip()}"
