"""`gr export`: a checkpoint -> a package. Torch compiles here and nowhere else; `gr publish` only writes weights."""

import inspect
import json
import shutil
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gr.checkpoint import resolve
from gr.checkpoint.checksums import SUMS, find_damage, sum_lines, write_sums
from gr.checkpoint.layout import read_progress
from gr.config.base import import_target
from gr.config.export import DenseDtype, ExportConfig, Kind
from gr.config.features import DenseIds, DynamicIds
from gr.embeddings import table_weights
from gr.errors import InstallError, ServingError
from gr.files import digests, sha256_of
from gr.logging import get_logger
from gr.models.saved import Saved, load
from gr.ops import cpp_extension
from gr.serving.gate.accuracy_gate import GateReport, Limits
from gr.serving.gate.calibration import Calibration, calibration
from gr.serving.gate.dense_layers import dense_layers, put_in_bf16
from gr.serving.gate.dtypes import DtypeChoice, choose, measure
from gr.serving.package.layout import (
    CODE,
    GOLDEN,
    MANIFEST,
    OPERATORS,
    RAW_ID_FILE,
    TENSORS,
    WEIGHTS,
    IdsRecord,
    Manifest,
    PassRecord,
    Stored,
    TableRecord,
    dumped,
    read_current,
    read_manifest,
    verify,
)
from gr.serving.package.machine import cpu, versions
from gr.serving.package.version import Version, golden_name
from gr.serving.package.weights import write_tensors
from gr.serving.package.writer import PackageWriter, writing
from gr.serving.passes.build import Built, Pass, served_kind
from gr.serving.tables.card_tables import IDS, VECTORS
from gr.serving.tables.id_rows import id_tensors
from gr.serving.tables.place_tables import Placement, place, write_cards
from gr.serving.tables.quantize import bytes_of
from gr.serving.tables.served_rows import base_of, take_served_rows

# kind of a model -> its builder, as gr/serving/passes/build.py says: function(saved, kinds, config) -> Built
BUILDERS = {
    "click": "gr.serving.passes.click:build",
    "ranking": "gr.serving.passes.ranking_build:build",
    "retrieval": "gr.serving.passes.retrieval_build:build",
}
_LARGEST_BATCH = 1 << 24  # rows of a call; far above any, and offsets of ids stay within int32
_TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}  # of a pass from its golden rows
_COMPILER_OPTIONS = {
    # Weights stay outside the code. Without the second, Inductor writes constants of up to 8 numbers into it, such as
    # the bias of a logit, and other weights would not change them.
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
    # Nor is a weight whose values are all equal a constant, such as the bias of a logit that bfloat16 products round.
    "joint_graph_constant_folding": False,
    # A worker is one thread; several requests run in several.
    "cpp.threads": 1,
    # To precompile torch's headers takes longer than the one file that would read them.
    "aot_inductor.precompile_headers": False,
    "cpp_cache_precompile_headers": False,
}

log = get_logger(__name__)


@dataclass(frozen=True)
class Exported:
    """The package as it was written. stored: the version. compiled: whether the code is new. choice: of auto."""

    stored: Stored
    manifest: Manifest
    compiled: bool
    choice: DtypeChoice | None = None


def export(checkpoint: str | Path, out: str | Path, config: ExportConfig, *, plugins: Collection[str] = ()) -> Exported:
    """Writes a checkpoint as a package, or as a further version of the package at `out`, and makes it the served one.

    checkpoint, plugins: as in gr.load. Code of the same form that is there already is not compiled again. Raises
    ServingError where the compiled passes do not answer as the model does, InstallError without a C++ compiler.
    """
    saved = load(checkpoint, plugins=plugins)
    with writing(Path(out)) as package:
        rows = _gate_rows(saved, config)
        options = config.options(list(table_weights(saved.model)), list(dense_layers(saved.model)))
        choice, kinds = None, {name: of_most_bytes for name, (of_most_bytes, *_) in options.items()}
        if any(len(each) > 1 for each in options.values()):
            assert rows is not None, "auto has rows"
            choice = choose(rows, _limits(config), options)
            kinds = choice.kinds
        built, dense = _build(saved, kinds, config)
        placement = place(built.cards, built.kinds, config) if built.cards else None
        gate = _gate(built, rows, config)
        form = _form(saved, built, dense)
        code = sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()[:16]
        folder = package.path / CODE / code
        operators = [OPERATORS] * ("operators" in built.form)
        compiled = bool(find_damage(folder, [*(f"{name}.pt2" for name in built.passes), *operators], 0, 1))
        if compiled:
            draft = package.draft(CODE)
            if operators:
                cpp_extension.load()  # now: while a pass is traced, the call that tries them out would be a part of it
            for name, each in built.passes.items():
                _compile(each, draft / f"{name}.pt2")
            for name in operators:
                shutil.copyfile(cpp_extension.library(), draft / name)
            write_sums(draft, [sum_lines(digests(draft))])
            package.commit(CODE, code)
        stored, manifest = _write_version(package, saved, built, _Decided(config, dense, form, code, gate, placement))
        package.serve(stored, config.keep, sha256_of(saved.folder / SUMS))
    return Exported(stored, manifest, compiled, choice)


def publish(
    checkpoint: str | Path, to: str | Path, *, plugins: Collection[str] = (), since: int | None = None
) -> Exported:
    """Writes the weights of a checkpoint as a version of a package and makes it the served one, without compiling.

    The types of the rows and all else are as the package was exported. since: the step that is served, whose checkpoint
    is still there: rows that are the same bits in both are taken from the version that is served. It is the same
    version either way. Raises ServingError where the checkpoint is of another form than the package's code, or does not
    follow what is served.
    """
    to = Path(to)
    read_current(to)  # that there is a package
    with writing(to) as package:
        current = read_current(to)
        served = read_manifest(to, current)
        verify(to, current, served)
        base = None if since is None else base_of(resolve(checkpoint), since, package, current, served)
        config = served.export
        patched = base is not None and not config.gate.rows
        saved = load(checkpoint, plugins=plugins, with_tables=not patched)
        rows = _gate_rows(saved, config)
        built, dense = _build(saved, served.kinds, config)
        form = _form(saved, built, dense)
        if difference := _first_difference(served.form, form):
            raise ServingError(
                f"{saved.folder} is of another form than {to}: {difference}; gr export --checkpoint {checkpoint} "
                f"--out {to} compiles it"
            )
        if base is not None:
            if patched:
                take_served_rows(built, base, saved.folder, to / WEIGHTS / current.weights / TENSORS, served)
            else:
                log.info("%s: the accuracy gate compares with the model itself, so its tables were read whole", to)
        gate = _gate(built, rows, config)
        # As they were measured for such tables, so that the same weights make the same version again.
        costs = served.cards.costs if served.cards else None
        placement = place(built.cards, built.kinds, config, costs) if built.cards else None
        stored, manifest = _write_version(
            package, saved, built, _Decided(config, dense, form, current.code, gate, placement)
        )
        package.serve(stored, config.keep, sha256_of(saved.folder / SUMS))
    return Exported(stored, manifest, compiled=False)


def _build(saved: Saved, kinds: Mapping[str, Kind], config: ExportConfig) -> tuple[Built, dict[str, DenseDtype]]:
    """What is served of a model, and the type of each of its dense layers, which are of that type from now on."""
    kind = served_kind(saved.config)
    if kind not in BUILDERS:
        raise ServingError(f"{saved.folder}: a {kind} model cannot be exported yet, only {', '.join(BUILDERS)}")
    if config.cards and kind != "click":
        raise ServingError(
            f"cards={config.cards}: a {kind} model has no tables on cards, a click model has; leave it out"
        )
    layers = dense_layers(saved.model)
    dense = {name: cast(DenseDtype, kinds[name]) for name in layers}
    for name, layer in layers.items():
        if dense[name] == "bf16":
            put_in_bf16(layer)
    return import_target(BUILDERS[kind])(saved, kinds, config), dense


def _limits(config: ExportConfig) -> Limits:
    return Limits(ne=config.gate.max_ne_increase)


def _gate_rows(saved: Saved, config: ExportConfig) -> Calibration | None:
    """The rows on which the accuracy is measured, with the answers of the model as it was trained; None: it is not."""
    if not config.gate.rows:
        return None
    rows = calibration(saved, config.gate.data, config.gate.rows)
    _ = rows.reference
    return rows


def _gate(built: Built, rows: Calibration | None, config: ExportConfig) -> GateReport | None:
    """The report on what is served, which passes. Raises ServingError where it does not."""
    if rows is None:
        return None
    if built.served is None:
        with built.rounding():
            report = measure(rows, built.kinds, _limits(config))
    else:
        report = rows.gate(rows.predict(built.served), _limits(config))
    report.require()
    return report


def _form(saved: Saved, built: Built, dense: Mapping[str, DenseDtype]) -> dict[str, Any]:
    """All that compiled code depends on, as JSON has it: two checkpoints of the same form can take the same code."""
    modules = {type(module).__module__ for each in built.passes.values() for module in each.module.modules()}
    sources = {name: inspect.getsourcefile(sys.modules[name]) for name in sorted(modules) if name.startswith("gr.")}
    own = cpu()
    form = {
        "kind": served_kind(saved.config),
        **built.form,
        "tables": built.tables,
        "dense": dense,
        "source": {name: sha256_of(Path(path)) for name, path in sources.items() if path},
        "compiler options": _COMPILER_OPTIONS,
        "versions": versions(),
        "cpu": [own.machine, *own.features],
    }
    return json.loads(json.dumps(form))


def _first_difference(old: Any, new: Any, place: str = "") -> str:
    """The first value that differs, by its place; empty where there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        differing = (name for name in [*old, *new] if old.get(name) != new.get(name))
        name = next(differing, None)
        return "" if name is None else _first_difference(old.get(name), new.get(name), f"{place} {name}".strip())
    return "" if old == new else f"{place} is {json.dumps(new)[:80]}, the package has {json.dumps(old)[:80]}"


def _compile(each: Pass, path: Path) -> None:
    """Writes a pass as an AOTInductor package without weights."""
    # Imported here: `gr publish`, which compiles nothing, would spend a quarter of its time on it.
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    dims: dict[str, Any] = {}
    shapes = tuple(
        {dim: dims.setdefault(name, torch.export.Dim(name, min=1, max=_LARGEST_BATCH)) for dim, name in named.items()}
        for named in each.dynamic
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on its own internals
        program = torch.export.export(each.module, each.golden, dynamic_shapes=shapes)
        lifted = program.constants.keys() - dict(each.module.named_buffers()).keys()
        assert not lifted, f"{lifted} are no buffers of the pass, so another checkpoint could not give them"
        try:
            # Two exports of one form at once would write the same files of a common cache.
            with fresh_cache():
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(_COMPILER_OPTIONS))
        except (InvalidCxxCompiler, CppCompileError, InductorError) as error:
            cause = error.inner_exception if isinstance(error, InductorError) else error
            if not isinstance(cause, InvalidCxxCompiler | CppCompileError):
                raise
            raise InstallError(
                f"the pass cannot be compiled ({str(cause).splitlines()[0]}): install g++, then export again"
            ) from error


@dataclass(frozen=True)
class _Decided:
    """The part of a manifest that is decided before anything is written."""

    config: ExportConfig
    dense: dict[str, DenseDtype]
    form: dict[str, Any]
    code: str
    gate: GateReport | None
    placement: Placement | None


def _write_version(package: PackageWriter, saved: Saved, built: Built, decided: _Decided) -> tuple[Stored, Manifest]:
    """Writes a version, and opens it as a server does."""
    draft = package.draft(WEIGHTS)
    outputs = {name: _outputs(each) for name, each in built.passes.items()}
    passes, tensors = _tensors(built, outputs)
    write_tensors(draft / TENSORS, tensors)
    golden, cards = _golden(built, outputs), None
    if built.cards is not None:
        golden |= zip((IDS, VECTORS), built.cards.golden, strict=True)
        assert decided.placement is not None, "tables for cards were placed"
        cards = write_cards(draft, built.cards, built.kinds, decided.placement)
    write_tensors(draft / GOLDEN, golden)
    ids, maps = _raw_ids(saved)
    if maps:
        write_tensors(draft / RAW_ID_FILE, maps)
    for name, content in built.artifacts.items():
        (draft / name).parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            (draft / name).write_bytes(content)
        else:
            content(draft / name)
    manifest = Manifest(
        kind=served_kind(saved.config),
        step=read_progress(saved.folder)["step"],
        export=decided.config,
        form=decided.form,
        passes=passes,
        verbs=dict(built.verbs),
        tables={
            name: TableRecord(rows=rows, dim=dim, dtype=dtype, bytes=bytes_of(rows, dim, dtype))
            for name, (rows, dim, dtype) in built.tables.items()
        },
        ids=ids,
        cards=cards,
        dense=decided.dense,
        tolerance=max(_TOLERANCES[kind] for kind in ("fp32", *decided.dense.values())),
        gate=decided.gate.model_dump(mode="json") if decided.gate else None,
        versions=versions(),
        cpu=cpu(),
        code_files=digests(package.path / CODE / decided.code),
        files=digests(draft),
    )
    (draft / MANIFEST).write_text(dumped(manifest))
    digest = sha256_of(draft / MANIFEST)
    stored = Stored(code=decided.code, weights=f"step-{manifest.step:08d}-{digest[:8]}", manifest=digest)
    folder = package.commit(WEIGHTS, stored.weights)
    try:
        Version.open_stored(package.path, stored).close()
    except ServingError:
        shutil.rmtree(folder)
        raise
    return stored, manifest


def _raw_ids(saved: Saved) -> tuple[dict[str, IdsRecord], dict[str, Tensor]]:
    """How each column's raw ids become rows, and the tensors of their maps."""
    records: dict[str, IdsRecord] = {}
    maps: dict[str, tuple[Tensor, Tensor]] = {}
    for table, columns in saved.config.columns_by_table(saved.schema).items():
        ids = saved.config.embeddings.ids_of(table)
        if isinstance(ids, DenseIds):
            continue
        ways = ids.ways if isinstance(ids, DynamicIds) else None
        records |= {name: IdsRecord(kind=ids.kind, table=table, rows=ids.rows, ways=ways) for name in columns}
        if ways is not None:
            assert saved.id_map is not None, "a model with raw ids has their map"
            own = saved.id_map.dynamic[table].table
            maps[table] = own.key_SA, own.tag_SA
    return records, id_tensors(maps)


def _tensors(
    built: Built, outputs: Mapping[str, tuple[Tensor, ...]]
) -> tuple[dict[str, PassRecord], dict[str, Tensor]]:
    """The tensors that each pass reads, and all tensors to be written. A tensor that passes share is written once.

    outputs: of the golden rows, by pass.
    """
    records, tensors = {}, {}
    names: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    for pass_name, each in built.passes.items():
        own = {}
        for name, tensor in each.module.state_dict().items():
            key = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.dtype)
            own[name] = names.setdefault(key, f"{pass_name}.{name}")
            tensors[own[name]] = tensor
        records[pass_name] = PassRecord(inputs=len(each.golden), outputs=len(outputs[pass_name]), tensors=own)
    return records, tensors


@torch.no_grad()
def _outputs(each: Pass) -> tuple[Tensor, ...]:
    output = each.module(*each.golden)
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _golden(built: Built, outputs: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """The inputs and outputs of every pass as the model itself, not compiled, gives them."""
    return {
        golden_name(name, part, place): tensor
        for name, each in built.passes.items()
        for part, tensors in (("inputs", each.golden), ("outputs", outputs[name]))
        for place, tensor in enumerate(tensors)
    }
