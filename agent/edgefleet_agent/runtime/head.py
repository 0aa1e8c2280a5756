"""The head of an HTTP/1.1 request: receives its bytes up to the empty line, hands on what matters of it, or a refusal. Pure.

Parsing is llhttp's, by httptools; what it would take leniently and what is larger than anybody needs is refused. Source: RFC 9112.
"""

from __future__ import annotations

import re

import httptools

END = b"\r\n\r\n"
_HALF_AN_END = re.compile(rb"(?<!\r)\n")
MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 32 * 1024
MAX_BODY_BYTES = 64 * 1024 * 1024


class Refused(Exception):
    """A request that costs its client the connection; ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Head:
    """A parsed head.

    ``path`` has no query, nor a scheme and host before it; ``is_old`` is HTTP/1.0; ``content_length`` is 0 where none is given; ``chunked`` bodies have none; ``inference_length`` is the value of
    ``Inference-Header-Content-Length`` and ``encoding`` that of ``Content-Encoding``, None when absent.
    """

    __slots__ = (
        "chunked",
        "content_length",
        "encoding",
        "expects_continue",
        "inference_length",
        "is_old",
        "keep_alive",
        "method",
        "parser",
        "path",
    )  # fmt: skip

    def __init__(self) -> None:
        self.method = self.path = ""
        self.content_length = 0
        self.inference_length: str | None = None
        self.encoding: str | None = None
        self.chunked = self.expects_continue = self.keep_alive = self.is_old = False
        # Where a chunked body goes on; None for all others.
        self.parser: Parser | None = None


class Parser:
    """Takes one request apart: its head, and after it a chunked body. ``body`` holds what came of that, ``done`` says that it was all.

    Bytes behind the body in the same piece are not handed out again: ``followed`` tells that there were some.
    """

    def __init__(self) -> None:
        self._url = b""
        self._header_bytes = 0
        self._begun = 0
        self._head = Head()
        self._headers_done = False
        self.body = bytearray()
        self.done = self.followed = False
        self._parser = httptools.HttpRequestParser(self)

    def head(self, raw: bytes) -> Head:
        """Parse a head that ends with an empty line.

        Raises:
            Refused: not HTTP, too large, or one that means two things.
        """
        head = self._head
        self.feed(raw)
        head.method = self._parser.get_method().decode("latin-1")
        if not self._headers_done or self.followed or self.body:
            raise Refused(400, "not HTTP: the head does not end where its empty line is")
        if self._parser.get_http_version() not in ("1.1", "1.0"):
            raise Refused(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        head.is_old = self._parser.get_http_version() == "1.0"
        head.expects_continue = head.expects_continue and not head.is_old  # RFC 9110, 10.1.1
        url = self._url
        if url[:7].lower() == b"http://":  # RFC 9112, 3.2.2: as a client writes it that believes us behind a proxy
            url = b"/" + url[7:].partition(b"/")[2]
        head.path = url.partition(b"?")[0].decode("latin-1")
        head.keep_alive = head.keep_alive and head.method != "CONNECT"
        if head.chunked:
            head.parser = self
        return head

    def feed(self, data: bytes) -> int:
        """Take the next bytes and return by how many the body grew.

        Raises:
            Refused: not HTTP, or too large. MemoryError: there is none for the body.
        """
        before = len(self.body)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # RFC 9110, 7.8: an offer to upgrade may be ignored
        except httptools.HttpParserCallbackError as exc:
            # httptools wraps what a callback raised; ours raise Refused, or find no memory; anything else is our own bug and must be heard.
            if isinstance(exc.__context__, _Followed):
                self.followed = True
            elif isinstance(exc.__context__, Refused | MemoryError):
                raise exc.__context__ from None
            else:
                raise
        except httptools.HttpParserError as exc:
            raise Refused(400, f"not HTTP: {exc}") from exc
        return len(self.body) - before

    # --- called by httptools

    def on_message_begin(self) -> None:
        self._begun += 1
        if self._begun > 1:
            raise _Followed

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > MAX_URL_BYTES:
            raise Refused(414, f"the URL is longer than {MAX_URL_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > MAX_HEADER_BYTES:
            raise Refused(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        if self._headers_done:
            return  # a trailer; none has a meaning here
        head = self._head
        match name.lower():
            case b"content-length":
                if not value.strip().isdigit():
                    raise Refused(400, "Content-Length is not a length")
                if len(value) > 19 or int(value) > MAX_BODY_BYTES:
                    raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
                head.content_length = int(value)
            case b"transfer-encoding":
                if value.strip().lower() != b"chunked":
                    raise Refused(501, "the only Transfer-Encoding known here is chunked")
                head.chunked = True
            case b"inference-header-content-length":
                if head.inference_length is not None:
                    raise Refused(400, "Inference-Header-Content-Length is given twice")
                head.inference_length = value.strip().decode("latin-1")
            case b"content-encoding":
                if head.encoding is not None:  # packed twice (RFC 9110, 5.3)
                    raise Refused(415, "Content-Encoding must be one of gzip and deflate")
                head.encoding = value.strip().lower().decode("latin-1")
            case b"expect":
                if value.strip().lower() != b"100-continue":
                    raise Refused(417, "only Expect: 100-continue is known here")
                head.expects_continue = True

    def on_headers_complete(self) -> None:
        self._headers_done = True
        self._head.keep_alive = self._parser.should_keep_alive()  # it forgets once the message is complete

    def on_body(self, body: bytes) -> None:
        self.body += body
        if len(self.body) > MAX_BODY_BYTES:
            raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")

    def on_message_complete(self) -> None:
        self.done = True


class _Followed(Exception):
    """Bytes of another request came behind this one."""


def check_begun(raw: bytes) -> None:
    """Look at what came of a head whose empty line is not there yet.

    Raises:
        Refused: whatever comes behind, it will be none.
    """
    if not raw[0:1].isalpha() or not raw[0:1].isascii():
        raise Refused(400, "not HTTP: it does not begin with a method")
    if _HALF_AN_END.search(raw):  # RFC 9112, 2.2: one may be lenient; whoever is reads requests that others do not see
        raise Refused(400, "not HTTP: a line ends in LF without CR")
    if len(raw) > MAX_URL_BYTES and b"\r\n" not in raw[:MAX_URL_BYTES]:
        raise Refused(414, f"the URL is longer than {MAX_URL_BYTES} bytes")
    if len(raw) > MAX_URL_BYTES + MAX_HEADER_BYTES:
        raise Refused(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")


def parse(raw: bytes) -> Head:
    """Parse a head, empty line included. Raises like :meth:`Parser.head`."""
    return Parser().head(raw)
