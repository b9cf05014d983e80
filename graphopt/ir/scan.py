"""The tokens of a printed program, one line at a time, and reading literals from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from graphopt.errors import ParseError, UsageError
from graphopt.ir.algebra import FUNCTIONS, parse_size
from graphopt.ir.encoding import Packed
from graphopt.ir.graph import Param
from graphopt.ir.kv_host import HostShare
from graphopt.ir.kv_policies import KVPolicy, policy_from_dict
from graphopt.ir.placement import Placement
from graphopt.ir.text import NAME
from graphopt.ir.types import DTYPES, SYMBOLS, Dim, Type, dim

_TOKEN = re.compile(
    r"(?P<space>\s+|\#.*)"
    r'|(?P<string>"(?:[^"\\]|\\.)*")'
    r"|(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
    rf"|(?P<name>{NAME.pattern})"
    r"|(?P<sign>->|\*\*|[()\[\]{}:;,=+*/%@-])",
    flags=re.ASCII,
)

_TORCH = {
    str(item): item
    for item in (*vars(torch).values(), torch.strided)
    if isinstance(item, torch.memory_format) or item is torch.strided
}
_OTHER_DTYPES = {
    str(item).removeprefix("torch."): item
    for item in vars(torch).values()
    if isinstance(item, torch.dtype)
}
_CONSTANTS: dict[str, Any] = {
    "None": None, "True": True, "False": False, "inf": float("inf"), "nan": float("nan"),
}  # fmt: skip
_MAX_DEPTH = 64

Item = TypeVar("Item")


@dataclass(frozen=True)
class Token:
    """A word of the text.

    Attributes:
        kind: `string`, `number`, `name`, `sign` or `end`.
        column: Where it begins, from 1 up.
    """

    kind: str
    text: str
    column: int


class Line:
    """The tokens of one line, read from the left.

    Args:
        number: The number of the line in the text, from 1 up.
        text: The line.
        shift: How many characters stood in front of `text`.

    Raises:
        ParseError: A character begins no token.
    """

    def __init__(self, number: int, text: str, shift: int = 0) -> None:
        self.number = number
        self._tokens: list[Token] = []
        place = 0
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise ParseError(number, place + shift + 1, "a word or sign", repr(text[place]))
            kind = match.lastgroup or ""
            if kind != "space":
                self._tokens.append(Token(kind, match.group(), place + shift + 1))
            place = match.end()
        self._tokens.append(Token("end", "the end of the line", len(text.rstrip()) + shift + 1))
        self._place = 0
        self._depth = 0

    @property
    def next(self) -> Token:
        return self._tokens[self._place]

    def fail(self, expected: str, token: Token | None = None) -> ParseError:
        """Return the error that something else stands at a token, by default the next one."""
        token = token or self.next
        found = token.text if token.kind == "end" else repr(token.text)
        return ParseError(self.number, token.column, expected, found)

    def take(self) -> Token:
        token = self.next
        if token.kind != "end":
            self._place += 1
        return token

    def at(self, *texts: str, ahead: int = 0) -> bool:
        """Return whether one of some signs or words comes next, or `ahead` tokens later."""
        place = min(self._place + ahead, len(self._tokens) - 1)
        token = self._tokens[place]
        return token.kind in ("sign", "name") and token.text in texts

    def accept(self, text: str) -> bool:
        """Take a sign or word if it comes next."""
        if not self.at(text):
            return False
        self._place += 1
        return True

    def expect(self, *texts: str) -> None:
        """Take signs or words.

        Raises:
            ParseError: Something else comes next.
        """
        for text in texts:
            if not self.accept(text):
                raise self.fail(repr(text))

    def end(self) -> None:
        """Check that the line ends here.

        Raises:
            ParseError: It does not.
        """
        if self.next.kind != "end":
            raise self.fail("the end of the line")

    def string(self, expected: str) -> str:
        if self.next.kind != "string":
            raise self.fail(expected)
        return self._unquoted(self.take())

    def _unquoted(self, token: Token) -> str:
        try:
            return str(json.loads(token.text))
        except ValueError as error:
            raise self.fail("a quoted text", token) from error

    def named(self, expected: str) -> str:
        """Take a name, plain or quoted.

        Raises:
            ParseError: None comes next; `expected` says what it should name.
        """
        if self.next.kind == "name":
            return self.take().text
        return self.string(expected)

    def value_name(self, expected: str) -> str:
        """Take the name of a value: a word without dots, or quoted behind a percent sign."""
        if self.accept("%"):
            return self.string(expected)
        if self.next.kind != "name" or "." in self.next.text:
            raise self.fail(expected)
        return self.take().text

    def separated(self, item: Callable[[], Item], *ends: str) -> list[Item]:
        """Take items with commas between them up to a sign, or the end, which is not taken."""
        found: list[Item] = []
        while not self.at(*ends) and self.next.kind != "end":
            found.append(item())
            if not self.accept(","):
                break
        return found

    def whole(self, expected: str) -> int:
        """Take a whole number."""
        token = self.next
        if token.kind != "number" or not token.text.isdigit() or len(token.text) > 18:
            raise self.fail(expected)
        return int(self.take().text)

    # Literals ----------------------------------------------------------------------------------

    def size(self) -> Dim:
        """Take a size: algebra in B, S and P.

        Raises:
            ParseError: There is none.
        """
        start, depth, texts = self.next, 0, list[str]()
        while self.next.kind in ("number", "name", "sign"):
            if depth == 0 and self.at(",", ")", "]", "}", ":", ";", "="):
                break
            depth += self.at("(") - self.at(")")
            texts.append(self.take().text)
        try:
            return parse_size("".join(texts))
        except ValueError as error:
            raise self.fail("a size: algebra in B, S and P", start) from error

    def type(self) -> Type:
        """Take a type such as `f32[B,S,64]`, and the encoding behind it, if there is one."""
        if self.next.text not in DTYPES:
            raise self.fail("a type such as f32[B,S,64]")
        dtype = DTYPES[self.take().text]
        self.expect("[")
        shape = self.separated(self.size, "]")
        self.expect("]")
        encoding = self._packed() if self.at("packed") else None
        return Type(tuple(shape), dtype, encoding)

    def _packed(self) -> Packed:
        start = self.take()
        self.expect("(", "bits", "=")
        bits = self.whole("bits")
        self.expect(",", "group", "=")
        group = self.whole("the size of a group")
        self.expect(",", "axis", "=")
        axis = self.whole("an axis")
        symmetric = self.accept(",")
        if symmetric:
            self.expect("symmetric")
        self.expect(")")
        try:
            return Packed(bits, group, axis, symmetric)
        except ValueError as error:
            raise self.fail(f"an encoding ({error})", start) from error

    def placement(self) -> Placement | None:
        """Take a placement such as `placed(cuda:0, cuda:1, axis=0)`, if one comes next."""
        start = self.next
        if not self.accept("placed"):
            return None
        self.expect("(")
        devices: list[str] = []
        split: dict[str, int] = {}
        summed = False
        while not self.at(")"):
            key = next((name for name in ("axis", "sections", "copies") if self.at(name)), None)
            if key is not None:
                self.expect(key, "=")
                split[key] = self.whole({"axis": "an axis"}.get(key, f"how many {key}"))
            elif self.accept("summed"):
                summed = True
            elif split or summed:
                raise self.fail("axis=, sections=, copies= or summed")
            else:
                device = self.named("a device such as cuda:0")
                if self.accept(":"):
                    device += f":{self.whole('the number of a device')}"
                devices.append(device)
            if not self.accept(","):
                break
        self.expect(")")
        try:
            return Placement(tuple(devices), **split, summed=summed)
        except ValueError as error:
            raise self.fail(f"a placement ({error})", start) from error

    def host_share(self) -> HostShare | None:
        """Take how a state is divided, such as `host(context=4096, batch=1, ...)`, if it comes."""
        start = self.next
        if not self.accept("host"):
            return None
        self.expect("(")
        sizes: list[int] = []
        for name in ("context", "batch", "resident", "streamed"):
            self.expect(*([","] if sizes else []), name, "=")
            sizes.append(self.whole(f"the number for {name}"))
        self.expect(")")
        try:
            return HostShare(*sizes)
        except ValueError as error:
            raise self.fail(f"shares of the host ({error})", start) from error

    def policy(self) -> KVPolicy:
        """Take a policy of a KV cache, such as `policy("quest", page=16, pages=8, ...)`.

        Raises:
            ParseError: There is none, or it refuses its fields.
        """
        start = self.next
        self.expect("policy", "(")
        fields: dict[str, Any] = {"kind": self.string("the kind of a policy")}
        while self.accept(","):
            name = self.named("a field of the policy")
            self.expect("=")
            fields[name] = self.literal()
        self.expect(")")
        try:
            return policy_from_dict(fields)
        except UsageError as error:
            raise self.fail(f"a policy ({error.message})", start) from error

    def literal(self, reference: Callable[[], Any] | None = None) -> Any:
        """Take an attribute.

        Args:
            reference: Takes what a name stands for that means nothing by itself; without it such a
                name is an attribute of the call.

        Raises:
            ParseError: There is none.
        """
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self.fail("fewer brackets in each other")
        try:
            return self._literal(reference)
        finally:
            self._depth -= 1

    def _literal(self, reference: Callable[[], Any] | None) -> Any:
        token = self.next
        if token.kind == "string":
            return self.string("a text")
        if self.at("[", "(", "{"):
            return self._collection(reference)
        if token.kind == "number" or self.at("-"):
            return self._number()
        if token.kind == "name":
            return self._word(reference)
        if self.at("%", "@") and reference is not None:
            return reference()
        raise self.fail("a literal")

    def _collection(self, reference: Callable[[], Any] | None) -> Any:
        def item() -> Any:
            return self.literal(reference)

        if self.accept("["):
            items = self.separated(item, "]")
            self.expect("]")
            return items
        if self.accept("{"):

            def entry() -> tuple[str, Any]:
                key = self.string("a key")
                self.expect(":")
                return key, item()

            entries = self.separated(entry, "}")
            self.expect("}")
            return dict(entries)
        self.expect("(")
        items = self.separated(item, ")")
        self.expect(")")
        return tuple(items)

    def _number(self) -> Any:
        """Take a number, or a size that begins with one."""
        minus = self.at("-")
        token = self._tokens[self._place + minus]
        after = self._tokens[min(self._place + minus + 1, len(self._tokens) - 1)]
        algebra = after.kind == "sign" and after.text in ("+", "-", "*", "/", "**")
        if token.kind == "name" and token.text == "inf":
            self._place += 1 + minus
            return float("-inf") if minus else float("inf")
        if token.kind != "number" or algebra:
            return self.size()
        self._place += 1 + minus
        sign = "-" if minus else ""
        if token.text.isdigit():
            if len(token.text) > 40:
                raise self.fail("a smaller number", token)
            return int(sign + token.text)
        return float(sign + token.text)

    def _word(self, reference: Callable[[], Any] | None) -> Any:
        token = self.next
        called = self._tokens[self._place + 1]
        if token.text in _CONSTANTS:
            return _CONSTANTS[self.take().text]
        if token.text in DTYPES:
            return self.type() if called.text == "[" else DTYPES[self.take().text]
        if token.text in SYMBOLS or (token.text in FUNCTIONS and called.text == "("):
            return dim(self.size())
        if token.text == "device":
            self.take()
            return torch.device("cpu")
        if token.text in _TORCH:
            return _TORCH[self.take().text]
        if token.text == "dtype" and called.text == "(":
            self._place += 2
            word = self.named("the name of a dtype")
            if word not in _OTHER_DTYPES:
                raise self.fail("a dtype of torch", token)
            self.expect(")")
            return _OTHER_DTYPES[word]
        if token.text == "param" and called.text == "(":
            self._place += 2
            name = self.string("the name of an attribute")
            self.expect(")")
            return Param(name)
        if token.text == "policy" and called.text == "(":
            return self.policy()
        if reference is not None:
            return reference()
        if "." in token.text:
            raise self.fail("a literal")
        return Param(self.take().text)
