"""The enumerations of the package ``sonicmoe``."""

from __future__ import annotations

from enum import Enum

from sonic.shapes import argument_error

__all__ = ["ActivationType", "KernelBackendMoE", "is_glu", "name_of_activation"]


class KernelBackendMoE(Enum):
    """How ``MoE.forward`` of the package computes its experts."""

    scattermoe = "scattermoe"
    torch = "torch"
    sonicmoe = "sonicmoe"
    sonicmoe_fp8 = "sonicmoe_fp8"  # of later versions; refused


class ActivationType(Enum):
    """Activations by the names of the package."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"

    RELU_SQ = "relu_sq"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"


_GATED = ("swiglu", "geglu", "reglu")
_NAMES = {"relu_sq": "relu2"}  # where the two packages differ


def is_glu(activation_type: ActivationType | str) -> bool:
    """Whether an activation has a gate, so that its up projection has 2N rows."""
    return getattr(activation_type, "value", activation_type) in _GATED


def name_of_activation(where: str, activation_type: object, argument: str = "activation_type") -> str:
    """The name in ``sonic.ACTIVATIONS`` of a member of :class:`ActivationType`, or of its value.

    Members of another enumeration with these values, such as the real package's own, are taken too. ``argument`` is how
    the caller knows it.

    Raises:
        ValueError: it is no such activation.
    """
    value = getattr(activation_type, "value", activation_type)
    known = tuple(member.value for member in ActivationType)
    if value not in known:
        wanted = "an ActivationType, or one of " + ", ".join(repr(name) for name in known)
        raise argument_error(where, argument, repr(activation_type), wanted)
    return _NAMES.get(value, value)
