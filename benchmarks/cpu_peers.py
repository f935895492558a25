"""Other libraries' INT4 products on a CPU, where they are installed: one graph of many products.

Both quantize FP32 activations to INT8 themselves. The constants of the products differ: equal ones
would be stored once, and lie in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def onnx_runtime(
    m: int, n: int, k: int, group: int, count: int, threads: int
) -> Callable[[], object]:
    """MatMulNBits with accuracy level 4: INT8 products."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    nodes, constants = [], []
    for i in range(count):
        codes = generator.integers(0, 256, (n, k // group, group // 2), dtype=np.uint8)
        scales = generator.random(n * (k // group), dtype=np.float32) * 0.01 + 0.001
        constants += [
            numpy_helper.from_array(codes, f"codes{i}"),
            numpy_helper.from_array(scales, f"scales{i}"),
        ]
        options = {"K": k, "N": n, "bits": 4, "block_size": group, "accuracy_level": 4}
        nodes.append(
            helper.make_node(
                "MatMulNBits", ["x", f"codes{i}", f"scales{i}"], [f"y{i}"],
                domain="com.microsoft", **options,
            )
        )  # fmt: skip
    value, names = helper.make_tensor_value_info, [f"y{i}" for i in range(count)]
    inputs = [value("x", TensorProto.FLOAT, [m, k])]
    outputs = [value(name, TensorProto.FLOAT, [m, n]) for name in names]
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    session = ort.InferenceSession(
        onnx.ModelProto.SerializeToString(model), settings, providers=["CPUExecutionProvider"]
    )
    x = {"x": generator.standard_normal((m, k), dtype=np.float32)}
    return lambda: session.run(None, x)


def openvino(m: int, n: int, k: int, group: int, count: int, threads: int) -> Callable[[], object]:
    """Compressed INT4 weights with dynamic quantization of the activations by group."""
    import openvino as ov
    from openvino import opset13 as op

    generator = np.random.default_rng(0)
    x = op.parameter([m, k], dtype=np.float32, name="x")
    results = []
    for _ in range(count):
        packed = generator.integers(0, 256, n * k // 2, dtype=np.uint8)
        codes = ov.Tensor(packed, ov.Shape([n, k // group, group]), ov.Type.i4)
        scales = (generator.random((n, k // group, 1)) * 0.01 + 0.001).astype(np.float16)
        weight: Any = op.multiply(op.convert(op.constant(codes), np.float16), op.constant(scales))
        weight = op.convert(op.reshape(weight, np.array([n, k]), False), np.float32)
        results.append(op.matmul(x, weight, False, True))
    options = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(ov.Model(results, [x], "products"), "CPU", options)
    request = compiled.create_infer_request()
    request.set_tensor("x", ov.Tensor(generator.standard_normal((m, k), dtype=np.float32)))
    return request.infer
