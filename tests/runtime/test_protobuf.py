"""The wire format against the official implementation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crab_edge.ilora.traced_graph import routes
from crab_edge.protobuf import field, fields

onnx = pytest.importorskip("onnx")


@given(st.integers(-(2**63), 2**63 - 1), st.text(st.characters(codec="utf-8")))
def test_written_fields_are_read_by_the_official_parser(number, text):
    attribute = onnx.AttributeProto.FromString(field(1, text) + field(3, number) + field(20, 2))
    assert (attribute.name, attribute.i, attribute.type) == (text, number, onnx.AttributeProto.INT)


@given(st.integers(0, 2**63 - 1), st.floats(width=32, allow_nan=False), st.text(st.characters(codec="utf-8")))
def test_official_bytes_are_read(number, real, text):
    message = onnx.AttributeProto(name=text, i=number, f=real).SerializeToString()
    read = dict(fields(memoryview(message)))
    # An empty text and a zero are written too: the format's first version knows presence.
    assert bytes(read[1]).decode() == text and read[3] == number and len(read[2]) == 4


def test_later_messages_merge_into_earlier_ones():
    first = onnx.GraphProto(name="g", node=[onnx.NodeProto(name="a")])
    second = onnx.GraphProto(node=[onnx.NodeProto(name="b")])
    merged = onnx.ModelProto.FromString(
        field(7, first.SerializeToString()) + field(7, second.SerializeToString())
    )
    assert [node.name for node in merged.graph.node] == ["a", "b"] and merged.graph.name == "g"


@pytest.mark.parametrize(
    "message",
    [b"\x80", b"\xff" * 11, field(1, "text")[:-1], bytes([1 << 3 | 3]), bytes([1 << 3 | 1, 0, 0])],
    ids=["number cut off", "number too long", "text cut off", "group", "fixed64 cut off"],
)
def test_damage_is_an_error(message):
    with pytest.raises(ValueError):
        list(fields(memoryview(message)))


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(message):
    try:
        assert isinstance(routes(message), list)
    except ValueError:
        pass
