"""Rules of one's own that change nothing: one takes its time, one says where it is.

In: environment variables, which are no part of the rules' settings, so that a quick build and a slow one are the same build:
FAULTS_PAUSE_SECONDS for each document (default 0), and FAULTS_HOSTS, a folder to leave a file in under this host's name.
"""

import os
import socket
import time
from pathlib import Path

from data_pipeline.documents import Document

PAUSE_SECONDS = "FAULTS_PAUSE_SECONDS"
HOSTS = "FAULTS_HOSTS"


def pause(document: Document) -> Document | str:
    """Keep every document, in its own time."""
    time.sleep(float(os.environ.get(PAUSE_SECONDS, "0")))
    return document


def note_host(document: Document) -> Document | str:
    """Keep every document, and leave word where that was."""
    if folder := os.environ.get(HOSTS):
        (Path(folder) / socket.gethostname()).touch()
    return document
