"""What a reproduction runs: its stages, the flags that each preset gives the scripts, the settings of Sentence-BERT."""

from typing import Any, NamedTuple

from dse.data.tasks import Task

STUDENTS = {"dse": "", "labels_only": "--distillation_coeff 0.0", "logits_only": "--distillation_coeff 1.0"}  # by stage
# The stages in order, and for each the stages whose files it reads.
STAGES: dict[str, tuple[str, ...]] = {
    "teacher": (), "logits": ("teacher",), **dict.fromkeys(STUDENTS, ("logits",)),
    "sentence_bert": (), "rates": ("teacher", *STUDENTS),
}  # fmt: skip
OPTIONAL = ("sentence_bert",)
SENTENCE_BERT: dict[str, Any] = {"epochs": 4, "pairs_per_update": 32, "rate": 5e-5, "warmup": 0.1, "decay": 0.01}


class Preset(NamedTuple):
    """What is run: seeds by task, and the scripts' flags beyond data, model, paths and the head's last size."""

    seeds: dict[str, tuple[int, ...]]
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    max_seq_length: int = 128

    def flags(self, stage: str, task: Task) -> list[str]:
        """The flags of a stage's script; a control has another coefficient."""
        if stage not in STUDENTS:
            return list(self.teacher)
        return [*self.student, "--fc_dims", "512", str(task.num_student_outputs), *STUDENTS[stage].split()]

    def epochs(self, stage: str) -> int:
        """Passes over the training pairs; a stage that trains nothing makes one."""
        if stage == "teacher":
            return int(_value_of(self.teacher, "--num_train_epochs", "3"))
        return int(_value_of(self.student, "--epochs", "5")) if stage in STUDENTS else 1

    @property
    def top_layers(self) -> int:
        """The number of the encoder's layers that a student's pooler takes."""
        return int(_value_of(self.student, "--pooler_num_top_hidden_layers", "4"))


def _value_of(flags: tuple[str, ...], flag: str, default: str) -> str:
    return flags[flags.index(flag) + 1] if flag in flags else default


PRESETS = {
    # BertAdam has no bias correction: its steps are 1 / sqrt(1 - 0.999^n) times Adam's, 3.2 times after 100 updates and
    # 1.7 times after 400, so an encoder needs a low rate. An untrained head needs a high one. Dropout is drawn for u
    # and v apart, so |u - v| in training is not the quantity that is used (README, "What decides the quality").
    "small": Preset(
        {"mrpc": (1, 2), "sts-b": (1, 2), "snli": (1,)},
        teacher=("--learning_rate", "2e-5", "--num_train_epochs", "4", "--train_batch_size", "16"),
        student=(
            *("--lr", "3e-5", "--head_lr", "1e-3", "--dropout", "0", "--schedule_in_updates", "--epochs", "3"),
            *("--tune_positive_thresholds", *(f"{threshold / 20:g}" for threshold in range(4, 19))),
        ),
    ),
    "large": Preset(
        dict.fromkeys(("mrpc", "sts-b", "qqp", "qnli", "mnli"), (42,)),
        teacher=("--learning_rate", "2e-5", "--num_train_epochs", "3", "--gradient_accumulation_steps", "2"),
        student=("--epochs", "8"),
    ),
}
