"""What users read at the end of a command that failed."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from sparse_detr.errors import UserError, told_in_one_line


def test_torchrun_repeats_the_line_at_the_end_of_its_report(tmp_path, monkeypatch):
    report = tmp_path / "attempt_0" / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    with pytest.raises(SystemExit, match="error: no such key"), told_in_one_line():
        raise UserError("no such key")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(report))
    assert failure.message == "error: no such key" and failure.timestamp > 0
