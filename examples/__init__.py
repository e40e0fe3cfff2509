"""Programs that use the library as its users do; run them with ``python -m examples.<name>``."""
