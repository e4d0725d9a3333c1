"""A trained student as a folder that loads without flags, here or from the hub.

    config.json           architecture, task, labels in order, score, length, casing, where it came from, hashes
    model.safetensors     all weights, under the names of a checkpoint's state dict
    tokenizer.json, …     the tokenizer, as transformers saves it
    README.md             the model card: metrics, commands, how to use it
    modules.json          for sentence-transformers: the class that stands for the student there

Hashes of weights and tokenizer are compared at loading, so a corrupt file is found. Nothing is unpickled.
"""

import contextlib
import hashlib
import logging
import shlex
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

from dse import __version__
from dse.data.tasks import BINARY, DEFAULT_THRESHOLD, SCORES, at_threshold, ranked_label, task_from_dict, task_to_dict
from dse.data.tokenizers import tokenizer_in, tokenizer_key
from dse.networks.config import DSEConfig
from dse.networks.kernels import is_plain
from dse.networks.student import SiameseNetwork, Student, empty_network
from dse.storage.checkpoint import Checkpoint
from dse.storage.folder_format import FolderFormat
from dse.system.errors import InputError, RunError, one_line
from dse.system.files import json_text, replace_folder, sha256_file, sha256_json

logger = logging.getLogger(__name__)

FORMAT = "dse student"
BEST = "best"  # folder of the best epoch's student, in a run's
CONFIG, WEIGHTS, CARD, MODULES = "config.json", "model.safetensors", "README.md", "modules.json"
_MODULE = {"idx": 0, "name": "0", "path": "", "type": "dse.models.SentenceTransformerModule"}
_LOADED = (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_FORMAT = FolderFormat(
    "student", FORMAT, 2, CONFIG, (*_LOADED, CARD, MODULES, "added_tokens.json"),
    "fetch the folder again, or make one from a checkpoint with `python -m dse export`",
)  # fmt: skip
check_replaceable, read_config = _FORMAT.check_place, _FORMAT.read


def write_student(student: Student, folder: Path) -> None:
    """Write a student to a folder, whole; an earlier student there is replaced.

    Raises InputError for a folder with other files in it, or a network with wrapped or quantized layers.
    """
    check_replaceable(folder, str(folder))
    network, task, tokenizer = student.network, student.task, student.tokenizer
    with torch.device("meta"):
        names = empty_network(network.config).state_dict().keys()
    if network.state_dict().keys() != names:
        raise InputError(f"{folder}: not written, as the student has wrapped layers: merge them first")
    with replace_folder(folder) as beside:
        save_file(_weights_of(network), beside / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(beside)
        about = {
            "dse_version": __version__,
            "architecture": network.config.to_dict(),
            "task": task_to_dict(task, ranks=True),
            "labels": list(task.labels),
            "score_name": SCORES[task.kind],
            "max_seq_length": student.max_seq_length,
            "threshold": student.threshold,
            "do_lower_case": tokenizer.backend_tokenizer.normalizer.lowercase,
            "weights_sha256": sha256_file(beside / WEIGHTS),
            "tokenizer_sha256": tokenizer_key(tokenizer),
            "origin": student.origin,
        }
        (beside / CONFIG).write_text(_FORMAT.text(about, indent=2, ensure_ascii=False), encoding="utf-8")
        (beside / CARD).write_text(model_card(student), encoding="utf-8")
        (beside / MODULES).write_text(json_text([_MODULE]) + "\n", encoding="utf-8")


def read_student(
    name: str | Path, revision: str | None = None, token: str | bool | None = None,
    cache_dir: str | Path | None = None, local_files_only: bool = False,
) -> Student:  # fmt: skip
    """A student in evaluation mode on the CPU, float32.

    `name` is a folder that `write_student` wrote, a run's folder (of which the best epoch counts), a checkpoint's file,
    or a name on the hub. Raises InputError for a folder that holds no student, or one that is incomplete, corrupt or of
    another version.
    """
    folder = find_student(name)
    if folder.suffix == ".pt" and folder.is_file():
        return Checkpoint.read(folder, "the student").student()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{name}: is a file, not a student's folder or a checkpoint; {_FORMAT.mend}")
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(
                str(name), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
                allow_patterns=[CONFIG, *_LOADED],
            ))  # fmt: skip
        except (OSError, ValueError) as error:  # ValueError: it cannot be a name on the hub
            why = f"is not a local folder, and the hub did not provide a student ({one_line(error)}); {_FORMAT.mend}"
            raise InputError(f"{name}: {why}") from error
    config, tokenizer, weights = read_config(folder), tokenizer_in(folder), folder / WEIGHTS
    if tokenizer_key(tokenizer) != config["tokenizer_sha256"]:
        raise InputError(f"{folder}: its tokenizer is not the one that was saved with it; fetch the folder again")
    if not weights.is_file():
        raise InputError(f"{folder}: {WEIGHTS} is missing; {_FORMAT.mend}")
    if sha256_file(weights) != config["weights_sha256"]:
        raise InputError(f"{weights}: corrupt or of another student (its SHA-256 differs); {_FORMAT.mend}")
    try:
        network = empty_network(DSEConfig.from_dict(config["architecture"]))
        network.load_state_dict(load_file(weights))
        task = task_from_dict(config["task"])
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{folder}: {CONFIG} and {WEIGHTS} do not fit together ({one_line(error)})") from error
    threshold = config.get("threshold", DEFAULT_THRESHOLD)
    return Student(network.eval(), tokenizer, task, config["max_seq_length"], threshold, config.get("origin") or {})


def _weights_of(network: SiameseNetwork) -> dict[str, torch.Tensor]:
    """A student's weights by name, on the CPU. Raises InputError if one is not a plain tensor, e.g. quantized."""
    state = network.state_dict()
    for name, tensor in state.items():
        if type(tensor) is not torch.Tensor or tensor.is_quantized:
            raise InputError(f"{name}: not a plain tensor; a quantized student cannot be saved or indexed")
    return {name: tensor.cpu().contiguous() for name, tensor in sorted(state.items())}


def fingerprint(student: Student) -> str:
    """SHA-256 of all that determines a student's embeddings and scores: weights, architecture, tokenizer, length."""
    digest = hashlib.sha256()
    for name, tensor in _weights_of(student.network).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    architecture = student.network.config.to_dict()
    if not architecture["symmetric"]:
        del architecture["symmetric"]  # as before there was one
    bert = architecture.pop("bert")  # of which another version of transformers may know more
    bert = {key: bert[key] for key in ("num_attention_heads", "hidden_act", "layer_norm_eps")}
    about = [architecture, bert, tokenizer_key(student.tokenizer), student.max_seq_length]
    if not is_plain(student.network):
        logger.warning("the student has hooks or wrapped layers: an index cannot check whether they stay the same")
        about.append("not plain")
    digest.update(sha256_json(about).encode())
    return digest.hexdigest()


def told_by(folder: Path) -> dict[str, Any]:
    """A student's `origin`, as its folder records it; {} for another folder, or one that records none."""
    with contextlib.suppress(InputError):
        return read_config(folder).get("origin") or {}
    return {}


def best_folders(run: Path) -> list[Path]:
    """Where the best epoch's student may be in a run folder; other things may be there, too (see `told_by`)."""
    return [run / BEST, *(path for path in run.glob(f"{BEST}_epoch_*") if path.name.rpartition("_")[2].isdecimal())]


def find_student(name: str | Path) -> Path:
    """The path of a student: the best epoch if `name` is a run's folder, else `name` itself."""
    path = Path(name).expanduser()
    if (path / CONFIG).exists() or not path.is_dir():
        return path
    # `best`, or a folder beside it if `best` could not be replaced
    epochs = {epoch: folder for folder in best_folders(path) if (epoch := told_by(folder).get("epoch")) is not None}
    return epochs[max(epochs)] if epochs else path


def save_best(student: Student, run: Path) -> None:
    """Write the best epoch's student into a run folder, in place of those of earlier epochs.

    Its folder is `best`, or `best_epoch_<n>` if `best` holds other files or another run's student.
    """
    origin = student.origin
    for place in (run / BEST, run / f"{BEST}_epoch_{origin['epoch']}"):
        told = told_by(place)
        # What was written before there were stamps is this run's if the same command wrote it.
        key = "stamp" if "stamp" in told else "commands"
        try:
            if (place / CONFIG).exists() and told.get(key) != origin[key]:
                raise InputError(f"{place} holds another run's student, which is kept")
            write_student(student, place)
        except (InputError, RunError) as error:
            logger.warning("the student of the best epoch so far, %d, is saved elsewhere: %s", origin["epoch"], error)
        else:
            _remove_older_best(run, place, origin["stamp"])
            logger.info("student of the best epoch so far, %d: %s", origin["epoch"], place)
            return


def mend_best(run: Path, epoch: int, stamp: str, checkpoint: Path | None) -> None:
    """Write the best epoch's student of a run, unless it is there or that epoch's checkpoint or state is gone.

    It may be missing after a stop, or because another epoch has become the best.
    """
    wanted = {"epoch": epoch, "stamp": stamp}.items()
    found = [place for place in best_folders(run) if wanted <= told_by(place).items()]
    if found:
        _remove_older_best(run, found[0], stamp)
    elif checkpoint is not None and checkpoint.is_file():
        save_best(Checkpoint.read(checkpoint).student(), run)


def _remove_older_best(run: Path, newest: Path, stamp: str) -> None:
    """Remove a run's students of earlier epochs that could not be replaced, so that none is taken for the best."""
    for place in best_folders(run):
        if place != newest and told_by(place).get("stamp") == stamp:
            with contextlib.suppress(OSError):
                for name in (*_FORMAT.others, CONFIG):  # without which it is not a student's folder
                    (place / name).unlink(missing_ok=True)
                place.rmdir()  # unless others' files are in it


def model_card(student: Student) -> str:
    """README.md of a student: YAML for the hub, metrics, use, commands."""
    origin = student.origin
    parts = [
        "---\nlibrary_name: dse\npipeline_tag: sentence-similarity\ntags:\n- sentence-similarity\n"
        "- distilled-sentence-embedding\n- knowledge-distillation\n---",
        f"# A DSE student for {student.task.name}",
        "It embeds each sentence alone and scores a pair with a small head over the two embeddings (Barkan et al., "
        '"Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding", AAAI 2020).',
        "\n".join(f"- {fact}" for fact in _facts(student)),
        "## Use\n\n```python\nfrom dse.models import DSESiameseClassifier\n\n"
        'model = DSESiameseClassifier.from_pretrained("FOLDER_OR_HUB_NAME")\n'
        'embeddings = model.encode(["A sentence.", "Another one."])\n'
        'scores = model.score([("A sentence.", "Another one.")])\n```',
    ]
    if metrics := at_threshold(origin.get("metrics") or {}):
        parts.append(f"## Metrics on the validation data, epoch {origin.get('epoch')}")
        rows = [("metric", "value"), ("---", "---"), *((name, f"{value:.4f}") for name, value in metrics.items())]
        parts.append("\n".join(f"| {name} | {value} |" for name, value in rows))
    if commands := origin.get("commands"):
        lines = "\n".join(command_line(script, flags, full_paths=False) for script, flags in commands)
        parts.append(f"## Commands\n\n```\n{lines}\n```")
        if sha256 := origin.get("logits_sha256"):
            parts.append(f"SHA-256 of the logits: {sha256}")
    return "\n\n".join(parts) + "\n"


def _facts(student: Student) -> list[str]:
    """What a student is, and what its scores, probabilities and labels mean."""
    task, config = student.task, student.network.config
    labels = f", labels in order: {', '.join(task.labels)}" if task.labels else ""
    casing = "uncased" if student.tokenizer.backend_tokenizer.normalizer.lowercase else "cased"
    try:
        ranked = f"`{ranked_label(task)}`"
    except InputError:  # nothing says which: a search has to
        ranked = "the label that `rank_label` names"
    facts = [
        f"task: {task.name} ({task.kind}{labels})",
        f"encoder: BERT, {config.bert['num_hidden_layers']} layers of size {config.bert['hidden_size']}, {casing}; at "
        f"most {student.max_seq_length} tokens per sentence",
        f"pooler: `{config.pooler_type}`, over the top {config.pooler_num_top_hidden_layers} layers; head: "
        f"`{config.siamese_head_type}`, with layers of sizes {', '.join(map(str, config.fc_dims))}"
        f"{', the mean of both orders' * config.symmetric}",
        f"candidates are ranked by {'the probability of ' + ranked if labels else 'the score'}",
    ]
    if task.kind == BINARY:
        facts += [
            f"`score` gives the logit of `{task.labels[1]}`; `predict(probabilities=True)` gives the probability of "
            f'{ranked}, and `predict(probabilities="all")` those of both labels',
            f"`predict` gives `{task.labels[1]}` if its probability is above {student.threshold}",
        ]
    return facts


def command_line(script: str, flags: dict[str, Any], full_paths: bool = True) -> str:
    """The command line that gives a script these flags; without `full_paths`, absolute paths lose their folders."""
    words = ["python", script]
    for flag, value in flags.items():
        if not full_paths and isinstance(value, str) and Path(value).is_absolute():
            value = Path(value).name  # where a user keeps files is nobody else's business
        if value is True:
            words.append(f"--{flag}")
        elif value is not False and value is not None and value != "":  # 0 is a value
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return shlex.join(words)
