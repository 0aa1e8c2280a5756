"""Building a version of the agent from wheels, and what of it a board is held against."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from edgefleet_controller import agent_version
from edgefleet_shared.artifact import AGENT_TYPE, CODE_LAYER, Layout
from edgefleet_shared.errors import ArtifactError, InputError, NotFoundError
from edgefleet_shared.fingerprint import Fingerprint, mismatches

AGENT_NEEDS = """Requires-Dist: edgefleet-shared[golden,trust]
Requires-Dist: paho-mqtt>=2.1
Requires-Dist: onnxruntime>=1.20; extra == 'onnxruntime'
"""
SHARED_NEEDS = """Requires-Dist: msgspec>=0.19
Requires-Dist: safetensors>=0.4; extra == 'golden'
Requires-Dist: tuf>=6; extra == 'trust'
Requires-Dist: never>=1; extra == 'other'
"""


def wheel(folder: Path, name: str, version: str, needs: str, **files: str | bytes) -> Path:
    package = name.replace("-", "_")
    path = folder / f"{package}-{version}-py3-none-any.whl"
    content: dict[str, str | bytes] = {f"{package}/__init__.py": "", f"{package}/systemd/x.service": "[Unit]"}
    content |= {name.replace("__", "/"): text for name, text in files.items()}
    content[f"{package}-{version}.dist-info/METADATA"] = (
        f"Metadata-Version: 2.3\nName: {name}\nVersion: {version}\nRequires-Python: >=3.10\n{needs}\nText\n"
    )
    content[f"{package}-{version}.dist-info/RECORD"] = "left out"
    with zipfile.ZipFile(path, "w") as made:
        for entry, text in content.items():
            made.writestr(entry, text)
    return path


def agent(folder: Path, version: str = "0.2.0", needs: str = AGENT_NEEDS, **files: str | bytes) -> Path:
    own = {"edgefleet_agent__cli.py": "", "edgefleet_agent__rehearsal.py": ""}
    return wheel(folder, "edgefleet-agent", version, needs, **(own | files))


def shared(folder: Path, needs: str = SHARED_NEEDS) -> Path:
    return wheel(folder, "edgefleet-shared", "0.2.0", needs)


def test_one_zip_of_python_serves_every_class_and_the_same_wheels_give_the_same_bytes(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    wheels = [agent(tmp_path), shared(tmp_path)]
    made = agent_version.build(wheels, ["a", "b"], layout)
    assert made == agent_version.build(reversed(wheels), ["a", "b"], layout)
    manifests = [layout.manifest(digest) for digest in made]
    assert [layout.agent_config(m).device_class for m in manifests] == ["a", "b"]
    assert {m.artifact_type for m in manifests} == {AGENT_TYPE}
    (code,) = {m.layer(CODE_LAYER).digest for m in manifests}
    with zipfile.ZipFile(io.BytesIO(layout.read(code, 1 << 20))) as found:
        assert found.namelist() == [
            "edgefleet_agent-0.2.0.dist-info/METADATA", "edgefleet_agent/__init__.py", "edgefleet_agent/cli.py",
            "edgefleet_agent/rehearsal.py", "edgefleet_shared-0.2.0.dist-info/METADATA", "edgefleet_shared/__init__.py",
        ]  # fmt: skip


def test_what_the_wheels_need_is_what_the_package_must_provide(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    (digest,) = agent_version.build([agent(tmp_path), shared(tmp_path)], ["a"], layout)
    requires = layout.agent_config(layout.manifest(digest)).requires
    assert requires.provides == {
        "python": ">=3.10", "launcher": ">=1", "paho-mqtt": ">=2.1", "msgspec": ">=0.19", "safetensors": ">=0.4", "tuf": ">=6",
    }  # fmt: skip
    board = {
        "python": "3.11.2",
        "launcher": "1",
        "paho-mqtt": "2.1.0",
        "msgspec": "0.19.0",
        "safetensors": "0.5",
        "tuf": "7.0.1",
    }
    assert mismatches(requires, Fingerprint(arch="any", provides=board)) == []
    told = mismatches(requires, Fingerprint(arch="any", provides=board | {"tuf": "5.1"} | {"launcher": "0"}))
    assert told == [
        "needs launcher >=1 of the board's package, which has 0", "needs tuf >=6 of the board's package, which has 5.1",
    ]  # fmt: skip


def test_a_board_that_says_nothing_of_its_package_takes_no_version_of_the_agent(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    (digest,) = agent_version.build([agent(tmp_path), shared(tmp_path)], ["a"], layout)
    told = mismatches(layout.agent_config(layout.manifest(digest)).requires, Fingerprint(arch="any"))
    assert any("launcher" in reason for reason in told)


def test_what_an_engine_needs_on_some_boards_is_not_asked_of_every_board(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    needs = "Provides-Extra: tflite\nRequires-Dist: numpy<2; (python_version < '3.12') and extra == 'tflite'\n"
    (digest,) = agent_version.build([agent(tmp_path, needs=needs), shared(tmp_path)], ["a"], layout)
    assert "numpy" not in layout.agent_config(layout.manifest(digest)).requires.provides


def test_wheels_that_are_no_version_of_the_agent_are_refused(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    good = shared(tmp_path)

    def refused(*wheels: Path) -> str:
        with pytest.raises(InputError) as caught:
            agent_version.build(wheels, ["a"], layout)
        return caught.value.message

    assert "two wheels" in refused(good)
    assert "native code" in refused(good, agent(tmp_path, **{"edgefleet_agent__fast.so": b"\x7fELF"}))
    assert "outside of edgefleet_agent" in refused(good, agent(tmp_path, **{"other__x.py": ""}))
    assert "outside of edgefleet_agent" in refused(good, agent(tmp_path, **{"edgefleet_agent__..__x.py": ""}))
    assert "can't be held against" in refused(good, agent(tmp_path, needs="Requires-Dist: paho-mqtt~=2.1\n"))
    assert "can't be held against" in refused(
        good, agent(tmp_path, needs="Requires-Dist: x>=1; sys_platform == 'linux'\n")
    )
    assert "version" in refused(good, agent(tmp_path, version="0.2+Local"))
    assert "a wheel of stranger" in refused(good, wheel(tmp_path, "stranger", "1", ""))
    no_wheel = tmp_path / "no.whl"
    no_wheel.write_bytes(b"PK no zip")
    assert "is not a wheel" in refused(good, no_wheel)
    lacking = wheel(tmp_path, "edgefleet-agent", "0.3.0", "")
    assert "lacks edgefleet_agent/cli.py" in refused(good, lacking)
    with pytest.raises(NotFoundError):
        agent_version.build([good, tmp_path / "absent.whl"], ["a"], layout)


def test_a_models_config_is_none_of_an_agent(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    (digest,) = agent_version.build([agent(tmp_path), shared(tmp_path)], ["a"], layout)
    with pytest.raises(ArtifactError):
        layout.config(layout.manifest(digest))
