"""A terminal for tests: a real pty with a program's standard error on it, and what a person would see there.

The program reads commands from its standard input, so that a test says when something happens and waits until it is seen; no test depends
on how fast anything is.
"""

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Generator
from pathlib import Path

ROOT = Path(__file__).parents[3]
SEEN_SECONDS = 60.0
"""Until something is seen; a loaded machine takes its time."""
_ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    """The lines of a terminal that never scrolls, and what was done to its text: as much of it as rich uses."""

    def __init__(self) -> None:
        self.lines: list[str] = [""]
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        place = 0
        while place < len(text):
            if found := _ESCAPE.match(text, place):
                self._obey(found[1], found[2])
                place = found.end()
                continue
            letter = text[place]
            place += 1
            if letter == "\r":
                self._column = 0
            elif letter == "\n":
                self._row += 1
                self.lines += [""] * (self._row + 1 - len(self.lines))
            else:
                line = self.lines[self._row].ljust(self._column)
                self.lines[self._row] = line[: self._column] + letter + line[self._column + 1 :]
                self._column += 1

    def _obey(self, number: str, kind: str) -> None:
        if kind == "A":
            self._row = max(0, self._row - int(number or 1))
        elif kind == "K":
            self.lines[self._row] = ""
        elif kind == "H":
            self._row = self._column = 0
        elif kind == "J":
            self.lines = [*self.lines[: self._row], ""]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Terminal:
    """A program in a terminal."""

    def __init__(self, master: int, program: "subprocess.Popen[bytes]") -> None:
        self.program, self.raw, self.screen = program, "", Screen()
        self._master: int | None = master

    def tell(self, command: str) -> None:
        """A line for its standard input."""
        assert self.program.stdin is not None
        self.program.stdin.write(f"{command}\n".encode())
        self.program.stdin.flush()

    def wait(self, is_seen: Callable[["Terminal"], bool]) -> str:
        """Read until something is seen. Returns the screen."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not is_seen(self):
            assert time.monotonic() < deadline, f"never seen; the screen is\n{self.screen.text}\n{self.raw[-1000:]!r}"
            if not self._read():
                assert is_seen(self), f"it ended; the screen is\n{self.screen.text}"
        return self.screen.text

    def wait_for(self, text: str) -> str:
        return self.wait(lambda terminal: text in terminal.screen.text)

    def wait_for_the_end(self) -> str:
        """Its exit status is to be 0. Returns the screen."""
        deadline = time.monotonic() + SEEN_SECONDS
        while self._read():
            assert time.monotonic() < deadline, f"it does not end; the screen is\n{self.screen.text}"
        assert self.program.wait(SEEN_SECONDS) == 0, self.screen.text
        return self.screen.text

    def resize(self, columns: int, lines: int = 40) -> None:
        assert self._master is not None
        resize(self._master, columns, lines)

    def close(self) -> None:
        """As a window that is closed."""
        if self._master is not None:
            os.close(self._master)
        self._master = None

    def press(self, keys: str) -> None:
        assert self._master is not None
        os.write(self._master, keys.encode())

    def _read(self) -> bool:
        """A bit more of what it writes; False behind its end."""
        assert self._master is not None
        if not select.select([self._master], [], [], 0.1)[0]:
            return self.program.poll() is None
        try:
            text = os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return False
        self.raw += text
        self.screen.feed(text)
        return bool(text)


def resize(descriptor: int, columns: int, lines: int = 40) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def _take_terminal() -> None:
    """Let keys such as Ctrl-C be this process's."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def open_terminal(
    *command: str, columns: int = 100, all_streams: bool = False, folder: Path = ROOT, **environment: str
) -> Generator[Terminal, None, None]:
    """`python COMMAND` with a terminal as standard error, or as all its streams; nothing of it is left behind."""
    master, slave = os.openpty()
    resize(master, columns)
    base = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM")}
    program = subprocess.Popen(
        [sys.executable, *command],
        stdin=slave if all_streams else subprocess.PIPE,
        stdout=slave if all_streams else subprocess.DEVNULL,
        stderr=slave,
        cwd=folder,
        env={**base, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "TERM": "xterm-256color", **environment},
        start_new_session=True,
        preexec_fn=_take_terminal if all_streams else None,
    )
    os.close(slave)
    terminal = Terminal(master, program)
    try:
        yield terminal
    finally:
        terminal.close()
        if program.stdin is not None:
            with contextlib.suppress(OSError):
                program.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(1)
        program.kill()
        program.wait()
