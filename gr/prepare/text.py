"""`gr prepare text`: documents of text -> a text folder of token ids (gr.schema.TextSchema)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gr.errors import DataError, InstallError
from gr.files import is_transient, sha256_of
from gr.prepare.write import PartWriter
from gr.schema import FORMAT_VERSION, TOKENIZER_FILE, TextSchema

BATCH = 1024  # documents tokenised together, and of a row group


class _Document(NamedTuple):
    prompt: str | None
    text: str


def prepare_text(
    *, source: Sequence[Path], tokenizer: Path, folder: Path, bos: str | None = None, eos: str | None = None
) -> TextSchema:
    """Writes the documents of `source`, file after file, as ids of `tokenizer`.

    bos, eos: the tokens that begin and end each document; None: none. The tokenizer's own special tokens are not added.
    Raises DataError for a file that cannot be read or has no text, a token that the tokenizer does not have, and where
    some documents have a prompt and others none; InstallError without the package tokenizers.
    """
    encoder = _open_tokenizer(tokenizer)
    begin, end = _special(encoder, bos, tokenizer), _special(encoder, eos, tokenizer)
    writer = PartWriter(folder, BATCH, groups_per_part=128)
    prompts: bool | None = None
    tokens = 0
    for batch in _batches(source):
        with_prompt = {document.prompt is not None for document in batch} | ({prompts} - {None})
        if len(with_prompt) > 1:
            raise DataError(f"{source[0]}: some documents have a prompt and others none: give all of them one")
        prompts = with_prompt.pop()
        texts = encoder.encode_batch([document.text for document in batch], add_special_tokens=False)
        before = encoder.encode_batch([document.prompt or "" for document in batch], add_special_tokens=False)
        heads = [[*begin, *each.ids] for each in before]
        ids = [[*head, *each.ids, *end] for head, each in zip(heads, texts, strict=True)]
        columns: dict[str, pa.Array] = {
            "tokens": pa.array(ids, pa.list_(pa.int32())),
            "length": pa.array(list(map(len, ids)), pa.int32()),
        }
        if prompts:
            columns["prompt_length"] = pa.array(list(map(len, heads)), pa.int32())
        writer.write(pa.table(columns))
        tokens += sum(map(len, ids))
    writer.end_part()
    if not tokens:
        raise DataError(f"{source[0]}: has no text")
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.read_bytes())
    schema = TextSchema(
        format_version=FORMAT_VERSION,
        kind="text",
        name=source[0].stem,
        vocabulary=encoder.get_vocab_size(),
        documents=writer.rows,
        tokens=tokens,
        prompts=bool(prompts),
        bos=begin[0] if begin else None,
        eos=end[0] if end else None,
        tokenizer=sha256_of(tokenizer),
        source=", ".join(path.name for path in source),
    )
    schema.save(folder)
    return schema


def _open_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InstallError("tokenizers is not installed: pip install 'gr[text]'") from None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if is_transient(error):
            raise
        raise DataError(f"--tokenizer={path}: cannot be read ({error}); name a tokenizer.json") from None
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the package raises nothing more exact
        raise DataError(f"--tokenizer={path}: is no tokenizer.json of Hugging Face's tokenizers: {error}") from None


def _special(encoder: Any, token: str | None, path: Path) -> list[int]:
    if token is None:
        return []
    token_id = encoder.token_to_id(token)
    if token_id is None:
        raise DataError(f"{path}: has no token {token!r}: name one of its vocabulary with --bos and --eos")
    return [token_id]


def _batches(source: Sequence[Path]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    for path in source:
        for document in _documents(path):
            batch.append(document)
            if len(batch) == BATCH:
                yield batch
                batch = []
    if batch:
        yield batch


def _documents(path: Path) -> Iterator[_Document]:
    readers = {".txt": _lines, ".jsonl": _json_lines, ".parquet": _rows}
    if path.suffix not in readers:
        raise DataError(f"--source={path}: ends with none of {', '.join(readers)}")
    try:
        yield from readers[path.suffix](path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        if is_transient(error):
            raise
        raise DataError(f"--source={path}: cannot be read: {error}") from None


def _lines(path: Path) -> Iterator[_Document]:
    """A document for each line that is not blank."""
    with path.open(encoding="utf-8") as file:
        yield from (_Document(None, line) for line in map(str.strip, file) if line)


def _json_lines(path: Path) -> Iterator[_Document]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: is not JSON: {error}") from None
            if not isinstance(fields, dict):
                raise DataError(f"{path}:{number}: is not a JSON object with the field text")
            yield _document(fields.get("prompt"), fields.get("text"), f"{path}:{number}")


def _rows(path: Path) -> Iterator[_Document]:
    with pq.ParquetFile(path) as file:
        names = [name for name in ("prompt", "text") if name in file.schema_arrow.names]
        row = 0
        for batch in file.iter_batches(batch_size=BATCH, columns=names):
            for fields in batch.to_pylist():
                yield _document(fields.get("prompt"), fields.get("text"), f"{path}, row {row}")
                row += 1


def _document(prompt: Any, text: Any, place: str) -> _Document:
    if not isinstance(text, str) or not isinstance(prompt, str | None):
        raise DataError(f"{place}: text must be there, and text and prompt must be texts")
    return _Document(prompt, text)
