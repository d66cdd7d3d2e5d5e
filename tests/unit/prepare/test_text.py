"""`gr prepare text`: documents of three kinds of files as ids, and what is wrong with them in one line."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gr.errors import DataError
from gr.files import sha256_of
from gr.prepare.text import prepare_text
from gr.schema import TOKENIZER_FILE, TextSchema
from tests.support.text import write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "words.json", ["red", "green", "blue"])


def prepared(source: Path, tokenizer: Path, **more: str) -> tuple[TextSchema, dict]:
    folder = source.parent / "out"
    folder.mkdir()
    schema = prepare_text(source=[source], tokenizer=tokenizer, folder=folder, **more)
    assert TextSchema.load(folder) == schema
    assert sha256_of(folder / TOKENIZER_FILE) == schema.tokenizer
    return schema, pq.read_table(folder / "part-00000.parquet").to_pydict()


def test_lines_of_text(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("red blue\n\n  green\nred pink\n")
    schema, columns = prepared(tmp_path / "a.txt", tokenizer, bos="<s>", eos="</s>")
    assert columns == {"tokens": [[0, 3, 5, 1], [0, 4, 1], [0, 3, 2, 1]], "length": [4, 3, 4]}
    assert (schema.vocabulary, schema.documents, schema.tokens, schema.bos, schema.eos) == (6, 3, 11, 0, 1)
    assert not schema.prompts


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_prompts_are_counted(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    rows = [{"prompt": "red red", "text": "blue"}, {"prompt": "", "text": "green blue"}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    schema, columns = prepared(path, tokenizer, bos="<s>")
    assert columns == {"tokens": [[0, 3, 3, 5], [0, 4, 5]], "length": [4, 3], "prompt_length": [3, 1]}
    assert schema.prompts and schema.eos is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "ends with none of .txt, .jsonl, .parquet"),
        ("a.txt", "\n \n", "has no text"),
        ("a.jsonl", '{"text": 3}', "a.jsonl:1: text must be there"),
        ("a.jsonl", '{"text": "red"}\nred', "a.jsonl:2: is not JSON"),
        (
            "a.jsonl",
            '{"text": "red"}\n{"text": "red", "prompt": "blue"}',
            "some documents have a prompt and others none",
        ),
        ("a.parquet", "red", "a.parquet: cannot be read"),
    ],
)
def test_faults_are_one_line(tmp_path: Path, tokenizer: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        prepared(tmp_path / name, tokenizer)
    assert "\n" not in str(error.value)


def test_a_token_or_tokenizer_that_is_none(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("red")
    with pytest.raises(DataError, match="has no token '<bos>'"):
        prepare_text(source=[tmp_path / "a.txt"], tokenizer=tokenizer, folder=tmp_path, bos="<bos>")
    with pytest.raises(DataError, match=r"a.txt: is no tokenizer.json"):
        prepare_text(source=[tmp_path / "a.txt"], tokenizer=tmp_path / "a.txt", folder=tmp_path)
