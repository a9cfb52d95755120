"""The decoders one by one, and a user's own through open_shards."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from shardsets import write_tar

from pipeline.config import Data, UserError
from trainer.data import MeasuringStream, decoding, open_shards
from trainer.data.augment import Augment
from trainer.data.choices import DECODERS, PICTURES
from trainer.data.decoding import built_in, decode, hashed_ngrams, import_function


def opened(path, extension, contents, **data):
    files = []
    for number, content in enumerate(contents):
        files += [(f"{number}.cls", b"0"), (f"{number}.{extension}", content)]
    write_tar(path / "train-0.tar", files)
    (path / "train-0.tar.index.npz").unlink(missing_ok=True)
    return open_shards(str(path), Data(classes=2, **data), "train")


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A module `mine` in the working directory, as a user has it: a function that writes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source):
        (tmp_path / "mine.py").write_text(source)
        sys.modules.pop("mine", None)

    yield write
    sys.modules.pop("mine", None)


def test_the_table_is_small():
    pictures = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"}
    pictures |= {"ppm", "pgm", "pbm", "pnm"}
    assert set(PICTURES) == pictures and set(DECODERS) == pictures | {"npy", "txt", "json"}
    assert built_in().keys() == DECODERS.keys()


def test_a_decoder_is_one_row_and_one_function(users, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    users("import numpy as np\ndef f(content):\n    return np.frombuffer(content, 'u1')\n")
    monkeypatch.setitem(DECODERS, "raw", "mine:f")
    table = decoding.decoder_table({})
    assert decoding.decode(decoding.find_decoder(table, "raw"), b"ab").tolist() == [97, 98]


def test_the_tables_of_names_import_nothing_heavy():
    heavy = "{'torch', 'PIL', 'numpy'} & set(sys.modules)"
    script = f"import sys, trainer.data.choices; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_a_users_function_decodes_what_it_is_named_for(tmp_path, users):
    users(
        "import numpy as np\n"
        "def words(content):\n"
        "    return np.array([len(content.split())], np.float32)\n"
    )
    shards = opened(tmp_path, "txt", [b"a b c", b"d"], decoders={"txt": "mine:words"})
    assert shards.inputs([0, 1]).tolist() == [[3.0], [1.0]]
    assert [batch.inputs.tolist() for batch in MeasuringStream(shards, 1).loader(workers=1)] == [
        [[3.0]],
        [[1.0]],
    ]
    # An extension of the user's own:
    shards = opened(tmp_path, "words", [b"a b"], decoders={"words": "mine:words"})
    assert shards.inputs([0]).tolist() == [[2.0]]


@pytest.mark.parametrize(
    "name, message",
    [
        ("mine:absent", "data.decoders.txt = 'mine:absent': module mine has no function absent"),
        ("mine:VALUE", "module mine has no function VALUE"),
        ("nobodys:f", "data.decoders.txt = 'nobodys:f': No module named 'nobodys'"),
        ("mine", "write module:function"),
        (":f", "write module:function"),
        ("mine:", "write module:function"),
    ],
)
def test_a_decoder_that_cannot_be_imported_is_named(tmp_path, users, name, message):
    users("VALUE = 3\n")
    assert message in refusal(opened, tmp_path, "txt", [b"a"], decoders={"txt": name})


@pytest.mark.parametrize(
    "body, message",
    [
        ("return [1, 2]", "f gives list; a numpy array of numbers is needed"),
        ("import torch; return torch.zeros(2)", "f gives Tensor"),
        ("return None", "f gives NoneType"),
        ("import numpy as np; return np.array(['a'])", "f gives <U1"),
        ("import numpy as np; return np.array([{}], object)", "f gives object"),
        ("return 1 / 0", "division by zero"),
    ],
)
def test_a_decoder_that_gives_no_array_is_told_so(tmp_path, users, body, message):
    users(f"def f(content):\n    {body}\n")
    shards = opened(tmp_path, "txt", [b"a"], decoders={"txt": "mine:f"})
    line = refusal(shards.inputs, [0])
    assert "train-0.tar: sample 0: cannot be decoded: " in line and message in line


def test_a_decoder_whose_shape_or_type_changes_is_told_so(tmp_path, users):
    users(
        "import numpy as np\n"
        "def f(content):\n"
        "    return np.zeros(len(content), 'f4' if content < b'm' else 'f8')\n"
    )
    shards = opened(tmp_path, "txt", [b"ab", b"abc", b"xy"], decoders={"txt": "mine:f"})
    assert "sample 1: is float32 [3], the first sample float32 [2]" in refusal(
        shards.inputs, [0, 1]
    )
    assert "sample 2: is float64 [2], the first sample float32 [2]" in refusal(
        shards.inputs, [0, 2]
    )


def test_texts_and_json_without_a_decoder_of_ones_own(tmp_path):
    assert opened(tmp_path, "txt", ["né".encode()]).inputs([0])[0].tolist() == list("né".encode())
    assert "invalid start byte" in refusal(opened(tmp_path, "txt", [b"\xff\xfe"]).inputs, [0])
    numbers = opened(tmp_path, "json", [json.dumps([[1, 2.5], [3, 4]]).encode()]).inputs([0])
    assert numbers.dtype == np.float32 and numbers[0].tolist() == [[1, 2.5], [3, 4]]
    for wrong in (b"[[1], [2, 3]]", b'{"a": 1}', b'["a"]', b"[1"):
        assert "cannot be decoded" in refusal(opened(tmp_path, "json", [wrong]).inputs, [0])


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
def test_what_is_no_picture_is_told_so(tmp_path, extension):
    message = refusal(opened(tmp_path, extension, [b"not a picture"]).inputs, [0])
    assert "no picture of a kind that Pillow knows" in message


def test_npy_keeps_its_type_and_refuses_the_rest(tmp_path):
    def content(array):
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    for kind in ("uint8", "int64", "float32", "float64"):
        array = opened(tmp_path, "npy", [content(np.arange(3).astype(kind))]).inputs([0])
        assert array.dtype == kind and array.tolist() == [[0, 1, 2]]
    assert "cannot be decoded" in refusal(opened(tmp_path, "npy", [b"rubbish"]).inputs, [0])


def test_hashed_ngrams_see_characters_and_not_their_case_or_spacing():
    a = hashed_ngrams(b"Soybean farming")
    b = hashed_ngrams(b"  soybean   FARMING ")
    c = hashed_ngrams(b"soy farm")
    assert (a == b).all() and abs(np.linalg.norm(a) - 1) < 1e-6
    assert 0 < a @ c < 1 and hashed_ngrams(b"").sum() > 0
    assert a @ hashed_ngrams(b"Soybean farms") > 2 * abs(a @ hashed_ngrams(b"quick zephyr"))


BROKEN_MODULES = {
    "syntax": ("def f(:\n", "SyntaxError: .*syntax_.py, line 1"),
    "name": ("\nx = nobody\n", "NameError: name 'nobody' is not defined .*name_.py:2"),
    "value": ("raise ValueError('bad\\nvalue')", "ValueError: bad value .*value_.py:1"),
    "exit": ("import sys\nsys.exit(3)", "SystemExit: 3 .*exit_.py:2"),
    "import": ("import nobodys", "ModuleNotFoundError: No module named 'nobodys' .*import_.py:1"),
}


@pytest.mark.parametrize("key", ["data.decoders.png", "data.augment", "model.name", "--builder"])
@pytest.mark.parametrize("kind", BROKEN_MODULES)
def test_a_users_module_that_cannot_be_imported_is_one_line_with_the_error_and_its_place(
    tmp_path, monkeypatch, kind, key
):
    text, words = BROKEN_MODULES[kind]
    (tmp_path / f"{kind}_.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(f"{kind}_", None)
    with pytest.raises(UserError) as error:
        import_function(f"{kind}_:f", key)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"{key} = '{kind}_:f': the import of")
    assert re.search(words, message)


def test_a_decoder_that_ends_the_program_is_an_input_that_cannot_be_decoded():
    def leave(_):
        raise SystemExit(3)

    with pytest.raises(ValueError, match="it ended the program: SystemExit: 3"):
        decode(leave, b"")


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda inputs, numbers: None, "gives NoneType"),
        (lambda inputs, numbers: inputs[:1], r"gives shape \[1, 4\] for 3 inputs"),
        (lambda inputs: inputs, "fails: TypeError"),
        (lambda inputs, numbers: numbers["x"], "fails: IndexError"),
        (lambda inputs, numbers: sys.exit(3), "fails: SystemExit: 3"),
    ],
)
def test_a_users_augmentation_that_breaks_its_contract_is_one_line(function, words):
    augment = Augment(function, 8, "mine:augment")
    with pytest.raises(UserError, match=rf"data.augment = 'mine:augment' {words}.*views"):
        augment(np.zeros((3, 4)), np.zeros((3, 8)))
