"""Inference in steps: places of a step, the order of rows, rows that are done already."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import LENGTHS, random_student, separate_rows

from dse.networks import inference
from dse.networks.batches import Batches
from dse.networks.encoder import products
from dse.networks.inference import by_length, embed_texts, infer, infer_pairs
from dse.system import files, parallel
from dse.system.errors import RunError

CPU = torch.device("cpu")


def test_each_text_is_embedded_once_and_pairs_keep_their_order():
    model, batches = random_student(), Batches(separate_rows())
    expected = infer(model, batches, 3, torch.device("cpu"), "pairs")
    seen = []
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.extend(inputs["packed"].starts.tolist()), with_kwargs=True
    )
    batches.padding = "packed"
    outputs = infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert len(seen) == len(LENGTHS)
    embeddings = embed_texts(model, batches, 3, torch.device("cpu"), "texts")
    with torch.inference_mode():
        alone = model.embed(**batches.of_texts(np.array([4])))
    np.testing.assert_allclose(embeddings[4], alone[0], atol=1e-5)


def pairs_that_share_texts() -> Batches:
    """Texts 0 to 10; four of the seven pairs have a text in common with the pair before, and one has a text twice."""
    features = separate_rows()
    features.first, features.second = np.array([[9, 9, 2, 2, 4, 10, 7], [1, 2, 0, 8, 4, 4, 3]], dtype=np.int32)
    features.labels = np.arange(7)
    return Batches(features, "packed", 16)


def test_a_block_of_pairs_has_its_own_texts_alone():
    features = pairs_that_share_texts().features
    some = features.block(slice(2, 5))
    lengths = [LENGTHS[text] for text in (0, 2, 4, 8)]
    assert some.texts.lengths.tolist() == lengths
    assert (some.first.tolist(), some.second.tolist()) == ([1, 1, 2], [0, 3, 2])
    assert some.labels.tolist() == [2, 3, 4]
    for row, text in enumerate((0, 2, 4, 8)):
        ours, theirs = (x.ids[x.offsets[i] : x.offsets[i + 1]] for x, i in ((some.texts, row), (features.texts, text)))
        assert ours.tolist() == theirs.tolist()
    nothing = features.block(slice(7, 7))
    assert (len(nothing), nothing.texts.offsets.tolist()) == (0, [0])


@pytest.mark.parametrize(("processes", "texts"), [(2, [4, 6]), (3, [3, 3, 4]), (9, [0, 2, 2, 2, 0, 2, 1, 2, 2])])
def test_processes_share_the_pairs(processes, texts, monkeypatch):
    """Pairs 0-2 and 3-6; 0-1, 2-3 and 4-6; of 9 processes two have none. Each embeds its own texts, once."""
    model, batches, seen = random_student(), pairs_that_share_texts(), []
    expected = infer_pairs(model, batches, 3, CPU, "texts")
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["packed"].starts)), with_kwargs=True
    )
    reduced = []
    monkeypatch.setattr(parallel, "size", lambda: processes if parallel._device else 1)
    monkeypatch.setattr(parallel, "summed", lambda values: reduced.append(values) or values)
    embedded = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "_device", CPU)
        infer_pairs(model, batches, 3, CPU, "texts")
        assert parallel.size() == processes
        embedded.append(sum(seen))
        seen.clear()
    whole = [values for values in reduced if values.shape == expected.shape]
    assert len(whole) == processes
    np.testing.assert_allclose(sum(whole), expected, atol=1e-6)
    assert embedded == texts
    assert {values.shape for values in reduced} == {expected.shape, (1,)}, "more than outputs was sent"


def test_no_step_has_more_than_its_tokens():
    costs = np.random.default_rng(0).integers(2, 60, 500)
    batches = by_length(costs, 100)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(rows) * costs[rows].max() <= 100 for rows in batches)
    assert by_length(np.array([500]), 100)[0].tolist() == [0]


@pytest.mark.parametrize("root", [True, False])
def test_each_module_keeps_its_own_mode(root):
    """A part that its user put into another mode than the rest is in that mode again after an inference."""
    model = random_student(hidden_dropout_prob=0.5).train(root)
    model.encoder.train(not root)
    before, during = [part.training for part in model.modules()], []
    model.siamese_head.register_forward_pre_hook(lambda *_: during.extend(part.training for part in model.modules()))
    assert len(set(before)) == 2
    infer_pairs(model, Batches(separate_rows(), "packed"), 4, torch.device("cpu"), "test")
    assert during
    assert not any(during)
    assert [part.training for part in model.modules()] == before


def test_the_precision_of_products_is_one_threads_at_a_time():
    """It is the process's setting: a thread that ends last must not leave another's behind."""
    cuda, seen = torch.device("cuda"), []
    inside = threading.Event()

    def other() -> None:
        inside.set()
        with products("fp32", cuda):
            seen.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    with products("auto", cuda):
        thread.start()
        assert inside.wait(5)
        thread.join(timeout=0.2)
        assert thread.is_alive(), "it did not wait"
        assert torch.get_float32_matmul_precision() == "high"
    thread.join()
    assert seen == ["highest"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_module_hears_of_each_change_of_its_mode():
    """One that puts weights together for evaluation, say, and apart again for training."""

    class Merging(torch.nn.Linear):
        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            return super().train(mode)

    model = Merging(1, 1).train()
    with inference._inference(model):
        assert model.merged
    assert not model.merged


def test_other_models_do_not_wait():
    """Nor a thread for one that has ended, as in a forked child."""
    training, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).eval()

    def in_a_thread(model: torch.nn.Module) -> threading.Thread:
        def use() -> None:
            with inference._inference(model):
                modes.append(model.training)

        modes: list[bool] = []
        (thread := threading.Thread(target=use, daemon=True)).start()
        thread.join(5)
        assert modes == [False]
        return thread

    with inference._inference(training), inference._inference(training):
        assert not training.training
        ended = in_a_thread(other)
    assert training.training
    inference._TURNED[training] = ended
    in_a_thread(training)
    assert training.training
    assert not inference._TURNED


def test_pairs_are_scored_in_parts_as_at_once(monkeypatch):
    model, batches = random_student(), Batches(separate_rows())
    expected = infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    monkeypatch.setattr(inference, "_PAIRS_PER_STEP", 4)
    outputs = infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert np.ptp(expected) > 0.1


def test_the_places_of_a_step():
    """By length 12 12 9 7 7 6 5 4 3 3 2; three pairs of 16 + 16 are 96 places, 8 x 12; three texts of 16 are 4 x 12."""
    model, batches, seen = random_student(), Batches(separate_rows(), "packed", 16), []
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["packed"].starts)), with_kwargs=True
    )
    infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    assert seen == [8, 3]
    seen.clear()
    embed_texts(model, batches, 3, torch.device("cpu"), "texts")
    assert seen == [4, 6, 1]  # 48 places: 4 x 12, then 6 x 7, then the rest


def test_no_step_has_more_places_than_gain_anything():
    """Of 1,000 texts of 16 places a step might hold 600 texts of 12; 4,096 places, whatever the flag, are 341 x 12."""
    model, batches, seen = random_student(), Batches(separate_rows([12] * 600), "packed", 16), []
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["packed"].starts)), with_kwargs=True
    )
    embed_texts(model, batches, 1000, torch.device("cpu"), "texts")
    assert seen == [341, 259]


def run_steps(progress: inference.PartialOutputs | None, computed: list[int], costs: list[int]) -> np.ndarray:
    """Outputs that are each row's number plus 1, in steps of at most 8 places; which rows were computed."""

    def batch(rows: np.ndarray, device: torch.device) -> dict:
        computed.extend(rows.tolist())
        return {"rows": torch.from_numpy(rows)}

    def forward(rows: torch.Tensor) -> torch.Tensor:
        return rows.unsqueeze(1).float() + 1

    model = torch.nn.Identity()
    model.forward = forward
    batches = SimpleNamespace(features=SimpleNamespace(costs=np.array(costs)), of_pairs=batch, max_seq_length=8)
    return inference.infer(model, batches, 1, CPU, "x", progress, show=False)


def test_rows_that_are_done_are_stored_and_no_others(tmp_path):
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


def test_a_row_that_no_process_computed_is_not_written(monkeypatch, tmp_path):
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
    with pytest.raises(RunError, match="x: 1 rows were not computed, such as row 2"):
        run_steps(None, [], [1, 1, 1, 1])
