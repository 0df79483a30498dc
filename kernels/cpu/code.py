"""The language in which Python says what a CPU's kernel does; minirea.kernels.cpu.compile makes a function of it.

A kernel is a Python function that is called once, with a `Code` and the kernel's arguments as `Value`s; what it does
with them becomes the code, loops and branches by `Code.range` and `Code.when`. Numbers that it gets from Python are
constants of the code, so that there is one kernel for each head dim, number of columns or kind of weights. Addresses
are integers and count bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from minirea.kernels.cpu.threads import thread_functions

LANES: Final = 16  # of a vector; LLVM divides it where the processor has narrower ones


class Type(NamedTuple):
    """A number's, or a vector's, of integers or of floats."""

    kind: str
    bits: int
    lanes: int = 0

    @property
    def llvm(self) -> Any:
        if self.lanes:
            return ir().VectorType(self._replace(lanes=0).llvm, self.lanes)
        if self.kind == "i":
            return ir().IntType(self.bits)
        return ir().HalfType() if self.bits == 16 else ir().FloatType()

    @property
    def name(self) -> str:
        """As intrinsics have it."""
        return f"v{self.lanes}{self.kind}{self.bits}" if self.lanes else f"{self.kind}{self.bits}"

    @property
    def element(self) -> Type:
        return self._replace(lanes=0)

    def like(self, other: Type) -> Type:
        """With as many lanes."""
        return self._replace(lanes=other.lanes)

    def constant(self, number: float | list[Any] | None) -> Any:
        """LLVM's, of one number for all lanes or of each lane's; zero."""
        if isinstance(number, (int, float)) and self.lanes:
            number = [number] * self.lanes
        return ir().Constant(self.llvm, number)


I1, I8, I16, I32, I64 = (Type("i", bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = Type("f", 16), Type("f", 32)


def vector(element: Type, lanes: int = LANES) -> Type:
    return element._replace(lanes=lanes)


class Value:
    """A value of the compiled code, with Python's operators. Numbers become constants of its type."""

    def __init__(self, builder: Any, of: Any, type_: Type) -> None:
        self.builder, self.of, self.type = builder, of, type_

    @property
    def is_float(self) -> bool:
        return self.type.kind == "f"

    def _with(self, other: Value | float, of_integers: str, of_floats: str) -> Value:
        name = of_floats if self.is_float else of_integers
        return Value(self.builder, getattr(self.builder, name)(self.of, self.operand(other)), self.type)

    def _compared(self, other: Value | float, predicate: str) -> Value:
        compare = self.builder.fcmp_ordered if self.is_float else self.builder.icmp_signed
        return Value(self.builder, compare(predicate, self.of, self.operand(other)), I1.like(self.type))

    def operand(self, other: Value | float) -> Any:
        """LLVM's, of this type."""
        return other.of if isinstance(other, Value) else self.type.constant(other)

    def __add__(self, other: Value | float) -> Value:
        return self._with(other, "add", "fadd")

    def __sub__(self, other: Value | float) -> Value:
        return self._with(other, "sub", "fsub")

    def __mul__(self, other: Value | float) -> Value:
        return self._with(other, "mul", "fmul")

    def __truediv__(self, other: Value | float) -> Value:
        """Of floats."""
        return self._with(other, "sdiv", "fdiv")

    def __floordiv__(self, other: Value | float) -> Value:
        """Of integers that are not negative."""
        return self._with(other, "udiv", "fdiv")

    def __lshift__(self, other: Value | float) -> Value:
        return self._with(other, "shl", "shl")

    def __rshift__(self, other: Value | float) -> Value:
        """Zeros come in."""
        return self._with(other, "lshr", "lshr")

    def __and__(self, other: Value | float) -> Value:
        return self._with(other, "and_", "and_")

    def __or__(self, other: Value | float) -> Value:
        return self._with(other, "or_", "or_")

    def __lt__(self, other: Value | float) -> Value:
        return self._compared(other, "<")

    def __gt__(self, other: Value | float) -> Value:
        return self._compared(other, ">")

    def bits(self, type_: Type) -> Value:
        """The same bits as another type."""
        return Value(self.builder, self.builder.bitcast(self.of, type_.llvm), type_)


class Variable:
    """A value that changes."""

    def __init__(self, builder: Any, first: Value) -> None:
        self._builder, self._type = builder, first.type
        with builder.goto_entry_block():  # where LLVM makes registers of them
            self._at = builder.alloca(first.type.llvm)
        self.value = first

    @property
    def value(self) -> Value:
        return Value(self._builder, self._builder.load(self._at), self._type)

    @value.setter
    def value(self, value: Value) -> None:
        self._builder.store(value.of, self._at)


class Code:
    """The code of one kernel as it is written."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _value(self, of: Any, type_: Type) -> Value:
        return Value(self.builder, of, type_)

    def number(self, number: float | list[Any], type_: Type = I64) -> Value:
        """A constant; of a vector one number for all lanes, or each lane's."""
        return self._value(type_.constant(number), type_)

    def integer(self, number: Value | int) -> Value:
        return number if isinstance(number, Value) else self.number(number)

    def zeros(self, lanes: int = LANES) -> Value:
        return self.number(0.0, vector(F32, lanes))

    def variable(self, first: Value) -> Variable:
        return Variable(self.builder, first)

    @contextlib.contextmanager
    def range(self, start: Value | int, stop: Value | int, step: Value | int = 1) -> Iterator[Value]:
        """A loop over an int64."""
        at, stop = self.variable(self.integer(start)), self.integer(stop)
        with self.loop(lambda: at.value < stop):
            yield at.value
            at.value = at.value + step

    @contextlib.contextmanager
    def loop(self, condition: Callable[[], Value]) -> Iterator[None]:
        """As long as a condition holds, which is looked at before each round."""
        head, body, end = (self.builder.append_basic_block() for _ in range(3))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition().of, body, end)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextlib.contextmanager
    def each_bit(self, bits: Value) -> Iterator[Value]:
        """A loop over the places of an int64's bits that are one, the lowest first; it is not negative."""
        left = self.variable(bits)
        with self.loop(lambda: left.value > 0):
            place = self._call(f"llvm.cttz.{bits.type.name}", bits.type, [left.value.of, I1.constant(1)])
            left.value = left.value & (left.value - 1)
            yield place

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.of):
            yield

    def load(self, address: Value, type_: Type, lanes: Value | int | None = None) -> Value:
        """What lies at an address. Of a vector the first `lanes`, and zeros."""
        pointer = self.builder.inttoptr(address.of, type_.llvm.as_pointer())
        if lanes is None or lanes == type_.lanes:
            return self._value(self.builder.load(pointer, align=1), type_)
        arguments = [pointer, I32.constant(1), self._first(lanes, type_.lanes), type_.constant(None)]
        return self._call(f"llvm.masked.load.{type_.name}.p0", type_, arguments)

    def floats(self, address: Value, kind: str, lanes: Value | int | None = None) -> Value:
        """A vector of float32 from memory that has numbers of torch's dtype `kind`: the first `lanes`, and zeros."""
        if kind == "float32":
            return self.load(address, vector(F32), lanes)
        if kind == "float16":
            return self.to_float(self.load(address, vector(F16), lanes))
        bits = self.wider(self.load(address, vector(I16), lanes), I32) << 16  # bfloat16: a float32's upper half
        return bits.bits(vector(F32))

    def store(self, value: Value, address: Value, lanes: Value | int | None = None) -> None:
        """Of a vector the first `lanes`, all of them without."""
        pointer = self.builder.inttoptr(address.of, value.type.llvm.as_pointer())
        if lanes is None or lanes == value.type.lanes:
            self.builder.store(value.of, pointer, align=1)
            return
        arguments = [value.of, pointer, I32.constant(1), self._first(lanes, value.type.lanes)]
        self._call(f"llvm.masked.store.{value.type.name}.p0", None, arguments)

    def _first(self, lanes: Value | int, count: int) -> Any:
        """Which lanes are the first."""
        index = self._value(vector(I64, count).constant(list(range(count))), vector(I64, count))
        return (index < (self.splat(lanes, count) if isinstance(lanes, Value) else lanes)).of

    def splat(self, value: Value, lanes: int = LANES) -> Value:
        """A vector of one value."""
        type_ = vector(value.type, lanes)
        nothing = type_.constant(ir().Undefined)
        one = self.builder.insert_element(nothing, value.of, I32.constant(0))
        return self._value(self.builder.shuffle_vector(one, nothing, vector(I32, lanes).constant(0)), type_)

    def vector_of(self, values: Sequence[Value]) -> Value:
        type_ = vector(values[0].type, len(values))
        out = type_.constant(ir().Undefined)
        for lane, value in enumerate(values):
            out = self.builder.insert_element(out, value.of, I32.constant(lane))
        return self._value(out, type_)

    def indices(self, start: int = 0, lanes: int = LANES) -> Value:
        """int32 numbers from start on."""
        type_ = vector(I32, lanes)
        return self._value(type_.constant(list(range(start, start + lanes))), type_)

    def compress(self, a: Value, keeps: Value) -> Value:
        """The lanes that are kept, in their order; others follow."""
        zeros = a.type.constant(None)
        return self._call(f"llvm.experimental.vector.compress.{a.type.name}", a.type, [a.of, keeps.of, zeros])

    def mask(self, lanes: Value) -> Value:
        """Truths of a vector's lanes as bits of an int64, the first the lowest."""
        return self.wider(lanes.bits(Type("i", lanes.type.lanes)), I64)

    def count_bits(self, bits: Value) -> Value:
        return self._call(f"llvm.ctpop.{bits.type.name}", bits.type, [bits.of])

    def shuffle(self, first: Value, second: Value, lanes: Sequence[int]) -> Value:
        """A vector of these lanes of both, those of the second counted on."""
        mask = vector(I32, len(lanes)).constant(list(lanes))
        return self._value(self.builder.shuffle_vector(first.of, second.of, mask), vector(first.type, len(lanes)))

    def lane(self, value: Value, lane: int) -> Value:
        return self._value(self.builder.extract_element(value.of, I32.constant(lane)), value.type.element)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        return self._call(f"llvm.fma.{a.type.name}", a.type, [a.of, b.of, c.of])

    def sqrt(self, a: Value) -> Value:
        return self._call(f"llvm.sqrt.{a.type.name}", a.type, [a.of])

    def round(self, a: Value) -> Value:
        """To whole numbers, halves to even ones."""
        return self._call(f"llvm.rint.{a.type.name}", a.type, [a.of])

    def add_byte_products(self, a: Value, b: Value, c: Value) -> Value:
        """a + products of four bytes of each int32, those of b without sign; where `multiplies_bytes`."""
        return self._call("llvm.x86.avx512.vpdpbusd.512", a.type, [a.of, b.of, c.of])

    def smaller(self, a: Value, b: Value | float) -> Value:
        """The smaller one; a where either is NaN."""
        b = b if isinstance(b, Value) else self.number(b, a.type)
        return self.select(b < a, b, a)

    def larger(self, a: Value, b: Value | float) -> Value:
        """The larger one; a where either is NaN."""
        b = b if isinstance(b, Value) else self.number(b, a.type)
        return self.select(b > a, b, a)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        return self._value(self.builder.select(condition.of, yes.of, no.of), yes.type)

    def sum(self, a: Value) -> Value:
        """Of a vector's lanes, by halves."""
        count = a.type.lanes
        while count > 1:
            count //= 2
            a = self.shuffle(a, a, range(count)) + self.shuffle(a, a, range(count, 2 * count))
        return self.lane(a, 0)

    def sums(self, vectors: Sequence[Value]) -> Value:
        """`sum` of each of as many vectors as they have lanes, bit for bit."""
        count, out = len(vectors), list(vectors)
        half = count // 2
        while half:  # vectors have parts of two halves each
            lower, upper = ([m + start for m in range(2 * count) if not m & half] for start in (0, half))
            pairs = zip(out[::2], out[1::2], strict=True)
            out = [self.shuffle(a, b, lower) + self.shuffle(a, b, upper) for a, b in pairs]
            half //= 2
        return out[0]

    def max(self, a: Value) -> Value:
        """Of a vector's lanes."""
        kind = "fmax" if a.is_float else "smax"
        return self._call(f"llvm.vector.reduce.{kind}.{a.type.name}", a.type.element, [a.of])

    def any(self, a: Value) -> Value:
        """Whether a lane of integers is not zero."""
        lanes = self._call(f"llvm.vector.reduce.or.{a.type.name}", a.type.element, [a.of])
        return self._value(self.builder.icmp_signed("!=", lanes.of, lanes.operand(0)), I1)

    def to_float(self, a: Value) -> Value:
        """float32 of a float16 or an integer."""
        convert, type_ = self.builder.fpext if a.is_float else self.builder.sitofp, F32.like(a.type)
        return self._value(convert(a.of, type_.llvm), type_)

    def to_int(self, a: Value) -> Value:
        """int32 of a float32, towards zero."""
        type_ = I32.like(a.type)
        return self._value(self.builder.fptosi(a.of, type_.llvm), type_)

    def wider(self, a: Value, element: Type) -> Value:
        """Integers with zeros above."""
        type_ = element.like(a.type)
        return self._value(self.builder.zext(a.of, type_.llvm), type_)

    def signed(self, a: Value, element: Type) -> Value:
        """Wider integers of the same values."""
        type_ = element.like(a.type)
        return self._value(self.builder.sext(a.of, type_.llvm), type_)

    def narrower(self, a: Value, element: Type) -> Value:
        """The lower bits of integers."""
        type_ = element.like(a.type)
        return self._value(self.builder.trunc(a.of, type_.llvm), type_)

    def float_of(self, bits: Value) -> Value:
        """A float32 that was given as an integer; see bits_of."""
        return self.narrower(bits, I32).bits(F32)

    def exp(self, a: Value) -> Value:
        """e to the power of float32 numbers: 2^n times a polynomial of the rest. Below -87 that of -87; infinite from
        88.4 on.
        """
        a = self.smaller(self.larger(a, -87.0), 89.0)
        n = self.round(a * 1.4426950408889634)
        rest = self.fma(n, self.number(-0.693145751953125, a.type), a)  # the logarithm of two in two parts
        rest = self.fma(n, self.number(-1.428606765330187e-06, a.type), rest)
        power = self.number(1 / 720, a.type)
        for factorial in (120, 24, 6, 2, 1, 1):
            power = self.fma(power, rest, self.number(1 / factorial, a.type))
        exponent = (self.to_int(n) + 127) << 23
        return power * exponent.bits(a.type)

    def prefetch(self, address: Value) -> None:
        """Begin to bring what lies at an address, which need not exist, into the processor's first cache."""
        pointer = self.builder.inttoptr(address.of, I8.llvm.as_pointer())
        self._call("llvm.prefetch.p0", None, [pointer, *(I32.constant(n) for n in (0, 3, 1))])

    def wait_for_all(self, workers: Value) -> None:
        """Until all workers are here."""
        with self.when(workers > 1):
            self.call(self.number(thread_functions()[2]))

    def call(self, function: Value, *arguments: Value) -> None:
        """A function by its address, which takes integers and returns nothing."""
        type_ = ir().FunctionType(ir().VoidType(), [argument.type.llvm for argument in arguments]).as_pointer()
        self.builder.call(self.builder.inttoptr(function.of, type_), [argument.of for argument in arguments])

    def _call(self, name: str, type_: Type | None, arguments: list[Any]) -> Value:
        """An intrinsic function of LLVM, which returns nothing without a type."""
        module, returns = self.builder.module, ir().VoidType() if type_ is None else type_.llvm
        function = module.globals.get(name)
        if function is None:
            function = ir().Function(module, ir().FunctionType(returns, [a.type for a in arguments]), name)
        return self._value(self.builder.call(function, arguments), type_ or I64)


@functools.cache
def ir() -> Any:
    """LLVM's code as llvmlite writes it, which is imported when the first kernel is written."""
    import llvmlite.ir

    return llvmlite.ir


Arguments = dict[str, Value]
