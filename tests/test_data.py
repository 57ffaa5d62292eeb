"""Every form of data gives the values that it holds, and gives them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from PIL import Image

from onnxq.data import Samples, fed_back, load_function, open_samples
from onnxq.errors import DataError, RecipeError
from onnxq.images import ImageOptions
from onnxq.runtime import Session
from tests import tiny

X, SHIFT, LABELS = tiny.rows(), tiny.rows(seed=2), np.arange(8) % 3
DENSE, TWO = tiny.inputs(), tiny.inputs(tiny.TWO_INPUTS)
FOURS, CONV = tiny.inputs(tiny.DENSE_IN_FOURS), tiny.inputs(tiny.CONV)


def check(
    samples: Samples,
    feeds: Sequence[dict[str, np.ndarray]],
    labels: Sequence[Any] | np.ndarray | None = None,
    length: int | None = None,
) -> None:
    """The samples are these feeds, with these labels, as often as they are read; also where a reading was cut short."""
    assert samples.length == length
    if feeds:
        next(iter(samples))
    for _ in range(2):
        found = list(samples)
        assert len(found) == len(feeds)
        for k, (sample, feed) in enumerate(zip(found, feeds, strict=True)):
            assert list(sample.feed) == list(feed)
            for name, array in feed.items():
                np.testing.assert_array_equal(sample.feed[name], array, strict=True)
            if labels is None:
                assert sample.label is None
            else:
                assert sample.label is not None
                np.testing.assert_array_equal(sample.label, labels[k])


def one_by_one(**arrays: np.ndarray) -> list[dict[str, np.ndarray]]:
    return [{name: a[k : k + 1] for name, a in arrays.items()} for k in range(len(next(iter(arrays.values()))))]


# ---- files of numpy's


@pytest.mark.parametrize("key", ["label", "labels"])
def test_folder_of_npz_feeds(tmp_path: Path, key: str) -> None:
    for k, feed in enumerate(one_by_one(x=X[:3], shift=SHIFT[:3])):
        np.savez(tmp_path / f"{k}.npz", **feed, **{key: LABELS[k : k + 1]})  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("not a feed")
    samples = open_samples(tmp_path, TWO)
    check(samples, one_by_one(x=X[:3], shift=SHIFT[:3]), LABELS[:3, None], length=3)
    assert [s.where for s in samples] == ["0.npz", "1.npz", "2.npz"]


def test_feeds_of_different_batch_sizes_are_not_batched_anew(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X[:5])
    np.savez(tmp_path / "b.npz", x=X[5:])
    check(open_samples(str(tmp_path), DENSE), [{"x": X[:5]}, {"x": X[5:]}], length=2)


def test_stacked_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, shift=SHIFT)
    samples = open_samples(tmp_path / "d.npz", TWO)
    check(samples, one_by_one(x=X, shift=SHIFT), length=8)
    assert [s.where for s in samples][-1] == "d.npz[7]"


def test_stacked_npz_with_labels(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=X, label=LABELS)
    check(open_samples(str(tmp_path / "d.npz"), DENSE), one_by_one(x=X), LABELS[:, None], length=8)


def test_an_input_called_label_is_an_input(tmp_path: Path) -> None:
    inputs = tiny.inputs(tiny.TWO_INPUTS.replace("shift", "label"))
    np.savez(tmp_path / "d.npz", x=X, label=SHIFT)
    check(open_samples(tmp_path / "d.npz", inputs), one_by_one(x=X, label=SHIFT), length=8)


def test_an_array_without_axes_goes_with_every_sample(tmp_path: Path) -> None:
    inputs = tiny.inputs("tiny (float[N, 4] x, float k) => (float[N, 4] y) { y = Mul (x, k) }")
    np.savez(tmp_path / "d.npz", x=X, k=np.float32(3))
    check(
        open_samples(tmp_path / "d.npz", inputs),
        [{"x": X[k : k + 1], "k": np.array(3, np.float32)} for k in range(8)],
        length=8,
    )


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    check(open_samples(tmp_path / "d.npy", DENSE), one_by_one(x=X), length=8)


def test_npy_needs_a_model_of_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    with pytest.raises(DataError, match=r"d\.npy holds one array, and the model has 2 inputs; use an \.npz"):
        open_samples(tmp_path / "d.npy", TWO)


def test_an_empty_npy_is_empty_and_not_unreadable(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X[:0])
    with pytest.raises(DataError, match=r"^d\.npy is empty"):
        open_samples(tmp_path / "d.npy", DENSE)


def test_a_batch_dimension_that_is_baked_in_sets_the_step(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, label=LABELS)
    feeds, labels = [{"x": X[:4]}, {"x": X[4:]}], [LABELS[:4], LABELS[4:]]
    samples = open_samples(tmp_path / "d.npz", FOURS)
    check(samples, feeds, labels, length=2)
    assert [s.where for s in samples] == ["d.npz[0]", "d.npz[4]"]
    np.save(tmp_path / "d.npy", tiny.rows(7))
    with pytest.raises(DataError, match=r"batches of 4, which leaves 3 samples over"):
        open_samples(tmp_path / "d.npy", FOURS)
    np.save(tmp_path / "d.npy", X[:3])
    with pytest.raises(DataError, match=r"d\.npy: the model takes batches of 4, and there are fewer"):
        open_samples(tmp_path / "d.npy", FOURS)


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, shift=SHIFT[:5])
    with pytest.raises(DataError, match=r"differ in length along axis 0, \{'x': 8, 'shift': 5\}"):
        open_samples(tmp_path / "d.npz", TWO)


# ---- test_data_set_* folders


def test_folders_of_the_onnx_backend_tests(tmp_path: Path) -> None:
    feeds = one_by_one(x=X[:2], shift=SHIFT[:2])
    for k, feed in enumerate(feeds):
        (tmp_path / f"test_data_set_{k}").mkdir()
        for index, array in enumerate(feed.values()):
            (tmp_path / f"test_data_set_{k}" / f"input_{index}.pb").write_bytes(
                onnx.numpy_helper.from_array(array).SerializeToString()
            )
    check(open_samples(tmp_path, TWO), feeds, length=2)
    check(open_samples(tmp_path / "test_data_set_1", TWO), feeds[1:], length=1)
    (tmp_path / "test_data_set_1" / "input_1.pb").unlink()
    with pytest.raises(DataError, match=r"test_data_set_1/input_1\.pb, for input shift, cannot be read"):
        list(open_samples(tmp_path, TWO))
    (tmp_path / "test_data_set_1" / "input_1.pb").write_bytes(b"no tensor")
    with pytest.raises(DataError, match=r"input_1\.pb, for input shift, is no serialized value"):
        list(open_samples(tmp_path, TWO))


# ---- images

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)


def picture(seed: int, height: int = 4, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def put(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def normal(pixels: np.ndarray, mean: Any = MEAN, std: Any = STD, scale: float = 1 / 255) -> np.ndarray:
    """(1, H, W, C) by the formula, in double precision."""
    return ((pixels * scale - np.array(mean)) / np.array(std))[None]


def close(samples: Samples, expected: Sequence[np.ndarray]) -> None:
    for _ in range(2):
        found = [s.feed["x"] for s in samples]
        assert len(found) == len(expected)
        for array, wanted in zip(found, expected, strict=True):
            assert array.dtype == np.float32
            assert array.flags.c_contiguous
            np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)


def first(array: np.ndarray) -> np.ndarray:
    """NHWC as NCHW."""
    return array.transpose(0, 3, 1, 2)


def test_images_are_normalized_by_channel(tmp_path: Path) -> None:
    for k in range(3):
        put(tmp_path / f"{k}.png", picture(k))
    (tmp_path / "README.txt").write_text("no image")
    samples = open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD))
    assert samples.length == 3
    close(samples, [first(normal(picture(k))) for k in range(3)])
    assert [s.where for s in samples] == ["0.png", "1.png", "2.png"]
    assert all(s.label is None for s in samples)


def test_images_in_bgr_have_mean_and_std_in_that_order(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    samples = open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD, order="BGR"))
    close(samples, [first(normal(picture(0)[..., ::-1]))])


def test_images_with_the_channel_last_and_another_scale(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    inputs = tiny.inputs(tiny.LAST_CHANNEL)
    samples = open_samples(tmp_path, inputs, images=ImageOptions(mean=(127.5,), std=(128.0,), scale=1.0, layout="NHWC"))
    close(samples, [normal(picture(0), 127.5, 128.0, 1.0)])


def test_images_take_the_size_of_the_model_or_the_one_given(tmp_path: Path) -> None:
    solid = np.full((20, 10, 3), (10, 20, 30), np.uint8)
    put(tmp_path / "a.png", solid)
    close(open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD)), [first(normal(solid[:4, :6]))])
    free = tiny.inputs(tiny.CONV_OF_ANY_SIZE)
    sized = ImageOptions(size=(5, 7), mean=MEAN, std=STD)
    close(open_samples(tmp_path, free, images=sized), [first(normal(solid[:5, :7]))])
    with pytest.raises(DataError, match="the size of input x is not in the model: give --image-size"):
        open_samples(tmp_path, free, images=ImageOptions(mean=MEAN, std=STD))
    put(tmp_path / "a.png", picture(0, 8, 12))
    half = np.asarray(Image.fromarray(picture(0, 8, 12)).resize((6, 4), Image.Resampling.BILINEAR))
    close(open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD)), [first(normal(half))])


def test_images_of_one_channel(tmp_path: Path) -> None:
    grey = picture(0)[..., 0]
    put(tmp_path / "a.png", grey)
    inputs = tiny.inputs(tiny.CONV_OF_GREY)
    close(
        open_samples(tmp_path, inputs, images=ImageOptions(mean=(0.5,), std=(0.5,))),
        [first(normal(grey[..., None], 0.5, 0.5))],
    )
    with pytest.raises(DataError, match="--image-mean has 3 numbers, and the images have 1 channel; give one number"):
        open_samples(tmp_path, inputs, images=ImageOptions(mean=MEAN, std=STD))


def test_a_subfolder_is_a_class_in_sorted_order(tmp_path: Path) -> None:
    for k, name in enumerate(["dog/1.png", "cat/9.png", "ape/5.png", "dog/0.png"]):
        put(tmp_path / name, picture(k))
    samples = open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD))
    assert [(s.where, int(np.asarray(s.label)[0])) for s in samples] == [
        ("ape/5.png", 0),
        ("cat/9.png", 1),
        ("dog/0.png", 2),
        ("dog/1.png", 2),
    ]
    close(samples, [first(normal(picture(k))) for k in (2, 1, 3, 0)])
    put(tmp_path / "loose.png", picture(0))
    with pytest.raises(DataError, match=r"loose\.png lies beside the folders of classes ape, cat, dog"):
        open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD))


def test_one_subfolder_is_no_class(tmp_path: Path) -> None:
    put(tmp_path / "all" / "a.png", picture(0))
    assert [s.label for s in open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD))] == [None]


def test_labels_in_a_listing(tmp_path: Path) -> None:
    for k, name in enumerate(["a.png", "b b.png", "sub/c.png"]):
        put(tmp_path / name, picture(k))
    listing, options = tmp_path / "labels.txt", ImageOptions(mean=MEAN, std=STD)
    listing.write_text("sub/c.png 7\n\na.png 5\nb b.png 6\nnot-here.png 1\n")
    assert [int(np.asarray(s.label)[0]) for s in open_samples(tmp_path, CONV, images=options)] == [5, 6, 7]
    listing.write_text("a.png 5\n")
    with pytest.raises(DataError, match=r"labels\.txt has no line for b b\.png; it needs 'FILE CLASS'"):
        open_samples(tmp_path, CONV, images=options)
    for wrong in ("a.png dog", "a.png", "a.png 1.5"):
        listing.write_text(f"sub/c.png 7\n{wrong}\n")
        with pytest.raises(DataError, match=rf"labels\.txt, line 2: '{wrong}' is not 'FILE CLASS'"):
            open_samples(tmp_path, CONV, images=options)


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    with pytest.raises(DataError, match="give --image-mean and --image-std"):
        open_samples(tmp_path, CONV)
    with pytest.raises(DataError, match="feeds one input, and the model has 2"):
        open_samples(tmp_path, TWO, images=ImageOptions(mean=MEAN, std=STD))
    with pytest.raises(DataError, match="--image-std has 2 numbers, and the images have 3 channels"):
        open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=(1.0, 1.0)))
    whole = (tmp_path / "a.png").read_bytes()
    for damaged in (b"", b"text", whole[:60]):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.png is no readable image"):
            list(open_samples(tmp_path, CONV, images=ImageOptions(mean=MEAN, std=STD)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"layout": "nchw"}, "unknown image layout nchw; did you mean|valid: NCHW, NHWC"),
        ({"order": "RBG"}, "unknown image order RBG; did you mean .*RGB"),
        ({"size": (0, 3)}, "a height and a width of at least 1"),
        ({"std": (1.0, 0.0, 1.0)}, "none of it may be 0"),
        ({"mean": (float("nan"),)}, "finite numbers"),
        ({"scale": float("inf")}, "finite numbers"),
    ],
)
def test_image_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        ImageOptions(**options)


# ---- module:function

MODULE = """
import numpy as np
X = np.load({file!r})
calls = 0
def feeds():
    return [{{"x": X[k:k + 1]}} for k in range(3)]
def pairs():
    return [({{"x": X[k:k + 1]}}, k) for k in range(3)]
def generated():
    global calls
    calls += 1
    for k in range(3):
        yield {{"x": X[k:k + 1], "label": np.array([k])}}
class Reader:
    def __init__(self):
        self.k = 0
    def get_next(self):
        self.k += 1
        return {{"x": X[self.k - 1:self.k]}} if self.k <= 3 else None
def breaks():
    yield {{"x": X[:1]}}
    raise KeyError("gone")
def breaks_at_once():
    return 1 / 0
def nothing():
    return None
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    np.save(tmp_path / "x.npy", X)
    name = f"module_{abs(hash(tmp_path))}"  # each test imports its own
    (tmp_path / f"{name}.py").write_text(MODULE.format(file=str(tmp_path / "x.npy")))
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("function, labelled", [("feeds", False), ("pairs", True), ("generated", True), ("Reader", False)])
def test_function_of_a_module(module: str, function: str, labelled: bool) -> None:
    samples = open_samples(f"{module}:{function}", DENSE)
    check(samples, one_by_one(x=X[:3]), [0, 1, 2] if labelled else None)
    assert [s.where for s in samples] == ["sample 0", "sample 1", "sample 2"]


def test_a_module_is_found_in_the_current_folder(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(open_samples(f"{module}:feeds", DENSE), one_by_one(x=X[:3]))


@pytest.mark.parametrize(
    "function, words",
    [
        ("fedes", "has no fedes; did you mean feeds"),
        ("breaks", r"breaks raised KeyError: 'gone'; look at line 22 of .*\.py"),
        ("breaks_at_once", r"raised ZeroDivisionError: division by zero; look at line 24 of .*\.py"),
        ("nothing", "data of type NoneType is not an iterable of feeds"),
        ("number", "data of type int is not an iterable of feeds"),
    ],
)
def test_a_function_that_fails_is_named(module: str, function: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(open_samples(f"{module}:{function}", DENSE))


def test_a_module_that_is_not_there_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=r"module no_such_module cannot be imported: .*; run where no_such_module\.py is"):
        open_samples("no_such_module:feeds", DENSE)
    (tmp_path / "module_of_bad_syntax.py").write_text("def (")
    with pytest.raises(DataError, match="module module_of_bad_syntax cannot be imported: SyntaxError"):
        open_samples("module_of_bad_syntax:feeds", DENSE)


@pytest.mark.parametrize("text", ["accuracy", ":accuracy", "metrics:"])
def test_a_function_is_named_with_its_module(text: str) -> None:
    with pytest.raises(DataError, match=f"^{text} names no function; it takes MODULE:FUNCTION"):
        load_function(text)


def test_a_loaded_function_is_called_with_what_it_is_given(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_2.py").write_text("def f(a, *, b):\n    return a - b\n")
    assert load_function(f"{module}_2:f")(5, b=3) == 2
    with pytest.raises(DataError, match="number is a int; it takes a function"):
        load_function(f"{module}:number")


# ---- the library


class Reader:
    """As onnxruntime's CalibrationDataReader: read once, no length."""

    def __init__(self, feeds: Iterable[Any]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)

    def __len__(self) -> int:
        raise NotImplementedError


class Loader:
    """As a DataLoader over an iterable: read as often as wanted, and no length when asked."""

    def __iter__(self) -> Iterator[Any]:
        yield from one_by_one(x=X)

    def __len__(self) -> int:
        raise TypeError("no length")


def test_a_list_of_feeds_or_pairs() -> None:
    check(open_samples(one_by_one(x=X), DENSE), one_by_one(x=X), length=8)
    check(open_samples([(f, k) for k, f in enumerate(one_by_one(x=X))], DENSE), one_by_one(x=X), range(8), length=8)
    check(open_samples(tuple(one_by_one(x=X, label=LABELS)), DENSE), one_by_one(x=X), LABELS[:, None], length=8)
    check(open_samples(Loader(), DENSE), one_by_one(x=X))


def test_a_generator_is_read_once_and_gives_its_samples_again() -> None:
    pulled = []

    def generate() -> Iterator[Any]:
        for k, feed in enumerate(one_by_one(x=X, shift=SHIFT)):
            pulled.append(k)
            yield feed, k

    samples = open_samples(generate(), TWO)
    assert not pulled, "samples are pulled lazily"
    next(iter(samples))
    assert pulled == [0]
    check(samples, one_by_one(x=X, shift=SHIFT), range(8))
    assert pulled == list(range(8))
    again = [next(pair) for pair in [iter(samples), iter(samples)]]
    np.testing.assert_array_equal(again[0].feed["x"], again[1].feed["x"])


def test_two_readings_at_a_time_of_a_generator() -> None:
    samples = open_samples((f for f in one_by_one(x=X)), DENSE)
    pairs = list(zip(samples, samples, strict=True))
    assert len(pairs) == 8
    for (a, b), feed in zip(pairs, one_by_one(x=X), strict=True):
        np.testing.assert_array_equal(a.feed["x"], feed["x"])
        np.testing.assert_array_equal(b.feed["x"], feed["x"])


def test_a_calibration_data_reader() -> None:
    check(open_samples(Reader(one_by_one(x=X)), DENSE), one_by_one(x=X))
    check(open_samples(lambda: Reader(one_by_one(x=X)), DENSE), one_by_one(x=X))


def test_inputs_of_any_name_and_strings_are_kept() -> None:
    proto = tiny.model(
        "tiny (string[N] words, float[N, 4] x) => (string[N] w, float[N, 4] y) { w = Identity (words) y = Relu (x) }"
    )
    proto.graph.input[1].name = proto.graph.node[1].input[0] = "scope/file:0"
    inputs = Session(proto, threads=1).inputs
    words = np.array(["one", "three"], object)
    (sample,) = open_samples(iter([{"words": words, "scope/file:0": X[:2]}]), inputs)
    assert list(sample.feed) == ["words", "scope/file:0"]
    assert sample.feed["words"].tolist() == ["one", "three"]
    np.testing.assert_array_equal(sample.feed["scope/file:0"], X[:2])


def test_the_spool_is_removed_with_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    samples = open_samples(iter(one_by_one(x=X)), DENSE)
    assert len(list(samples)) == 8
    assert len(list(tmp_path.glob("onnxq-*/*.npz"))) == 8
    del samples
    assert not list(tmp_path.iterdir())


def test_what_is_no_feed_is_named() -> None:
    for source, words in (
        (X, "sample 0 is a ndarray; a feed is a dict"),
        ({"x": X}, "sample 0 is a str; a feed is a dict"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "sample 0: input x is a list that makes no array"),
        (3, "data of type int is not an iterable of feeds"),
        ([], "the data is empty"),
        (iter([]), "the data is empty"),
        (Reader([]), "the data is empty"),
    ):
        with pytest.raises(DataError, match=words):
            list(open_samples(source, DENSE))


# ---- limits and checks


def test_limit(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, label=LABELS)
    path = tmp_path / "d.npz"
    check(open_samples(path, DENSE, limit=3), one_by_one(x=X[:3]), LABELS[:3, None], length=3)
    check(open_samples(path, DENSE, limit=99), one_by_one(x=X), LABELS[:, None], length=8)
    check(open_samples(path, FOURS, limit=1), [{"x": X[:4]}], [LABELS[:4]], length=1)
    check(open_samples(iter(one_by_one(x=X)), DENSE, limit=3), one_by_one(x=X[:3]), length=3)
    for wrong in (0, -1):
        with pytest.raises(DataError, match=f"at most {wrong} samples are asked for"):
            open_samples(path, DENSE, limit=wrong)


def test_samples_that_are_opened_again_keep_their_limit() -> None:
    three = open_samples(one_by_one(x=X), DENSE, limit=3)
    check(open_samples(three, DENSE), one_by_one(x=X[:3]), length=3)
    check(open_samples(three, DENSE, limit=2), one_by_one(x=X[:2]), length=2)
    check(open_samples(three, DENSE, limit=5), one_by_one(x=X[:3]), length=3)


@pytest.mark.parametrize(
    "feed, words",
    [
        ({"x": X[:1], "shfit": X[:1]}, "sample 0: the model has no input shfit; did you mean shift"),
        ({"x": X[:1]}, r"sample 0: there is no array for input shift; it holds \['x'\]"),
        (
            {"x": X[:1], "shift": X[:1].astype(np.int64)},
            "input shift is int64, the model takes float32; store it as float32",
        ),
        ({"x": X[:1], "shift": X[0]}, r"input shift has shape \[4\], the model takes \[\?, 4\]; give every sample"),
        ({"x": X[:1], "shift": X[:1, :3]}, r"input shift has shape \[1, 3\], the model takes \[\?, 4\]"),
    ],
)
def test_a_feed_that_does_not_fit_is_named(feed: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(DataError, match=words):
        list(open_samples([feed], TWO))


@pytest.mark.parametrize("width", [np.float16, np.float64])
def test_floats_of_another_width_are_turned_into_those_that_the_model_takes(width: type) -> None:
    (sample,) = open_samples([{"x": X[:1].astype(width), "shift": X[:1]}], TWO)
    assert sample.feed["x"].dtype == np.float32
    np.testing.assert_allclose(sample.feed["x"], X[:1], rtol=1e-3)


def test_data_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    for source, words in (
        (tmp_path / "no", "there is no data at .*no; --data takes"),
        ("", "there is no data at an empty path"),
        (tmp_path / "d.csv", r"d\.csv is no kind of data that is known; --data takes"),
        (tmp_path, "holds no .npz feeds, no test_data_set_.* folders and no images"),
    ):
        with pytest.raises(DataError, match=words):
            open_samples(source, DENSE)


STREAM = """<ir_version: 9, opset_import: ["" : 17]>
net (float[1, 3] x, float[N, 3] state) => (float[1, 3] y, float[N, 3] next) <float half = {0.5}> {
  kept = Mul (state, half)
  next = Add (kept, x)
  y = Relu (next)
}"""


def test_a_state_is_fed_back_and_starts_anew_where_it_is_given() -> None:
    session = Session(onnx.parser.parse_model(STREAM))
    rows = np.random.default_rng(0).standard_normal((5, 1, 3)).astype(np.float32)
    feeds: list[dict[str, np.ndarray]] = [{"x": row} for row in rows]
    feeds[3]["state"] = np.ones((1, 3), np.float32)
    samples = fed_back(open_samples(feeds, session.inputs), session, {"next": "state"}, session.inputs)
    assert samples.length == 5
    for _ in range(2):  # each reading is the same stream
        state = np.zeros((1, 3), np.float32)
        for k, sample in enumerate(samples):
            state = np.ones((1, 3), np.float32) if k == 3 else state
            np.testing.assert_allclose(sample.feed["state"], state, rtol=1e-6)
            state = 0.5 * state + rows[k]


def test_a_state_that_does_not_fit_is_told_of_the_option() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]>
    net (float[1, 3] x, float[1, 2] state) => (float[1, 3] y, float[1, 2] z) { y = Relu (x) z = Relu (state) }"""
    session = Session(onnx.parser.parse_model(text))
    data = open_samples([{"x": np.ones((1, 3), np.float32)}] * 2, session.inputs)
    samples = fed_back(data, session, {"y": "state"}, session.inputs)
    with pytest.raises(DataError, match=r"feedback y=state, made of sample 0: input state has shape \[1, 3\]"):
        list(samples)


@pytest.mark.parametrize(
    ("states", "words"), [({"nxt": "state"}, "no output nxt; did you mean next"), ({"next": "z"}, "input z")]
)
def test_a_state_that_is_none_of_the_model_s_is_an_error(states: dict[str, str], words: str) -> None:
    session = Session(onnx.parser.parse_model(STREAM))
    with pytest.raises(DataError, match=words):
        fed_back(open_samples([{}], session.inputs), session, states, session.inputs)
