"""The demo model's tokenizer, for the tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    try:
        directory = request.getfixturevalue("demo_model_directory")
    except pytest.FixtureLookupError:
        if "ALORA_DEMO_MODEL_DIR" not in os.environ:
            pytest.skip("needs the demo model")
        directory = Path(os.environ["ALORA_DEMO_MODEL_DIR"])
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return tokenizer
