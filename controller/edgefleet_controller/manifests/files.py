"""Stage 1, source: receives YAML files, hands on validated manifests, or an error with file, line and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgefleet_shared.errors import ManifestError
from pydantic import BaseModel, ValidationError

from edgefleet_controller.manifests import API_VERSION, KINDS, Manifest, ManifestBase, Model
from edgefleet_controller.manifests.yaml_lines import Document, FieldPath, read_documents

SUFFIXES = (".yaml", ".yml")
M = TypeVar("M", bound=ManifestBase)


def load_manifests(path: Path) -> list[Manifest]:
    """Every manifest in a file, or in all YAML files of a folder and its folders, in order of path.

    Raises:
        ManifestError: with file, line, field and what was expected; also when nothing is there, or two have one name.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
    elif path.exists():
        files = [path]
    else:
        raise ManifestError(f"no such file or folder: {path}")
    found: list[Manifest] = []
    seen: dict[tuple[str, str, str], Document] = {}
    for document in (d for file in files for d in read_documents(file)):
        manifest = parse(document)
        version = manifest.spec.version if isinstance(manifest, Model) else ""
        key = (manifest.kind, manifest.name, version)
        if key in seen:
            first = seen[key]
            raise document.error(
                ("metadata", "name"),
                f"{manifest.kind} {manifest.name!r} is already in {first.file}, line {first.line(('metadata', 'name'))}",
            )
        seen[key] = document
        found.append(manifest)
    if not found:
        raise ManifestError(f"no manifest in {path}", hint="manifests are .yaml or .yml files")
    return found


def of_kind(manifests: Sequence[Manifest], kind: type[M]) -> list[M]:
    """The manifests of one kind."""
    return [m for m in manifests if isinstance(m, kind)]


def parse(document: Document) -> Manifest:
    """Validate one document.

    Raises:
        ManifestError: every wrong field, each with its line.
    """
    value = document.value
    if not isinstance(value, dict):
        raise document.error((), "a manifest is a mapping with apiVersion, kind, metadata and spec")
    if "apiVersion" not in value or value["apiVersion"] != API_VERSION:
        raise document.error(("apiVersion",), f"expected {API_VERSION!r}, found {value.get('apiVersion')!r}")
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise document.error(("kind",), f"expected one of {', '.join(KINDS)}, found {kind!r}")
    model = KINDS[kind]
    try:
        manifest = model.model_validate(value)
    except ValidationError as exc:
        raise _explain(document, exc) from exc
    manifest._file = document.file
    return manifest


def parse_value(value: Any, origin: str = "request") -> Manifest:
    """Validate a manifest that came as JSON (the HTTP API); errors name fields but no lines."""
    return parse(Document(Path(origin), value, {}))


def _explain(document: Document, exc: ValidationError) -> ManifestError:
    problems = []
    for error in exc.errors():
        path: FieldPath = tuple(part for part in error["loc"] if not str(part).startswith("function-"))
        match error["type"]:
            case "extra_forbidden":
                known = _fields_at(document.value.get("kind", ""), path[:-1])
                what = "unknown field" + (f"; expected one of {', '.join(known)}" if known else "")
            case "missing":
                what = "missing"
            case _:
                found = error["input"]
                shown = f", found {found!r}" if isinstance(found, str | int | float | bool | None) else ""
                what = error["msg"].removeprefix("Value error, ") + shown
        problems.append(document.error(path, what).message)
    return ManifestError("\n".join(problems), hint="the schemas of all kinds are in docs/generated/schemas")


def _fields_at(kind: str, path: FieldPath) -> list[str]:
    """The fields known at ``path``, so that an unknown one can be answered by what was expected."""
    model: Any = KINDS.get(kind)
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model is not None else None
        model = _model_in(field.annotation) if field is not None else None
    return list(model.model_fields) if model is not None else []


def _model_in(annotation: Any) -> Any:
    """The pydantic model inside ``X``, ``X | None`` or ``list[X]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _model_in(argument):
            return found
    return None
