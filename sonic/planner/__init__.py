"""Step time, memory and exposed communication of a training run, from one GPU to thousands, before anything runs::

    from sonic import planner

    plan = planner.plan("7b", "h100", 64, ep=8, micro_batch=4, wiring="ladder")
    plan.tokens_per_second, plan.mfu, plan.memory, plan.collectives

The same on the command line: ``python -m sonic plan``. What it takes for granted is data with sources
(:data:`CONSTANTS`), and :func:`check_tables` puts it beside published measurements.
"""

from sonic.planner.check import check_tables
from sonic.planner.constants import CONSTANTS, KERNELS, MACHINES, Constant, Kernels, Machine
from sonic.planner.models import MODELS, Model, model_from_file
from sonic.planner.search import SweepPoint, gpu_counts, search, sweep
from sonic.planner.step import Collective, Plan, Setup, make_setup, plan
from sonic.planner.wiring import WIRINGS

__all__ = [
    "CONSTANTS",
    "KERNELS",
    "MACHINES",
    "MODELS",
    "WIRINGS",
    "Collective",
    "Constant",
    "Kernels",
    "Machine",
    "Model",
    "Plan",
    "Setup",
    "SweepPoint",
    "check_tables",
    "gpu_counts",
    "make_setup",
    "model_from_file",
    "plan",
    "search",
    "sweep",
]
