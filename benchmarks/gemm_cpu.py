"""The GEMMs on a CPU: microseconds, the share of the roof, and other libraries in the same run.

    python benchmarks/gemm.py --device cpu --json gemm-cpu.json

    roof(M, N, K) = max(weight bytes / bandwidth, 2 M N K / INT8 operations a second)

Bandwidth and operations are measured right before and after every sample (`cpu_probes.cpp`), since
a shared machine changes both from second to second, and a sample counts against its own probes.
Operations are those of VNNI, or of vpmaddubsw and an addition where there is none. A machine with
AMX multiplies more than VNNI can: its share of this roof may exceed 1. In a round
every library has its turn, in a shuffled order; a ratio is that of two times of one round. Figures
are medians over the rounds.

Weights rotate through copies that exceed the last-level cache. INT8 activations are given to our
kernel and to oneDNN's W8A8; ONNX Runtime, OpenVINO and ggml quantize FP32 activations themselves,
which is part of their time. BF16 is oneDNN with weights packed beforehand, and F.linear as it
comes, and FP32, which is faster where the machine has no BF16 products. A library that takes fifty
times our time is left out from there on. Ours are recorded calls, as in the runtime's decode steps;
OpenVINO and ggml, too, multiply by all copies without coming back to Python, torch's and oneDNN's
do come back.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import cpu_peers, ggml_peer
from benchmarks.timing import first_line
from quant_kernels import cpu, cpu_gemm, ops
from quant_kernels.cpu_calls import Replay, record
from quant_kernels.formats import WeightFormat
from quant_kernels.packing import BLOCKED_SCALE_DTYPES, BlockedWeight, blocked_shapes

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 16, 64, 512)
GROUP = 128
FORMATS = (WeightFormat("w4a8", GROUP, "int8"), WeightFormat("w4afp8", GROUP, "lut"))
PROBED_BYTES = 2**27
PROBED_STEPS = 4000
SAMPLE_SECONDS = 0.02
SLOW = 50  # times our time, from which on a library is left out: it has no kernel for the machine


@dataclass(frozen=True)
class Peer:
    """`run` does `count` GEMMs, each with the next copy of the weights."""

    name: str
    run: Callable[[], object]
    count: int


class Probes:
    """Bandwidth in bytes a second and INT8 operations a second, of all threads together."""

    def __init__(self, threads: int) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
        source = Path(__file__).with_name("cpu_probes.cpp")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "probes.so"
            options = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *options, source, "-o", library], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.probe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._library.probe_read.restype = ctypes.c_double
        self._library.probe_products.argtypes = [ctypes.c_int64, ctypes.c_int]
        self._library.probe_products.restype = ctypes.c_double
        self._memory = cpu.empty_bytes(max(2**30, 2 * cache_bytes())).fill_(1)
        self._windows = itertools.cycle(range(len(self._memory) // PROBED_BYTES))
        self._threads = threads

    def bandwidth(self) -> float:
        start = self._memory.data_ptr() + next(self._windows) * PROBED_BYTES
        return float(self._library.probe_read(start, PROBED_BYTES, self._threads))

    def operations(self) -> float:
        return float(self._library.probe_products(PROBED_STEPS, self._threads))


def cache_bytes() -> int:
    """The last-level cache, or 32 MiB where the system does not say."""
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=2**25)


def copies(bytes_of_one: int, m: int) -> int:
    """Copies that evict one another; two where the time is the product's anyway."""
    return 2 if m >= 256 else max(2, min(64, 1 + cache_bytes() // bytes_of_one))


def random_weight(n: int, k: int, fmt: WeightFormat, seed: int) -> BlockedWeight:
    """A legal weight in the blocked layout: codes are uniform."""
    generator = torch.Generator().manual_seed(seed)
    code_shape, t_shape = blocked_shapes(n, k, fmt)
    codes = cpu.empty_bytes(*code_shape).random_(0, 256, generator=generator)
    if fmt.scheme == "w4a8":
        t = torch.empty(t_shape, dtype=torch.uint8).random_(1, 17, generator=generator)
    else:
        t = torch.rand(t_shape, generator=generator).mul(20).add(1)
    units = torch.rand(n, generator=generator) * 0.02 + 0.003
    return BlockedWeight(codes, t.to(BLOCKED_SCALE_DTYPES[fmt.numerics]), units, fmt)


def weight_bytes(weight: BlockedWeight) -> int:
    """Bytes that a product must read: codes and scales."""
    parts = (weight.codes, weight.t, weight.c)
    return sum(part.numel() * part.element_size() for part in parts)


def ours(m: int, n: int, k: int, fmt: WeightFormat) -> tuple[Peer, int]:
    """Our kernel, and the bytes of one weight."""
    weights = [random_weight(n, k, fmt, seed) for seed in range(copies(n * k // 2, m))]
    x = torch.randn(m, k).mul(40).clamp(-127, 127)
    dtype = torch.int8 if fmt.activation == "int8" else torch.float8_e4m3fn
    codes, scale = x.to(dtype), torch.rand(m, 1) * 0.01
    out = torch.empty(m, n, dtype=torch.bfloat16)

    # As the runtime decodes, and as OpenVINO and ggml run here: without Python between products.
    with record() as calls:
        for weight in weights:
            ops.gemm(codes, scale, weight, out, backend="cpu")
    replay = Replay(calls, holding=(weights, codes, scale, out))
    return Peer(fmt.label, replay, len(weights)), weight_bytes(weights[0])


def bf16_packed(m: int, n: int, k: int) -> Peer:
    pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    x = torch.randn(m, k, dtype=torch.bfloat16)
    held = [pack(torch.randn(n, k).bfloat16(), m) for _ in range(copies(2 * n * k, m))]
    rest = (None, "none", [], "")
    return Peer("bf16 packed", lambda: [linear(x, w, *rest) for w in held], len(held))


def bf16_linear(m: int, n: int, k: int) -> Peer:
    x = torch.randn(m, k, dtype=torch.bfloat16)
    held = [torch.randn(n, k).bfloat16() for _ in range(copies(2 * n * k, m))]
    return Peer("bf16 F.linear", lambda: [F.linear(x, w) for w in held], len(held))


def fp32_linear(m: int, n: int, k: int) -> Peer:
    x = torch.randn(m, k)
    held = [torch.randn(n, k) for _ in range(copies(4 * n * k, m))]
    return Peer("fp32 F.linear", lambda: [F.linear(x, w) for w in held], len(held))


def onednn_w8a8(m: int, n: int, k: int) -> Peer:
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    unit, zero = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
    held = [
        torch.ops.onednn.qlinear_prepack(
            torch.randint(-127, 128, (n, k), dtype=torch.int8).t().contiguous().t(), [m, k]
        )
        for _ in range(copies(n * k, m))
    ]
    linear = torch.ops.onednn.qlinear_pointwise
    out = (None, 1.0, 0, torch.bfloat16, "none", [], "")
    return Peer(
        "oneDNN W8A8", lambda: [linear(x, 0.01, 128, w, unit, zero, *out) for w in held], len(held)
    )


def torch_int_mm(m: int, n: int, k: int) -> Peer:
    x = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    held = [torch.randint(-127, 128, (n, k), dtype=torch.int8).t() for _ in range(copies(n * k, m))]
    return Peer("torch._int_mm", lambda: [torch._int_mm(x, w) for w in held], len(held))


def onnx_runtime(m: int, n: int, k: int) -> Peer:
    count = copies(n * k // 2, m)
    run = cpu_peers.onnx_runtime(m, n, k, GROUP, count, torch.get_num_threads())
    return Peer("ONNX Runtime acc 4", run, count)


def openvino(m: int, n: int, k: int) -> Peer:
    count = copies(n * k // 2, m)
    run = cpu_peers.openvino(m, n, k, GROUP, count, torch.get_num_threads())
    return Peer("OpenVINO dq", run, count)


def ggml(kind: str, m: int, n: int, k: int) -> Peer:
    count, threads = copies(n * k // 2, m), torch.get_num_threads()
    passes = max(1, 64 // (count * m))  # milliseconds, beside 50 µs to tell its process
    peer = ggml_peer.start(ggml_peer.Work(kind, m, n, k, count, threads, passes))
    return Peer(f"ggml {kind} in {peer.buffer}", peer.run, count * passes)


def ggml_q4_0(m: int, n: int, k: int) -> Peer:
    return ggml("Q4_0", m, n, k)


def ggml_q4_k(m: int, n: int, k: int) -> Peer:
    return ggml("Q4_K", m, n, k)


PEERS: tuple[Callable[[int, int, int], Peer], ...] = (
    bf16_packed,
    bf16_linear,
    fp32_linear,
    onednn_w8a8,
    torch_int_mm,
    onnx_runtime,
    openvino,
    ggml_q4_0,
    ggml_q4_k,
)


def measure(
    m: int,
    n: int,
    k: int,
    formats: Sequence[WeightFormat],
    rounds: int,
    probes: Probes,
    missing: dict[str, str],
) -> dict[str, Any]:
    """Every library at one shape: medians. missing: why one is not there, here and from here on."""
    made = [ours(m, n, k, fmt) for fmt in formats]
    peers, bytes_of_one = [peer for peer, _ in made], made[0][1]
    our_seconds = min(seconds_of(peers[0]) for _ in range(2))
    for make in PEERS:
        if make.__name__ in missing:
            continue
        try:
            peer = make(m, n, k)
            slower = seconds_of(peer) / our_seconds
            if slower > SLOW:  # once more: it may have compiled something
                slower = seconds_of(peer) / our_seconds
        except Exception as error:
            missing[make.__name__] = first_line(error)
            continue
        if slower > SLOW:
            missing[make.__name__] = f"{slower:.0f} times our time for {m} tokens, {n} x {k}"
        else:
            peers.append(peer)
    samples: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in random.sample(peers, len(peers)):
            samples[peer.name].append(sample(peer, m, n, k, bytes_of_one, probes))
    rows = {name: summary(found, samples[peers[0].name]) for name, found in samples.items()}
    return {"m": m, "n": n, "k": k, "rounds": rounds, "missing": dict(missing), "peers": rows}


def seconds_of(peer: Peer) -> float:
    """One run, of one product."""
    start = time.perf_counter()
    peer.run()
    return (time.perf_counter() - start) / peer.count


def sample(
    peer: Peer, m: int, n: int, k: int, bytes_of_one: int, probes: Probes
) -> dict[str, float]:
    """One time between probes; a pass before it brings threads back that have gone to sleep."""
    bandwidth, operations = [probes.bandwidth()], [probes.operations()]
    peer.run()
    passes, start, taken = 0, time.perf_counter(), 0.0
    while taken < SAMPLE_SECONDS:
        peer.run()
        passes += 1
        taken = time.perf_counter() - start
    operations.append(probes.operations())
    bandwidth.append(probes.bandwidth())
    seconds = taken / (passes * peer.count)
    best = {"bandwidth": max(bandwidth), "operations": max(operations)}
    roof = max(bytes_of_one / best["bandwidth"], 2 * m * n * k / best["operations"])
    return {"us": seconds * 1e6, "share": roof / seconds, **best}


def summary(found: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, float]:
    """Medians; "slower" is the time over that of our first format in the same round."""
    row = {name: median(one[name] for one in found) for name in found[0]}
    ratios = [one["us"] / other["us"] for one, other in zip(found, ours, strict=True)]
    return {**row, "best_us": min(one["us"] for one in found), "slower": median(ratios)}


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """A table a shape and M: times, shares of the roof, and how much slower than ours."""
    lines = ["| N x K | M | library | us | share of the roof | time / ours |", "|---" * 6 + "|"]
    for result in results:
        for name, row in result["peers"].items():
            lines.append(
                f"| {result['n']} x {result['k']} | {result['m']} | {name} | {row['us']:.0f} "
                f"| {row['share']:.0%} | {row['slower']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def run(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    rounds: int,
    json_file: Path | None = None,
    markdown_file: Path | None = None,
) -> None:
    """Measure, print, and write what was asked for."""
    probes = Probes(torch.get_num_threads())
    results: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    machine = {"threads": torch.get_num_threads(), "isa": cpu_gemm.isa(), "cache": cache_bytes()}
    for n, k in shapes:
        for m in tokens:
            results.append(measure(m, n, k, FORMATS, rounds, probes, missing))
            print("".join(markdown(results[-1:]).splitlines(keepends=True)[2:]), flush=True)
            if json_file:  # after every shape: a long run may be interrupted
                figures = {"machine": machine, "gemm": results}
                json_file.write_text(json.dumps(figures, indent=2) + "\n")
    if markdown_file:
        markdown_file.write_text(markdown(results))
