"""What an agent does before it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_agent import app, board
from edgefleet_agent import settings as board_settings
from edgefleet_agent.settings import Settings
from edgefleet_shared.errors import TransportError


def test_an_agent_whose_certificate_is_lost_loads_no_engine_each_time_that_it_is_started_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board_settings.write(
        tmp_path, Settings(device="b1", device_class="c", site="", broker_host="127.0.0.1", broker_port=1)
    )
    looked = list[str]()
    monkeypatch.setattr(board, "probe_engines", lambda: looked.append("engines") or ())
    with pytest.raises(TransportError, match="certificates"):
        app.run(tmp_path)
    assert looked == []
