"""Triton's interpreter, which runs kernels with numpy, mended where version 3.6 differs from a GPU:
a loop's bounds may be computed (numpy 2.4 makes no integer of an array), bfloat16 is multiplied as
what it is and rounded to nearest, and nobody is warned of lanes that are masked.
"""

# mypy: ignore-errors
from __future__ import annotations

import warnings

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from kvant.formats.plain import from_bf16, to_bf16

__all__ = ["mend_interpreter"]


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(from_bf16(handle.data), tl.float32)


def mend_interpreter() -> None:
    """Does nothing where kernels are compiled. Safe to repeat."""
    builder = interpreter.InterpreterBuilder
    if not knobs.runtime.interpret or hasattr(builder, "kvant_mended"):
        return
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    dot, launch = builder.create_dot, interpreter.GridExecutor.__call__

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_or_round(x, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            return to_bf16(x)
        return convert(x, source, target, rounding)

    def launch_quietly(self, *args, **options):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return launch(self, *args, **options)

    call, patched = interpreter.InterpretedFunction.__call__, set()

    def call_patched(self, *args, **options):
        # A launch has patched what kernels see. Triton's own functions see more, once and for all.
        module = self.fn.__globals__
        if module.get("tl") is tl or module["__name__"] in patched:
            return self.rewrite()(*args, **options)
        patched.add(module["__name__"])
        return call(self, *args, **options)

    interpreter.InterpretedFunction.__call__ = call_patched
    interpreter._patch_lang_tensor = patch_and_mend
    interpreter._convert_float = convert_or_round
    interpreter.GridExecutor.__call__ = launch_quietly
    builder.create_dot = lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest)
    builder.kvant_mended = True
