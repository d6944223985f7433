"""Where a thread stands, for the message about a process that hangs."""

import os
import sys
import sysconfig
import threading
from types import FrameType

import torch

import lumi

_LIBRARIES = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_LIBRARIES.append(os.path.dirname(os.path.dirname(torch.__file__)))  # others may lie elsewhere, beside torch
_FOREIGN = tuple(folder + os.sep for folder in _LIBRARIES)
_LUMI = os.path.dirname(os.path.abspath(lumi.__file__)) + os.sep  # may lie in a folder of libraries
_WATCHING = __file__, os.path.join(os.path.dirname(__file__), "watchdog.py")  # not what the thread works on


def line_of_code(main: int) -> str:
    """Where the thread `main` stands, such as "rows.py:10 row > queue.py:5 get, thread in batches.py:3 read".

    The parts are its innermost line that is not a library's, the innermost line of all, and the lines where
    other threads are at work for it, if any (the loader of batches, say).
    """
    frames = sys._current_frames()
    innermost = frames.pop(main)
    # This very frame would hold itself, and so all variables of the loop, until the next garbage collection.
    frames.pop(threading.get_ident(), None)
    while innermost.f_code.co_filename in _WATCHING and innermost.f_back:
        innermost = innermost.f_back
    own, last = _own_line(innermost), _line(innermost)
    where = last if own in (None, last) else f"{own} > {last}"
    threads = sorted({line for frame in frames.values() if (line := _own_line(frame))})
    return ", thread in ".join([where, *threads])


def _own_line(frame: FrameType | None) -> str | None:
    """The innermost line that is neither a library's nor the watchdog's."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path not in _WATCHING and (path.startswith(_LUMI) or not path.startswith((*_FOREIGN, "<"))):
            return _line(frame)
        frame = frame.f_back
    return None


def _line(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_qualname}"
