"""Where numbers and messages go, in which form, and what survives a kill and a restart."""

import csv
import io
import json
import os
import re
import sys

import numpy as np
import pytest
import torch

from improved_diffusion.errors import UserError
from improved_diffusion.log_formats import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    TensorBoardOutputFormat,
    make_output_format,
)


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def json_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- tables and messages for people ---------------------------------------------------------------


def human(write):
    stream = io.StringIO()
    output = HumanOutputFormat(stream)
    write(output)
    output.close()
    return stream.getvalue()  # fails if close() closed the stream


def test_table_has_a_row_per_key_in_order():
    text = human(lambda output: output.writekvs({"step": 10, "loss": 0.123456, "note": "ok"}))
    assert text.splitlines() == [
        "----------------",
        "| loss | 0.123 |",
        "| note | ok    |",
        "| step | 10    |",
        "----------------",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e-5, "1e-05"), (1234567.0, "1.23e+06"), (0.5, "0.5"), (np.float32(2.0), "2"), (-3, "-3")],
)
def test_numbers_in_a_table_have_three_digits(value, shown):
    assert f"| a | {shown} |" in human(lambda output: output.writekvs({"a": value}))


def test_long_keys_and_values_of_a_table_are_cut():
    row = human(lambda output: output.writekvs({"k" * 40: "v" * 40, "a": 1})).splitlines()[2]
    assert row == f"| {'k' * 27}... | {'v' * 27}... |"


def test_keys_that_look_alike_when_cut_keep_a_row_each():
    text = human(lambda output: output.writekvs({"k" * 40 + "1": 1, "k" * 40 + "2": 2}))
    assert len(text.splitlines()) == 4


def test_empty_table_is_not_written():
    assert human(lambda output: output.writekvs({})) == ""


def test_message_is_its_parts_with_spaces_between():
    text = human(lambda output: output.writeseq(["step", 3, None, "100% %s {}"]))
    assert text == "step 3 None 100% %s {}\n"


def test_log_file_is_continued(tmp_path):
    for word in ("first", "second"):
        output = HumanOutputFormat(str(tmp_path / "log.txt"))
        output.writeseq([word])
        output.close()
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_message_is_in_the_file_at_once(tmp_path):
    """A killed run keeps what it said."""
    output = HumanOutputFormat(str(tmp_path / "log.txt"))
    output.writeseq(["first"])
    assert (tmp_path / "log.txt").read_text() == "first\n"
    output.close()


class Terminal(io.StringIO):
    """A terminal that remembers what was written."""

    def isatty(self):
        return True


def test_message_on_a_terminal_stands_above_a_live_bar():
    from tqdm import tqdm

    terminal = Terminal()
    output = HumanOutputFormat(terminal)
    with tqdm(total=3, file=terminal, bar_format="{n_fmt}/{total_fmt}", ncols=10) as bar:
        output.writeseq(["hello"])
        bar.update(3)
    output.writeseq(["bye"])
    text = terminal.getvalue()
    assert "hello\n" in text.split("\r")  # on a line of its own, which was cleared before
    assert text.split("hello\n")[1].startswith("\r0/3")  # the bar is back
    assert text.endswith("\r3/3\nbye\n")


@pytest.mark.parametrize("module", [None, "not there", object()])
def test_message_on_a_terminal_does_not_need_tqdm(monkeypatch, module):
    if module == "not there":
        monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    else:
        monkeypatch.setitem(sys.modules, "tqdm", module)
    terminal = Terminal()
    HumanOutputFormat(terminal).writeseq(["hello"])
    assert terminal.getvalue() == "hello\n"
    assert sys.modules.get("tqdm", "not there") == module


# -- JSON -----------------------------------------------------------------------------------------


def test_json_has_an_object_per_line(tmp_path):
    output = JSONOutputFormat(str(tmp_path / "a.json"))
    output.writekvs({"b": 0.25, "a": 1})
    output.writekvs({"c": "text"})
    output.close()
    assert (tmp_path / "a.json").read_text() == '{"a": 1, "b": 0.25}\n{"c": "text"}\n'


def test_json_takes_numbers_of_torch_and_numpy(tmp_path):
    output = JSONOutputFormat(str(tmp_path / "a.json"))
    output.writekvs({"a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.int64(3)})
    assert json_rows(tmp_path / "a.json") == [{"a": 0.5, "b": 0.25, "c": 3}]


def test_json_is_continued(tmp_path):
    for step in (1, 2):
        JSONOutputFormat(str(tmp_path / "a.json")).writekvs({"step": step})
    assert json_rows(tmp_path / "a.json") == [{"step": 1}, {"step": 2}]


def test_line_of_json_that_a_crash_cut_off_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"step": 1}\n{"st')
    JSONOutputFormat(str(path)).writekvs({"step": 3})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3}


# -- CSV ------------------------------------------------------------------------------------------


def test_csv_has_a_column_per_key_in_order(tmp_path):
    output = CSVOutputFormat(str(tmp_path / "a.csv"))
    output.writekvs({"step": 1, "loss": 0.5, "a": "x"})
    output.writekvs({"a": "y", "loss": 0.25, "step": 2})
    output.close()
    assert (tmp_path / "a.csv").read_text().split() == ["a,loss,step", "x,0.5,1", "y,0.25,2"]


def test_new_columns_extend_the_csv_and_keep_old_rows(tmp_path):
    output = CSVOutputFormat(str(tmp_path / "a.csv"))
    output.writekvs({"step": 1, "loss": 0.5})
    output.writekvs({"step": 2, "loss": 0.25, "grad": 3, "acc": 4})
    output.writekvs({"step": 3})
    assert csv_rows(tmp_path / "a.csv") == [
        {"loss": "0.5", "step": "1", "acc": "", "grad": ""},
        {"loss": "0.25", "step": "2", "acc": "4", "grad": "3"},
        {"loss": "", "step": "3", "acc": "", "grad": ""},
    ]
    header = (tmp_path / "a.csv").read_text().splitlines()[0]
    assert header == "loss,step,acc,grad"  # old columns keep their place
    assert os.listdir(tmp_path) == ["a.csv"]


def test_csv_is_continued_after_reopening(tmp_path):
    path = tmp_path / "a.csv"
    CSVOutputFormat(str(path)).writekvs({"b": 1, "a": 2})
    output = CSVOutputFormat(str(path))
    output.writekvs({"a": 4, "b": 3})
    output.writekvs({"b": 5})
    assert path.read_text().split() == ["a,b", "2,1", "4,3", ",5"]


def test_new_columns_extend_a_reopened_csv(tmp_path):
    path = tmp_path / "a.csv"
    CSVOutputFormat(str(path)).writekvs({"b": 1, "d": 2})
    CSVOutputFormat(str(path)).writekvs({"a": 3, "b": 4, "c": 5})
    CSVOutputFormat(str(path)).writekvs({"d": 6})
    assert path.read_text().split() == ["b,d,a,c", "1,2,,", "4,,3,5", ",6,,"]


def test_empty_csv_gets_its_header(tmp_path):
    (tmp_path / "a.csv").write_text("")
    CSVOutputFormat(str(tmp_path / "a.csv")).writekvs({"a": 1})
    assert csv_rows(tmp_path / "a.csv") == [{"a": "1"}]


def test_text_with_commas_quotes_and_line_ends_survives_in_a_csv(tmp_path):
    output = CSVOutputFormat(str(tmp_path / "a.csv"))
    output.writekvs({"text": 'a,"b"\nc', "k,1": 1})
    output.writekvs({"new": 2})
    assert csv_rows(tmp_path / "a.csv")[0] == {"text": 'a,"b"\nc', "k,1": "1", "new": ""}


def test_crash_while_the_csv_is_extended_keeps_the_old_one(tmp_path, monkeypatch):
    output = CSVOutputFormat(str(tmp_path / "a.csv"))
    output.writekvs({"a": 1})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        output.writekvs({"a": 2, "b": 3})
    assert csv_rows(tmp_path / "a.csv") == [{"a": "1"}]


def test_row_of_a_csv_that_a_crash_cut_off_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n3,")
    output = CSVOutputFormat(str(path))
    output.writekvs({"a": 5, "b": 6})
    output.writekvs({"a": 7, "b": 8, "c": 9})
    rows = csv_rows(path)
    assert rows[0] == {"a": "1", "b": "2", "c": ""}
    assert rows[-2:] == [{"a": "5", "b": "6", "c": ""}, {"a": "7", "b": "8", "c": "9"}]


# -- rewinding ------------------------------------------------------------------------------------

FORMATS = {"csv": CSVOutputFormat, "json": JSONOutputFormat}


def row(step):
    """A row as wide as a run's; two columns come late; quoted text has a line end."""
    late = {3: {"grad": 0.5}, 5: {"grad": 0.25, "acc": 1}, 6: {"acc": 2}}
    return {"step": step, "loss": 1 / (step + 3), "note": f'ä "{step}",\nx', **late.get(step, {})}


def write_rows(output, steps):
    for step in steps:
        output.writekvs(row(step))


@pytest.fixture(params=["csv", "json"])
def format(request):
    """The name of a format."""
    return request.param


@pytest.fixture
def whole_run(tmp_path, format):
    """What a run of steps 0 to 7 leaves, and the file after each of its rows."""
    path = tmp_path / "whole"
    output = FORMATS[format](str(path))
    after = []
    for step in range(8):
        write_rows(output, [step])
        after.append(path.read_bytes())
    return after[-1], after


def last_row(format, file):
    """The bytes of the last row of a file."""
    lines = 2 if format == "csv" else 1  # its text has a line end, which JSON escapes
    return b"".join(file.splitlines(keepends=True)[-lines:])


def test_kill_at_any_byte_of_a_row_is_mended(tmp_path, format, whole_run):
    end, after = whole_run
    path = tmp_path / "killed"
    for step in range(1, 8):
        file = after[step]
        for cut in range(len(file) - len(last_row(format, file)), len(file) + 1):
            path.write_bytes(file[:cut])
            output = FORMATS[format](str(path))
            output.rewind(step)
            write_rows(output, range(step, 8))
            assert path.read_bytes() == end, (step, cut)


@pytest.mark.parametrize("step", range(9))
def test_rewinding_keeps_earlier_rows_byte_for_byte(tmp_path, format, whole_run, step):
    path = tmp_path / "whole"
    dropped = FORMATS[format](str(path)).rewind(step)
    assert dropped == 8 - step
    if step == 0:
        assert not path.exists()  # so that the columns start afresh
    else:
        assert whole_run[0].startswith(path.read_bytes())
        rows = {"csv": csv_rows, "json": json_rows}[format](path)
        assert [int(row["step"]) for row in rows] == list(range(step))


def test_rewound_file_is_continued_by_the_same_output(tmp_path, format, whole_run):
    path = tmp_path / "again"
    output = FORMATS[format](str(path))
    for step in (5, 0, 7, 4):
        write_rows(output, range(8))
        output.rewind(step)
        if step:
            write_rows(output, range(step, 8))
            assert path.read_bytes() == whole_run[0]
        output.rewind(0)
        assert not path.exists()


def test_rewinding_what_is_not_there_does_nothing(tmp_path, format):
    output = FORMATS[format](str(tmp_path / "a"))
    assert output.rewind(0) == 0
    assert os.listdir(tmp_path) == []
    output.writekvs({"step": 1})
    assert (tmp_path / "a").exists()


def test_rows_without_a_step_are_kept_before_the_first_dropped_one_only(tmp_path, format):
    path = tmp_path / "a"
    output = FORMATS[format](str(path))
    for values in ({"step": 1, "a": 1}, {"a": 2}, {"step": 3, "a": 3}, {"a": 4}):
        output.writekvs(values)
    assert output.rewind(5) == 0
    assert output.rewind(2) == 2
    rows = {"csv": csv_rows, "json": json_rows}[format](path)
    assert [float(row["a"]) for row in rows] == [1, 2]


def test_file_without_steps_is_kept(tmp_path, format):
    path = tmp_path / "a"
    output = FORMATS[format](str(path))
    output.writekvs({"a": 1})
    before = path.read_bytes()
    assert output.rewind(0) == 0
    assert path.read_bytes() == before


def test_line_that_an_unrewound_restart_ended_is_dropped_if_it_is_the_last(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,step\r\n1,2\r\n3\n")
    assert CSVOutputFormat(str(path)).rewind(100) == 1
    assert path.read_bytes() == b"a,step\r\n1,2\r\n"
    path.write_bytes(b"a,step\r\n1,2\r\n3\n5,6\r\n")
    assert CSVOutputFormat(str(path)).rewind(100) == 0


@pytest.mark.parametrize("rest", [b"\0" * 50, b"3,\xc3", b"3", b"3,", b"3,1", b'"3', b"3,12\r"])
def test_rest_of_a_csv_after_a_crash_is_dropped(tmp_path, rest):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,step\r\n1,2\r\n" + rest)
    assert CSVOutputFormat(str(path)).rewind(100) == 1
    assert path.read_bytes() == b"a,step\r\n1,2\r\n"


@pytest.mark.parametrize(
    "rest", [b"\0" * 50, b"{", b'{"step": 12', b'{"step": 12, "a": "\xc3', b"[]"]
)
def test_rest_of_a_json_after_a_crash_is_dropped(tmp_path, rest):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"step": 2}\n' + rest)
    assert JSONOutputFormat(str(path)).rewind(100) == 1
    assert path.read_bytes() == b'{"step": 2}\n'


def test_object_of_json_that_lacks_its_line_end_only_is_kept(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"step": 2}\n{"step": 3}')
    output = JSONOutputFormat(str(path))
    assert output.rewind(4) == 0
    output.writekvs({"step": 4})
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n{"step": 4}\n'


@pytest.mark.parametrize("moment", ["before", "after"])
def test_kill_while_columns_are_added_is_mended(tmp_path, monkeypatch, moment):
    """The new file is beside, or in its place without the row that brought the columns."""
    whole, killed = tmp_path / "whole.csv", tmp_path / "killed.csv"
    write_rows(CSVOutputFormat(str(whole)), range(8))
    output = CSVOutputFormat(str(killed))
    write_rows(output, range(3))
    replace = os.replace

    def die(*args):
        if moment == "after":
            replace(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_rows(output, [3])
    monkeypatch.undo()
    output = CSVOutputFormat(str(killed))
    output.rewind(2)
    assert sorted(os.listdir(tmp_path)) == ["killed.csv", "whole.csv"]
    write_rows(output, range(2, 8))
    assert killed.read_bytes() == whole.read_bytes()


def test_header_without_rows_is_dropped(tmp_path):
    """Left by a kill after the first columns were added: they start afresh."""
    (tmp_path / "a.csv").write_bytes(b"a,step\r\n")
    output = CSVOutputFormat(str(tmp_path / "a.csv"))
    assert output.rewind(7) == 0
    output.writekvs({"step": 7})
    assert (tmp_path / "a.csv").read_bytes() == b"step\r\n7\r\n"


def test_files_that_are_cut_are_never_rewritten(tmp_path, format, whole_run, monkeypatch):
    """A kill leaves the old file or the new one, as there is no moment between."""
    path = tmp_path / "whole"
    inode = os.stat(path).st_ino
    FORMATS[format](str(path)).rewind(4)
    assert os.stat(path).st_ino == inode


def test_log_for_people_is_not_rewound(tmp_path):
    output = HumanOutputFormat(str(tmp_path / "log.txt"))
    output.writekvs({"step": 3})
    before = (tmp_path / "log.txt").read_text()
    assert output.rewind(0) == 0
    output.close()
    assert (tmp_path / "log.txt").read_text() == before


# -- TensorBoard ----------------------------------------------------------------------------------


def tensorboard_points(folder):
    """Key -> [(step, value)] as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        key: [(event.step, event.value) for event in events.Scalars(key)]
        for key in events.Tags()["scalars"]
    }


def test_tensorboard_reads_back_each_number_at_its_step(tmp_path):
    output = make_output_format("tensorboard", str(tmp_path))
    output.writekvs({"step": 10, "loss": 0.5, "grad/norm": 3})
    output.writekvs({"step": 25, "loss": torch.tensor(0.25)})
    output.close()
    points = tensorboard_points(tmp_path / "tb")
    assert points["loss"] == [(10, 0.5), (25, 0.25)]
    assert points["grad/norm"] == [(10, 3.0)]
    assert points["step"] == [(10, 10.0), (25, 25.0)]


def test_tensorboard_counts_rows_without_a_step(tmp_path):
    output = TensorBoardOutputFormat(str(tmp_path))
    output.writekvs({"loss": 1})
    output.writekvs({"loss": 2})
    output.writekvs({"loss": 3, "step": 7})
    output.writekvs({"loss": 4})
    output.close()
    assert tensorboard_points(tmp_path)["loss"] == [(1, 1), (2, 2), (7, 3), (8, 4)]


def test_tensorboard_has_a_row_at_once(tmp_path):
    """Curves of a running training can be looked at."""
    output = TensorBoardOutputFormat(str(tmp_path))
    output.writekvs({"loss": 1, "step": 1})
    assert tensorboard_points(tmp_path)["loss"] == [(1, 1)]
    output.close()


def test_tensorboard_forgets_the_points_that_come_again(tmp_path):
    output = TensorBoardOutputFormat(str(tmp_path))
    for step in (10, 20, 30):
        output.writekvs({"step": step, "loss": step})
    output.close()
    output = TensorBoardOutputFormat(str(tmp_path))
    assert output.rewind(20) == 0
    output.writekvs({"loss": -1})  # counted on from where it went back to
    output.writekvs({"step": 30, "loss": -2})
    output.close()
    assert tensorboard_points(tmp_path)["loss"] == [(10, 10), (20, -1), (30, -2)]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_reads_back_an_image(tmp_path, channels):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = np.arange(4 * 5 * channels, dtype=np.uint8).reshape(4, 5, channels) * 4
    output = make_output_format("tensorboard", str(tmp_path))
    output.writeimage("samples", image, 7)
    events = EventAccumulator(str(tmp_path / "tb"))  # before it is closed: it is there at once
    events.Reload()
    (event,) = events.Images("samples")
    output.close()
    assert event.step == 7
    back = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(back, np.broadcast_to(image, [4, 5, 3]))


def test_image_is_ignored_by_outputs_for_numbers(tmp_path):
    for name in ("log", "csv", "json", "stdout"):
        output = make_output_format(name, str(tmp_path))
        output.writeimage("samples", np.zeros([2, 2, 3], dtype=np.uint8), 1)
        output.close()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""]  # log.txt, opened


def test_missing_tensorboard_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=re.escape("improved-diffusion[tensorboard]")) as error:
        make_output_format("tensorboard", str(tmp_path))
    assert "\n" not in str(error.value)


# -- outputs by name ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("log", "log.txt"),
        ("json", "progress.json"),
        ("csv", "progress.csv"),
        ("tensorboard", "tb"),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-rank001"])
def test_output_by_name_writes_its_file(tmp_path, format, name, suffix):
    folder = tmp_path / "new" / "run"
    output = make_output_format(format, str(folder), suffix)
    output.writekvs({"a": 1})
    output.close()
    stem, dot, ending = name.partition(".")
    assert os.listdir(folder) == [stem + suffix + dot + ending]


def test_stdout_gets_table_and_message(tmp_path, capsys):
    output = make_output_format("stdout", str(tmp_path))
    output.writekvs({"a": 1})
    output.writeseq(["hello", 2])
    output.close()
    assert capsys.readouterr().out.splitlines()[1:] == ["| a | 1 |", "---------", "hello 2"]
    print("still open")
    assert os.listdir(tmp_path) == []


def test_unknown_output_is_an_error_that_names_the_choices(tmp_path):
    with pytest.raises(ValueError, match="'jsn'") as error:
        make_output_format("jsn", str(tmp_path))
    for name in ("stdout", "log", "json", "csv", "tensorboard"):
        assert name in str(error.value)
