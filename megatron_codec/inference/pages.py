"""Memory in huge pages, for weights that every step reads from end to end.

Reading 85 MB in pages of 4 KiB takes a quarter longer: prefetching ends where a page does, and looking up
the next one takes time of its own.
"""

import mmap
import threading

import torch
from torch import Tensor

_HUGE = 2 << 20
_CHUNK = 16 * _HUGE  # matrices share huge pages, so that small ones waste none
_lock = threading.Lock()
_rest = torch.empty(0, dtype=torch.uint8)


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the CPU, on a cache line, in huge pages where the system gives them.

    The memory is returned when all tensors of its chunk are gone.
    """
    global _rest
    size = tensor.numel() * tensor.element_size()
    with _lock:
        if size > len(_rest):
            _rest = _pages(size)
        memory, _rest = _rest[:size], _rest[(size + 63) // 64 * 64 :]
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _pages(least: int) -> Tensor:
    """At least so many bytes; memory that is not written to is not taken from the system."""
    size = max(_CHUNK, -(-least // _HUGE) * _HUGE) + _HUGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(memory, dtype=torch.uint8)
    return numbers[-numbers.data_ptr() % _HUGE :]
