from lumi.host.devices import named_peak_flops


def test_peak_flops_by_name():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L4": 121e12,
        "NVIDIA RTX A1000": None,
    }
    assert {name: named_peak_flops(name) for name in peaks} == peaks
