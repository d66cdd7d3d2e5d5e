"""Text of others on a terminal, and the lines of an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gr.errors import ConfigError, printable

HOSTILE = [
    ("\x1b]0;PWN\x07", r"\x1b]0;PWN\x07"),
    ("x\nerror: fake", r"x\nerror: fake"),
    ("a\r\tb", r"a\r\tb"),
    ("\x9b31m", r"\x9b31m"),  # the C1 form of ESC [
    ("abc\u202ecba", r"abc\u202ecba"),  # would turn the text around
    ("a\u2028b", r"a\u2028b"),
    ("\udc80", r"\udc80"),  # a byte of a file name that is no UTF-8
    ("\x00\x7f", r"\x00\x7f"),
    ("ü 漢 é /a\\b [red]", "ü 漢 é /a\\b [red]"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_what_is_no_letter_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_becomes_one_line_that_can_be_printed(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    shown.encode()


def test_only_the_lines_of_the_error_itself_are_lines() -> None:
    assert str(ConfigError("2 faults in a\nb", "c\nerror: fake", "d")) == "2 faults in a\\nb\n  c\\nerror: fake\n  d"
