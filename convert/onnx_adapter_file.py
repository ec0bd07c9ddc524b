# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of an .onnx_adapter file are, so that a graph can use them as its weights.

`write_onnx_adapter.py` describes the format; only files that this conversion has written are read.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import onnx
from onnx import helper

_HEAD_BYTES = 1 << 20  # all that comes before the numbers, generously


def adapter_tensors(path: Path) -> dict[str, onnx.TensorProto]:
    """Each parameter by name, as a tensor whose data lies in the file."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)

    def u32(at: int) -> int:
        return int(struct.unpack_from("<I", head, at)[0])

    def target(at: int) -> int:
        return at + u32(at)

    def field(table: int, n: int) -> int:
        layout = table - int(struct.unpack_from("<i", head, table)[0])
        return table + int(struct.unpack_from("<H", head, layout + 4 + 2 * n)[0])

    found = {}
    vector = target(field(target(0), 3))
    for n in range(u32(vector)):
        table = target(vector + 4 + 4 * n)
        name, dims, data = (target(field(table, i)) for i in (0, 1, 3))
        made = onnx.TensorProto(
            name=head[name + 4 : name + 4 + u32(name)].decode("ascii"),
            dims=struct.unpack_from(f"<{u32(dims)}q", head, dims + 4),
            data_type=u32(field(table, 2)),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", path.name), ("offset", data + 4)):
            made.external_data.add(key=key, value=str(value))
        item = helper.tensor_dtype_to_np_dtype(made.data_type).itemsize
        length = math.prod(made.dims) * item
        made.external_data.add(key="length", value=str(length))
        found[made.name] = made
    return found
