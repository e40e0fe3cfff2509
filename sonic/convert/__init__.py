"""Checkpoints of other libraries to :class:`sonic.MoE` and back: keys renamed, experts stacked, every bit kept.

:func:`plan_conversion` reads headers only and refuses what it does not understand; :meth:`Conversion.write` streams one
expert at a time into a new folder, which is there whole or not at all. ``python -m sonic convert`` is the same by hand.
"""

from sonic.convert.formats import FORMATS, Layout
from sonic.convert.plan import Conversion, Entry, convert_checkpoint, convert_state_dict, plan_conversion

__all__ = [
    "FORMATS",
    "Conversion",
    "Entry",
    "Layout",
    "convert_checkpoint",
    "convert_state_dict",
    "plan_conversion",
]
