"""What a reproduction runs: its stages, the flags that each preset gives the scripts, the settings of Sentence-BERT."""

from typing import Any, NamedTuple

from dse.data.tasks import Task

Flags = dict[str, Any]  # of a script, by name: None leaves a flag out, True gives a switch
# Students by stage, and how their flags differ from those of the preset.
STUDENTS: dict[str, Flags] = {
    "dse": {},
    "labels_only": {"distillation_coeff": 0.0},
    "logits_only": {"distillation_coeff": 1.0},
}
TEACHER = "the teacher"  # as the value of --bert_model: the folder of the same task and seed
VARIANTS: dict[str, Flags] = {  # made with --variants alone: each shows what one choice of the preset is worth
    "concat_head": {"siamese_head_type": None},
    "one_order": {"symmetric": None},
    "with_dropout": {"dropout": None},
    "one_rate": {"head_lr": None},
    "schedule_in_batches": {"schedule_in_updates": None},
    "top_layer": {"pooler_type": "mean_top_mean_with_cls", "pooler_num_top_hidden_layers": 1},
    "from_teacher": {"bert_model": TEACHER},
    "defaults": dict.fromkeys(
        ("siamese_head_type", "symmetric", "lr", "head_lr", "dropout", "schedule_in_updates", "epochs")
    ),
}
# The stages in order, and for each the stages whose files it reads.
STAGES: dict[str, tuple[str, ...]] = {
    "teacher": (), "logits": ("teacher",), **dict.fromkeys(STUDENTS, ("logits",)),
    **dict.fromkeys(VARIANTS, ("logits",)), "from_teacher": ("teacher", "logits"),
    "sentence_bert": (), "encoder": (), "rates": ("teacher", *STUDENTS),
}  # fmt: skip
OPTIONAL = ("sentence_bert", "encoder", *VARIANTS)
SENTENCE_BERT: dict[str, Any] = {"epochs": 4, "pairs_per_update": 32, "rate": 5e-5, "warmup": 0.1, "decay": 0.01}


class Preset(NamedTuple):
    """What is run: seeds by task, and the scripts' flags beyond data, model, paths and the head's last size."""

    seeds: dict[str, tuple[int, ...]]
    teacher: Flags
    student: Flags
    max_seq_length: int = 128
    symmetric: tuple[str, ...] = ()  # tasks whose students get --symmetric: the texts of a pair may change places

    def flags(self, stage: str, task: Task) -> list[str]:
        """The flags of a stage's script."""
        changes = (STUDENTS | VARIANTS).get(stage)
        if changes is None:
            return as_words(self.teacher)
        of_task = {"fc_dims": ("512", task.num_student_outputs), "symmetric": task.name in self.symmetric or None}
        return as_words({**self.student, **of_task, **changes})

    def epochs(self, stage: str) -> int:
        """Passes over the training pairs; a stage that trains nothing makes one."""
        if stage == "teacher":
            return int(self.teacher.get("num_train_epochs", 3))
        changes = (STUDENTS | VARIANTS).get(stage)
        return 1 if changes is None else int({**self.student, **changes}.get("epochs") or 5)

    @property
    def top_layers(self) -> int:
        """The number of the encoder's layers that a student's pooler takes."""
        return int(self.student.get("pooler_num_top_hidden_layers", 4))


def as_words(flags: Flags) -> list[str]:
    """Flags as a script takes them.

    >>> as_words({"lr": "2e-5", "dropout": None, "resume": True, "fc_dims": (512, 1)})
    ['--lr', '2e-5', '--resume', '--fc_dims', '512', '1']
    """
    words = []
    for name, value in flags.items():
        if value is not None:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *map(str, values)]
    return words


# The recommended recipe: what the scripts are given where their defaults, the paper's settings, need not be kept.
# BertAdam has no bias correction: its steps are 1 / sqrt(1 - 0.999^n) times Adam's, 3.2 times after 100 updates and
# 1.7 times after 400, so an encoder needs a low rate. An untrained head needs a high one. Dropout is drawn for u and v
# apart, so |u - v| in training is not the quantity that is used (TRIED.md).
TEACHER_RECIPE: Flags = {"learning_rate": "2e-5", "num_train_epochs": 4, "train_batch_size": 16}
STUDENT_RECIPE: Flags = {
    "siamese_head_type": "residual", "lr": "3e-5", "head_lr": "1e-3", "dropout": 0, "schedule_in_updates": True,
    "epochs": 3, "tune_positive_thresholds": tuple(f"{threshold / 20:g}" for threshold in range(4, 19)),
}  # fmt: skip
PRESETS = {
    "small": Preset(
        {"mrpc": (1, 2), "sts-b": (1, 2), "snli": (1,)}, TEACHER_RECIPE, STUDENT_RECIPE,
        symmetric=("mrpc", "qqp", "sts-b"),
    ),
    "large": Preset(
        dict.fromkeys(("mrpc", "sts-b", "qqp", "qnli", "mnli"), (42,)),
        teacher={"learning_rate": "2e-5", "num_train_epochs": 3, "gradient_accumulation_steps": 2},
        student={"epochs": 8},
    ),
}  # fmt: skip
