"""The list of the commands."""

import pytest

from dse import __main__ as entry


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["-h"])
    assert stop.value.code == 0
    assert "quickstart  Run stages 2 to 5 on made-up data" in capsys.readouterr().out
