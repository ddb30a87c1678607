"""Checkpoints: whole or not there, pruned, and read by any number of ranks."""

import json
from pathlib import Path

import pytest
import torch

from longctx.errors import CheckpointError
from longctx.training import checkpoints
from longctx.training.checkpoints import CheckpointReader, CheckpointWriter, describe_last_good, list_checkpoints
from longctx.training.deepspeed_engine import MOMENTS, Fragment

WEIGHT = torch.arange(10.0)


def make_writers(output: Path, world_size: int = 2, **options) -> list[CheckpointWriter]:
    settings = {"asynchronous": True, "keep_last": 2, "keep_best": 0} | options
    return [CheckpointWriter(output, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]


def make_fragments(rank: int, world_size: int, step: int) -> list[Fragment]:
    """Ranks hold ranges of one weight, which is ``WEIGHT + step``."""
    part = (WEIGHT + step).chunk(world_size)[rank]
    start = sum(len(each) for each in WEIGHT.chunk(world_size)[:rank])
    return [Fragment("a.weight", start, part, {key: part * (index + 2) for index, key in enumerate(MOMENTS)})]


def write(writers: list[CheckpointWriter], step: int, *, metric: float = 0.0) -> list[Path | None]:
    """What ``end`` says on each rank."""
    state = {"step": step, "metric": metric, "shapes": {"a.weight": [2, 5]}}
    for rank, writer in enumerate(writers):
        writer.begin(state, make_fragments(rank, len(writers), step), {"rank": rank})
    while not all(writer.is_written or writer.has_failed for writer in writers):
        pass
    num_failed = sum(writer.has_failed for writer in writers)
    return [writer.end(num_failed=num_failed) for writer in reversed(writers)][::-1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_any_range_comes_back(tmp_path, world_size, asynchronous):
    write(make_writers(tmp_path, world_size, asynchronous=asynchronous), 7)
    reader = CheckpointReader(list_checkpoints(tmp_path)[-1])
    assert reader.state["step"] == 7
    assert [each["rank"] for each in reader.data] == list(range(world_size))
    for start, numel in ((0, 10), (0, 4), (3, 5), (9, 1)):
        wanted = (WEIGHT + 7)[start : start + numel]
        assert torch.equal(reader.read("a.weight", "master", start, numel), wanted)
        assert torch.equal(reader.read("a.weight", "exp_avg_sq", start, numel), wanted * 3)
    with pytest.raises(CheckpointError, match=r"master of a\.weight has 1 of 2 elements"):
        reader.read("a.weight", "master", 9, 2)


def test_what_is_written_is_a_copy(tmp_path, monkeypatch):
    """Training goes on while a thread writes: it must not see later weights."""
    (writer,) = make_writers(tmp_path, 1)
    weight = WEIGHT.clone()
    held = []
    monkeypatch.setattr(checkpoints, "save_file", lambda tensors, path: (held.append(tensors), path.touch()))
    writer.begin({"step": 1, "metric": 0.0, "shapes": {}}, [Fragment("a", 0, weight, {})], {})
    weight.zero_()
    while not writer.is_written:
        pass
    assert torch.equal(held[0]["master:a:0"], WEIGHT)


def test_newest_and_best_are_kept(tmp_path):
    writers = make_writers(tmp_path, keep_last=2, keep_best=1)
    for step, metric in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.2)):
        write(writers, step, metric=metric)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]
    assert len(list((tmp_path / checkpoints.FOLDER).iterdir())) == 3


def test_a_full_disk_spoils_nothing(tmp_path, monkeypatch, caplog):
    writers = make_writers(tmp_path)
    write(writers, 1)
    real = checkpoints.save_file

    def save_until_full(tensors, path):
        if "rank-0001" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", save_until_full)
    assert write(writers, 2) == [None, None]
    assert "checkpoint of step 2 was not written" in caplog.text
    assert "No space left on device" in caplog.text
    assert [path.name for path in (tmp_path / checkpoints.FOLDER).iterdir()] == ["step-00000001"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    assert all(path == tmp_path / checkpoints.FOLDER / "step-00000003" for path in write(writers, 3))


def test_a_rank_that_wrote_elsewhere_is_missed(tmp_path, caplog):
    """Machines without a file system in common: the checkpoint could not be read again."""
    first, _ = make_writers(tmp_path / "one")
    _, second = make_writers(tmp_path / "two")
    assert write([first, second], 1)[0] is None
    assert "rank 1 has not written into" in caplog.text
    assert list_checkpoints(tmp_path / "one") == []


def test_what_cannot_be_removed_stays(tmp_path, monkeypatch, caplog):
    writers = make_writers(tmp_path, keep_last=1)
    write(writers, 1)
    monkeypatch.setattr(Path, "rename", _fail_on("step-00000001", Path.rename))
    assert write(writers, 2)[0] is not None
    assert "old checkpoints could not be removed" in caplog.text


def _fail_on(name, rename):
    def fail(path, target):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    return fail


def test_the_last_good_one_is_from_before(tmp_path):
    assert describe_last_good(tmp_path, 3) == "there is no good checkpoint before"
    writers = make_writers(tmp_path)
    for step in (1, 3):
        write(writers, step)
    assert describe_last_good(tmp_path, 4).endswith("step-00000003")
    told = describe_last_good(tmp_path, 3)
    assert "step-00000001; step-00000003 has the weights that it happened with" in told


def test_halves_do_not_count(tmp_path):
    """A run that was killed while it wrote: what is left is not read, and is gone after the next start."""
    write(make_writers(tmp_path), 1)
    left = tmp_path / checkpoints.FOLDER / ".step-00000002.partial"
    left.mkdir()
    (left / "rank-0000.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    make_writers(tmp_path)
    assert not left.exists()


def test_torn_files_are_named(tmp_path):
    write(make_writers(tmp_path), 1)
    (folder,) = list_checkpoints(tmp_path)
    path = folder / "rank-0001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"rank-0001\.safetensors cannot be read"):
        CheckpointReader(folder)
    state = json.loads((folder / "state.json").read_text()) | {"version": 99}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="version 99 is not 1"):
        CheckpointReader(folder)
