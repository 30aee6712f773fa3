"""A page for one person on this machine: a server on 127.0.0.1 that answers one secret address.

In: what makes the page. Out: the page, made anew when it is asked for, until Ctrl-C. Other users of this machine can reach the port too,
and so can any page that is open in the browser: hence a random token in the address, compared in constant time, and a check of the
name that the browser asked for (a foreign name that leads here would make the page readable by its owner's scripts).
"""

import hmac
import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from configs.errors import UserError

ADDRESS = "127.0.0.1"
REFRESH_SECONDS = 10
"""After which a browser asks again, while the run is running."""
REQUEST_SECONDS = 10
"""Until a browser that says nothing is left alone."""
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'",
}


def serve_page(make: Callable[[], str], port: int, say: Callable[[str], Any]) -> None:
    """Answer until the process is interrupted. port: 0 for any that is free. Raises UserError for one that is taken."""
    with open_server(make, port) as server:
        try:
            say(f"the page is at {server.address} (Ctrl-C ends this)")
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("the page is closed")


def open_server(make: Callable[[], str], port: int) -> "PageServer":
    """A server that listens and does not answer yet. Raises UserError as `serve_page` does."""
    try:
        return PageServer(make, port)
    except OSError as error:
        raise UserError(f"port {port} of {ADDRESS} cannot be had: {error.strerror}; give another --port, or none.") from None


class PageServer(ThreadingHTTPServer):
    """Of one page. A page that took long to make is kept for as long again: showing it never takes more than half of a processor."""

    daemon_threads = True

    def __init__(self, make: Callable[[], str], port: int) -> None:
        self._make, self._lock = make, threading.Lock()
        self._page, self._made, self._seconds = b"", float("-inf"), 0.0
        self.token = secrets.token_urlsafe(24)
        super().__init__((ADDRESS, port), _Handler)

    @property
    def address(self) -> str:
        """Where the page is, with its token."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def page(self) -> bytes:
        """The page as it is now."""
        with self._lock:
            began = time.monotonic()
            if began - self._made > self._seconds:
                self._page = self._make().encode()
                self._made = time.monotonic()
                self._seconds = self._made - began
            return self._page

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer  # pyright: ignore[reportIncompatibleVariableOverride] - whose handler it is
    timeout = REQUEST_SECONDS
    protocol_version = "HTTP/1.0"
    server_version, sys_version = "pretrain", ""

    def do_GET(self) -> None:
        """The page, to who knows its address and asks for this machine by its own name."""
        port = self.server.server_port
        if self.headers.get_all("Host") not in ([f"{ADDRESS}:{port}"], [f"localhost:{port}"]):
            self._answer(HTTPStatus.FORBIDDEN, b"This address is not served under that name.")
        elif not hmac.compare_digest(self.path.encode(), f"/{self.server.token}/".encode()):
            self._answer(HTTPStatus.NOT_FOUND, b"Nothing is here.")
        else:
            try:
                status, page = HTTPStatus.OK, self.server.page()
            except (UserError, OSError) as error:  # the folder is gone, or was replaced while it was read
                status, page = HTTPStatus.SERVICE_UNAVAILABLE, type(error).__name__.encode()
            self._answer(status, page)

    def _answer(self, status: HTTPStatus, page: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value if status == HTTPStatus.OK or name != "Content-Type" else "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is no GET, or no HTTP: the same headers, no word of who asked for what."""
        self._answer(HTTPStatus(code), HTTPStatus(code).phrase.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Addresses hold the token: nothing is logged."""
