"""What a weights file says that it holds: as safetensors reads it, refused where that does, and never mapped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from alora_serve.adapters.files import WEIGHTS_NAME
from alora_serve.adapters.weights_header import MAX_HEADER_BYTES, TensorSpec, read_header
from alora_serve.errors import AdapterRefusedError

A: dict[str, Any] = {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}
B: dict[str, Any] = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]}


def written(header: object, data_bytes: int = 24) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)


def test_it_is_read_as_safetensors_wrote_it(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(4), "none": torch.zeros(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_NAME, metadata={"format": "pt"})
    with (tmp_path / WEIGHTS_NAME).open("rb") as file:
        assert read_header(file) == {
            "a": TensorSpec("F32", (4,)),
            "b": TensorSpec("BF16", (2, 3)),
            "none": TensorSpec("F32", (0, 4)),
        }
        assert file.tell() == 0


@pytest.mark.parametrize(
    "content",
    [
        written([A]),
        written(b"[" * 100_000),
        written(b"\xff\xfe"),
        written({"a": A, "b": {**B, "data_offsets": [8, 16]}}),
        written({"a": A, "b": {**B, "data_offsets": [20, 28]}}, 28),
        written({"a": A, "b": {**B, "data_offsets": [24, 16]}}),
        written({"a": {**A, "data_offsets": [-16, 0]}}, 0),
        written({"a": {**A, "shape": [2, 4]}}, 16),
        written({"a": {**A, "shape": [True, 4]}}, 16),
        written({"a": {**A, "shape": [1.0, 4]}}, 16),
        written({"a": {**A, "shape": [1 << 70, 0], "data_offsets": [0, 0]}}, 0),
        written({"a": {"shape": [1, 4], "data_offsets": [0, 16]}}, 16),
        written({"a": 5}, 0),
        written({"a": A}, 17),
        written({"a": A}, 15),
        written({"a": A})[:20],
    ],
)
def test_what_is_not_valid_is_refused_where_safetensors_refuses_it(content: bytes) -> None:
    with pytest.raises(AdapterRefusedError, match="is not valid safetensors"):
        read_header(BytesIO(content))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.torch.load(content)


def test_a_shape_without_end_is_not_multiplied_out() -> None:
    with pytest.raises(AdapterRefusedError, match="tensor a"):
        read_header(BytesIO(written({"a": {**A, "shape": [9] * 100_000}})))


def test_a_header_beyond_the_bound_is_not_read() -> None:
    with pytest.raises(AdapterRefusedError, match="its header has"):
        read_header(BytesIO((MAX_HEADER_BYTES + 1).to_bytes(8, "little")))


def test_a_file_that_is_cut_while_it_is_read_is_refused_and_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(written({"a": A, "b": B}))
    with path.open("rb") as file:
        os.truncate(path, 12)
        with pytest.raises(AdapterRefusedError, match="before its header does"):
            read_header(file)


WRITER_AND_READER = """
import os, sys
from pathlib import Path
from alora_serve.adapters.files import find_files
from alora_serve.adapters.loading import AdapterHost, inspect_adapter
from alora_serve.adapters.targets import ModuleShape
from alora_serve.errors import AdapterRefusedError

adapter = Path(sys.argv[1])
weights = adapter / "adapter_model.safetensors"
whole = weights.read_bytes()
host = AdapterHost({f"layers.{i}.q_proj": ModuleShape(64, 64) for i in range(300)}, 100, str, lambda text: ())
reader, writer = os.getpid(), os.fork()
if writer == 0:
    while os.getppid() == reader:
        os.truncate(weights, 0)
        with weights.open("r+b") as file:
            file.write(whole)
    os._exit(0)
try:
    found = {"whole": 0, "refused": 0}
    for _ in range(400):
        try:
            inspect_adapter(find_files(adapter, root=adapter), name="cut", base=host)
            found["whole"] += 1
        except AdapterRefusedError:
            found["refused"] += 1
finally:
    os.kill(writer, 9)
    os.waitpid(writer, 0)
print(found["refused"] > 0)
"""


def test_a_writer_that_cuts_the_file_over_and_over_ends_no_reader(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"A": (8, 64), "B": (64, 8)}
    names = [(i, factor) for i in range(300) for factor in shapes]
    safetensors.torch.save_file(
        {f"base_model.model.layers.{i}.q_proj.lora_{f}.weight": torch.zeros(shapes[f]) for i, f in names},
        tmp_path / WEIGHTS_NAME,
    )
    done = subprocess.run(
        [sys.executable, "-c", WRITER_AND_READER, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
