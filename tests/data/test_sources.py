"""Every kind of source gives its documents, in order, and every fault in one is named by file and line."""

import importlib
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megascale_moe.config import ConfigError
from megascale_moe.data import find_source, readers

pytestmark = pytest.mark.bulky  # pyarrow, datasets


def texts(path: Path | str, field: str = "text") -> list[str]:
    return [document.text for document in find_source(str(path), field).documents()]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def refusal(path: Path | str, field: str = "text") -> str:
    """The message, which must be a single line."""
    with pytest.raises(ConfigError) as caught:
        texts(path, field)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_file_is_divided_at_separator_lines(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_text("one\ntwo\n<|endoftext|>\nthree <|endoftext|> four\n")
    assert texts(file) == ["one\ntwo\n", "three <|endoftext|> four\n"]


def test_long_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    text = "".join(f"line {number}\n" for number in range(30_000))
    file.write_text(text)
    pieces = texts(file)
    assert len(pieces) == len(text) // readers.PIECE_BYTES + 1
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == text


def test_jsonl_gives_the_field_of_each_line(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {"body": "one"}, {"body": None}, {"body": "two", "text": "other"})
    file.write_text(file.read_text() + "\n")
    assert texts(file, "body") == ["one", "", "two"]


def test_half_a_surrogate_pair_in_json_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(r'{"text": "a\ud800b"}')
    assert texts(file) == ["a?b"]


def test_parquet_gives_the_column_of_each_row(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", body=["one", None, "two"], other=[1, 2, 3])
    assert texts(file, "body") == ["one", "", "two"]


def test_folder_is_searched_for_known_suffixes_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "README.md").write_text("no")
    write_jsonl(tmp_path / "a.jsonl", {"text": "a"})
    write_parquet(tmp_path / "deep" / "c.parquet", text=["c"])
    assert texts(tmp_path) == ["a", "b", "c"]


def test_glob_takes_the_files_that_match(tmp_path: Path) -> None:
    for name in ("1.txt", "2.txt", "3.text"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["1.txt", "2.txt"]


def test_stdlib_is_the_source_of_the_running_interpreter() -> None:
    source = find_source("stdlib")
    folder = Path(os.__file__).resolve().parent
    stamps = [part.stamp.split("|")[0] for part in source.parts]
    assert str(folder / "os.py") in stamps
    assert str(folder / "json" / "decoder.py") in stamps
    assert stamps == sorted(stamps, key=Path)
    assert not any("site-packages" in stamp or "/test/" in stamp for stamp in stamps)
    part = source.parts[stamps.index(str(folder / "os.py"))]
    assert [document.text for document in part.read()] == [(folder / "os.py").read_text()]


def test_document_sizes_add_up_to_the_size_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    write_jsonl(tmp_path / "b.jsonl", {"text": "é"}, {"text": "b"})
    source = find_source(str(tmp_path))
    assert sum(document.size for document in source.documents()) == source.size == 22 + 33


def test_fingerprint_changes_with_content_time_and_field(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(1, 1))
    first = find_source(str(file)).fingerprint
    assert find_source(str(file)).fingerprint == first
    assert find_source(str(file), "body").fingerprint != first
    os.utime(file, ns=(1, 2))
    assert find_source(str(file)).fingerprint != first


def test_sample_takes_a_share_of_every_large_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megascale_moe.data.sources.PIECE_BYTES", 100)
    for name in "abc":
        write_jsonl(tmp_path / f"{name}.jsonl", *({"text": name * 50} for _ in range(100)))
    sample = "".join(find_source(str(tmp_path)).sample(3_000))
    assert {name: sample.count(name) for name in "abc"} == {"a": 1000, "b": 1000, "c": 1000}


def test_sample_of_many_small_parts_is_bounded(tmp_path: Path) -> None:
    for index in range(50):
        (tmp_path / f"{index}.txt").write_text("x" * 100)
    assert 1_000 <= len("".join(find_source(str(tmp_path)).sample(1_000))) < 1_100


# --- datasets -------------------------------------------------------------------------------------------------------


def test_folder_saved_by_datasets_is_opened_as_one(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", None, "two"], "id": [1, 2, 3]}).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["one", "", "two"]
    assert "column 'id' holds int64; expected strings" in refusal(tmp_path / "saved", "id")
    assert "no column 'body'; set data.text_field to one of ['id', 'text']" in refusal(tmp_path / "saved", "body")


def test_dataset_dict_gives_its_training_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train, test = datasets.Dataset.from_dict({"text": ["one"]}), datasets.Dataset.from_dict({"text": ["two"]})
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    assert texts(tmp_path / "saved") == ["one"]


def test_local_dataset_folder_is_loaded_by_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo").mkdir()
    write_parquet(tmp_path / "repo" / "train.parquet", text=["one", "two"])
    write_parquet(tmp_path / "repo" / "test.parquet", text=["three"])
    source = find_source(f"hf:{tmp_path / 'repo'}")
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert source.fingerprint == find_source(f"hf:{tmp_path / 'repo'}").fingerprint


def test_dataset_name_and_config_reach_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[object] = []

    def load_dataset(*arguments: object, **options: object) -> object:
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["one"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("allenai/c4:en") == texts("hf:allenai/c4:en") == ["one"]
    assert texts("wikitext") == ["one"]
    assert calls[1:] == [(("allenai/c4", "en"), {"split": "train"}), (("wikitext", None), {"split": "train"})]


def test_unreachable_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: object, **__: object) -> object:
        raise ConnectionError("no connection\nand more\nlines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refusal("owner/name") == (
        "data.path = 'owner/name': neither a file or folder here nor a dataset that can be loaded (no connection)"
    )


@pytest.mark.parametrize(("path", "package"), [("hf:owner/name", "datasets"), ("a.parquet", "pyarrow")])
def test_missing_extra_is_one_line(path: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert f"needs the package {package!r}" in refusal(path)
    assert refusal(path).endswith(f"pip install {package}")


# --- faults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/nowhere/corpus", "a/b/c"])
def test_missing_path(path: str) -> None:
    assert refusal(path) == f"data.path = {path!r}: no such file or folder (seen from {Path.cwd()})"


def test_mistyped_path_in_a_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    assert refusal("corpus/trian").startswith("data.path = 'corpus/trian': no such file or folder")


def test_glob_without_match(tmp_path: Path) -> None:
    assert "matches no file" in refusal(tmp_path / "*.txt")


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    assert "holds no file with a suffix of .txt, .text, .jsonl, .ndjson, .json, .parquet" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "a.jsonl:2: not JSON (Expecting value); expected one object on each line"),
        ('["text"]', "a.jsonl:2: a JSON list; expected an object on each line"),
        ('{"b": 1, "a": 2}', "a.jsonl:2: no field 'text'; set data.text_field to one of ['a', 'b']"),
        ('{"text": 5}', "a.jsonl:2: field 'text' is a int; expected a string"),
    ],
)
def test_broken_jsonl_names_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    assert refusal(file) == f"{tmp_path}/{message}"


def test_bytes_that_are_no_text_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"fine\n\xff\xfe\n")
    assert refusal(file).startswith(f"{file}:2: not UTF-8 text")


def test_broken_parquet_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 but not really PAR1")
    assert refusal(file).startswith(f"{file}: cannot be read as Parquet (")


def test_parquet_truncated_in_the_middle_names_the_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", text=[str(number) for number in range(10_000)])
    data = bytearray(file.read_bytes())
    data[100:30_000] = bytes(29_900)
    file.write_bytes(data)
    assert refusal(file).startswith(f"{file}: cannot be read as Parquet (")


def test_parquet_without_the_column(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", body=["one"], number=[1])
    assert refusal(file) == f"{file}: no column 'text'; set data.text_field to one of ['body', 'number']"
    assert refusal(file, "number") == f"{file}: column 'number' holds int64; expected strings"


def test_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("secret")

    def refuse(self: Path, *_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the permissions themselves do not stop root
    assert refusal(file) == f"{file}: cannot be read (Permission denied)"
