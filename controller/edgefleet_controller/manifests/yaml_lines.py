"""YAML as operators write it: receives a file's text, hands on plain documents and, for every field, the line it stands on.

Only what a manifest needs is allowed: mappings, lists, strings, numbers, booleans, null. Tags, anchors, aliases and merge
keys are refused, and so is a key written twice, which YAML parsers silently resolve to the last one. Built on PyYAML's
composer with the safe scalar types; nothing is constructed that a tag could name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from edgefleet_shared.errors import ManifestError

FieldPath = tuple[str | int, ...]
MAX_BYTES = 1024 * 1024  # a manifest is written by hand; a megabyte is somebody's mistake


class Document:
    """One YAML document: its value, where its fields stand, and how to say that one is wrong."""

    def __init__(self, file: Path, value: Any, lines: dict[FieldPath, int]) -> None:
        self.file = file
        self.value = value
        self._lines = lines

    def line(self, path: FieldPath) -> int:
        """The line (from 1) of the field at ``path``, or of its nearest ancestor that was written."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def error(self, path: FieldPath, what: str, hint: str = "") -> ManifestError:
        """An error that names file, line and field."""
        field = ".".join(str(part) for part in path)
        return ManifestError(f"{self.file}, line {self.line(path)}: {field + ': ' if field else ''}{what}", hint=hint)


def read_documents(file: Path) -> list[Document]:
    """Every document of a file; empty ones are left out.

    Raises:
        ManifestError: unreadable, not UTF-8, too large, not YAML, or YAML that is not allowed here; with its line.
    """
    try:
        content = file.read_bytes()
    except OSError as exc:
        raise ManifestError(f"can't read {file}: {exc.strerror}") from exc
    if len(content) > MAX_BYTES:
        raise ManifestError(f"{file} has {len(content)} bytes; a manifest has at most {MAX_BYTES}")
    try:
        text = content.decode()
    except UnicodeDecodeError as exc:
        line = content[: exc.start].count(b"\n") + 1
        raise ManifestError(f"{file}, line {line}: not UTF-8 text") from exc
    documents = []
    try:
        _refuse_references(file, text)
        loader = yaml.SafeLoader(text)
        try:
            while loader.check_node() and (node := loader.get_node()) is not None:
                lines: dict[FieldPath, int] = {}
                value = _plain(loader, file, node, (), lines)
                if value is not None:
                    documents.append(Document(file, value, lines))
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise ManifestError(f"{file}{where}: not valid YAML: {exc.problem or exc.context}") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise ManifestError(f"{file}: not valid YAML: {exc}") from exc
    return documents


def _refuse_references(file: Path, text: str) -> None:
    """Anchors and aliases are refused before anything is built: nested ones grow without bound."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ManifestError(f"{file}, line {_line(event)}: anchors and aliases are not allowed here")


def _line(marked: yaml.Event | yaml.Node) -> int:
    return marked.start_mark.line + 1 if marked.start_mark is not None else 1


def _plain(loader: yaml.SafeLoader, file: Path, node: yaml.Node, path: FieldPath, lines: dict[FieldPath, int]) -> Any:
    line = _line(node)
    lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise ManifestError(f"{file}, line {key_line}: a field's name must be text")
            key = str(key_node.value)
            inner = (*path, key)
            if key in mapping:
                raise ManifestError(
                    f"{file}, line {key_line}: {key!r} is written twice; the first is on line {lines[inner]}"
                )
            lines[inner] = key_line
            mapping[key] = _plain(loader, file, value_node, inner, lines)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, file, item, (*path, i), lines) for i, item in enumerate(node.value)]
    kind = node.tag.rpartition(":")[2]
    if node.tag != f"tag:yaml.org,2002:{kind}" or kind not in {"str", "int", "float", "bool", "null"}:
        raise ManifestError(f"{file}, line {line}: {node.value!r} reads as {node.tag}; write it in quotes")
    try:
        return loader.construct_object(node)
    except ValueError as exc:
        raise ManifestError(f"{file}, line {line}: {node.value!r} is not a {kind}") from exc
