"""``import sonic.megatron`` gives :mod:`sonic.layers.megatron`."""

import sys

from sonic.layers import megatron

sys.modules[__name__] = megatron
