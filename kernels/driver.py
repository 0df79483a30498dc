"""Loads and launches Triton's kernels through libcuda, by ctypes.

Triton compiles a kernel without a C compiler, but launches it through an extension module that it builds with one, and
through a driver that the whole process shares. Here a `@triton.jit` function is compiled for a given GPU, loaded and
launched with the few calls of libcuda that this takes. `triton.runtime.driver` is neither used nor changed: the Triton
kernels of a program that embeds minirea keep theirs.

    arguments -> key -> Call, of one thread and context -> cuLaunchKernelEx
                  first time: -> Variant, the machine code for arguments of this kind, compiled or found on the disk

A launch costs the host mostly what it takes to find out which machine code fits. So the key is made by few passes over
the arguments that run in C, and Triton's own rules for specializing are applied to the first arguments of a kind only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import operator
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any, Final, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.language import constexpr
from triton.runtime.jit import create_function_from_signature

from minirea.errors import CudaError, InputError

# ------------------------------------------------------------------------------------------------------------ libcuda


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: a union of 64 bytes after its kind."""

    _fields_ = (("id", c_uint), ("pad", c_uint), ("value", c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_bytes")),
        ("stream", c_void_p),
        ("attributes", POINTER(LaunchAttribute)),
        ("num_attributes", c_uint),
    )


# Names of cuda.h, without their prefixes.
COOPERATIVE, CLUSTER_DIMENSION, CLUSTER_SCHEDULING, PROGRAMMATIC_SERIALIZATION = 2, 4, 5, 6  # CU_LAUNCH_ATTRIBUTE_
SPREAD: Final = 1  # CU_CLUSTER_SCHEDULING_POLICY_
SHARED_SIZE_BYTES, MAX_DYNAMIC_SHARED_SIZE_BYTES, NON_PORTABLE_CLUSTER_SIZE = 1, 8, 14  # CU_FUNC_ATTRIBUTE_
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: Final = 97  # CU_DEVICE_ATTRIBUTE_
PREFER_SHARED: Final = 1  # CU_FUNC_CACHE_
SHARED_BYTES_OF_EVERY_KERNEL: Final = 48 * 1024  # more takes an attribute

FUNCTIONS: Final = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuCtxGetCurrent": (c_void_p,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxGetDevice": (POINTER(c_int),),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuFuncGetAttribute": (POINTER(c_int), c_int, c_void_p),
    "cuFuncSetAttribute": (c_void_p, c_int, c_int),
    "cuFuncSetCacheConfig": (c_void_p, c_int),
    "cuLaunchKernelEx": (c_void_p, c_void_p, c_void_p, c_void_p),
}


@functools.cache
def libcuda() -> ctypes.CDLL:
    """NVIDIA's driver library, the one that torch has loaded. Raises CudaError."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"libcuda.so.1 cannot be loaded ({error}), expected NVIDIA's driver to be installed") from None
    for name, types in FUNCTIONS.items():
        try:
            getattr(library, name).argtypes = types
        except AttributeError:
            raise CudaError(f"libcuda.so.1 has no {name}, expected NVIDIA's driver for CUDA 12 or newer") from None
    return library


def check(code: int, doing: str) -> None:
    """Raise CudaError, with CUDA's name and text for `code`, unless it is 0."""
    if code:
        name, text = c_char_p(), c_char_p()
        libcuda().cuGetErrorName(code, byref(name))
        libcuda().cuGetErrorString(code, byref(text))
        known = (name.value or b"CUDA error %d" % code).decode()
        raise CudaError(f"{doing}: {known} ({(text.value or b'no description').decode()})", known)


@functools.cache
def primary_context(device: int) -> c_void_p:
    context = c_void_p()
    check(libcuda().cuDevicePrimaryCtxRetain(byref(context), device), f"context of device {device}")
    return context


# ------------------------------------------------------------------------------------------------------- machine code

# How a launch packs a number of each of Triton's types, in 8 bytes. None of fp16 and bf16: a Python float is fp32.
FORMATS: Final = {"i1": "?7x", "u1": "?7x", "i32": "i4x", "i64": "q", "u64": "Q", "fp32": "f4x", "constexpr": "q"}
NUMBERS: Final = frozenset({bool, int, float})


class Variant:
    """A kernel's machine code for one kind of arguments.

    Args:
        compiled: what triton.compile returns.
        types: Triton's type of each flattened argument; "constexpr" is compiled in and not passed.
        is_number: which of them are numbers; the others are tensors, or compiled in.
    """

    def __init__(self, compiled: Any, types: Sequence[str], is_number: Sequence[bool]) -> None:
        self.metadata, self.cubin = compiled.metadata, compiled.asm["cubin"]
        if self.metadata.global_scratch_size or self.metadata.profile_scratch_size:
            raise NotImplementedError(f"{self.name} needs scratch memory from Triton, expected none")
        pointers = [index for index, number in enumerate(is_number) if not number and types[index] != "constexpr"]
        numbers = [index for index, number in enumerate(is_number) if number]
        slots = {index: slot for slot, index in enumerate([*pointers, *numbers])}
        self.packing = struct.Struct("<" + "Q" * len(pointers) + "".join(FORMATS[types[index]] for index in numbers))
        self.num_slots = len(slots) + 2  # and, always 0, Triton's scratch memory and its profiler's
        passed = [slots[index] for index, kind in enumerate(types) if kind != "constexpr"]
        self.passed_slots = [*passed, len(slots), len(slots) + 1]
        self._functions: dict[int, c_void_p] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.metadata.name

    def function(self, context: int) -> c_void_p:
        """The kernel in a context, which is current; loaded into it once. Raises CudaError and InputError."""
        with self._lock:
            if context not in self._functions:
                self._functions[context] = self._load()
            return self._functions[context]

    def _load(self) -> c_void_p:
        cuda, doing = libcuda(), f"loading {self.name}"
        module, function = c_void_p(), c_void_p()
        check(cuda.cuModuleLoadData(byref(module), self.cubin), doing)
        check(cuda.cuModuleGetFunction(byref(function), module, self.name.encode()), doing)
        device, limit, static = c_int(), c_int(), c_int()
        check(cuda.cuCtxGetDevice(byref(device)), doing)
        check(cuda.cuDeviceGetAttribute(byref(limit), MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device), doing)
        if self.metadata.shared > limit.value:
            raise InputError(
                f"{self.name} needs {self.metadata.shared} bytes of shared memory, this GPU has {limit.value} for a "
                "program; use impl 'torch'"
            )
        if self.metadata.shared > SHARED_BYTES_OF_EVERY_KERNEL:
            check(cuda.cuFuncSetCacheConfig(function, PREFER_SHARED), doing)
            check(cuda.cuFuncGetAttribute(byref(static), SHARED_SIZE_BYTES, function), doing)
            most = limit.value - static.value
            check(cuda.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, most), doing)
        if self.metadata.num_ctas == 16:
            check(cuda.cuFuncSetAttribute(function, NON_PORTABLE_CLUSTER_SIZE, 1), doing)
        return function

    def attributes(self) -> Any:
        """How it is launched, as an array of LaunchAttribute."""
        m = self.metadata
        wanted: list[tuple[int, tuple[int, ...]]] = []
        if m.launch_pdl:
            wanted.append((PROGRAMMATIC_SERIALIZATION, (1,)))
        if m.launch_cooperative_grid:
            wanted.append((COOPERATIVE, (1,)))
        if m.num_ctas != 1:
            wanted += [(CLUSTER_DIMENSION, (m.num_ctas, 1, 1)), (CLUSTER_SCHEDULING, (SPREAD,))]
        return (LaunchAttribute * len(wanted))(*(LaunchAttribute(kind, 0, value) for kind, value in wanted))


class Call:
    """A variant in a context, with memory for the arguments of one launch at a time: one thread's."""

    def __init__(self, variant: Variant, context: int) -> None:
        self.variant, self.num_ctas = variant, variant.metadata.num_ctas
        self.memory = (c_uint64 * variant.num_slots)()
        base = ctypes.addressof(self.memory)
        self.params = (c_void_p * len(variant.passed_slots))(*(base + 8 * slot for slot in variant.passed_slots))
        self.attributes = variant.attributes()
        self.config = LaunchConfig(
            *(1, 1, 1, 32 * variant.metadata.num_warps, 1, 1, variant.metadata.shared),
            attributes=self.attributes,
            num_attributes=len(self.attributes),
        )
        self.pack = variant.packing.pack_into
        self.cuda_launch = libcuda().cuLaunchKernelEx
        self.launch_arguments = (byref(self.config), variant.function(context), self.params, None)

    def launch(self, programs: int, stream: int, values: Sequence[int | float]) -> None:
        """Raises CudaError; InputError if a number is beyond the type that it was compiled for."""
        try:
            self.pack(self.memory, 0, *values)
        except struct.error as error:
            raise InputError(f"a number for {self.variant.name} is out of range: {error}") from None
        self.config.grid_x = programs * self.num_ctas
        self.config.stream = stream
        code = self.cuda_launch(*self.launch_arguments)
        if code:
            c = self.config
            check(
                code,
                f"launching {programs} programs of {self.variant.name}, each of {c.block_x} threads and with "
                f"{c.shared_bytes} bytes of shared memory",
            )


# --------------------------------------------------------------------------------------------------------- specializing


class Layout(NamedTuple):
    """Which of some flattened arguments are what, as selectors for itertools.compress."""

    is_pointer: tuple[bool, ...]
    is_number: tuple[bool, ...]
    is_specialized: tuple[bool, ...]  # integers whose value the compiler may use
    is_constant: tuple[bool, ...]  # tl.constexpr, which a tuple may have as members


class Kernel:
    """A `@triton.jit` function, and what it has been compiled for."""

    def __init__(self, function: triton.JITFunction) -> None:
        self.function = function
        self.parameters = [parameter for parameter in function.params if not parameter.is_constexpr]
        self.names = [parameter.name for parameter in self.parameters]
        self.layouts: dict[tuple[Any, ...], Layout] = {}
        self.variants: dict[object, Future[Variant]] = {}

    def layout(self, arguments: Sequence[Any]) -> Layout:
        classes: list[type] = []
        specialized: list[bool] = []
        for parameter, argument in zip(self.parameters, arguments, strict=False):  # Triton names what is missing
            members = argument if isinstance(argument, tuple) else (argument,)
            classes += map(type, members)
            specialized += [not parameter.do_not_specialize] * len(members)
        for kind in classes:
            if not (kind in NUMBERS or kind in (type(None), constexpr) or issubclass(kind, torch.Tensor)):
                raise TypeError(f"{self.function.__name__} is given a {kind.__name__}, expected tensors and numbers")
        return Layout(
            tuple(issubclass(kind, torch.Tensor) for kind in classes),
            tuple(kind in NUMBERS for kind in classes),
            tuple(kind is int and wanted for kind, wanted in zip(classes, specialized, strict=True)),
            tuple(kind is constexpr for kind in classes),
        )

    def variant(
        self, key: object, target: GPUTarget, arguments: Sequence[Any], constants: dict[str, Any], layout: Layout
    ) -> Variant:
        """Compiled once, also where several threads need it at the same time."""
        mine: Future[Variant] = Future()
        future = self.variants.setdefault(key, mine)
        if future is mine:
            try:
                mine.set_result(self._compile(target, arguments, constants, layout))
            except BaseException as error:
                del self.variants[key]  # the next launch tries again
                mine.set_exception(error)
        return future.result()

    def _compile(
        self, target: GPUTarget, arguments: Sequence[Any], constants: dict[str, Any], layout: Layout
    ) -> Variant:
        backend = make_backend(target)
        bind = create_function_from_signature(self.function.signature, self.function.params, backend)
        # Triton's default for it differs between versions, and results with it.
        options = {"enable_fp_fusion": True} | constants
        bound, specialization, _ = bind(*arguments, **options)
        parsed, signature, constexprs, attributes = self.function._pack_args(
            backend, options, bound, specialization, None
        )
        source = ASTSource(self.function, signature, constexprs, attributes)
        directory = triton.knobs.cache.dir
        if directory.startswith("~"):  # Triton would make a directory of that name in the current one
            raise InputError(
                "there is no home directory to keep compiled kernels in: HOME is not set, and this user has none; "
                "expected TRITON_CACHE_DIR to name a directory that can be written"
            )
        try:
            compiled = triton.compile(source, target=target, options=parsed.__dict__)
        except OSError as error:
            raise InputError(
                f"kernels cannot be compiled and kept in {directory} ({error}), expected a directory that can be "
                "written; set TRITON_CACHE_DIR to one"
            ) from None
        types = flatten([signature[name] for name in self.names])
        return Variant(compiled, types, layout.is_number)


def flatten(items: Sequence[Any]) -> list[Any]:
    """Members of tuples in their place."""
    flat: list[Any] = []
    for item in items:
        if isinstance(item, tuple):
            flat += item
        else:
            flat.append(item)
    return flat


@functools.lru_cache(maxsize=4096)
def specialization(value: int) -> tuple[bool, bool, bool, bool]:
    """All that Triton's compiler may use of an integer that it specializes on: 1, multiples of 16, and its type."""
    return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63


# --------------------------------------------------------------------------------------------------------------- launch


class _Thread(threading.local):
    """What launches of one thread write to and may not share."""

    def __init__(self) -> None:
        self.context = c_void_p()
        self.context_address = byref(self.context)
        self.calls: dict[object, Call] = {}
        self.compilers: Executor | None = None  # set while this thread compiles what it would launch


_thread: Final = _Thread()
_kernels: Final[dict[int, Kernel]] = {}  # by id: hashing a JITFunction takes as long as the rest of a lookup
_dtype = operator.attrgetter("dtype")
_value = operator.attrgetter("value")


def launch(
    function: triton.JITFunction,
    programs: int,
    device: torch.device,
    arguments: Sequence[Any],
    constants: dict[str, Any],
) -> None:
    """Launch programs of a kernel on torch's current stream of a device, in the calling thread's CUDA context.

    Args:
        function: a `@triton.jit` function.
        arguments: its first arguments in order: tensors, numbers, None, and tuples of those.
        constants: all others by name, its constants among them, and Triton's options: num_warps, launch_pdl, ...

    Raises:
        CudaError: a call of libcuda failed; `name` has CUDA's name of the error.
        InputError: a GPU with too little shared memory, or no place to keep compiled kernels.
    """
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(function, programs, torch.cuda.current_device(), arguments, constants)
    else:
        _launch(function, programs, device.index, arguments, constants)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Meanwhile this thread's launches only compile: at the same time in threads, which are waited for at the end.

    Other threads wait for what they need of it, too. What cannot be compiled is an error of the launch that needs it.
    """
    calls, _thread.calls = _thread.calls, {}
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as _thread.compilers:
            yield
    finally:
        _thread.calls, _thread.compilers = calls, None


def is_compiling() -> bool:
    """Whether this thread's launches only compile."""
    return _thread.compilers is not None


def _launch(
    function: triton.JITFunction, programs: int, device: int, arguments: Sequence[Any], constants: dict[str, Any]
) -> None:
    kernel = _kernels.get(id(function)) or _kernels.setdefault(id(function), Kernel(function))
    named = kernel.names[len(arguments) :]
    if named:
        constants = constants.copy()
        arguments = (*arguments, *map(constants.pop, named))
    flat = flatten(arguments)
    kinds = (tuple(map(type, arguments)), tuple(map(type, flat)))
    layout = kernel.layouts.get(kinds) or kernel.layouts.setdefault(kinds, kernel.layout(arguments))
    tensors = list(itertools.compress(flat, layout.is_pointer))
    pointers = list(map(torch.Tensor.data_ptr, tensors))
    values = constants.values()
    key = (
        kernel,
        device,
        kinds,
        tuple(map(_dtype, tensors)),
        # Nearly always all are aligned, which the compiler uses.
        functools.reduce(operator.or_, pointers, 0) % 16 == 0 or tuple(pointer % 16 == 0 for pointer in pointers),
        tuple(map(specialization, itertools.compress(flat, layout.is_specialized))),
        tuple(map(_value, itertools.compress(flat, layout.is_constant))),
        tuple(constants),
        tuple(values),
        tuple(map(type, values)),  # 1, 1.0 and True are equal
    )
    numbers = itertools.compress(flat, layout.is_number)
    context = _current_context(device)
    call = _thread.calls.get((context, key))
    if call is None:
        compile_it = functools.partial(kernel.variant, key, _target(device), arguments, constants, layout)
        if _thread.compilers is not None:
            hash(function)  # in the order of launches: Triton 3.6 names what it keeps on the disk by that order too
            _thread.compilers.submit(compile_it)
            return
        call = _thread.calls.setdefault((context, key), Call(compile_it(), context))
    call.launch(programs, torch._C._cuda_getCurrentRawStream(device), [*pointers, *numbers])


def _current_context(device: int) -> int:
    """The handle of the context that CUDA's runtime, and torch with it, uses in this thread: the current one.

    A thread that has not called CUDA has none. It gets the device's primary context, as from the runtime.
    """
    check(libcuda().cuCtxGetCurrent(_thread.context_address), "the current context")
    if not _thread.context.value:
        _thread.context.value = primary_context(device).value
        check(libcuda().cuCtxSetCurrent(_thread.context), f"context of device {device}")
    return _thread.context.value or 0


@functools.cache
def _target(device: int) -> GPUTarget:
    major, minor = torch.cuda.get_device_capability(device)
    return GPUTarget("cuda", 10 * major + minor, 32)
