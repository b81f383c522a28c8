"""Text with units against plain numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright import units
from meshwright.errors import MeshwrightError


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("450 GB/s", "bytes_per_s", 450e9),
        ("450GBps", "bytes_per_s", 450e9),
        ("400 Gbit/s", "bytes_per_s", 50e9),
        ("400Gbps", "bytes_per_s", 50e9),
        ("400 Gb/s", "bytes_per_s", 50e9),
        ("3.35 TB/s", "bytes_per_s", 3.35e12),
        ("1 GiB/s", "bytes_per_s", 2.0**30),
        ("80 GB", "bytes", 80e9),
        ("72GB", "bytes", 72e9),
        ("72gb", "bytes", 72e9),
        ("80 GiB", "bytes", 80 * 2.0**30),
        ("512 B", "bytes", 512.0),
        ("81,559 MiB", "bytes", 81559 * 2.0**20),
        ("5 us", "s", 5e-6),
        ("5 \u00b5s", "s", 5e-6),
        ("1.2 ms", "s", 1.2e-3),
        ("2 min", "s", 120.0),
        ("989 TFLOP/s", "flops_per_s", 989e12),
        ("989.4 TFLOPS", "flops_per_s", 989.4e12),
        ("2.25 PFLOP/s", "flops_per_s", 2.25e15),
        ("1e21", "flops", 1e21),
        ("312 TFLOP", "flops", 312e12),
        ("8k", "tokens", 8000.0),
        ("7B", "params", 7e9),
        ("1.2 kW", "w", 1200.0),
        ("450e9", "bytes_per_s", 450e9),
        (1024, "bytes", 1024.0),
        (0.1, "s", 0.1),
    ],
)
def test_text_is_read_in_the_base_unit(text: object, unit: str, value: float) -> None:
    assert units.parse(text, unit) == value


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("", "s"),
        ("fast", "bytes_per_s"),
        ("GB", "bytes"),
        ("5 parsecs", "s"),
        ("80 Gbit", "bytes"),
        ("5 GB", "bytes_per_s"),
        ("-5 s", "s"),
        ("nan", "s"),
        ("1e999 s", "s"),
        ("1" * 5000, "s"),
        ("1e99999", "s"),
        (math.nan, "s"),
        (math.inf, "bytes"),
        (10**400, "bytes"),
        (-1, "bytes"),
        (None, "s"),
        (True, "s"),
        ([1], "s"),
        ({}, "bytes"),
    ],
)
def test_what_is_no_quantity_is_refused_with_an_example(text: object, unit: str) -> None:
    with pytest.raises(MeshwrightError) as caught:
        units.parse(text, unit, "cluster.x")
    assert caught.value.field == "cluster.x"
    assert caught.value.value is text
    assert units.EXAMPLES[unit] in caught.value.remedy


def test_a_rate_in_small_letters_is_refused_because_it_may_be_bits_or_bytes() -> None:
    with pytest.raises(MeshwrightError, match="small b is a bit"):
        units.parse("50 gb/s", "bytes_per_s")


def test_an_unknown_unit_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="no such unit"):
        units.parse("5", "furlongs")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_bytes(79.1 * 2**30), "79.1 GiB"),
        (units.format_bytes(0), "0 B"),
        (units.format_bytes(1023.99), "1 KiB"),
        (units.format_bytes(-3 * 2**30), "-3 GiB"),
        (units.format_bytes_per_s(450e9), "450 GB/s"),
        (units.format_bytes_per_s(3.35e12), "3.35 TB/s"),
        (units.format_flops(1.5e15), "1.5 PFLOP"),
        (units.format_flops_per_s(989.4e12), "989.4 TFLOP/s"),
        (units.format_flops_per_s(999.96e12), "1 PFLOP/s"),
        (units.format_count(1.2e9), "1.2B"),
        (units.format_count(12), "12"),
        (units.format_s(5e-6), "5 us"),
        (units.format_s(0.0012), "1.2 ms"),
        (units.format_s(0.99999), "1 s"),
        (units.format_s(3.4), "3.4 s"),
        (units.format_s(0), "0 s"),
        (units.format_s(3e-10), "0.3 ns"),
        (units.format_s(720), "12 min"),
        (units.format_s(72000), "20 h"),
        (units.format_s(math.inf), "inf s"),
        (units.format_fraction(0.413), "41.3%"),
        (units.format_w(1200), "1.2 kW"),
    ],
)
def test_numbers_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hbm_bytes", "bytes"),
        ("hbm_bytes_per_s", "bytes_per_s"),
        ("peak_flops_per_s", "flops_per_s"),
        ("model_flops_per_s_per_gpu", "flops_per_s"),
        ("tokens_per_s_per_gpu", "tokens_per_s"),
        ("latency_s", "s"),
        ("rows_per_s", None),
        ("mfu_fraction", "fraction"),
        ("power_w", "w"),
        ("num_sms", None),
        ("gpus_per_node", None),
    ],
)
def test_the_suffix_of_a_name_is_its_unit(name: str, unit: str | None) -> None:
    assert units.unit_of(name) == unit


def test_a_value_is_written_in_the_unit_of_its_name() -> None:
    assert units.format_value("compute_s", 0.0012) == "1.2 ms"
    assert units.format_value("tokens_per_s_per_gpu", 12345.0) == "12.35k tokens/s"
    assert units.format_value("tp", 8) == "8"


@pytest.mark.parametrize(
    ("unit", "form"),
    [
        ("bytes", units.format_bytes),
        ("bytes_per_s", units.format_bytes_per_s),
        ("s", units.format_s),
        ("flops", units.format_flops),
        ("flops_per_s", units.format_flops_per_s),
        ("params", units.format_count),
        ("w", units.format_w),
    ],
)
@given(value=st.floats(1e-6, 1e21))
def test_what_is_written_is_read_back_to_four_digits(unit, form, value: float) -> None:
    assert units.parse(form(value), unit) == pytest.approx(value, rel=6e-4)


@given(st.text(max_size=30), st.sampled_from(sorted(units.EXAMPLES)))
def test_any_text_is_a_number_or_an_error_with_a_remedy(text: str, unit: str) -> None:
    try:
        value = units.parse(text, unit)
    except MeshwrightError as error:
        assert error.remedy
    else:
        assert 0 <= value < math.inf
