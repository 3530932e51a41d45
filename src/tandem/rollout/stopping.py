"""Giving up a batch of responses that another thread is sampling."""

from __future__ import annotations

import threading


class GivenUp(Exception):
    """The responses that were being sampled are wanted no more."""


class Stopping:
    """A flag that any thread can set, and that sampling looks at between two tokens."""

    def __init__(self) -> None:
        self._wanted = threading.Event()

    def ask(self) -> None:
        self._wanted.set()

    def check(self) -> None:
        """Raises GivenUp once somebody has asked for the end."""
        if self._wanted.is_set():
            raise GivenUp
