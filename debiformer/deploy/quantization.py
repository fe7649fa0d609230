"""Files in eight bits: ONNX Runtime's static quantisation, with the ranges that real images give."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .logs import quiet


def quantize(file: Path, batches: Iterable[np.ndarray]) -> None:
    """Quantise an ONNX file in place: weights and activations of convolutions and linear layers in int8, each channel with its own scale.

    Products of two activations stay in float32: attention, and the affinities that choose regions.

    Args:
        file: A file in float32.
        batches: Normalised images (B, 3, H, W), whose activations give the ranges.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.stream: Iterator[np.ndarray] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.stream, None)
            return None if batch is None else {"images": batch}

    described = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        weights = {tensor.name for tensor in model.graph.initializer}
        free = [node.name for node in model.graph.node if node.op_type == "MatMul" and not weights & set(node.input)]
        quantize_static(
            str(prepared),
            str(file),
            Batches(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=free,
        )
    written = onnx.load(file)
    onnx.helper.set_model_props(written, described)
    onnx.save(written, file)
