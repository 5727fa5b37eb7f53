"""A plugin for pytest that turns PEFT's tests of its own methods into tests of SQFT's."""

import re
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from sqft.adapters import SqftConfig
from tests.peft_suite.bases import FAMILIES, build_base, build_tokenizer, prepare
from tests.peft_suite.cases import FILES, TABLE
from tests.peft_suite.refusals import OTHERS, UNREACHABLE, refusal_of

# What PEFT's tests import for models of images, none of which is run here.
if find_spec("diffusers") is None:
    sys.modules["diffusers"] = ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]

CONFIG_ARGUMENTS = {
    "config_cls",
    "config_class",
    "config_kwargs",
    "mandatory_kwargs",
    "model_id",
    "test_name",
}
OURS = "sqft_cases"
AUTO = ["Model", "ModelForCausalLM"] + [
    f"ModelFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")
]


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path) -> Generator[None, Any, Any]:
    """Exchange the parameters of every test that PEFT runs for each of its methods."""
    collector: Any = yield
    if module_path.name not in FILES:
        return collector
    for value in list(vars(collector.obj).values()):
        if isinstance(value, type) and value.__module__ == collector.obj.__name__:
            for function in vars(value).values():
                _exchange(function, module_path.stem, value.__name__)
        else:
            _exchange(value, module_path.stem, None)
    return collector


def _exchange(function: Any, file: str, owner: str | None) -> None:
    marks = getattr(function, "pytestmark", []) if isinstance(function, FunctionType) else []
    about = [mark for mark in marks if mark.name == "parametrize" and _names(mark) & CONFIG_ARGUMENTS]
    if not any(len(mark.args[1]) > 3 for mark in about):
        return
    wanted = set().union(*(_names(mark) for mark in about))
    names, values = TABLE.get((file, owner)) or TABLE[file, None]
    if wanted == {"config_cls"}:
        names, values = "config_cls", [SqftConfig]
    elif wanted != {name.strip() for name in names.split(",")}:
        return
    function.pytestmark = [mark for mark in marks if mark not in about]
    pytest.mark.parametrize(names, values)(function)
    getattr(pytest.mark, OURS)(function)


def _names(mark: Any) -> set[str]:
    names = mark.args[0]
    return {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}


def pytest_configure(config: pytest.Config) -> None:
    """Announce the mark of what is run."""
    config.addinivalue_line("markers", f"{OURS}: run on the configurations of sqft")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of PEFT's own methods; expect of a refusal by design that it happens."""
    left_out = f"{UNREACHABLE}|{OTHERS}"
    kept = [i for i in items if i.get_closest_marker(OURS) and not re.search(left_out, i.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for item in kept:
        reason = refusal_of(item.nodeid)
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(autouse=True)
def models_from_configurations() -> Iterator[None]:
    """No hub: models and tokenizers are made on the spot."""
    import transformers

    with ExitStack() as stack:
        for name in AUTO:
            auto = getattr(transformers, f"Auto{name}")
            stack.enter_context(mock.patch.object(auto, "from_pretrained", _opener(auto)))
        tokenizer = transformers.AutoTokenizer
        stack.enter_context(mock.patch.object(tokenizer, "from_pretrained", build_tokenizer))
        yield


def _opener(auto: Any) -> Any:
    """`from_pretrained` of an auto class: of an id of PEFT's tests ours, of a directory its own."""
    original = auto.from_pretrained

    def open_model(
        model_id: Any, *args: Any, dtype: Any = None, torch_dtype: Any = None, **settings: Any
    ) -> Any:
        if not any(key.lower() in str(model_id).lower() for key in FAMILIES) or str(model_id).startswith("/"):
            return original(model_id, *args, dtype=dtype or torch.float32, **settings)
        return build_base(auto, model_id, dtype or torch_dtype)

    return open_model


@pytest.fixture(autouse=True)
def small_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """PEFT's MLP, pruned or quantized where the id says so."""
    wrapper = getattr(request.module, "MockTransformerWrapper", None)
    if wrapper is None:
        yield
        return
    original = wrapper.from_pretrained

    def open_model(model_id: str, dtype: Any = None) -> Any:
        return prepare(original(model_id.partition(" ")[0], dtype), model_id)

    with mock.patch.object(wrapper, "from_pretrained", open_model):
        yield
