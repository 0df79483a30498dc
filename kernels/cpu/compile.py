"""Compiles a kernel for this machine's CPU by LLVM, in memory, without a C compiler, and calls it."""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
import struct
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from minirea.kernels.cpu.code import I32, I64, Arguments, Code, Value, ir
from minirea.kernels.cpu.threads import run_together, thread_functions, workers


class Kernel:
    """A compiled kernel.

    Args:
        write: called with a Code, the arguments by name, and two more: `worker` of `workers`.
        names: of the arguments, which are integers and addresses.
        alone: it runs on one thread, whatever torch has.
    """

    def __init__(self, write: Callable[[Code, Arguments], None], names: Sequence[str], alone: bool = False) -> None:
        self.names, self.one_thread = tuple(names), alone
        module = ir().Module(name="minirea")
        body = _function(module, "body", 3)
        code = Code(ir().IRBuilder(body.append_basic_block()))
        first, *rest = (Value(code.builder, argument, I64) for argument in body.args)
        values = [code.load(first + 8 * i, I64) for i in range(len(names))]
        write(code, dict(zip([*names, "worker", "workers"], [*values, *rest], strict=True)))
        code.builder.ret_void()
        for name, functions in (("alone", ()), ("together", thread_functions()[:2])):
            builder = ir().IRBuilder(_function(module, name, 1).append_basic_block())
            worker = [I64.constant(number) for number in (0, 1)]
            if functions:
                type_ = ir().FunctionType(I32.llvm, []).as_pointer()
                pointers = [builder.inttoptr(I64.constant(at), type_) for at in functions]
                worker = [builder.zext(builder.call(pointer, []), I64.llvm) for pointer in pointers]
            builder.call(body, [module.globals[name].args[0], *worker])
            builder.ret_void()
        self._engine = _compile(module)
        at = [self._engine.get_function_address(name) for name in ("body", "alone", "together")]
        self.body, alone_at, self.together = at
        self.alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(alone_at)

    def bind(self, **arguments: int) -> Call:
        return Call(self, [arguments[name] for name in self.names])


class Call:
    """A kernel with its arguments, any of which may be set before it runs once more. Their memory is the caller's."""

    def __init__(self, kernel: Kernel, values: list[int]) -> None:
        self.kernel = kernel
        self.values = (ctypes.c_int64 * len(values))(*values)

    def set(self, **arguments: int) -> None:
        for name, value in arguments.items():
            self.values[self.kernel.names.index(name)] = value

    def __call__(self) -> None:
        kernel, threads = self.kernel, workers()
        if kernel.one_thread or threads == 1:
            kernel.alone(self.values)
        else:
            run_together(kernel.together, self.values, threads)


class Calls:
    """One call after the other as a call of one kernel, between which threads wait for each other."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls  # whose arguments may be set
        rows = [(call.kernel.body, ctypes.addressof(call.values), call.kernel.one_thread) for call in calls]
        self._rows = (ctypes.c_int64 * (3 * len(rows)))(*itertools.chain.from_iterable(rows))
        self._call = _calls_kernel().bind(calls=ctypes.addressof(self._rows), count=len(rows))

    def __call__(self) -> None:
        self._call()


def _write_calls(code: Code, a: Arguments) -> None:
    with code.range(0, a["count"]) as i:
        function, arguments, is_alone = (code.load(a["calls"] + (i * 3 + j) * 8, I64) for j in range(3))
        with code.when((is_alone < 1) | (a["worker"] < 1)):
            workers = code.select(is_alone > 0, code.number(1), a["workers"])
            code.call(function, arguments, a["worker"], workers)
        code.wait_for_all(a["workers"])


@functools.cache
def _calls_kernel() -> Kernel:
    return Kernel(_write_calls, ("calls", "count"))


def bits_of(number: float) -> int:
    """A float32 as a kernel's argument."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits


def kind_of(tensor: Tensor) -> str:
    """As `Code.floats` takes it."""
    return str(tensor.dtype).removeprefix("torch.")


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def available() -> bool:
    """Whether kernels can be compiled for this machine's CPU, and run."""
    return is_installed() and _runs()


@functools.cache
def is_installed() -> bool:
    try:
        _llvm(), ir()
    except Exception:  # or its library does not load
        return False
    return True


@functools.cache
def _runs() -> bool:
    """Tried once: a system may forbid memory that is written and then run."""
    features = _llvm().get_host_cpu_features()
    # Without these LLVM would call a compiler's library, which is not here, for what the processor cannot do.
    if platform.machine() in ("x86_64", "AMD64") and not all(features.get(n) for n in ("avx2", "f16c", "fma")):
        return False
    if not all(thread_functions()):  # torch's own products have all threads
        return False
    found = ctypes.c_int64()
    try:
        kernel = Kernel(lambda code, a: code.store(a["number"] + 1, a["out"]), ("number", "out"), alone=True)
        kernel.bind(number=41, out=ctypes.addressof(found))()
    except Exception:
        return False
    return found.value == 42


def lanes_of_processor() -> int:
    """float32 numbers of its widest registers."""
    features = _llvm().get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


def multiplies_bytes() -> bool:
    """Whether its widest registers have products of bytes."""
    return bool(_llvm().get_host_cpu_features().get("avx512vnni"))


def _function(module: Any, name: str, num_arguments: int) -> Any:
    return ir().Function(module, ir().FunctionType(ir().VoidType(), [I64.llvm] * num_arguments), name)


@functools.cache
def _machine() -> Any:
    _llvm().initialize_native_target()
    _llvm().initialize_native_asmprinter()
    target = _llvm().Target.from_default_triple()
    return functools.partial(
        target.create_target_machine, _llvm().get_host_cpu_name(), _llvm().get_host_cpu_features().flatten(), opt=3
    )


def _compile(module: Any) -> Any:
    machine = _machine()()
    compiled = _llvm().parse_assembly(str(module))
    passes = _llvm().create_pass_builder(machine, _llvm().create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(compiled, passes)
    engine = _llvm().create_mcjit_compiler(compiled, machine)
    engine.finalize_object()
    return engine


@functools.cache
def _llvm() -> Any:
    import llvmlite.binding

    return llvmlite.binding
