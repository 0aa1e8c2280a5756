"""The head of a request: what is understood, and what is refused rather than guessed."""

from __future__ import annotations

import pytest
from edgefleet_agent.runtime import head
from edgefleet_agent.runtime.head import Refused


def parsed(*lines: str) -> head.Head:
    return head.parse("\r\n".join([*lines, "", ""]).encode("latin-1"))


def test_what_matters_of_a_head_is_kept() -> None:
    found = parsed(
        "POST /v2/models/a%20b/infer?trace=1 HTTP/1.1", "Host: board", "content-LENGTH: 17", "Content-Encoding: GZIP",
        "Inference-Header-Content-Length:  9 ", "Expect: 100-continue",
    )  # fmt: skip
    assert (found.method, found.path, found.content_length) == ("POST", "/v2/models/a%20b/infer", 17)
    assert (found.encoding, found.inference_length, found.expects_continue) == ("gzip", "9", True)
    assert found.keep_alive
    assert not found.chunked


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [("1.1", None, True), ("1.1", "close", False), ("1.0", None, False), ("1.0", "keep-alive", True)],
)
@pytest.mark.parametrize("length", [0, 5])
def test_whether_the_connection_stays_is_read_with_and_without_a_body(
    version: str, connection: str | None, kept: bool, length: int
) -> None:
    lines = [f"POST /v2 HTTP/{version}", f"Content-Length: {length}"]
    assert parsed(*lines, *([f"Connection: {connection}"] if connection else [])).keep_alive is kept


REFUSED = {
    "two lengths": (["POST / HTTP/1.1", "Content-Length: 1", "Content-Length: 2"], 400),
    "two lengths of the JSON": (
        ["POST / HTTP/1.1", "Inference-Header-Content-Length: 1", "Inference-Header-Content-Length: 2"],
        400,
    ),
    "packed twice": (["POST / HTTP/1.1", "Content-Encoding: gzip", "Content-Encoding: gzip"], 415),
    "length and chunks": (["POST / HTTP/1.1", "Content-Length: 1", "Transfer-Encoding: chunked"], 400),
    "a signed length": (["POST / HTTP/1.1", "Content-Length: +1"], 400),
    "a length in hex": (["POST / HTTP/1.1", "Content-Length: 0x10"], 400),
    "a length that is too large": (["POST / HTTP/1.1", f"Content-Length: {1 << 31}"], 413),
    "another coding than chunked": (["POST / HTTP/1.1", "Transfer-Encoding: gzip, chunked"], 501),
    "chunked twice": (["POST / HTTP/1.1", "Transfer-Encoding: chunked, chunked"], 400),
    "a space before the colon": (["POST / HTTP/1.1", "Content-Length : 5"], 400),
    "no method": (["/v2 HTTP/1.1"], 400),
    "HTTP/0.9": (["GET /v2"], 505),
    "HTTP/2": (["GET /v2 HTTP/2.0"], 505),
    "an expectation": (["POST / HTTP/1.1", "Expect: miracles"], 417),
    "a long target": (["GET /" + "a" * 9000 + " HTTP/1.1"], 414),
    "long headers": (["GET / HTTP/1.1", "X: " + "a" * 40_000], 431),
    "a zero byte": (["GET / HTTP/1.1", "X: a\0b"], 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_mean_two_things_is_refused(case: str) -> None:
    lines, status = REFUSED[case]
    with pytest.raises(Refused) as caught:
        parsed(*lines)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "raw", [b"GET / HTTP/1.1\n\nGET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\nX: 1\n\n\r\n\r\n", b"\r\n\r\n"]
)
def test_a_head_that_ends_elsewhere_than_at_its_empty_line_is_refused(raw: bytes) -> None:
    with pytest.raises(Refused) as caught:
        head.parse(raw)
    assert caught.value.status == 400


def test_a_chunked_body_is_put_together_and_what_follows_is_noticed() -> None:
    found = parsed("POST / HTTP/1.1", "Transfer-Encoding: chunked")
    assert found.chunked
    assert found.parser is not None
    assert found.parser.feed(b"3\r\nabc\r\n") == 3
    assert not found.parser.done
    assert found.parser.feed(b"2;x=1\r\nde\r\n0\r\nTrailer: 1\r\n\r\nGET / HTTP/1.1\r\n") == 2
    assert (bytes(found.parser.body), found.parser.done, found.parser.followed) == (b"abcde", True, True)
