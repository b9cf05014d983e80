"""The parts of `model.py` that are the same for every model."""

from __future__ import annotations

from collections.abc import Sequence

UNDER = '''
def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by what comes behind it."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
'''

PACK = '''
def pack(*weights: Tensor) -> tuple[nn.Parameter, list[int]]:
    """Return weights one behind the other in one, and how long each is; they become parts of it."""
    sizes = [len(weight) for weight in weights]
    whole = torch.cat(weights)
    for weight, part in zip(weights, whole.split(sizes), strict=True):
        weight.data = part
    return nn.Parameter(whole, requires_grad=False), sizes
'''

_LOAD = '''
def load(
    folder: str | Path = Path(__file__).parent,
    device: str | torch.device = {device},
    dtype: torch.dtype | None = None,
) -> Model:
    """Return the model with the weights of `folder`, ready to run.

    Args:
        folder: Where `model.safetensors` is.
        dtype: Of the weights; {default}. Constants keep theirs, since
            rotary frequencies lose too much in 16 bits.
    """
{body}    weights: dict[str, Tensor] = {{}}
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


def load(with_kernels: bool) -> str:
    """Return the function that loads the weights."""
    if not with_kernels:
        default = "None leaves them as they are stored"
        return _LOAD.format(device='"cpu"', default=default, body="")
    return _LOAD.format(
        device="DEVICE",
        default="by default DTYPE on a GPU, else float32",
        body="    if dtype is None:\n"
        '        dtype = torch.float32 if torch.device(device).type == "cpu" else DTYPE\n',
    )


_KERNELS = '''
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


kernels = package(Path(__file__).with_name("kernels"))
{names}
DEVICE = "{device}" if hasattr(torch, "{device}") and torch.{device}.is_available() else "cpu"
'''


def kernels(device: str, names: Sequence[str]) -> str:
    """Return what imports functions of the kernels, and the device they are for."""
    lines = "\n".join(f"{name} = kernels.{name}" for name in names)
    return _KERNELS.replace("{device}", device).replace("{names}", lines)


_READ_AGAIN = '''
def steps_read_again(model: Model, texts: list[list[int]], count: int) -> Iterator[list[int]]:
    """Yield what `steps` does, and read every text again when the longest passes {switch} tokens.

    Keys lie in the cache as they were rotated, with LongRoPE's frequencies of short texts.
    """
    within = {switch} + 1 - max(map(len, texts))
    if not 0 < within < count:
        yield from steps(model, texts, count)
        return
    texts = [list(text) for text in texts]
    for tokens in steps(model, texts, within):
        for text, token in zip(texts, tokens):
            text.append(token)
        yield tokens
    yield from steps(model, texts, count - within)
'''

_GENERATE = '''
def generate(
    model: Model, ids: list[int] | list[list[int]], count: int, stop: Collection[int] = ()
) -> list[int] | list[list[int]]:
    """Return up to `count` tokens that follow `ids`, the likeliest each time.

    A token of `stop` ends a text and is not part of it. A list of texts gives a list of answers;
    their lengths may differ.

    Raises:
        ValueError: There is no text, one is empty, or the model has too few positions.
    """
    several = len(ids) > 0 and isinstance(ids[0], list)
    texts = ids if several else [ids]
    longest = max(map(len, texts))
    if not all(texts):
        raise ValueError("a text without tokens: give every text at least one")
    if POSITIONS is not None and longest + count > POSITIONS:
        raise ValueError(f"{longest} tokens and {count} more: the model has {POSITIONS} positions")
    answers: list[list[int]] = [[] for _ in texts]
    ended = [False for _ in texts]
    for tokens in {steps}(model, texts, count):
        for row, token in enumerate(tokens):
            ended[row] |= token in stop
            if not ended[row]:
                answers[row].append(token)
        if all(ended):
            break
    return answers if several else answers[0]
'''


def generate(switch: int | None) -> str:
    """Return `generate`, and what it needs where frequencies change behind `switch` tokens."""
    if switch is None:
        return _GENERATE.replace("{steps}", "steps")
    again = _READ_AGAIN.replace("{switch}", str(switch))
    return again + "\n" + _GENERATE.replace("{steps}", "steps_read_again")


CACHED = '''
@torch.no_grad()
def steps(model: Model, texts: list[list[int]], count: int) -> Iterator[list[int]]:
    """Yield the likeliest next token of every text, `count` times, with a cache that grows."""
    device = next(model.parameters()).device
    longest, cache = max(map(len, texts)), model.empty_cache(len(texts))
    # Padded in front, so that the newest token of every text is the last one.
    pads = [longest - len(text) for text in texts]
    new = torch.tensor([[0] * pad + text for pad, text in zip(pads, texts)], device=device)
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    for _ in range(count):
        logits, cache = model(new, mask, cache=cache)
        new = logits[:, -1:].argmax(-1)
        mask = torch.cat((mask, mask.new_ones(len(texts), 1)), -1)
        yield new[:, 0].tolist()
'''

STATIC = '''
class Decoder:
    """Greedy decoding, in a cache with room for a whole text, or for several at once.

    On a GPU a step is recorded as a CUDA graph once and replayed: nothing is launched one by one.

    Args:
        capacity: Tokens of a prompt and of its answer together.
        batch: How many texts. Their lengths may differ.

    Attributes:
        logits: [batch, vocab], those of the next token of every text.

    Raises:
        ValueError: Such a cache holds nothing, or is longer than what the model has positions for.
    """

    def __init__(self, model: Model, capacity: int, batch: int = 1) -> None:
        if batch < 1 or capacity < 2:
            raise ValueError(
                f"a cache of {capacity} tokens for {batch} texts: there must be room for at least "
                "one text, and for 2 tokens"
            )
        if POSITIONS is not None and capacity > POSITIONS:
            raise ValueError(f"a cache of {capacity} tokens: the model has {POSITIONS} positions")
        self.model, self.capacity, self.batch = model, capacity, batch
        self.used = 0  # tokens of the longest text, known here without asking the device
        self.several = False
        device = next(model.parameters()).device
        self.length = torch.zeros(batch, dtype=torch.int32, device=device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self.cache = [
            kernels.StaticKVCache(
                k.new_zeros(batch, k.shape[1], capacity, k.shape[3]),
                v.new_zeros(batch, v.shape[1], capacity, v.shape[3]),
                self.length,
            )
            for k, v in model.empty_cache()
        ]
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def start(self, ids: list[int] | list[list[int]]) -> int | list[int]:
        """Read the prompt and return the first token of the answer; of several, a list of each.

        Raises:
            ValueError: A prompt is empty or leaves no room, or there are not `batch` of them.
        """
        self.several = len(ids) > 0 and isinstance(ids[0], list)
        texts = ids if self.several else [ids]
        if len(texts) != self.batch:
            raise ValueError(f"{len(texts)} prompts in a cache for {self.batch}")
        counts = [len(text) for text in texts]
        for count in counts:
            if not 0 < count < self.capacity:
                raise ValueError(f"a prompt of {count} tokens in a cache of {self.capacity}")
        device, longest = self.token.device, max(counts)
        # Padded behind: no token sees a later one, and a row's next tokens overwrite the padding.
        padded = [text + [0] * (longest - len(text)) for text in texts]
        positions = torch.arange(longest, device=device).expand(self.batch, longest)
        self.length.zero_()
        logits, _ = self.model(torch.tensor(padded, device=device), None, positions, self.cache)
        self.length.copy_(torch.tensor(counts))
        self.used = longest
        last = logits[torch.arange(self.batch, device=device), self.length.long() - 1]
        if self.logits is None:
            self.logits = torch.empty_like(last)
        self._take(last)
        return self._answer()

    @torch.no_grad()
    def step(self, given: int | list[int] | None = None) -> int | list[int]:
        """Return the token after the one before.

        Args:
            given: What was chosen as the token before, in place of the likeliest.

        Raises:
            ValueError: The cache is full.
        """
        if not 0 < self.used < self.capacity:
            state = "full" if self.used else "empty: start with a prompt"
            raise ValueError(f"the cache of {self.capacity} tokens is {state}")
        self.used += 1
        if given is not None:
            self.token.copy_(torch.tensor(given).view(self.batch, 1))
        if self.token.device.type != "cuda" or not RECORDS:
            self._advance()
        else:
            if self.graph is None:
                self.graph = self._record()
            self.graph.replay()
        return self._answer()

    def _answer(self) -> int | list[int]:
        return self.token[:, 0].tolist() if self.several else int(self.token)

    def _take(self, logits: Tensor) -> None:
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))

    def _advance(self) -> None:
        logits, _ = self.model(self.token, None, self.length.long()[:, None], self.cache)
        self._take(logits[:, -1])
        self.length += 1

    def _record(self) -> torch.cuda.CUDAGraph:
        before = self.token.clone(), self.length.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Whatever is compiled or allocated at a first call must not be in the recording.
            self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        self.token.copy_(before[0])
        self.length.copy_(before[1])
        return graph


def steps(model: Model, texts: list[list[int]], count: int) -> Iterator[list[int]]:
    """Yield the likeliest next token of every text, `count` times."""
    decoder = Decoder(model, max(map(len, texts)) + max(count, 1), len(texts))
    for number in range(count):
        yield decoder.step() if number else decoder.start(texts)
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
    text = chat_text(template.read_text(encoding="utf-8"), prompt, special)
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
    options = parser.parse_args()
    ids, decoder, count = options.ids, None, 16
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
    made = generate(load(device=options.device, dtype=dtype), ids, count, END)
    print(plain_text(decoder.decode(made)) if decoder else " ".join(map(str, made)))


if __name__ == "__main__":
    main()
"""


def main(with_kernels: bool) -> str:
    """Return the command line of the file."""
    return _MAIN.replace("{device}", "DEVICE" if with_kernels else '"cpu"')
