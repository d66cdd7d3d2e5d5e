"""Where two configurations differ, as a run that resumes says it."""

from pathlib import Path

from gr.config.diff import differences
from tests.support.gate import GateConfig
from tests.support.tiny import tiny_config


def test_callbacks_of_plugins_are_shown():
    before = tiny_config(Path("data"), Path("run"))
    now = before.model_copy(update={"callbacks": (GateConfig(kind="gate", after=3, opened="here"),)})
    assert differences(before, now) == {"callbacks": ("[]", '[{"kind": "gate", "after": 3, "opened": "here"}]')}
