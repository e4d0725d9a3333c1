"""What a stop, a full console, a foreign file or another name of a folder must not do: wrong numbers, lost work."""

import errno
import fcntl
import importlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tqdm import tqdm

import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse import __main__
from dse.index import CandidateIndex
from dse.networks import inference
from dse.storage import index_files
from dse.system import files, parallel, signals
from dse.system.errors import InputError, RunError

CPU = torch.device("cpu")


def run_steps(progress: inference.PartialOutputs | None, computed: list[int], costs: list[int]) -> np.ndarray:
    """Outputs that are each row's number plus 1, in steps of at most 8 places; which rows were computed."""

    def batch(rows: np.ndarray) -> dict:
        computed.extend(rows.tolist())
        return {"rows": torch.from_numpy(rows)}

    def forward(rows: torch.Tensor) -> torch.Tensor:
        return rows.unsqueeze(1).float() + 1

    model = torch.nn.Identity()
    model.forward = forward
    batches = SimpleNamespace(features=SimpleNamespace(costs=np.array(costs)), of_pairs=batch, max_seq_length=8)
    return inference.infer(model, batches, 1, CPU, "x", progress, show=False)


def test_19_rows_that_are_done_are_stored_and_no_others(tmp_path):
    costs, steps = [3, 9, 4, 4], [np.array([1]), np.array([2, 3]), np.array([0])]
    progress = inference.PartialOutputs(tmp_path / "x.partial", {"of": "x"})
    assert progress.find(steps) is None
    done, outputs = np.array([False, False, True, True]), np.full((4, 1), np.nan, np.float32)
    outputs[[2, 3], 0] = [30, 40]
    entries = {"identity": progress._identity, "done": torch.from_numpy(done), "outputs": torch.from_numpy(outputs)}
    files.save_tensors(tmp_path / "x.partial", entries)
    computed: list[int] = []
    assert run_steps(progress, computed, costs)[:, 0].tolist() == [1, 2, 30, 40]
    assert computed == [1, 0]
    computed.clear()  # the same rows in other steps, and an older format, are begun anew
    assert run_steps(progress, computed, [3, 9, 5, 4])[:, 0].tolist() == [1, 2, 3, 4]
    files.save_tensors(tmp_path / "x.partial", {"work": progress._identity, "steps": 2, "outputs": torch.zeros(4, 1)})
    assert run_steps(progress, computed, costs)[:, 0].tolist() == [1, 2, 3, 4]
    assert len(computed) == 8


def test_19_a_row_that_no_process_computed_is_not_written(monkeypatch, tmp_path):
    """Two processes, this one the first: it has rows 0 and 2, the other row 1, and none row 3."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    others = iter([np.array([0, 1, 0, 0]), np.array([[0], [7], [0], [0]], np.float32)])
    monkeypatch.setattr(parallel, "summed", lambda values: values + next(others))
    outputs = np.array([[5], [np.nan], [6], [np.nan]], np.float32)
    rows, done = inference._of_all(outputs, np.array([True, False, True, False]))
    assert done.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(rows[:, 0], [5, 7, 6, np.nan])
    monkeypatch.undo()
    monkeypatch.setattr(inference, "by_length", lambda *_: [np.array([1]), np.array([0, 3])])  # row 2 forgotten
    with pytest.raises(RunError, match="x: 1 rows were not computed, such as 2"):
        run_steps(None, [], [1, 1, 1, 1])


def test_17_systems_that_flush_no_folders_nor_what_is_open_for_reading(tmp_path, monkeypatch):
    """As Windows does it: folders cannot be opened, and a file's handle must be one for writing."""
    opened, flush, flushed = os.open, os.fsync, []

    def open_file(path, flags, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *args, **options)

    def flush_written(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)
        flush(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush_written)
    files.write_text(tmp_path / "x", "text")
    with files.write_folder_whole(tmp_path / "one") as beside:
        (beside / "y").write_text("text")
    with files.replace_folder(tmp_path / "two") as beside:
        (beside / "z").write_text("text")
    assert [path.read_text() for path in (tmp_path / "x", tmp_path / "one/y", tmp_path / "two/z")] == ["text"] * 3
    assert len(flushed) == 3
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RunError, match="Input/output error"):  # of a file it still counts
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "text"


LONG = "n" * 250  # a name of its own, and too long with what is added
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_18_names_that_are_too_long_for_their_files(teacher_flags, student_flags, refused, bert, tmp_path):
    """Before any work, though only the names of states, logits and caches would be too long: 255 bytes, in UTF-8."""
    (tmp_path / LONG).symlink_to(bert)
    student = {"experiment_name": "é" * 120}  # 240 bytes
    logits = [
        "--task_name",
        "mrpc",
        "--data_dir",
        "x",
        "--train_features_path",
        tmp_path / "x",
        "--output_dir",
        tmp_path,
    ]
    for main, argv, flag in (
        (finetune_bert.main, teacher_flags(bert_model=tmp_path / LONG), "--bert_model or --task_name: "),
        (finetune_bert.main, teacher_flags("mnli", output_dir=tmp_path / f"{LONG}nnn"), "--output_dir: "),
        (finetune_bert.main, teacher_flags(output_dir=tmp_path / f"{LONG}{LONG}"), "--output_dir: "),
        (finetune_bert.main, teacher_flags(output_dir=tmp_path / "/".join([LONG] * 17)), "--output_dir: "),
        (dse_train_runner.main, student_flags(**student), "--checkpoint_dir: "),
        (dse_train_runner.main, student_flags(train_features_path=tmp_path / LONG), "the features' paths: "),
        (run_distillation_logits_creator.main, [*logits, "--bert_checkpoint_dir", tmp_path / LONG], "--output_dir: "),
    ):
        line = refused(main, argv)
        assert flag in line
        assert "is too long for a file's name, or its path is" in line
    assert not any(path.name != LONG for path in tmp_path.iterdir())


def test_18_the_longest_names_that_can_be(tmp_path):
    """The hidden neighbour has 14 bytes more: `.`, `.4194304` and `.part`."""
    name = "n" * (255 - 14)
    files.check_writable(tmp_path, "--x", name)
    files.write_text(tmp_path / name, "text")
    with pytest.raises(InputError, match=r"--x: \.nn"):
        files.check_writable(tmp_path, "--x", f"{name}n")


def command(name: str):
    return lambda argv: __main__.main([name, *argv])


@pytest.mark.parametrize(
    ("name", "flag", "others"),
    [
        ("export", "--output", ["--trainer_checkpoint", __file__]),
        ("index", "--output", ["--model", "x", "--candidates", __file__]),
        ("score", "--output", ["--model", "x", "--candidates", __file__, "--queries", __file__]),
        ("transfer", "--output", ["--model", "x", "--data_dir", "."]),
        ("benchmark", "--output", ["scoring", "--task_name", "mrpc", "--data_dir", "x"]),
        ("predict", "--output_dir", ["--model", "x", "--task_name", "mrpc", "--data_dir", "x"]),
        ("reproduce", "--output_dir", ["--bert_model", "x"]),
        ("quickstart", "--output_dir", []),
    ],
)
def test_18_commands(name, flag, others, refused, tmp_path):
    for bad, message in ((LONG * 2, "is too long for a file's name"), (NOT_UTF8, "is not valid UTF-8")):
        assert message in refused(command(name), [*others, flag, tmp_path / bad])
    assert not any(tmp_path.iterdir())


def test_18_names_that_are_not_utf8(teacher_flags, student_flags, refused, data, tmp_path):
    """Of outputs, and of inputs too: the model card tells them. From a folder of such a name too."""
    for changes in ({"output_dir": tmp_path / NOT_UTF8}, {"data_dir": tmp_path / NOT_UTF8}):
        assert "caf\\udce9' is not valid UTF-8" in refused(finetune_bert.main, teacher_flags(**changes))
    for changes in ({"checkpoint_dir": tmp_path / NOT_UTF8}, {"experiment_name": NOT_UTF8}):
        assert "is not valid UTF-8" in refused(dse_train_runner.main, student_flags(**changes))
    (tmp_path / NOT_UTF8).mkdir()
    before = Path.cwd()
    try:
        os.chdir(tmp_path / NOT_UTF8)
        with pytest.raises(InputError, match=r"--x: .*is not valid UTF-8"):
            files.check_writable("here", "--x")
    finally:
        os.chdir(before)


def test_18_an_input_whose_name_is_too_long(teacher_flags, student_flags, refused):
    for changes in ({"data_dir": LONG * 2}, {"bert_model": LONG * 2}):
        assert "too long" in refused(finetune_bert.main, teacher_flags(**changes))
    assert "too long" in refused(dse_train_runner.main, student_flags(distillation_logits_path=LONG * 2))


@pytest.mark.parametrize("how", ["full", "gone", "closed"])
def test_22_a_console_that_cannot_be_written_ends_nothing(how, teacher_flags, tmp_path, monkeypatch):
    """The log's lines and the progress bar, of a stage that ends as if nothing had been."""
    if how == "full":
        console = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        console = os.fdopen(writer, "w", buffering=1)
        if how == "closed":
            console.close()
    bars, original = [], tqdm.__init__

    def shown(self, *args, **options):
        bars.append(self)
        original(self, *args, **{**options, "disable": False, "mininterval": 0, "miniters": 1})

    monkeypatch.setattr(tqdm, "__init__", shown)
    monkeypatch.setattr(sys, "stderr", console)
    finetune_bert.main(teacher_flags())
    assert (tmp_path / "teacher" / "eval_results.txt").exists()
    assert any(bar.n == 3 for bar in bars), "no bar of a training was shown"
    with pytest.raises(SystemExit) as stop:
        finetune_bert.main(teacher_flags())  # whose one line is lost, its exit code is not
    assert stop.value.code == 2


def test_22_a_signal_when_the_console_is_gone(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    with signals.caught(), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == signal.SIGTERM


@pytest.mark.parametrize(("how", "code"), [("full", 1), ("gone", 141)])
def test_22_an_output_that_cannot_be_written_ends_the_example(how, code, bert, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(os.open("/dev/full", os.O_WRONLY) if how == "full" else writer, "w")
    monkeypatch.setattr(sys, "stdout", output)
    flags = ["--task_name", "mrpc", "--bert_model", str(bert), "--do_lower_case", "--max_seq_length", "32",
             "--pooler_num_top_hidden_layers", "2"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        load_dse_checkpoint_example.main(flags)
    assert stop.value.code == code
    told = "error: the output cannot be written (No space left on device)" in capfd.readouterr().err
    assert told == (how == "full")
    output.close()  # what it still held goes nowhere


def test_26_a_teacher_in_the_working_folder(teacher_flags, refused, tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    finetune_bert.main(teacher_flags("mnli", output_dir=".", eval_batch_size=128))
    assert {"training.json", "eval_results.txt"} <= {path.name for path in Path().iterdir()}
    assert (tmp_path / "place-MM" / "eval_results.txt").exists()
    assert "holds other files" in refused(command("export"), ["--trainer_checkpoint", __file__, "--output", "."])
    benchmark = ["training", "--task_name", "mrpc", "--data_dir", "x", "--output", "."]
    assert "--output: . is a folder; name a file" in refused(command("benchmark"), benchmark)


def no_memory(error: Exception):
    def raised(*_, **__):
        raise error

    return raised


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_26_lack_of_memory_is_one_line_that_names_what_helps(error, teacher_flags, student_flags, monkeypatch, capsys):
    for script, argv in (("finetune_bert", teacher_flags()), ("dse_train_runner", student_flags())):
        module = importlib.import_module(script)
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
            patched.setattr(module, "get_task", no_memory(error))
            module.main(argv)
        assert stop.value.code == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        ways = ("the batch size", "--gradient_accumulation_steps", "--bf16", "--gradient_checkpointing")
        assert all(text in told for text in [f"{script}.py: error: out of memory (", *ways])


def test_26_a_head_beyond_memory(student_flags, refused, capsys):
    for changes in ({"fc_dims": [2**63, 1]}, {"additional_embedding_layer_size": 2**63}):
        assert "is above 9223372036854775807" in refused(dse_train_runner.main, student_flags(**changes))
    for sizes in ([2**40, 1], [2**62, 1]):
        with pytest.raises(SystemExit) as stop:
            dse_train_runner.main(student_flags(fc_dims=sizes))
        assert stop.value.code == 1
        assert "take smaller layers" in capsys.readouterr().err.splitlines()[-1]


def test_26_other_errors_are_not_hidden(monkeypatch, teacher_flags):
    monkeypatch.setattr(finetune_bert, "get_task", no_memory(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        finetune_bert.main(teacher_flags())


def dead_part(folder: Path, name: str) -> Path:
    """What a killed process left of a file."""
    part = folder / f".{name}.{2**22 + 1}.part"
    part.write_bytes(b"half")
    return part


def test_20_what_a_kill_left_of_index_json_blocks_nothing(student, tmp_path):
    model, folder = student(), tmp_path / "index"
    CandidateIndex.build(model, ["one", "two"], folder)
    part = dead_part(folder, "index.json")
    CandidateIndex.open(folder, model).append(["three"])
    assert not part.exists()
    dead_part(folder, "index.json")
    assert len(CandidateIndex.build(model, ["one"], folder)) == 1
    assert not list(folder.glob(".*.part"))
    mine = dead_part(folder, "notes.txt")
    with pytest.raises(InputError, match=r"holds other files \(\.notes"):
        CandidateIndex.build(model, ["one"], folder)
    assert mine.exists()


def test_20_a_users_own_part_is_not_ours(tmp_path):
    mine = tmp_path / ".chapter.first.part"
    mine.write_text("mine")
    os.utime(mine, (0, 0))
    files.remove_stale_parts(tmp_path, "*", 0.0)
    assert mine.exists()


def test_25_an_index_that_is_replaced_while_it_is_opened(student, tmp_path, monkeypatch):
    """By a smaller and by a larger one, between index.json and each of the files: all of it is of one index."""
    model, folder = student(), tmp_path / "index"
    read, calls = index_files._read_content, []
    CandidateIndex.build(model, ["one", "two", "three"], folder)
    for texts in (["a"], ["b", "c"] * 5):

        def replaced(place, texts=texts):
            content = read(place)
            if not calls:
                calls.append(1)
                CandidateIndex.build(model, texts, folder)
            return content

        calls.clear()
        monkeypatch.setattr(index_files, "_read_content", replaced)
        opened = CandidateIndex.open(folder, model)
        assert [opened.text(row) for row in range(len(opened))] == texts
    monkeypatch.setattr(index_files, "_read_content", read)
    (folder / "texts.bin").unlink()
    with pytest.raises(InputError, match=r"texts\.bin: missing or truncated"):
        CandidateIndex.open(folder, model)


def test_25_an_open_index_stays_what_it_was(student, tmp_path):
    """One that was built or opened, while others take its place; so does what it saves elsewhere."""
    model, folder = student(), tmp_path / "index"
    built = CandidateIndex.build(model, ["one", "two"], folder)
    opened = CandidateIndex.open(folder, model)
    CandidateIndex.build(model, ["other"] * 7, folder)
    opened.save(tmp_path / "saved")
    for one in (built, opened, CandidateIndex.open(tmp_path / "saved", model)):
        assert sorted(hit.text for hit in one.search("one", 9)) == ["one", "two"]


def test_18_a_names_limit_is_told_in_bytes(tmp_path):
    """130 letters of two bytes, and 14 of the hidden neighbour: a dot before, `.4194304.part` after."""
    with pytest.raises(InputError, match="it has 274 bytes with what this program adds"):
        files.check_name(tmp_path / ("é" * 130), "--output_dir")
    files.check_name(tmp_path / ("e" * 130), "--output_dir")
