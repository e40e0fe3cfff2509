"""The suite of all benchmarks in one command, and two of its results side by side: ``python -m sonic bench``.

The benchmarks and tests themselves lie beside the library in its checkout and are run as processes of their own.
"""
