"""The parts of `model.py` that are the same for every model."""

UNDER = '''
def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights whose names begin with `prefix`, by what comes behind it."""
    return {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
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


def load(tiled: bool) -> str:
    """Return the function that loads the weights."""
    if not tiled:
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
attention, cached_attention = kernels.attention, kernels.cached_attention
DEVICE = "{device}" if hasattr(torch, "{device}") and torch.{device}.is_available() else "cpu"
'''


def kernels(device: str) -> str:
    """Return what imports the kernels, and the device they are for."""
    return _KERNELS.replace("{device}", device)


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

STATIC = '''
class Decoder:
    """Greedy decoding of one text, in a cache with room for all of it.

    A step is recorded as a CUDA graph once and replayed: nothing is launched one by one.

    Args:
        capacity: Tokens of the prompt and of the answer together.
    """

    def __init__(self, model: Model, capacity: int) -> None:
        self.model, self.capacity = model, capacity
        self.used = 0  # tokens in the cache, known here without asking the device
        device = next(model.parameters()).device
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.cache = [
            kernels.Slot(
                k.new_zeros(1, k.shape[1], capacity, k.shape[3]),
                v.new_zeros(1, v.shape[1], capacity, v.shape[3]),
                self.length,
            )
            for k, v in model.empty_cache()
        ]
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def start(self, ids: list[int]) -> int:
        """Read the prompt and return the first token of the answer."""
        if not 0 < len(ids) < self.capacity:
            raise ValueError(f"a prompt of {len(ids)} tokens in a cache of {self.capacity}")
        device = self.token.device
        self.length.zero_()
        positions = torch.arange(len(ids), device=device)[None]
        logits, _ = self.model(torch.tensor([ids], device=device), None, positions, self.cache)
        self.length.fill_(len(ids))
        self.used = len(ids)
        self.token.copy_(logits[:, -1:].argmax(-1))
        return int(self.token)

    @torch.no_grad()
    def step(self) -> int:
        """Return the token after the one before."""
        if self.used >= self.capacity:
            raise ValueError(f"the cache of {self.capacity} tokens is full")
        self.used += 1
        if self.token.device.type != "cuda":
            self._advance()
        else:
            if self.graph is None:
                self.graph = self._record()
            self.graph.replay()
        return int(self.token)

    def _advance(self) -> None:
        positions = self.length.long()[None]
        logits, _ = self.model(self.token, None, positions, self.cache)
        self.token.copy_(logits[:, -1:].argmax(-1))
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


def generate(model: Model, ids: list[int], count: int, stop: Collection[int] = ()) -> list[int]:
    """Return up to `count` tokens that follow `ids`, the likeliest each time.

    A token of `stop` ends the text and is not part of it.
    """
    decoder = Decoder(model, len(ids) + count)
    made: list[int] = []
    token = decoder.start(ids)
    while token not in stop:
        made.append(token)
        if len(made) == count:
            break
        token = decoder.step()
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

_MAIN = """
def main() -> None:
    parser = argparse.ArgumentParser(description="Go on from token ids, or from a text.")
    parser.add_argument("ids", nargs="*", type=int, help="token ids")
    parser.add_argument("--prompt", help="a text instead; needs the package tokenizers")
    parser.add_argument("--new", type=int, default=16, help="how many tokens to add")
    parser.add_argument("--device", default={device})
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


def main(tiled: bool) -> str:
    """Return the command line of the file."""
    return _MAIN.replace("{device}", "DEVICE" if tiled else '"cpu"')
