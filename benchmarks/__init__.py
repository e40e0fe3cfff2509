"""Benchmarks of `sonic` against strong rivals: ``benchmarks.cpu_moe`` (speed) and ``benchmarks.memory`` (bytes)."""
