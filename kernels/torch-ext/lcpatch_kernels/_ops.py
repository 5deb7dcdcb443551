"""The namespace of every op that this package registers with `torch.library`, kept in one place.

Registering a second op under a name that exists replaces the first in silence. A published copy of this package
therefore gets a namespace of its own: the export rewrites this one constant.
"""

NAMESPACE = "lcpatch_kernels"


def add_op_namespace_prefix(name: str) -> str:
    """`name` with the namespace in front, as `torch.library` wants it; kernel-builder's own `_ops.py` has it too."""
    return f"{NAMESPACE}::{name}"
