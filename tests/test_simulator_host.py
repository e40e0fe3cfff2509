"""From a compiled CuTe-DSL function to a launch: what the engine is given, and what users see when something is wrong.

The engine is a fake that writes down what it is called with.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

cutlass = pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")
pytest.importorskip("tvm_ffi", reason="needs apache-tvm-ffi")

import cutlass.cute as cute  # noqa: E402
from cutlass.base_dsl import dsl, env_manager, jit_executor  # noqa: E402
from cutlass.cute.runtime import from_dlpack  # noqa: E402
from cutlass.cutlass_dsl import cuda_jit_executor, tvm_ffi_provider  # noqa: E402

import sonic.simulator  # noqa: E402
from sonic.simulator import SimulatorError, Unsupported, host, images, tensors, version  # noqa: E402
from sonic.simulator.kernel_launch import LaunchConfig, Region  # noqa: E402

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- kernels


@cute.kernel
def store_kernel(x: cute.Tensor, value: cutlass.Int32):
    thread, _, _ = cute.arch.thread_idx()
    x[thread] = value


@cute.jit
def store(x: cute.Tensor, value: cutlass.Int32):
    store_kernel(x, value).launch(grid=(4, 3, 2), block=(64, 2, 1), cluster=(2, 1, 1), smem=2048, use_pdl=True)


@cute.jit
def store_cooperatively(x: cute.Tensor, value: cutlass.Int32):
    store_kernel(x, value).launch(grid=(2, 1, 1), block=(32, 1, 1), cooperative=True)


@cute.jit
def store_twice(x: cute.Tensor, value: cutlass.Int32):
    store_kernel(x, value).launch(grid=(1, 1, 1), block=(32, 1, 1))
    scale_kernel(x).launch(grid=(2, 1, 1), block=(32, 1, 1))


@cute.kernel
def scale_kernel(x: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    x[thread] = x[thread] * 3


class Pair(NamedTuple):
    first: cute.Tensor
    second: cute.Tensor


@cute.jit
def store_pair(pair: Pair, value: cutlass.Int32):
    store_kernel(pair[0], value).launch(grid=(1, 1, 1), block=(32, 1, 1))
    store_kernel(pair[1], value).launch(grid=(1, 1, 1), block=(32, 1, 1))


def filler(constant: int) -> Any:
    """A function whose kernel has the same name whatever the constant is."""

    @cute.kernel
    def fill_kernel(x: cute.Tensor):
        thread, _, _ = cute.arch.thread_idx()
        x[thread] = constant

    @cute.jit
    def fill(x: cute.Tensor):
        fill_kernel(x).launch(grid=(1, 1, 1), block=(32, 1, 1))

    return fill


# ---------------------------------------------------------------- a fake engine


class Launch(types.SimpleNamespace):
    """What the engine was called with."""

    ptx: str
    entry: str
    config: LaunchConfig
    params: list[bytes]
    regions: list[Region]
    options: Any


SIZES = {"b8": 1, "b32": 4, "u32": 4, "b64": 8, "u64": 8}


def bytes_of_params(ptx: str, entry: str, addresses: list[int]) -> list[bytes]:
    (listed,) = re.findall(rf"\.entry {re.escape(entry)}\(([^)]*)\)", ptx)
    found = re.findall(r"\.param(?: \.align \d+)? \.(\w+) \w+(?:\[(\d+)\])?", listed)
    assert len(found) == len(addresses)
    return [
        ctypes.string_at(address, SIZES[kind] * int(length or 1))
        for address, (kind, length) in zip(addresses, found, strict=True)
    ]


def record(ptx: str, entry: str, config: LaunchConfig, params: list[int], regions: Any, options: Any) -> Launch:
    return Launch(
        ptx=ptx,
        entry=entry,
        config=config,
        params=bytes_of_params(ptx, entry, params),
        regions=list(regions),
        options=options,
    )


def refuse(*_: Any) -> None:
    raise LookupError("the engine found a fault")


@pytest.fixture(scope="module")
def with_tvm_ffi() -> Any:
    """A function compiled for TVM-FFI, and its tensor."""
    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record):
        return cute.compile(store, from_dlpack(x), 1, options="--enable-tvm-ffi"), x


@pytest.fixture(scope="module")
def plain() -> Any:
    """A function compiled without, and its tensor."""
    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record):
        return cute.compile(store, from_dlpack(x), 1), x


def call(function: Any, x: torch.Tensor) -> None:
    function(from_dlpack(x) if "TVM" not in type(function).__name__ else x, 7)


@pytest.fixture(params=["plain", "with_tvm_ffi"])
def compiled(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# ---------------------------------------------------------------- what the engine is given


def test_a_launch_is_recorded(compiled: Any) -> None:
    function, x = compiled
    with host.simulate(record, options="the options") as sim:
        call(function, x)
    (launch,) = sim.traces
    assert launch.config == LaunchConfig(
        grid=(4, 3, 2),
        block=(64, 2, 1),
        cluster=(2, 1, 1),
        dynamic_shared_bytes=2048,
        is_cooperative=False,
        has_programmatic_serialization=True,
    )
    assert (launch.config.num_blocks, launch.config.num_threads) == (24, 128)
    assert [int.from_bytes(value, "little") for value in launch.params] == [x.data_ptr(), 7]
    assert launch.options == "the options"
    assert f".entry {launch.entry}(" in launch.ptx and ".target sm_90a" in launch.ptx
    # a pointer to global memory, as on a GPU
    assert "st.global" in launch.ptx
    (region,) = [region for region in launch.regions if region.address == x.data_ptr()]
    assert region.num_bytes == 256 and region.end == x.data_ptr() + 256


def test_a_cooperative_launch() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record) as sim:
        cute.compile(store_cooperatively, from_dlpack(x), 1)(from_dlpack(x), 1)
    (launch,) = sim.traces
    assert launch.config == LaunchConfig((2, 1, 1), (32, 1, 1), is_cooperative=True)


def test_calls_without_cute_compile_and_several_kernels_in_one_image() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record) as sim:
        for _ in range(2):
            store_twice(from_dlpack(x), 5)
    assert [launch.config.grid for launch in sim.traces] == [(1, 1, 1), (2, 1, 1)] * 2
    assert "store_kernel" in sim.traces[0].entry and "scale_kernel" in sim.traces[1].entry
    assert [len(launch.params) for launch in sim.traces] == [2, 1, 2, 1]


def test_kernels_with_the_same_name_have_their_own_ptx() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record) as sim:
        functions = [cute.compile(filler(constant), from_dlpack(x)) for constant in (1234, 5678)]
        for function in [*functions, functions[0]]:
            function(from_dlpack(x))
    assert len({launch.entry for launch in sim.traces}) == 1, "the names were expected to be the same"
    constants = [[c for c in ("1234", "5678") if re.search(rf"\b{c}\b", launch.ptx)] for launch in sim.traces]
    assert constants == [["1234"], ["5678"], ["1234"]]


def test_tensors_inside_tuples_reach_tvm_ffi_functions() -> None:
    pair = Pair(torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32))
    with host.simulate(record) as sim:
        function = cute.compile(store_pair, Pair(*map(from_dlpack, pair)), 1, options="--enable-tvm-ffi")
        function(pair, 3)
        function(Pair(*map(sonic.simulator.tensor, pair)), 3)
    pointers = [int.from_bytes(launch.params[0], "little") for launch in sim.traces]
    assert pointers == [pair.first.data_ptr(), pair.second.data_ptr()] * 2


def test_line_info() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    for line_info in (False, True, False):
        with host.simulate(record), host.simulate(record, line_info=line_info) as sim:
            cute.compile(filler(9), from_dlpack(x))(from_dlpack(x))
        assert (".loc" in sim.traces[0].ptx) == line_info == (Path(__file__).name in sim.traces[0].ptx)


def test_persistent_kernels_see_few_multiprocessors() -> None:
    with host.simulate(record, num_sms=6), host.simulate(record, num_sms=3):
        hardware = cutlass.utils.HardwareInfo()
        assert hardware.get_device_multiprocessor_count() == 3
        assert [hardware.get_max_active_clusters(size) for size in (1, 2, 4)] == [3, 1, 1]
    with pytest.raises(ValueError, match="num_sms is 0"), host.simulate(record, num_sms=0):
        pass


def test_hopper_takes_the_engine_and_its_options(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    monkeypatch.setitem(sys.modules, "sonic.simulator.engine", types.SimpleNamespace(run=record))
    with sonic.simulator.hopper("random", seed=3, num_sms=2, checks=False) as sim:
        call(*plain)
    options = sim.traces[0].options
    assert (options.schedule, options.seed, options.checks) == ("random", 3, False)
    with pytest.raises(ValueError, match="schedule is 'soon'"), sonic.simulator.hopper("soon"):
        pass
    assert not host._open


# ---------------------------------------------------------------- memory


def test_regions_are_whole_storages_for_as_long_as_they_live() -> None:
    gc.collect()
    before = tensors.regions()
    storage = torch.zeros(8, 16)
    view = storage[2:4, ::2].T
    assert tensors.register(view, "view") == Region(storage.data_ptr(), 512, "view")
    assert tensors.register(storage) == Region(storage.data_ptr(), 512, "view")
    assert tensors.register(storage, "all") == Region(storage.data_ptr(), 512, "all")
    wrapped = sonic.simulator.tensor(view[:0])
    assert wrapped.shape == (0, 2) and wrapped.dtype == torch.float32
    assert [region for region in tensors.regions() if region not in before] == [Region(storage.data_ptr(), 512, "all")]
    del storage, view
    assert tensors.regions() != before
    del wrapped
    assert tensors.regions() == before


def test_a_region_lives_as_long_as_the_kernel_argument() -> None:
    with host.simulate(record):
        argument = from_dlpack(torch.zeros(77))
    gc.collect()
    assert [region.num_bytes for region in tensors.regions()].count(4 * 77) == 1
    del argument
    assert [region.num_bytes for region in tensors.regions()].count(4 * 77) == 0


def test_regions_without_a_name_are_numbered() -> None:
    first, second, third = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    numbers = [int(tensors.register(tensor).name.removeprefix("arg ")) for tensor in (first, second)]
    assert numbers == sorted(numbers)
    taken = tensors.register(first).name
    del first
    assert tensors.register(third).name == taken


def test_regions_follow_a_storage_that_is_resized() -> None:
    tensor = torch.zeros(4)
    tensors.register(tensor, "grows")
    tensor.resize_(4096)
    (region,) = [region for region in tensors.regions() if region.name == "grows"]
    assert (region.address, region.num_bytes) == (tensor.data_ptr(), 4 * 4096)


def test_device_tensors() -> None:
    tensor = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    wrapped = sonic.simulator.tensor(sonic.simulator.tensor(tensor))
    assert wrapped.__dlpack_device__() == (2, 0)
    assert "dltensor" in repr(wrapped.__dlpack__(stream=None, max_version=(1, 0)))
    assert tensor.__dlpack_device__()[0] == 1, "the tensor itself stays on the CPU"
    with pytest.raises(SimulatorError, match="tensor is on meta, expected a CPU tensor"):
        sonic.simulator.tensor(torch.zeros(1, device="meta"))


# ---------------------------------------------------------------- errors


def test_errors_of_the_engine_arrive_as_themselves(compiled: Any) -> None:
    function, x = compiled
    error = LookupError("the engine found a fault")

    def fail(*_: Any) -> None:
        raise error

    with host.simulate(fail) as sim, pytest.raises(LookupError) as caught:
        call(function, x)
    assert caught.value is error and sim.traces == []
    assert "fail" in [entry.name for entry in caught.traceback], "the traceback reaches into the engine"
    with host.simulate(record) as sim:
        call(function, x)
    assert len(sim.traces) == 1, "a failed launch leaves nothing behind"


def test_an_interrupt_arrives_as_itself(compiled: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with host.simulate(interrupt), pytest.raises(KeyboardInterrupt):
        call(*compiled)


def test_errors_while_an_image_is_loaded_arrive_as_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(function: Any) -> None:
        ctypes.CDLL(str(host.load_shim()))._cudaMemcpy()
        raise RuntimeError("error code 719")

    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record):
        function = cute.compile(filler(55), from_dlpack(x))
        monkeypatch.setattr(type(function), "_load_cuda_library", load)
        with pytest.raises(Unsupported, match="host code calls _cudaMemcpy"):
            function(from_dlpack(x))


def test_a_launch_belongs_to_the_innermost_block(compiled: Any) -> None:
    function, x = compiled
    with host.simulate(record, "outer") as outer:
        with host.simulate(record, "inner") as inner:
            call(function, x)
        with pytest.raises(LookupError), host.simulate(refuse):
            call(function, x)
        call(function, x)
        with host.simulate(record, "outer") as equal:
            pass
        call(function, x)
    assert [launch.options for launch in inner.traces] == ["inner"]
    assert [launch.options for launch in outer.traces] == ["outer", "outer"] and equal.traces == []


def test_a_launch_outside_of_a_block_says_so(compiled: Any) -> None:
    function, x = compiled
    argument = sonic.simulator.tensor(x)
    if "TVM" in type(function).__name__:
        argument = tvm_ffi_provider.tvm_ffi.from_dlpack(argument)
    else:
        argument = from_dlpack(argument)
    with pytest.raises(
        SimulatorError, match=r"outside of `with sonic.simulator.hopper\(\):`, where there is no device"
    ):
        function(argument, 7)


def test_a_function_first_launched_outside_of_a_block_says_so() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    with host.simulate(record):
        function = cute.compile(filler(77), from_dlpack(x))
        argument = from_dlpack(x)
    with pytest.raises(SimulatorError, match="where there is no device"):
        function(argument)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run it")
@pytest.mark.parametrize("options", ["", "--enable-tvm-ffi"])
def test_a_function_compiled_outside_of_a_block_says_so(monkeypatch: pytest.MonkeyPatch, options: str) -> None:
    for instance in dsl.DSLSingletonMeta._instances.values():
        monkeypatch.setattr(instance.envar, "_arch", "sm_90a")
    x = torch.zeros(64, dtype=torch.int32)
    function = cute.compile(store, from_dlpack(sonic.simulator.tensor(x)), 1, options=options or None)
    with (
        host.simulate(record),
        pytest.raises(SimulatorError, match="store.* was compiled outside of .*compile it inside"),
    ):
        call(function, x)


def test_an_image_without_ptx_says_so(monkeypatch: pytest.MonkeyPatch, compiled: Any) -> None:
    monkeypatch.setattr(images, "_ptx_of_cubin", {})
    with host.simulate(record), pytest.raises(SimulatorError, match="the PTX of kernel .*store_kernel.* is not known"):
        call(*compiled)


def test_an_image_that_is_no_fatbin_is_refused() -> None:
    image = ctypes.create_string_buffer(b"\x7fELF" + bytes(60))
    with pytest.raises(Unsupported, match="starts with 0x464c457f, expected a fatbin"):
        images.cubins_of_fatbin(ctypes.addressof(image))


def test_unknown_launch_attributes_are_refused_with_their_id() -> None:
    attributes = (host._Attribute * 2)()
    attributes[0].id, attributes[0].value[0] = 2, 1
    config = host._Config(grid=(1, 2, 3), block=(4, 5, 6), dynamic_shared_bytes=7, attributes=attributes)
    config.num_attributes = 1
    assert host.read_config(config) == LaunchConfig((1, 2, 3), (4, 5, 6), (1, 1, 1), 7, is_cooperative=True)
    attributes[1].id, config.num_attributes = 9, 2
    with pytest.raises(Unsupported, match="launch attribute 9 "):
        host.read_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LaunchConfig((0, 1, 1), (32, 1, 1)), r"grid is \(0, 1, 1\)"),
        (LaunchConfig((1, 65536, 1), (32, 1, 1)), r"grid is \(1, 65536, 1\)"),
        (LaunchConfig((1, 1, 1), (32, 1, 65)), r"block is \(32, 1, 65\).*2080 threads"),
        (LaunchConfig((1, 1, 1), (1024, 2, 1)), "has 2048 threads, expected 1024 at most"),
        (LaunchConfig((1, 1, 1), (32, 1, 1), dynamic_shared_bytes=232449), "shared memory is 232449 bytes"),
        (LaunchConfig((32, 1, 1), (32, 1, 1), (32, 1, 1)), "expected 1 to 16 blocks"),
        (LaunchConfig((3, 2, 1), (32, 1, 1), (2, 1, 1)), r"grid is \(3, 2, 1\), expected a multiple of the cluster"),
    ],
)
def test_launches_that_no_gpu_would_take_are_refused(config: LaunchConfig, message: str) -> None:
    assert re.search(message, "; ".join(config.faults()))
    made = host._Config(config.grid, config.block, config.dynamic_shared_bytes)
    if config.cluster == (1, 1, 1):
        with pytest.raises(SimulatorError, match=f"no Hopper GPU would launch this: .*{message}"):
            host.read_config(made)


def test_symbols_that_are_not_simulated_are_refused_by_name() -> None:
    shim = ctypes.CDLL(str(host.load_shim()))
    assert shim._cudaMalloc(None, 16) != 0
    error = host._take_held()
    assert isinstance(error, Unsupported) and "_cudaMalloc" in str(error)
    value = ctypes.c_int()
    assert shim._cudaDeviceGetAttribute(ctypes.byref(value), 97, 0) == 0 and value.value == 232448
    assert shim._cudaDeviceGetAttribute(ctypes.byref(value), 9999, 0) != 0
    assert "_cudaDeviceGetAttribute (9999)" in str(host._take_held())


def test_the_shim_has_every_symbol_of_the_real_library() -> None:
    real = Path(env_manager.get_prefix_dsl_libs("CUTE_DSL").split(os.pathsep)[0])
    source = (ROOT / "sonic/simulator/shim.c").read_bytes()
    names = set(re.findall(rb"_cud?a?[A-Z]\w+|cuda_dialect_\w+|CuteDSLRT_\w+", real.read_bytes()))
    exported = {name.decode() for name in names if hasattr(ctypes.CDLL(str(real)), name.decode())}
    offered = {name.decode() for name in names if re.search(rb"\b" + name + rb"\b", source)}
    assert len(exported) > 50 and offered == exported


# ---------------------------------------------------------------- the library is built once


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path


def test_the_shim_is_built_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = host.build_shim("4.8.1")
    assert built.is_relative_to(empty_cache / "sonic" / "simulator") and built.name == "libcute_dsl_runtime.so"
    assert [path.name for path in built.parent.iterdir()] == [built.name], "nothing is left beside it"
    monkeypatch.setenv("PATH", "")
    assert host.build_shim("4.8.1") == built
    with pytest.raises(SimulatorError, match="found no C compiler"):
        host.build_shim("4.8.2")


def test_without_a_compiler_the_message_says_what_to_install(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SimulatorError, match=r"found no C compiler \(cc, gcc, clang\).*install gcc or clang"):
        host.build_shim("4.8.1")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SimulatorError, match=r"\(CC=no-such-compiler\)"):
        host.build_shim("4.8.1")
    assert not list(empty_cache.rglob("*.so"))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    monkeypatch.setenv("CC", "cc -g")
    assert host.build_shim("4.8.1").exists()


def test_a_compiler_that_fails_is_quoted(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "fake-cc"
    fake.write_text("#!/bin/sh\necho 'no headers here' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    with pytest.raises(SimulatorError, match=r"fake-cc .* failed:\nno headers here"):
        host.build_shim("4.8.1")
    assert not list(empty_cache.rglob("*.so"))


# ---------------------------------------------------------------- versions


@pytest.mark.parametrize("installed", ["4.8.0", "4.8.1", "4.8.12.dev0"])
def test_supported_versions(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    assert version.check_version() == installed


@pytest.mark.parametrize("installed", ["4.7.9", "4.9.0", "5.8.1", "nightly"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    host.load_shim.cache_clear()
    message = rf"{re.escape(installed)} is installed, expected nvidia-cutlass-dsl>=4.8,<4.9"
    with pytest.raises(SimulatorError, match=message), host.simulate(record):
        pass
    assert not host._open


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SimulatorError, match="needs nvidia-cutlass-dsl>=4.8,<4.9, none is installed"):
        version.check_version()


# ---------------------------------------------------------------- nothing is left behind


def state() -> dict[str, Any]:
    """What a block changes."""
    owners = {
        "artifacts": jit_executor.JitFunctionArtifacts,
        "executor": cuda_jit_executor.CudaDialectJitCompiledFunction,
        "hardware": cutlass.utils.HardwareInfo,
        "libraries": env_manager,
        "languages": dsl.BaseDSL,
        "tensor": cute.runtime._Tensor,
        "tvm_ffi": tvm_ffi_provider.TVMFFIJitCompiledFunction,
        "tvm_ffi with names": tvm_ffi_provider.TVMFFIJitCompiledFunctionWithKwargs,
        **{f"environment {kind}": made.envar for kind, made in dsl.DSLSingletonMeta._instances.items()},
    }
    return {**{name: dict(vars(owner)) for name, owner in owners.items()}, "os": dict(os.environ)}


def test_a_block_restores_what_it_changed() -> None:
    before = state()
    with host.simulate(record):
        inside = state()
        with pytest.raises(LookupError), host.simulate(record):
            raise LookupError
        assert state() == inside, "an inner block leaves the outer one's changes"
    assert state() == before
    assert {name for name in before if before[name] != inside[name]} == set(before) - {"os"}
    with contextlib.suppress(LookupError), host.simulate(record):
        raise LookupError
    assert state() == before


def test_a_block_leaves_no_compile_options_behind() -> None:
    x = torch.zeros(64, dtype=torch.int32)

    def values() -> dict[str, Any]:
        return {kind.__name__: option.value for kind, option in cute.compile._compile_options.options.items()}

    before = values()
    with host.simulate(record):
        function = cute.compile(filler(31), from_dlpack(x))
    assert values() == before
    assert function.__ptx__ is not None and "31" in function.__ptx__


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_simulator_loads_nothing_heavy() -> None:
    probe = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import sonic.simulator\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    loaded = run_python(probe).split()
    assert "sonic.simulator.errors" in loaded
    assert "matplotlib" not in loaded
    assert not {name.split(".")[0] for name in loaded} & {"cutlass", "cuda", "numpy", "tvm_ffi"}
    assert {"sonic.simulator.host", "sonic.simulator.engine"}.isdisjoint(loaded)
    drawing = run_python(probe.replace("import sonic.simulator", "from sonic.simulator import draw_timeline")).split()
    assert "sonic.simulator.timeline" in drawing and "matplotlib" not in drawing


@pytest.mark.long
@pytest.mark.parametrize("value", ["", "0", "1"])
def test_a_whole_process_can_be_simulated(value: str) -> None:
    probe = (
        "import sys, types\n"
        "sys.modules['sonic.simulator.engine'] = types.SimpleNamespace(run=None)\n"
        "from sonic.simulator import host\n"
        "answers = [host.enable_from_environment('SIMULATE_IT') for _ in range(2)]\n"
        "print(answers, len(host._open), host.load_shim.cache_info().currsize)\n"
    )
    expected = "[True, True] 1 1" if value == "1" else "[False, False] 0 0"
    assert run_python(probe, SIMULATE_IT=value).strip() == expected


BACKEND = """
import threading
import torch
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
import sonic.simulator

@cute.kernel
def double_kernel(x: cute.Tensor):
    thread, _, _ = cute.arch.thread_idx()
    x[thread] = x[thread] * 2

@cute.jit
def double(x: cute.Tensor):
    double_kernel(x).launch(grid=(1, 1, 1), block=(32, 1, 1))

def backend(x):  # what a room with kernels does at each call
    simulated = sonic.simulator.enable_from_environment()
    argument = from_dlpack(sonic.simulator.tensor(x))
    cute.compile(double, argument)(argument)
    return simulated

x = torch.arange(32, dtype=torch.int32)
with sonic.simulator.hopper("lazy") as own:  # a block of the caller's own keeps its launches
    answers = [backend(x)]
threads = [threading.Thread(target=lambda: answers.append(backend(x))) for _ in range(2)]
for thread in threads:
    thread.start()
    thread.join()
answers.append(backend(x))
from sonic.simulator import host
print(answers, len(own.traces), len(host._open), len(host._open[0].traces), torch.equal(x, 16 * torch.arange(32)))
"""


def test_a_backend_may_ask_the_environment_at_each_call(tmp_path: Path) -> None:
    (tmp_path / "backend.py").write_text(BACKEND, encoding="utf-8")
    told = run_python(f"import runpy; runpy.run_path({str(tmp_path / 'backend.py')!r})", SONIC_SIMULATE_HOPPER="1")
    assert told.strip() == "[True, True, True, True] 1 1 3 True"


def test_a_wrong_value_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATE_IT", "yes")
    with pytest.raises(ValueError, match="SIMULATE_IT is 'yes', expected 0 or 1"):
        host.enable_from_environment("SIMULATE_IT")


def test_public_names() -> None:
    for name in sonic.simulator.__all__:
        assert getattr(sonic.simulator, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sonic.simulator.nothing  # noqa: B018
