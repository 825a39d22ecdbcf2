"""A form with a file (multipart/form-data) -> a file in the storage, part by part as it arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ptuning.errors import UserError
from ptuning.tuning.files import Upload

KIND = "multipart/form-data"
FILE = "file"
MOST_FIELDS = 16
MOST_BYTES = 1000
"""Of a field besides the file."""


class FormError(UserError):
    """The form is broken, or has a field that is not supported."""


def boundary_of(content_type: str) -> bytes | None:
    """What separates the parts of a form; None: it is another kind of body."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    return boundary if kind == KIND.encode() and 0 < len(boundary) <= 70 else None


class UploadForm:
    """One form. `begin` is called when the file begins, with its name and the fields that have come before, and gives what
    takes its bytes."""

    def __init__(self, boundary: bytes, begin: Callable[[str, Mapping[str, str]], Upload]) -> None:
        self.fields: dict[str, str] = {}
        self.upload: Upload | None = None
        """The file; None: it has not come."""
        self._begin = begin
        self._name = ""
        self._value = bytearray()
        self._header = [bytearray(), bytearray()]
        self._headers: dict[bytes, bytes] = {}
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._on_end,
                "on_end": self._on_end_of_form,
            },
        )

    def write(self, block: bytes) -> None:
        """The next bytes of the body.

        Raises:
            FormError: the form is broken, or has fields that are not supported.
            UserError: the file cannot be taken.
        """
        try:
            self._parser.write(block)
        except FormParserError:
            raise FormError("the body is not a valid form; send multipart/form-data with the fields purpose and file") from None

    def end(self) -> Upload:
        """The whole body has come.

        Raises:
            FormError: it is cut off, or contains no file.
        """
        if not self._ended:
            raise FormError("the form is cut off; send all of it")
        if self.upload is None:
            raise FormError("file: is missing; send it")
        return self.upload

    def _on_begin(self) -> None:
        self._headers.clear()
        self._value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _on_header_end(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = [bytearray(), bytearray()]

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode(errors="replace")
        self._name = name
        if self._headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
            raise FormError("the parts of the form must be sent as they are; leave Content-Transfer-Encoding out")
        if name == FILE:
            if self.upload is not None:
                raise FormError("file: was sent twice; send one file")
            self.upload = self._begin(options.get(b"filename", b"").decode(errors="replace"), self.fields)
        elif name in self.fields or len(self.fields) >= MOST_FIELDS:
            raise FormError("the form has a field twice, or too many of them; send purpose and file")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            assert self.upload
            self.upload.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MOST_BYTES:
            raise FormError(f"the form has a field of more than {MOST_BYTES} bytes besides the file; send purpose and file")

    def _on_end(self) -> None:
        if self._name != FILE:
            self.fields[self._name] = self._value.decode(errors="replace")

    def _on_end_of_form(self) -> None:
        self._ended = True
