"""CUDA backend: Python bindings of libquant_cuda.so (csrc/include/quant_cuda.h).

Everything here can be called on a machine without the library, a driver or a GPU. Counting GPUs
starts the driver: a process forked afterwards cannot use CUDA, so fork first or use spawn.
"""

import ctypes
import functools

from quant_kernels import native

ABI = 7

# QuantCudaStatus: the answers that mean "this machine has no GPU to offer".
NO_DRIVER = -2
NO_DEVICE = -4


def available() -> bool:
    """Whether the library can be used and sees a GPU."""
    return why_unavailable() is None


def why_unavailable() -> str | None:
    """Why CUDA kernels cannot run here: no library, no driver, a driver too old, or no GPU.

    None where they can. What a given kernel asks of the GPU is for the kernel's op to say.
    """
    try:
        status, count = _device_count()
    except native.LibraryMissing as error:
        return str(error)
    if status:
        return f"libquant_cuda.so is built, but {error_string(status)}"
    if count == 0:
        return f"libquant_cuda.so is built, but {error_string(NO_DEVICE)}"
    return None


def devices() -> list[tuple[int, tuple[int, int]]]:
    """(index, (major, minor)) of every visible GPU, for example [(0, (9, 0))] with one Hopper.

    Empty where there is no driver or no GPU.

    Raises:
        LibraryMissing: libquant_cuda.so was not built.
        RuntimeError: there is a driver, and it fails (too old, broken, ...).
    """
    status, count = _device_count()
    if status in (NO_DRIVER, NO_DEVICE):
        return []
    if status:
        raise RuntimeError(f"cannot count GPUs: {error_string(status)}")
    return [(device, _capability(device)) for device in range(count)]


def _device_count() -> tuple[int, int]:
    count = ctypes.c_int(0)
    status = library().quant_cuda_device_count(ctypes.byref(count))
    return status, count.value


def _capability(device: int) -> tuple[int, int]:
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    status = library().quant_cuda_device_capability(
        device, ctypes.byref(major), ctypes.byref(minor)
    )
    if status:
        raise RuntimeError(f"cannot read the capability of GPU {device}: {error_string(status)}")
    return major.value, minor.value


def error_string(status: int) -> str:
    """One English sentence for a status of the library."""
    return str(library().quant_cuda_error_string(status).decode())


@functools.cache
def library() -> ctypes.CDLL:
    """libquant_cuda.so, or LibraryMissing."""
    library = native.load("quant_cuda", ABI)
    library.quant_cuda_error_string.argtypes = [ctypes.c_int]
    library.quant_cuda_error_string.restype = ctypes.c_char_p
    library.quant_cuda_device_count.argtypes = [ctypes.POINTER(ctypes.c_int)]
    library.quant_cuda_device_capability.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int),
        ctypes.POINTER(ctypes.c_int),
    ]
    for name in ("quant_cuda_prefill_workspace", "quant_cuda_decode_workspace"):
        getattr(library, name).restype = ctypes.c_int64
    return library
