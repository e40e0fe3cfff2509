"""Activations and their derivatives on float32 values in registers, in CuTe-DSL.

A gated activation is ``a = value(gate) * factor(up)``, a plain one ``a = value(h)``. NaN goes through all of them.
"""

from __future__ import annotations

import math

from cutlass import Float32, cute

__all__ = ["GATED", "PLAIN", "Gated", "Plain"]

_LOG2_E = math.log2(math.e)
_OAI_ALPHA = 1.702  # swiglu_oai: gate * sigmoid(1.702 gate) * (up + 1), gate and up clamped
_OAI_LIMIT = 7.0


@cute.jit
def _sigmoid(x: Float32) -> Float32:
    return cute.arch.rcp_approx(1.0 + cute.arch.exp2(x * -_LOG2_E))


class Plain:
    """``a = value(h)``; ``with_slope`` gives da/dh as well."""

    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        raise NotImplementedError

    @cute.jit
    def value(self, h: Float32) -> Float32:
        """A."""
        a, _ = self.with_slope(h)
        return a


class Silu(Plain):
    """h * sigmoid(h)."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        sigmoid = _sigmoid(h)
        a = h * sigmoid
        return a, sigmoid + a * (1.0 - sigmoid)


class Gelu(Plain):
    """h * Phi(h), by the error function."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        phi = 0.5 + 0.5 * cute.math.erf(h * math.sqrt(0.5))
        density = cute.arch.exp2(h * h * (-0.5 * _LOG2_E)) * (1.0 / math.sqrt(2.0 * math.pi))
        return h * phi, phi + h * density


class Relu(Plain):
    """max(h, 0)."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope, which is 0 at 0."""
        a, slope = h, Float32(1.0)
        if h <= 0.0:
            a, slope = Float32(0.0), Float32(0.0)
        return a, slope


class Relu2(Plain):
    """max(h, 0) squared."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        positive = h
        if h <= 0.0:
            positive = Float32(0.0)
        return positive * positive, 2.0 * positive


class OaiGate(Plain):
    """h * sigmoid(1.702 h), h at most 7."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        clamped, inside = h, Float32(1.0)
        if h > _OAI_LIMIT:
            clamped, inside = Float32(_OAI_LIMIT), Float32(0.0)
        sigmoid = _sigmoid(clamped * _OAI_ALPHA)
        a = clamped * sigmoid
        return a, inside * (sigmoid + _OAI_ALPHA * a * (1.0 - sigmoid))


class OaiUp(Plain):
    """h + 1, h between -7 and 7."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        clamped, inside = h, Float32(1.0)
        if h > _OAI_LIMIT:
            clamped, inside = Float32(_OAI_LIMIT), Float32(0.0)
        if h < -_OAI_LIMIT:
            clamped, inside = Float32(-_OAI_LIMIT), Float32(0.0)
        return clamped + 1.0, inside


class Identity(Plain):
    """h."""

    @cute.jit
    def with_slope(self, h: Float32) -> tuple[Float32, Float32]:
        """A and its slope."""
        return h, Float32(1.0)


class Gated:
    """``a = value(gate) * factor(up)``."""

    def __init__(self, gate: Plain, up: Plain) -> None:
        self.gate, self.up = gate, up

    @cute.jit
    def value(self, gate: Float32, up: Float32) -> Float32:
        """A."""
        return self.gate.value(gate) * self.up.value(up)

    @cute.jit
    def with_slopes(self, gate: Float32, up: Float32) -> tuple[Float32, Float32, Float32]:
        """A, da/dgate, da/dup."""
        value, value_slope = self.gate.with_slope(gate)
        factor, factor_slope = self.up.with_slope(up)
        return value * factor, value_slope * factor, value * factor_slope


PLAIN: dict[str, Plain] = {"gelu": Gelu(), "relu": Relu(), "relu2": Relu2(), "silu": Silu()}
GATED: dict[str, Gated] = {
    "swiglu": Gated(Silu(), Identity()),
    "geglu": Gated(Gelu(), Identity()),
    "reglu": Gated(Relu(), Identity()),
    "swiglu_oai": Gated(OaiGate(), OaiUp()),
}
