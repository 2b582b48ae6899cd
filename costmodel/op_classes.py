"""Classes of ops, by name: what limits each, and what views cost nothing."""

from __future__ import annotations

import re
from functools import cache

from ..ops.facts import KINDS

ARITHMETIC = ("matmul", "attention", "attention_backward")  # classes whose time goes by arithmetic first

# First match wins; tried on the op's bare name ('mm' of 'aten.mm.default').
OP_CLASSES: tuple[tuple[str, str], ...] = (
    # ops that only rename memory
    (r"_?(unsafe_)?view(_as_\w+)?|reshape(_as)?|_reshape_alias|t|transpose|permute|expand(_as)?|(un)?squeeze|alias|detach"
     r"|lift_fresh|select|slice|split(_with_sizes)?|chunk|narrow|as_strided|unbind|getitem|diagonal|unfold|movedim"
     r"|sym_\w+|empty\w*|new_empty\w*|scalar_tensor|_local_scalar_dense|item|wait_tensor|view_dtype|swapaxes", "view"),
    (r".*(attention|sdpa).*(backward|bwd|grad).*", "attention_backward"),
    (r".*(attention|sdpa).*", "attention"),
    (r"mm|bmm|addmm|baddbmm|matmul|linear|_scaled_mm|_grouped_mm|einsum|dot|mv|_int_mm|addbmm|linear_backward|gemm"
     r"|_scaled_grouped_mm|inner|outer|expert_mlp(_backward)?"
     r"|recurrence(_backward)?|linear_cross_entropy(_backward)?", "matmul"),
    (r".*conv.*", "convolution"),
    (r".*(layer_norm|rms_norm|rmsnorm|group_norm|batch_norm|instance_norm).*", "normalization"),
    (r"embedding.*|gather|index|index_select|index_put.*|_unsafe_index.*|scatter.*|index_add.*|take.*|nll_loss.*|sort|topk"
     r"|argsort|cumsum|cumprod|searchsorted|bincount|nonzero|unique.*|repeat_interleave.*|roll|flip", "gather"),
    (r"sum|mean|amax|amin|max|min|prod|var.*|std.*|any|all|argmax|argmin|norm|linalg_vector_norm|_?(log_)?softmax.*"
     r"|logsumexp|cross_entropy.*|.*pool.*|count_nonzero|_foreach_norm.*", "reduction"),
    (r"clone|copy_?|_to_copy|contiguous|cat|stack|fill.*|zeros.*|ones.*|full.*|arange.*|pad|constant_pad_nd|repeat|tril|triu"
     r"|slice_backward|select_backward|slice_scatter|select_scatter|new_zeros|new_ones|new_full|to|convert_element_type",
     "copy"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), name) for pattern, name in OP_CLASSES)


def bare_name(op_name: str) -> str:
    """'torch.ops.aten.mm.default', 'aten::mm' and 'mm' all give 'mm'; '<built-in function getitem>' gives 'getitem'."""
    name = re.sub(r"^<built-in function (\w+)>$", r"\1", op_name.strip())
    parts = [part for part in re.split(r"::|\.", name) if part]
    parts = [part for part in parts if part not in {"torch", "ops", "default", "operator", "_operator"}]
    if len(parts) > 1 and parts[0] in {
        "aten",
        "prims",
        "prim",
        "shardwright",
        "_c10d_functional",
        "quantized",
        "higher_order",
    }:
        parts = parts[1:]
    return parts[0] if parts else op_name


def op_class(op_name: str) -> str:
    """One of the names in OP_CLASSES, else 'pointwise'; of an op that was added with its class, that."""
    return KINDS.get(op_name) or _class_of_name(op_name)


@cache
def _class_of_name(op_name: str) -> str:
    name = bare_name(op_name).lower()
    for pattern, found in _COMPILED:
        if pattern.fullmatch(name):
            return found
    return "pointwise"
