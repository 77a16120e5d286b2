"""The formats: how each is made from an exported program, and how its file is run.

| format | file | runs where |
|---|---|---|
| export | `model.pt2`, the program of `torch.export` | wherever this torch is |
| aoti | `model.aoti.pt2`, machine code | on a processor as this one, with this torch |
| onnx | `model.onnx` | wherever ONNX Runtime is |

Machine code is made under `torch.no_grad()`: with gradients on, `freezing` is a silent no-op (14.96 ms instead of 1.08
ms for an int8 linear layer). It is written for contiguous inputs, and may write into them: so each call gets copies.
Programs are saved without the example they were made with, which may be a user's data.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.errors import Unsupported
from lightning_accel.export.schema import Runner, Schema


class BackEnd(NamedTuple):
    """A format.

    Attributes:
        file: Its name in a bundle.
        portable: Whether it runs on other processors than the one that it was made on.
        missing: Returns what is not installed to make it, or nothing.
        lacking: Returns what is not installed to run it, or nothing.
        build: Writes the file from a program with its inputs.
        load: Opens the file.
    """

    file: str
    portable: bool
    missing: Callable[[], str]
    lacking: Callable[[], str]
    build: Callable[[torch.export.ExportedProgram, Sequence[Tensor], Schema, Path], None]
    load: Callable[[Path, Schema], Runner]


def build(
    name: str,
    program: torch.export.ExportedProgram,
    example: Sequence[Tensor],
    schema: Schema,
    folder: Path,
) -> Path:
    """Write the file of a format, and return where it is.

    Raises:
        Unsupported: Something that it needs is not installed.
    """
    back_end = FORMATS[name]
    missing = back_end.missing()
    if missing:
        raise Unsupported(f"the format {name!r} cannot be made here", missing, "install it")
    path = folder / back_end.file
    with quiet():
        back_end.build(program, example, schema, path)
    return path


def load(name: str, path: Path, schema: Schema) -> Runner:
    """Open the file of a format; whoever made it can run code here, so its hash is to be checked first."""
    with quiet():
        return FORMATS[name].load(path, schema)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what exporters say about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for phrase in (
                r"`isinstance\(treespec, LeafSpec\)` is deprecated",
                "`torch.jit.script",
                "The given buffer is not writable",
                "No complete tensor found in the group",  # weights that lie channels last
                r"The tensor attributes? .*_flat_weights",  # recurrent layers, whose weights stay
                "To copy construct from a tensor",  # inductor's own, of zero points
            ):
                warnings.filterwarnings("ignore", phrase)
            warnings.filterwarnings("ignore", module=r"(onnx|onnxscript|torch\.onnx)(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous copies: what runs gets nothing of the caller's."""
    return [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]


def _build_export(program: Any, example: Sequence[Tensor], schema: Schema, path: Path) -> None:
    held = program._example_inputs
    program._example_inputs = None
    try:
        torch.export.save(program, path)
    finally:
        program._example_inputs = held


def _load_export(path: Path, schema: Schema) -> Runner:
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (operators of integers)

    module = torch.export.load(path).module()

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(module(*copies(tensors)))

    return run


def _build_aoti(program: Any, example: Sequence[Tensor], schema: Schema, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    # Freezing would make floats of weights that are integers alone, and the file four times as large.
    freezes = not _of_integer_weights_alone(program)
    with torch.no_grad():
        aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"freezing": freezes}
        )


def _of_integer_weights_alone(program: Any) -> bool:
    operators = {str(node.target) for node in program.graph.nodes}
    reads = any("dequantize_per_channel" in name for name in operators)
    return reads and not any("quantize_per_tensor" in name for name in operators)


def _load_aoti(path: Path, schema: Schema) -> Runner:
    from torch._inductor import aoti_load_package

    compiled = aoti_load_package(str(path))

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(compiled(*copies(tensors)))

    return run


def _build_onnx(program: Any, example: Sequence[Tensor], schema: Schema, path: Path) -> None:
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[spec.name for spec in schema.inputs],
        output_names=[spec.name for spec in schema.outputs],
        custom_translation_table=_translations(),
    )
    assert made is not None
    _say_types_of_ranges(made.model.graph)
    _multiply_integers(made.model.graph)
    for node in made.model.graph:
        node.metadata_props.clear()  # lines of the user's code, and where it lies
    made.save(path)


def _translations() -> dict[Any, Any]:
    """Return how to say ranges that each call finds, which the exporter does not know."""
    from onnxscript import opset18 as op
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (operators of integers)

    def choose(x: Any, low: Any, high: Any, smallest: Any, dtype: Any) -> Any:
        _, scale, zero = op.DynamicQuantizeLinear(x)
        # It looks for the largest number past NaN, whose integers would be some number: so all answers become NaN.
        nothing = op.ReduceSum(op.Sub(x, x), keepdims=0)
        return op.Add(scale, nothing), zero

    def whole(x: Any, scale: Any, zero: Any, low: Any, high: Any, dtype: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero)

    def read(x: Any, scale: Any, zero: Any, low: Any, high: Any, dtype: Any) -> Any:
        return op.DequantizeLinear(x, scale, zero)

    ops: Any = torch.ops.quantized_decomposed
    return {
        ops.choose_qparams.tensor: choose,
        ops.quantize_per_tensor.tensor: whole,
        ops.dequantize_per_tensor.tensor: read,
    }


def _say_types_of_ranges(graph: Any) -> None:
    """Say what ONNX gives where torch has scales of 64 bits and zero points that are long."""
    import onnx_ir

    for node in graph:
        if node.op_type == "DynamicQuantizeLinear":
            node.outputs[2].dtype = onnx_ir.DataType.UINT8
            for made in (node, *(use.node for use in node.outputs[1].uses())):
                if made.op_type in ("DynamicQuantizeLinear", "Add"):
                    made.outputs[made is node].dtype = onnx_ir.DataType.FLOAT


def _multiply_integers(graph: Any) -> None:
    """Store biases as ONNX Runtime needs them for products of integers: integers of 32 bits, in steps of both scales.

    Such a step is some 1e-5 of what a product gives, so nothing is lost. Without it `Gemm` stays one of floating point.
    """
    import numpy
    import onnx_ir

    for node in [n for n in graph if n.op_type in ("Gemm", "Conv") and not n.domain]:
        makers = [one.producer() if one is not None else None for one in node.inputs[:2]]
        if any(maker is None or maker.op_type != "DequantizeLinear" for maker in makers):
            continue
        held = [node.inputs[2] if len(node.inputs) > 2 else None]
        held += [maker.inputs[1] for maker in makers if maker is not None]
        if any(one is None or one.const_value is None for one in held):
            continue
        bias, *steps = (one.const_value.numpy() for one in held if one is not None)
        step = _wide_enough(node.inputs[1].producer(), steps, bias)
        whole = (bias / step).round().astype(numpy.int32)
        parts = [
            onnx_ir.Value(name=f"{node.name}_{name}", const_value=onnx_ir.tensor(value))
            for name, value in (("bias", whole), ("step", step), ("zero", numpy.zeros_like(whole)))
        ]
        for part in parts:
            graph.register_initializer(part)
        read = onnx_ir.node("DequantizeLinear", parts, attributes={"axis": 0})
        graph.insert_before(node, read)
        node.replace_input_with(2, read.outputs[0])


def _wide_enough(weight: Any, steps: Any, bias: Any) -> Any:
    """Return the step of each bias; where 32 bits would not hold it, as in channels without weights, these get longer ones."""
    import numpy
    import onnx_ir

    step = numpy.float32(steps[0]) * steps[1].astype(numpy.float32)
    least = numpy.abs(bias) / numpy.float32(2**30)
    if (step >= least).all():
        return numpy.maximum(step, numpy.finfo(numpy.float32).tiny)
    made = numpy.maximum(steps[1], least / numpy.float32(steps[0])).astype(numpy.float32)
    axis = weight.attributes["axis"].as_int() if "axis" in weight.attributes else 1
    whole = weight.inputs[0].const_value.numpy()
    share = (steps[1] / made).reshape([-1 if dim == axis else 1 for dim in range(whole.ndim)])
    for index, value in ((0, (whole * share).round().astype(whole.dtype)), (1, made)):
        given = weight.inputs[index]
        own = onnx_ir.Value(name=f"{given.name}_{weight.name}", const_value=onnx_ir.tensor(value))
        weight.graph.register_initializer(own)
        weight.replace_input_with(index, own)
    return numpy.float32(steps[0]) * made


def _load_onnx(path: Path, schema: Schema) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Its threads would go on spinning after a call, at the cost of whatever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {given.name for given in session.get_inputs()}
    order = [(index, spec.name) for index, spec in enumerate(schema.inputs) if spec.name in taken]

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        feed = {name: tensors[index].detach().contiguous().numpy() for index, name in order}
        return tuple(torch.as_tensor(array) for array in session.run(None, feed))

    return run


def _missing(*packages: str) -> Callable[[], str]:
    def missing() -> str:
        absent = [name for name in packages if find_spec(name) is None]
        return (
            f"{', '.join(absent)} not installed: pip install 'lightning-accel[export]'"
            if absent
            else ""
        )

    return missing


def _no_compiler() -> str:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # `InvalidCxxCompiler`, whose place moves between releases
        return f"no C++ compiler: {(str(error).splitlines() or [''])[0][:120]}"
    return ""


FORMATS = {
    "export": BackEnd("model.pt2", True, _missing(), _missing(), _build_export, _load_export),
    "aoti": BackEnd("model.aoti.pt2", False, _no_compiler, _missing(), _build_aoti, _load_aoti),
    "onnx": BackEnd(
        "model.onnx",
        True,
        _missing("onnx", "onnxscript", "onnxruntime"),
        _missing("onnxruntime"),
        _build_onnx,
        _load_onnx,
    ),
}
