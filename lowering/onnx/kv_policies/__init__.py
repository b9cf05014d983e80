"""KV policies in graphs: their scores and states in standard operators, a file each.

`attend` is the attention of one layer, `SELECTIONS` has the policies by kind.
"""

from graphopt.lowering.onnx.kv_policies.attend import SELECTIONS, Operands, attend, refusal
from graphopt.lowering.onnx.kv_policies.custom_op import policy_op
from graphopt.lowering.onnx.kv_policies.frame import Frame, write_tokens

__all__ = ["SELECTIONS", "Frame", "Operands", "attend", "policy_op", "refusal", "write_tokens"]
