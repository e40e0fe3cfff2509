"""From the call of a compiled function to a launch: what CuTe-DSL's host code is made to see.

CuTe-DSL compiles a function to host code that calls a runtime library, and to a device image that this library loads.
Inside `hopper`, functions are compiled against another library (``shim.c``), which hands each launch to Python, and
the compiler is asked to keep the PTX of every image. So a launch finds its PTX by the bytes of its image; names of
kernels do not tell variants apart. The changes to CuTe-DSL last as long as the outermost block:

- where it looks for its runtime library, which architecture it compiles for, what it keeps, no cache on disk;
- functions that are compiled believe in one device, and in the other library, for good; others are refused;
- CPU tensors given to ``from_dlpack`` or to TVM-FFI functions are taken for device tensors (`tensors`);
- ``HardwareInfo`` describes a GPU of few multiprocessors, so that persistent kernels come to more than one tile.

Nothing has to be set before CuTe-DSL is imported. It reads its environment variables then, into objects; these are
what is changed.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from sonic.simulator import tensors
from sonic.simulator.errors import SimulatorError, Unsupported
from sonic.simulator.images import ptx_of_image, register_ptx
from sonic.simulator.kernel_launch import LaunchConfig, Region
from sonic.simulator.options import Options
from sonic.simulator.version import check_version

ARCHITECTURE = "sm_90a"

# run(ptx, entry, config, params, regions, options) -> trace
Engine = Callable[[str, str, LaunchConfig, list[int], Sequence[Region], Any], Any]


@dataclass(eq=False)
class Simulation:
    """What ``with hopper() as sim`` binds.

    Attributes:
        traces: what the engine returned, one for each launch of the block, in order.
        engine: what is called for a launch.
        options: how launches are run.
        num_sms: multiprocessors of the GPU that ``HardwareInfo`` describes.
    """

    traces: list[Any] = field(default_factory=list, init=False)
    engine: Engine = field(repr=False)
    options: Any
    num_sms: int


# The blocks that are open, outermost first. Launches go to the last.
_open: list[Simulation] = []
_closing = contextlib.ExitStack()  # takes back what the outermost block changed


# ---------------------------------------------------------------- the block


@contextlib.contextmanager
def hopper(
    schedule: str = "eager", seed: int = 0, *, num_sms: int = 4, line_info: bool = True, **options: Any
) -> Iterator[Simulation]:
    """Run the CuTe-DSL kernels that are compiled and launched inside the block on CPU tensors.

    A function must be compiled inside a block, this or an earlier one, and launched inside one. Blocks may be nested:
    a launch belongs to the innermost. An exception of the engine leaves through the launching call as itself.

    Args:
        schedule: when asynchronous work happens: ``"eager"`` at once, ``"lazy"`` when nothing else can go on,
            ``"random"`` in an order drawn from ``seed``.
        seed: of the random schedule.
        num_sms: multiprocessors that ``HardwareInfo`` tells of, by which persistent kernels size their grid.
        line_info: have reports name source lines; the code is the same, compiling takes half as long again.
        options: further fields of `sonic.simulator.options.Options`.
    """
    engine = importlib.import_module("sonic.simulator.engine")
    dials = Options(schedule=schedule, seed=seed, **options)
    with simulate(engine.run, dials, num_sms=num_sms, line_info=line_info) as simulation:
        yield simulation


@contextlib.contextmanager
def simulate(engine: Engine, options: Any = None, *, num_sms: int = 4, line_info: bool = True) -> Iterator[Simulation]:
    """The same as `hopper`, with an engine of the caller's: a function that is called for each launch.

    Args:
        engine: ``(ptx, entry, config, params, regions, options) -> trace``; ``params`` are the addresses of the bytes
            of the parameters of the entry, in order.
        options: handed to the engine as they are.
        num_sms: see `hopper`.
        line_info: see `hopper`.
    """
    if num_sms < 1:
        raise ValueError(f"sonic.simulator: num_sms is {num_sms}, expected at least 1")
    simulation = Simulation(engine, options, num_sms)
    shim = load_shim()
    if not _open:
        _closing.enter_context(_redirected(shim))
    _open.append(simulation)
    try:
        with _with_line_info(line_info):
            yield simulation
    finally:
        _open.remove(simulation)
        if not _open:
            _closing.close()


def enable_from_environment(variable: str = "SONIC_SIMULATE_HOPPER") -> bool:
    """Open a block of `hopper` for the rest of the process where an environment variable asks for it.

    For code that is about to compile or launch a kernel: it may ask each time, in any thread; the block is opened
    once. It is the outermost one, so launches inside of a caller's own ``with hopper():`` go on to belong to that.
    What was compiled before stays as it was compiled.

    Args:
        variable: its name; its value is ``1`` for yes, ``0``, empty or not set for no.

    Returns:
        whether it asks for it.

    Raises:
        ValueError: another value.
        SimulatorError: nvidia-cutlass-dsl is missing or of a version that is not known, or there is no C compiler.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"sonic.simulator: {variable} is {value!r}, expected 0 or 1")
    if value == "1" and not _whole_process:
        with _opening:
            if not _whole_process:
                block = hopper()
                block.__enter__()
                _open.insert(0, _open.pop())
                _whole_process.append(block)
    return value == "1"


def is_open() -> bool:
    """Whether a block of `hopper` is open, so that a launch would run here."""
    return bool(_open)


_whole_process: list[Any] = []  # the block that never closes, once it is open
_opening = threading.Lock()


# ---------------------------------------------------------------- the shim: built once, loaded once


def cache_folder() -> Path:
    """Where built libraries are kept: ``sonic/simulator`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sonic" / "simulator"


def build_shim(version: str) -> Path:
    """The path of the shim library, compiled if no earlier process has.

    Args:
        version: of nvidia-cutlass-dsl; with the source, the key of the cache.
    """
    source = Path(__file__).with_name("shim.c")
    key = hashlib.sha256(version.encode() + b"\0" + source.read_bytes()).hexdigest()[:16]
    # CuTe-DSL knows its runtime library by this file name
    library = cache_folder() / key / "libcute_dsl_runtime.so"
    if library.exists():
        return library
    compiler = _find_compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    # built beside its place and renamed, so that other processes see all of it or nothing
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*compiler, "-O1", "-shared", "-fPIC", "-o", str(built), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SimulatorError(f"sonic.simulator: `{' '.join(command)}` failed:\n{done.stderr}")
        os.replace(built, library)
    return library


def _find_compiler() -> list[str]:
    named = os.environ.get("CC")
    for command in [named] if named else ["cc", "gcc", "clang"]:
        words = shlex.split(command)  # CC may hold options
        if shutil.which(words[0]):
            return words
    raise SimulatorError(
        f"sonic.simulator: found no C compiler ({f'CC={named}' if named else 'cc, gcc, clang'}), which is needed once, "
        "to build a small library; install gcc or clang (`apt-get install gcc`), or let CC name one"
    )


@functools.cache
def load_shim() -> Path:
    """Build and load the shim, and connect it to this module. Its code stays loaded until the process ends."""
    path = build_shim(check_version())
    library = ctypes.CDLL(str(path))
    library.sonic_set_functions(_on_launch, _on_refusal)
    return path


# ---------------------------------------------------------------- what the shim calls

_ERROR_LAUNCH_FAILURE = 719  # any code but 0: the exception that is held says more


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint32),
    ]


_held = threading.local()  # .error: what a call of the shim raised, until the Python side of the launch takes it


class _Hold:
    """Keeps an exception that C code stands in the way of; `_take_held` gives it back on the other side."""

    error: BaseException | None = None

    def __enter__(self) -> _Hold:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        self.error = _held.error = error
        return True

    @property
    def code(self) -> int:
        return 0 if self.error is None else _ERROR_LAUNCH_FAILURE


def _take_held() -> BaseException | None:
    error = getattr(_held, "error", None)
    _held.error = None
    return error


@contextlib.contextmanager
def _raise_held() -> Iterator[None]:
    """Around a call into generated code: what was held is raised in place of what CuTe-DSL makes of the error code."""
    _take_held()
    try:
        yield
    except Exception:
        held = _take_held()
        if held is None:
            raise
        raise held from None
    held = _take_held()
    if held is not None:
        raise held


class HeldError(SimulatorError):
    """The kind of error that the shim sets for TVM-FFI. Making one gives the exception that is held."""

    def __new__(cls, message: str) -> BaseException:  # type: ignore[misc]
        """Take the held exception."""
        return _take_held() or SimulatorError(message)


@ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_Config), ctypes.POINTER(ctypes.c_void_p)
)
def _on_launch(image: int, name: bytes, config: Any, arguments: Any) -> int:
    with _Hold() as hold:
        _launch(image, name.decode(), config.contents, arguments)
    return hold.code


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
def _on_refusal(symbol: bytes, detail: int) -> int:
    with _Hold() as hold:
        raise Unsupported(
            f"sonic.simulator: host code calls {symbol.decode()} ({detail}), which the simulator does not offer"
        )
    return hold.code


def _launch(image: int, entry: str, config: _Config, arguments: Any) -> None:
    if not _open:
        raise SimulatorError(
            f"sonic.simulator: kernel {entry} was compiled for the simulator and is launched outside of "
            "`with sonic.simulator.hopper():`, where there is no device"
        )
    simulation = _open[-1]
    ptx = ptx_of_image(image, entry)
    params = [arguments[i] for i in range(_count_params(ptx, entry))]
    trace = simulation.engine(ptx, entry, read_config(config), params, tensors.regions(), simulation.options)
    simulation.traces.append(trace)


# cudaLaunchAttributeID
_COOPERATIVE, _CLUSTER, _PROGRAMMATIC_SERIALIZATION = 2, 4, 6


def read_config(config: Any) -> LaunchConfig:
    """Translate a launch configuration of the CUDA runtime API.

    Attributes that are not known are refused, and so is what no Hopper GPU would launch.
    """
    cluster = (1, 1, 1)
    flags = {_COOPERATIVE: False, _PROGRAMMATIC_SERIALIZATION: False}
    for i in range(config.num_attributes):
        attribute = config.attributes[i]
        if attribute.id == _CLUSTER:
            cluster = (attribute.value[0], attribute.value[1], attribute.value[2])
        elif attribute.id in flags:
            flags[attribute.id] = bool(attribute.value[0])
        else:
            raise Unsupported(
                f"sonic.simulator: launch attribute {attribute.id} (of cudaLaunchAttributeID) is not simulated, "
                f"expected one of {[_COOPERATIVE, _CLUSTER, _PROGRAMMATIC_SERIALIZATION]}"
            )
    translated = LaunchConfig(
        grid=(config.grid[0], config.grid[1], config.grid[2]),
        block=(config.block[0], config.block[1], config.block[2]),
        cluster=cluster,
        dynamic_shared_bytes=config.dynamic_shared_bytes,
        is_cooperative=flags[_COOPERATIVE],
        has_programmatic_serialization=flags[_PROGRAMMATIC_SERIALIZATION],
    )
    faults = translated.faults()
    if faults:
        raise SimulatorError(f"sonic.simulator: no Hopper GPU would launch this: {'; '.join(faults)}")
    return translated


def _count_params(ptx: str, entry: str) -> int:
    found = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(([^)]*)\)", ptx)
    if found is None:
        raise SimulatorError(f"sonic.simulator: the PTX of the launched image has no entry {entry}")
    return len(re.findall(r"\.param\b", found[1]))


# ---------------------------------------------------------------- what a block changes in CuTe-DSL


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack closes."""
    if name in vars(owner):
        stack.callback(setattr, owner, name, vars(owner)[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


def _wrap(stack: contextlib.ExitStack, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Call ``wrapper(original, *args, **kwargs)`` for a function or method until the stack closes."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    _replace(stack, owner, name, wrapped)


@functools.cache
def _dump_folder(process: int) -> str:
    # One for a process: the path is part of the key by which CuTe-DSL finds what it has compiled before.
    folder = tempfile.mkdtemp(prefix="sonic-simulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _environments() -> list[Any]:
    """What CuTe-DSL read from its environment variables, for each of its languages."""
    import cutlass.cute  # noqa: F401  makes them
    from cutlass.base_dsl import dsl

    return [instance.envar for instance in dsl.DSLSingletonMeta._instances.values()]


@contextlib.contextmanager
def _with_line_info(line_info: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for environment in _environments():
            _replace(stack, environment, "lineinfo", line_info)
        yield


@contextlib.contextmanager
def _redirected(shim: Path) -> Iterator[None]:
    from cutlass import cute, utils
    from cutlass.base_dsl import dsl, env_manager, jit_executor
    from cutlass.cutlass_dsl import cuda_jit_executor

    with contextlib.ExitStack() as stack:
        for environment in _environments():
            _replace(stack, environment, "shared_libs", str(shim))
            _replace(stack, environment, "_arch", ARCHITECTURE)
            _replace(stack, environment, "disable_file_caching", True)
        _replace(stack, env_manager, "get_prefix_dsl_libs", lambda prefix: str(shim))
        _wrap(stack, dsl.BaseDSL, "_prepare_compilation", _keep_ptx)
        _wrap(stack, jit_executor.JitFunctionArtifacts, "__post_init__", _collect_ptx)
        function = cuda_jit_executor.CudaDialectJitCompiledFunction
        _wrap(stack, function, "__init__", functools.partial(_believe_in_one_device, function, function.to))
        _wrap(stack, function, "to", _to_real_device)
        _wrap(stack, cute.runtime._Tensor, "__init__", _on_device)
        for name, told in _HARDWARE.items():
            _replace(stack, utils.HardwareInfo, name, told)
        if importlib.util.find_spec("tvm_ffi") is not None:
            _redirect_tvm_ffi(stack)
        yield


def _redirect_tvm_ffi(stack: contextlib.ExitStack) -> None:
    from cutlass.cutlass_dsl import tvm_ffi_provider as provider

    provider.tvm_ffi.register_error("sonic.simulator.HeldError", HeldError)  # for good; only the shim raises it
    call_on_device = functools.partial(_call_on_device, provider.tvm_ffi.from_dlpack)
    for function in (provider.TVMFFIJitCompiledFunction, provider.TVMFFIJitCompiledFunctionWithKwargs):
        _wrap(stack, function, "__call__", call_on_device)


def _keep_ptx(original: Callable[..., Any], language: Any, *args: Any, **kwargs: Any) -> Any:
    """Have the compiler write PTX and cubin, unless it is asked to already."""
    # the options may be those of `cute.compile` itself, where what a block sets would stay for good
    language.compile_options = copy.deepcopy(language.compile_options)
    prepared = original(language, *args, **kwargs)
    for kind, option in language.compile_options.options.items():
        extension = {"KeepPTX": "ptx", "KeepCUBIN": "cubin"}.get(kind.__name__)
        if extension is not None and not option.value:
            option.value = True
            option.dump_path = os.path.join(_dump_folder(os.getpid()), "kernel")
            setattr(option, f"full_{extension}_path", f"{option.dump_path}.{ARCHITECTURE}.{extension}")
    return prepared


def _collect_ptx(original: Callable[..., None], artifacts: Any) -> None:
    """Take PTX and cubin from where CuTe-DSL reads back what it was asked to keep."""
    paths = [path for path in (artifacts.PTX, artifacts.CUBIN) if isinstance(path, str)]
    original(artifacts)
    if isinstance(artifacts.CUBIN, bytes) and isinstance(artifacts.PTX, str):
        register_ptx(artifacts.CUBIN, artifacts.PTX)
    for path in paths:
        if os.path.dirname(path) == _dump_folder(os.getpid()):
            # the next compilation writes the same names: what it does not write must not be taken for its own
            Path(path).unlink(missing_ok=True)


_NUM_DEVICES = "num_devices"  # a cached property, which would ask the driver; set where a function is simulated


def _believe_in_one_device(
    base: type, to: Callable[..., Any], original: Callable[..., None], function: Any, *args: Any, **kwargs: Any
) -> None:
    original(function, *args, **kwargs)
    vars(function)[_NUM_DEVICES] = 1
    if type(function).to is base.to:  # type: ignore[attr-defined]  # TVM-FFI functions are not bound to a device
        # a weak reference: a function should die with its last user, as without this
        vars(function)["to"] = functools.partial(_to_simulated_device, to, weakref.ref(function))


def _check_compiled_here(function: Any) -> None:
    if _NUM_DEVICES not in vars(function) and not torch.cuda.is_available():
        name = getattr(function, "function_name", function)
        raise SimulatorError(
            f"sonic.simulator: {name} was compiled outside of `with sonic.simulator.hopper():`, for a GPU that is not "
            "here; compile it inside"
        )


def _to_real_device(original: Callable[..., Any], function: Any, device: int | None = None) -> Any:
    _check_compiled_here(function)
    return original(function, device)


def _to_simulated_device(original: Callable[..., Any], function: weakref.ref, device: int | None = None) -> Any:
    """Bind a function to the device; its executor raises what is held."""
    with _raise_held():
        executor = original(function(), device)
    # CuTe-DSL would give the shim's handles to the real runtime to unload
    executor.jit_module.cuda_library.clear()
    run = executor.run_compiled_program

    def run_compiled_program(arguments: list[Any]) -> Any:
        with _raise_held():
            return run(arguments)

    executor.run_compiled_program = run_compiled_program
    return executor


def _on_device(original: Callable[..., None], tensor: Any, data: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(data, torch.Tensor) and data.device.type == "cpu":
        data = tensors.tensor(data)
    original(tensor, data, *args, **kwargs)


def _call_on_device(
    from_dlpack: Callable[[Any], Any], original: Callable[..., Any], function: Any, *args: Any, **kwargs: Any
) -> Any:
    """Call a TVM-FFI function with every CPU tensor among its arguments taken for a device tensor."""
    _check_compiled_here(function)
    if _NUM_DEVICES not in vars(function):
        return original(function, *args, **kwargs)

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == "cpu":
            value = tensors.tensor(value)
        if isinstance(value, tensors.DeviceTensor):
            return from_dlpack(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(convert, value))
        if isinstance(value, (tuple, list)):
            return type(value)(map(convert, value))
        return value

    _take_held()
    return original(function, *map(convert, args), **{name: convert(value) for name, value in kwargs.items()})


# Methods of CuTe-DSL's HardwareInfo, for the GPU that the innermost block tells of.
_HARDWARE: dict[str, Callable[..., Any]] = {
    "__init__": lambda self, device_id=0: None,
    "get_max_active_clusters": lambda self, cluster_size, stream=None: max(1, _open[-1].num_sms // cluster_size),
    "get_device_multiprocessor_count": lambda self: _open[-1].num_sms,
    "get_l2_cache_size_in_bytes": lambda self: 50 * 2**20,
}
