import pytest

from tests.tiny import FAMILIES, tiny_clip, tiny_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A saved tiny pipeline per family, for reading only; sd15's has a clip/."""
    result = {}
    for family in FAMILIES:
        result[family] = tmp_path_factory.mktemp(family)
        tiny_pipeline(family).save_pretrained(result[family])
    tiny_clip().save_pretrained(result["sd15"] / "clip")
    return result
