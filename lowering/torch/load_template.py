"""The parts of `model.py` that read its weights."""

from __future__ import annotations

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
    """Return the model with {whose} weights of `folder`, ready to run.

    Args:
        folder: Where `model.safetensors` is, or an index of the files that hold the weights.
{args}        dtype: Of the weights; {default}.
            Constants keep theirs, since rotary frequencies lose too much in 16 bits.
{raises}    """
{body}    index = Path(folder) / "model.safetensors.index.json"
    files: dict[str, list[str]] = {{}}
    if index.is_file():
        for name, path in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(path, []).append(name)
    else:
        files["model.safetensors"] = []  # all that it holds
    weights: dict[str, Tensor] = {{}}
    for path, names in files.items():
        with safe_open(Path(folder) / path, "pt", device=str({place})) as file:
            for name in names or file.keys():
                value = {value}
                if name in CONSTANTS:
                    weights[name] = nn.Buffer(value)
                    continue
                if dtype is not None and value.is_floating_point():
                    value = value.to(dtype)
                weights[name] = nn.Parameter(value, requires_grad=False)
    return Model(weights).eval()
'''


_LOAD_OF_RANK = {
    "whose": "this rank's part of the",
    "args": """        device: `cpu`, or what each rank takes one of its own of, such as `cuda`.
""",
    "raises": """
    Raises:
        ranks.RankError: This is not one of RANKS processes that have the same package, each with a
            device of its own.
""",
    "place": "mine.device",
    "value": "own_part(file, name, mine.rank)",
}
_JOIN = """    mine = ranks.join(RANKS, device, Path(__file__).parent, Path(folder))
"""
_LOAD_WHOLE = {
    "whose": "the",
    "args": "",
    "raises": "",
    "place": "device",
    "value": "file.get_tensor(name)",
}

OWN_PART = '''
def own_part(file: Any, name: str, rank: int) -> Tensor:
    """Return a rank's part of a tensor of a file, which is all that is read."""
    # Where the layers differ, each has an entry of its own.
    key = name if name in SPLIT else re.sub(r"\\.\\d+(?=\\.)", ".*", name)
    return ranks.own_part(file, name, SPLIT.get(key, Split()), rank, RANKS)
'''


def load(with_kernels: bool, of_ranks: bool = False) -> str:
    """Return the function that loads the weights.

    Args:
        of_ranks: Of a model for several ranks.
    """
    parts = _LOAD_OF_RANK if of_ranks else _LOAD_WHOLE
    if with_kernels:
        device, default = "DEVICE", "by default DTYPE on a GPU, else float32"
        body = (
            "    if dtype is None:\n"
            '        dtype = torch.float32 if torch.device(device).type == "cpu" else DTYPE\n'
        )
    else:
        device, default = '"cpu"', "by default float32 on a CPU, else as stored"
        body = (
            '    if dtype is None and torch.device(device).type == "cpu":\n'
            "        dtype = torch.float32\n"
        )
    body += _JOIN if of_ranks else ""
    return _LOAD.format(device=device, default=default, body=body, **parts)
