"""Others' own calls: change one import line, and the merge is rau's, on any device.

A module for each peer (`flash_attn`, `flashinfer`, `ring_flash_attention`, `sglang`, `torch_`, `transformer_engine`, `vllm`,
`xformers`) has its names, argument orders, in-place behaviour and returns; importing one imports no peer. The Ascend operator's
names are here. docs/migration.md has a section for each.
"""

from rau.compat.ascend import npu_ring_attention_update, ring_attention_update

__all__ = ["npu_ring_attention_update", "ring_attention_update"]
