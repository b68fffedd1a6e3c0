"""Reading data sets, and what a person is told when one cannot be read."""

import csv
import gzip
import json

import datasets
import pytest

from rlhf_fast.data.sources import Records, load_records, train_test, write_jsonl
from rlhf_fast.errors import UserError

ROWS = [{"prompt": f"question {i}", "completion": f"Antwort {i} ü\n"} for i in range(4)]


def save(path, rows=ROWS):
    """Write ``rows`` in the format that the suffix names."""
    if path.name.endswith(".jsonl"):
        write_jsonl(rows, path)
    elif path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    assert list(load_records(save(tmp_path / name))) == ROWS


def test_objects_pass_through():
    assert list(load_records(ROWS)) == ROWS
    assert list(load_records(datasets.Dataset.from_list(ROWS))) == ROWS
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    assert list(load_records(splits)) == ROWS
    assert list(load_records(splits, "test")) == ROWS[:1]
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        load_records(splits, "dev")


def test_a_folder_gives_the_split_that_is_named(tmp_path):
    save(tmp_path / "train.jsonl"), save(tmp_path / "test.parquet", ROWS[:2])
    assert list(load_records(tmp_path)) == ROWS
    assert list(load_records(str(tmp_path) + ":test")) == ROWS[:2]
    assert list(load_records(tmp_path, "test")) == ROWS[:2]
    with pytest.raises(UserError, match="no file for the split 'dev'; it holds test.parquet, train.jsonl"):
        load_records(tmp_path, "dev")
    with pytest.raises(UserError, match="Two splits for one data set"):
        load_records(str(tmp_path) + ":test", "train")


def test_shards_of_a_split_are_joined_in_order_and_keep_their_names(tmp_path):
    save(tmp_path / "train-0.jsonl", ROWS[:3]), save(tmp_path / "train-1.jsonl", ROWS[3:])
    records = load_records(tmp_path)
    assert list(records) == ROWS
    assert "train-1.jsonl, line 1" in records.where(3)


def test_a_folder_saved_by_datasets(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    assert list(load_records(tmp_path / "one")) == ROWS
    datasets.DatasetDict(dev=datasets.Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "many"))
    assert list(load_records(tmp_path / "many", "dev")) == ROWS


def test_a_changed_parquet_file_is_read_anew(tmp_path):
    path = save(tmp_path / "d.parquet")
    load_records(path)
    save(path, ROWS[:1])
    assert list(load_records(path)) == ROWS[:1]


def test_csv_cells_with_json_lists_are_lists(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('prompt,responses,ranking\n"p","[""a"", ""b""]","[1, 2]"\n', encoding="utf-8")
    assert load_records(path)[0] == {"prompt": "p", "responses": ["a", "b"], "ranking": [1, 2]}


def test_rows_keep_their_line_through_blank_lines_slices_and_splits(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n\n\n{"text": "b"}\n{"text": "c"}\n', encoding="utf-8")
    records = load_records(path)
    assert [records.where(i).rsplit(", ")[1] for i in range(3)] == ["line 1", "line 4", "line 5"]
    assert records[1:].where(0).endswith("line 4")
    train, test = train_test(records, 1, seed=3)
    both = [part.where(i).rsplit(", ")[1] for part in (train, test) for i in range(len(part))]
    assert sorted(both) == ["line 1", "line 4", "line 5"]


def test_holdout_is_disjoint_deterministic_and_as_large_as_asked():
    records = Records({"text": str(i)} for i in range(100))
    train, test = train_test(records, 0.1, seed=1)
    texts = [{row["text"] for row in part} for part in (train, test)]
    assert (len(train), len(test)) == (90, 10) and not texts[0] & texts[1]
    assert train_test(records, 10, seed=1)[1] == test
    assert train_test(records, 10, seed=2)[1] != test
    for wrong in (0, 100, 1.5):
        with pytest.raises(UserError, match="Cannot hold out"):
            train_test(records, wrong)


# ------------------------------------------------------------------------------------------------------- bad input


def error_of(source, split=None):
    with pytest.raises(UserError) as error:
        load_records(source, split)
    return str(error.value)


def test_a_missing_file_names_the_nearest_one(tmp_path, monkeypatch):
    save(tmp_path / "train.jsonl")
    assert "Did you mean" in (message := error_of(tmp_path / "trian.jsonl")) and "train.jsonl" in message
    assert str(tmp_path) in error_of(tmp_path / "no" / "such" / "folder" / "x.jsonl")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean 'train.jsonl'?" in error_of("train")


def test_a_malformed_line_is_named_with_file_line_and_reason(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b",}\n', encoding="utf-8")
    message = error_of(path)
    assert "bad.jsonl, line 3: malformed JSON at column" in message and "one complete JSON object" in message
    path.write_text('{"text": "a"}\n["b"]\n', encoding="utf-8")
    assert "bad.jsonl, line 2: expected a JSON object, got a list" in error_of(path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.jsonl", b"", "is empty (0 bytes)"),
        ("d.jsonl", b"\n\n", "holds no rows"),
        ("d.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("d.json", b"[]", "holds no rows"),
        ("d.json", b'[{"a": 1},\n {"a": ]', "line 2: malformed JSON"),
        ("d.json", b'{"a": 1}', "got one object with the keys a"),
        ("d.json", b"[1]", "row 1: expected a dict of columns, got int"),
        ("d.csv", b"a,b\n1,2\n3\n", "line 3: 1 cells, but the header names 2 columns"),
        ("d.csv", b"a,a\n1,2\n", "line 1: every column needs its own name"),
        ("d.parquet", b"no parquet", "not a readable parquet file"),
        ("d.jsonl.gz", b"no gzip", "is not compressed. Give it a name that does not end with .gz"),
        ("d.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], "not a complete gzip file"),
        ("d.txt", b"text", "unknown kind of file"),
        ("d.jsonl", '{"a": 1}\n'.encode("utf-16"), "is UTF-16 text. Save it as UTF-8"),
        ("d.csv", "a,b\n1,2\n".encode("utf-16-le"), "is UTF-16 text"),
        ("d.jsonl", '{"a": 1}\n'.encode("utf-32"), "is UTF-32 text"),
        ("d.jsonl", gzip.compress(b'{"a": 1}\n'), "is compressed with gzip. Give it a name that ends with .gz"),
        ("d.jsonl", b"PAR1....", "is a parquet file"),
        ("d.csv", b"PK\x03\x04....", "is a zip archive (.xlsx is one too)"),
        ("d.csv", b"a;b\n1;2\n", "line 1: its cells are parted by ';': 'a;b'. Save it with commas"),
        ("d.csv", b"a\tb\n1\t2\n", "line 1: its cells are parted by '\\t'"),
        ("d.json", b'{"a": [1, 2], "b": [3, 4]}', "got one object of columns: a, b. Write rows"),
        ("d.json", b"[" * 100_000, "nested too deeply"),
        ("d.jsonl", b'[\n {"a": 1}\n]', "Or give a list of objects a name that ends with .json"),
    ],
)
def test_unreadable_files_say_what_is_wrong(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    message = error_of(tmp_path / name)
    assert expected in message and name in message


def test_a_parquet_file_without_rows_says_so_and_nothing_else(tmp_path, capfd):
    datasets.Dataset.from_dict({"a": []}).to_parquet(str(tmp_path / "d.parquet"))
    capfd.readouterr()
    assert "holds no rows" in error_of(tmp_path / "d.parquet")
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_names_that_lead_to_no_file(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "is a link that leads nowhere" in error_of(tmp_path / "loop.jsonl")
    assert "such as a pipe or a device" in error_of("/dev/null")
    assert "is no name of a file" in error_of("a" * 5000 + ".jsonl")
    assert "is no name of a file" in error_of("a\0b")


def test_a_csv_cell_that_is_nested_too_deeply_stays_text(tmp_path):
    cell = "[" * 100_000 + "]" * 100_000
    (tmp_path / "d.csv").write_text(f"a,b\n1,{cell}\n")
    assert load_records(tmp_path / "d.csv")[0]["b"] == cell


def test_a_split_of_a_single_file_is_refused(tmp_path):
    assert "single file without splits" in error_of(save(tmp_path / "d.jsonl"), "test")


def test_json_lines_under_the_name_json_are_read(tmp_path):
    (tmp_path / "d.json").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    assert [row["text"] for row in load_records(tmp_path / "d.json")] == ["a", "b"]


def test_a_hub_name_that_cannot_be_loaded_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = error_of("owner/name:train")
    assert "no file or folder here" in message and "Couldn't reach" in message


def test_a_hub_name_carries_config_and_split(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, kwargs["split"]))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    load_records("owner/name/main:test"), load_records("owner/name", "dev")
    assert asked == [("owner/name", "main", "test"), ("owner/name", None, "dev")]
