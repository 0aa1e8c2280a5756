"""The infer message: what is understood, and that every malformed one is told what is wrong with it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from edgefleet_agent.runtime import answer, protocol
from edgefleet_agent.runtime.protocol import OutputTensor, RequestError
from edgefleet_agent.runtime.tensors import NUMPY
from support import artifacts


def message(*inputs: dict[str, Any], binary: bytes = b"", **fields: Any) -> tuple[bytes, str | None]:
    header = json.dumps({"inputs": list(inputs), **fields}).encode()
    return header + binary, str(len(header)) if binary else None


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [2], "data": [1.5, -2.0]} | changes


def without_data(**changes: Any) -> dict[str, Any]:
    made = tensor(**changes)
    del made["data"]
    return made


@pytest.mark.parametrize("datatype", NUMPY)
def test_every_served_datatype_arrives_as_its_little_endian_bytes(datatype: str) -> None:
    dtype = NUMPY[datatype]
    values = np.array([1, 0, 1], dtype)
    body, _ = message(tensor(datatype=datatype, shape=[3], data=values.tolist()))
    assert protocol.parse_infer(body, None).inputs[0].data == values.tobytes()
    raw = without_data(datatype=datatype, shape=[3], parameters={"binary_data_size": values.nbytes})
    parsed = protocol.parse_infer(*message(raw, binary=values.tobytes()))
    assert bytes(parsed.inputs[0].data) == values.tobytes()


def test_nested_and_flat_json_data_are_the_same_tensor() -> None:
    nested, _ = message(tensor(shape=[2, 2], data=[[1, 2], [3, 4]]))
    flat, _ = message(tensor(shape=[2, 2], data=[1, 2, 3, 4]))
    assert protocol.parse_infer(nested, None).inputs[0].data == protocol.parse_infer(flat, None).inputs[0].data


def test_numbers_from_both_halves_of_uint64_come_through_to_the_last_digit() -> None:
    values = np.array([[1, 2**64 - 1], [2**63, 2**53 + 1]], np.uint64)
    for shown in (values, values.ravel()):
        body, _ = message(tensor(datatype="UINT64", shape=[2, 2], data=shown.tolist()))
        assert protocol.parse_infer(body, None).inputs[0].data == values.tobytes()
    for wrong in ([1, -1], [1, 2**64], [2**63, 1.5]):
        body, _ = message(tensor(datatype="UINT64", data=wrong))
        with pytest.raises(RequestError):
            protocol.parse_infer(body, None)


def test_what_a_client_leaves_out_may_be_null() -> None:
    """Clients that write every field of their model do so, MLServer's among them."""
    nothing: dict[str, Any] = {"id": None, "parameters": None, "outputs": None}
    body, _ = message(tensor(parameters=None), **nothing)
    parsed = protocol.parse_infer(body, None)
    assert (parsed.form.id, parsed.form.outputs, parsed.form.binary) == ("", None, False)
    output = {"name": "y", "parameters": None}
    absent = {"content_type": None, "binary_data_size": None, "shared_memory_region": None}
    body, _ = message(
        tensor(parameters=absent), outputs=[output], parameters={"binary_data_output": None, "headers": None}
    )
    parsed = protocol.parse_infer(body, None)
    assert list(parsed.form.outputs or {}) == ["y"]
    binary = tensor(data=None, parameters={"binary_data_size": 8})
    assert bytes(protocol.parse_infer(*message(binary, binary=b"12345678")).inputs[0].data) == b"12345678"
    for wrong in (tensor(shape=None), tensor(data=None), tensor(name=None), tensor(datatype=None)):
        body, _ = message(wrong)
        with pytest.raises(RequestError):
            protocol.parse_infer(body, None)


def test_binary_and_json_tensors_mix_in_one_request() -> None:
    a, b = np.array([7, 8], "<f4").tobytes(), np.array([9], "<i8").tobytes()
    body, length = message(
        without_data(name="a", parameters={"binary_data_size": 8}),
        tensor(name="b"),
        without_data(name="c", datatype="INT64", shape=[1], parameters={"binary_data_size": 8}),
        binary=a + b,
    )
    parsed = protocol.parse_infer(body, length)
    assert [bytes(t.data) for t in parsed.inputs] == [a, np.array([1.5, -2.0], "<f4").tobytes(), b]


BAD = {
    "no JSON": (b"pictures, please", None, "not an inference request"),
    "empty": (b"", None, "not an inference request"),
    "no inputs": (*message(), "1 to"),
    "header length is no number": (message(tensor())[0], "-5", "not a length"),
    "header length is huge": (message(tensor())[0], "9" * 30, "not a length"),
    "header longer than the body": (message(tensor())[0], "100000", "has only"),
    "header cut short": (message(tensor())[0], "10", "not an inference request"),
    "unknown datatype": (*message(tensor(datatype="FP31")), "not served"),
    "bytes": (*message(tensor(datatype="BYTES", data=["a", "b"])), "not served"),
    "negative size": (*message(tensor(shape=[-2])), "not a shape"),
    "size that overflows": (*message(tensor(shape=[1 << 62, 1 << 62])), "not a shape"),
    "rank 17": (*message(tensor(shape=[1] * 17)), "not a shape"),
    "ragged data": (*message(tensor(data=[[1], [2, 3]])), "no rectangular"),
    "nesting without end": (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":' + b"[" * 100_000, None, "not an inference request"),
    "text as data": (*message(tensor(data=["1", "2"])), "not FP32"),
    "null as data": (*message(tensor(data=[None, 1])), "not FP32"),
    "too few values": (*message(tensor(data=[1.0])), "do not fill"),
    "too many values": (*message(tensor(data=[1.0, 2, 3])), "do not fill"),
    "other nested shape": (*message(tensor(shape=[2, 3], data=[[1, 2], [3, 4], [5, 6]])), "nested data has shape"),
    "no data": (*message(without_data()), "no data"),
    "value outside the type": (*message(tensor(datatype="UINT8", data=[1, 256])), "does not fit"),
    "value beyond single precision": (*message(tensor(data=[1, 1e39])), "does not fit"),
    "value beyond half precision": (*message(tensor(datatype="FP16", data=[1, -65520])), "does not fit"),
    "negative for unsigned": (*message(tensor(datatype="UINT8", data=[1, -1])), "does not fit"),
    "fraction for integer": (*message(tensor(datatype="INT32", data=[1, 1.5])), "not INT32"),
    "truth among fractions": (*message(tensor(data=[True, 0.5])), "are no numbers"),
    "truth among whole numbers": (*message(tensor(datatype="INT64", shape=[2, 1], data=[[1], [False]])), "are no numbers"),
    "number for bool": (*message(tensor(datatype="BOOL", data=[1, 0])), "not BOOL"),
    "integer beyond 64 bits": (*message(tensor(datatype="INT64", data=[1, 1 << 80])), "INT64"),
    "binary size is wrong": (*message(without_data(parameters={"binary_data_size": 7}), binary=bytes(7)), "has 8 bytes"),
    "binary size is text": (*message(without_data(parameters={"binary_data_size": "8"}), binary=bytes(8)), "has 8 bytes"),
    "binary size is true": (*message(without_data(shape=[1], datatype="UINT8", parameters={"binary_data_size": True}), binary=bytes(1)), "has 1 bytes"),
    "binary body too short": (*message(without_data(parameters={"binary_data_size": 8}), binary=bytes(5)), "3 bytes too early"),
    "binary body too long": (*message(without_data(parameters={"binary_data_size": 8}), binary=bytes(9)), "1 bytes follow"),
    "data twice": (*message(tensor(parameters={"binary_data_size": 8}), binary=bytes(8)), "both in JSON and in binary"),
    "an input twice": (*message(tensor(), tensor()), "given twice"),
    "an output twice": (*message(tensor(), outputs=[{"name": "y"}, {"name": "y"}]), "asked for twice"),
    "shared memory without a size": (*message(without_data(parameters={"shared_memory_region": "r"})), "numbers of bytes"),
    "shared memory of another size": (*message(without_data(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 7})), "has 8 bytes"),
    "shared memory before its region": (*message(without_data(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8, "shared_memory_offset": -8})), "numbers of bytes"),
    "shared memory without end": (*message(without_data(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 1 << 60})), "numbers of bytes"),
    "shared memory by number": (*message(without_data(parameters={"shared_memory_region": 5, "shared_memory_byte_size": 8})), "region's name"),
    "shared memory and data": (*message(tensor(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8})), "beside its shared memory"),
    "output shared memory without a size": (*message(tensor(), outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "numbers of bytes"),
    "classification": (*message(tensor(), outputs=[{"name": "y", "parameters": {"classification": 3}}]), "classification"),
    "a flag that is none": (*message(tensor(), parameters={"binary_data_output": "yes"}), "true or false"),
    "an endless id": (*message(tensor(), id="i" * 5000), "longer than"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_request_is_refused_with_what_is_wrong(case: str) -> None:
    body, length, words = BAD[case]
    with pytest.raises(RequestError, match=words) as caught:
        protocol.parse_infer(body, length)
    assert caught.value.status == 400


def toy(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [1, 8, 8, 3], "data": [0.0] * 192} | changes


MISFITS = {
    "another name": (message(toy(name="z")), "'x' is missing"),
    "one input too many": (message(toy(), toy(name="z")), "no input is called 'z'"),
    "another type": (message(toy(datatype="UINT8", data=[0] * 192)), "is UINT8"),
    "another size": (message(toy(shape=[1, 8, 4, 6])), "has shape"),
    "another rank": (message(toy(shape=[192])), "has shape"),
    "a batch of none": (message(toy(shape=[0, 8, 8, 3], data=[])), "has shape|no data"),
    "an unknown output": (message(toy(), outputs=[{"name": "z"}]), "no output is called 'z'"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_request_that_does_not_fit_the_model_is_told_what_the_model_takes(case: str) -> None:
    (body, length), words = MISFITS[case]
    with pytest.raises(RequestError, match=words) as caught:
        protocol.plan(protocol.parse_infer(body, length), artifacts.make_config())
    assert caught.value.status == 400


def test_a_batch_fits_where_the_served_shape_is_open_and_nowhere_else() -> None:
    body, _ = message(toy(shape=[4, 8, 8, 3], data=[0.0] * 768))
    request = protocol.parse_infer(body, None)
    assert len(protocol.plan(request, artifacts.make_config())) == 1
    from edgefleet_shared.contract import TensorSpec

    fixed = artifacts.make_config(inputs=(TensorSpec("x", "FP32", (1, 8, 8, 3)),))
    with pytest.raises(RequestError, match="has shape"):
        protocol.plan(request, fixed)


def test_an_answer_of_the_same_version_made_anew_names_its_own_outputs() -> None:
    """Another artifact of the same version may have been compiled otherwise."""
    body, length = message(
        without_data(parameters={"binary_data_size": 8}), binary=bytes(8), parameters={"binary_data_output": True}
    )
    request = protocol.parse_infer(body, length)
    for name, datatype in (("y", "FP32"), ("y", "INT32"), ("z", "INT32")):
        content, header = answer.encode_answer(request, "toy", "3", [OutputTensor(name, datatype, (1,), bytes(4))])
        (told,) = json.loads(content[:header])["outputs"]
        assert (told["name"], told["datatype"]) == (name, datatype)


def _many(piece: bytes, count: int = 300_000) -> bytes:
    return b"[" + b",".join([piece] * count) + b"]"


def _header(shape: bytes = b"[1]", data: bytes = b"[1]", parameters: bytes = b"{}", more: bytes = b"") -> bytes:
    return b'{"inputs":[{"name":"x","datatype":"FP32","shape":%s,"data":%s,"parameters":%s}]%s}' % (
        shape, data, parameters, more,
    )  # fmt: skip


SWELLING = {
    "empty lists": (_header(data=_many(b"[]")), "do not fill"),
    "empty lists in the number of the values": (_header(b"[300000]", _many(b"[]")), "neither flat nor nested"),
    "empty objects": (_header(b"[300000]", _many(b"{}")), "objects or texts"),
    "texts": (_header(b"[300000]", _many(b'""')), "objects or texts"),
    "more numbers than the shape": (_header(data=_many(b"0.1")), "do not fill"),
    "numbers for a tensor of none": (_header(b"[0]", _many(b"0.1")), "do not fill"),
    "numbers without measure": (_header(b"[5000000]", _many(b"1", 5_000_000)), "send them in binary"),
    "a shape": (_header(_many(b"1")), "shape has"),
    "parameters of an input": (_header(parameters=b'{"a":%s}' % _many(b"[]")), "parameters has"),
    "parameters": (_header(more=b',"parameters":{"a":%s}' % _many(b"[]")), "parameters has"),
    "outputs": (_header(more=b',"outputs":%s' % _many(b'{"name":""}')), "outputs has"),
    "what nobody knows": (_header(more=b',"pictures":%s' % _many(b"[]")), ""),
}


@pytest.mark.parametrize("case", SWELLING)
def test_json_that_would_swell_when_it_is_parsed_is_not_parsed(case: str) -> None:
    body, reason = SWELLING[case]
    tracemalloc.start()
    try:
        if reason:
            with pytest.raises(RequestError, match=reason):
                protocol.parse_infer(body, None)
        else:
            protocol.parse_infer(body, None)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 * len(body)


def test_a_batch_of_pictures_may_be_json() -> None:
    shape = [16, 3, 64, 64]
    values = np.random.default_rng(1).random(shape, np.float32)
    body, _ = message(tensor(shape=shape, data=values.tolist()))
    assert protocol.parse_infer(body, None).inputs[0].data == values.tobytes()


def test_the_answer_holds_the_wanted_outputs_each_as_wanted() -> None:
    outputs = [
        OutputTensor("y", "FP32", (1, 2), np.array([1.5, 2.5], "<f4").tobytes()),
        OutputTensor("z", "INT64", (1,), np.array([7], "<i8").tobytes()),
        OutputTensor("unwanted", "INT8", (1,), b"\x01"),
    ]
    wanted = [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}]
    request = protocol.parse_infer(message(tensor(), id="abc", outputs=wanted)[0], None)
    body, length = answer.encode_answer(request, "toy", "3", outputs)
    assert length is not None
    header = json.loads(body[:length])
    assert (header["model_name"], header["model_version"], header["id"]) == ("toy", "3", "abc")
    assert header["outputs"][0]["data"] == [1.5, 2.5]
    assert header["outputs"][1]["parameters"] == {"binary_data_size": 8}
    assert [o["name"] for o in header["outputs"]] == ["y", "z"]
    assert body[length:] == np.array([7], "<i8").tobytes()


@pytest.mark.parametrize("more", ["", ',"parameters":{"a":{}}'])
def test_inputs_by_the_hundred_thousand_are_refused_before_anything_is_made_of_them(more: str) -> None:
    entry = f'{{"name":"","datatype":"","shape":0{more}}}'.encode()
    body = b'{"inputs":[%s]}' % b",".join([entry] * 100_000)
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="1 to 256 inputs"):
            protocol.parse_infer(body, None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(body)
