"""The folder of the package ``scattermoe`` where its kernels lie."""

from sonic.compat.scattermoe.kernels import ops

__all__ = ["ops"]
