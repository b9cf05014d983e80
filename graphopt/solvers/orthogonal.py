"""Orthogonal matrices that spread what lies in a few coordinates over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def factor_pair(size: int) -> tuple[int, int]:
    """Return n1 <= n2 with n1 n2 = size and n1 + n2 as small as can be; (1, size) for a prime.

    Source: Sun et al., FlatQuant, arXiv 2410.09426, section 3.1.
    """
    first = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return first, size // first


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix, uniform by the Haar measure, fp64 [size, size] on the CPU.

    Source: Mezzadri, arXiv math-ph/0609050, section 5: the signs of R's diagonal make Q unique.
    """
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def hadamard(size: int) -> Tensor | None:
    """Return a Hadamard matrix divided by the root of its size, fp64 [size, size], or None.

    Sizes 1, 2, q + 1 (q a prime, 3 modulo 4), 2 (q + 1) (q a prime, 1 modulo 4), and these times
    powers of two. Source: Paley, J. Math. Phys. 12, 1933; Sylvester's doubling.
    """
    signs = _signs(size)
    return None if signs is None else signs / math.sqrt(size)


def spreading(size: int) -> Tensor:
    """Return an orthogonal matrix with entries of about one magnitude, fp64 [size, size].

    A Hadamard matrix where one is known; else that of the largest divisor which has one, times
    the cosine transform (DCT-II) of what is left.
    """
    parts = [n for n in range(size, 0, -1) if size % n == 0]
    order, matrix = next((n, made) for n in parts if (made := hadamard(n)) is not None)
    return torch.kron(matrix, _cosines(size // order))


def _cosines(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place[None] + 0.5) * place[:, None])
    matrix *= math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _signs(size: int) -> Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1):
        conference = _paley(size - 1, -1)
        return conference + torch.eye(size, dtype=torch.float64)
    if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        conference, eye = _paley(size // 2 - 1, 1), torch.eye(size // 2, dtype=torch.float64)
        plus, minus = conference + eye, conference - eye
        return torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, -plus], 1)])
    half = _signs(size // 2) if size % 2 == 0 else None
    if half is None:
        return None
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def _paley(q: int, sign: int) -> Tensor:
    """Return the conference matrix of order q + 1: 0 on the diagonal, else 1 or -1.

    Args:
        sign: 1 for a symmetric one (q = 1 modulo 4), -1 for a skew one (q = 3 modulo 4).
    """
    residue = torch.full((q,), -1.0, dtype=torch.float64)
    residue[torch.arange(1, q) ** 2 % q] = 1.0
    residue[0] = 0.0
    place = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = sign
    matrix[1:, 1:] = residue[(place[:, None] - place[None]) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % n for n in range(2, math.isqrt(number) + 1))
