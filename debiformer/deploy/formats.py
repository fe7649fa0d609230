"""The formats: how a graph is converted to each, how the file is written, and how it is run."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.export import ExportedProgram

from .graphs import Description, first_outputs

KEY = "debiformer"  # under which files keep their description
Run = Callable[[np.ndarray], list[np.ndarray]]  # normalised images (B, 3, H, W) in float32 to the outputs


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: How its files end.
        needs: What must be installed to write and run them.
        convert: From a graph to what `save` takes; the slow part.
        save: Writes the first so many outputs, with a description.
        run: Loads a file on the CPU, in float32.
        routes: Whether a second file, with the routes, is quickly made.
    """

    suffix: str
    needs: tuple[str, ...]
    convert: Callable[[ExportedProgram, Description], Any]
    save: Callable[[Any, Path, Description, int], None]
    run: Callable[[Path], Run]
    routes: bool = True


def to_onnx(program: ExportedProgram, description: Description) -> Any:
    """PyTorch's own conversion to ONNX."""
    from onnx_ir.traversal import RecursiveGraphIterator

    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it tells of each constant that it does not fold
    made: Any = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
    for node in RecursiveGraphIterator(made.model.graph):
        node.metadata_props.clear()  # where it came from, larger than the weights
    made.model.graph.inputs[0].name = "images"
    for value, name in zip(made.model.graph.outputs, description.outputs, strict=False):
        value.name = name
    made.model.metadata_props[KEY] = json.dumps(description.as_dict())
    return made


def save_onnx(made: Any, file: Path, description: Description, outputs: int) -> None:
    """With the weights in the file; outputs that are left out are gone for good."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    del made.model.graph.outputs[outputs:]
    RemoveUnusedNodesPass()(made.model)
    made.save(file)


def run_onnx(file: Path) -> Run:
    """In ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # hundreds of lines tell of constants that it does not fold
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def to_openvino(program: ExportedProgram, description: Description) -> Any:
    """OpenVINO's own conversion."""
    import openvino

    return openvino.convert_model(program, input=[(-1, 3, *description.size)])


def save_openvino(whole: Any, file: Path, description: Description, outputs: int) -> None:
    """Two files, .xml and .bin; weights in float32."""
    import openvino

    model = openvino.Model([whole.output(index) for index in range(outputs or len(whole.outputs))], whole.get_parameters(), KEY)
    model.input(0).set_names({"images"})
    for index, name in enumerate(description.outputs):
        model.output(index).set_names({name})
    model.set_rt_info(json.dumps(description.as_dict()), [KEY])
    openvino.save_model(model, file, compress_to_fp16=False)


def run_openvino(file: Path) -> Run:
    """In OpenVINO."""
    from openvino import Core

    # Its default precision is bfloat16 on CPUs that have it; with snippets, release 2026.4 gives wrong numbers at some sizes.
    compiled = Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "SNIPPETS_MODE": "DISABLE"})
    return lambda images: [*compiled(images).values()]


def to_program(program: ExportedProgram, description: Description) -> ExportedProgram:
    """The graph as it is."""
    return program


def save_torch_export(program: ExportedProgram, file: Path, description: Description, outputs: int) -> None:
    """PyTorch's own format."""
    torch.export.save(first_outputs(program, outputs), file, extra_files={f"{KEY}.json": json.dumps(description.as_dict())})


def run_torch_export(file: Path) -> Run:
    """In PyTorch."""
    module = torch.export.load(file).module()
    return lambda images: [out.numpy() for out in module(torch.from_numpy(images))]


def save_aoti(program: ExportedProgram, file: Path, description: Description, outputs: int) -> None:
    """A package of machine code, for the kind of processor that it is made on."""
    options = {"aot_inductor.metadata": {KEY: json.dumps(description.as_dict())}}
    torch._inductor.aoti_compile_and_package(first_outputs(program, outputs), package_path=str(file), inductor_configs=options)


def run_aoti(file: Path) -> Run:
    """In PyTorch, which runs the machine code."""
    module = torch._inductor.aoti_load_package(str(file))
    return lambda images: [out.numpy() for out in module(torch.from_numpy(images))]


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), to_onnx, save_onnx, run_onnx),
    "openvino": Format(".xml", ("openvino",), to_openvino, save_openvino, run_openvino),
    "torch-export": Format(".pt2", (), to_program, save_torch_export, run_torch_export),
    "aoti": Format(".pt2", (), to_program, save_aoti, run_aoti, routes=False),
}
