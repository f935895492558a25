"""ggml's INT4 products on a CPU, through its C API, from what llama-cpp-python has installed.

    Q4_0    w = d (q - 8)          32 weights: FP16 d
    Q4_K    w = d s q - e t        256 weights: FP16 d and e; of them 32: 6-bit s and t

Both hold 4.5 bits a weight, so that more is read than of our formats. FP32 activations are
quantized to INT8 in blocks of 32 (Q4_0) or 256 (Q4_K), which is part of the time. Weights lie where
llama.cpp puts them: in the first of the CPU backend's buffer types that supports the product (AMX
tiles, repacked rows, rows as in a file).

ggml has a process of its own, since it loads AMX's tile configuration once a thread and takes it
for granted from then on. A buffer type with which the process dies is passed over: GCC 12 drops
most of that configuration as dead stores, unless ggml was built with CXXFLAGS=-fno-dse.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import subprocess
import sys
import weakref
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint8, c_void_p
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

ROOT = Path(__file__).parents[1]
CPU_DEVICE = 0  # GGML_BACKEND_DEVICE_TYPE_CPU
FP16_SCALES = {"Q4_0": 1, "Q4_K": 2}  # a block begins with them


class ContextSize(ctypes.Structure):
    """ggml_init_params: metadata only, tensors are allocated in a backend's buffer."""

    _fields_ = (("bytes", c_size_t), ("memory", c_void_p), ("no_alloc", c_bool))


# Results, then arguments, of ggml.h, ggml-alloc.h and ggml-backend.h.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ggml_log_set": (None, c_void_p, c_void_p),
    "ggml_init": (c_void_p, ContextSize),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_dev_by_type": (c_void_p, c_int),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_backend_reg": (c_void_p, c_void_p),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_supports_op": (c_bool, c_void_p, c_void_p),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_clear": (None, c_void_p, c_uint8),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
}


@dataclass(frozen=True)
class Work:
    """`count` weights [N, K] times one input [M, K], `passes` times, and the buffer types to do
    without."""

    kind: str
    m: int
    n: int
    k: int
    count: int
    threads: int
    passes: int = 1
    without: tuple[str, ...] = ()


class Peer:
    """The products in a process of their own."""

    def __init__(self, work: Work) -> None:
        library_file()
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "benchmarks.ggml_peer", str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        weakref.finalize(self, end, self._pipe, self._process)
        self.buffer: str = self._ask(work)

    def run(self) -> None:
        self._ask("run")

    def outputs(self) -> list[np.ndarray]:
        """FP32 [M, N] of each weight; NaN before the first run."""
        return self._ask("outputs")

    def _ask(self, what: Work | str) -> Any:
        try:
            self._pipe.send(what)
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(f"ggml ended with {self._process.wait()}") from error


def start(work: Work) -> Peer:
    """In the first buffer type in which a run succeeds."""
    while True:
        peer = Peer(work)
        try:
            peer.run()
            return peer
        except ChildProcessError:
            work = replace(work, without=(*work.without, peer.buffer))


def end(pipe: Connection, process: subprocess.Popen[bytes]) -> None:
    pipe.close()
    process.wait()


def serve(pipe: Connection) -> None:
    """The process's side: work, then wishes, and an answer to each."""
    products = Products(pipe.recv())
    pipe.send(products.buffer)
    while True:
        try:
            wish = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(products, wish)())


class Products:
    """The graph of all products, and its memory."""

    def __init__(self, work: Work) -> None:
        ggml, (m, n, k) = library(), (work.m, work.n, work.k)
        number = GGMLQuantizationType[work.kind]
        self._shape, self._passes = (m, n), work.passes
        device = ggml.ggml_backend_dev_by_type(CPU_DEVICE)
        buffer_type = choose_buffer_type(device, work)
        self.buffer = buffer_name(buffer_type)

        self._backend = ggml.ggml_backend_dev_init(device, None)
        set_threads = ctypes.CFUNCTYPE(None, c_void_p, c_int)
        set_threads(address(device, "ggml_backend_set_n_threads"))(self._backend, work.threads)

        weights = context(work.count)
        tensors = [ggml.ggml_new_tensor_2d(weights, number, k, n) for _ in range(work.count)]
        allocate(weights, buffer_type)
        for tensor, weight in zip(tensors, random_weights(work), strict=True):
            write(tensor, weight)

        nodes = 2 * work.count + 1
        rest = context(nodes, ggml.ggml_graph_overhead_custom(nodes, False))
        x = ggml.ggml_new_tensor_2d(rest, GGMLQuantizationType.F32, k, m)
        self._outputs = [ggml.ggml_mul_mat(rest, tensor, x) for tensor in tensors]
        self._graph = ggml.ggml_new_graph_custom(rest, nodes, False)
        for output in self._outputs:
            ggml.ggml_build_forward_expand(self._graph, output)
        memory = allocate(rest, ggml.ggml_backend_dev_buffer_type(device))
        ggml.ggml_backend_buffer_clear(memory, 0xFF)  # NaN
        write(x, random_input(work))

    def run(self) -> None:
        for _ in range(self._passes):
            status = library().ggml_backend_graph_compute(self._backend, self._graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def outputs(self) -> list[np.ndarray]:
        found = [np.empty(self._shape, np.float32) for _ in self._outputs]
        for tensor, out in zip(self._outputs, found, strict=True):
            library().ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
        return found


def random_weights(work: Work) -> Iterator[np.ndarray]:
    """Of random bytes, all of them legal, but for the FP16 scales: uint8 [N, bytes of a row]."""
    generator, scales = np.random.default_rng(0), FP16_SCALES[work.kind]
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[work.kind]]
    for _ in range(work.count):
        blocks = generator.integers(0, 256, (work.n * work.k // block, size), dtype=np.uint8)
        halves = (generator.random((len(blocks), scales)) * 0.01 + 0.001).astype(np.float16)
        blocks[:, : 2 * scales] = halves.view(np.uint8)
        yield blocks.reshape(work.n, -1)


def random_input(work: Work) -> np.ndarray:
    """FP32 [M, K] whose INT8 codes are known: 2^-e (a + 0.4) for integers a, and in every block the
    largest is 2^-e 127."""
    generator = np.random.default_rng(1)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[work.kind]]
    x = generator.integers(-126, 127, (work.m, work.k // block, block)) + 0.4
    x[:, :, 7] = 127
    x *= np.exp2(-generator.integers(0, 8, (work.m, work.k // block, 1)))
    return x.reshape(work.m, work.k).astype(np.float32)


@functools.cache
def library() -> Any:
    """libggml.so, through which the libraries it needs are found too."""
    loaded = ctypes.CDLL(str(library_file()))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
        if result is c_void_p:
            function.errcheck = refuse_null
    loaded.ggml_log_set(ctypes.cast(silence, c_void_p), None)
    return loaded


def library_file() -> Path:
    package = importlib.util.find_spec("llama_cpp")  # importing it would load all of llama.cpp
    if package is None or package.origin is None:
        raise ModuleNotFoundError("No ggml here: pip install llama-cpp-python")
    return Path(package.origin).parent / "lib" / "libggml.so"


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def silence(level: int, text: bytes, data: int | None) -> None:
    """ggml reports every weight that it repacks."""


def refuse_null(result: int | None, function: Any, arguments: tuple[Any, ...]) -> int:
    if result is None:
        raise RuntimeError(f"{function.__name__}{arguments} returned NULL")
    return result


def choose_buffer_type(device: int, work: Work) -> int:
    """The first that supports the product and is not one to do without."""
    ggml, number = library(), GGMLQuantizationType[work.kind]
    for buffer_type in buffer_types(device):
        if buffer_name(buffer_type) in work.without:
            continue
        trial = context(3)
        weight = ggml.ggml_new_tensor_2d(trial, number, work.k, work.n)
        buffer = allocate(trial, buffer_type)
        x = ggml.ggml_new_tensor_2d(trial, GGMLQuantizationType.F32, work.k, work.m)
        product = ggml.ggml_mul_mat(trial, weight, x)
        supported = ggml.ggml_backend_dev_supports_op(device, product)
        ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(trial)
        if supported:
            return buffer_type
    raise ValueError(f"No buffer type supports {work}")


def buffer_types(device: int) -> Iterator[int]:
    """In the order in which llama.cpp tries them."""
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)
    found = extra(address(device, "ggml_backend_dev_get_extra_bufts"))(device)
    yield from itertools.takewhile(bool, (found[i] for i in itertools.count()))
    yield library().ggml_backend_dev_buffer_type(device)


def buffer_name(buffer_type: int) -> str:
    return library().ggml_backend_buft_name(buffer_type).decode()


def address(device: int, name: str) -> int:
    """Of a function that the device's backend offers by name."""
    registry = library().ggml_backend_dev_backend_reg(device)
    return library().ggml_backend_reg_get_proc_address(registry, name.encode())


def context(tensors: int, more: int = 0) -> int:
    """Room for the descriptions of so many tensors."""
    size = tensors * library().ggml_tensor_overhead() + more
    return library().ggml_init(ContextSize(size, None, True))


def allocate(context: int, buffer_type: int) -> int:
    """One buffer for all tensors of a context."""
    return library().ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)


def write(tensor: int, values: np.ndarray) -> None:
    """A copy, in the order of the tensor's buffer type."""
    library().ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
