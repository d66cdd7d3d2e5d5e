"""Files that a reader never sees half of."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` at once, and makes what it holds survive a power failure."""
    draft = path.with_name(f".{path.name}")
    with draft.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
