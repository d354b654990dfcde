"""Kills at the calls that change the disk, for the tests of what a kill leaves behind."""

from __future__ import annotations

import os

import torch


class Killed(BaseException):
    """What a kill -9 is to the code that it hits: nothing behind it is executed."""


def kill_at(monkeypatch, count: int) -> None:
    """Kill at the `count`-th call that changes the disk or waits for it."""
    calls = iter(range(count))

    def killing(function):
        def call(*arguments, **options):
            if next(calls, None) is None:
                raise Killed
            return function(*arguments, **options)

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (torch, "save")):
        monkeypatch.setattr(module, name, killing(getattr(module, name)))
