"""The index: scores of the head on pairs, and the best ones."""

import json
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CANDIDATES, HEADS, OWN_TASK, QUERIES, TRIO, as_flags, flip, made_up, pair_scores
from torch.utils._python_dispatch import TorchDispatchMode

import dse_train_runner
from dse import __main__ as entry
from dse import index as index_module
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments.synthetic import make_pair
from dse.index import CandidateIndex, Hit, rank_scores
from dse.models import DSESiameseClassifier
from dse.networks import heads
from dse.networks.inference import rank_keys, scores_and_rows
from dse.storage import index_files
from dse.storage.logits import logits_identity, save_logits
from dse.system.errors import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.mark.parametrize("extra", [-1, 12])
@pytest.mark.parametrize("fc_dims", [(1,), (8, 1), (8, 4, 1)])
@pytest.mark.parametrize("head", HEADS)
def test_scores_are_the_heads(student, head, fc_dims, extra):
    model = student(**HEADS[head], fc_dims=fc_dims, additional_embedding_layer_size=extra)
    scores = CandidateIndex.build(model, CANDIDATES).score(QUERIES)
    expected = pair_scores(model, QUERIES, CANDIDATES)[..., 0]
    assert scores.shape == (3, 23)
    assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.ptp(expected) > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("head", HEADS)
def test_under_autocast_hits_have_the_scores(student, head):
    index = CandidateIndex.build(student(**HEADS[head]), CANDIDATES[:2])
    scores, hits = index.score(QUERIES[0]), index.search(QUERIES[0])
    with torch.autocast("cpu", torch.bfloat16):
        rounded, found = index.score(QUERIES[0]), index.search(QUERIES[0])
    np.testing.assert_allclose(rounded, scores, rtol=0.1, atol=0.02 * np.abs(scores).max())
    assert [hit.score for hit in found] == sorted(rounded.tolist(), reverse=True)
    assert sorted(hit.row for hit in found) == sorted(hit.row for hit in hits) == [0, 1]


@pytest.mark.parametrize("two", [False, True])
def test_what_is_appended_meanwhile_does_not_count(student, monkeypatch, two):
    """A call sees the index as it was when it began."""
    index = made_up(student)
    monkeypatch.setattr(index_module, "has_bfloat16", lambda device: two)
    monkeypatch.setattr(index_module, "_WORTH_TWO", {"cpu": 0})
    real = index_module._embedded_queries

    def appending(*given):
        index.append(["one more"])
        return real(*given)

    for ask in (index.score, partial(index.score, rows=[2]), partial(index.search, top_k=5)):
        expected, count = np.asarray(ask(QUERIES)), len(index)
        with monkeypatch.context() as patch:
            patch.setattr(index_module, "_embedded_queries", appending)
            np.testing.assert_array_equal(np.asarray(ask(QUERIES)), expected)
        assert len(index) == count + 1


def test_multiclass_ranks_by_the_labels_probability(student):
    model, labels = student("snli"), get_task("snli").labels
    index = CandidateIndex.build(model, CANDIDATES)
    outputs = pair_scores(model, QUERIES, CANDIDATES).astype(np.float64)
    probabilities = np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)
    for label in (None, *labels):
        p = probabilities[..., labels.index(label or "entailment")]
        np.testing.assert_allclose(index.score(QUERIES, label), np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
        assert [hit.row for hit in index.search(QUERIES[0], 2, label)] == np.argsort(-p[0])[:2].tolist()
    with pytest.raises(InputError, match="'neither' is not a label of snli"):
        index.score(QUERIES, "neither")


@pytest.mark.parametrize("top_k", [1, 4, 7, 30])
def test_search_against_sorting_all(student, top_k):
    index = CandidateIndex.build(student(), CANDIDATES)
    for scores, hits in zip(index.score(QUERIES), index.search(QUERIES, top_k), strict=True):
        rows = np.argsort(-scores, kind="stable")[:top_k]
        assert hits == [Hit(scores[row], row, CANDIDATES[row]) for row in rows]
    assert index.search(QUERIES[0], top_k) == index.search(QUERIES[:1], top_k)[0]


def test_of_equals_the_earlier_row_wins():
    """Two blocks whose scores tie across and within them."""
    first = rank_keys(torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]]), torch.arange(5))
    second = rank_keys(torch.tensor([[2.0, 3.0, 2.0]]), torch.arange(5, 8))
    for keys, scores, rows in (
        (first, [2.0, 2.0], [1, 2]),
        (torch.cat([second, first], dim=1), [3.0, 2.0], [6, 1]),
    ):
        found = scores_and_rows(keys.topk(2).values)
        assert [part.tolist() for part in found] == [[scores], [rows]]


def test_keys_order_as_scores_do_and_give_them_back():
    """From both signs, the smallest numbers, both zeros and the last row that a key holds."""
    scores = torch.tensor([[-0.0, 3e38, -1.5, 0.0, 1e-45, -1e-45, -3e38, 2.0, -1.25]])
    for start in (0, (1 << 32) - 9):
        keys = rank_keys(scores, torch.arange(start, start + 9))
        found, rows = scores_and_rows(keys.sort(descending=True).values)
        assert found[0].tolist() == sorted(scores[0].tolist(), reverse=True)
        assert (rows[0] - start).tolist() == [1, 7, 4, 0, 3, 5, 8, 2, 6]


def test_none_and_few_candidates(student):
    model = student()
    empty = CandidateIndex.build(model, [])
    assert (len(empty), empty.search(QUERIES, 3), empty.score(QUERIES[0]).shape) == (0, [[], [], []], (0,))
    empty.append(CANDIDATES[:1])
    assert [hit.row for hit in empty.search(QUERIES[0], 3)] == [0]
    assert empty.search([], 3) == []
    with pytest.raises(ValueError, match="top_k"):
        empty.search(QUERIES, 0)
    with pytest.raises(TypeError, match="top_k: got float, expected a whole number"):
        empty.search(QUERIES, 2.0)


def test_stored_opened_and_appended_is_as_built_at_once(student, tmp_path):
    model = student()
    texts = [*CANDIDATES, "", "tab\there", "a\nb", "ça va ≤ 🙂"]
    whole = CandidateIndex.build(model, texts, tmp_path / "whole")
    grown = CandidateIndex.build(model, iter(texts[:7]), tmp_path / "grown")
    for a, b in ((7, 8), (8, 8), (8, 19), (19, 27)):
        grown.append(texts[a:b])
    again = CandidateIndex.open(tmp_path / "grown", model)
    again.save(tmp_path / "saved")
    saved = CandidateIndex.open(tmp_path / "saved", model)
    for index in (whole, grown, again, saved):
        assert len(index) == 27
        assert [index.text(row) for row in range(27)] == texts
        np.testing.assert_allclose(index.score(QUERIES), whole.score(QUERIES), rtol=1e-5)
    for row in (-1, 27):
        with pytest.raises(IndexError):
            whole.text(row)


def test_half_the_space(student, tmp_path):
    model = student()
    full, half = (CandidateIndex.build(model, CANDIDATES, tmp_path / kind, kind) for kind in ("float32", "float16"))
    sizes = [(tmp_path / kind / "vectors.bin").stat().st_size for kind in ("float32", "float16")]
    assert sizes == [23 * full.width * 4, 23 * full.width * 2]
    np.testing.assert_array_equal(half.vectors(0, 23), full.vectors(0, 23).astype(np.float16))
    assert np.abs(half.score(QUERIES) - full.score(QUERIES)).max() < 0.01 * np.abs(full.score(QUERIES)).max()
    with pytest.raises(ValueError, match="dtype"):
        CandidateIndex.build(model, CANDIDATES, dtype="int8")


def test_another_models_index_is_refused(student, tmp_path):
    CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")
    CandidateIndex.open(tmp_path / "index", student())
    other = student()
    with torch.no_grad():
        other.network.siamese_head.fc_layers[0].bias[0] += 1e-3
    with pytest.raises(InputError, match="another model"):
        CandidateIndex.open(tmp_path / "index", other)


def test_embeddings_that_are_there_already(student):
    model = student()
    parts = [(model.encode(CANDIDATES[a:b]), CANDIDATES[a:b]) for a, b in ((0, 9), (9, 23))]
    index = CandidateIndex.from_embeddings(model, iter(parts))
    np.testing.assert_allclose(index.score(QUERIES), CandidateIndex.build(model, CANDIDATES).score(QUERIES), rtol=1e-4)
    assert [index.text(row) for row in range(23)] == CANDIDATES
    with pytest.raises(ValueError, match="expected"):
        CandidateIndex.from_embeddings(model, [(parts[0][0], CANDIDATES[:8])])


def test_what_is_no_list_of_texts(student, tmp_path):
    model = student()
    with pytest.raises(TypeError, match="got str, expected a list of strings"):
        CandidateIndex.build(model, "candidates.txt")
    with pytest.raises(TypeError, match="number 20: got int"):
        CandidateIndex.build(model, [*CANDIDATES[:20], 3])


def test_numbers_that_are_not_finite_are_not_stored(student, tmp_path):
    model = student()
    vectors = np.full((1, model.network.config.embedding_size), 70_000.0, np.float32)
    assert len(CandidateIndex.from_embeddings(model, [(vectors, ["a"])])) == 1
    for spoiled, dtype in ((vectors, "float16"), (vectors * np.nan, "float32")):
        with pytest.raises(InputError, match="NaN, infinite or, for float16"):
            CandidateIndex.from_embeddings(model, [(spoiled, ["a"])], tmp_path / "index", dtype)
    assert not (tmp_path / "index").exists()


def test_nothing_is_appended_to_another_models_index(student, tmp_path):
    index = CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")
    other = student()
    with torch.no_grad():
        other.network.siamese_head.fc_layers[0].bias[0] += 1e-3
    CandidateIndex.build(other, CANDIDATES[:3], tmp_path / "index")
    with pytest.raises(InputError, match="another model"):
        index.append(["more"])
    assert len(CandidateIndex.open(tmp_path / "index", other)) == 3


def test_embeddings_as_tensors_are_stored_too(student):
    model = student()
    parts = [(model.encode(CANDIDATES[:2], convert_to="tensor"), CANDIDATES[:2])]
    assert len(CandidateIndex.from_embeddings(model, parts)) == 2


def write_rows(path: Path, labels: tuple[str, str], rows: int, seed: int) -> None:
    """Made-up pairs; the first label stands for pairs of one meaning."""
    rng = random.Random(seed)
    lines = ["index\tleft\tright\tverdict"]
    for i in range(rows):
        same, first, second = make_pair(rng)
        lines.append(f"{i}\t{first}\t{second}\t{labels[1 - same]}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", params=["rte", "own"])
def first_label_wanted(request, tmp_path_factory, bert):
    """The `best` of a student that has learned a task whose first label is the wanted one: entailment, or match."""
    folder = tmp_path_factory.mktemp("first_label")
    (folder / "own.json").write_text(json.dumps(OWN_TASK))
    name = "rte" if request.param == "rte" else str(folder / "own.json")
    task = get_task(name)
    for split, rows, seed in (("train", 600, 1), ("dev", 100, 2)):
        write_rows(folder / f"{split}.tsv", task.labels, rows, seed)
    train = read_examples(task, folder, "train")
    of_second = 6.0 * torch.tensor(train.labels) - 3.0
    path = folder / "logits.pt"
    save_logits(path, torch.stack([-of_second, of_second], dim=1), logits_identity(task, train.files, len(train)))
    dse_train_runner.main(as_flags({
        "task_name": name, "data_dir": folder, "distillation_logits_path": path, "bert_model": bert,
        "do_lower_case": True, "max_seq_length": 32, "pooler_num_top_hidden_layers": 2, "fc_dims": [32, 1],
        "epochs": 5, "gradient_accumulation_steps": 1, "lr": 3e-3, "dropout": 0, "store_checkpoints": True,
        "checkpoint_dir": folder / "runs", "log_dir": folder,
    }))  # fmt: skip
    return next((folder / "runs").glob("*/best"))


def test_the_wanted_candidate_ranks_first(first_label_wanted, tmp_path):
    """20 queries, each with its one paraphrase among 20 candidates: in the index, by the command, by probability."""
    model = DSESiameseClassifier.from_pretrained(first_label_wanted)
    rng = random.Random(5)
    pairs = [pair[1:] for pair in (make_pair(rng) for _ in range(60)) if pair[0]][:20]
    queries, candidates = (list(side) for side in zip(*pairs, strict=True))
    found = CandidateIndex.build(model, candidates).search(queries, 20)
    assert sum(hits[0].row == i for i, hits in enumerate(found)) >= 19
    assert sum(hits[-1].row == i for i, hits in enumerate(found)) == 0

    (tmp_path / "q.txt").write_text("\n".join(queries))
    (tmp_path / "c.txt").write_text("\n".join(candidates))
    entry.main(["score", "--model", str(first_label_wanted), "--queries", str(tmp_path / "q.txt"), "--top_k", "1",
                "--candidates", str(tmp_path / "c.txt"), "--output", str(tmp_path / "hits.jsonl")])  # fmt: skip
    hits = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert [hit["row"] for hit in hits] == [hits[0].row for hits in found]
    assert [hit["score"] for hit in hits] == pytest.approx([hits[0].score for hits in found], abs=1e-5)

    everyone = [(queries[0], candidate) for candidate in candidates]
    wanted = model.predict(everyone, probabilities=True)
    assert wanted.argmax() == found[0][0].row
    both = model.predict(everyone, probabilities="all")
    np.testing.assert_array_equal(both[:, 0], wanted)
    np.testing.assert_allclose(both.sum(axis=1), 1, atol=1e-6)
    assert model.predict(everyone)[found[0][0].row] == model.task.labels[0]
    np.testing.assert_allclose(
        1 / (1 + np.exp(-np.array([hit.score for hit in found[0]]))), np.sort(wanted)[::-1], atol=1e-5
    )
    card = (first_label_wanted / "README.md").read_text()
    label = model.task.labels[0]
    assert f"candidates are ranked by the probability of `{label}`" in card
    assert f"`predict(probabilities=True)` gives the probability of `{label}`" in card


def test_rank_scores_by_hand():
    """Log-odds of the rank label; logits (0, ln 2, 0) give entailment p = 2 / 4."""
    outputs = torch.tensor([[2.5], [-1.0]])
    assert rank_scores(outputs, get_task("mrpc")).tolist() == [2.5, -1.0]
    assert rank_scores(outputs, get_task("qnli")).tolist() == [-2.5, 1.0]
    assert rank_scores(outputs, get_task("qnli"), "not_entailment").tolist() == [2.5, -1.0]
    assert rank_scores(outputs, get_task("sts-b")).tolist() == [2.5, -1.0]
    nli = torch.log(torch.tensor([[1.0, 2.0, 1.0], [1.0, 6.0, 1.0]]))
    assert rank_scores(nli, get_task("snli")).tolist() == pytest.approx([0.0, np.log(3)], abs=1e-6)
    # The higher logit is the lower probability where another label's is higher still.
    assert rank_scores(torch.tensor([[0.0, 1.0, 0.0], [9.0, 2.0, 9.0]]), get_task("snli")).argmax() == 0


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(student, spoiled):
    model = student()
    index = CandidateIndex.build(model, TRIO)
    with torch.no_grad():
        model.network.siamese_head.fc_layers[-1].bias.fill_(spoiled)
    for refused in (index.search, index.score):
        with pytest.raises(InputError, match="scores are NaN or infinite"):
            refused("soon")


@pytest.mark.parametrize("sign", [1, -1])
def test_one_score_that_is_not_finite_is_found(student, sign):
    """Only the twelfth candidate's u . v is above the largest float32, and below the best if it is negative."""
    model = student(siamese_head_type="dot", fc_dims=(1,))
    vectors = model.encode(CANDIDATES)
    vectors[11] = sign * 3e38 * np.sign(model.encode(QUERIES[0]))
    index = CandidateIndex.from_embeddings(model, [(vectors, CANDIDATES)])
    for refused in (partial(index.search, top_k=1), index.score):
        with pytest.raises(InputError, match="scores are NaN or infinite"):
            refused(QUERIES[0])


# The way of a GPU, on the CPU: streams do their copies as late as they may


class LateCopies(TorchDispatchMode):
    """A stream of copies, none of which is done before someone waits for it; a copy must wait for the other stream."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.work, self.done, self.free = [], 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        assert self.free, "the buffer is written to while it is used"
        self.free = False
        self.work.append(lambda: args[0].copy_(args[1]))
        return args[0]

    def until(self, count: int) -> None:
        for copy in self.work[self.done : count]:
            copy()
        self.done = max(self.done, count)

    def wait_stream(self, other: object) -> None:
        self.free = True


class InOrder:
    """The stream of all else, which does its work at once."""

    def wait_event(self, event: "Event") -> None:
        event.finish()

    def wait_stream(self, copying: LateCopies) -> None:
        copying.until(len(copying.work))


class Event:
    """A place in a stream of copies; the host must have waited for it before it is recorded again."""

    def __init__(self) -> None:
        self.recorded, self.awaited = None, False

    def record(self, stream: LateCopies) -> None:
        assert self.awaited, "the host's buffer is filled while it is copied"
        self.recorded, self.awaited = (stream, len(stream.work)), False

    def finish(self) -> None:
        if self.recorded:
            self.recorded[0].until(self.recorded[1])

    def synchronize(self) -> None:
        self.finish()
        self.awaited = True


@pytest.fixture
def as_on_cuda(monkeypatch):
    """A function that lets an index score as on a GPU with so much free memory. It gives the streams that are made."""
    made: list[LateCopies] = []

    def stream(*_: object) -> LateCopies:
        made.append(LateCopies())
        return made[-1]

    def begin(free: float) -> list[LateCopies]:
        monkeypatch.setattr(index_files, "_free_memory", lambda device: free)
        monkeypatch.setattr(index_files, "_rows_on_cuda", lambda device, widest: 10)  # two blocks of the files
        monkeypatch.setattr(index_module, "_QUERIES", 64)
        monkeypatch.setattr(heads, "_queries_at_once", lambda candidates, numbers: 2)
        for name, value in (("Stream", stream), ("Event", Event), ("stream", lambda copying: copying)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: InOrder())
        return made

    return begin


FREE = {"held": 1e9, "streamed": 0}


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", HEADS)
def test_a_gpu_finds_what_the_cpu_does(student, as_on_cuda, head, dtype, free):
    """In 70 rows, 7 steps; 40 of them are zeros, so that u . v ties."""
    model = student(**HEADS[head])
    texts = [f"candidate {i}" for i in range(70)]
    vectors = np.random.default_rng(0).standard_normal((70, model.network.config.embedding_size), np.float32)
    vectors[5:65:3] = vectors[1:40:2] = 0
    index = CandidateIndex.from_embeddings(model, [(vectors, texts)], dtype=dtype)
    scores, some, all_of_them = index.score(QUERIES), index.search(QUERIES, 3), index.search(QUERIES[0], 70)
    streams = as_on_cuda(free)
    for _ in range(2):  # the second time from what is held
        np.testing.assert_allclose(index.score(QUERIES), scores, rtol=1e-6, atol=1e-6)
        for found, expected in ((index.search(QUERIES, 3), some), ([index.search(QUERIES[0], 70)], [all_of_them])):
            for hits, others in zip(found, expected, strict=True):
                assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in others], abs=1e-6)
                if head == "dot":
                    assert [hit.row for hit in hits] == [hit.row for hit in others]
    assert len(streams) == (1 if free else 6)
    assert all(len(stream.work) == stream.done == 7 for stream in streams)
    if head == "dot":
        zeros = [row for row in range(70) if not vectors[row].any()]
        assert [hit.row for hit in all_of_them if hit.row in zeros] == zeros


def test_what_a_gpu_holds_follows_the_candidates(student, as_on_cuda):
    model = student(siamese_head_type="dot")
    index = CandidateIndex.build(model, CANDIDATES)
    bytes_needed = 23 * index.width * 4
    streams = as_on_cuda(bytes_needed / 0.6 + 1)
    assert index.search(QUERIES, 30) == index.search(QUERIES, 30)
    assert len(streams) == 1
    index.append(["one more"])  # which no longer fits
    assert [len(index.search(QUERIES[0], 30)) for _ in range(2)] == [24, 24]
    assert len(streams) == 3
    scores = pair_scores(model, QUERIES, [*CANDIDATES, "one more"])[..., 0]
    np.testing.assert_allclose(index.score(QUERIES), scores, rtol=1e-4)
    empty = CandidateIndex.build(model, [])
    assert (empty.search(QUERIES, 3), empty.score(QUERIES).shape) == ([[], [], []], (3, 0))


def test_a_gpus_memory_is_free_after_a_move_to_the_cpu(student):
    index = CandidateIndex.build(student(), CANDIDATES)
    index.embeddings._held = index.files, torch.empty(23, index.width, device="meta")
    assert len(index.search(QUERIES[0], 3)) == 3
    assert index.embeddings._held is None


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
def test_a_gpu_is_given_no_corrupt_block(student, as_on_cuda, tmp_path, free):
    """The last of five is: the copies that are under way end before their memory is another's."""
    CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")
    flip(tmp_path / "index" / "vectors.bin", 1.0)
    index = CandidateIndex.open(tmp_path / "index", student())
    streams = as_on_cuda(free)
    for _ in range(2):
        with pytest.raises(InputError, match="corrupt in rows 20 to 22"):
            index.search(QUERIES[0])
    assert [(len(stream.work), stream.done) for stream in streams] == [(2, 2)] * 2


IDS = [f"id-{row} é" for row in range(len(CANDIDATES))]


def test_ids_are_kept_appended_and_found(student, tmp_path):
    model = student()
    index = CandidateIndex.build(model, CANDIDATES[:9], tmp_path / "index", ids=IDS[:9])
    index.append(iter(CANDIDATES[9:]), ids=iter(IDS[9:]))
    opened = CandidateIndex.open(tmp_path / "index", model)
    for some in (index, opened):
        assert [some.id(row) for row in range(len(CANDIDATES))] == IDS
        assert [(hit.text, hit.id) for hit in some.search(QUERIES[0], 30)] == [
            (CANDIDATES[hit.row], IDS[hit.row]) for hit in some.search(QUERIES[0], 30)
        ]
    opened.save(tmp_path / "copy")
    assert CandidateIndex.open(tmp_path / "copy", model).id(22) == IDS[22]


def test_ids_for_some_of_the_candidates_are_refused(student, tmp_path):
    model, folder = student(), tmp_path / "index"
    for ids in (IDS[:4], IDS[:12]):
        with pytest.raises(ValueError, match=r"ids: (\d for \d texts|more than sentences)"):
            CandidateIndex.build(model, CANDIDATES[:9], folder, ids=ids)
    assert not folder.exists()
    index = CandidateIndex.build(model, CANDIDATES[:9], folder, ids=IDS[:9])
    with pytest.raises(InputError, match="there have ids; give some"):
        index.append(["another"])
    with pytest.raises(ValueError, match="ids: more than sentences"):
        index.append(["another"], ids=["a", "b"])
    assert len(CandidateIndex.open(folder, model)) == 9
    with pytest.raises(InputError, match="there have no ids; give none"):
        CandidateIndex.build(model, CANDIDATES[:3]).append(["another"], ids=["a"])
    with pytest.raises(TypeError, match="ids, number 0: got int"):
        CandidateIndex.build(model, ["a"], ids=[1])


def test_a_shortlist_is_scored_as_all_are(student):
    """In the order given, a row as often as it is given."""
    index, rows = CandidateIndex.build(student(), CANDIDATES), [7, 0, 22, 7]
    np.testing.assert_allclose(index.score(QUERIES, rows=rows), index.score(QUERIES)[:, rows], rtol=1e-5, atol=1e-6)
    assert index.score(QUERIES[0], rows=np.array(rows)).shape == (4,)
    assert index.score(QUERIES, rows=[]).shape == (3, 0)
    for row in (23, -1):
        with pytest.raises(IndexError, match=f"rows: row {row}, but there are 23 candidates"):
            index.score(QUERIES[0], rows=[0, row])
        with pytest.raises(IndexError, match=f"exclude: row {row}, but there are 23 candidates"):
            index.search(QUERIES[0], exclude=[row])
    for mistaken in ([1.9], [True] * 23, 3, [[0, 1], [2, 3]]):
        with pytest.raises(TypeError, match="rows: expected a list of whole numbers, found"):
            index.score(QUERIES[0], rows=mistaken)


def test_rows_that_are_excluded_are_not_found(student):
    index, scores = (
        CandidateIndex.build(student(), CANDIDATES),
        CandidateIndex.build(student(), CANDIDATES).score(QUERIES),
    )
    out = [2, 3, 21, 3]
    for of_query, hits in zip(scores, index.search(QUERIES, 30, exclude=out), strict=True):
        assert [hit.row for hit in hits] == [row for row in np.argsort(-of_query, kind="stable") if row not in out]
    assert index.search(QUERIES[0], exclude=range(23)) == []


def test_least_scores_and_probabilities(student):
    index = CandidateIndex.build(student("rte"), CANDIDATES)
    scores = index.score(QUERIES[0])
    least = float(np.median(scores))
    assert {hit.row for hit in index.search(QUERIES[0], 30, min_score=least)} == set(np.flatnonzero(scores >= least))
    hits = index.search(QUERIES[0], 30, probabilities=True, min_score=1 / (1 + np.exp(-least)) - 1e-9)
    assert len(hits) == (scores >= least).sum()
    for hit in hits:
        assert hit.score == pytest.approx(1 / (1 + np.exp(-scores[hit.row])), rel=1e-6)
    with pytest.raises(ValueError, match="sts-b is a regression, which has none"):
        CandidateIndex.build(student("sts-b"), CANDIDATES).search("a query", probabilities=True)


@pytest.mark.parametrize("task", ["rte", "snli", "sts-b"])
def test_documents_rank_as_in_an_index(student, task, monkeypatch):
    monkeypatch.setattr("dse.models._RANKED_AT_ONCE", 4)
    model = student(task)
    ranked = model.rank(QUERIES[0], CANDIDATES)
    found = CandidateIndex.build(model, CANDIDATES).search(QUERIES[0], 30)
    assert [(hit.row, hit.text) for hit in ranked] == [(hit.row, hit.text) for hit in found]
    np.testing.assert_allclose([hit.score for hit in ranked], [hit.score for hit in found], rtol=1e-5, atol=1e-6)
    assert model.rank(QUERIES[0], iter(CANDIDATES), top_k=3) == ranked[:3]
    assert model.rank(QUERIES[0], []) == []
    if task == "rte":
        label = model.rank(QUERIES[0], CANDIDATES, rank_label="not_entailment", probabilities=True)
        assert [hit.row for hit in label] == [hit.row for hit in ranked][::-1]
        assert label[-1].score == pytest.approx(1 - 1 / (1 + np.exp(-ranked[0].score)), rel=1e-6)
