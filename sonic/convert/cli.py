"""``python -m sonic convert``: checkpoints of other libraries to ``sonic.MoE`` and back.

python -m sonic convert Qwen3-30B-A3B qwen3-sonic
python -m sonic convert qwen3-sonic qwen3-trained --to qwen3_moe
python -m sonic convert Qwen3-30B-A3B --dry-run
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
from types import FrameType
from typing import Any

from sonic.convert.formats import FORMATS
from sonic.convert.plan import Conversion, plan_conversion
from sonic.shapes import argument_error

__all__ = ["add_convert_command"]

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_convert_command(commands: Any) -> None:
    """Add ``convert`` to the commands of ``python -m sonic``.

    Args:
        commands: what ``add_subparsers`` of :mod:`argparse` gives.
    """
    parser = commands.add_parser(
        "convert",
        help="checkpoints of Hugging Face and other libraries to sonic.MoE, and back",
        description="Convert a checkpoint: MoE layers are renamed and restacked, all other tensors are handed on, bit "
        "by bit. Reads safetensors, or torch files without running code in them. The target appears when it is whole. "
        "Exit code: 0; 2 if anything is refused, and then nothing is written.",
    )
    parser.add_argument("source", help="a folder as Hugging Face's, or a file of weights")
    parser.add_argument("target", nargs="?", help="a new folder; not needed with --dry-run")
    parser.add_argument("--to", default="sonic", choices=FORMATS, help="format of the target (default: sonic)")
    parser.add_argument(
        "--from", dest="source_format", choices=FORMATS, help="format of the source; default: found out"
    )
    parser.add_argument(
        "--storage", choices=("checkpoint", "fused"), help="keys as published, or as transformers 5 has them in memory"
    )
    layouts = ("concatenated", "interleaved")
    parser.add_argument("--glu-layout", choices=layouts, help="gate and up rows of the target, sonic or sonicmoe")
    parser.add_argument("--source-glu-layout", choices=layouts, help="of such a source, where it does not tell")
    parser.add_argument("--block-name", metavar="NAME", help="what the target calls its MoE layers, such as mlp")
    parser.add_argument(
        "--pass-through", action="append", default=[], metavar="PATTERN", help="keys to hand on unseen; repeatable"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file, such as 5GB (the default)")
    parser.add_argument("--dry-run", action="store_true", help="tell what becomes what, and write nothing")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    is_main = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
    previous = signal.signal(signal.SIGTERM, _leave) if is_main else None  # so that what was written is taken away
    try:
        return _convert(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _convert(options: argparse.Namespace) -> int:
    size = _bytes(options.max_shard_size)
    if options.target is None and not options.dry_run:
        raise argument_error("sonic convert", "target", None, "a new folder, or --dry-run")
    conversion = plan_conversion(
        options.source,
        options.to,
        source_format=options.source_format,
        storage=options.storage,
        glu_layout=options.glu_layout,
        source_glu_layout=options.source_glu_layout,
        block_name=options.block_name,
        pass_through=options.pass_through,
    )
    if options.json:
        print(json.dumps(_as_data(conversion), indent=1))
    else:
        lines = list(conversion.lines(size))
        print("\n".join(lines if options.dry_run else lines[-2:]))
    if not options.dry_run:
        conversion.write(options.target, max_shard_bytes=size, report=lambda line: print(line, file=sys.stderr))
        print(f"wrote {options.target}", file=sys.stderr)
    return 0


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]I?B|)", text.strip().upper())
    if found is None or found[2] not in _UNITS or float(found[1]) * _UNITS[found[2]] < 1:
        raise argument_error("sonic convert", "--max-shard-size", repr(text), "a size such as 5GB, 500MB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def _as_data(conversion: Conversion) -> dict[str, Any]:
    return {
        "source": {"format": conversion.source_format, "storage": conversion.source_storage},
        "target": {"format": conversion.target_format, "storage": conversion.target_storage},
        "glu_layout": conversion.glu_layout or None,
        "layers": conversion.layers,
        "tensors": [
            {
                "key": entry.key,
                "shape": entry.shape,
                "dtype": entry.dtype_name,
                "how": entry.how,
                "sources": [
                    {"key": stored.key, "shape": stored.shape, "dtype": stored.dtype_name} for stored in entry.sources
                ],
            }
            for entry in conversion.entries
        ],
        "config": conversion.config,
    }
