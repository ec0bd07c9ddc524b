# SPDX-License-Identifier: Apache-2.0
"""What runs here: on what else than the model and the question an answer may depend."""

from __future__ import annotations

import platform
from importlib import metadata

from ..runtime import ggml_plugin, kernels


def of_this_process() -> dict[str, str]:
    """The package's version, ggml's, the kernels and the CPU's features that they choose by.

    Raises:
        InputError, KernelError: the kernels that are asked for cannot be had.
    """
    plugin = ggml_plugin.load()
    native = kernels.is_available()
    return {
        "version": kernels.version() if native else _package_version(),
        "ggml": plugin.ggml,
        "kernels": plugin.variant if plugin.active else "stock",
        "cpu": " ".join((platform.machine(), *(kernels.cpu_features() if native else ()))),
    }


def _package_version() -> str:
    try:
        return metadata.version("pocketphi")
    except metadata.PackageNotFoundError:  # it was not installed
        return ""
