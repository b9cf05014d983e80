"""The parts of `model.py` for prompts of embeddings, of a model that sees."""

from __future__ import annotations

from graphopt.lowering.torch.text import ANSWERS_COLLECTED

TOWER = '''
def tower(model: Model, folder: str | Path = Path(__file__).parent) -> Any:
    """Return what makes embeddings of pictures and text, by transformers' own tower and projector.

    Their weights are those of the model's source, in `folder`. `tower(model).prompt(text, [path])`
    gives what `generate` takes of a prompt, and `tower(model).embeddings(**inputs)` the same of
    what transformers' processor makes. Needs transformers, and pillow where files are read.
    """
    return package(Path(__file__).with_name("pictures")).Pictures(model, Path(folder))
'''

_CHECKED = '''
def behind(mask: Tensor | None, embeds: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mask [B,S] of prompts, and the position [B] of the token behind each.

    Raises:
        ValueError: A prompt is padded behind, or masks and embeddings do not fit.
    """
    B, S = embeds.shape[:2]
    mask = torch.ones(B, S, dtype=torch.long, device=embeds.device) if mask is None else mask
    if mask.shape != (B, S) or not mask[:, -1].all():
        raise ValueError(f"attention_mask is {[*mask.shape]}: give [{B},{S}], padded in front")
    if places is None:
        return mask, mask.sum(-1)
    places = places if places.dim() == 2 else places.amax(0)
    return mask, places.masked_fill(mask == 0, -1).amax(-1) + 1
'''

_STEPS_BEHIND = '''@torch.no_grad()
def steps_behind(
    model: Model, prompt: dict[str, Tensor | None], count: int
) -> Iterator[list[int]]:
    """Yield the likeliest next token of every text, `count` times, behind prompts of embeddings.
'''

_GROWING = '''
    Args:
        prompt: What `Model.forward` takes of them.
    """
    mask, next_place = behind(
        prompt["attention_mask"], prompt["inputs_embeds"], prompt["position_ids"]
    )
    cache = model.empty_cache(len(mask))
    new = prompt | {"attention_mask": mask if not mask.all() else None}
    for number in range(count):
        logits, cache = model(**new, cache=cache)
        token = logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), -1)
        # A new token is text: it sees all before it, and its positions are one in every axis.
        places = (next_place + number)[:, None]
        new = {"input_ids": token, "attention_mask": mask, "position_ids": places}
        yield token[:, 0].tolist()
'''

_UNCACHED = '''
    This model has no cache: every step runs every text again.

    Args:
        prompt: What `Model.forward` takes of them.
    """
    mask, next_place = behind(
        prompt["attention_mask"], prompt["inputs_embeds"], prompt["position_ids"]
    )
    whole = prompt | {"attention_mask": mask}
    if whole["position_ids"] is None:
        whole["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    for number in range(count):
        logits, _ = model(**whole)
        token = logits[:, -1:].argmax(-1)
        places = (next_place + number)[:, None]
        row = {
            "inputs_embeds": model.token_rows(token).to(whole["inputs_embeds"].dtype),
            "attention_mask": mask.new_ones(len(mask), 1),
            "position_ids": places.expand(*whole["position_ids"].shape[:-1], 1),
            "pictures": torch.full_like(token, -1),
        }
        for name, value in whole.items():
            if value is not None:
                axis = 1 if name == "inputs_embeds" else -1
                whole[name] = torch.cat((value, row[name]), axis)
        yield token[:, 0].tolist()
'''

_STATIC = '''
    Args:
        prompt: What `Model.forward` takes of them.
    """
    mask, _ = behind(prompt["attention_mask"], prompt["inputs_embeds"], prompt["position_ids"])
    decoder = Decoder(model, mask.shape[1] + max(count, 1), len(mask))
    if count > 0:
        yield decoder.look(**prompt | {"attention_mask": mask})
        yield from decoder.steps(count - 1)
'''

_PARTS = {"growing": _GROWING, "static": _STATIC, "uncached": _UNCACHED}

_GENERATE = '''
def generate(
    model: Model,
    ids: list[int] | list[list[int]] | None = None,
    count: int = 16,
    stop: Collection[int] = (),
{arena}    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
{pictures}) -> list[int] | list[list[int]]:
    """Return up to `count` tokens that follow a prompt, the likeliest each time.

    A token of `stop` ends a text and is not part of it. A list of texts gives a list of answers;
    their lengths may differ.{about_arena}

    Args:
        ids: Token ids of a text, or of several.
        inputs_embeds: [B,S,{width}] in the place of `ids`, as `tower` makes them of text and
            pictures, the shorter prompts padded in front. The result is a list of B answers.
        attention_mask: int64 [B,S] beside them, 0 at padding; all ones by default.
        position_ids: {about_positions}
{about_pictures}
    Raises:
        ValueError: There is no text or embedding, a text is empty, prompts do not fit, or the model
            has too few positions.
    """
    if (ids is None) == (inputs_embeds is None):
        raise ValueError("give either ids or inputs_embeds")
    if inputs_embeds is not None:
{no_arena}        several, batch, longest = True, *inputs_embeds.shape[:2]
    else:
        several = len(ids) > 0 and isinstance(ids[0], list)
        texts = ids if several else [ids]
        batch, longest = len(texts), max(map(len, texts))
        if not all(texts):
            raise ValueError("a text without tokens: give every text at least one")
    if POSITIONS is not None and longest + count > POSITIONS:
        raise ValueError(f"{longest} tokens and {count} more: the model has {POSITIONS} positions")
    if inputs_embeds is not None:
        prompt = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
{given}        }
        following = steps_behind(model, prompt, count)
    else:
        following = steps(model, texts, count{argument})
    answers: list[list[int]] = [[] for _ in range(batch)]
    ended = [False for _ in range(batch)]
    for tokens in following:
{collected}'''

_ABOUT_ARENA = """ With `arena`, which `arena_for` makes,
    steps behind token ids write their results where those before did."""
_NO_ARENA = """        if arena is not None:
            raise ValueError("an arena takes steps behind token ids: leave it out")
"""
_AXES = "int64 [3,B,S] beside them, in time, height and width, or [B,S] for text."
_COUNTED = "int64 [B,S] beside them; by default how many real tokens precede each."


def steps_behind(kind: str) -> str:
    """Return what takes steps behind prompts of embeddings.

    Args:
        kind: How keys and values are kept: `growing`, `static`, in memory of fixed room, or
            `uncached`.
    """
    return f"{_CHECKED.strip()}\n\n\n{_STEPS_BEHIND}{_PARTS[kind].rstrip()}"


def generate(width: int, axes: bool, both_ways: bool, with_arena: bool) -> str:
    """Return `generate` of a model that sees; see `Sees`.

    Args:
        with_arena: Whether steps may have an arena.
    """
    about_pictures = (
        "        pictures: int64 [B,S] beside them, which picture each token belongs to, negative "
        "for none;\n            by default there is none.\n"
    )
    text = _GENERATE
    for place, value in {
        "arena": "    arena: Any = None,\n" if with_arena else "",
        "about_arena": _ABOUT_ARENA if with_arena else "",
        "no_arena": _NO_ARENA if with_arena else "",
        "argument": ", arena" if with_arena else "",
        "pictures": "    pictures: Tensor | None = None,\n" if both_ways else "",
        "about_pictures": about_pictures if both_ways else "",
        "given": '            "pictures": pictures,\n' if both_ways else "",
        "about_positions": _AXES if axes else _COUNTED,
        "width": str(width),
        "collected": ANSWERS_COLLECTED,
    }.items():
        text = text.replace(f"{{{place}}}", value)
    return text


OPTION = """    parser.add_argument(
        "--image", action="append", help="a picture that the prompt is about, may be repeated"
    )
"""
SEEN = """    if options.image:
        if options.prompt is None:
            parser.error("--image goes with --prompt")
        dtype = getattr(torch, options.dtype) if options.dtype else None
        model = load(device=options.device, dtype=dtype)
        eyes = tower(model)
        try:
            prompt = eyes.prompt(options.prompt, options.image, raw=options.raw)
            count = 128 if options.new is None else options.new
            if options.new is None and POSITIONS is not None:
                count = max(min(count, POSITIONS - prompt["inputs_embeds"].shape[1]), 0)
            (made,) = generate(model, count=count, stop=END, **prompt)
        except (ImportError, ValueError, eyes.Error) as error:
            parser.error(str(error))
        print(plain_text(eyes.tokenizer.decode(made, skip_special_tokens=True)))
        return
"""
