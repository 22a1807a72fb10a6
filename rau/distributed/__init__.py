"""Merges and rings over the ranks of torch.distributed: exact attention to keys that no single rank holds.

:func:`merge` is :func:`rau.merge_states` of all ranks' states, :func:`merge_scatter` leaves each rank its share of that, and
:func:`ring_attention` sends keys and values round, with its gradient. The engine is torch's: gloo, on which all of this is
tested; nccl and hccl by construction, on which it has never run. Importing this module imports torch. docs/scaling.md says
what each costs, and which is right when.
"""

from rau.distributed.ring import ring_attention
from rau.distributed.states import merge, merge_scatter
from rau.errors import LostRankError

__all__ = ["LostRankError", "merge", "merge_scatter", "ring_attention"]
