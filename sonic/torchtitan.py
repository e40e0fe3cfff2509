"""``import sonic.torchtitan`` gives :mod:`sonic.layers.torchtitan`."""

import sys

from sonic.layers import torchtitan

sys.modules[__name__] = torchtitan
