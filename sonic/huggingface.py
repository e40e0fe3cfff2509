"""``import sonic.huggingface`` gives :mod:`sonic.layers.huggingface`."""

import sys

from sonic.layers import huggingface

sys.modules[__name__] = huggingface
