# SPDX-License-Identifier: Apache-2.0
"""
Every exception this project raises, and the exit code the command line gives it.

* PocketPhiError           exit 1   base class: catch this one; a failure while running
  + MemoryShortError       exit 1   what is asked for needs more memory than there is
  + InputError             exit 2   a prompt, flag or medium that cannot be used
  + BundleError            exit 3   the model directory is missing, damaged or of another version
  + KernelError            exit 4   a native library refused a call or is of another ABI version
  + CheckpointError        exit 5   the source checkpoint is missing, damaged or of an unknown kind
    - TensorShapeError              a tensor's shape is not the one that the configuration implies
  + OutputError            exit 6   an output could not be written
    - InUseError                    another process is writing it

Ctrl-C is exit 130. Messages are one line: which input, what was found, what was wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


def one_line(exc: BaseException, most: int = 200) -> str:
    """What another library's exception says, for a message of ours: one line, cut at `most` characters."""
    return " ".join(str(exc).split())[:most]


def shortened(text: str, most: int = 1000) -> str:
    """Without its middle, where it is longer: the beginning says which file, the end what was wanted."""
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"


class PocketPhiError(Exception):
    """Base class of every error that is not a bug."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """One line, of bounded length: what names and values out of files bring cannot steer a terminal."""
        text = shortened(super().__str__())
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class MemoryShortError(PocketPhiError):
    """What is asked for needs more memory than this process may take."""


class InputError(PocketPhiError):
    """A prompt, a flag, an image or a clip cannot be used as it is."""

    exit_code: ClassVar[int] = 2


class BundleError(PocketPhiError):
    """The model directory on disk is missing, damaged or of another version."""

    exit_code: ClassVar[int] = 3


class KernelError(PocketPhiError):
    """A native library refused a call, is missing, or has another ABI version."""

    exit_code: ClassVar[int] = 4


class CheckpointError(PocketPhiError):
    """The source checkpoint is missing, damaged, or of a kind that cannot be converted."""

    exit_code: ClassVar[int] = 5


class TensorShapeError(CheckpointError):
    """A tensor's shape is not the one that the configuration implies."""

    def __init__(self, name: str, *, got: tuple[int, ...], want: tuple[int, ...], file: str) -> None:
        self.name, self.got, self.want, self.file = name, got, want, file
        super().__init__(f"{file}: tensor {name!r} has shape {list(got)}, expected {list(want)}")


class OutputError(PocketPhiError):
    """An output file could not be written (no space, no permission, a broken disk)."""

    exit_code: ClassVar[int] = 6


class InUseError(OutputError):
    """Another process is writing the output."""


@contextmanager
def native(name: str) -> Iterator[None]:
    """Around the import of a library with native code: where memory is short, it fails in words of its own.

    Raises:
        KernelError: the library is missing or cannot be loaded.
    """
    try:
        yield
    except PocketPhiError:
        raise
    except Exception as exc:  # ImportError with the linker's words, MemoryError, OSError, a library's own
        raise KernelError(f"{name} cannot be loaded: {one_line(exc)}") from None
