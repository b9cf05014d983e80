"""The parts of `model.py` that are the same for every model."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.lowering.torch import sees_template
from graphopt.lowering.torch.text import ANSWERS_COLLECTED

PACKAGE = '''
def package(folder: Path) -> ModuleType:
    """Import a folder of modules under a name of its own, whatever else is called so."""
    name = f"kernels_{abs(hash(folder.resolve())):x}"
    place = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        name, place, submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} cannot be imported: compile the model again")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
'''

_KERNELS = """
kernels = package(Path(__file__).with_name("kernels"))
{names}
DEVICE = "{device}" if hasattr(torch, "{device}") and torch.{device}.is_available() else "cpu"
"""


def kernels(device: str, names: Sequence[str]) -> str:
    """Return what imports functions of the kernels, and the device they are for."""
    lines = "\n".join(f"{name} = kernels.{name}" for name in names)
    return _KERNELS.replace("{device}", device).replace("{names}", lines)


RANKS = """
ranks = package(Path(__file__).with_name("ranks"))
Split = ranks.Split
"""

AT = '''
def at(last: Tensor, x: Tensor | None) -> Tensor | None:
    """Return [B,1,...] of `x` [B,S,...]: of each text one token."""
    return None if x is None else x[torch.arange(len(last), device=x.device), last][:, None]
'''

POLICIES = """
policies = package(Path(__file__).with_name("policies"))
policy_attention, policy_of = policies.cached_policy_attention, policies.policy_of
"""

_READ_AGAIN = '''
def steps_read_again(
    model: Model, texts: list[list[int]], count: int{parameter}
) -> Iterator[list[int]]:
    """Yield what `steps` does, and read every text again when the longest passes {switch} tokens.

    Keys lie in the cache as they were rotated, with LongRoPE's frequencies of short texts.
    """
    within = {switch} + 1 - max(map(len, texts))
    if not 0 < within < count:
        yield from steps(model, texts, count{argument})
        return
    texts = [list(text) for text in texts]
    for tokens in steps(model, texts, within{argument}):
        for text, token in zip(texts, tokens):
            text.append(token)
        yield tokens
    yield from steps(model, texts, count - within{argument})
'''

_GENERATE = '''
{signature}
    """Return up to `count` tokens that follow `ids`, the likeliest each time.

    A token of `stop` ends a text and is not part of it. A list of texts gives a list of answers;
    their lengths may differ.{about}

    Raises:
        ValueError: There is no text, one is empty, or the model has too few positions.
    """
{agreed}    several = len(ids) > 0 and isinstance(ids[0], list)
    texts = ids if several else [ids]
    longest = max(map(len, texts))
    if not all(texts):
        raise ValueError("a text without tokens: give every text at least one")
    if POSITIONS is not None and longest + count > POSITIONS:
        raise ValueError(f"{longest} tokens and {count} more: the model has {POSITIONS} positions")
    answers: list[list[int]] = [[] for _ in texts]
    ended = [False for _ in texts]
    for tokens in {steps}(model, texts, count{argument}):
{collected}'''


_SIGNATURE = """def generate(
    model: Model, ids: list[int] | list[list[int]], count: int, stop: Collection[int] = ()
) -> list[int] | list[list[int]]:"""

_SIGNATURE_WITH_ARENA = """def generate(
    model: Model,
    ids: list[int] | list[list[int]],
    count: int,
    stop: Collection[int] = (),
    arena: Any = None,
) -> list[int] | list[list[int]]:"""

_ABOUT_ARENA = """ With `arena`, which `arena_for` makes,
    steps write their results where those before did."""


_AGREED = """    # All ranks go on from the first one's texts, so that they take the same steps.
    ids, count, stop = ranks.joined().of_first((ids, count, stop))
"""


def generate(switch: int | None, with_arena: bool, of_ranks: bool = False) -> str:
    """Return `generate`, and what it needs.

    Args:
        switch: Behind how many tokens frequencies change, if they do.
        with_arena: Whether steps may have an arena.
        of_ranks: Of a model for several ranks.
    """
    text = _GENERATE.replace("{collected}", ANSWERS_COLLECTED)
    text = text.replace("{steps}", "steps" if switch is None else "steps_read_again")
    if switch is not None:
        text = _READ_AGAIN.replace("{switch}", str(switch)) + "\n" + text
    for place, value in {
        "signature": _SIGNATURE_WITH_ARENA if with_arena else _SIGNATURE,
        "about": _ABOUT_ARENA if with_arena else "",
        "agreed": _AGREED if of_ranks else "",
        "parameter": ", arena: Any = None" if with_arena else "",
        "argument": ", arena" if with_arena else "",
    }.items():
        text = text.replace(f"{{{place}}}", value)
    return text


PROMPT = '''
def encode(folder: Path, prompt: str, raw: bool = False) -> tuple[list[int], Any]:
    """Return the token ids of a prompt, and the tokenizer of `folder`, which decodes others.

    The prompt is put into the chat template of the folder, if there is one.

    Args:
        raw: Go on from the text as it is, without the template.

    Raises:
        ValueError: The template cannot be applied.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = folder / "chat_template.jinja"
    if raw or not template.is_file():
        return tokenizer.encode(prompt).ids, tokenizer
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            entries = json.loads((folder / name).read_text(encoding="utf-8"))
            for key, value in entries.items():
                value = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(value, str):
                    special[key] = value
    turns = [{"role": "user", "content": prompt}]
    text = chat_text(template.read_text(encoding="utf-8"), turns, special)
    # A template writes the special tokens itself.
    return tokenizer.encode(text, add_special_tokens=False).ids, tokenizer
'''

_MAIN = """
def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a prompt, or go on from token ids.")
    parser.add_argument("ids", nargs="*", type=int, help="token ids")
    parser.add_argument("--prompt", help="a text instead; needs the package tokenizers")
    parser.add_argument("--raw", action="store_true", help="without the chat template")
    parser.add_argument("--new", type=int, help="tokens to add: 16, or 128 to a prompt")
    parser.add_argument("--device", default={device})
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
{option}    options = parser.parse_args()
{seen}    ids, decoder, count = options.ids, None, 16
    if options.prompt is not None:
        folder = Path(__file__).parent
        if not (folder / "tokenizer.json").is_file() or not importlib.util.find_spec("tokenizers"):
            parser.error("--prompt needs tokenizer.json here, and the package tokenizers")
        try:
            ids, decoder = encode(folder, options.prompt, options.raw)
        except ValueError as error:
            parser.error(f"the chat template cannot be applied: {error}; --raw leaves it out")
        count = 128
    if not ids:
        parser.error("give token ids, or --prompt TEXT")
    if options.new is not None:
        count = options.new
    elif POSITIONS is not None:
        count = min(count, max(POSITIONS - len(ids), 0))
    dtype = getattr(torch, options.dtype) if options.dtype else None
{made}    print(plain_text(decoder.decode(made)) if decoder else " ".join(map(str, made)))


if __name__ == "__main__":
    main()
"""


_OPTION = """    parser.add_argument(
        "--arena", action="store_true", help="reuse one buffer in all steps, and print its size"
    )
"""
_MADE = """    made = generate(load(device=options.device, dtype=dtype), ids, count, END)
"""
_LOADED = """    model = load(device=options.device, dtype=dtype)
"""
_LOADED_BY_RANK = """    try:
        model = load(device=options.device, dtype=dtype)
    except ranks.RankError as error:  # which the ranks of a host have in common
        parser.exit(2, "" if int(os.environ.get("LOCAL_RANK", 0)) else f"model.py: {error}\\n")
"""
_GENERATED = """    made = generate(model, ids, count, END)
"""
_GENERATED_IN_ARENA = """    arena = arena_for(model) if options.arena else None
    made = generate(model, ids, count, END, arena)
"""
_FIRST_ALONE = """    if ranks.joined().rank != 0:
        return
"""
_REPORT = """    if arena is not None:
        print("\\n".join(arena.report()), file=sys.stderr)
"""


def main(
    with_kernels: bool, with_arena: bool, of_ranks: bool = False, *, sees: bool = False
) -> str:
    """Return the command line of the file.

    Args:
        of_ranks: Of a model for several ranks, of which the first one prints.
        sees: Of a model that takes pictures.
    """
    made = _MADE
    if with_arena or of_ranks:
        made = _LOADED_BY_RANK if of_ranks else _LOADED
        made += _GENERATED_IN_ARENA if with_arena else _GENERATED
        made += _FIRST_ALONE if of_ranks else ""
        made += _REPORT if with_arena else ""
    text = _MAIN.replace("{device}", "DEVICE" if with_kernels else '"cpu"')
    option = sees_template.OPTION if sees else ""
    text = text.replace("{option}", option + (_OPTION if with_arena else ""))
    text = text.replace("{seen}", sees_template.SEEN if sees else "")
    return text.replace("{made}", made)
