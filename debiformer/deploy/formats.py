"""The formats: how a graph is converted to each, and how the file is written; `example.load` runs any of them."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from .example import KEY
from .graphs import Description, first_outputs
from .logs import quiet


class Format(NamedTuple):
    """A format of files.

    Attributes:
        suffix: Of its files.
        needs: What must be installed to write and run them.
        extra: Which of this library's extras installs that.
        convert: From a graph to what `save` takes; the slow part.
        save: Writes the first so many outputs, with a description.
        precisions: What it is written in.
        routes: Whether a second file, with the routes, is quickly made.
        any_size: Whether height and width can be left open.
        runs_here: Whether files can be run, and so compared, on any machine.
        no_detectors: Why there are no files of detectors; empty where there are.
    """

    suffix: str
    needs: tuple[str, ...]
    extra: str
    convert: Callable[[ExportedProgram, Description], Any]
    save: Callable[[Any, Path, Description, int], None]
    precisions: tuple[str, ...] = ("float32", "bfloat16")
    routes: bool = True
    any_size: bool = True
    runs_here: bool = True
    no_detectors: str = ""


def to_onnx(program: ExportedProgram, description: Description) -> Any:
    """PyTorch's own conversion to ONNX."""
    from onnx_ir import Shape
    from onnx_ir.passes import common
    from onnx_ir.traversal import RecursiveGraphIterator
    from onnxscript.optimizer import fold_constants

    with quiet("onnxscript"):  # which tells of each constant that it does not fold
        made: Any = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
        # All that `optimize=True` does but for rewriting by patterns, which takes the square of the graph: minutes for larger models.
        common.InlinePass()(made.model)
        fold_constants(made.model)
        for simplify in (
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedFunctionsPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.LiftSubgraphInitializersToMainGraphPass(),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
        ):
            simplify(made.model)
    for node in RecursiveGraphIterator(made.model.graph):
        node.metadata_props.clear()  # where it came from, larger than the weights
    (images,) = made.model.graph.inputs
    images.name = "images"
    height, width = ("height", "width") if description.any_size else images.shape[2:]
    images.shape = Shape([1 if description.one_image else "batch", 3, height, width])
    for value, name in zip(made.model.graph.outputs, description.outputs, strict=False):
        value.name = name
    made.model.metadata_props[KEY] = description.json()
    return made


def save_onnx(made: Any, file: Path, description: Description, outputs: int) -> None:
    """With the weights in the file; outputs that are left out are gone for good."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    del made.model.graph.outputs[outputs:]
    RemoveUnusedNodesPass()(made.model)
    if description.precision != "float16":
        made.save(file)
        return
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    kept = [*DEFAULT_OP_BLOCK_LIST, "GridSample"]  # which reads between pixels, and must know where
    converted = convert_float_to_float16(made.model_proto, keep_io_types=True, op_block_list=kept)
    once = {node.output[0]: node for node in reversed(converted.graph.node)}  # it casts a value for each that wants it, under one name
    nodes = [node for node in converted.graph.node if node is once[node.output[0]]]
    del converted.graph.node[:]
    converted.graph.node.extend(nodes)
    onnx.save(converted, file)


def to_openvino(program: ExportedProgram, description: Description) -> Any:
    """OpenVINO's own conversion; of detectors, whose suppression of boxes it knows as ONNX only, by way of that."""
    import openvino

    if description.task != "detection":
        return openvino.convert_model(program)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        to_onnx(program, description).save(file)
        return openvino.convert_model(file)


def save_openvino(whole: Any, file: Path, description: Description, outputs: int) -> None:
    """Two files, .xml and .bin; the weights in float32, but for float16."""
    import openvino

    model = openvino.Model([whole.output(index) for index in range(outputs)], whole.get_parameters(), KEY)
    model.input(0).set_names({"images"})
    for index, name in enumerate(description.outputs):
        model.output(index).set_names({name})
    model.set_rt_info(description.json(), [KEY])
    openvino.save_model(model, file, compress_to_fp16=description.precision == "float16")


def to_program(program: ExportedProgram, description: Description) -> ExportedProgram:
    """The graph as it is."""
    return program


def save_torch_export(program: ExportedProgram, file: Path, description: Description, outputs: int) -> None:
    """PyTorch's own format."""
    torch.export.save(first_outputs(program, description, outputs), file, extra_files={f"{KEY}.json": description.json()})


def save_aoti(program: ExportedProgram, file: Path, description: Description, outputs: int) -> None:
    """A package of machine code, for the kind of processor that it is made on."""
    options = {"aot_inductor.metadata": {KEY: description.json()}}
    torch._inductor.aoti_compile_and_package(first_outputs(program, description, outputs), package_path=str(file), inductor_configs=options)


def to_coreml(program: ExportedProgram, description: Description) -> Any:
    """An ML program, by Apple's converter, which takes no number of images but one."""
    import coremltools

    program = program.run_decompositions({})
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # unknown to it
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    half = coremltools.transform.FP16ComputePrecision(lambda operation: operation.op_type != "resample")  # as for ONNX
    precision = half if description.precision == "float16" else coremltools.precision.FLOAT32
    outputs = [coremltools.TensorType(name=name) for name in description.outputs]
    target = coremltools.target.iOS17
    with quiet("coremltools"):  # which tells of each index that it makes an int32
        return coremltools.convert(program, outputs=outputs, minimum_deployment_target=target, compute_precision=precision)


def save_coreml(made: Any, file: Path, description: Description, outputs: int) -> None:
    """A folder, as Core ML has it."""
    made.user_defined_metadata[KEY] = description.json()
    made.save(str(file))


def coreml_interface(file: Path) -> str:
    """What goes into a saved ML program and comes out of it, and its operations, in words."""
    import coremltools

    spec = coremltools.utils.load_spec(str(file))
    (images,) = spec.description.input
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    operations = sum(operation.type != "const" for operation in block.operations)
    shape = "x".join(map(str, images.type.multiArrayType.shape))
    return f"{images.name} {shape} to {', '.join(out.name for out in spec.description.output)} in {operations} operations"


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), "export", to_onnx, save_onnx, ("float32", "float16", "int8")),
    "openvino": Format(
        ".xml", ("openvino", "onnx", "onnxscript"), "export", to_openvino, save_openvino, ("float32", "float16", "bfloat16")
    ),
    "torch-export": Format(".pt2", (), "export", to_program, save_torch_export),
    "aoti": Format(
        ".pt2",
        (),
        "export",
        to_program,
        save_aoti,
        routes=False,
        any_size=False,
        no_detectors="they were not tried in it; torch-export runs in PyTorch too",
    ),
    "coreml": Format(
        ".mlpackage",
        ("coremltools",),
        "coreml",
        to_coreml,
        save_coreml,
        ("float32", "float16"),
        routes=False,
        any_size=False,
        runs_here=False,
        no_detectors="it does not have their operations",
    ),
}
