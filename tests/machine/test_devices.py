"""The devices of a machine, from llama-server's list, NVML and the system."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from sollold.machine import backends, devices, speed
from sollold.machine.backends import ListedDevice, parse
from sollold.machine.device import Kind
from sollold.machine.devices import PROCESS, DeviceMeter, combine
from sollold.machine.gpus import Gpu, Nvml, visible
from sollold.machine.memory import Memory
from sollold.machine.speed import Speed
from sollold.settings.schema import GIB, MIB, NodeSettings

CUDA = """ggml_cuda_init: found 2 CUDA devices (Total VRAM: 48514 MiB):
  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes, VRAM: 24257 MiB
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24257 MiB, 23800 MiB free)
  CUDA1: NVIDIA GeForce RTX 4090 (24257 MiB, 24000 MiB free)
  Vulkan0: NVIDIA GeForce RTX 4090 (24564 MiB, 23000 MiB free)
"""
VULKAN = """ggml_vulkan: Found 3 Vulkan devices:
ggml_vulkan: 0 = AMD Radeon RX 7900 XTX (RADV NAVI31) (radv) | uma: 0 | fp16: 1 | bf16: 0 | warp size: 64
ggml_vulkan: 1 = AMD Ryzen 9 (RADV RAPHAEL) (radv) | uma: 1 | fp16: 1 | bf16: 0 | warp size: 64
Available devices:
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24000 MiB free)
  Vulkan1: AMD Ryzen 9 (RADV RAPHAEL) (16000 MiB, 9000 MiB free)
  Vulkan2: llvmpipe (LLVM 15.0.6, 256 bits) (24000 MiB, 24000 MiB free)
"""
METAL = "Available devices:\n  MTL0: Apple M3 Max (49152 MiB, 49151 MiB free)\n"
METAL += "  BLAS: Accelerate (0 MiB, 0 MiB free)\n"
SPEED = Speed("a processor", 8, 50e9, 1e12)
RAM = Memory(32 * GIB, 20 * GIB)


def gpu(index: int, uuid: str = "GPU-0000", **processes: int) -> Gpu:
    used = {int(pid[1:]): size for pid, size in processes.items()}
    return Gpu(index, uuid, "RTX 4090", 24257 * MIB, 20000 * MIB, 1e12, 8e13, used)


def test_a_gpu_is_listed_once_for_several_backends() -> None:
    assert [device.id for device in parse(CUDA)] == ["CUDA0", "CUDA1"]


def test_vulkan_devices_with_unified_memory_are_marked_and_software_renderers_skipped() -> None:
    assert parse(VULKAN) == [
        ListedDevice("Vulkan0", "AMD Radeon RX 7900 XTX (RADV NAVI31)", 24560 * MIB, 24000 * MIB, False),
        ListedDevice("Vulkan1", "AMD Ryzen 9 (RADV RAPHAEL)", 16000 * MIB, 9000 * MIB, True),
    ]


@pytest.mark.parametrize(
    ("name", "unified"),
    [
        ("Intel(R) Arc(TM) A770 Graphics", False),
        ("Intel(R) Arc(tm) B580 Graphics (BMG G21)", False),
        ("Intel(R) Arc(tm) Graphics (MTL)", True),
        ("Intel(R) UHD Graphics 770 (ADL-S GT1)", True),
        ("AMD Radeon Graphics (RADV PHOENIX)", True),
        ("AMD Radeon RX 7900 XTX", False),
    ],
)
def test_integrated_gpus_are_recognized_by_their_name(name: str, unified: bool) -> None:
    (device,) = parse(f"Available devices:\n  Vulkan0: {name} (16000 MiB, 15000 MiB free)\n")
    assert device.unified == unified


def test_vulkans_uma_flag_takes_precedence_over_the_name() -> None:
    flags = "ggml_vulkan: 0 = AMD Radeon Graphics (radv) | uma: 0 | fp16: 1\n"
    (device,) = parse(
        f"{flags}Available devices:\n  Vulkan0: AMD Radeon Graphics (16000 MiB, 15000 MiB free)\n"
    )
    assert not device.unified


def test_metal_devices_have_unified_memory() -> None:
    assert [(device.id, device.unified) for device in parse(METAL)] == [("MTL0", True)]


@pytest.mark.parametrize(
    "text", ["", "Available devices:\n  (none)\n", "  : (x MiB, y MiB free)\n", "\x00" * 99]
)
def test_other_output_lists_nothing(text: str) -> None:
    assert parse(text) == []


def test_a_program_that_fails_is_distinguished_from_an_empty_list(tmp_path: Path) -> None:
    assert backends.listed(tmp_path / "nothing") is None
    server = lister(tmp_path, "")
    assert backends.listed(server) == []
    server.write_text("#!/bin/sh\necho 'Available devices:'\nexit 1\n")
    assert backends.listed(server) is None


def lister(folder: Path, text: str) -> Path:
    """Write a fake llama-server that prints ``text`` as its list of devices."""
    server = folder / "llama-server"
    server.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    server.chmod(0o755)
    return server


def test_listed_gpus_are_measured_by_nvml() -> None:
    combined = combine(NodeSettings(), RAM, SPEED, parse(CUDA), [gpu(0, p77=5 * MIB), gpu(1)])
    first, second, processor = combined.devices
    assert (first.id, first.kind, first.free, first.bandwidth) == ("CUDA0", Kind.GPU, 20000 * MIB, 1e12)
    assert first.overhead == 512 * MIB
    assert (processor.id, processor.total, processor.free, processor.overhead) == (
        "CPU",
        RAM.total,
        RAM.free,
        PROCESS,
    )
    assert {device.pool for device in (first, second, processor)} == {""}
    assert combined.processes == {77: {"CUDA0": 5 * MIB}}


def test_an_unreadable_gpu_does_not_shift_the_others() -> None:
    lost = Gpu(0, "", "GPU 0", 0, 0, 0.0, 0.0, {})
    first, second, _ = combine(NodeSettings(), RAM, SPEED, parse(CUDA), [lost, gpu(1, p77=5)]).devices
    assert (first.id, first.free, first.bandwidth) == ("CUDA0", 23800 * MIB, 0.0), "the listed value"
    assert (second.id, second.free, second.bandwidth) == ("CUDA1", 20000 * MIB, 1e12)


class Driver:
    """A double of NVML with two GPUs; reading the memory of the first fails."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str) -> object:
        raise AttributeError(name)

    def nvmlShutdown(self) -> None:
        raise self.NVMLError("Uninitialized")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"card {handle}"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}{handle}{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> object:
        if not handle:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(total=8 * GIB, free=7 * GIB)

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return 1000

    def nvmlDeviceGetMemoryBusWidth(self, handle: int) -> int:
        return 256

    nvmlDeviceGetNumGpuCores = nvmlDeviceGetMemoryBusWidth
    NVML_CLOCK_MEM = NVML_CLOCK_SM = 0

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[object]:
        return []


def test_an_unreadable_gpu_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    nvml._nvml = Driver()
    for _ in range(3):
        first, second = nvml.gpus()
        assert (first.name, first.readable) == ("card 0", False)
        assert (second.index, second.readable, second.free) == (1, True, 7 * GIB)
    assert [record.getMessage() for record in caplog.records] == ["GPU 0 can't be read: Not Supported"]


def test_a_driver_that_is_gone_does_not_fail_the_shutdown() -> None:
    nvml = Nvml()
    nvml._nvml = Driver()
    nvml.close()
    assert not nvml.present


def test_devices_unknown_to_nvml_are_listed_again_and_kept_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "LIST_SECONDS", 0.0)
    machine = DeviceMeter(NodeSettings(), tmp_path)
    monkeypatch.setattr(machine._nvml, "gpus", list)
    server = lister(tmp_path, "  CUDA0: NVIDIA A (24000 MiB, 23000 MiB free)")

    def free() -> list[int]:
        return [device.free // MIB for device in machine.measure().devices if device.kind is Kind.GPU]

    try:
        machine.use_server(server)
        assert free() == [23000]
        lister(tmp_path, "  CUDA0: NVIDIA A (24000 MiB, 500 MiB free)")
        assert free() == [500], "another program uses the rest"
        server.write_text("#!/bin/sh\nexit 1\n")
        assert free() == [500]
        lister(tmp_path, "  CUDA0: NVIDIA A (24000 MiB, 900 MiB free)")
        assert free() == [900]
        lister(tmp_path, "  (none)")
        assert free() == []
    finally:
        machine.close()


def test_a_gpu_that_llama_server_does_not_list_is_not_a_device() -> None:
    combined = combine(NodeSettings(), RAM, SPEED, [], [gpu(0)])
    assert [device.id for device in combined.devices] == ["CPU"]


def test_unified_memory_is_one_pool_limited_to_the_ram() -> None:
    apple, processor = combine(NodeSettings(), RAM, SPEED, parse(METAL), []).devices
    assert (apple.pool, processor.pool) == ("ram", "ram")
    assert (apple.total, apple.free) == (RAM.total, RAM.free)
    assert apple.bandwidth == SPEED.bandwidth


def test_device_limits_and_selection_by_settings() -> None:
    settings = NodeSettings(device_limits={"CUDA0": 20 * GIB, "CPU": 99 * GIB}, devices=("CPU", "CUDA0"))
    first, processor = combine(settings, RAM, SPEED, parse(CUDA), [gpu(0), gpu(1)]).devices
    assert (first.id, first.limit) == ("CUDA0", 20 * GIB)
    assert (processor.id, processor.limit) == ("CPU", RAM.total)
    only = combine(NodeSettings(devices=("CUDA1",)), RAM, SPEED, parse(CUDA), [gpu(0), gpu(1)])
    assert [device.id for device in only.devices] == ["CUDA1"]


@pytest.mark.parametrize(
    ("variable", "indices"),
    [(None, [0, 1]), ("1,0", [1, 0]), ("", []), ("1", [1]), ("0,9,1", [0]), ("GPU-bb", [1]), ("-1", [])],
)
def test_cuda_visible_devices_is_interpreted_as_by_cuda(variable: str | None, indices: list[int]) -> None:
    gpus = [gpu(0, "GPU-aa11"), gpu(1, "GPU-bb22")]
    assert [visible_gpu.index for visible_gpu in visible(gpus, variable)] == indices


def test_the_speed_is_measured_once_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "speed.json"
    first = speed.speed(file)
    assert first.bandwidth > 1e8
    assert first.compute > 1e8
    monkeypatch.setattr(speed, "bandwidth", lambda threads, free: 1.0)
    assert speed.speed(file) == first
    file.write_text("{}")
    assert speed.speed(file).bandwidth == 1.0


def test_gpus_that_llama_server_does_not_list_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = lister(tmp_path, "Available devices:")
    machine = DeviceMeter(NodeSettings(), tmp_path)
    monkeypatch.setattr(machine._nvml, "gpus", lambda: [gpu(0)])
    try:
        assert machine.idle_gpus() == ()
        machine.use_server(server)
        machine.measure()
        assert machine.idle_gpus() == (gpu(0).name,)
        machine.use_server(lister(tmp_path, CUDA))
        machine.measure()
        assert machine.idle_gpus() == ()
    finally:
        machine.close()


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("lib/libggml-cuda.so", ("CUDA",)),
        ("lib/libggml-hip.so", ("ROCm",)),
        ("b11434-vulkan/bin/llama-server", ("Vulkan",)),
        ("b11434-cpu/bin/llama-server", ()),
        ("lib/libggml-cpu-haswell.so", ()),
    ],
)
def test_a_gpu_build_without_gpus_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, kinds: tuple[str, ...]
) -> None:
    folder = (tmp_path / file).parent
    folder.mkdir(parents=True)
    (tmp_path / file).touch()
    machine = DeviceMeter(NodeSettings(), tmp_path)
    try:
        assert machine.absent_gpus() == ()
        machine.use_server(lister(folder, "Available devices:"))
        machine.measure()
        machine.measure()
        assert machine.absent_gpus() == kinds
        assert caplog.text.count("but no GPU was found") == len(kinds)
        machine.use_server(lister(folder, CUDA))
        machine.measure()
        assert machine.absent_gpus() == ()
    finally:
        machine.close()


def test_a_software_renderer_is_a_device_if_selected_by_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "Available devices:\n  Vulkan0: llvmpipe (LLVM 19.1.7, 256 bits) (16000 MiB, 15000 MiB free)\n"
    assert parse(text) == []
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    assert [(device.id, device.unified) for device in parse(text)] == [("Vulkan0", True)], "it uses the RAM"


def test_a_hanging_driver_blocks_only_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = DeviceMeter(NodeSettings(reserve=7), tmp_path)
    hanging, proceed = threading.Event(), threading.Event()

    def hang() -> list[Gpu]:
        hanging.set()
        assert proceed.wait(30)
        return []

    monkeypatch.setattr(machine._nvml, "gpus", hang)
    others = (lambda: machine.use_server(tmp_path / "llama-server"), machine.reserves, machine.idle_gpus)
    with ThreadPoolExecutor(1 + len(others)) as threads:
        try:
            measured = threads.submit(machine.measure)
            assert hanging.wait(30)
            calls = [threads.submit(call) for call in others]
            assert not wait(calls, 10).not_done
        finally:
            proceed.set()
        assert measured.result(30).devices
    machine.close()


def test_the_real_machine_is_measured(tmp_path: Path) -> None:
    machine = DeviceMeter(NodeSettings(reserve=7), tmp_path)
    try:
        (*_, processor) = machine.measure().devices
        assert processor.id == "CPU"
        assert 0 < processor.free <= processor.total
        assert machine.reserves()["CPU"] == 7
    finally:
        machine.close()
