"""The generated pages, and the links and names in the written ones, hold against the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import click
import pytest
from edgefleet_agent.cli import main as fleet_agent
from edgefleet_controller.cli.main import main as fleet

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
sys.modules["docs_generate"] = generate
_spec.loader.exec_module(generate)

WRITTEN = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*.md"))
    if "generated" not in path.parts
)


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.module)
def test_a_generated_page_is_what_the_code_says(page):
    if not generate._exists(page.module):
        pytest.skip(f"{page.module} does not exist, so it has no page")
    for name, text in page.make().items():
        assert (generate.FOLDER / name).read_text() == text, f"{name}: run `make docs`"


def test_a_changed_a_missing_and_a_left_over_page_are_noticed(tmp_path):
    (tmp_path / "a.md").write_text("old")
    (tmp_path / "z.md").write_text("nobody's")
    pages = generate.Pages({"a.md": "new", "b/c.md": "new"}, [])
    assert generate.differences(pages, tmp_path) == [
        "a.md is not what the code says",
        "b/c.md is missing",
        "z.md is left over",
    ]


def test_the_state_table_shows_every_row():
    from edgefleet_shared.lifecycle import TABLE

    lines = generate.states()["states.md"].splitlines()
    for (state, event), row in TABLE.items():
        assert any(line.startswith(f"| {state.value} | {event.value} | {row.to.value} |") for line in lines)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_decisions_are_numbered_without_gap_and_each_says_why():
    decisions = sorted(ROOT.glob("docs/adr/[0-9]*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(len(decisions)))
    for path in decisions:
        text = path.read_text()
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in text, path.name


def test_every_decision_that_the_code_names_is_written_down():
    named = {
        number
        for path in (*ROOT.glob("*/edgefleet_*/**/*.py"), *ROOT.glob("docs/**/*.md"))
        for number in re.findall(r"ADR (\d{4})", path.read_text())
    }
    assert named <= {path.name[:4] for path in ROOT.glob("docs/adr/[0-9]*.md")}


def test_the_glossary_defines_each_word_once():
    words = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs/glossary.md").read_text(), flags=re.M)
    assert len(words) == len(set(words))
    assert {
        "device class", "device", "site", "model", "version", "artifact", "rollout", "wave", "gate", "assignment", "slot",
        "acceptance", "shadow", "soak", "commit", "rollback", "outcome",
    } <= set(words)  # fmt: skip


def test_every_place_that_the_flow_names_exists():
    named = re.findall(r"`((?:shared|agent|controller)/[^`]+)`", (ROOT / "docs/flow.md").read_text())
    assert named
    assert [place for place in named if not (ROOT / place).exists()] == []


GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))


def commands_of(guide):
    """Every command line of ours, from blocks and from sentences, without what a block says about it."""
    text = guide.read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^(fleet(?:-agent)? .*)", blocks, re.MULTILINE)
    return [line.split("  #")[0] for line in lines] + re.findall(r"`(fleet(?:-agent)? [^`]+)`", sentences)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guides_commands_and_their_options_are_there(guide):
    for line in commands_of(guide):
        program, *words = line.split()
        command = {"fleet": fleet, "fleet-agent": fleet_agent}[program]
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_units_that_are_put_in_by_hand_find_their_programs():
    """What the guide copies to systemd starts programs that the guide links to where the units look for them."""
    guide = (ROOT / "docs/guides/enrol-a-board.md").read_text()
    section = guide.partition("## As services, without the package")[2].partition("\n## ")[0]
    units = re.findall(r"fleet-[a-z-]+\.(?:service|socket|path|timer)", section)
    text = [(ROOT / "agent/edgefleet_agent/systemd" / unit).read_text() for unit in units]
    wanted = set(re.findall(r"^ExecStart=/usr/bin/(\S+)", "\n".join(text), re.MULTILINE))
    linked = set(re.findall(r"/opt/edgefleet/bin/([a-z-]+)", section))
    assert {"fleet-agent.service", "fleet-runtime.service", "fleet-power.service"} <= set(units)
    assert wanted
    assert wanted <= linked


def test_a_guide_enables_no_unit_that_it_has_not_copied():
    """One that systemd does not find keeps it from enabling the others."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs/guides/enrol-a-board.md").read_text(), flags=re.M | re.S)
    enabling = [block for block in blocks if "systemctl enable" in block]
    assert enabling
    for block in enabling:
        copied = set(" ".join(re.findall(r"^cp (.*) /etc/systemd/system/$", block, re.MULTILINE)).split())
        enabled = " ".join(re.findall(r"^systemctl enable --now (.*)$", block, re.MULTILINE)).split()
        assert {unit if "." in unit else f"{unit}.service" for unit in enabled} <= copied
