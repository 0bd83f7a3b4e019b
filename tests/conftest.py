"""Shared by all tests: the dtypes, a bit comparison, and poisoned inputs that exercise the selection contract."""

import csv
import importlib.util

import compilers
import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ((1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (1, 4), (3, 16), (31, 32))


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a test where the package is not installed, without importing it."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


def _compiles(item) -> bool:
    return hasattr(getattr(item, "module", None), "start_compilers") and item.get_closest_marker("slow") is not None


def pytest_collection_modifyitems(items):
    items.sort(key=_compiles)


def pytest_runtestloop(session):
    if not session.config.option.collectonly:
        items = [item for item in session.items if _compiles(item)]
        for module in dict.fromkeys(item.module for item in items):
            module.start_compilers([item.callspec.params["name"] for item in items if item.module is module])


def pytest_sessionfinish():
    compilers.stop()


def assert_same_bits(actual, expected, *, any_nan: bool = False, what: str = "") -> None:
    """Equal shape, dtype and bits; with ``any_nan`` one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if any_nan:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (t.masked_fill(t.isnan(), 0.0) for t in (actual, expected))
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    same = actual.contiguous().view(integer) == expected.contiguous().view(integer)
    assert same.all(), f"{what}: {(~same).sum()} of {same.numel()} values differ"


def hard_activations(tokens: int, in_features: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random rows in which one is all ties, one has -0.0, one NaN and inf, one only infinities, one is all zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    special = [
        torch.randint(-2, 3, (in_features,), generator=generator).to(dtype),
        torch.where(torch.arange(in_features) % 3 == 0, -0.0, x[0].float()).to(dtype),
        x[0].clone(),
        torch.full((in_features,), float("inf"), dtype=dtype),
        torch.zeros(in_features, dtype=dtype),
    ]
    special[2][1], special[2][in_features // 2], special[2][-1] = float("nan"), float("inf"), -float("inf")
    for row, values in enumerate(special[: max(0, tokens - 1)]):
        x[row + 1] = values
    return x


def csv_rows(path) -> list[dict[str, str]]:
    """The rows of a CSV file, each by its column names."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def one_and_two_threads(call):
    """What a call gives with one thread, and with two."""
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    return results


def failing(error):
    """A function that raises the error, whatever it is called with."""

    def function(*_arguments, **_options):
        raise error

    return function


def fails_after(monkeypatch, owner, name: str, calls: int, error=RuntimeError) -> None:
    """Let a function raise after a number of calls, and before it does anything."""
    original, left = getattr(owner, name), [calls]

    def function(*arguments, **options):
        if not left[0]:
            raise error("no more")
        left[0] -= 1
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, function)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint, saved."""
    import tiny_model  # imports Transformers, which most tests do without

    return tiny_model.save(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def tiny():
    """A tiny model and its tokenizer, for tests that leave it as it is."""
    import tiny_model

    return tiny_model.build()


@pytest.fixture(scope="module")
def dense():
    """A tiny dense model, the teacher of sparse ones."""
    import tiny_model

    return tiny_model.teacher()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file with the text that the tiny checkpoint's tokenizer was made from."""
    import tiny_model

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_model.TEXT)
    return path


@pytest.fixture(autouse=True)
def _seed(request):
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu"):
        from cuda_cases import poison

        poison()


@pytest.fixture
def graphs():
    """The graphs that torch.compile made with ``backend=graphs.backend``, which runs them as they are."""
    torch._dynamo.reset()
    return Graphs()


class Graphs(list):
    def backend(self, graph, _inputs):
        self.append(graph)
        return graph
