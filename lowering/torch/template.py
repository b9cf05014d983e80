"""The parts of `model.py` that are the same for every model."""

UNDER = '''
def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by what comes behind it."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
'''

LOAD = '''
def load(
    folder: str | Path = Path(__file__).parent,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Model:
    """Return the model with the weights of `folder`, ready to run.

    Args:
        folder: Where `model.safetensors` is.
        dtype: Of the weights; None leaves them as they are stored. Constants keep theirs, since
            rotary frequencies lose too much in 16 bits.
    """
    weights: dict[str, Tensor] = {}
    with safe_open(Path(folder) / "model.safetensors", "pt", device=str(device)) as file:
        for name in file.keys():
            value = file.get_tensor(name)
            if name in CONSTANTS:
                weights[name] = nn.Buffer(value)
                continue
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            weights[name] = nn.Parameter(value, requires_grad=False)
    return Model(weights).eval()
'''

CACHED = '''
@torch.no_grad()
def generate(model: Model, ids: list[int], count: int, stop: Collection[int] = ()) -> list[int]:
    """Return up to `count` tokens that follow `ids`, the likeliest each time.

    A token of `stop` ends the text and is not part of it.
    """
    device = next(model.parameters()).device
    made: list[int] = []
    new, cache = ids, model.empty_cache()
    while len(made) < count:
        logits, cache = model(torch.tensor([new], device=device), cache=cache)
        new = [int(logits[0, -1].argmax())]
        if new[0] in stop:
            break
        made += new
    return made
'''

UNCACHED = '''
@torch.no_grad()
def generate(model: Model, ids: list[int], count: int, stop: Collection[int] = ()) -> list[int]:
    """Return up to `count` tokens that follow `ids`, the likeliest each time.

    A token of `stop` ends the text and is not part of it. This model has no cache: every step
    runs the whole text again.
    """
    device = next(model.parameters()).device
    made: list[int] = []
    while len(made) < count:
        logits, _ = model(torch.tensor([ids + made], device=device))
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        made.append(token)
    return made
'''

MAIN = """
def main() -> None:
    parser = argparse.ArgumentParser(description="Go on from token ids, or from a text.")
    parser.add_argument("ids", nargs="*", type=int, help="token ids")
    parser.add_argument("--prompt", help="a text instead; needs the package tokenizers")
    parser.add_argument("--new", type=int, default=16, help="how many tokens to add")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    ids, decode = options.ids, None
    if options.prompt is not None:
        path = Path(__file__).with_name("tokenizer.json")
        if not path.is_file() or importlib.util.find_spec("tokenizers") is None:
            parser.error("--prompt needs tokenizer.json here, and the package tokenizers")
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        ids, decode = tokenizer.encode(options.prompt).ids, tokenizer.decode
    if not ids:
        parser.error("give token ids, or --prompt TEXT")
    dtype = getattr(torch, options.dtype) if options.dtype else None
    made = generate(load(device=options.device, dtype=dtype), ids, options.new, END)
    print(decode(made) if decode else " ".join(map(str, made)))


if __name__ == "__main__":
    main()
"""
