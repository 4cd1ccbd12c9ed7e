"""Reading Parquet in memory."""

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.parquet import read_parquet


def _content() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), buffer)
    return buffer.getvalue()


def test_columns_come_back() -> None:
    assert read_parquet(_content()).to_pylist() == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert read_parquet(_content(), ["b"]).to_pydict() == {"b": ["x", "y"]}
    with pytest.raises(pa.ArrowException):
        read_parquet(_content()[:-9])


def test_a_process_that_ends_right_after_keeps_its_exit_status(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(_content())
    code = (
        "import sys; from pathlib import Path; from schemas.parquet import read_parquet\n"
        f"read_parquet(Path({str(path)!r}).read_bytes()); sys.exit(7)"
    )
    root = Path(__file__).resolve().parents[2]
    runs = [subprocess.run([sys.executable, "-c", code], cwd=root, check=False) for _ in range(6)]
    assert {run.returncode for run in runs} == {7}
