"""What producers are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from graphopt.ir.weights import Producer


def parts_of(producer: Producer) -> list[Producer]:
    """Return the producers that one is made of."""
    parts: list[Producer] = []
    if is_dataclass(producer):
        for held in (getattr(producer, item.name) for item in fields(producer)):
            listed = held if isinstance(held, tuple) else (held,)
            parts += [part for part in listed if isinstance(part, Producer)]
    return parts


def sources_of(producer: Producer) -> Iterator[Producer]:
    """Yield the producers that a value is read from in the end, which are made of no other."""
    parts = parts_of(producer)
    if not parts:
        yield producer
    for part in parts:
        yield from sources_of(part)


def is_unpacked(producer: Producer) -> bool:
    """Return whether a dense value is made of packed ones."""
    parts = parts_of(producer) if producer.encoding is None else []
    return any(part.encoding is not None or is_unpacked(part) for part in parts)
