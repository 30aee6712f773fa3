"""What is printed obeys no text."""

from pretrain.page import make_visible


def test_what_is_printed_obeys_no_text() -> None:
    text = "a\x1b[31m\r\n\t\x00\x9b\u202e\u2028\ufeff\ud800 é東🦊\xa0"
    assert make_visible(text) == "a␛[31m␍␊␉␀\\x9b\\u202e\\u2028\\ufeff\\ud800 é東🦊\xa0"
