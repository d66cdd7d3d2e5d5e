"""One version of a package, opened: compiled passes over mapped weights, and what can be asked of them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from gr.config.base import import_target
from gr.errors import InstallError, ServingError
from gr.ops import cpp_extension
from gr.serving.package.layout import (
    CODE,
    GOLDEN,
    OPERATORS,
    TENSORS,
    WEIGHTS,
    Manifest,
    Stored,
    read_current,
    read_manifest,
    verify,
)
from gr.serving.package.machine import require_this_machine
from gr.serving.package.weights import map_tensors
from gr.serving.passes.cached_rows import widened
from gr.serving.servable import Servable
from gr.serving.tables.card_tables import PassOnCards, TablesOnCards

# kind of a model -> what opens its verbs: function(folder, manifest, passes, counts) -> {verb: Servable}
SERVABLES = {
    "click": "gr.serving.verbs.click:open_verbs",
    "ranking": "gr.serving.verbs.ranking:open_verbs",
    "retrieval": "gr.serving.verbs.retrieval_package:open_verbs",
}


class CompiledPass:
    """A pass of a package with its weights. Only this class runs one: without weights it would end the process."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], runners: int) -> None:
        """tensors: all that the code leaves outside, by its names. runners: calls that may run at the same time.

        Raises ServingError where the code has others.
        """
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, runners, -1)
        outside = set(self._loader.get_constant_fqns())
        if inside := sorted(tensors.keys() - outside):
            raise ServingError(f"{path}: {inside[0]} is compiled into the code, so other weights would not change it")
        if unknown := sorted(outside - tensors.keys()):
            raise ServingError(f"{path}: reads {unknown[0]}, which the package does not have; export again")
        self._tensors = dict(tensors)  # the loader does not keep them alive
        self._loader.load_constants(self._tensors, False, True, True)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """May be called by several threads at once."""
        return self._loader.run(list(inputs))


class Unseen:
    """Counts, by column, the values of requests that training did not see. May be called by several threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        if counts:
            with self._lock:
                self._counts.update(counts)

    def by_column(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


class Version:
    """A version of a package, ready to answer. It never changes. Get it from `open`.

    name: of its folder, the step with a part of the manifest's digest. verbs: what can be asked, by name.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        verbs: Mapping[str, Servable],
        unseen: Unseen,
        cards: TablesOnCards | None = None,
    ) -> None:
        self.name, self.manifest, self.kind, self.verbs, self.count_unknown = (
            name,
            manifest,
            manifest.kind,
            verbs,
            unseen,
        )
        self._cards = cards

    @classmethod
    def open(cls, folder: str | Path, *, runners: int = 1) -> "Version":
        """The version that a package serves. runners: calls of a pass that may run at the same time.

        Every file is compared with its SHA-256 in the manifest, and every pass with the golden rows. Raises
        ServingError, naming what is wrong: a file that changed, code for another machine, other answers, a folder that
        others can write, a card that does not start. Close a version with cards, which are processes.
        """
        folder = Path(folder)
        current = read_current(folder)
        return cls.open_stored(folder, current, runners=runners)

    @classmethod
    def open_stored(cls, folder: Path, stored: Stored, *, runners: int = 1) -> "Version":
        """A version of a package, whether it is the one that is served or not; otherwise as `open`."""
        manifest = read_manifest(folder, stored)
        own = folder / WEIGHTS / stored.weights
        require_this_machine(own, manifest)
        verify(folder, stored, manifest)
        if manifest.kind not in SERVABLES:
            raise ServingError(f"{own}: is a model of kind {manifest.kind}; this release serves {', '.join(SERVABLES)}")
        if operators := manifest.form.get("operators"):
            try:
                cpp_extension.load_library(folder / CODE / stored.code / OPERATORS, operators)
            except InstallError as error:
                raise ServingError(f"{own}: {error}") from error
        tensors = map_tensors(own / TENSORS)
        passes = {}
        for name, record in manifest.passes.items():
            if missing := [stored_name for stored_name in record.tensors.values() if stored_name not in tensors]:
                raise ServingError(f"{own / TENSORS}: has no tensor {missing[0]}; export again")
            own_tensors = {fqn: tensors[stored_name] for fqn, stored_name in record.tensors.items()}
            passes[name] = CompiledPass(folder / CODE / stored.code / f"{name}.pt2", own_tensors, runners)
        _compare_golden(own / GOLDEN, manifest, passes)
        unseen = Unseen()
        open_verbs = import_target(SERVABLES[manifest.kind])
        if manifest.cards is None:
            return cls(stored.weights, manifest, open_verbs(own, manifest, passes, unseen), unseen)
        cards = TablesOnCards(own, manifest.cards)
        try:
            cards.compare_golden(own)
            over = {name: PassOnCards(cards, each) for name, each in passes.items()}
            return cls(stored.weights, manifest, open_verbs(own, manifest, over, unseen), unseen, cards)
        except BaseException:
            cards.close()
            raise

    @property
    def ready(self) -> bool:
        """Whether requests can be answered: no card has ended."""
        return self._cards is None or self._cards.running

    def close(self) -> None:
        """Gives the weights, the code and the cards back, when no call is running."""
        self.verbs = {}
        if self._cards is not None:
            self._cards.close()


def golden_name(pass_name: str, part: str, place: int) -> str:
    """The name of a tensor in the file of golden rows. part: inputs or outputs."""
    return f"{pass_name}/{part}/{place}"


def _compare_golden(path: Path, manifest: Manifest, passes: Mapping[str, CompiledPass]) -> None:
    golden = map_tensors(path)
    for name, record in manifest.passes.items():
        try:
            inputs, expected = (
                [golden[golden_name(name, part, place)] for place in range(count)]
                for part, count in (("inputs", record.inputs), ("outputs", record.outputs))
            )
        except KeyError as error:
            raise ServingError(f"{path}: has no {error.args[0]}; export again") from None
        for output, value in zip(passes[name](*inputs), expected, strict=True):
            stored, own = widened(value).float(), widened(output).float()
            distance = float(((own - stored).abs() / (1 + stored.abs())).max())
            # A last bit of fp32 may round to the next number of the output's own type; in int8, of its scale too.
            step = float(stored.abs().max()) / 64 if value.dtype == torch.int8 else torch.finfo(value.dtype).eps
            allowed = max(manifest.tolerance, step)
            if not distance <= allowed:  # also where it is NaN
                raise ServingError(
                    f"{path}: pass {name} is {distance:.2g} from its golden rows, allowed is {allowed:.2g}: "
                    "the code is not of these weights; export again"
                )
