"""The text of a product by Hopper's `wgmma`, for kernels in CUDA C++.

Source: PTX ISA, wgmma.mma_async: a warpgroup multiplies [64, 16] by [16, columns], summed in fp32.
"""

from __future__ import annotations


def product(
    name: str, columns: int, dtype: str, *, from_registers: bool, by_rows: bool, begins: bool
) -> str:
    """Return a function `name` around the instruction.

    The right side lies in shared memory.

    Args:
        dtype: `f16` or `bf16`.
        from_registers: The left side lies in registers, else in shared memory too.
        by_rows: The right side has its rows in a row of memory, else its columns.
        begins: The function's last argument says whether a product is added to sums; without it
            it is.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    shape = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
    if from_registers:
        left, used = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}", 4
        parameters, inputs = "const unsigned* a", ", ".join(f'"r"(a[{i}])' for i in range(4))
        transposed = f"{int(by_rows)}"
    else:
        left, used = f"%{count}", 1
        parameters, inputs = "unsigned long long a", '"l"(a)'
        transposed = f"0, {int(by_rows)}"
    parameters += ", unsigned long long b"
    right, add = f"%{count + used}", "add" if begins else "1"
    code = f'"{shape} {{{sums}}}, {left}, {right}, {add}, 1, 1, {transposed};"'
    inputs += ', "l"(b)'
    if begins:
        parameters += ", bool add"
        inputs += ', "r"((int)add)'
        predicate = f"setp.ne.b32 add, %{count + used + 1}, 0; "
        code = f'"{{ .reg .pred add; {predicate}"\n      {code}\n      "}}"'
    return (
        f"__device__ __forceinline__ void {name}(float (&d)[{count}], {parameters}) {{\n"
        f"  asm volatile(\n      {code}\n      : {outputs}\n      : {inputs});\n}}\n"
    )
