"""The formats: how a graph is converted to each, and how the file is written; `example.load` runs any of them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from .example import KEY
from .graphs import Description, first_outputs


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: How its files end.
        needs: What must be installed to write and run them.
        convert: From a graph to what `save` takes; the slow part.
        save: Writes the first so many outputs, with a description.
        routes: Whether a second file, with the routes, is quickly made.
    """

    suffix: str
    needs: tuple[str, ...]
    convert: Callable[[ExportedProgram, Description], Any]
    save: Callable[[Any, Path, Description, int], None]
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
    made.model.metadata_props[KEY] = description.json()
    return made


def save_onnx(made: Any, file: Path, description: Description, outputs: int) -> None:
    """With the weights in the file; outputs that are left out are gone for good."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    del made.model.graph.outputs[outputs:]
    RemoveUnusedNodesPass()(made.model)
    made.save(file)


def to_openvino(program: ExportedProgram, description: Description) -> Any:
    """OpenVINO's own conversion."""
    import openvino

    return openvino.convert_model(program, input=[(-1, 3, *description.size)])


def save_openvino(whole: Any, file: Path, description: Description, outputs: int) -> None:
    """Two files, .xml and .bin; weights in float32."""
    import openvino

    model = openvino.Model([whole.output(index) for index in range(outputs)], whole.get_parameters(), KEY)
    model.input(0).set_names({"images"})
    for index, name in enumerate(description.outputs):
        model.output(index).set_names({name})
    model.set_rt_info(description.json(), [KEY])
    openvino.save_model(model, file, compress_to_fp16=False)


def to_program(program: ExportedProgram, description: Description) -> ExportedProgram:
    """The graph as it is."""
    return program


def save_torch_export(program: ExportedProgram, file: Path, description: Description, outputs: int) -> None:
    """PyTorch's own format."""
    torch.export.save(first_outputs(program, outputs), file, extra_files={f"{KEY}.json": description.json()})


def save_aoti(program: ExportedProgram, file: Path, description: Description, outputs: int) -> None:
    """A package of machine code, for the kind of processor that it is made on."""
    options = {"aot_inductor.metadata": {KEY: description.json()}}
    torch._inductor.aoti_compile_and_package(first_outputs(program, outputs), package_path=str(file), inductor_configs=options)


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), to_onnx, save_onnx),
    "openvino": Format(".xml", ("openvino",), to_openvino, save_openvino),
    "torch-export": Format(".pt2", (), to_program, save_torch_export),
    "aoti": Format(".pt2", (), to_program, save_aoti, routes=False),
}
