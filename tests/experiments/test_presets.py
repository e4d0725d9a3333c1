"""The settings of `python -m dse reproduce`."""

import dse_train_runner
import finetune_bert
from dse.experiments import presets


def test_presets_are_the_settings_of_the_five_commands_and_the_issue():
    large, small = presets.PRESETS["large"], presets.PRESETS["small"]
    assert set(large.seeds) == {"mrpc", "sts-b", "qqp", "qnli", "mnli"}
    assert (large.epochs("teacher"), large.epochs("dse"), large.epochs("logits")) == (3, 8, 1)
    assert small.seeds == {"mrpc": (1, 2), "sts-b": (1, 2), "snli": (1,)}
    for preset in (large, small):  # the scripts take the flags
        finetune_bert.parse_arguments(
            [
                "--data_dir",
                "x",
                "--bert_model",
                "x",
                "--task_name",
                "x",
                "--output_dir",
                "x",
                "--do_train",
                *preset.teacher,
            ]
        )
        dse_train_runner.parse_arguments(
            ["--task_name", "x", "--data_dir", "x", "--distillation_logits_path", "x", *preset.student]
        )
