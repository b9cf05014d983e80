"""Operators that a saved program names: they compute, and do nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import change

from graphopt.backends.opening import open_language_model
from graphopt.errors import SourceError
from graphopt.ir.ops.aten import resolve_target
from graphopt.sources import open_model

ATTACKS = (
    # Any attribute path below torch.ops.
    "load_library.__call__.x",
    "torch.ops.load_library",
    "import_module.__call__.x",
    "aten.load_library.default",
    "aten.import_module.default",
    "aten.__class__.mro",
    "aten.add.__class__",
    "aten.add.__globals__",
    "aten.__init__.__globals__",
    "aten.add.Tensor.__call__",
    "aten.add.Tensor\n",
    "aten..default",
    # Other libraries, whether or not they are loaded.
    "profiler._record_function_enter_new.default",
    "prim.device.default",
    "prims.device_put.default",
    "debugprims.load_tensor.default",
    "inductor._reinterpret_tensor.default",
    "quantized.linear.default",
    "c10d.broadcast_.default",
    "_c10d_functional.all_reduce.default",
    "rngprims.philox_rand.default",
    "graphopt.balanced.default",
    "transformers.grouped_mm_fallback.other",
    # ATen's own, with effects beside their results.
    "aten.from_file.default",
    "aten.save.default",
    "aten._print.default",
    "aten.warn.default",
    "aten.set_data.default",
    "aten.set_.source_Tensor",
    "aten.set.source_Tensor",
    "aten.set.source_Storage",
    "aten.record_stream.default",
    "aten.resize.default",
    "aten.resize_.default",
    "aten.resize_as.default",
    "aten._resize_output.default",
    "aten.manual_seed.default",
    "aten.requires_grad_.default",
    "aten._backward.default",
    "aten.add_.Tensor",
    "aten.add.out",
    "aten._cufft_set_plan_cache_max_size.default",
    "aten._assert_async.msg",
    "aten._functional_assert_async.msg",
    "aten.sym_constrain_range.default",
    "aten.pin_memory.default",
    # What no model needs and PyTorch checks little.
    "aten.empty.memory_format",
    "aten.empty_strided.default",
    "aten.new_empty_strided.default",
    "aten.sparse_coo_tensor.indices",
    "aten._sparse_coo_tensor_unsafe.default",
    "aten._sparse_csr_tensor_unsafe.default",
    "aten._make_per_tensor_quantized_tensor.default",
    "aten._nested_view_from_buffer.default",
    "aten._embedding_bag.default",
    "aten.segment_reduce.default",
    "aten.ctc_loss.IntList",
    "aten._foobar.default",
    "aten.item.default",
    "aten._local_scalar_dense.default",
)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_other_operator_is_found(name: str) -> None:
    with pytest.raises(KeyError, match="no torch operator"):
        resolve_target(name)


def test_operators_that_are_allowed_write_to_nothing() -> None:
    """By the schemas: an argument that is written to is marked there, and a file is text."""
    allowed = 0
    for full in torch._C._dispatch_get_all_op_names():
        library, _, rest = full.partition("::")
        op, _, overload = rest.partition(".")
        try:
            found = resolve_target(f"{library}.{op}.{overload or 'default'}")
        except KeyError:
            continue
        allowed += 1
        text = str(found._schema)
        assert library in ("aten", "transformers"), full
        assert "!)" not in text and "Storage" not in text and "Stream" not in text, text
        assert "filename" not in text and "-> ()" not in text, text
    assert allowed > 500


@pytest.mark.parametrize(
    "name",
    ["aten.add.Tensor", "aten._softmax.default", "aten.index_put.default", "aten.__and__.Tensor",
     "aten.gelu.default", "aten.div.Tensor_mode", "aten.topk.default", "aten.split.Tensor"],
)  # fmt: skip
def test_what_models_are_made_of_is_there(name: str) -> None:
    _, op, overload = name.split(".")
    assert resolve_target(name) is getattr(getattr(torch.ops.aten, op), overload)


def name_operator(name: str, *args: Any) -> Any:
    """Put a node of this operator in front of the others of the first function."""

    def edit(data: dict[str, Any]) -> None:
        types = [{"type": [[1], "f32"]}]
        node = {
            "op": name,
            "in": [],
            "attrs": {"args": list(args), "kwargs": {"dict": {}}, "types": types},
            "out": ["evil"],
        }
        data["functions"][0]["nodes"].insert(0, node)

    return edit


@pytest.mark.parametrize("backend", ["auto", "program", "torch"])
@pytest.mark.parametrize(
    "name",
    ["load_library.__call__.x", "import_module.__call__.x", "aten.from_file.default",
     "aten.save.default"],
)  # fmt: skip
def test_a_program_that_names_one_is_refused_when_it_is_opened(
    artifact: Path, backend: Any, name: str
) -> None:
    change(artifact, name_operator(name, str(artifact / "evil.so")))
    (artifact / "evil.so").write_bytes(b"\x7fELF")
    with pytest.raises(SourceError, match=r"malformed program: .*no such op"):
        open_model(str(artifact))
    with pytest.raises(SourceError, match=r"malformed program: .*no such op"):
        open_language_model(str(artifact), backend)
