"""Rows of packed tables taken from the version that is served, where two checkpoints have the same bits."""

from pathlib import Path

from gr.checkpoint.checksums import SUMS
from gr.checkpoint.delta import changed_weights, checkpoint_before, require_same_model
from gr.checkpoint.layout import read_progress
from gr.checkpoint.saved_rows import SavedRows
from gr.errors import ServingError
from gr.files import sha256_of
from gr.serving.package.layout import Manifest, Stored
from gr.serving.package.weights import map_tensors
from gr.serving.package.writer import PackageWriter
from gr.serving.passes.build import Built
from gr.serving.tables.packed import PackedTables


def base_of(checkpoint: Path, since: int, package: PackageWriter, current: Stored, served: Manifest) -> Path:
    """The checkpoint of step `since`, of which the served version is made, of the run of `checkpoint`.

    Its files are not compared with their checksums: a row that damage changed differs, and so is read anew. Raises
    ServingError where another step or another run is served, or a model whose answers need all rows again;
    CheckpointError where the checkpoint of the step is gone.
    """
    step = read_progress(checkpoint)["step"]
    whole = f"gr publish {checkpoint} --to {package.path} publishes it whole"
    if served.kind != "click" or served.cards:
        kind = "tables on cards" if served.cards else f"a {served.kind} model"
        raise ServingError(f"{package.path}: has {kind}, which takes no changed rows; {whole}")
    if served.step != since:
        raise ServingError(f"{package.path}: serves step {served.step}, and --since is {since}; {whole}")
    base = checkpoint_before(checkpoint, since, step)
    if package.sources().get(current.weights) != sha256_of(base / SUMS):
        raise ServingError(f"{package.path}: serves a step {since} that is not {base}; {whole}")
    return base


def take_served_rows(built: Built, base: Path, checkpoint: Path, tensors: Path, served: Manifest) -> None:
    """Fills the tables of passes, which have none: with the served rows, and those that changed since `base`.

    tensors: the file of the served version.
    """
    old, new, stored = SavedRows(base), SavedRows(checkpoint), map_tensors(tensors)
    require_same_model(old, new)
    for name, each in built.passes.items():
        for place, module in each.module.named_modules():
            if isinstance(module, PackedTables):
                changed = {table: changed_weights(old, new, table) for table in built.tables}
                module.take_rows(stored[served.passes[name].tensors[f"{place}.rows"]], changed)
