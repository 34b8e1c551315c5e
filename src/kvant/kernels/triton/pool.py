"""Pages in the memory of a GPU, and how much of it is free."""

from __future__ import annotations

import gc
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvant.cache.pool import BytePool, Pool
from kvant.errors import ConfigError

__all__ = ["DevicePool", "allocate_pool", "check_capability", "find_device", "free_memory"]

_LEAST_CAPABILITY = (7, 0)
"""Of the GPUs that Triton knows."""


def find_device() -> torch.device:
    """Where kernels run: the first GPU that CUDA_VISIBLE_DEVICES leaves; the CPU, by Triton's
    interpreter, if TRITON_INTERPRET=1 says so.

    Raises:
        ConfigError: there is no GPU, and kernels are not to be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":  # what is interpreted takes no CUDA tensors
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    raise ConfigError(
        'backend="triton" needs an NVIDIA GPU that torch can use, and there is none; take '
        'backend="cpu", or install a CUDA build of torch and its driver'
    )


def check_capability(device: torch.device) -> None:
    """Raise ConfigError if Triton has no code for a GPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < _LEAST_CAPABILITY:
            least = ".".join(map(str, _LEAST_CAPABILITY))
            raise ConfigError(
                f'backend="triton" needs a GPU of compute capability {least} or more, and '
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}; take "
                'backend="cpu", or another GPU with CUDA_VISIBLE_DEVICES'
            )


def free_memory(device: torch.device) -> int:
    """Bytes of ``device`` that nobody has taken; what torch only keeps for later is given back."""
    gc.collect()  # a decoder's captured steps refer to it
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def allocate_pool(num_pages: int, page_bytes: int) -> Pool:
    """Pages where the kernels run."""
    device = find_device()
    if device.type == "cpu":
        return BytePool(num_pages, page_bytes)
    return DevicePool(num_pages, page_bytes, device)


class DevicePool:
    """See :class:`kvant.cache.pool.Pool`; ``pages`` is a tensor, and copies take their turn on the
    current stream.

    Raises:
        ConfigError: the device does not have that much.
    """

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        self.num_pages, self.page_bytes = num_pages, page_bytes
        try:
            self.pages: Any = torch.zeros((num_pages, page_bytes), dtype=torch.uint8, device=device)
        except RuntimeError as error:  # out of memory is one, and so is a size beyond any
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ConfigError(
                f"the GPU refuses a KV cache of {num_pages * page_bytes} bytes ({reason}); "
                "give less with kv_memory or kv_tokens"
            ) from None

    @property
    def nbytes(self) -> int:
        """Size of the whole pool in bytes."""
        return self.num_pages * self.page_bytes

    def copy(self, source: int, target: int) -> None:
        """Copy a whole page, every layer and head of it."""
        self.pages[target].copy_(self.pages[source], non_blocking=True)

    def read(self, pages: NDArray[np.int64], start: int, end: int) -> NDArray[np.uint8]:
        """Bytes ``[start, end)`` of some pages, on the host; ``[len(pages), end - start]``."""
        index = torch.from_numpy(pages).to(self.pages.device)
        found: NDArray[np.uint8] = self.pages[:, start:end][index].cpu().numpy()
        return found
