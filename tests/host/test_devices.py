import pytest
import torch

from lumi.config import UserError
from lumi.host import devices
from lumi.host.devices import choose_device, cpu_flags, cpu_name, fast_bfloat16, named_peak_flops

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_peak_flops_by_name():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA RTX A1000": None,
    }
    assert {name: named_peak_flops(name) for name in peaks} == peaks


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match='must be "cpu" or "auto" on this machine, got "cuda"'):
        choose_device("cuda")


@pytest.fixture
def fresh():
    """`fast_bfloat16` without its cache, so that each case asks the device that it describes."""
    return fast_bfloat16.__wrapped__


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_on_cuda_by_capability(fresh, monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fresh(CUDA) is expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "fma"}, False),
        ({"avx512f", "avx512_vnni"}, False),
        ({"avx512f", "avx512_bf16"}, True),
        ({"amx_tile", "amx_bf16"}, True),
        (set(), False),
    ],
)
def test_bfloat16_on_a_cpu_by_its_flags(fresh, monkeypatch, flags, expected):
    monkeypatch.setattr(devices, "cpu_flags", lambda: flags)
    assert fresh(CPU) is expected


def test_other_devices_are_unknown(fresh):
    assert not fresh(torch.device("meta"))


def test_the_name_is_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert cpu_name(cpuinfo) is None
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n")
    assert cpu_name(cpuinfo) == "AMD EPYC"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")  # ARM gives no name
    assert cpu_name(cpuinfo) is None


def test_flags_are_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvmx flags\t: ept\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t:1\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "avx512_bf16"}
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")  # ARM names its instructions otherwise
    assert cpu_flags(cpuinfo) == set()


def test_where_there_is_no_cpuinfo_torch_is_asked(tmp_path, monkeypatch):
    absent = tmp_path / "absent"
    capabilities = {"avx2": True, "avx512_bf16": False, "l1d_cache_size": 32768, "cpu_name": "EPYC"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_flags(absent) == {"avx2"}
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert cpu_flags(absent) == set()
