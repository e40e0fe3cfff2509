"""``import sonic.fsdp`` gives :mod:`sonic.layers.fsdp`."""

import sys

from sonic.layers import fsdp

sys.modules[__name__] = fsdp
