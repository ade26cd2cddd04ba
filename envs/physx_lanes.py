"""Eight float64 numbers that compiled code computes with at once: a numba type for the processor's vector registers.

Loops over rows that branch and call functions are not vectorised by compilers; code written with `Lanes` in place of
floats is. Every operation works on each number alone, so what a row gives does not depend on the rows beside it; a
product may be fused with the sum it goes into, where the processor can. Lanes live in local variables, and in flat
float64 arrays by `load` and `store`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import lower_builtin, models, register_model, type_callable

intrinsic: Any = extending.intrinsic  # whose own type counts the compiler's context among a function's arguments

LANES = 8
"""How many: the width of the widest registers; compilers split it for narrower ones."""


class LanesType(types.Type):
    """Numba's type of eight float64."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes{LANES}")


_LANES = LanesType()
_VECTOR = ir.VectorType(ir.DoubleType(), LANES)


@register_model(LanesType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _spread(builder: Any, value: Any) -> Any:
    """Return `value` (a double, or already lanes) in every lane."""
    if value.type == _VECTOR:
        return value
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _define_operator(symbol: Callable[..., Any], instruction: str) -> None:
    @type_callable(symbol)
    def _type(context: Any) -> Callable[[Any, Any], Any]:
        def typer(a: Any, b: Any) -> Any:
            pair = (a, b)
            if _LANES in pair and all(x == _LANES or x == types.float64 for x in pair):
                return _LANES
            return None

        return typer

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*(_spread(builder, x) for x in args), flags=("contract",))

    for pair in ((LanesType, LanesType), (LanesType, types.Float), (types.Float, LanesType)):
        lower_builtin(symbol, *pair)(lower)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_symbol, _instruction)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    place = builder.gep(data, [builder.mul(index, ir.Constant(index.type, LANES))])
    return builder.bitcast(place, _VECTOR.as_pointer())


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Return lanes number `index` of a flat float64 array: its elements [index * LANES, (index + 1) * LANES)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=8)

    return _LANES(array, types.intp), generate


@intrinsic
def store(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """Write lanes number `index` of a flat float64 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(_spread(builder, args[2]), _pointer(context, builder, signature.args[0], *args[:2]), align=8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def lanes(typingctx: Any, value: Any) -> Any:
    """Return the float `value` in every lane."""
    return _LANES(types.float64), lambda context, builder, signature, args: _spread(builder, args[0])


@intrinsic
def choose_below(typingctx: Any, a: Any, b: Any, then: Any, other: Any) -> Any:
    """Return, lane by lane, `then` where a < b, `other` elsewhere (also where one of them is not a number)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, then, other = (_spread(builder, x) for x in args)
        return builder.select(builder.fcmp_ordered("<", a, b), then, other)

    return _LANES(a, b, then, other), generate


@intrinsic
def any_below(typingctx: Any, a: Any, b: Any) -> Any:
    """Return whether a < b in any lane."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.fcmp_ordered("<", *(_spread(builder, x) for x in args))
        number = builder.bitcast(bits, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", number, ir.Constant(number.type, 0))

    return types.boolean(a, b), generate


def _unary(name: str) -> Any:
    @intrinsic
    def function(typingctx: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(_VECTOR, [_VECTOR])
            target = get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f64")
            return builder.call(target, args)

        return _LANES(_LANES), generate

    return function


root = _unary("sqrt")
magnitude = _unary("fabs")
_floor = _unary("floor")
_nearest = _unary("rint")

_HALF_PI = (float(np.float32(math.pi / 2)), -4.371139000186241e-08)
"""Half of pi in two parts: whole multiples of the first are exact."""
_SINE = np.array([(-1) ** k / math.factorial(2 * k + 1) for k in range(1, 11)])
_COSINE = np.array([(-1) ** k / math.factorial(2 * k) for k in range(1, 11)])
_ARCSINE = np.array([math.comb(2 * k, k) / (4**k * (2 * k + 1)) for k in range(1, 27)])
"""Taylor series in x^2 after the first term, long enough for the last bit: to pi / 4 and (arc sine) to one half."""


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _series(coefficients: Any, x: Any) -> Any:
    square, last = x * x, len(coefficients) - 2
    even, odd = lanes(coefficients[last]), lanes(coefficients[last + 1])
    for k in range(last - 2, -1, -2):  # two sums that need not wait for each other
        even, odd = even * square + coefficients[k], odd * square + coefficients[k + 1]
    return even + odd * x


@numba.njit(cache=True, nogil=True, error_model="numpy")
def sine_cosine(x: Any) -> Any:
    """Return the sine and the cosine of `x`, right to one unit in the last place for |x| < 1e5."""
    turns = _nearest(x * (2.0 / math.pi))
    r = (x - turns * _HALF_PI[0]) - turns * _HALF_PI[1]
    square = r * r
    s, c = r + r * (square * _series(_SINE, square)), 1.0 + square * _series(_COSINE, square)
    half = _floor(turns * 0.5)
    odd = turns - half * 2.0
    sign = 1.0 - (half - _floor(half * 0.5) * 2.0) * 2.0
    return choose_below(0.5, odd, c, s) * sign, choose_below(0.5, odd, 0.0 - s, c) * sign


@numba.njit(cache=True, nogil=True, error_model="numpy")
def arc_cosine(x: Any) -> Any:
    """Return the arc cosine of `x` in [-1, 1], right to one unit in the last place."""
    size = magnitude(x)
    far = root((1.0 - size) * 0.5)
    z = choose_below(0.5, size, far, size)
    square = z * z
    angle = z + z * (square * _series(_ARCSINE, square))
    near = (math.pi / 2) - choose_below(x, 0.0, 0.0 - angle, angle)
    wide = choose_below(x, 0.0, math.pi - angle * 2.0, angle * 2.0)
    return choose_below(0.5, size, wide, near)
