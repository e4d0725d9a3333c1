"""What a student is compared with: its encoder before training, and the Sentence-BERT way to a fast pair scorer.

Sentence-BERT is trained with sentence-transformers:

    binary       OnlineContrastiveLoss; a pair's score is the cosine of its two embeddings
    regression   CosineSimilarityLoss on scores scaled to [0, 1]; the score is the cosine
    multiclass   SoftmaxLoss: a linear layer on [u, v, |u - v|]

Same encoder, mean pooling, same labels, no teacher (Reimers and Gurevych, EMNLP 2019; losses as in the examples of
sentence-transformers). AdamW with linear warm-up and decay, as its `fit` does.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from dse.data.features import in_batches
from dse.data.processors import Examples
from dse.data.tasks import BINARY, MULTICLASS, REGRESSION, Task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.presets import SENTENCE_BERT
from dse.models import DSESiameseClassifier
from dse.networks.config import DSEConfig
from dse.networks.pretrained import bert_config
from dse.networks.student import new_network
from dse.system.files import load_tensors, save_tensors
from dse.training.epoch_plan import count_updates, epoch_order
from dse.training.optimization import NO_DECAY

EPOCHS, PAIRS_PER_UPDATE, RATE, WARMUP, DECAY = SENTENCE_BERT.values()
_LOSSES = {BINARY: "OnlineContrastiveLoss", REGRESSION: "CosineSimilarityLoss", MULTICLASS: "SoftmaxLoss"}
_STATEFUL = ("loss", "optimizer", "schedule")  # attributes of SentenceBert


def mean_encoder(
    folder: Path, lower_case: bool, task: Task, max_seq_length: int, device: torch.device
) -> DSESiameseClassifier:
    """A BERT as downloaded, as a student that only encodes: the mean of the last layer's hidden states, with [CLS].

    Texts are cut at `max_seq_length`, or at the encoder's own positions if there are fewer.
    """
    bert = bert_config(folder, "--bert_model")
    network = new_network(folder, DSEConfig(bert, "mean_top_mean_with_cls", 1)).eval().to(device)
    length = min(max_seq_length, bert.get("max_position_embeddings", max_seq_length))
    return DSESiameseClassifier(network, load_tokenizer(folder, lower_case, "--bert_model"), task, length)


def sentence_transformer(bert_folder: Path, max_seq_length: int, device: str = "cpu", **ways: Any) -> Any:
    """A SentenceTransformer: the same encoder with mean pooling. Needs sentence-transformers (tried with 6.2).

    `ways` are its Transformer's: backend and model_kwargs.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder = Transformer(str(bert_folder), max_seq_length=max_seq_length, **ways)
    pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[encoder, pooling], device=device)


def openvino(bert_folder: Path, max_seq_length: int, precision: str) -> dict[str, Any]:
    """A `sentence_transformer` on OpenVINO, under that name, where it is installed and has the precision.

    "auto" is fp32.
    """
    hint = {"auto": "f32", "fp32": "f32", "bf16": "bf16"}.get(precision)
    if hint is None or not importlib.util.find_spec("optimum") or not importlib.util.find_spec("optimum.intel"):
        return {}
    settings = {"ov_config": {"INFERENCE_PRECISION_HINT": hint}}
    return {"openvino": sentence_transformer(bert_folder, max_seq_length, backend="openvino", model_kwargs=settings)}


class SentenceBert:
    """An encoder and its loss; `seed` decides the order of the rows, dropout and the layer of SoftmaxLoss."""

    def __init__(self, bert_folder: Path, task: Task, max_seq_length: int, seed: int, device: torch.device) -> None:
        from sentence_transformers.sentence_transformer import losses

        torch.manual_seed(seed)
        self.task, self.seed, self.device = task, seed, device
        self.model = sentence_transformer(bert_folder, max_seq_length, str(device))
        sizes = (self.model.get_embedding_dimension(), len(task.labels)) if task.kind == MULTICLASS else ()
        self.embedded: dict[str, Tensor] = {}  # by text, by the model as it is
        self.loss: Any = getattr(losses, _LOSSES[task.kind])(self.model, *sizes).to(device)

    def prepare(self, pairs: int, epochs: int = EPOCHS) -> None:
        """Make the optimizer and its schedule for this number of pairs and epochs."""
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": decay} for decay in (DECAY, 0.0)]
        for name, parameter in self.loss.named_parameters():
            groups[any(part in name for part in NO_DECAY)]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE)
        updates = epochs * count_updates(pairs, PAIRS_PER_UPDATE, 1)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, int(WARMUP * updates), updates)

    @property
    def rate(self) -> float:
        """The rate that the next update will use."""
        return self.schedule.get_last_lr()[0]

    def save(self, path: Path, history: list[dict[str, Any]]) -> None:
        """Write the state after an epoch, and the records of all epochs."""
        parts = {name: getattr(self, name).state_dict() for name in _STATEFUL}
        save_tensors(path, {**parts, "rng": torch.get_rng_state(), "history": history})

    def load(self, path: Path) -> list[dict[str, Any]]:
        """Restore what `save` wrote, and return the epochs' records. Raises InputError for a spoiled file."""
        state = load_tensors(path, f"{path} is spoiled: remove it, and the training of Sentence-BERT begins again")
        for name in _STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return state["history"]

    def train_epoch(self, examples: Examples, epoch: int) -> float:
        """Train on all pairs once, in random order. Returns the mean loss of the updates."""
        from sentence_transformers import util

        self.loss.train()
        self.embedded.clear()
        labels, losses = torch.tensor(examples.labels), []
        if self.task.kind == REGRESSION:
            labels = (labels - labels.min()) / (labels.max() - labels.min())
        batches = in_batches(epoch_order(len(examples), self.seed, epoch), PAIRS_PER_UPDATE)
        for rows in tqdm(batches, desc=f"Sentence-BERT, epoch {epoch}", disable=None, leave=False):
            sides = [
                util.batch_to_device(self.model.preprocess([texts[row] for row in rows]), self.device)
                for texts in examples.sides
            ]
            loss = self.loss(sides, labels[rows].to(self.device))
            loss.backward()
            nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.schedule.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> Tensor:
        """(texts, size) embeddings, float32; a text is embedded once after each epoch."""
        new = [text for text in dict.fromkeys(texts) if text not in self.embedded]
        if new:
            embeddings = self.model.encode(new, convert_to_tensor=True, show_progress_bar=False)
            self.embedded |= zip(new, embeddings, strict=True)
        return torch.stack([self.embedded[text] for text in texts])

    @torch.inference_mode()
    def score(self, examples: Examples) -> np.ndarray:
        """(pairs, 1) cosines, or (pairs, labels) logits, float32."""
        self.loss.eval()
        u, v = self.embed([*examples.first, *(examples.second or [])]).chunk(2)
        if self.task.kind != MULTICLASS:
            return torch.cosine_similarity(u, v)[:, None].cpu().numpy()
        return self.loss.classifier(torch.cat([u, v, (u - v).abs()], dim=1)).cpu().numpy()
