"""Modules as graphs that run without Python: captured by torch.export, run by ONNX Runtime or by compiled C++.

A graph has fixed shapes. It is compared with its module when it is built, so that none that computes something else is
ever used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from robopolicy.errors import MissingRequirementError, RobopolicyError

MOST_ERROR = 1e-3
"""Largest difference between a graph and its module, in the outputs' units; float32 leaves about 1e-5."""


class Runner(Protocol):
    """A graph that is ready to run."""

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for `inputs`, in the order in which they were named."""


def build_graph(
    kind: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    what: str,
    names: Sequence[str],
    outputs: Sequence[str],
    num_threads: int,
) -> Runner:
    """Return `module` as a graph for tensors shaped like `inputs`.

    Args:
        kind: one of BACKENDS.
        module: takes tensors and returns one, or a tuple of them.
        inputs: examples; the graph must agree with the module on them.
        what: the module, in words, for error messages.
        names, outputs: of inputs and outputs.
        num_threads: of ONNX Runtime; compiled code runs on torch's threads.

    Raises:
        MissingRequirementError: a package or a C++ compiler is missing.
        RobopolicyError: the module cannot be captured, or the graph computes something else.
    """
    require_backend(kind)
    with torch.no_grad():
        wanted = module(*inputs)
    expected = wanted if isinstance(wanted, tuple) else (wanted,)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module, tuple(inputs), strict=False)
            runner = BACKENDS[kind](program, names, outputs, num_threads)
    except Exception as error:  # whatever a tracer raises about somebody's module, the answer is the same
        first_line = str(error).strip().partition("\n")[0]
        raise RobopolicyError(
            f"engine={kind} cannot capture {what} ({type(error).__name__}: {first_line}); engine=eager works."
        ) from error
    require_equal(kind, runner(*inputs), expected, what=what)
    return runner


def require_equal(kind: str, found: Sequence[Tensor], expected: Sequence[Tensor], *, what: str) -> float:
    """Return the largest difference; raise RobopolicyError if it is above MOST_ERROR or no number."""
    error = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    if not error <= MOST_ERROR:
        raise RobopolicyError(
            f"engine={kind} computes {what} wrongly: it differs from eager by {error:.2g}; engine=eager works."
        )
    return error


def require_backend(kind: str) -> None:
    """Raise MissingRequirementError, saying what to install, if graphs of this kind cannot be built here."""
    if kind == "onnx":
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingRequirementError(
                f"engine=onnx needs {', '.join(missing)}: pip install 'robopolicy[export]' installs them."
            )
    if kind == "compile":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise MissingRequirementError(
                "engine=compile needs a C++ compiler, and none was found: install g++ (apt-get install g++), or set "
                "CXX to the one to use. engine=onnx needs none."
            ) from error


class OnnxRunner:
    """An ONNX model in ONNX Runtime, on the CPU; inputs and outputs have their memory once and for all."""

    def __init__(self, model: bytes, *, num_threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.model = model
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._binding: Any = self._session.io_binding()
        self._inputs = [_buffer(value) for value in self._session.get_inputs()]
        self._outputs = [_buffer(value) for value in self._session.get_outputs()]
        for bind, values, buffers in (
            (self._binding.bind_input, self._session.get_inputs(), self._inputs),
            (self._binding.bind_output, self._session.get_outputs(), self._outputs),
        ):
            for value, buffer in zip(values, buffers, strict=True):
                bind(value.name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in zip(self._inputs, inputs, strict=True):
            np.copyto(buffer, value.numpy(), casting="no")
        self._session.run_with_iobinding(self._binding)
        return tuple(torch.from_numpy(buffer.copy()) for buffer in self._outputs)


def _buffer(value: Any) -> np.ndarray:
    """Return memory for an input or output of a session."""
    kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int64)": np.int64}
    return np.zeros(value.shape, kinds[value.type])


class CompiledRunner:
    """A shared library made by AOTInductor; its folder lives as long as this object."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        import torch._inductor as inductor

        self._folder = tempfile.TemporaryDirectory(prefix="robopolicy-")
        package = str(Path(self._folder.name) / "graph.pt2")
        self._run: Any = inductor.aoti_load_package(inductor.aoti_compile_and_package(program, package_path=package))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            found = self._run(
                *(value.contiguous() for value in inputs)
            )  # it takes the strides of the example for granted
        return tuple(found) if isinstance(found, tuple | list) else (found,)


def _onnx(
    program: torch.export.ExportedProgram, names: Sequence[str], outputs: Sequence[str], num_threads: int
) -> OnnxRunner:
    exported = torch.onnx.export(
        program, input_names=list(names), output_names=list(outputs), dynamo=True, optimize=True, verbose=False
    )
    assert exported is not None
    return OnnxRunner(exported.model_proto.SerializeToString(), num_threads=num_threads)


def _compiled(
    program: torch.export.ExportedProgram, names: Sequence[str], outputs: Sequence[str], num_threads: int
) -> CompiledRunner:
    return CompiledRunner(program)


BACKENDS: dict[str, Callable[..., Runner]] = {"onnx": _onnx, "compile": _compiled}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' notes about packages and constants that nobody asked for off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
