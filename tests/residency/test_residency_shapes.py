"""Shapes of names, label by label."""

from __future__ import annotations

import pytest

from egressd.model.errors import Unfit
from egressd.residency.shapes import Host, Label

FILLED = [
    # shape, name, holes (None: it does not fit)
    ("api.acme.example", "api.acme.example", {}),
    ("api.acme.example", "eu.api.acme.example", None),
    ("api.acme.example", "api.acme.example.evil", None),
    ("api.acme.example", "acme.example", None),
    ("api.{region}.acme.example", "api.eu-1.acme.example", {"region": "eu-1"}),
    ("api.{region}.acme.example", "api.acme.example", None),
    ("api.{region}.acme.example", "api.eu.1.acme.example", None),
    ("api.{region}.acme.example", "apx.eu-1.acme.example", None),
    ("{region}-api.acme.example", "eu-1-api.acme.example", {"region": "eu-1"}),
    ("{region}-api.acme.example", "-api.acme.example", None),
    ("{region}-api.acme.example", "eu-1-api-x.acme.example", None),
    ("{region}-api.acme.example", "eu-1.acme.example", None),
    ("vpce-{resource}.acme.example", "vpce-1.acme.example", {"resource": "1"}),
    ("vpce-{resource}.acme.example", "xvpce-1.acme.example", None),
    ("vpce-{resource}.acme.example", "vpce-.acme.example", None),
    ("vpce-{resource}.acme.example", "abcde1.acme.example", None),
    ("{resource}.{region}.acme.example", "a.b.acme.example", {"resource": "a", "region": "b"}),
]


@pytest.mark.parametrize("shape, name, holes", FILLED)
def test_a_name_and_a_shape(shape: str, name: str, holes: dict[str, str] | None) -> None:
    assert Host.of(shape).fill(name.split(".")) == holes
    assert str(Host.of(shape)) == shape


@pytest.mark.parametrize(
    "shape, tail",
    [
        ("api.acme.example", "api.acme.example"),
        ("api.{region}.acme.example", "acme.example"),
        ("{region}-api.acme.example", "acme.example"),
        ("{resource}.x.{region}.acme.example", "acme.example"),
        ("acme.{region}", ""),
    ],
)
def test_the_tail_is_what_stands_after_the_last_hole(shape: str, tail: str) -> None:
    assert Host.of(shape).tail == tail


@pytest.mark.parametrize(
    "wrong", ["", "a..b", "A.example", "a.example.", "{zone}.a.example", "{region}.{region}.example",
              "{region}{resource}.a.example", "*.a.example", "a_b.example", "127.0.0.1", "{region", "a b"],
)  # fmt: skip
def test_what_is_no_shape(wrong: str) -> None:
    with pytest.raises(Unfit) as refused:
        Host.of(wrong)
    assert refused.value.remedy


@pytest.mark.parametrize(
    "one, other, both",
    [
        ("api", "api", True),
        ("api", "apx", False),
        ("api", "{region}", True),
        ("api", "a{region}", True),
        ("api", "{region}-api", False),
        ("{region}", "{resource}", True),
        ("a-{region}", "b-{region}", False),
        ("a-{region}", "a-b-{region}", True),
        ("{region}-a", "{region}-b", False),
        ("a-{region}", "{region}-b", True),
    ],
)
def test_whether_one_label_fits_both(one: str, other: str, both: bool) -> None:
    assert Label.of(one).meets(Label.of(other)) is both is Label.of(other).meets(Label.of(one))


def test_what_says_more_comes_first() -> None:
    labels = ["{resource}", "{region}", "x", "{region}-x", "{region}-long"]

    assert sorted(labels, key=lambda one: Label.of(one).rank) == [
        "x",
        "{region}-long",
        "{region}-x",
        "{region}",
        "{resource}",
    ]
