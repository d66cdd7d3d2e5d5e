"""The configurations that are installed with gr, by name: `retrieval/smoke` is configs/retrieval/smoke.yaml."""

import difflib
import re
from pathlib import Path

# In a clone a link to the top-level folder; in an installed package a folder of its own.
CONFIGS = Path(__file__).parent.parent / "configs"


def names() -> list[str]:
    """All, sorted."""
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


def located(path: Path) -> Path:
    """`path`, or the installed configuration of that name where `path` is no file."""
    if str(path) in names() and not path.is_file():
        return CONFIGS / f"{path}.yaml"
    return path


def hint(path: Path) -> str:
    """The end of `no such file`: a question for the installed configuration of the nearest name, or nothing."""
    known = {Path(name).name: name for name in names()} | {name: name for name in names()}
    asked = str(path.with_suffix("") if path.suffix == ".yaml" else path).removeprefix("configs/")
    near = difflib.get_close_matches(asked, known, n=1)
    if near:
        return f"; did you mean '{known[near[0]]}', which is installed with gr?"
    return "" if path.suffix else "; `gr config list` shows those installed with gr"


def title(name: str) -> str:
    """The first clause of a configuration's comment."""
    words: list[str] = []
    for line in (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#   "):
            break
        words.append(line.removeprefix("# "))
    return re.split(r"[:(]|[.?] ", " ".join(words))[0].strip().rstrip(".")
