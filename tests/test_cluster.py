"""Clusters and GPUs: what is read out of names, files and a few words."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import units
from meshwright.describe import gpu as gpus
from meshwright.describe.cluster import (
    build_cluster,
    known_gpus,
    load_cluster,
    load_gpu,
    parse_network,
)
from meshwright.describe.cluster.document import from_document, to_document, to_toml
from meshwright.describe.gpu import HARDWARE, read_hardware, stems
from meshwright.errors import ClusterError, DocumentError, MeshwrightError

EXAMPLE = Path(__file__).parent.parent / "examples" / "cluster-h100-ethernet.toml"

NAMES = {
    # the published runs
    "H100-SXM-80GB": "H100-SXM-80GB",
    "A100-SXM-80GB": "A100-SXM-80GB",
    "A100-SXM-40GB": "A100-SXM-40GB",
    "A100-PCIE-80GB": "A100-PCIE-80GB",
    "H100-SXM-96GB-HBM2e-500W": "H100-SXM-96GB",
    "GB200": "GB200-186GB",
    "GB300": "GB300-288GB",
    "B200": "B200-SXM-180GB",
    "B300": "B300-SXM-288GB",
    # what people type
    "h100": "H100-SXM-80GB",
    "H100-96GB": "H100-SXM-96GB",
    "h100_80": "H100-SXM-80GB",
    "H100SXM5": "H100-SXM-80GB",
    "DGX-H100": "H100-SXM-80GB",
    "H100-PCIe": "H100-PCIE-80GB",
    "H100-NVL": "H100-NVL-94GB",
    "A100": "A100-SXM-80GB",
    "A100-40GB": "A100-SXM-40GB",
    "a100-pcie": "A100-PCIE-80GB",
    "A100-PCIe-40GB": "A100-PCIE-40GB",
    "A800": "A800-SXM-80GB",
    "H800": "H800-SXM-80GB",
    "H20": "H20-SXM-96GB",
    "H200": "H200-SXM-141GB",
    "B200-SXM-192GB": "B200-SXM-180GB",
    "GB200 NVL72": "GB200-186GB",
    "GH200 480GB": "GH200-96GB",
    "L40S": "L40S-48GB",
    "V100-16GB": "V100-SXM-16GB",
    "RTX A6000": "A6000-48GB",
    "Instinct MI300X OAM": "MI300X-192GB",
    # what the driver prints
    "NVIDIA H100 80GB HBM3": "H100-SXM-80GB",
    "NVIDIA A100-SXM4-80GB": "A100-SXM-80GB",
    "NVIDIA A100 80GB PCIe": "A100-PCIE-80GB",
    "Tesla V100-SXM2-32GB": "V100-SXM-32GB",
    "NVIDIA B300 SXM6 AC": "B300-SXM-288GB",
}


@pytest.mark.parametrize(("text", "name"), NAMES.items())
def test_every_usual_spelling_names_its_gpu(text: str, name: str) -> None:
    assert load_gpu(text).name == name


@pytest.mark.parametrize("name", known_gpus())
def test_every_gpu_is_found_by_its_own_name_and_states_plausible_facts(name: str) -> None:
    gpu = load_gpu(name)
    assert gpu.name == name
    assert gpu.assumed == ()
    assert 0.85 < gpu.hbm_bytes / gpu.advertised_hbm_bytes < 1.09
    assert 0.5e12 < gpu.hbm_bytes_per_s < 10e12
    assert gpu.peak_flops_per_s["fp16"] > gpu.peak_flops_per_s["fp32"]
    assert set(gpu.peak_flops_per_s) <= {"bf16", "fp16", "fp8", "fp4", "tf32", "fp32"}
    assert gpu.peak_flops_per_s.get("fp8", 2e99) > 1.9 * gpu.peak_flops_per_s["fp16"]
    assert bool(gpu.peer) == (gpu.peer_bytes_per_s > 0)
    assert gpu.system in stems("systems")


@pytest.mark.parametrize("folder", ["gpus", "systems"])
def test_every_hardware_file_says_where_its_numbers_come_from(folder: str) -> None:
    for stem in stems(folder):
        table = read_hardware(f"{folder}/{stem}")
        assert table["source"]["default"], stem
        assert set(table["source"]) - {"default"} <= set(table), stem
        assert "value" not in table, "fitted numbers have a table of their own"


def test_two_files_of_one_family_never_claim_the_same_name() -> None:
    names = known_gpus()
    assert len(names) == len(set(names)) == len(stems("gpus"))
    assert {load_gpu(stem).name for stem in stems("gpus")} == set(names)


def test_data_sheet_figures_are_the_published_ones() -> None:
    h100, gb300 = load_gpu("H100"), load_gpu("GB300")
    assert h100.peak_flops_per_s["bf16"] == 989.4e12
    assert h100.hbm_bytes_per_s == 3.35e12
    assert h100.peer_bytes_per_s == 450e9
    assert units.format_bytes(h100.hbm_bytes) == "79.1 GiB"
    assert gb300.peak_flops_per_s["fp4"] == 15e15
    assert load_gpu("A100-40GB").hbm_bytes_per_s == 1.555e12
    assert load_gpu("H100-96GB").hbm_bytes_per_s == 2.4e12
    assert "bf16" not in load_gpu("V100").peak_flops_per_s


def test_a_power_limit_in_the_name_is_kept_and_said() -> None:
    gpu = load_gpu("H100-SXM-80GB-500W")
    assert gpu.power_w == 500.0
    assert "500W" in gpu.sources["power_w"]
    assert gpu.peak_flops_per_s == load_gpu("H100-SXM-80GB").peak_flops_per_s


def test_a_name_that_leaves_something_open_says_how_it_is_read() -> None:
    assert load_gpu("H100").assumed == ("gpu H100 is read as H100-SXM-80GB",)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("H10O", "H100"),
        ("H1000", "H100"),
        ("L40", "L40S"),
        ("H100-SMX", "H100-SXM-80GB"),
        ("A100-64GB", "A100-SXM-80GB"),
        ("A100-NVL", "A100-SXM-80GB"),
        ("H100-SXM-96GB-HBM3", "H100-SXM-96GB"),
        ("TPUv5", "Choose from"),
        ("", "Choose from"),
        ("--", "Choose from"),
        (None, "Choose from"),
        ("x" * 1000, "Choose from"),
    ],
)
def test_an_unknown_gpu_is_refused_with_the_nearest_names(name: str, hint: str) -> None:
    with pytest.raises(ClusterError) as caught:
        load_gpu(name)
    assert caught.value.field == "gpu"
    assert hint in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "read_as"),
    [
        ("A100-64GB", "A100-SXM-80GB"),
        ("H100-SXM-96GB-HBM3", "H100-SXM-96GB"),
        ("H100-SXM-80GB-liquid", "H100-SXM-80GB"),
        ("H200-PCIE-141GB", "H200-SXM-141GB"),
    ],
)
def test_unknown_words_are_read_as_the_nearest_where_asked_and_said(name: str, read_as: str):
    gpu = load_gpu(name, nearest=True)
    assert gpu.name == read_as
    assert any(name in line for line in gpu.assumed)


def test_an_unknown_family_is_refused_even_where_the_nearest_is_asked_for() -> None:
    with pytest.raises(ClusterError):
        load_gpu("TPUv5", nearest=True)


@pytest.mark.parametrize(
    ("text", "num_gpus", "gpus_per_node", "nvlink_domain"),
    [
        ("64xH100", 64, 8, 8),
        ("8x8xH100", 64, 8, 8),
        ("64 X h100", 64, 8, 8),
        ("3x4xH100", 12, 4, 4),
        ("4xA100-40GB", 4, 4, 4),
        ("1xH100", 1, 1, 1),
        ("256xGB200", 256, 4, 64),
        ("72xGB200", 72, 4, 72),
        ("144xGB300", 144, 4, 72),
        ("576xGB200", 576, 4, 64),
        ("8xGB200", 8, 4, 8),
        ("16xA100-PCIe", 16, 8, 1),
        ("8xMI300X", 8, 8, 8),
    ],
)
def test_a_short_text_is_a_cluster(
    text: str, num_gpus: int, gpus_per_node: int, nvlink_domain: int
) -> None:
    cluster = load_cluster(text)
    assert cluster.name == text
    assert cluster.num_gpus == num_gpus
    assert cluster.gpus_per_node == gpus_per_node
    assert cluster.num_nodes == num_gpus // gpus_per_node
    assert cluster.nvlink_domain == nvlink_domain
    assert cluster.scale_up_domain == max(nvlink_domain, gpus_per_node if nvlink_domain == 1 else 1)


def test_what_the_text_leaves_open_is_listed() -> None:
    said = " | ".join(load_cluster("256xGB200").assumed)
    for word in ("gpus_per_node = 4", "nvlink_domain = 64", "inter_node = 4x400Gb"):
        assert word in said
    said = " | ".join(load_cluster("8x8xH100-SXM-80GB").assumed)
    assert "gpus_per_node" not in said
    for whole in ("8xH100-SXM-80GB", "8xA100-PCIE-80GB"):
        assert load_cluster(whole).assumed == (), whole


def test_the_defaults_of_a_system_are_its_published_network() -> None:
    rates = {
        "64xH100": 50e9,
        "64xA100": 25e9,
        "64xB200": 50e9,
        "64xB300": 100e9,
        "128xGB200": 50e9,
        "128xGB300": 100e9,
    }
    for text, bytes_per_s in rates.items():
        assert load_cluster(text).inter_node.bytes_per_s == bytes_per_s, text


def test_cards_without_nvlink_reach_their_peers_over_pcie() -> None:
    cluster = load_cluster("8xA100-PCIe")
    assert cluster.intra_node.bytes_per_s == 32e9
    assert "PCIe" in cluster.intra_node.name
    assert not cluster.nvls


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("12xH100", "8 or 16"),
        ("0xH100", "64xH100"),
        ("-8xH100", "64xH100"),
        ("8xH100x2", "64xH100"),
        ("H100x8", "64xH100"),
        ("1000000000xH100", "64xH100"),
        ("9" * 5000 + "xH100", "64xH100"),
        ("1048576x8xH100", "64xH100"),
        ("H100", "8xH100"),
        ("8xH10O", "H100"),
        ("8x", "64xH100"),
        ("5", "64xH100"),
        ("", "64xH100"),
        ("  ", "64xH100"),
        (None, "64xH100"),
        (8, "64xH100"),
        ("\0", "64xH100"),
    ],
)
def test_what_is_no_cluster_is_refused_with_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(ClusterError) as caught:
        load_cluster(text)
    assert hint in caught.value.remedy


@given(st.text(max_size=40))
def test_any_text_is_a_cluster_or_an_error_with_a_remedy(text: str) -> None:
    try:
        load_cluster(text)
    except MeshwrightError as error:
        assert error.remedy


@pytest.mark.parametrize(
    ("text", "gpus_per_node", "bytes_per_s"),
    [
        ("platform-default: 8x400Gb NDR IB", 8, 50e9),
        ("platform-default: 4x400Gb per 4-GPU tray (ConnectX-7)", 4, 50e9),
        ("platform-default: 4x800Gb per 4-GPU tray (ConnectX-8)", 4, 100e9),
        ("platform-default: 8x800Gb (ConnectX-8)", 8, 100e9),
        ("4x Omni-Path links per node (stated)", 8, 6.25e9),
        ("1600Gb RoCE per node (stated)", 8, 25e9),
        ("8x400Gb RDMA per node (stated)", 8, 50e9),
        ("8x200Gb HDR IB (paper)", 8, 25e9),
        ("8x400Gb RoCE (paper)", 8, 50e9),
        ("8x200Gb HDR per 8-GPU node", 4, 25e9),
        ("400Gb NDR per GPU", 8, 50e9),
        ("8x NDR", 8, 50e9),
        ("HDR200", 8, 25e9),
        ("3200Gbps EFA", 8, 50e9),
        ("3.2 Tb/s per node", 8, 50e9),
        ("50 GB/s per GPU", 8, 50e9),
        ("8x400G RoCEv2", 8, 50e9),
        ("2x100GbE Ethernet per node", 8, 3.125e9),
        ("25GbE Ethernet", 8, 25e9 / 64),
    ],
)
def test_a_network_in_words_is_the_share_of_one_gpu(
    text: str, gpus_per_node: int, bytes_per_s: float
) -> None:
    link = parse_network(text, gpus_per_node)
    assert link is not None
    assert link.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-12)
    assert link.latency_s > 0


@pytest.mark.parametrize("text", ["", "not stated", "InfiniBand", "fast", "0x400Gb", "0 Gb/s"])
def test_words_without_a_rate_are_no_network(text: str) -> None:
    assert parse_network(text, 8) is None


def test_the_kind_of_a_network_sets_its_latency() -> None:
    texts = ("8x400Gb NDR IB", "8x400Gb RoCE", "8x400Gb Ethernet")
    latencies = [link.latency_s for text in texts if (link := parse_network(text, 8))]
    assert latencies == sorted(set(latencies))
    assert len(latencies) == 3


def test_what_is_stated_of_a_cluster_wins_over_its_system() -> None:
    cluster = build_cluster(
        "A100-SXM-80GB",
        64,
        system="DGX-A100 (Selene)",
        gpus_per_node=4,
        nvlink_domain=4,
        network="1600Gb RoCE per node (stated)",
    )
    assert (cluster.gpus_per_node, cluster.nvlink_domain) == (4, 4)
    assert cluster.inter_node.bytes_per_s == 50e9
    assert cluster.assumed == ()


@pytest.mark.parametrize("system", ["DGX-H100", "Grand Teton", "Meta Grand Teton, RoCE", "Selene"])
def test_a_system_is_found_by_its_name_in_free_text(system: str) -> None:
    assert build_cluster("H100-SXM-80GB", 8, system=system).assumed == ()


def test_an_unknown_system_is_refused_or_said() -> None:
    with pytest.raises(ClusterError, match="dgx-h100"):
        build_cluster("H100", 8, system="DGX-H10O")
    cluster = build_cluster("H100", 8, system="MosaicML platform", nearest=True)
    assert any("MosaicML" in line for line in cluster.assumed)


def test_gpus_that_fill_no_whole_nodes_shrink_the_node_only_where_asked() -> None:
    cluster = build_cluster("H100", 12, nearest=True)
    assert cluster.gpus_per_node == 6
    assert any("12 GPUs" in line for line in cluster.assumed)
    assert build_cluster("H100", 4, gpus_per_node=8, network="8x400Gb").gpus_per_node == 4


def test_nvlink_that_a_card_does_not_have_is_refused_or_said() -> None:
    with pytest.raises(ClusterError, match="No NVLink"):
        build_cluster("A100-PCIE-80GB", 8, nvlink_domain=8)
    cluster = build_cluster("A100-PCIE-80GB", 8, nvlink_domain=8, nearest=True)
    assert cluster.nvlink_domain == 1
    assert any("nvlink_domain" in line for line in cluster.assumed)


@pytest.mark.parametrize("value", [0, -8, 2.0, True, 10**9, "8"])
def test_counts_that_cannot_be_are_refused(value: int) -> None:
    for count in ("gpus_per_node", "nvlink_domain"):
        with pytest.raises(ClusterError):
            build_cluster("H100", 8, **{count: value})
    with pytest.raises(ClusterError):
        build_cluster("H100", value)


def test_the_example_file_overrides_what_it_says_and_keeps_the_rest() -> None:
    cluster, usual = load_cluster(str(EXAMPLE)), load_cluster("64xH100")
    assert cluster.inter_node.bytes_per_s == pytest.approx(25e9 / 8)
    assert cluster.inter_node.latency_s == 30e-6
    assert cluster.sources["inter_node"] == "purchase order of the servers"
    assert cluster.capacity_bytes == usual.capacity_bytes - 2**30
    assert cluster.gpu.power_w == 600.0
    assert cluster.intra_node == usual.intra_node
    assert cluster.gpu.peak_flops_per_s == usual.gpu.peak_flops_per_s
    assert cluster.assumed == ()


def _write(folder: Path, text: str) -> str:
    path = folder / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


HEAD = 'gpu = "H100"\nnum_gpus = 64\n'


@pytest.mark.parametrize(
    ("text", "field", "hint"),
    [
        ('gpu = "H100"', "cluster.num_gpus", "num_gpus = 64"),
        (HEAD + "gpus_per_nodes = 8", "cluster.gpus_per_nodes", "gpus_per_node"),
        (HEAD + '[inter_node]\nbandwidth = "5 GB/s"', "cluster.inter_node.bandwidth", "Choose"),
        (HEAD + '[inter_node]\nbytes_per_s = "5 GB"', "cluster.inter_node.bytes_per_s", "450 GB/s"),
        (HEAD + "[inter_node]\nbytes_per_s = 0", "cluster.inter_node.bytes_per_s", "default"),
        (HEAD + '[inter_node]\nnetwork = "fast"', "cluster.inter_node.network", "8x400Gb"),
        (HEAD + '[gpu_overrides]\nhbm = "5 GB"', "cluster.gpu_overrides.hbm", "hbm_bytes"),
        (HEAD + "[gpu_overrides]\nhbm_bytes = true", "cluster.gpu_overrides.hbm_bytes", "80 GB"),
        (
            HEAD + "[gpu_overrides.peak_flops_per_s]\nbf61 = 5",
            "cluster.gpu_overrides.peak_flops_per_s.bf61",
            "bf16",
        ),
        (HEAD + 'reserved_bytes = "80 GiB"', "cluster.reserved_bytes", "less"),
        (HEAD + "[fitted]\nmatmul = 0.7", "cluster.fitted.matmul", "source"),
        (HEAD + '[fitted.m]\nvalue = nan\nsource = "x"', "cluster.fitted.m", "source"),
        (HEAD + '[source]\ninter_nod = "x"', "cluster.source.inter_nod", "inter_node"),
        ('gpu = "H10O"\nnum_gpus = 8', "gpu", "H100"),
        ('gpu = "H100"\nnum_gpus = "8"', "cluster.num_gpus", "examples"),
        (HEAD + "nvlink_domain = 0", "nvlink_domain", "64xH100"),
        ("gpu = ", "cluster", "TOML"),
    ],
)
def test_a_wrong_cluster_file_is_refused_at_the_key(
    tmp_path: Path, text: str, field: str, hint: str
) -> None:
    with pytest.raises(MeshwrightError) as caught:
        load_cluster(_write(tmp_path, text))
    assert caught.value.field == field
    assert hint in caught.value.remedy


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="No such file"):
        load_cluster(str(tmp_path / "none.toml"))
    with pytest.raises(DocumentError):
        load_cluster(_folder_named_toml(tmp_path))


def _folder_named_toml(tmp_path: Path) -> str:
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    return str(folder)


def test_fitted_factors_are_kept_apart_from_facts(tmp_path: Path) -> None:
    text = HEAD + '[fitted.matmul]\nvalue = 0.75\nsource = "64xH100, 2026-11-21, calibrate"'
    cluster = load_cluster(_write(tmp_path, text))
    assert cluster.fitted == {"matmul": 0.75}
    assert cluster.sources["fitted.matmul"] == "64xH100, 2026-11-21, calibrate"
    assert cluster.gpu.peak_flops_per_s == load_gpu("H100").peak_flops_per_s


def test_stating_the_network_as_a_number_takes_it_off_the_assumed_list(tmp_path: Path) -> None:
    cluster = load_cluster(_write(tmp_path, HEAD + '[inter_node]\nbytes_per_s = "12.5 GB/s"'))
    assert cluster.inter_node.bytes_per_s == 12.5e9
    assert not any("inter_node" in line for line in cluster.assumed)
    assert "datasheet" not in cluster.sources["inter_node"]


@pytest.mark.parametrize(
    "text",
    [str(EXAMPLE), "1xH100", "4xH100", "3x4xH100", "256xGB200", "144xGB300", "16xA100-PCIe"]
    + [f"8x{name}" for name in known_gpus()],
)
def test_a_cluster_written_as_toml_is_read_back_equal(text: str) -> None:
    cluster = load_cluster(text)
    written = tomllib.loads(to_toml(to_document(cluster)))
    again = from_document(written)
    assert replace(again, assumed=(), gpu=replace(again.gpu, assumed=())) == replace(
        cluster, assumed=(), gpu=replace(cluster.gpu, assumed=())
    )


def test_overrides_and_odd_names_survive_writing() -> None:
    table = {
        "name": 'rack "7"',
        "gpu": "H100-SXM-80GB-500W",
        "num_gpus": 8,
        "gpu_overrides": {"peak_flops_per_s": {"bf16": "700 TFLOP/s"}, "hbm_bytes": "70 GiB"},
        "fitted": {"matmul.bf16 large": {"value": 0.7, "source": 'a "b"'}},
    }
    cluster = from_document(table)
    again = from_document(tomllib.loads(to_toml(to_document(cluster))))
    assert again.gpu.power_w == 500.0
    assert again.gpu.peak_flops_per_s["bf16"] == 700e12
    assert replace(again, assumed=()) == replace(cluster, assumed=())


def test_a_cluster_can_be_a_key() -> None:
    assert hash(load_cluster("8xH100")) == hash(load_cluster("8xH100"))


def test_loading_a_cluster_from_text_does_not_load_pydantic() -> None:
    code = (
        "import sys; from meshwright.describe.cluster import load_cluster;"
        "load_cluster('64xH100'); print('pydantic' in sys.modules, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_the_hardware_files_travel_with_the_package() -> None:
    assert (HARDWARE / "networks.toml").is_file()
    assert set(read_hardware("networks")["latency_s"]) >= set(read_hardware("networks")["kinds"])


@given(st.sampled_from(known_gpus()), st.integers(1, 4096))
def test_nodes_and_domains_always_cover_the_gpus(name: str, num_gpus: int) -> None:
    cluster = build_cluster(name, num_gpus, nearest=True)
    assert cluster.num_nodes * cluster.gpus_per_node == num_gpus
    assert 1 <= cluster.nvlink_domain <= num_gpus
    assert cluster.intra_node.bytes_per_s > 0 < cluster.inter_node.bytes_per_s
    assert (cluster.nvlink_domain > 1) == (cluster.intra_node.name == cluster.gpu.peer != "")


@pytest.fixture
def own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a GPU that a user adds beside the known ones."""
    shutil.copytree(str(HARDWARE), tmp_path / "hardware")
    folder = tmp_path / "hardware" / "gpus"
    monkeypatch.setattr(gpus, "HARDWARE", tmp_path / "hardware")
    caches: tuple[Any, ...] = (gpus.stems, gpus.read_hardware, gpus._families, gpus._read)
    for cached in caches:
        cached.cache_clear()
    text = (folder / "h100-sxm-80gb.toml").read_text()
    own = folder / "x900-sxm-80gb.toml"
    own.write_text(text.replace("H100-SXM-80GB", "X900-SXM-80GB"))
    yield own
    for cached in caches:
        cached.cache_clear()


def test_a_gpu_is_added_by_a_file_of_its_own(own_gpu: Path) -> None:
    assert load_gpu("x900").name == "X900-SXM-80GB"


@pytest.mark.parametrize("key", ["name", "sold_as_gb", "hbm_bytes", "system", "peak_flops_per_s"])
def test_a_gpu_file_that_leaves_a_key_out_is_told_which(own_gpu: Path, key: str) -> None:
    text = own_gpu.read_text()
    own_gpu.write_text(re.sub(rf"(?m)^{key} = .*\n", "", text, count=1))
    with pytest.raises(ClusterError, match=f"gpus.x900-sxm-80gb.{key} .*needed"):
        load_gpu("x900")
    with pytest.raises(ClusterError, match="needed"):
        known_gpus()


def test_a_gpu_file_says_where_its_numbers_come_from(own_gpu: Path) -> None:
    own_gpu.write_text(re.sub(r"(?m)^default = .*\n", "", own_gpu.read_text()))
    with pytest.raises(ClusterError, match=r"gpus.x900-sxm-80gb.source.default"):
        load_cluster("8xX900")


def test_a_key_of_a_gpu_file_that_is_not_known_names_the_nearest(own_gpu: Path) -> None:
    own_gpu.write_text("hbm_byte = 1\n" + own_gpu.read_text())
    with pytest.raises(ClusterError, match="hbm_bytes"):
        load_gpu("x900")
