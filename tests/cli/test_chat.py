"""`sollold chat` on a terminal."""

from __future__ import annotations

from tests.cli.terminal import TerminalCommand


def test_ctrl_c_twice_ends_a_conversation_that_waits_for_input() -> None:
    command = TerminalCommand("chat", "any", "--node", "127.0.0.1:9")
    try:
        command.read_until(lambda: b">>> " in command.output)
        command.press_ctrl_c()
        command.read_until(lambda: command.output.count(b">>> ") > 1)
        assert b"/bye" in command.output
        command.press_ctrl_c()
        assert command.exit_status() == 130
    finally:
        command.close()
