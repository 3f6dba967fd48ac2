"""Memory of one GPU that several processes write to: what CUDA's driver has for it, by ctypes."""

from __future__ import annotations

import ctypes

LAZY_PEER_ACCESS = 1  # the only flag that cuIpcOpenMemHandle takes


class Handle(ctypes.Structure):
    """CUipcMemHandle: names memory to other processes."""

    _fields_ = (("reserved", ctypes.c_char * 64),)


def call(name: str, *arguments: object) -> None:
    """Call a function of the driver. Errors: RuntimeError with its code."""
    code = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if code:
        raise RuntimeError(f"{name}: CUDA's driver answered {code}")


def enter() -> None:
    """Make this thread use the first GPU's primary context, which is JAX's as well."""
    call("cuInit", 0)
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
    call("cuCtxSetCurrent", context)


def allocate(fills: list[tuple[int, int]]) -> bytes:
    """fills: 32-bit words of each piece of new memory, and how many. -> its handle, as bytes; kept until the end."""
    address = ctypes.c_uint64()
    call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(4 * sum(count for _, count in fills)))
    at = address.value
    for word, count in fills:
        call("cuMemsetD32_v2", ctypes.c_uint64(at), ctypes.c_uint32(word), ctypes.c_size_t(count))
        at += 4 * count
    call("cuCtxSynchronize")
    handle = Handle()
    call("cuIpcGetMemHandle", ctypes.byref(handle), address)
    return bytes(handle)


def opened(handle: bytes) -> int:
    """-> where another process's memory lies in this one's addresses."""
    address = ctypes.c_uint64()
    call("cuIpcOpenMemHandle_v2", ctypes.byref(address), Handle.from_buffer_copy(handle), LAZY_PEER_ACCESS)
    return address.value
