"""Training on many ranks: expert parallelism, tensor parallelism, and blocks whose communication overlaps."""

from sonic.parallel.checkpoint import contiguous_state_dict, load_contiguous
from sonic.parallel.clip import clip_grad_norm_
from sonic.parallel.expert_parallel import MoELayout, parallelize_moe
from sonic.parallel.fsdp import shard_ladder
from sonic.parallel.in_flight import InFlight
from sonic.parallel.ladder import LadderState
from sonic.parallel.ladderize import ladderize
from sonic.parallel.loss import vocab_parallel_cross_entropy
from sonic.parallel.overlap_report import OverlapReport
from sonic.parallel.sequence_parallel import gather_sequence, split_sequence, sum_gradients
from sonic.parallel.sharding import fsdp_placement
from sonic.parallel.stack import LadderBlock, LadderStack
from sonic.parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from sonic.parallel.wiring import WIRINGS, Wiring

__all__ = [
    "ColumnParallelLinear",
    "InFlight",
    "LadderBlock",
    "LadderStack",
    "LadderState",
    "MoELayout",
    "OverlapReport",
    "RowParallelLinear",
    "WIRINGS",
    "Wiring",
    "clip_grad_norm_",
    "contiguous_state_dict",
    "fsdp_placement",
    "gather_sequence",
    "ladderize",
    "load_contiguous",
    "parallelize_moe",
    "shard_ladder",
    "split_sequence",
    "sum_gradients",
    "vocab_parallel_cross_entropy",
]
