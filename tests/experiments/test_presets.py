"""The settings of `python -m dse reproduce`."""

from processes import ROOT

import dse_train_runner
import finetune_bert
from dse.data.tasks import get_task
from dse.experiments import presets


def test_presets_are_the_settings_of_the_five_commands_and_the_issue():
    large, small = presets.PRESETS["large"], presets.PRESETS["small"]
    assert set(large.seeds) == {"mrpc", "sts-b", "qqp", "qnli", "mnli"}
    assert (large.epochs("teacher"), large.epochs("dse"), large.epochs("logits")) == (3, 8, 1)
    assert small.seeds == {"mrpc": (1, 2), "sts-b": (1, 2), "snli": (1,)}
    for preset in (large, small):  # the scripts take the flags
        task, needed = get_task("mrpc"), ["--data_dir", "x", "--task_name", "x", "--bert_model", "x"]
        teacher = preset.flags("teacher", task)
        finetune_bert.parse_arguments([*needed, "--output_dir", "x", "--do_train", *teacher])
        for stage in presets.STUDENTS | presets.VARIANTS:
            flags = preset.flags(stage, task)
            args = dse_train_runner.parse_arguments([*needed, "--distillation_logits_path", "x", *flags])
            assert args.epochs == preset.epochs(stage)


def test_the_flags_of_students():
    small, task = presets.PRESETS["small"], get_task("mrpc")
    thresholds = "0.2 0.25 0.3 0.35 0.4 0.45 0.5 0.55 0.6 0.65 0.7 0.75 0.8 0.85 0.9"
    of_all = f"--epochs 3 --tune_positive_thresholds {thresholds} --fc_dims 512 1 --symmetric"
    dse = f"--siamese_head_type residual --lr 3e-5 --head_lr 1e-3 --dropout 0 --schedule_in_updates {of_all}"
    assert " ".join(small.flags("dse", task)) == dse
    assert " ".join(small.flags("labels_only", task)) == f"{dse} --distillation_coeff 0.0"
    assert " ".join(small.flags("one_rate", task)) == dse.replace(" --head_lr 1e-3", "")
    assert " ".join(small.flags("concat_head", task)) == dse.removeprefix("--siamese_head_type residual ")
    assert " ".join(small.flags("one_order", task)) == dse.removesuffix(" --symmetric")
    assert " ".join(small.flags("defaults", task)) == of_all.removeprefix("--epochs 3 ").removesuffix(" --symmetric")
    ordered = get_task("snli")  # a premise is not its hypothesis
    assert " ".join(small.flags("dse", ordered)) == dse.replace("512 1 --symmetric", "512 3")


def test_the_page_on_data_recommends_the_recipe():
    """Its commands for a user's own task, thresholds aside."""
    text = (ROOT / "dse" / "data" / "README.md").read_text(encoding="utf-8")
    commands = text[text.index("faq.json --data_dir") : text.index("## Feature caches")]
    for name, value in (presets.TEACHER_RECIPE | presets.STUDENT_RECIPE).items():
        if name != "tune_positive_thresholds":
            assert " ".join(presets.as_words({name: value})) in commands
    assert "--symmetric" in commands
