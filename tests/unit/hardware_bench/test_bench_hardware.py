"""`rm-scale bench hardware`: its arithmetic, its file, and one rank that really measures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from rm_scale.cli import build_parser
from rm_scale.commands.bench import run as bench_hardware
from rm_scale.distributed import World
from rm_scale.errors import UserError
from rm_scale.hardware_bench import device_file, measure, worker
from rm_scale.hardware_bench.measured import MIB, TYPICAL, Link, Measured, Product, Transfer, fit_link
from rm_scale.hardware_bench.table import as_table
from rm_scale.launch.ranks import Ended
from rm_scale.planning.hardware import known_devices, read_devices

PRODUCTS = (
    Product("attention of a 1B", 2048, 2048, 2048, 3e11),
    Product(TYPICAL, 2048, 4096, 11008, 4e11),
    Product("square", 1024, 8192, 8192, 4.5e11),
)


def transfers(latency: float, rates: dict[str, float]) -> tuple[Transfer, ...]:
    """What a perfect link between two ranks would give."""
    made = []
    for name, rate in rates.items():
        for size in (MIB, 16 * MIB, 64 * MIB):
            sent = worker.link_bytes(name, size, 2)
            made.append(Transfer(name, size, sent, latency + sent / rate))
    return tuple(made)


NARROW, WIDE = worker.layers_to_time("cpu")
LAYERS = (replace(NARROW, seconds=0.5), replace(WIDE, seconds=1.0))
CPU = Measured(
    device="cpu",
    device_name="AMD EPYC",
    dtype="bfloat16",
    num_ranks=2,
    num_threads=1,
    memory_bytes=8e9,
    products=PRODUCTS,
    layers=LAYERS,
    memory_bandwidth={"copy": 10e9, "triad": 12.34567e9},
    backend="gloo",
    transfers=transfers(1e-3, {"all_reduce": 3e9, "all_gather": 1e9, "reduce_scatter": 2e9}),
    versions={"torch": "2.13.0+cpu", "python": "3.11.7", "cuda": "None"},
)
H100 = replace(CPU, device="cuda", device_name="NVIDIA H100 80GB HBM3", backend="nccl")


# --- Arithmetic ------------------------------------------------------------------------------------------------------


def test_link_is_recovered() -> None:
    link = fit_link(transfers(2e-3, {"all_reduce": 5e9}))
    assert link.latency_seconds == pytest.approx(2e-3) and link.bandwidth == pytest.approx(5e9)


@pytest.mark.parametrize(("efficiency", "share"), [(0.35, 0.6), (0.65, 0.8), (1.0, 0.3), (0.2, 1.0)])
def test_shares_are_recovered(efficiency: float, share: float) -> None:
    """Layers that take what the planner says of these shares give the shares again."""
    entry = device_file.device_entry(CPU)
    rates = {name: entry[name] for name in ("matmul_flops", "memory_bandwidth")}
    device = replace(known_devices()["cpu"], step_efficiency=1.0, elementwise_share=1.0, **rates)
    layers = []
    for one in (NARROW, WIDE):
        rated, moved = device_file.layer_seconds(one, device)
        layers.append(replace(one, seconds=rated / efficiency + moved / share))
    found = device_file.step_shares(replace(CPU, layers=tuple(layers)), entry)
    assert found == pytest.approx((efficiency, share))


@pytest.mark.parametrize("seconds", [(1e-4, 1e-4), (5.0, 0.01), (0.01, 5.0)])
def test_shares_are_shares(seconds: tuple[float, float]) -> None:
    """Whatever noise does to the times."""
    layers = (replace(NARROW, seconds=seconds[0]), replace(WIDE, seconds=seconds[1]))
    entry = device_file.device_entry(replace(CPU, layers=layers))
    assert 0 < entry["step_efficiency"] <= 1 and 0 < entry["elementwise_share"] <= 1
    assert "step_efficiency" not in device_file.device_entry(replace(H100, layers=layers)), (
        "calibrated on published runs"
    )


def test_link_without_sense_is_the_largest_transfer() -> None:
    """Small ones relatively faster than large ones: no latency, and no more than was seen."""
    odd = [Transfer("all_reduce", 1, 1e6, 1e-4), Transfer("all_reduce", 2, 1e8, 1.0)]
    assert fit_link(odd) == Link(0.0, 1e8)
    shrinking = [Transfer("all_reduce", 1, 1e6, 1.0), Transfer("all_reduce", 2, 1e8, 0.5)]
    assert fit_link(shrinking) == Link(0.0, 2e8)


def test_link_of_the_device_is_the_middle_one() -> None:
    assert CPU.link_bandwidth() == pytest.approx(2e9)
    assert replace(CPU, transfers=()).link_bandwidth() is None
    assert replace(CPU, transfers=CPU.transfers[:1]).link_bandwidth() is None, "one size is not enough"


def test_bytes_over_a_link() -> None:
    assert worker.link_bytes("all_reduce", 800, 4) == 1200
    assert worker.link_bytes("all_gather", 800, 4) == worker.link_bytes("reduce_scatter", 800, 4) == 600


@pytest.mark.parametrize(("flops", "tokens"), [(0.0, 256), (2.0 * 64 * 64 * 1500, 1024), (1e20, 8192)])
def test_tokens_that_fit(flops: float, tokens: int) -> None:
    assert worker.fitting_tokens(flops, 64, 64) == tokens


# --- The file --------------------------------------------------------------------------------------------------------


def test_planner_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    device_file.write_device(path, "cpu-here", CPU)
    (device,) = read_devices(str(path)).values()
    assert device.name == "cpu-here" and device.is_cpu and device.title == "AMD EPYC"
    assert device.matmul_flops == device.peak_flops == 4.5e11
    assert device.memory_bandwidth == 12.35e9 and device.link_bandwidth == 2e9 and device.memory_bytes == 8e9
    assert device.devices_per_node == 2 and device.node_bandwidth == known_devices()["cpu"].node_bandwidth
    assert device.sources == (
        "measured by rm-scale bench hardware with 2 ranks at once, bfloat16, torch 2.13.0+cpu; the rest as cpu"
    )
    measured = yaml.safe_load(path.read_text())["measured"]
    assert measured["links"]["all_gather"]["bandwidth"] == pytest.approx(1e9)
    assert measured["date"] and measured["versions"]["torch"] == "2.13.0+cpu" and len(measured["transfers"]) == 9


def test_a_known_gpu_keeps_the_peak_of_its_data_sheet(tmp_path: Path) -> None:
    device_file.write_device(tmp_path / "h.yaml", "mine", H100)
    (device,) = read_devices(str(tmp_path / "h.yaml")).values()
    assert device.peak_flops == known_devices()["h100-80g"].peak_flops and device.matmul_flops == 4.5e11


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_gpus_are_known_by_name(name: str, like: str) -> None:
    assert device_file.like_device(replace(H100, device_name=name)).name == like


def test_an_unknown_gpu_is_like_the_one_of_nearest_rate() -> None:
    unknown = replace(H100, device_name="Future 1", products=(replace(PRODUCTS[0], flops=1.6e15),))
    assert device_file.like_device(unknown).name == "b200"
    assert device_file.device_entry(unknown)["peak_flops"] == 1.6e15


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_file.socket, "gethostname", lambda: "Node1")
    assert device_file.device_name(CPU, None) == "cpu-node1"
    assert device_file.device_name(CPU, "My Laptop") == "cpu-my-laptop"
    assert device_file.device_name(CPU, "cpu") == "cpu"
    assert device_file.device_name(H100, None) == "h100-80g-node1"
    assert device_file.device_name(H100, "rack7") == "rack7"


def test_measured_survives_json() -> None:
    assert Measured.from_dict(json.loads(json.dumps(asdict(CPU)))) == CPU


def test_table() -> None:
    table = as_table("cpu-here", CPU)
    assert "cpu-here: AMD EPYC; ranks at once: 2, 1 threads each; figures are per rank" in table
    assert "0.450 TFLOP/s  <- largest rate" in table and "0.400 TFLOP/s  <- typical" in table
    assert "all_gather       fits     1000 us + bytes / 1.00 GB/s" in table
    alone = as_table("cpu-here", replace(CPU, num_ranks=1, transfers=()))
    assert "collectives: one rank has nobody to talk to; --nproc 2 measures them" in alone


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0.5", "99999"])
def test_time_that_makes_no_sense(seconds: str) -> None:
    with pytest.raises(UserError, match=r"seconds=[\d.]+: must be from 1 to 3600\. Fix: leave it out, or 20\."):
        bench_hardware(build_parser().parse_args(["bench", "hardware", "--seconds", seconds]))


def test_files_that_are_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("devices: {a: {like: cpu}}\n")
    with pytest.raises(UserError, match=r"exists, and is no earlier measurement\. Fix: give another --output\."):
        device_file.check_output(path)
    path.write_text("{ not yaml")
    with pytest.raises(UserError, match="is no earlier measurement"):
        device_file.check_output(path)
    with pytest.raises(UserError, match=r"there is no folder .*gone\. Fix: make it, or give another path\."):
        device_file.check_output(tmp_path / "gone" / "x.yaml")
    device_file.write_device(path, "cpu", CPU)
    device_file.check_output(path)


def test_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't be written \(Is a directory\)\. Fix: give another --output\."):
        device_file.write_device(tmp_path, "cpu", CPU)


@pytest.mark.parametrize(("code", "how"), [(1, "ended with code 1"), (None, "did not end")])
def test_ranks_that_fail(code: int | None, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "start_ranks", lambda *_: Ended(code, "RuntimeError: broken\n"))
    with pytest.raises(UserError) as caught:
        measure.measure(2, 1.0)
    text = f"the ranks {how}; they printed: RuntimeError: broken. Fix: rm-scale doctor --nproc 2."
    assert str(caught.value) == text


# --- Measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_one_rank_measures() -> None:
    measured = worker.measure_rank(World(), 1.0)
    assert measured.device in {"cpu", "cuda"} and measured.num_ranks == 1 and measured.transfers == ()
    assert {product.what for product in measured.products} >= {"attention of a 1B", TYPICAL}
    assert all(1e9 < product.flops < 1e16 for product in measured.products)
    assert set(measured.memory_bandwidth) == {"copy", "triad"}
    assert all(1e8 < rate < 1e14 for rate in measured.memory_bandwidth.values())
    assert all(layers.seconds > 0 for layers in measured.layers)
    assert measured.typical.what == TYPICAL and measured.best.flops >= measured.typical.flops


def test_shapes_too_large_for_the_memory_are_left_out() -> None:
    products = list(worker.time_products(torch.device("cpu"), torch.float32, 20 * 2048 * 2048 * 4, 0.01))
    assert [product.what for product in products] == ["attention of a 1B"]


def test_product_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rm_scale.doctor.checks_machine.processor_flags", lambda: frozenset({"avx2"}))
    assert worker.product_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr("rm_scale.doctor.checks_machine.processor_flags", lambda: frozenset({"amx_bf16"}))
    assert worker.product_dtype(torch.device("cpu")) == torch.bfloat16


def test_import_without_torch() -> None:
    names = ", ".join(f"rm_scale.hardware_bench.{name}" for name in ("device_file", "measure", "table"))
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
