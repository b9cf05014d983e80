"""The Volta kernels' PTX on any NVIDIA GPU: the driver compiles it, which shows its results.

Where NVRTC no longer compiles for Volta (CUDA 13), GRAPHOPT_VOLTA_PTX names a folder that
tools/build_volta.py filled elsewhere. Newer GPUs emulate the matrix instruction: nothing here
says how fast a Volta is.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

import pytest
import torch
from attention_reference import random_case
from volta_forms import FORMS, case_of, check, close, file_name, run, sizes_of

from graphopt.errors import LoweringError
from graphopt.lowering.kernels.volta_cuda import compile_volta
from graphopt.runtime.attention import Keys, prefill
from graphopt.runtime.driver import DriverError, Kernel
from graphopt.runtime.volta import PREFILL, decode_kernels, prefill_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
FOLDER = os.environ.get("GRAPHOPT_VOLTA_PTX")


@functools.cache
def loaded(name):
    """The constants and the kernels of a form."""
    if FOLDER:
        constants = json.loads((Path(FOLDER) / "forms.json").read_text(encoding="utf-8"))[name]
        image = (Path(FOLDER) / file_name(name)).read_bytes() + b"\0"
    else:
        constants = FORMS[name].constants()
        try:
            image = compile_volta(constants, "compute_70").image
        except LoweringError as error:
            pytest.skip(str(error))
    make = decode_kernels if constants["DECODE"] else prefill_kernel
    return constants, make(image, constants)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_against_fp64(name):
    constants, kernels = loaded(name)
    check(FORMS[name], kernels, constants, "cuda")


@pytest.mark.parametrize("name", FORMS)
def test_runs_repeat_bit_for_bit(name):
    form = FORMS[name]
    if form.fields.get("varlen"):
        pytest.skip("its operands are those of the other forms, one behind the other")
    constants, kernels = loaded(name)
    case = case_of(form, *sizes_of(form)[-1])
    first, lse = run(form, kernels, constants, case, "cuda")
    for _ in range(3):
        again, lse_again = run(form, kernels, constants, case, "cuda")
        assert torch.equal(first, again)
        assert lse is None or torch.equal(lse, lse_again)


@pytest.mark.parametrize("name", ["decode 64", "decode 128", "decode 256"])
def test_split_equals_unsplit_and_a_row_does_not_hang_on_its_batch(name):
    form = FORMS[name]
    constants, kernels = loaded(name)
    case = case_of(form, 1, 3000)
    _, bound = case.bound()
    whole, _ = run(form, kernels, constants, case, "cuda", splits=1)
    for splits in (2, 3, 7, 32):
        found, _ = run(form, kernels, constants, case, "cuda", splits=splits)
        assert (found.double() - whole.double()).abs().max().item() <= 2 * bound
    out, _ = run(form, kernels, constants, case, "cuda")
    alone = dataclasses.replace(case, q=case.q[1:], k=case.k[1:], v=case.v[1:])
    assert torch.equal(out[1:], run(form, kernels, constants, alone, "cuda")[0])


@pytest.mark.parametrize("name", ["key mask 64", "everything 64", "decode, everything 128"])
def test_rows_that_see_nothing_are_zero(name):
    form = FORMS[name]
    constants, kernels = loaded(name)
    case = case_of(form, 5, 127)
    case.mask[1] = 0
    out, lse = run(form, kernels, constants, case, "cuda")
    close(out, lse, case)
    assert out[1].eq(0).all() and out[0].ne(0).any()
    if case.sinks is None:
        assert lse[1].eq(float("-inf")).all()


@pytest.mark.parametrize("name", ["causal 64", "causal 128", "decode 64"])
def test_queries_before_all_keys_are_zero(name):
    constants, kernels = loaded(name)
    out, lse = run(FORMS[name], kernels, constants, case_of(FORMS[name], 9, 4), "cuda")
    assert out[:, :, :5].eq(0).all() and lse[:, :, :5].eq(float("-inf")).all()
    assert out[:, :, 5:].ne(0).any()


def test_scores_far_from_zero_stay_finite():
    constants, kernels = loaded("causal 64")
    for sign in (1, -1):
        case = random_case((1, 4, 2, 40, 40, 64, 64), {})
        case.q[:], case.k[:] = 60.0, 125.0 * sign
        case.k[..., 0] += torch.arange(40).to(torch.float16) % 7
        assert 5.9e4 < case.scores(torch.float64).abs().nan_to_num(0, posinf=0).max() < 6.1e4
        close(*run(FORMS["causal 64"], kernels, constants, case, "cuda"), case)


def test_operands_that_lie_apart_in_memory():
    """Heads side by side, as a projection leaves them."""
    constants, kernels = loaded("causal 64")
    case = case_of(FORMS["causal 64"], 65, 65)
    joined = torch.cat([x.transpose(1, 2).flatten(2) for x in (case.q, case.k, case.v)], -1).cuda()
    parts = [part.unflatten(-1, (-1, 64)) for part in joined.split((256, 128, 128), -1)]
    q, k, v = (part.transpose(1, 2) for part in parts)
    close(*prefill(kernels, q, Keys(k, v), constants, scale=case.scale)[:2], case)


def test_an_image_the_driver_cannot_take_is_refused_with_the_reason():
    kernel = Kernel(b"not PTX\0", "attention_prefill", PREFILL, threads=128)
    arguments = dict.fromkeys(PREFILL, 0) | {
        name: torch.zeros(1, device="cuda") for name in PREFILL if name.endswith("_ptr")
    }
    with pytest.raises(DriverError, match="attention_prefill"):
        kernel[(1, 1, 1)](**arguments)
